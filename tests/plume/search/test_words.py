"""Words inside texts, pages and names, beside vectors; filters by typed fields; indices of format 1."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from plume import Plume
from plume.cli.main import app
from plume.inputs.pages import pages
from plume.search.filter import Filter
from plume.search.folder import digest
from plume.search.index import Index
from plume.search.query import Compiled
from plume.search.rows import Splitter, excerpt_of
from plume.search.store import TABLE, RowStore
from plume.search.update import read_texts

WORDS = ["kite", "bird", "table", "blue", "red", "what", "is", "it", "to", "see", "from", "the", "hill", "over"]
CODES = {7: "INV-00042", 31: "Müller"}


def write_pdf(path: Path, texts: list[str]) -> None:
    """A PDF whose pages hold text, each in one line."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in texts:
        line = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
        stream = f"BT /F1 12 Tf 10 50 Td ({line}) Tj ET"
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 100] /Contents {len(objects) + 2} 0 R "
            "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica "
            "/Encoding /WinAnsiEncoding >> >> >> >>"
        )
        objects.append(f"<< /Length {len(stream.encode('cp1252'))} >>\nstream\n{stream}\nendstream")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    written, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(written))
        written += f"{number} 0 obj\n{content}\nendobj\n".encode("cp1252")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\n"
    )
    path.write_bytes(written + end.encode() + f"startxref\n{len(written)}\n%%EOF\n".encode())


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Forty notes, a PDF of three pages, one of pictures, two photos."""
    root, rng = tmp_path_factory.mktemp("library"), np.random.default_rng(0)
    (root / "notes").mkdir()
    for number in range(40):
        words = [*rng.choice(WORDS, 60), CODES.get(number, ""), *rng.choice(WORDS, 10)]
        (root / "notes" / f"{number}.txt").write_text(" ".join(words))
    write_pdf(root / "bills.pdf", ["what is due (now)", "paid for BX-77/3 at the table", "the end"])
    Image.new("RGB", (60, 60), "purple").save(root / "scan.pdf")
    for colour in ("red", "blue"):
        Image.new("RGB", (60, 60), colour).save(root / f"{colour}_harbour-2019.png")
    os.utime(root / "scan.pdf", (0, datetime(2020, 5, 17, 12, tzinfo=UTC).timestamp()))
    return root


@pytest.fixture(scope="module")
def index(library, plume, tmp_path_factory) -> Index:
    index = Index.create(tmp_path_factory.mktemp("made") / "index", plume)
    index.update(library, plume, show_progress=False)
    return index


def names(hits) -> list[str]:
    return [Path(hit.path).name for hit in hits]


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout + "\n" + result.stderr


def test_pages_give_their_text(library):
    assert [page.text() for page in pages(library / "bills.pdf")] == [
        "what is due (now)",
        "paid for BX-77/3 at the table",
        "the end",
    ]
    assert [page.text() for page in pages(library / "scan.pdf")] == [""]


@pytest.mark.parametrize(
    ("code", "name", "page"),
    [("INV-00042", "7.txt", None), ("muller", "31.txt", None), ("BX-77/3", "bills.pdf", 2), ("harbour", None, None)],
)
def test_a_row_that_alone_holds_the_words_comes_first(index, plume, code, name, page):
    hits = index.search(f"the {code}", plume, hybrid=0.5, top_k=5)
    plain = index.search(f"the {code}", plume, top_k=46)
    if name is None:
        assert set(names(hits[:2])) == {"red_harbour-2019.png", "blue_harbour-2019.png"}
    else:
        assert (names(hits)[0], hits[0].page) == (name, page)
    assert hits[0].text_score > 0
    if page or name:
        assert code.casefold().replace("ü", "u")[:4] in hits[0].excerpt.casefold().replace("ü", "u")
    cosines = {(hit.path, hit.page): hit.score for hit in plain}
    for hit in hits:  # the cosine is kept, and is that of a plain search
        assert hit.score == pytest.approx(cosines[hit.path, hit.page], abs=1e-5)
    assert [hit.fused for hit in hits] == sorted((hit.fused for hit in hits), reverse=True)
    assert all(hit.fused is None and hit.text_score is None for hit in plain)


def test_weights_and_words_of_their_own(index, plume, library):
    plain = index.search("red", plume, top_k=46)
    assert names(index.search("red", plume, top_k=46, hybrid=0.0)) == names(plain)
    assert names(index.search("red", plume, top_k=3, text="INV-00042"))[0] == "7.txt"
    picture = Image.open(library / "red_harbour-2019.png")
    assert names(index.search(picture, plume, hybrid=0.5, top_k=5)) == names(index.search(picture, plume, top_k=5))
    assert names(index.search(picture, plume, text="INV-00042", top_k=1)) == ["7.txt"]
    assert names(index.search({"image": picture, "text": "INV-00042"}, plume, hybrid=0.5, top_k=1)) == ["7.txt"]
    for nothing in ("", "   ", "!?", "zebra", "'; drop (\" *"):
        found = index.search("red", plume, text=nothing, hybrid=0.5, top_k=46)
        assert names(found) == names(plain)
    for hybrid in (-0.1, 1.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            index.search("red", plume, hybrid=hybrid)


def test_filters_hold_for_both_orders(index, plume, library):
    def found(**fields):
        return {
            (Path(hit.path).name, hit.page)
            for hit in index.search("the INV-00042", plume, hybrid=0.5, filter=Filter(**fields), top_k=100)
        }

    pdfs = {("bills.pdf", 1), ("bills.pdf", 2), ("bills.pdf", 3), ("scan.pdf", 1)}
    assert found(kinds=("pdf",)) == pdfs
    assert found(page=1) == {("bills.pdf", 1), ("scan.pdf", 1)}
    assert found(path=str(library / "bills.pdf"), page=3) == {("bills.pdf", 3)}
    assert len(found(folder=str(library / "notes"))) == 40
    assert found(until=date(2020, 12, 31)) == {("scan.pdf", 1)}
    assert len(found(since=date(2021, 1, 1))) == 45
    hits = index.search("it", plume, filter=Filter(kinds=("pdf",)), where="page > 1 OR num_pages = 1", top_k=100)
    assert {(Path(hit.path).name, hit.page) for hit in hits} == pdfs - {("bills.pdf", 1)}


def older(index: Index, at: Path) -> Index:
    """The same index as format 1 had it: without texts, and without excerpts of pages."""
    shutil.copytree(index.path, at)
    store = RowStore(at, index.identity.dim)
    for name in [one.name for one in store._table.list_indices()]:
        store._table.drop_index(name)
    store._table.drop_columns(["text"])
    store._table.update(where="kind = 'pdf'", values={"excerpt": ""})
    said = json.loads((at / "index.json").read_text())
    (at / "index.json").write_text(json.dumps({**said, "format": 1}))
    assert "text" not in RowStore(at, index.identity.dim)._schema.names
    return Index.open(at)


def test_an_index_of_format_1_is_searched_and_gets_its_texts_without_embedding(
    index, plume, library, tmp_path, monkeypatch
):
    old = older(index, tmp_path / "old")
    assert names(old.search("red", plume)) == names(index.search("red", plume))
    with pytest.raises(ValueError, match=r"before texts were kept; run `plume index"):
        old.search("red", plume, hybrid=0.5)

    monkeypatch.setattr(plume, "encode_document", None)  # nothing is embedded
    with monkeypatch.context() as patched:  # killed while texts are read
        patched.setattr("plume.search.update._TEXTS_PER_COMMIT", 8)
        write, calls = RowStore.amend, []

        def die(store, texts):
            calls.append(len(texts))
            if len(calls) == 3:
                raise KeyboardInterrupt
            write(store, texts)

        patched.setattr(RowStore, "amend", die)
        with pytest.raises(KeyboardInterrupt):
            old.update(library, plume, show_progress=False)
    assert 0 < len(old.store.without_text(library)) < len(old)
    again = Index.open(tmp_path / "old")
    report = again.update(library, plume, show_progress=False)
    assert (report.embedded, report.removed, report.skipped) == (0, 0, [])
    assert json.loads((tmp_path / "old" / "index.json").read_text())["format"] == 2

    columns = ["name", "page", "sha256", "text", "excerpt", "vector"]
    rows = [sorted(one.store.rows(columns), key=lambda row: (row["name"], row["page"])) for one in (index, again)]
    assert rows[0] == rows[1]
    assert names(again.search("the BX-77/3", plume, hybrid=0.5))[0] == "bills.pdf"
    assert (tmp_path / "old" / f"{TABLE}.lance").is_dir()


def test_words_of_new_changed_and_removed_files(plume, tmp_path):
    root = tmp_path / "notes"
    root.mkdir()
    (root / "a.txt").write_text("the word is quokka")
    index = Index.create(tmp_path / "index", plume)
    assert index.search("quokka", plume, hybrid=0.5) == []
    index.update(root, plume, show_progress=False)

    def holders(word: str) -> list[str]:
        hits = index.search(word, plume, hybrid=0.5)
        return names([hit for hit in hits if hit.text_score is not None])

    assert holders("quokka") == ["a.txt"]
    (root / "a.txt").write_text("the word is numbat")
    shutil.copy(root / "a.txt", root / "b.txt")
    (root / "long.txt").write_text("to see the hill " * 100 + "capybara")
    index.update(root, plume, show_progress=False)
    assert holders("quokka") == []
    assert sorted(holders("numbat")) == ["a.txt", "b.txt"]
    assert holders("capybara") == ["long.txt"]
    (hit,) = index.search("capybara", plume, hybrid=0.5, top_k=1)
    assert hit.excerpt.endswith("capybara")
    assert len(hit.excerpt) == 200
    (root / "b.txt").unlink()
    index.update(root, plume, show_progress=False)
    assert holders("numbat") == ["a.txt"]


def test_the_command_finds_words_and_takes_filters(index, plume_folder, library):
    def said(*arguments) -> list[dict]:
        status, out = run("search", *arguments, "--index", index.path, "--model", plume_folder, "--json")
        assert status == 0, out
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    (hit,) = said("the INV-00042", "--hybrid", 0.5, "--top-k", 1)
    assert (Path(hit["path"]).name, hit["text_score"] > 0, "INV-00042" in hit["excerpt"]) == ("7.txt", True, True)
    (hit,) = said("--image", library / "red_harbour-2019.png", "--words", "BX-77/3", "--top-k", 1)
    assert (Path(hit["path"]).name, hit["page"]) == ("bills.pdf", 2)
    assert len(said("red", "--kind", "pdf", "--kind", "image", "--top-k", 99)) == 6
    assert len(said("red", "--folder", library / "notes", "--top-k", 99)) == 40
    assert [hit["page"] for hit in said("red", "--path", library / "bills.pdf", "--page", 2)] == [2]
    assert [Path(hit["path"]).name for hit in said("red", "--until", "2020-12-31")] == ["scan.pdf"]
    for arguments, message in (
        (("red", "--since", "yesterday"), "'yesterday' is no day; expected one such as 2026-01-31"),
        (("red", "--kind", "sound"), "there is no kind 'sound'"),
    ):
        status, out = run("search", *arguments, "--index", index.path, "--model", plume_folder)
        assert status == 1
        assert message in out
    status, out = run("search", "red", "--since", "2999-01-01", "--index", index.path, "--model", plume_folder)
    assert status == 0
    assert "no results that meet the conditions" in out


def test_whoever_has_opened_an_older_index_sees_that_another_has_read_its_texts(index, plume, library, tmp_path):
    old = older(index, tmp_path / "old")
    reader, writer = Index.open(tmp_path / "old"), Index.open(tmp_path / "old")
    old.update(library, plume, show_progress=False)
    assert names(reader.search("the BX-77/3", plume, hybrid=0.5))[0] == "bills.pdf"
    assert writer.update(library, plume, show_progress=False).embedded == 0


def test_a_text_is_read_from_the_file_that_was_embedded_or_not_at_all(index, plume, library, tmp_path):
    """A file that has been written to since, and is left for later, gets no text of what it holds now."""
    old = older(index, tmp_path / "old")
    file = library / "notes" / "7.txt"
    before, stat = file.read_text(), file.stat()
    try:
        file.write_text("something else")
        with old.writing():
            read_texts(old.store, library, Splitter())
        assert [row["name"] for row in old.store.without_text(library)] == ["notes/7.txt"]
    finally:
        file.write_text(before)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert old.update(library, plume, show_progress=False).embedded == 0
    assert old.store.without_text(library) == []
    assert names(old.search("the INV-00042", plume, hybrid=0.5))[0] == "7.txt"


def test_rows_of_tables_keep_their_excerpt_and_show_no_more(plume, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    long = "what it is " * 40 + "secret numbat"
    row = {"root": "table:x", "name": "1", "path": "table:x/1", "kind": "text", "page": 0, "num_pages": 1, "size": 0}
    row |= {"sha256": "0" * 64, "mtime_ns": 0, "excerpt": long[:200], "text": long, "thumbnail": b""}
    index.store.add([{**row, "vector": plume.encode(long)}])
    (hit,) = index.search("numbat", plume, hybrid=0.5)
    assert hit.text_score > 0
    assert hit.excerpt == long[:200]
    (hit,) = older(index, tmp_path / "old").search("what", plume)
    assert hit.excerpt == long[:200]
    old = Index.open(tmp_path / "old")
    with old.writing():
        pass
    assert [row["text"] for row in old.store.rows(["text"])] == [long[:200]]

    root = tmp_path / "notes"  # a file of the same content gets its own text, all of it
    root.mkdir()
    (root / "a.txt").write_text(long)
    with old.writing():
        old.store._table.update(where="true", values={"sha256": digest(root / "a.txt")})
    assert old.update(root, plume, show_progress=False).reused == 1
    assert {row["root"]: row["text"] for row in old.store.rows(["root", "text"])} == {
        "table:x": long[:200],
        str(root): long,
    }


def test_pages_of_results_are_of_one_order(index, plume):
    vector = plume.encode_query("the INV-00042 kite")
    asked = {"text": "kite", "hybrid": 0.5}
    whole = [(hit.path, hit.page) for hit in index.nearest(Compiled.of(vector), top_k=46, **asked)]
    parts = [index.nearest(Compiled.of(vector), top_k=7, offset=start, **asked) for start in range(0, 46, 7)]
    assert [(hit.path, hit.page) for part in parts for hit in part] == whole
    plain = [index.nearest(Compiled.of(vector), top_k=7, offset=start) for start in range(0, 46, 7)]
    assert len({(hit.path, hit.page) for part in plain for hit in part}) == len(whole) == 46


def test_rows_that_are_compacted_during_a_search_are_found_again(index, plume, monkeypatch):
    expected = names(index.search("the INV-00042", plume, hybrid=0.5))
    numbered, calls = RowStore.numbered, []

    def moved(store, numbers, **settings):
        calls.append(1)
        return {} if len(calls) == 1 else numbered(store, numbers, **settings)

    monkeypatch.setattr(RowStore, "numbered", moved)
    assert names(index.search("the INV-00042", plume, hybrid=0.5)) == expected
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("text", "words", "place"),
    [
        ("ab cd " * 100 + "Müller went " + "ab cd " * 100, "muller", "Müller"),
        ("ab cd " * 100 + "Muller went " + "ab cd " * 100, "MÜLLER", "Muller"),
        ("名前はまだ無い。" * 60 + "発票番号" + "名前はまだ無い。" * 60, "発票", "発票番号"),
        ("가가 " * 200 + "강강 " + "가가 " * 200, "강강", "강강"),
        ("go to " * 100 + "the invoice " + "go to " * 100, "to the invoice", "the invoice"),
        ("ab cd " * 40_000 + "late", "late", "ab cd"),  # so far in that nobody looks
    ],
)
def test_an_excerpt_is_where_the_words_are(text, words, place):
    found = excerpt_of(text, words)
    assert len(found) == 200
    assert place in found
    assert place.startswith("ab") or found != text[:200]


def test_words_are_found_however_they_are_written(plume, tmp_path):
    root = tmp_path / "notes"
    root.mkdir()
    code = "".join(f"{number:02x}" for number in range(64))
    (root / "apart.txt").write_text("a bill of Mu\u0308ller " + code)
    (root / "other.txt").write_text("the bill of somebody else")
    index = Index.create(tmp_path / "index", plume)
    index.update(root, plume, show_progress=False)
    for words in ("Müller", "Mu\u0308ller", "muller", code):
        (first, *_) = index.search(words, plume, hybrid=0.5)
        assert (Path(first.path).name, first.text_score is None) == ("apart.txt", False)
