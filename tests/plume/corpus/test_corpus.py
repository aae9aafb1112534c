"""A corpus in shards: what an index would hold, each row once, whatever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from plume import Plume
from plume.cli.main import app
from plume.corpus import commit as committing
from plume.corpus import work
from plume.corpus.commit import commit
from plume.corpus.plan import Job
from plume.corpus.sources import entries
from plume.corpus.work import ShardWorker, run_here
from plume.inputs.file_kinds import Kind
from plume.search.folder import Skipped
from plume.search.index import Identity, Index
from tests.mixed import write_mixed_folder
from tests.processes import run as run_command
from tests.processes import started


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for number in range(11):
        (folder / ("deep" if number % 3 else "") / f"{number}.txt").write_text(f"kite {number}")
    (folder / "copy.txt").write_text("kite 3")
    return folder


def planned(plume, tmp_path, source, shard_size=4, **settings) -> Job:
    job = Job.create(tmp_path / "job", Identity.of(plume, **settings))
    job.plan(entries(str(source)), shard_size)
    return job


def finished(job: Job) -> int:
    rows: list[int] = []
    run_here(ShardWorker(job.path, device="cpu"), rows.append)
    return sum(rows)


def content(index: Index) -> dict[tuple, np.ndarray]:
    names = ["root", "name", "path", "kind", "page", "num_pages", "sha256", "size", "mtime_ns", "excerpt", "thumbnail"]
    rows = index.store.rows([*names, "vector"])
    found = {tuple(row[name] for name in names): np.array(row["vector"]) for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def same(one: Index, other: Index) -> None:
    ours, theirs = content(one), content(other)
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[key] - theirs[key]).max() for key in ours) < 2e-6


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout + "\n" + result.stderr


def test_a_corpus_gives_the_rows_of_an_index(plume, tmp_path):
    root = tmp_path / "mixed"
    root.mkdir()
    write_mixed_folder(root)
    settings = {"num_latent_steps": 2, "query_latent_steps": 3, "instruction": "a page", "max_pixels": 50_176}
    index = Index.create(tmp_path / "index", plume, **settings)
    report = index.update(root, plume, show_progress=False)
    job = planned(plume, tmp_path, root, **settings)
    assert finished(job) == report.embedded + report.reused
    done = commit(job, tmp_path / "corpus")
    assert (done.added, done.present, done.shards) == (len(index), 0, len(job.shards()))
    assert len(job.shards()) > 3
    same(Index.open(tmp_path / "corpus"), index)
    refused = {one.name for one in job.status().skipped}
    left_out = {one.name for one in entries(str(root)) if isinstance(one, Skipped)}
    assert refused | left_out == {one.name for one in report.skipped}
    assert len(refused) > 3
    assert Index.open(tmp_path / "corpus").search("kite", plume)[0].path == index.search("kite", plume)[0].path


def test_planning_again_adds_what_is_new(plume, tmp_path, texts):
    job = planned(plume, tmp_path, texts)
    first = job.shards()
    assert len(first) == 3  # 11 contents in shards of four
    assert Job.create(tmp_path / "again", job.identity).plan(entries(str(texts)), 4).shards != []
    assert Job.open(tmp_path / "again").shards() == first  # the same, whoever plans
    (texts / "12.txt").write_text("kite 12")
    (texts / "0.txt").write_text("another kite")
    report = job.plan(entries(str(texts)), 4)
    assert (report.new, report.known, len(report.shards)) == (2, 11, 1)
    assert set(first) < set(job.shards())
    with pytest.raises(ValueError, match="num_latent_steps"):
        Job.create(tmp_path / "job", Identity.of(plume, num_latent_steps=1))
    with pytest.raises(ValueError, match="holds something that is no job"):
        Job.create(texts, job.identity)
    with pytest.raises(ValueError, match="is no job"):
        Job.open(tmp_path)


def test_a_file_that_has_changed_since_it_was_planned_is_left_out(plume, tmp_path, texts):
    job = planned(plume, tmp_path, texts)
    (texts / "0.txt").write_text("something else")
    (texts / "9.txt").unlink()
    assert finished(job) == 10
    assert {one.name: one.reason for one in job.status().skipped} == {
        "0.txt": "has changed since it was planned; plan again",
        "9.txt": "is not there any more",
    }


def test_what_could_not_be_read_is_planned_again(plume, tmp_path, texts):
    job = planned(plume, tmp_path, texts)
    os.utime(texts / "0.txt", (1, 1))  # touched, which is no change
    hidden = texts / "deep/4.txt"
    hidden.rename(tmp_path / "away")
    (texts / "3.txt").unlink()  # whose copy is still there
    assert finished(job) == 10
    assert {one.name for one in job.status().skipped} == {"deep/4.txt", "3.txt"}
    (tmp_path / "away").rename(hidden)
    report = job.plan(entries(str(texts)), 4)
    assert (report.new, report.known) == (1, 10)
    assert finished(job) == 1
    assert commit(job, tmp_path / "index").added == 11
    assert job.plan(entries(str(texts)), 4).new == 0
    # A shard that was refused whole has a new name when it is planned again.
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.txt").write_text("x")
    alone = Job.create(tmp_path / "alone", Identity.of(plume))
    alone.plan(entries(str(other)), 4)
    (other / "x.txt").rename(tmp_path / "x")
    assert finished(alone) == 0
    (tmp_path / "x").rename(other / "x.txt")
    assert alone.plan(entries(str(other)), 4).new == 1
    assert finished(alone) == 1


def test_a_file_that_changes_while_it_is_read_has_no_vector(plume, tmp_path, texts, monkeypatch):
    job = planned(plume, tmp_path, texts)
    load = work.load

    def rewriting(entry):
        found = load(entry)
        if entry.name == "0.txt":
            (texts / "0.txt").write_text("something else")
        return found

    monkeypatch.setattr(work, "load", rewriting)
    assert finished(job) == 11
    assert [(one.name, one.reason[:20]) for one in job.status().skipped] == [("0.txt", "was written to while")]


def test_every_index_gets_all_rows(plume, tmp_path, texts):
    job = planned(plume, tmp_path, texts)
    finished(job)
    assert commit(job, tmp_path / "one").added == 12
    assert commit(job, tmp_path / "two").added == 12
    shutil.rmtree(tmp_path / "one")
    assert commit(job, tmp_path / "one").added == 12
    assert commit(job, tmp_path / "one") == committing.Committed(0, 0, 0)


def test_a_corpus_and_an_index_of_one_folder_share_their_rows(plume, tmp_path, texts):
    index = Index.create(tmp_path / "index", plume)
    index.update(texts, plume, show_progress=False)
    job = planned(plume, tmp_path, texts)
    finished(job)
    done = commit(job, tmp_path / "index")
    assert (done.added, done.present) == (0, 12)
    again = index.update(texts, plume, show_progress=False)
    assert (again.embedded, again.removed, again.unchanged) == (0, 0, 12)
    inside = Job.create(tmp_path / "inside", Identity.of(plume))
    inside.plan(entries(str(texts / "deep")), 4)
    finished(inside)
    with pytest.raises(ValueError, match="overlap"):
        commit(inside, tmp_path / "index")


def test_rows_of_tables_are_no_files(plume, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    pyarrow.parquet.write_table(pa.table({"text": ["kite", "table"], "id": ["a", "b"]}), folder / "a.parquet")
    job = planned(plume, tmp_path, folder)
    finished(job)
    commit(job, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    root = f"table:{folder.resolve()}"
    assert sorted(row["name"] for row in index.store.rows(["name"])) == ["a.parquet#a", "a.parquet#b"]
    assert index.gone() == {}
    assert all(hit.is_there for hit in index.search("kite", plume))
    (folder / "note.txt").write_text("a note")
    report = index.update(folder, plume, show_progress=False)
    assert (report.embedded, report.removed, len(index)) == (1, 0, 3)
    assert len(index.search("kite", plume)) == 3  # none hides another
    with pytest.raises(ValueError, match="name the tables, or files, by themselves"):
        entries(str(folder))
    assert index.remove(root) == 2


def test_splits_of_a_data_set_stand_beside_one_another(plume, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {
        split: datasets.Dataset.from_dict({"text": [f"{split} {n}" for n in range(2)]}) for split in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    job = planned(plume, tmp_path, tmp_path / "set")
    job.plan(entries(str(tmp_path / "set"), split="test"), 4)
    assert finished(job) == 4
    commit(job, tmp_path / "index")
    assert len(Index.open(tmp_path / "index").search("kite", plume)) == 4
    with pytest.raises(ValueError, match="has the splits train, test; received 'dev'"):
        list(entries(str(tmp_path / "set"), split="dev"))


def test_a_job_that_was_begun_is_gone_on_with(plume, tmp_path, texts):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / ".lock").touch()
    (tmp_path / "job" / ".job.json.0.part").write_text("{")
    job = planned(plume, tmp_path, texts)
    (job.path / "plan" / ".x.parquet.0.part").write_text("x")
    (job.path / "done" / ".x.parquet.0.part").write_text("x")
    assert finished(job) == 12


@pytest.mark.parametrize("form", ["parquet", "folder", "lance", "dataset"])
def test_tables(plume, tmp_path, form):
    texts = [*(f"kite {number}" for number in range(6)), "kite 2", None]
    table = pa.table({"id": list(range(8)), "text": texts})
    place = tmp_path / "source"
    if form == "parquet":
        place = tmp_path / "source.parquet"
        pyarrow.parquet.write_table(table, place)
    elif form == "folder":
        place.mkdir()
        pyarrow.parquet.write_table(table[:3], place / "a.parquet")
        pyarrow.parquet.write_table(table[3:], place / "b.parquet")
    elif form == "lance":
        lancedb.connect(str(tmp_path)).create_table("source", table)
        place = tmp_path / "source.lance"
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(place))
    found = list(entries(str(place)))
    assert [one.kind for one in found[:7]] == [Kind.TEXT] * 7
    assert isinstance(found[7], Skipped)
    assert len({one.name for one in found}) == 8
    job = planned(plume, tmp_path, place)
    assert finished(job) == 7
    commit(job, tmp_path / "index")
    rows = Index.open(tmp_path / "index").store.rows(["excerpt", "vector"])
    assert sorted(row["excerpt"] for row in rows) == sorted(texts[:7])
    for row in rows:
        assert np.allclose(row["vector"], plume.encode_document(row["excerpt"]), atol=2e-6)


def test_tables_of_images_and_of_paths(plume, tmp_path):
    pictures = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    contents = [(tmp_path / f"{number}.png").read_bytes() for number in range(2)]
    expected = plume.encode_document(pictures)
    tables = {
        "bytes": [*contents, b"broken"],
        "image": [{"bytes": contents[0], "path": None}, {"bytes": None, "path": "1.png"}, None],
        "path": ["0.png", str(tmp_path / "1.png"), "3.png", None],
    }
    for column, values in tables.items():
        folder = tmp_path / column
        pyarrow.parquet.write_table(pa.table({column: values}), tmp_path / f"{column}.parquet")
        folder.mkdir()
        job = planned(plume, folder, tmp_path / f"{column}.parquet")
        assert finished(job) == 2
        commit(job, folder / "index")
        found = np.stack([row["vector"] for row in Index.open(folder / "index").store.rows(["vector"])])
        assert np.abs(np.sort(found @ expected.T, axis=1)[:, -1] - 1).max() < 1e-5


def test_what_is_no_source_is_told(plume, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pyarrow.parquet.write_table(pa.table({"title": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"has the columns title; expected one of text, image, bytes, path"):
        list(entries(str(tmp_path / "x.parquet")))
    pyarrow.parquet.write_table(pa.table({"text": ["x"], "path": ["y.txt"]}), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="say which of text, path with --column"):
        list(entries(str(tmp_path / "two.parquet")))
    assert [one.content for one in entries(str(tmp_path / "two.parquet"), column="text")] == [b"x"]
    with pytest.raises(ValueError, match="there is no kind of column 'title'"):
        entries(str(tmp_path / "x.parquet"), column="title")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is no source"):
        entries(str(tmp_path / "file"))
    with pytest.raises((ValueError, ImportError), match="nowhere/there"):
        list(entries("nowhere/there"))


_WORK = """
import os, signal, sys
from plume.corpus.plan import Job
from plume.corpus.work import ShardWorker, run_here
write, written = Job.write_done, []
def write_done(self, *arguments):
    if len(written) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)
    written.append(1)
