"""What commands say when something is wrong: one line, at once, with what was received and what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plume.checkpoints.place import check_place, stay_offline_without_network
from plume.cli import main as cli
from plume.terminal import missing
from plume_eval import __main__ as evaluation
from tests.processes import run


@pytest.fixture
def files(tmp_path, plume_folder, monkeypatch):
    """A folder to stand in, with a model, a file of each kind, and one that is broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latent").symlink_to(plume_folder)
    (tmp_path / "note.txt").write_text("a red kite")
    (tmp_path / "long.txt").write_text("kite " * 10_000)
    Image.new("RGB", (56, 56), "red").save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_text("not an image")
    (tmp_path / "notes").mkdir()
    return tmp_path


def said(capsys, monkeypatch, *words, main=cli.main) -> tuple[int, str, str]:
    """Exit status, and what stands on stdout and on stderr."""
    monkeypatch.setattr("sys.argv", [{cli.main: "plume"}.get(main, "plume-eval"), *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


MODEL = ["--model", "runs/latent"]
BAD_CALLS = {
    "foo": "plume: No such command 'foo'; see plume --help",
    "serach kite": "plume: No such command 'serach'. Did you mean 'search'? See plume --help",
    "encode --modle x": "plume encode: No such option: --modle (Possible options: --model); see plume encode --help",
    "encode --mod x": "plume encode: No such option: --mod",
    "encode nosuch.png": "plume: nosuch.png: there is no such file",
    "encode notes": "plume: notes: it is a folder; name the files in it, or index it with `plume index`",
    "encode s3://bucket/a.png": "a.png: it is an address; download the file, and name its path",
    "encode note.zip": "plume: note.zip: there is no such file",
    "trace nosuch.png": "plume: nosuch.png: there is no such file",
    "trace notes": "plume: notes: it is a folder",
    "trace note.txt photo.png long.txt --model runs/latent": "plume: long.txt: it has ",
    "index nosuch": "plume: nosuch is no folder; expected one with files to index",
    "search photo.png": "'photo.png' is the name of a file, not words; search by it with --image photo.png",
    "search gone.MP4": "'gone.MP4' is the name of a file, not words; search by it with --video gone.MP4",
    "search note.txt": "'note.txt' is the name of a file, not words; search by words from it",
}
for command in ("encode note.txt", "trace note.txt", "index notes", "search kite", "convert"):
    tail = " new" if command == "convert" else ""
    flag = "" if command == "convert" else " --model"
    BAD_CALLS |= {
        f"{command}{flag} runs/latnet{tail}": "plume: no folder at 'runs/latnet'; did you mean 'runs/latent'?",
        f"{command}{flag} a/b/c{tail}": "plume: no folder at 'a/b/c'; expected a folder that save_pretrained wrote",
        f"{command}{flag} runs{tail}": "plume: runs holds no config.json, but runs/latent does; expected",
        f"{command}{flag} note.txt{tail}": "plume: note.txt is a file; expected a folder",
    }


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("call", BAD_CALLS)
def test_a_wrong_call_is_one_line(capsys, monkeypatch, call):
    code, out, err = said(capsys, monkeypatch, *call.split())
    assert code in (1, 2)
    assert out == ""
    assert BAD_CALLS[call] in err
    assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("call", ["encode note.txt", "trace note.txt", "convert"])
def test_a_name_that_the_hub_cannot_be_asked_for_is_one_line(capsys, monkeypatch, call):
    words = [*call.split(), *([] if call == "convert" else ["--model"]), "you/kite", *(["new"] * (call == "convert"))]
    code, _, err = said(capsys, monkeypatch, *words)
    assert code == 1
    assert err.startswith("plume: no folder at 'you/kite', and no such model on the Hub, or it cannot be reached (")
    assert len(err.splitlines()) == 1


def test_where_the_network_is_gone_the_hub_is_not_asked(tmp_path, monkeypatch):
    def fail(host, *args):
        raise OSError(f"no address for {host}")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("plume.checkpoints.place.getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    stay_offline_without_network(str(tmp_path))
    assert "HF_HUB_OFFLINE" not in os.environ
    stay_offline_without_network("you/kite")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_name_is_a_path_where_its_first_part_is_a_folder(files):
    check_place("you/kite")
    check_place("kite")
    check_place("runs/latent")
    for path in ("runs/kite", "./kite", "../kite", "/kite", "notes/a/b"):
        with pytest.raises(ValueError, match="no folder at"):
            check_place(path)


@pytest.mark.parametrize("words", [["encode", "nosuch.png"], ["encode", "note.txt", "--model", "a/b/c"], ["--version"]])
def test_what_is_wrong_is_said_before_anything_is_loaded(files, words):
    code = (
        "import sys; from plume.cli.main import main; sys.argv = ['plume', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print('loaded', *sys.modules)"
    )
    loaded = run([sys.executable, "-c", code, *words], cwd=files).stdout.rpartition("loaded")[2].split()
    assert "plume.cli" in loaded
    assert not {"torch", "transformers", "numpy", "PIL"} & set(loaded)


def test_nothing_is_written_where_every_input_fails(files, capsys, monkeypatch):
    (files / "v.npz").write_bytes(b"of yesterday")
    code, out, err = said(capsys, monkeypatch, "encode", "broken.png", "nosuch.png", *MODEL, "--out", "v.npz")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "plume: nosuch.png: there is no such file"
    assert "broken.png: " in err.splitlines()[1]
    assert err.splitlines()[2:] == ["nothing was written to v.npz"]
    assert (files / "v.npz").read_bytes() == b"of yesterday"


def test_names_may_come_from_standard_input(files, capsys, monkeypatch):
    with (files / "names").open("w+b") as names:
        names.write(b"note.txt\n\nphoto.png\n")
        names.seek(0)
        monkeypatch.setattr("sys.stdin", open(names.fileno(), closefd=False))  # noqa: SIM115
        code, out, err = said(capsys, monkeypatch, "encode", "-", *MODEL, "--out", "v.npz")
    assert (code, err) == (0, "")
    assert out == "2 vectors of 64 numbers in v.npz\n"
    assert np.load("v.npz")["names"].tolist() == ["note.txt", "photo.png"]


def test_one_is_said_as_one_and_no_bar_is_drawn_outside_of_a_terminal(files, capsys, monkeypatch):
    code, out, err = said(capsys, monkeypatch, "encode", "note.txt", *MODEL, "--batch-size", "1", "--out", "v.npz")
    assert (code, out, err) == (0, "1 vector of 64 numbers in v.npz\n", "")
    (files / "notes" / "a.txt").write_text("red")
    code, out, err = said(capsys, monkeypatch, "index", "notes", *MODEL, "--out", "i")
    assert (code, err) == (0, "")
    assert out.startswith("1 row in i: 1 embedded")


def test_words_that_end_like_a_file_may_be_searched(files, capsys, monkeypatch):
    (files / "notes" / "a.txt").write_text("red")
    said(capsys, monkeypatch, "index", "notes", *MODEL, "--out", "i")
    for words in (" photo.png", "what is photo.png"):
        code, out, _ = said(capsys, monkeypatch, "search", words, "--index", "i")
        assert code == 0
        assert "a.txt" in out


def test_warnings_of_a_command_are_sentences_and_notes_of_libraries_are_not_said(files, capsys, monkeypatch):
    import warnings

    from plume import Plume

    encode = Plume.encode

    def warn(*args, **kwargs):
        warnings.warn("plume: this is\nslow", stacklevel=1)
        warnings.warn("use something else", FutureWarning, stacklevel=1)
        warnings.warn("it will go", DeprecationWarning, stacklevel=1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(Plume, "encode", warn)
    code, _, err = said(capsys, monkeypatch, "encode", "note.txt", *MODEL, "--out", "v.npz")
    assert (code, err) == (0, "plume: warning: this is slow\n")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("foo", "plume-eval: No such command 'foo'; see plume-eval --help"),
        ("hops rnu", "plume-eval hops: No such command 'rnu'. Did you mean 'run'?"),
        ("hops run --model runs/latnet --data runs", "no folder at 'runs/latnet'; did you mean 'runs/latent'?"),
        ("latency --cofig x", "No such option: --cofig"),
    ],
)
def test_plume_eval_says_in_one_line_what_is_wrong(capsys, monkeypatch, call, message):
    code, out, err = said(capsys, monkeypatch, *call.split(), main=evaluation.main)
    assert code in (1, 2)
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_python_m_plume_is_the_command(files):
    done = run([sys.executable, "-m", "plume", "--version"], cwd=files)
    assert done.stdout.startswith("plume ")
    assert Path("note.txt").exists()


_WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None  # as if it were not installed
from plume.cli.main import main
sys.argv[0] = "plume"
main()
"""


def test_a_package_that_is_missing_is_named_with_its_extra(files):
    words = ["index", "notes", "--model", "runs/latent"]
    done = run([sys.executable, "-c", _WITHOUT, "filelock", *words], cwd=files)
    assert done.returncode == 1
    assert done.stderr == "plume: the package filelock is missing; pip install 'plume-embed[index]'\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("peft", "the package peft is missing; pip install 'plume-embed[train]'"),
        ("matplotlib.pyplot", "the package matplotlib is missing; pip install 'plume-embed[plot]'"),
        ("torch", None),
        (None, "drawing needs matplotlib"),
    ],
)
def test_only_packages_of_extras_are_called_missing(name, message):
    assert missing(ImportError("drawing needs matplotlib", name=name)) == message
