"""Indexing a folder of everything, killing it, going on, and searching."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from plume import Plume, PlumeModel
from plume.cli.main import app
from plume.random_models import SHORT_STRINGS
from plume.search.index import Index
from tests.mixed import BROKEN, write_mixed_folder
from tests.processes import run as run_command

_COLUMNS = ["name", "kind", "page", "num_pages", "sha256", "excerpt", "thumbnail"]

# Dies without warning before the fourth commit.
_KILLED = """
import os, signal, sys
from plume.cli import main as cli
from plume.search import store, update
update._ROWS_PER_WINDOW = 24
commit, commits = store.RowStore.add, []
def add(self, rows):
    commits.append(1)
    if len(commits) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, rows)
store.RowStore.add = add
sys.argv = ["plume", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Path, int]:
    root = tmp_path_factory.mktemp("mixed folder")
    return root, write_mixed_folder(root)


@pytest.fixture(scope="module")
def whole(folder, plume, tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("whole") / "index", plume)
    return index, index.update(folder[0], plume, show_progress=False)


def content(index: Index) -> tuple[list[dict], np.ndarray]:
    rows = sorted(index.store.rows([*_COLUMNS, "vector"]), key=lambda row: (row["name"], row["page"]))
    return [{name: row[name] for name in _COLUMNS} for row in rows], np.array([row["vector"] for row in rows])


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout + "\n" + result.stderr


def test_every_sound_file_has_its_rows_and_every_broken_one_is_named(folder, whole):
    index, report = whole
    assert len(list(folder[0].rglob("*"))) >= 200
    assert len(index) == folder[1] + 1  # and the link to a picture
    skipped = {one.name: one.reason for one in report.skipped}
    assert skipped.keys() == BROKEN.keys()
    for name, reason in BROKEN.items():
        assert reason in skipped[name], name
        assert str(folder[0]) not in skipped[name]
    assert (report.embedded, report.reused) == (len(index) - 2, 2)


def test_rows_hold_the_vectors_of_the_embedder(folder, whole, plume):
    rows, vectors = content(whole[0])
    places = {(row["name"], row["page"]): place for place, row in enumerate(rows)}
    text = places["notes/000 red é.txt", 0]
    image = places["Bilder und Fotos/001 green é.png", 0]
    expected = plume.encode_document(["a red kite, number 0", folder[0] / rows[image]["name"]])
    assert np.allclose(vectors[[text, image]], expected, atol=1e-5)
    assert rows[text]["excerpt"] == "a red kite, number 0"
    assert rows[image]["thumbnail"][:2] == b"\xff\xd8"


def test_a_run_that_is_killed_goes_on_and_ends_where_an_uninterrupted_one_does(
    folder, whole, plume, plume_folder, tmp_path
):
    out = tmp_path / "index"
    arguments = ["index", str(folder[0]), "--model", str(plume_folder), "--out", str(out)]
    killed = run_command([sys.executable, "-c", _KILLED, *arguments])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    index = Index.open(out)
    committed = len(index)
    assert 0 < committed < len(whole[0])
    report = index.update(folder[0], plume, show_progress=False)
    # The last file of a window may have copies elsewhere, which are rows but not work.
    assert report.embedded == whole[1].embedded - len(
        {(r["sha256"], r["page"], r["kind"]) for r in _head(index, committed)}
    )
    assert {one.name for one in report.skipped} == BROKEN.keys()
    (rows, vectors), (expected, exact) = content(index), content(whole[0])
    assert rows == expected
    assert np.allclose(vectors, exact, atol=1e-5)
    for query in ("a red kite", Image.new("RGB", (40, 40), "blue")):
        found, sure = (one.search(query, plume, top_k=20) for one in (index, whole[0]))
        assert np.allclose([hit.score for hit in found], [hit.score for hit in sure], atol=1e-5)
    again = index.update(folder[0], plume, show_progress=False)
    assert (again.embedded, again.reused, again.removed) == (0, 0, 0)


def _head(index: Index, count: int) -> list[dict]:
    """The rows that were committed first."""
    return index.store.rows(["sha256", "page", "kind"])[:count]


