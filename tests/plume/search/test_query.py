"""Queries of several parts, and where results end, against brute force over all rows in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from plume import Index, Plume
from plume.cli.main import app
from plume.search import ranking
from plume.search.query import All, Analogy, Any, Compiled, Examples, Like, Mix, Not, compiled, inputs_of, row_like
from plume.space.arithmetic import cone_around

WORDS = ["kite", "bird", "table", "blue", "red", "what", "is", "it", "to", "see", "from", "the", "hill", "over"]


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("library"), np.random.default_rng(0)
    for number in range(70):
        (root / f"{number:02}.txt").write_text(" ".join(rng.choice(WORDS, rng.integers(2, 12))))
    for number in range(10):
        Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(root / f"{number}.png")
    (root / "twin.txt").write_text((root / "00.txt").read_text())
    Image.new("RGB", (60, 60), "white").save(
        root / "two.pdf", save_all=True, append_images=[Image.new("RGB", (60, 60), "black")]
    )
    return root


@pytest.fixture(scope="module")
def index(library, plume, tmp_path_factory) -> Index:
    index = Index.create(tmp_path_factory.mktemp("made") / "index", plume)
    index.update(library, plume, show_progress=False)
    return index


@pytest.fixture(scope="module")
def rows(index):
    """Names, pages and unit vectors of all rows."""
    found = index.store.rows(["name", "page", "vector"])
    vectors = np.array([row["vector"] for row in found], dtype=np.float64)
    return [(row["name"], row["page"]) for row in found], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def found_by(hits):
    return [(hit.path.rpartition("/")[2], hit.page or 0) for hit in hits]


def z_of(rows, vectors):
    """Standardised cosines: in a small index the sample is all of it."""
    cosines = np.asarray(vectors, dtype=np.float64) @ rows.T
    middle = np.median(cosines, axis=1, keepdims=True)
    return (cosines - middle) / (middle - np.quantile(cosines, 0.1587, axis=1, keepdims=True))


def assert_ordered(hits, names, values, expected_scores=None):
    """The hits are the best rows by some values, up to values that rounding cannot tell apart."""
    place = {name: at for at, name in enumerate(names)}
    got = np.array([values[place[name]] for name in found_by(hits)])
    np.testing.assert_allclose(got, np.sort(values)[::-1][: len(hits)], atol=2e-4)


CASES = {
    "all": (All("a red kite", "the hill"), lambda z: z.min(0), 2),
    "any": (Any("a red kite", "the hill"), lambda z: z.max(0), 2),
    "not": (Not("a red kite"), lambda z: 4 - z[0], 1),
    "all but": (All("a red kite", Not("the hill")), lambda z: z[0] - np.maximum(0, z[1] - 2), 2),
    "all of nots": (All(Not("a red kite"), Not("the hill")), lambda z: np.minimum(4 - z[0], 4 - z[1]), 2),
    "not any": (Not(Any("a red kite", "blue")), lambda z: 4 - z.max(0), 2),
    "nested": (
        All(Any("a red kite", "blue"), "the hill", Not(All("table", "bird"))),
        lambda z: np.minimum(z[:2].max(0), z[2]) - np.maximum(0, z[3:].min(0) - 2),
        5,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logic_is_that_of_brute_force(index, plume, rows, case):
    query, by_hand, count = CASES[case]
    names, vectors = rows
    texts = [text for text, _ in inputs_of(query)]
    assert len(texts) == count
    embedded = plume.encode_query(texts)
    hits = index.search(query, plume, top_k=15)
    assert_ordered(hits, names, by_hand(z_of(vectors, embedded)))
    place = {name: at for at, name in enumerate(names)}
    for hit, name in zip(hits, found_by(hits), strict=True):
        np.testing.assert_allclose(hit.parts, embedded @ vectors[place[name]], atol=1e-5)
        assert hit.logic == pytest.approx(by_hand(z_of(vectors, embedded))[place[name]], abs=1e-3)
        assert set(hit.to_dict()) >= {"score", "parts", "logic"}


def test_one_clause_is_a_plain_search(index, plume):
    plain = index.search("a red kite", plume, top_k=20)
    for join in (All, Any):
        joined = index.search(join("a red kite"), plume, top_k=20)
        assert found_by(joined) == found_by(plain)
        np.testing.assert_allclose([hit.score for hit in joined], [hit.score for hit in plain], atol=1e-5)
    assert plain[0].parts is plain[0].logic is plain[0].relevance is None


def test_conditions_hold_for_every_part(index, plume):
    hits = index.search(All("a red kite", Not("blue")), plume, top_k=50, where="kind = 'image' OR kind = 'pdf'")
    assert {hit.kind for hit in hits} == {"image", "pdf"}
    assert len(hits) == 12


def test_a_mix_is_one_vector(index, plume, rows, library):
    names, vectors = rows
    photo = library / "3.png"
    embedded = plume.encode_query(["a red kite", photo, "night"])
    total = embedded[0] + 0.5 * embedded[1] - 0.4 * embedded[2]
    hits = index.search(Mix((1, "a red kite"), (0.5, photo), (-0.4, "night")), plume, top_k=12)
    cosines = vectors @ total / np.linalg.norm(total)
    assert_ordered(hits, names, cosines)
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:12], atol=1e-5)
    one_input = index.search({"text": "a red kite", "image": photo}, plume, top_k=12)
    assert not np.allclose([hit.score for hit in one_input], [hit.score for hit in hits], atol=1e-3)
    with pytest.raises(ValueError, match="the parts cancel"):
        index.search(Mix((1, "a red kite"), (-1, "a red kite")), plume)


def test_what_is_like_a_row_needs_no_model_and_leaves_its_content_out(index, rows, library):
    names, vectors = rows
    own = vectors[names.index(("00.txt", 0))]
    hits = index.search(Like(library / "00.txt"), top_k=10)
    others = np.array([name not in (("00.txt", 0), ("twin.txt", 0)) for name in names])
    assert_ordered(hits, names, np.where(others, vectors @ own, -1))
    assert found_by(index.search(Like(hits[0]), top_k=3)) == found_by(index.search(Like(hits[0].path), top_k=3))
    same = index.search(Mix((1, Like(library / "00.txt")), (1, Like(library / "3.png"))), top_k=90)
    assert len(same) == len(names) - 3
    with_condition = index.search(Like(library / "3.png"), where="kind = 'text' OR kind = 'image'", top_k=100)
    assert len(with_condition) == 71 + 9


def test_rows_that_cannot_be_told_are_refused(index, plume, library):
    with pytest.raises(ValueError, match=r"two\.pdf has 2 pages or passages; say which one"):
        index.search(Like(library / "two.pdf"))
    assert index.search(Like(library / "two.pdf", page=2), top_k=1)[0].path
    with pytest.raises(ValueError, match=r"page 3 of .*two\.pdf is not in the index"):
        index.search(Like(library / "two.pdf", page=3))
    with pytest.raises(ValueError, match=r"nowhere\.png is not in the index"):
        index.search(Like("nowhere.png"))
    with pytest.raises(ValueError, match="pass the embedder"):
        index.search(All(Like(library / "3.png"), "a kite"))
    with pytest.raises(ValueError, match="part 2 of the query: it is 2 inputs"):
        index.search(All("a kite", ["a", "b"]), plume)


def test_an_analogy_leaves_its_parts_out(index, plume, rows, library):
    names, vectors = rows
    a, b, c = (vectors[names.index((name, 0))] for name in ("01.txt", "02.txt", "03.txt"))
    hits = index.search(Analogy(*(Like(library / name) for name in ("01.txt", "02.txt", "03.txt"))), top_k=5)
    total = b - a + c
    cosines = vectors @ (total / np.linalg.norm(total))
    nearest = np.max([vectors @ one for one in (a, b, c)], axis=0)
    assert_ordered(hits, names, np.where(nearest > 0.999, -1, cosines))
    text = (library / "02.txt").read_text()
    told = index.search(Analogy("red", text, "blue"), plume, top_k=5)
    embedded = plume.encode_query(["red", text, "blue"])
    for hit in told:
        assert (embedded @ hit.vector).max() <= 0.999


def test_examples_end_where_they_end_themselves(index, plume, rows):
    names, vectors = rows
    texts = ["a red kite", "a blue kite", "kite over the hill"]
    cone = cone_around(plume.encode_query(texts))
    inside = vectors @ cone.centre >= cone.cosine
    hits = index.search(Examples(*texts), plume, top_k=100)
    assert sorted(found_by(hits)) == sorted(name for name, is_in in zip(names, inside, strict=True) if is_in)
    with pytest.raises(ValueError, match="at least two examples"):
        Examples("a kite")
    same = index.search(Examples("a red kite", "a red kite"), plume, top_k=3)
    assert [hit.score for hit in same] == pytest.approx([1.0] * len(same), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Mix((1, All("a", "b")), (1, "c")), "All stands within a sum"),
        (lambda: Mix((1, Examples("a", "b")), (1, "c")), "Examples have a bound of their own"),
        (lambda: All(Examples("a", "b")), "Examples have a bound of their own"),
        (lambda: Mix("a", "b"), "pairs of weight and part"),
        (lambda: All(), "All takes at least one part"),
        (lambda: Mix(("a", 1)), "pairs of weight and part"),
        (lambda: Mix((float("inf"), "a")), "pairs of weight and part"),
    ],
)
def test_what_cannot_be_joined_is_refused(index, plume, make, expected):
    with pytest.raises(ValueError, match=expected):
        index.search(make(), plume)


def test_words_that_are_looked_for_are_those_of_what_is_wanted(index, plume, library):
    hits = index.search(All("kite", Not("zebra")), plume, hybrid=0.9, top_k=5)
    holding = {path.name for path in library.glob("*.txt") if "kite" in path.read_text()}
    assert {hit.path.rpartition("/")[2] for hit in hits} <= holding
    assert all(hit.logic is not None and hit.fused is not None and len(hit.parts) == 2 for hit in hits)
    parts = list(inputs_of(All("a", Not(Any("b", Not("c"))), Mix((1, "d"), (-1, "e")), Like("f"))))
    assert parts == [("a", True), ("b", False), ("c", True), ("d", True), ("e", False)]


def test_a_large_index_looks_at_what_is_near_to_a_part(index, plume, monkeypatch):
    monkeypatch.setattr(ranking, "APPROXIMATE_FROM", 10)
    monkeypatch.setattr(ranking, "_CANDIDATES", 30)
    query = All("a red kite", Any("the hill", "blue"))
    some, every = (index.search(query, plume, top_k=5, exact=exact) for exact in (False, True))
    assert {hit.path for hit in some} & {hit.path for hit in every}
    assert [hit.logic for hit in every] >= [hit.logic for hit in some]
    monkeypatch.setattr(ranking, "_CANDIDATES", 500)
    assert found_by(index.search(query, plume, top_k=5)) == found_by(every)


def test_pages_of_results_agree(index, plume):
    asked = compiled(All("x", Not("y")), list(plume.encode_query(["a red kite", "blue"])), lambda _: None)
    whole = found_by(index.nearest(asked, top_k=60))
    assert [one for start in range(0, 60, 7) for one in found_by(index.nearest(asked, top_k=7, offset=start))][
        :60
    ] == whole


def test_min_score_leaves_out_what_is_further_away(index, plume):
    every = index.search("a red kite", plume, top_k=100)
    least = every[7].score
    assert found_by(index.search("a red kite", plume, top_k=100, min_score=least)) == found_by(every[:8])
    assert index.search("a red kite", plume, min_score=1.01) == []


def made_index(plume, folder, vectors) -> Index:
    """An index with rows of given vectors."""
    index = Index.create(folder, plume)
    index.store.add(
        {
            "root": "/r", "name": f"{at}.txt", "path": f"/r/{at}.txt", "kind": "text", "page": 0, "num_pages": 1,
            "sha256": f"{at:064}", "size": 1, "mtime_ns": 1, "excerpt": "", "text": "", "thumbnail": b"", "vector": one,
        }
        for at, one in enumerate(vectors)
    )  # fmt: skip
    return index


def test_a_cut_by_relevance_keeps_matches_and_tells_noise(plume, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3_000, plume.get_embedding_dimension()))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    query = rng.normal(size=rows.shape[1])
    query /= np.linalg.norm(query)
    rows[:4] = query + 0.05 * rows[:4]
    rows[:4] /= np.linalg.norm(rows[:4], axis=1, keepdims=True)
    index = made_index(plume, tmp_path / "index", rows.astype(np.float32))
    hits = index.nearest(Compiled.of(query.astype(np.float32)), top_k=50, cut="auto")
    assert sorted(hit.row for hit in hits) == [0, 1, 2, 3]
    cosines = rows @ query
    deviation = np.median(cosines) - np.quantile(cosines, 0.1587)
    assert hits[0].relevance == pytest.approx((hits[0].score - np.median(cosines)) / deviation, rel=1e-3)
    assert len(index.nearest(Compiled.of(query.astype(np.float32)), top_k=50, cut="drop")) == 4
    noise = rng.normal(size=(40, rows.shape[1])).astype(np.float32)
    empty = [not index.nearest(Compiled.of(one / np.linalg.norm(one)), cut="auto") for one in noise]
    assert np.mean(empty) >= 0.9


def test_rows_that_hold_the_words_stay(index, plume, library):
    words = (library / "05.txt").read_text().split()[0]
    hits = index.search("a red kite", plume, text=words, top_k=100, cut="auto")
    assert all(hit.relevance is not None for hit in hits)
    assert [hit for hit in hits if hit.text_score is not None]
    with pytest.raises(ValueError, match='cut="drop" looks at one order'):
        index.search("a red kite", plume, text=words, cut="drop")
    with pytest.raises(ValueError, match="cut is 'best'"):
        index.search("a red kite", plume, cut="best")


def test_a_small_index_cannot_say_what_is_usual(plume, tmp_path):
    index = made_index(plume, tmp_path / "index", np.eye(8, plume.get_embedding_dimension(), dtype=np.float32))
    with pytest.raises(ValueError, match="cannot be told from 8 rows"):
        index.search("a red kite", plume, cut="auto")
    assert 1 <= len(index.search("a red kite", plume, cut="drop")) <= 8


def test_an_empty_index_gives_nothing(plume, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    for settings in ({}, {"cut": "auto"}, {"cut": "drop"}, {"hybrid": 0.5}):
        assert index.search(All("a red kite", Not("blue")), plume, **settings) == []
        assert index.search("a red kite", plume, **settings) == []


def test_a_path_may_name_a_page(tmp_path):
    assert row_like("/data/bills.pdf#page=3") == Like("/data/bills.pdf", 3)
    assert row_like("/data/odd#page=x") == Like("/data/odd#page=x")


def run(*words):
    return CliRunner().invoke(app, ["search", *map(str, words)])


def test_the_command_line_joins_parts(index, plume, plume_folder, library):
    base = ["--index", index.path, "--model", plume_folder, "--json", "--top-k", 6]

    def found(*words):
        result = run(*words, *base)
        assert result.exit_code == 0, result.output
        return [json.loads(line)["path"] for line in result.stdout.splitlines()]

    def expected(query, **settings):
        return [hit.path for hit in index.search(query, plume, top_k=6, **settings)]

    kite = {"text": "a red kite"}
    assert found("a red kite", "--and", "the hill", "--not", "blue") == expected(All(kite, "the hill", Not("blue")))
    assert found("a red kite", "--or", "bird") == expected(Any(kite, "bird"))
    assert found("a red kite", "--minus", "night") == expected(Mix((1, kite), (-0.5, "night")))
    photo = library / "3.png"
    assert found("a red kite", "--like", photo) == expected(Mix((1, kite), (1, Like(photo))))
    assert found("a red kite", "--cut", "drop") == expected(kite, cut="drop")


def test_what_is_like_a_file_loads_no_model(index, library, monkeypatch):
    monkeypatch.setattr("plume.embedder.plume.Plume.__init__", None)
    result = run("--like", f"{library / 'two.pdf'}#page=2", "--index", index.path, "--json", "--top-k", 3)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 3
    assert "two.pdf has 2 pages" in run("--like", library / "two.pdf", "--index", index.path).output


def test_that_nothing_is_close_is_an_answer(index, plume_folder):
    result = run("a red kite", "--index", index.path, "--model", plume_folder, "--min-score", 1.5)
    assert result.exit_code == 0
    assert "nothing here is close to that" in result.output
    assert "nothing to search for" in run("--index", index.path).output


def move_rows(index, monkeypatch, count=2):
    """Let the rows have other numbers when they are read, so many times."""
    left = [count]
    for name in ("numbered", "vectors"):
        before = getattr(index.store, name)

        def moved(*args, before=before, **kwargs):
            found = before(*args, **kwargs)
            if left[0] > 0:
                left[0] -= 1
                return {}
            return found

        monkeypatch.setattr(index.store, name, moved)


@pytest.mark.parametrize(
    ("query", "settings"),
    [
        (Any("a red kite", "blue"), {}),
        ("a red kite", {"hybrid": 0.5}),
        ("a red kite", {"collapse": 0.99}),
        ("a red kite", {"hybrid": 0.5, "collapse": 0.99}),
        (Analogy("a red kite", "blue", "table"), {}),
    ],
)
def test_rows_that_move_while_they_are_read_are_read_again(index, plume, monkeypatch, query, settings):
    expected = [(hit.path, hit.page) for hit in index.search(query, plume, **settings)]
    move_rows(index, monkeypatch)
    assert [(hit.path, hit.page) for hit in index.search(query, plume, **settings)] == expected
    move_rows(index, monkeypatch, 1_000)
    with pytest.raises(OSError, match="move while they are read"):
        index.search(query, plume, **settings)


def test_no_row_meets_a_condition_of_a_large_index(index, plume, monkeypatch):
    monkeypatch.setattr(ranking, "APPROXIMATE_FROM", 10)
    assert index.search(All("a red kite", "blue"), plume, where="page = 77") == []


def test_pages_agree_under_a_bound_of_cosines(index, plume):
    query = All("a red kite", Not("blue"))
    every = index.search(query, plume, top_k=500)
    least = float(np.median([hit.score for hit in every]))
    expected = [hit.row for hit in every if hit.score >= least]
    assert [hit.row for hit in index.search(query, plume, top_k=500, min_score=least)] == expected
    assert [hit.row for hit in index.search(query, plume, top_k=7, min_score=least)] == expected[:7]
    with pytest.raises(ValueError, match="min_score is nan"):
        index.search(query, plume, min_score=float("nan"))


def test_a_file_stands_where_its_best_row_does(plume, tmp_path):
    dim = plume.get_embedding_dimension()
    index = Index.create(tmp_path / "index", plume)
    rows = [("a", 1, 0.9), ("b", 1, 0.5), ("c", 1, 0.3), ("d", 1, 0.2), ("a", 2, 0.1)]
    index.store.add(
        {
            "root": "/r", "name": f"{name}.pdf", "path": f"/r/{name}.pdf", "kind": "pdf", "page": page, "num_pages": 2,
            "sha256": name * 64, "size": 1, "mtime_ns": 1, "excerpt": "", "text": "what", "thumbnail": b"",
            "vector": np.append([cosine, (1 - cosine**2) ** 0.5], np.zeros(dim - 2)).astype(np.float32),
        }
        for name, page, cosine in rows
    )  # fmt: skip
    asked = Compiled.of(np.eye(1, dim, dtype=np.float32)[0])
    for settings in ({}, {"text": "what", "hybrid": 0.5}):
        for top_k in (2, 4, 9):
            found = [(hit.path[3], hit.page) for hit in index.nearest(asked, top_k=top_k, group_by="file", **settings)]
            assert found == [("a", 1), ("b", 1), ("c", 1), ("d", 1)][:top_k]


def test_files_are_found_behind_one_with_many_pages_that_hold_the_word(plume, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1_400, plume.get_embedding_dimension())).astype(np.float32)
    index = Index.create(tmp_path / "index", plume)
    index.store.add(
        {
            "root": "/r", "name": "big.pdf", "path": "/r/big.pdf" if at < 1380 else f"/r/{at}.pdf", "kind": "pdf",
            "page": at + 1, "num_pages": 1400, "sha256": f"{at:064}", "size": 1, "mtime_ns": 1, "excerpt": "",
            "text": "zebra", "thumbnail": b"", "vector": one,
        }
        for at, one in enumerate(rows)
    )  # fmt: skip
    asked = Compiled.of(rows[0] / np.linalg.norm(rows[0]))
    assert len(index.nearest(asked, top_k=30, group_by="file", text="zebra", hybrid=0.5)) == 21


def test_kinds_that_lie_apart_have_a_bound_each(plume, tmp_path):
    """A hundred pictures that are all nearer to every text than texts are: no match for noise."""
    rng, dim = np.random.default_rng(1), plume.get_embedding_dimension()
    index = Index.create(tmp_path / "index", plume)
    query = np.eye(1, dim, dtype=np.float32)[0]
    cosines = np.append(rng.normal(0.1, 0.05, 900), rng.normal(0.35, 0.03, 100))
    others = rng.normal(size=(1000, dim - 1))
    others *= (np.sqrt(1 - cosines**2) / np.linalg.norm(others, axis=1))[:, None]
    index.store.add(
        {
            "root": "/r", "name": f"{at}", "path": f"/r/{at}", "kind": "text" if at < 900 else "image", "page": 0,
            "num_pages": 1, "sha256": f"{at:064}", "size": 1, "mtime_ns": 1, "excerpt": "", "text": "",
            "thumbnail": b"", "vector": np.append(cosines[at], others[at]).astype(np.float32),
        }
        for at in range(1000)
    )  # fmt: skip
    assert len(index.nearest(Compiled.of(query), top_k=200, cut="auto")) <= 2


def mixed_index(plume, folder, num_texts, num_images, matches):
    """Texts around a cosine of 0.2 to the first axis, images around 0, of which some match."""
    rng, dim = np.random.default_rng(2), plume.get_embedding_dimension()
    cosines = np.append(rng.normal(0.2, 0.05, num_texts), rng.normal(0.0, 0.03, num_images))
    cosines[num_texts : num_texts + matches] = 0.3
    others = rng.normal(size=(len(cosines), dim - 1))
    others *= (np.sqrt(1 - cosines**2) / np.linalg.norm(others, axis=1))[:, None]
    index = Index.create(folder, plume)
    index.store.add(
        {
            "root": "/r", "name": f"{at}", "path": f"/r/{at}", "kind": "text" if at < num_texts else "image", "page": 0,
            "num_pages": 1, "sha256": f"{at:064}", "size": 1, "mtime_ns": 1, "excerpt": "", "text": "",
            "thumbnail": b"", "vector": np.append(cosines[at], others[at]).astype(np.float32),
        }
        for at in range(len(cosines))
    )  # fmt: skip
    return index, Compiled.of(np.eye(1, dim, dtype=np.float32)[0])


def test_matches_of_a_kind_that_lies_further_away_are_found_whatever_the_number_asked_for(plume, tmp_path):
    index, asked = mixed_index(plume, tmp_path / "index", 500, 500, 3)
    for top_k in (3, 10, 600):
        hits = index.nearest(asked, top_k=top_k, cut="auto")
        assert [hit.path for hit in hits if hit.kind == "image"] == ["/r/500", "/r/501", "/r/502"]


def test_a_rare_kind_has_a_bound_of_its_own(plume, tmp_path):
    index, asked = mixed_index(plume, tmp_path / "index", 8_000, 40, 1)
    hits = index.nearest(asked, cut="auto", where="kind = 'image'")
    assert [hit.path for hit in hits] == ["/r/8000"]
    assert hits[0].relevance > 8


def test_words_without_a_weight_are_refused(index, plume):
    with pytest.raises(ValueError, match="hybrid=0 leaves words out"):
        index.search("a red kite", plume, text="kite", hybrid=0)


def test_links_and_hits_of_other_indices(index, plume, library, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "else.txt").write_text("a red kite over the hill")
    (tmp_path / "notes" / "link.txt").symlink_to(tmp_path / "else.txt")
    for at in range(3):
        (tmp_path / "notes" / f"{at}.txt").write_text(f"a blue table {at}")
    other = Index.create(tmp_path / "index", plume, num_latent_steps=1)
    other.update(tmp_path / "notes", plume, show_progress=False)
    hits = other.search(Like(tmp_path / "notes" / "link.txt"), top_k=9)
    assert "link.txt" not in {hit.path.rpartition("/")[2] for hit in hits}
    with pytest.raises(ValueError, match="is not in the index"):
        index.search(Like(hits[0]))
    own = index.search("a red kite", plume, top_k=1)[0]
    with pytest.raises(ValueError, match="is not in the index"):
        other.search(Like(own))