Job.write_done = write_done
run_here(ShardWorker(sys.argv[1], device="cpu"), lambda rows: None)
"""

_COMMIT = """
import os, signal, sys
from plume.corpus.commit import commit
from plume.corpus.plan import Job
from plume.search.store import RowStore
def dying(work, before):
    def called(*arguments, **settings):
        if not before:
            work(*arguments, **settings)
        os.kill(os.getpid(), signal.SIGKILL)
    return called
owner, name, before = {
    "before the rows": (RowStore, "add_missing", True),
    "after the rows": (RowStore, "add_missing", False),
    "after the acknowledgement": (Job, "mark_committed", False),
    "before compaction": (RowStore, "compact", True),
}[sys.argv[3]]
setattr(owner, name, dying(getattr(owner, name), before))
commit(Job.open(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.launching
def test_a_worker_that_is_killed_leaves_finished_shards(plume, tmp_path, texts):
    job = planned(plume, tmp_path, texts)
    killed = run_command([sys.executable, "-c", _WORK, job.path, 1])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (shard,) = set(job.shards()) - set(job.left())
    before = (job.path / "done" / f"{shard}.parquet").stat().st_mtime_ns
    with ShardWorker(job.path, device="cpu").job.claim(shard).acquire(timeout=0):  # the dead hold no locks
        pass
    assert finished(job) == 12 - len(job.read_done(shard))
    assert (job.path / "done" / f"{shard}.parquet").stat().st_mtime_ns == before
    assert commit(job, tmp_path / "index").added == 12


@pytest.mark.launching
def test_a_committer_that_is_killed_anywhere_loses_and_doubles_nothing(plume, tmp_path, texts):
    job = planned(plume, tmp_path, texts)
    finished(job)
    for place in ("before the rows", "after the rows", "after the acknowledgement", "before compaction"):
        shutil.rmtree(tmp_path / "index", ignore_errors=True)
        for _ in range(2):
            killed = run_command([sys.executable, "-c", _COMMIT, job.path, tmp_path / "index", place])
            assert killed.returncode == -signal.SIGKILL, killed.stderr
        done = commit(job, tmp_path / "index")
        index = Index.open(tmp_path / "index")
        assert len(content(index)) == len(index) == 12, place
        assert done.added <= 12
    assert commit(job, tmp_path / "index").added == 0


def test_two_committers_at_once(plume, tmp_path, texts, monkeypatch):
    job = planned(plume, tmp_path, texts)
    finished(job)
    entered, go = threading.Event(), threading.Event()

    def slow(self, index, shard):
        entered.set()
        assert go.wait(60)

    monkeypatch.setattr(committing.Job, "mark_committed", slow)
    first = threading.Thread(target=commit, args=(job, tmp_path / "index"))
    first.start()
    assert entered.wait(60)
    with pytest.raises(ValueError, match="another run is writing"):
        commit(job, tmp_path / "index")
    go.set()
    first.join(60)
    assert len(content(Index.open(tmp_path / "index"))) == 12


def test_two_workers_share_the_shards(plume, tmp_path, texts):
    job = planned(plume, tmp_path, texts, shard_size=1)
    first, *_ = job.left()
    rows: list[int] = []
    with job.claim(first).acquire(timeout=0):
        run_here(ShardWorker(job.path, device="cpu"), rows.append)
    assert job.left() == [first]
    assert sum(rows) + len(next(iter(job.entries(first)))) == 12
    worker = ShardWorker(job.path, device="cpu")
    assert worker(first) > 0
    assert worker(first) == 0  # somebody has


def test_an_estimate_comes_from_a_sample(plume, tmp_path, texts):
    job = planned(plume, tmp_path, texts)
    worker = ShardWorker(job.path, device="cpu")
    estimate = worker.estimate(6)
    assert (estimate.contents, estimate.sampled) == (12, 6)  # a copy in another shard is embedded there
    tokens = sum(
        plume.plume_model.processor.num_tokens(plume.plume_model.processor.parse(f"kite {n}")) for n in range(11)
    )
    assert abs(estimate.tokens / tokens - 1) < 0.2
    assert estimate.seconds > 0
    finished(job)
    assert worker.estimate(6).contents == 0


def test_another_checkpoint_embeds_no_shards(plume, tmp_path, texts, start):
    from plume import PlumeModel

    job = planned(plume, tmp_path, texts)
    PlumeModel.from_backbone(str(start), num_latent_steps=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="whose vectors do not compare"):
        ShardWorker(job.path, device="cpu", model=str(tmp_path / "other"))
    broken = json.loads((job.path / "job.json").read_text())
    for change, message in (({"format": 9}, "has format 9"), ({"dim": "x"}, "is damaged")):
        (job.path / "job.json").write_text(json.dumps({**broken, **change}))
        with pytest.raises(ValueError, match=message):
            Job.open(job.path)


def test_the_commands(plume_folder, tmp_path, texts):
    job, out = tmp_path / "job", tmp_path / "index"
    status, said = run("corpus", "plan", texts, "--job", job, "--model", plume_folder, "--shard-size", 5)
    assert status == 0, said
    assert "12 items in 3 new shards; 0 planned before, 0 skipped" in said
    assert "about 11 contents to embed, " in said
    (texts / "deep/1.txt").write_bytes(b"x")
    status, said = run("corpus", "run", job, "--device", "cpu")
    assert "3 of 3 shards done: 11 rows, 1 skipped" in said
    assert "deep/1.txt: has changed since it was planned" in run("corpus", "status", job)[1]
    assert "11 rows added" in run("corpus", "commit", job, "--out", out)[1]
    assert "0 rows added" in run("corpus", "commit", job, "--out", out)[1]
    assert (
        "1 item in 1 new shard; 11 planned before"
        in run("corpus", "plan", texts, "--job", job, "--model", plume_folder, "--sample", 0)[1]
    )
    for arguments, message in (
        (("run", tmp_path / "none"), "is no job"),
        (("commit", tmp_path / "none"), "is no job"),
        (("status", tmp_path / "none"), "is no job"),
        (("plan", texts, "--job", texts, "--model", plume_folder), "holds something that is no job"),
    ):
        status, said = run("corpus", *arguments)
        assert status == 1
        assert message in said


def test_nothing_but_one_module_imports_ray():
    root = Path(__file__).parents[3] / "plume"
    users = [file.name for file in root.rglob("*.py") if "import ray" in file.read_text(encoding="utf-8")]
    assert users == ["on_ray.py"]
    found = run_command(
        [sys.executable, "-c", "import sys, plume.cli.main, plume.corpus.work; print('ray' in sys.modules)"]
    )
    assert found.stdout.strip() == "False"


def test_what_was_forgotten_stays_so_when_an_index_of_format_1_gets_its_texts(plume, tmp_path):
    """Jobs know an index again by when it was made, which a new format does not change."""
    folder, out = tmp_path / "texts", tmp_path / "index"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"kite {number}")
    job = planned(plume, tmp_path, folder, shard_size=2)
    assert finished(job) == 4
    assert commit(job, out).added == 4
    index = Index.open(out)
    for one in index.store._table.list_indices():
        index.store._table.drop_index(one.name)
    index.store._table.drop_columns(["text"])
    file, stat = out / "index.json", (out / "index.json").stat()
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert Index.open(out).remove(folder) == 4
    assert commit(job, out).added == 0  # which has brought it to format 2
    assert json.loads(file.read_text())["format"] == 2
    assert commit(job, out).added == 0
    assert len(Index.open(out)) == 0


# On Ray.

_DRIVER = """
import os, sys
from plume.corpus.on_ray import run_on_ray
from plume.corpus.plan import Job
import ray
quiet = {"include_dashboard": False, "log_to_driver": False}
ray.init(num_cpus=2, object_store_memory=80_000_000, _temp_dir=sys.argv[2], **quiet)
print("up", flush=True)
run_on_ray(Job.open(sys.argv[1]), "local", actors=2, num_gpus=0, model=None, done=lambda rows: print(rows, flush=True))
print("over", flush=True)
"""


@pytest.mark.slow
@pytest.mark.launching
def test_on_ray_actors_and_drivers_may_die(plume, tmp_path):
    """The driver is killed at three places, then an actor; rows come once, and nothing twice but what is in flight."""
    pytest.importorskip("ray", reason="needs the extra ray")
    import tempfile

    import psutil

    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"kite {number}")
    job = planned(plume, tmp_path, folder, shard_size=10)
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }

    def done() -> dict[str, int]:
        folder = job.path / "done"
        return {file.name: file.stat().st_mtime_ns for file in folder.glob("[!.]*.parquet")}

    finished_before: dict[str, int] = {}
    for kill_after in (1, 6, 12, None):  # shards, after which the driver is killed
        with tempfile.TemporaryDirectory(prefix="r") as place:
            command = [sys.executable, "-c", _DRIVER, job.path, place]
            with started(command, env=environment) as driver:
                assert driver.stdout is not None
                children = []
                for line in driver.stdout:
                    if line.strip() in ("up", "over"):
                        continue
                    if kill_after is None and not children:  # an actor, in the last run
                        own = psutil.Process(driver.pid).children(recursive=True)
                        children = [one for one in own if "Actor" in " ".join(one.cmdline())]
                        if children:
                            children[0].kill()
                    if kill_after is not None and len(done()) >= kill_after:
                        break
                else:
                    assert driver.wait(60) == 0, driver.stderr and driver.stderr.read()
        for name, when in finished_before.items():
            assert done()[name] == when  # not embedded again
        finished_before = done()
    assert job.left() == []
    assert commit(job, tmp_path / "index").added == 200
    assert len(content(Index.open(tmp_path / "index"))) == 200