def test_files_are_added_changed_moved_and_deleted(plume, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("stays", "changes", "moves", "goes"):
        (folder / f"{name}.txt").write_text(f"a kite that {name}")
    index = Index.create(tmp_path / "index", plume)
    assert index.update(folder, plume, show_progress=False).embedded == 4
    (folder / "changes.txt").write_text("a table now")
    (folder / "moves.txt").rename(folder / "moved.txt")
    (folder / "goes.txt").unlink()
    (folder / "comes.txt").write_text("a blue one")
    report = index.update(folder, plume, show_progress=False)
    assert (report.unchanged, report.embedded, report.reused, report.removed) == (1, 2, 1, 3)
    rows, _ = content(index)
    assert {row["name"]: row["excerpt"] for row in rows} == {
        "stays.txt": "a kite that stays",
        "changes.txt": "a table now",
        "moved.txt": "a kite that moves",
        "comes.txt": "a blue one",
    }


def test_a_file_that_cannot_be_read_now_keeps_its_rows(plume, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "note.txt").write_text("a kite")
    index = Index.create(tmp_path / "index", plume)
    index.update(folder, plume, show_progress=False)
    (folder / "note.txt").unlink()
    (folder / "note.txt").symlink_to(folder / "note.txt")
    report = index.update(folder, plume, show_progress=False)
    assert [one.name for one in report.skipped] == ["note.txt"]
    assert (report.removed, len(index)) == (0, 1)


def test_an_index_inside_its_folder_does_not_index_itself_and_folders_can_be_forgotten(plume, tmp_path):
    (tmp_path / "a.txt").write_text("a kite")
    index = Index.create(tmp_path / "index", plume)
    index.update(tmp_path, plume, show_progress=False)
    other = tmp_path.parent / f"{tmp_path.name} other"
    other.mkdir()
    (other / "b.txt").write_text("a secret blue")
    index.update(other, plume, show_progress=False)
    assert len(index) == 2
    assert any(b"a secret blue" in file.read_bytes() for file in index.path.rglob("*") if file.is_file())
    shutil.rmtree(other)
    assert index.remove(other) == 1
    assert [row["name"] for row in index.store.rows(["name"])] == ["a.txt"]
    assert not any(b"a secret blue" in file.read_bytes() for file in index.path.rglob("*") if file.is_file())


def test_overlapping_folders_and_two_writers_at_once_are_refused(plume, tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "a.txt").write_text("a kite")
    index = Index.create(tmp_path / "index", plume)
    index.update(tmp_path / "sub", plume, show_progress=False)
    for folder in (tmp_path, tmp_path / "sub" / "deep"):
        with pytest.raises(ValueError, match=r"which is in the index, overlap; index .*sub again"):
            index.update(folder, plume, show_progress=False)
    with (
        index.store.locked(),
        pytest.raises(ValueError, match="another run is writing to the index"),
    ):
        Index.open(tmp_path / "index").update(tmp_path / "sub", plume, show_progress=False)


def test_rows_of_a_folder_that_cannot_be_read_now_stay(plume, tmp_path, monkeypatch):
    folder = tmp_path / "files"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / "a.txt").write_text("a kite")
    (folder / "b.txt").write_text("blue")
    index = Index.create(tmp_path / "index", plume)
    index.update(folder, plume, show_progress=False)
    (folder / "b.txt").unlink()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = index.update(folder, plume, show_progress=False)
    assert [(one.name, one.reason) for one in report.skipped] == [
        ("sub", "the folder cannot be read (Permission denied)")
    ]
    assert [row["name"] for row in index.store.rows(["name"])] == ["sub/deep/a.txt"]


def test_an_instruction_counts_when_a_long_text_is_checked(plume, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "long.txt").write_text("z " * 4085)
    (folder / "short.txt").write_text("a kite")
    index = Index.create(tmp_path / "index", plume, instruction="Find what was asked for in this long text of mine:")
    report = index.update(folder, plume, show_progress=False)
    assert report.embedded == 1
    (skipped,) = report.skipped
    assert skipped.name == "long.txt"
    assert "the model takes 4096" in skipped.reason


def test_many_moved_files_take_few_commits(plume, tmp_path):
    folder = tmp_path / "files"
    (folder / "here").mkdir(parents=True)
    for number in range(300):
        (folder / "here" / f"{number}.txt").write_text(f"kite {number}")
    index = Index.create(tmp_path / "index", plume)
    index.update(folder, plume, show_progress=False)
    before = index.store._table.version
    (folder / "here").rename(folder / "there")
    report = index.update(folder, plume, show_progress=False)
    assert (report.embedded, report.reused, report.removed, len(index)) == (0, 300, 300, 300)
    assert index.store._table.version - before < 20


