"""An index under hardship: writers and readers side by side, kills, moves, full disks, files that change meanwhile."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from plume import Plume
from plume.cli.main import app
from plume.inputs.item import MAX_TEXT_BYTES, Item
from plume.search import folder as folder_module
from plume.search import index as index_module
from plume.search import rows as rows_module
from plume.search import update as update_module
from plume.search.folder import Found, Other, walk
from plume.search.index import Index, IndexStorageError
from tests.processes import HANGS_AFTER_S, started
from tests.processes import run as run_command


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture
def notes(tmp_path) -> Path:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"kite number {number}")
    Image.new("RGB", (56, 56), "red").save(folder / "deep" / "red.png")
    return folder


def names(index: Index) -> list[str]:
    return sorted(row["name"] for row in index.store.rows(["name"]))


def update(index: Index, folder: Path, plume: Plume):
    return index.update(folder, plume, show_progress=False)


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not isinstance(result.exception, Exception), result.exception  # SystemExit is none
    return result.exit_code, result.stdout + "\n" + result.stderr


def test_two_open_handles_write_every_file_once(plume, notes, tmp_path):
    first, second = (Index.create(tmp_path / "index", plume) for _ in range(2))
    third = Index.open(tmp_path / "index")
    assert update(second, notes, plume).embedded == 5
    report = update(first, notes, plume)
    assert (report.embedded, report.unchanged) == (0, 5)
    (notes / "new.txt").write_text("a new kite")
    assert update(third, notes, plume).embedded == 1
    for index in (first, second, third):
        assert len(index) == 6
        assert names(index) == ["0.txt", "1.txt", "2.txt", "3.txt", "deep/red.png", "new.txt"]
        assert index.search("a new kite", plume, top_k=1)[0].path == str(notes / "new.txt")
    assert second.remove(notes) == 6
    assert len(first) == len(third) == 0


def test_a_doubled_index_heals_at_the_next_update(plume, notes, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    update(index, notes, plume)
    rows = index.store.rows_with([row["sha256"] for row in index.store.rows(["sha256"])])
    index.store.add(rows)
    index.store.add(rows[:2])
    assert len(index) == 12
    hits = index.search("kite number 1", plume, top_k=9)
    assert len(hits) == len({hit.path for hit in hits}) == 5  # meanwhile nothing is listed twice
    report = update(index, notes, plume)
    assert (len(index), report.embedded, report.unchanged) == (5, 0, 5)


_WRITER = """
import sys, time
from pathlib import Path
from plume import Plume
from plume.search.index import Index
index, folder, model = sys.argv[1:]
plume = Plume(model, device="cpu")
index = Index.open(index)
for turn in range(8):
    for number in range(4):
        (Path(folder) / f"{number}.txt").write_text(f"kite number {number} of turn {turn}")
    index.update(folder, plume, show_progress=False)
