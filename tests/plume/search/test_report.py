"""What an index looks like, and scores that are corrected: fitted, used, fitted again, left out."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from plume import Index, Plume
from plume.cli.main import app
from plume.search import ranking
from plume.search.corrections import FILE, Corrections
from plume.search.query import All, Compiled
from plume.search.report import draw_report, report

RNG = np.random.default_rng(0)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


def add(index, kind, vectors, names):
    index.store.add(
        {
            "root": "/r", "name": name, "path": f"/r/{name}", "kind": kind, "page": 0, "num_pages": 1,
            "sha256": f"{kind}{at:060}", "size": 1, "mtime_ns": 1, "excerpt": "", "text": name, "thumbnail": b"",
            "vector": one,
        }
        for at, (one, name) in enumerate(zip(vectors, names, strict=True))
    )  # fmt: skip


@pytest.fixture
def gap(plume, tmp_path):
    """An index of images and texts of the same 150 things, with a gap, and queries that are texts of these things."""
    dim = plume.get_embedding_dimension()
    things, offset = RNG.normal(size=(150, dim)), 8 * unit(RNG.normal(size=dim))
    noisy = lambda sign: unit(things + 0.3 * RNG.normal(size=things.shape) + sign * offset)  # noqa: E731
    index = Index.create(tmp_path / "index", plume)
    add(index, "text", noisy(1), [f"{at}.txt" for at in range(150)])
    add(index, "image", noisy(-1), [f"{at}.png" for at in range(150)])
    return index, np.concatenate([noisy(1), noisy(1)])


def test_the_gap_and_its_pairs_are_seen(gap):
    index, queries = gap
    found = report(index)
    assert found.counts == {"image": 150, "text": 150}
    assert found.num_sampled == 300
    assert found.norms == pytest.approx((1, 1), abs=1e-5)
    (distance, told) = found.gaps["image", "text"]
    assert distance > 0.8
    assert told > 0.95
    (count, there, back) = found.pairs["image", "text"]
    assert count == 150
    assert there < 0.3
    assert back < 0.3
    assert found.corrected == {}
    found = report(index, queries)
    assert found.mixing["text"] > 1.9
    assert found.corrected["none"]["mixing"]["image"] < 0.2
    assert found.corrected["centre"]["mixing"]["image"] > 0.8
    assert any("correct=centre" in line for line in found.lines())


def test_a_centred_search_finds_images_by_texts(gap, plume):
    index, queries = gap
    index.correct(queries)
    plain, corrected = (
        [[hit.path for hit in index.nearest(Compiled.of(query), top_k=3, correct=correct)] for query in queries[:150]]
        for correct in (None, "centre")
    )
    assert np.mean([f"/r/{at}.png" in paths for at, paths in enumerate(plain)]) < 0.1
    assert np.mean([f"/r/{at}.png" in paths for at, paths in enumerate(corrected)]) > 0.95
    hits = index.nearest(Compiled.of(queries[0]), top_k=5, correct="centre")
    assert [hit.corrected for hit in hits] == sorted((hit.corrected for hit in hits), reverse=True)
    by_path = {row["path"]: np.array(row["vector"]) for row in index.store.rows(["path", "vector"])}
    corrections = Corrections.read(index.path, index.identity.dim)
    for hit in hits:
        assert hit.score == pytest.approx(by_path[hit.path] @ queries[0], abs=1e-5)
        left = by_path[hit.path] - corrections.means[hit.kind]
        own = queries[0] - corrections.query_mean
        expected = left @ own / np.linalg.norm(left) / np.linalg.norm(own)
        assert hit.corrected == pytest.approx(expected, abs=1e-4)
        assert hit.to_dict()["corrected"] == hit.corrected


def test_all_rows_and_the_nearest_of_each_kind_have_the_same_order(gap, monkeypatch):
    index, queries = gap
    add(index, "pdf", unit(RNG.normal(size=(5, index.identity.dim))), [f"{at}.pdf" for at in range(5)])  # too few
    index.correct(queries)
    for query in queries[:5]:
        whole = index.nearest(Compiled.of(query), top_k=305, correct="centre")
        assert len(whole) == 305
        monkeypatch.setattr(ranking, "APPROXIMATE_FROM", 10)
        near = index.nearest(Compiled.of(query), top_k=305, correct="centre")
        monkeypatch.undo()
        assert [hit.path for hit in near] == [hit.path for hit in whole]
        np.testing.assert_allclose([hit.corrected for hit in near], [hit.corrected for hit in whole], atol=1e-5)


def test_scores_from_products_are_those_of_the_vectors():
    rows, queries = unit(RNG.normal(size=(60, 24)) + 0.4), unit(RNG.normal(size=(9, 24)) + 0.2)
    kinds = np.array(["text", "image", "pdf"])[np.arange(60) % 3]
    means = {kind: rows[kinds == kind].mean(axis=0) for kind in ("text", "image")}  # none of pages
    corrections = Corrections(queries.mean(axis=0), means, queries, 60)
    for query in queries:
        products = corrections.compared(query) @ rows.T
        expected = corrections.scores("centre", query[None], rows, kinds.tolist())[0]
        np.testing.assert_allclose(corrections.centred_by(products, kinds, query), expected, atol=1e-5)


def test_corrections_change_no_vector_and_can_be_left_out(gap):
    index, queries = gap
    before = sorted((row["path"], tuple(row["vector"])) for row in index.store.rows(["path", "vector"]))
    plain = [(hit.path, hit.score) for hit in index.nearest(Compiled.of(queries[3]), top_k=20)]
    index.correct(queries[:120])
    assert [(hit.path, hit.score) for hit in index.nearest(Compiled.of(queries[3]), top_k=20)] == plain
    first = index.nearest(Compiled.of(queries[3]), top_k=20, correct="hubs")
    index.correct(queries)
    assert [hit.corrected for hit in index.nearest(Compiled.of(queries[3]), top_k=20, correct="hubs")] != [
        hit.corrected for hit in first
    ]
    assert sorted((row["path"], tuple(row["vector"])) for row in index.store.rows(["path", "vector"])) == before
    (index.path / FILE).unlink()
    with pytest.raises(ValueError, match="has no corrections"):
        index.nearest(Compiled.of(queries[3]), correct="hubs")


def test_hubs_are_named_and_lose_their_place(plume, tmp_path):
    dim = plume.get_embedding_dimension()
    middle = unit(RNG.normal(size=dim))
    things = unit(RNG.normal(size=(300, dim)) + 4 * middle)
    index = Index.create(tmp_path / "index", plume)
    add(index, "text", np.concatenate([things, middle[None]]), [*(f"{at}.txt" for at in range(300)), "hub.txt"])
    queries = unit(things + 0.12 * RNG.normal(size=things.shape))
    found = report(index, queries)
    assert found.hubs[0][0] == "/r/hub.txt"
    assert found.corrected["hubs"]["skewness"] < found.corrected["none"]["skewness"] / 2
    index.correct(queries)
    hits = index.nearest(Compiled.of(queries[0]), top_k=5, correct="hubs")
    assert "/r/hub.txt" not in [hit.path for hit in hits]


def test_corrections_hold_with_words_and_conditions(gap):
    index, queries = gap
    index.correct(queries)
    index.store.compact(wipe=False)
    hits = index.nearest(Compiled.of(queries[0]), top_k=9, correct="centre", where="kind = 'image' OR kind = 'pdf'")
    assert {hit.kind for hit in hits} == {"image"}
    found = index.nearest(Compiled.of(queries[0]), top_k=9, correct="centre", text="77", hybrid=0.9)
    assert {hit.path for hit in found[:2]} == {"/r/77.txt", "/r/77.png"}
    assert all(hit.corrected is not None for hit in found)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"correct": "both"}, "correct is 'both'"), ({"correct": "centre", "cut": "auto"}, "tells by cosines")],
)
def test_what_does_not_go_together_is_refused(gap, settings, expected):
    index, queries = gap
    index.correct(queries)
    with pytest.raises(ValueError, match=expected):
        index.nearest(Compiled.of(queries[0]), **settings)


def test_corrections_are_for_one_vector_and_need_enough_queries(gap, plume):
    index, queries = gap
    with pytest.raises(ValueError, match="99 queries are too few"):
        index.correct(queries[:99])
    index.correct(queries)
    with pytest.raises(ValueError, match="correct is for one vector"):
        index.search(All("a kite", "blue"), plume, correct="centre")
    whole = (index.path / FILE).read_bytes()
    for damaged in (b"nothing", b"", whole[: len(whole) // 2]):
        (index.path / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            index.nearest(Compiled.of(queries[0]), correct="hubs")
    for wrong in (np.ones((100, 5)), np.full((100, index.identity.dim), np.nan)):
        with pytest.raises(ValueError, match="expected finite vectors"):
            index.correct(wrong)


def test_corrections_of_an_index_that_has_grown_are_old(gap):
    index, queries = gap
    index.correct(queries)
    add(index, "text", unit(RNG.normal(size=(70, index.identity.dim))), [f"new {at}.txt" for at in range(70)])
    with pytest.warns(UserWarning, match="fitted when it had 300 of its 370 rows; fit them again"):
        index.nearest(Compiled.of(queries[0]), correct="centre")


def test_a_rare_kind_has_a_mean_of_its_own(plume, tmp_path):
    index = Index.create(tmp_path / "index", plume)
    for kind, count in (("text", 21_000), ("image", 120)):
        add(index, kind, unit(RNG.normal(size=(count, index.identity.dim))), [f"{at}.{kind}" for at in range(count)])
    assert set(index.correct(unit(RNG.normal(size=(100, index.identity.dim)))).means) == {"text", "image"}


def test_too_few_queries_or_rows_to_correct_by_are_no_end_of_a_report(gap, plume, tmp_path):
    index, queries = gap
    found = report(index, queries[:150])
    assert found.corrected == {}
    assert any("200 queries or more" in line for line in found.lines())
    few = Index.create(tmp_path / "few", plume)
    add(few, "text", unit(RNG.normal(size=(90, few.identity.dim))), [f"{at}.txt" for at in range(90)])
    assert report(few, queries).corrected == {}


def test_an_index_without_rows_has_nothing_to_compare(plume, tmp_path):
    with pytest.raises(ValueError, match="has 0 rows"):
        report(Index.create(tmp_path / "index", plume))


def test_the_command_line_reports_fits_and_draws(gap, plume_folder, tmp_path):
    pytest.importorskip("matplotlib")
    index, _ = gap
    (tmp_path / "queries.txt").write_text("\n".join(f"a red kite {at % 7} over the hill {at}" for at in range(210)))

    def run(*words):
        return CliRunner().invoke(app, [*map(str, words), "--model", str(plume_folder)])

    words = ["report", index.path, "--queries", tmp_path / "queries.txt", "--fit", "--out", tmp_path / "r.png"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "300 rows: 150 image, 150 text" in result.output
    assert "means" in result.output
    assert "held-out queries" in result.output
    assert (tmp_path / "r.png").stat().st_size > 10_000
    found = run("search", "a red kite", "--index", index.path, "--correct", "centre", "--json")
    assert '"corrected"' in found.output
    assert "--fit needs --queries" in run("report", index.path, "--fit").output
    assert "cannot be read" in run("report", index.path, "--queries", tmp_path / "none.txt").output


def test_a_small_index_can_be_drawn(plume, tmp_path):
    pytest.importorskip("matplotlib")
    index = Index.create(tmp_path / "index", plume)
    add(index, "text", unit(RNG.normal(size=(3, plume.get_embedding_dimension()))), ["a.txt", "b.txt", "c.txt"])
    draw_report(index, report(index), tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5_000