def test_a_name_that_is_not_unicode_is_named(plume, tmp_path):
    (tmp_path / "a.txt").write_text("a kite")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("blue")
    index = Index.create(tmp_path / "index", plume)
    report = index.update(tmp_path, plume, show_progress=False)
    assert [(one.name, one.reason) for one in report.skipped] == [
        ("caf\\udce9.txt", "its name is not valid Unicode; rename it")
    ]
    assert len(index) == 1


def test_an_index_that_was_interrupted_while_it_was_made_opens(plume, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    shutil.rmtree(index.path / "items.lance")
    assert len(Index.create(tmp_path / "index", plume)) == 0
    (index.path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged \(.*\); remove .*index and index the folder again"):
        Index.open(index.path)


def test_an_index_whose_checkpoint_has_moved_is_searched_with_its_new_place(plume_folder, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("a kite")
    shutil.copytree(plume_folder, tmp_path / "here")
    run("index", tmp_path / "files", "--model", tmp_path / "here", "--out", tmp_path / "index")
    (tmp_path / "here").rename(tmp_path / "there")
    code, output = run("search", "kite", "--index", tmp_path / "index")
    assert code == 1
    assert "here, which is not there any more; say where it is with --model" in output
    code, output = run("search", "kite", "--index", tmp_path / "index", "--model", tmp_path / "there")
    assert code == 0, output
    assert "a.txt" in output


def test_what_is_printed_does_not_steer_the_terminal(plume_folder, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a\x1b[31m.txt").write_text("a \x1b[2J kite")
    (tmp_path / "files" / "b\x1b[31m.png").write_text("no picture")
    code, output = run("index", tmp_path / "files", "--model", plume_folder, "--out", tmp_path / "index")
    assert code == 0, output
    _, found = run("search", "kite", "--index", tmp_path / "index")
    assert "a\ufffd[31m.txt" in found
    assert "b\ufffd[31m.png" in output
    assert "\x1b[31m" not in output + found
    assert "\x1b[2J" not in output + found


def test_the_same_bytes_are_read_by_their_names(plume, tmp_path):
    for name in ("a.png", "b.txt", "c.png"):
        (tmp_path / name).write_text("a kite")
    index = Index.create(tmp_path / "index", plume)
    report = index.update(tmp_path, plume, show_progress=False)
    assert [one.name for one in report.skipped] == ["a.png", "c.png"]
    assert [row["name"] for row in index.store.rows(["name"])] == ["b.txt"]


def test_an_index_refuses_what_it_was_not_made_with(plume, plume_folder, backbone_folder, tmp_path):
    (tmp_path / "a.txt").write_text("a kite")
    path = tmp_path / "index"
    index = Index.create(path, plume, num_latent_steps=0, query_instruction="Find:")
    index.update(tmp_path, plume, show_progress=False)
    with pytest.raises(ValueError, match=r"num_latent_steps=0; this call uses num_latent_steps=4"):
        Index.create(path, plume, query_instruction="Find:")
    with pytest.raises(ValueError, match="query_instruction='Find:'; this call uses query_instruction='Seek:'"):
        index.search("kite", plume, instruction="Seek:")
    with pytest.raises(ValueError, match="query_latent_steps=4; this call uses query_latent_steps=1"):
        index.search("kite", plume, num_latent_steps=1)
    with pytest.raises(ValueError, match="dim=64; this call uses dim=16"):
        index.search("kite", Plume(plume_folder, device="cpu", truncate_dim=16))
    torch.manual_seed(1)
    other = PlumeModel.from_backbone(str(backbone_folder), num_latent_steps=4, **SHORT_STRINGS)
    other.save_pretrained(tmp_path / "other")
    stranger = Plume(tmp_path / "other", device="cpu")
    with pytest.raises(ValueError, match=r"made with checkpoint .*; this call uses checkpoint .*other"):
        index.search("kite", stranger)
    with pytest.raises(ValueError, match="make a new index"):
        index.update(tmp_path, stranger)
    (hit,) = index.search("kite", plume)
    expected = plume.similarity(
        plume.encode("kite", instruction="Find:", num_latent_steps=4), plume.encode("a kite", num_latent_steps=0)
    )
    assert hit.score == pytest.approx(expected.item(), abs=1e-5)


def test_truncated_vectors_are_searched_as_unit_vectors(plume_folder, tmp_path):
    (tmp_path / "a.txt").write_text("a kite")
    short = Plume(plume_folder, device="cpu", truncate_dim=16)
    index = Index.create(tmp_path / "index", short)
    index.update(tmp_path, short, show_progress=False)
    assert index.search("a kite", short)[0].score == pytest.approx(1, abs=1e-5)


def test_a_search_is_exact_and_heeds_its_condition(whole, plume):
    index, _ = whole
    rows, vectors = content(index)
    query = plume.encode_query("a blue kite")
    best = np.sort(vectors @ query)[::-1]
    assert np.allclose([hit.score for hit in index.search("a blue kite", plume, top_k=7)], best[:7], atol=1e-5)
    pdfs = index.search("a blue kite", plume, top_k=500, where="kind = 'pdf' AND page = 2")
    assert len(pdfs) == sum(row["kind"] == "pdf" and row["page"] == 2 for row in rows)
    assert {(hit.kind, hit.page) for hit in pdfs} == {("pdf", 2)}
    with pytest.raises(ValueError, match="where='colour = 3' is not understood"):
        index.search("a", plume, where="colour = 3")


def test_the_commands_index_and_search_print_what_they_did(folder, plume_folder, tmp_path):
    (tmp_path / "files").mkdir()
    shutil.copy(folder[0] / "Bilder und Fotos" / "001 green é.png", tmp_path / "files" / "a picture.png")
    (tmp_path / "files" / "note <b>.txt").write_text("a red kite & a table")
    (tmp_path / "files" / "bad.png").write_text("no picture")
    out = tmp_path / "index"
    code, output = run("index", tmp_path / "files", "--model", plume_folder, "--out", out)
    assert code == 0, output
    assert "skipped: bad.png: it cannot be read as an image" in output
    assert "2 rows in" in output
    assert "2 embedded, 0 reused, 0 removed; 0 files unchanged, 1 skipped" in output

    code, output = run("search", "a red kite & a table", "--index", out)
    assert code == 0, output
    assert output.splitlines()[1].split()[:3] == ["1", "1.000", "text"]
    picture = tmp_path / "files" / "a picture.png"
    code, output = run("search", "--image", picture, "--index", out, "--json", "--where", "kind = 'image'")
    found = json.loads(output.splitlines()[0])
    assert found["score"] == pytest.approx(1, abs=1e-5)
    assert found["path"] == str(picture.resolve())
    page = tmp_path / "results" / "found.html"
    code, output = run("search", "<kites>", "--index", out, "--html", page)
    html = page.read_text()
    assert "&lt;kites&gt;" in html
    assert "<kites>" not in html
    assert "note &lt;b&gt;.txt" in html
    assert html.count("data:image/jpeg;base64,") == 1
    code, output = run("index", tmp_path / "files", "--out", out, "--forget")
    assert "2 rows removed" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--index", "none"], "nothing to search for"),
        (["search", "kite", "--index", "none"], "none is no index; make one with `plume index"),
        (["index", "nowhere", "--out", "index"], "nowhere is no folder"),
        (["index", "a.txt", "--out", "index"], "a.txt is no folder"),
        (["index", ".", "--out", "."], "holds a.txt but no index.json"),
    ],
)
def test_a_wrong_call_stops_with_a_message(plume_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a kite")
    if arguments[0] == "index":
        arguments = [*arguments, "--model", str(plume_folder)]
    code, output = run(*arguments)
    assert code == 1
    assert message in output
    assert "Traceback" not in output
    assert not Path("index").exists()


def test_a_folder_with_a_table_of_somebody_else_is_left_as_it_is(plume, tmp_path):
    import lancedb

    theirs = lancedb.connect(str(tmp_path / "data")).create_table("items", data=[{"name": "theirs"}])
    (tmp_path / "data" / ".DS_Store").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds items\.lance but no index\.json"):
        Index.create(tmp_path / "data", plume)
    assert theirs.count_rows() == 1
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").write_bytes(b"")
    assert len(Index.create(tmp_path / "new", plume)) == 0


@pytest.mark.parametrize("content", ['["a"]', "7", '{"format": 1}', "wrong type"])
def test_an_index_whose_identity_is_damaged_says_what_to_remove(plume, tmp_path, content):
    index = Index.create(tmp_path / "index", plume)
    file = index.path / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dim": "64"}) if content == "wrong type" else content)
    with pytest.raises(ValueError, match=r"index.json is damaged \(.*\); remove .*index and index the folder again"):
        Index.open(index.path)


def test_a_search_finds_of_a_file_the_row_that_is_on_disk(plume, tmp_path):
    file = tmp_path / "files" / "a.txt"
    file.parent.mkdir()
    file.write_text("a red kite")
    index = Index.create(tmp_path / "index", plume)
    index.update(file.parent, plume, show_progress=False)
    (row,) = index.store.rows_with([index.store.rows(["sha256"])[0]["sha256"]])
    file.write_text("a blue table, older")
    os.utime(file, ns=(0, row["mtime_ns"] - 10**12))  # an older copy came back
    found = file.stat()
    older = {**row, "sha256": "other", "size": found.st_size, "mtime_ns": found.st_mtime_ns, "excerpt": "a blue table"}
    index.store.add([older])
    (hit,) = index.search("a red kite", plume, top_k=5)
    assert (hit.path, hit.excerpt) == (str(file.resolve()), "a blue table")
    index.store.touch(file.parent.resolve(), {("a.txt", "other"): (7, 7)})
    seen = {one["sha256"]: (one["size"], one["mtime_ns"]) for one in index.store.rows(["sha256", "size", "mtime_ns"])}
    assert seen == {"other": (7, 7), row["sha256"]: (row["size"], row["mtime_ns"])}


def test_an_index_that_is_removed_while_it_is_open_and_a_condition_that_is_no_text_are_said(plume, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    with pytest.raises(ValueError, match="where is a dict; expected a condition in SQL"):
        index.search("kite", plume, where={"kind": "pdf"})  # type: ignore[arg-type]
    shutil.rmtree(index.path)
    with pytest.raises(OSError, match=r"the index .* cannot be used"):
        len(index)


def test_an_embedder_cut_to_a_length_that_cannot_be_makes_no_index(plume_folder, tmp_path):
    cut = Plume(plume_folder)
    cut.truncate_dim = 100_000
    with pytest.raises(ValueError, match="truncate_dim must be a whole number"):
        Index.create(tmp_path / "index", cut)
    assert not (tmp_path / "index").exists()


def test_an_index_remembers_how_large_its_images_may_be(plume, plume_folder, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "index"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (560, 560, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large.png")
    small = {"image": {"size": {"shortest_edge": 56 * 56, "longest_edge": 20_000}}}
    arguments = ["index", folder, "--model", plume_folder, "--out", out]
    assert run(*arguments, "--max-pixels", 20_000)[0] == 0
    index = Index.open(out)
    assert index.identity.max_pixels == 20_000
    (row,) = index.store.rows(["vector"])
    expected = plume.encode(folder / "large.png", processing_kwargs=small)
    assert np.allclose(row["vector"], expected, atol=1e-5)
    assert not np.allclose(row["vector"], plume.encode(folder / "large.png"), atol=1e-5)
    assert index.search(folder / "large.png", plume)[0].score > 0.9999  # queries are reduced in the same way
    assert run(*arguments)[0] == 0  # what is not given stays
    code, printed = run(*arguments, "--max-pixels", 30_000)
    assert code == 1
    assert "was made with max_pixels=20000; this call uses max_pixels=30000" in printed
    code, printed = run(*arguments[:-1], tmp_path / "other", "--max-pixels", 10)
    assert code == 1
    assert "max_pixels is 10, and smaller images are enlarged to" in printed
    assert run(*arguments[:-1], tmp_path / "new")[0] == 0
    assert Index.open(tmp_path / "new").identity.max_pixels == 602_112
    assert Index.create(tmp_path / "free", plume).identity.max_pixels is None


def test_settings_that_are_not_given_are_those_of_the_index(plume, plume_folder, tmp_path):
    folder, out = tmp_path / "notes", tmp_path / "index"
    folder.mkdir()
    (folder / "a.txt").write_text("a red kite")
    made = {"num_latent_steps": 0, "query_latent_steps": 2, "instruction": "Find:", "query_instruction": "Query:"}
    Index.create(out, Plume(plume_folder, device="cpu", truncate_dim=16), **made)
    code, printed = run("index", folder, "--model", plume_folder, "--out", out)
    assert (code, "1 embedded" in printed) == (0, True), printed
    assert Index.open(out).identity.dim == 16
    code, printed = run("index", folder, "--model", plume_folder, "--out", out, "--num-latent-steps", 2)
    assert code == 1
    assert "num_latent_steps=0" in printed


def test_an_index_of_before_opens(plume, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    file = tmp_path / "index" / "index.json"
    fields = json.loads(file.read_text())
    del fields["max_pixels"]
    file.write_text(json.dumps(fields))
    assert Index.open(tmp_path / "index").identity == index.identity