print("done")
"""


@pytest.mark.launching
def test_readers_go_on_while_another_process_updates(plume, plume_folder, notes, tmp_path):
    """An open reader and one that opens anew each time; each update takes the files of the version before away."""
    index = Index.create(tmp_path / "index", plume)
    update(index, notes, plume)
    arguments = [tmp_path / "index", notes, plume_folder]
    with started([sys.executable, "-c", _WRITER, *arguments]) as writer:
        searches = 0
        while writer.poll() is None or searches < 20:
            for reader in (index, Index.open(tmp_path / "index")):
                hits = reader.search("kite number 2", plume, top_k=9)
                assert len(hits) == len({hit.path for hit in hits}) == 5
                searches += 1
        out, errors = writer.communicate(timeout=HANGS_AFTER_S)
        assert out.strip().endswith("done"), errors
    assert index.search("kite number 2 of turn 7", plume, top_k=1)[0].excerpt == "kite number 2 of turn 7"


def test_threads_may_search_while_one_updates(plume, notes, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    update(index, notes, plume)
    found, stop = [], threading.Event()

    def read():
        own = Index.open(tmp_path / "index")
        while not stop.is_set():
            found.append(len(own.store.rows(["name"])))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for turn in range(5):
            (notes / "0.txt").write_text(f"turn {turn}")
            update(index, notes, plume)
    finally:
        stop.set()
        thread.join()
    assert set(found) <= {5, 6}  # of a changed file two rows for a moment


@pytest.mark.parametrize(
    "leave",
    [
        lambda path: (path / "index.json.part").write_text("{"),
        lambda path: (path / "lock").touch(),
        lambda path: (path / "items.lance").mkdir(),
        lambda path: ((path / "items.lance" / "data").mkdir(parents=True), (path / "items.lance/data/a.lance").touch()),
        lambda path: None,
    ],
    ids=["a part", "a lock", "a table", "a table with data", "an empty folder"],
)
def test_leftovers_of_an_interrupted_creation_are_no_reason_to_refuse(plume, notes, tmp_path, leave):
    (tmp_path / "index").mkdir()
    leave(tmp_path / "index")
    assert update(Index.create(tmp_path / "index", plume), notes, plume).embedded == 5
    assert len(Index.open(tmp_path / "index")) == 5


def test_somebody_elses_files_are_a_reason_to_refuse(plume, tmp_path):
    (tmp_path / "index.json.part").touch()
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"holds thesis.txt but no index.json"):
        Index.create(tmp_path, plume)
    assert (tmp_path / "thesis.txt").exists()


# A process for each step of the creation, which kills itself at it; they share what has been imported.
_STOPPED_WHILE_MADE = """
import os, signal, sys
from pathlib import Path
from plume import Plume
from plume.search import index, store
plume = Plume(sys.argv[2], device="cpu")
def made_until(step):
    calls = []
    def count(name, function):
        def called(*args, **kwargs):
            calls.append(name)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return called
    index.os.fsync = count("fsync", os.fsync)
    index.Path.replace = count("replace", index.Path.replace)
    store._connect = count("connect", store._connect)
    store._trying = count("trying", store._trying)
    index.Index.create(Path(sys.argv[1]) / f"index {step}", plume)
for step in range(1, 5):
    if not (child := os.fork()):
        made_until(step)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.launching
def test_an_index_can_be_made_wherever_its_creation_was_killed(plume, plume_folder, notes, tmp_path):
    done = run_command([sys.executable, "-c", _STOPPED_WHILE_MADE, tmp_path, plume_folder])
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 4, done.stderr
    for step in range(1, 5):
        assert update(Index.create(tmp_path / f"index {step}", plume), notes, plume).embedded == 5


def test_a_folder_that_has_moved_is_noticed_and_what_to_do_is_offered(plume, plume_folder, notes, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    update(index, notes, plume)
    assert index.gone() == {}
    moved = notes.rename(tmp_path / "papers of mine")
    hits = index.search("kite number 1", plume)
    assert not any(hit.is_there for hit in hits)
    code, printed = run("search", "kite number 1", "--index", tmp_path / "index", "--model", plume_folder)
    assert code == 0
    assert "(gone)" in printed
    assert "5 of the results are not there any more" in printed

    code, printed = run("index", moved, "--model", plume_folder, "--out", tmp_path / "index")
    assert "0 embedded, 5 reused" in printed
    assert f"gone: {notes}, to which 5 rows lead" in printed
    assert f"plume index {notes} --forget --out {tmp_path / 'index'}" in printed
    assert update(index, moved, plume).gone == {str(notes): 5}
    code, printed = run("index", notes, "--forget", "--out", tmp_path / "index")
    assert "5 rows removed" in printed
    assert all(hit.is_there for hit in index.search("kite number 1", plume))
    assert update(index, moved, plume).gone == {}
    assert len(index) == 5


def test_what_is_passed_over_is_counted_by_kind(plume, plume_folder, notes, tmp_path):
    for name in ("a.zip", "b.ZIP", "deep/c.docx", "Makefile", ".hidden.zip", "raw.cr3"):
        (notes / name).write_bytes(b"x")
    index = Index.create(tmp_path / "index", plume)
    expected = Counter({".zip": 2, ".docx": 1, "without a suffix": 1, ".cr3": 1})
    assert update(index, notes, plume).others == expected
    _, printed = run("index", notes, "--model", plume_folder, "--out", tmp_path / "index")
    assert "passed over, of other kinds: 2 .zip, 1 " in printed


def test_photos_of_telephones_are_indexed(plume, tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    (tmp_path / "camera").mkdir()
    photo = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    for name, form in (("a.heic", "HEIF"), ("b.AVIF", "AVIF"), ("c.jfif", "JPEG"), ("d.heif", "HEIF")):
        photo.save(tmp_path / "camera" / name, form)
    report = update(Index.create(tmp_path / "index", plume), tmp_path / "camera", plume)
    assert (report.embedded + report.reused, report.skipped, report.others) == (4, [], Counter())


CUT_CONDITIONS = [
    "kind = 'text'; nonsense",
    "kind = 'text' nonsense",
    "kind = 'text' LIMIT 1",
    "kind = 'text') OR (true",
    "kind = 'text' ORDER BY name",
    "kind = 'text'; DELETE FROM items",
    "(kind = 'text'",
    "nope = 3",
    "kind =",
    " ",
    "kind",
]


@pytest.mark.parametrize("where", CUT_CONDITIONS)
def test_a_condition_is_read_to_its_end_or_refused(plume, notes, tmp_path, where):
    index = Index.create(tmp_path / "index", plume)
    update(index, notes, plume)
    with pytest.raises(ValueError, match="is not understood"):
        index.search("kite", plume, where=where)
    for sound, count in (("kind = 'text'", 4), ("name <> ');' AND (kind = 'image')", 1), ("page = 0 -- all", 5)):
        assert len(index.search("kite", plume, where=sound)) == count


def test_folders_nested_deeper_than_python_calls_are_walked(tmp_path):
    """Deeper than a path can name them, the walk ends with the folder's name."""
    before, depth, made = os.getcwd(), 1500, 0
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
            made += 1
            if made in (3, 1200):
                Path("note.txt").write_text("a")
    finally:
        os.chdir(before)
    found = list(walk(tmp_path))
    assert [one.name.count("/") for one in found if isinstance(one, Found)] == [1200, 3]
    (tmp_path / "z" / "y").mkdir(parents=True)
    (tmp_path / "z" / "y" / "last.md").write_text("a")
    assert [one.name for one in walk(tmp_path)][-1] == "z/y/last.md"
    run_command(["rm", "-rf", tmp_path / "d"])


def test_a_walk_lists_in_the_order_of_names_and_says_what_it_leaves_out(tmp_path):
    for name in ("b/x.txt", "a.txt", "b.txt", "b/a/y.txt", "c/z.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    kinds = [(type(one), one.name) for one in walk(tmp_path)]
    assert kinds == [
        (Found, "a.txt"),
        (Found, "b/a/y.txt"),
        (Found, "b/x.txt"),
        (Found, "b.txt"),
        (Other, "c/z.bin"),
    ]


def test_a_file_that_changes_while_it_is_read_is_left_for_later(plume, notes, tmp_path, monkeypatch):
    """Its hash is of the content before; a copy of that content would keep the other vector for ever."""
    copy = notes / "copy.txt"
    copy.write_text("kite number 0")  # the same content as 0.txt, which is read for both
    parse = Item.parse

    def changing(raw, name="the input", *args):
        item = parse(raw, name, *args)
        if name == "deep/red.png" and not (notes / "changed").exists():
            (notes / "changed").touch()
            Image.new("RGB", (56, 56), "blue").save(notes / "deep" / "red.png")
        return item

    def rewriting(path, name):
        text = read(path, name)
        if name == "0.txt" and "rewritten" not in done:
            done.append("rewritten")
            path.write_text("a table instead")
            text = path.read_text()
        return text

    read, done = rows_module.read_text, []
    monkeypatch.setattr(rows_module, "read_text", rewriting)
    monkeypatch.setattr(Item, "parse", changing)
    index = Index.create(tmp_path / "index", plume)
    report = update(index, notes, plume)
    late = {one.name for one in report.skipped if "was written to while it was read; run this again" in one.reason}
    assert late == {"0.txt", "copy.txt", "deep/red.png"}
    assert names(index) == ["1.txt", "2.txt", "3.txt"]
    assert update(index, notes, plume).embedded == 3
    for name, expected in (("copy.txt", "kite number 0"), ("0.txt", "a table instead")):
        (row,) = (row for row in index.store.rows(["name", "vector"]) if row["name"] == name)
        assert np.allclose(row["vector"], plume.encode(expected), atol=1e-5)


def test_texts_over_the_limit_are_not_read_and_touched_files_are_hashed_once(plume, notes, tmp_path, monkeypatch):
    with (notes / "long.txt").open("w") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    hashed = []
    monkeypatch.setattr(update_module, "digest", lambda path: hashed.append(path.name) or folder_module.digest(path))
    index = Index.create(tmp_path / "index", plume)
    report = update(index, notes, plume)
    assert [one.name for one in report.skipped] == ["long.txt"]
    assert "split it" in report.skipped[0].reason
    assert "long.txt" not in hashed
    hashed.clear()
    for name in ("0.txt", "deep/red.png"):
        os.utime(notes / name, (time.time() + 60,) * 2)
    rows = len(index)
    for expected in (["0.txt", "red.png"], []):
        report = update(index, notes, plume)
        assert (report.unchanged, report.embedded, len(index)) == (5, 0, rows)
        assert hashed == expected
        hashed.clear()


NO_SPACE = "lance error: LanceError(IO): Generic LocalFileSystem error: No space left on device (os error 28)"


def test_a_full_disk_is_one_line_and_what_is_committed_stays(plume, plume_folder, notes, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "index", plume)
    update(index, notes, plume)
    (notes / "new.txt").write_text("a new kite")
    table = type(index.store._table)

    def full(*args, **kwargs):
        raise RuntimeError(NO_SPACE)

    monkeypatch.setattr(table, "add", full)
    with pytest.raises(IndexStorageError, match=r"cannot be used \(No space left on device\); what was committed"):
        update(index, notes, plume)
    code, printed = run("index", notes, "--model", plume_folder, "--out", tmp_path / "index")
    assert code == 1
    assert "plume: the index" in printed
    assert "No space left on device" in printed
    monkeypatch.undo()
    assert update(index, notes, plume).embedded == 1
    assert len(index) == 6


def test_a_place_that_cannot_be_written_is_found_out_before_the_work(plume_folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    old = tmp_path / "vectors.npz"
    old.write_bytes(b"precious")
    monkeypatch.setattr(os, "posix_fallocate", full)
    code, printed = run("encode", "--text", "red", "--model", plume_folder, "--out", old)
    assert (code, old.read_bytes()) == (1, b"precious")
    assert "cannot be written (No space left on device); choose another place" in printed
    code, printed = run("encode", "--text", "red", "--model", plume_folder, "--out", tmp_path)
    assert code == 1
    monkeypatch.undo()
    (tmp_path / "folder.npz").mkdir()
    code, printed = run("encode", "--text", "red", "--model", plume_folder, "--out", tmp_path / "folder.npz")
    assert "is a folder; name a file" in printed


@pytest.mark.parametrize("suffix", ["npz", "npy", "jsonl"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(plume_folder, tmp_path, monkeypatch, suffix):
    old = tmp_path / f"vectors.{suffix}"
    old.write_bytes(b"precious")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("plume.cli.output.os.fsync", full)
    code, printed = run("encode", "--text", "red", "--model", plume_folder, "--out", old)
    assert code == 1
    assert f"{old} cannot be written (No space left on device), and is as it was" in printed
    assert old.read_bytes() == b"precious"
    assert [one.name for one in tmp_path.iterdir()] == [old.name]


@pytest.mark.parametrize(
    ("command", "signal_sent", "code"),
    [("encode", signal.SIGTERM, 143), ("index", signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_command_that_is_stopped_says_what_it_leaves(
    plume_folder, notes, tmp_path, monkeypatch, command, signal_sent, code
):
    encode, vectors = Plume.encode, tmp_path / "v.npz"

    def encode_until_stopped(*args, **kwargs):
        encode(*args, **kwargs)
        signal.raise_signal(signal_sent)
        pytest.fail("went on")

    monkeypatch.setattr(Plume, "encode", encode_until_stopped)
    words, message = {
        "encode": (["--text", "red", "--out", vectors], f"nothing was written to {vectors}"),
        "index": ([notes, "--out", tmp_path / "index"], "holds 0 rows, which stay; run the same command again"),
    }[command]
    before = signal.getsignal(signal_sent)
    exit_code, printed = run(command, *words, "--model", plume_folder)
    assert exit_code == code
    assert "Traceback" not in printed
    assert "plume: stopped; " in printed
    assert message in printed
    assert not vectors.exists()
    assert signal.getsignal(signal_sent) == before


def test_names_and_texts_do_not_steer_the_terminal(plume_folder, tmp_path):
    evil = tmp_path / "\x1b[31mred\x9b2J.txt"
    evil.write_text("a kite \x1b[2J")
    (tmp_path / "\x1b]0;title\x07.png").write_text("no image")
    arguments = ["--model", plume_folder, "--out", tmp_path / "v.npz"]
    outcomes = [
        run("encode", evil, tmp_path / "\x1b]0;title\x07.png", *arguments),
        run("encode", tmp_path / "\x1b]missing.txt", *arguments),
        run("encode", evil, "--text", "\x1b[5m", "--model", "\x1b[1mno/such/model", "--out", tmp_path / "w.npz"),
        run("index", tmp_path, "--model", plume_folder, "--out", tmp_path / "index"),
        run("search", "kite", "--index", tmp_path / "index", "--model", plume_folder),
        run("search", "kite", "--index", tmp_path / "index", "--model", plume_folder, "--json"),
        run("search", "kite", "--where", "\x1b[0m", "--index", tmp_path / "index", "--model", plume_folder),
        run("trace", tmp_path / "\x1b]missing.txt", "--model", plume_folder),
    ]
    for _, printed in outcomes:
        assert "\x1b" not in printed
        assert "\x9b" not in printed
        assert "\x07" not in printed
    (line,) = (line for line in outcomes[5][1].splitlines() if line.startswith("{"))
    assert json.loads(line)["path"] == str(evil)


def test_a_blank_text_on_the_command_line_is_named(plume_folder, tmp_path):
    for text in ("", "  "):
        code, printed = run("encode", "--text", text, "--model", plume_folder, "--out", tmp_path / "v.npz")
        assert code == 1
        assert f"--text {text!r}: it is empty; expected text that is not blank" in printed


def test_two_who_make_one_index_at_once_share_it(plume, tmp_path, monkeypatch):
    check, begin, both, made = index_module._check_free, index_module._begin, threading.Barrier(2), []
    seen = threading.local()

    def meet(path):  # both have seen a free place before either takes it
        check(path)
        if not hasattr(seen, "before"):
            seen.before = True
            both.wait(timeout=HANGS_AFTER_S)

    monkeypatch.setattr(index_module, "_check_free", meet)
    monkeypatch.setattr(index_module, "_begin", lambda path, identity: (made.append(path), begin(path, identity)))
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: Index.create(tmp_path / "index", plume), range(2))
    assert len(made) == 1
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("a kite")
    first.update(tmp_path / "files", plume, show_progress=False)
    assert len(first) == len(second) == 1
