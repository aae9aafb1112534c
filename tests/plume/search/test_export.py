"""Rows of an index as files of other programs: to the bit, whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as parquet
import pytest
from typer.testing import CliRunner

from plume import Index, Plume
from plume.cli.main import app
from plume.search import export as module
from plume.search.export import export


@pytest.fixture(scope="module")
def index(plume_folder, tmp_path_factory) -> Index:
    root, plume = tmp_path_factory.mktemp("notes"), Plume(plume_folder, device="cpu")
    for number, text in enumerate(["a red kite", "a blue table", "what is it", "a bird"]):
        (root / f"{number}.txt").write_text(text)
    index = Index.create(tmp_path_factory.mktemp("made") / "index", plume)
    index.update(root, plume, show_progress=False)
    return index


def by_path(index):
    return {row["path"]: np.array(row["vector"], dtype=np.float32) for row in index.store.rows(["path", "vector"])}


def test_parquet_holds_all_rows_to_the_bit_and_what_made_them(index, tmp_path):
    assert export(index, tmp_path / "new" / "rows.parquet") == 4
    table = parquet.read_table(tmp_path / "new" / "rows.parquet")
    assert "thumbnail" not in table.column_names
    assert {"path", "kind", "page", "start", "end", "text", "sha256", "vector"} <= set(table.column_names)
    for row in table.to_pylist():
        np.testing.assert_array_equal(np.array(row["vector"], dtype=np.float32), by_path(index)[row["path"]])
    made = json.loads(table.schema.metadata[b"plume"])
    assert made["fingerprint"] == index.identity.fingerprint
    assert made["num_latent_steps"] == index.identity.num_latent_steps


def test_numpy_holds_vectors_and_places(index, tmp_path):
    export(index, tmp_path / "rows.npz", where="excerpt LIKE '%kite%'")
    with np.load(tmp_path / "rows.npz") as file:
        (path,) = file["paths"].tolist()
        np.testing.assert_array_equal(file["vectors"][0], by_path(index)[path])
        assert json.loads(str(file["plume"]))["dim"] == index.identity.dim
        assert file["pages"].tolist() == [0]


def test_faiss_finds_what_the_index_finds(index, tmp_path):
    faiss = pytest.importorskip("faiss")
    export(index, tmp_path / "rows.faiss")
    found = faiss.read_index(str(tmp_path / "rows.faiss"))
    made, *rows = map(json.loads, (tmp_path / "rows.faiss.jsonl").read_text().splitlines())
    assert made["plume"]["fingerprint"] == index.identity.fingerprint
    for path, vector in by_path(index).items():
        scores, ids = found.search(vector[None], 1)
        assert rows[ids[0, 0]]["path"] == path
        assert scores[0, 0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.npz"])
def test_an_empty_index_gives_an_empty_file(plume_folder, tmp_path, name):
    empty = Index.create(tmp_path / "index", Plume(plume_folder, device="cpu"))
    assert export(empty, tmp_path / name) == 0
    assert (tmp_path / name).stat().st_size > 0


def test_a_file_stays_as_it_was_where_writing_fails(index, tmp_path, monkeypatch):
    (tmp_path / "rows.npz").write_text("before")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        export(index, tmp_path / "rows.npz")
    assert [one.name for one in tmp_path.iterdir()] == ["rows.npz"]
    assert (tmp_path / "rows.npz").read_text() == "before"


def test_the_command_line_exports_and_refuses(index, tmp_path):
    def run(*words):
        return CliRunner().invoke(app, ["export", *map(str, words)])

    result = run(index.path, tmp_path / "rows.parquet")
    assert result.exit_code == 0, result.output
    assert "4 vectors of" in result.output
    assert "expected a name that ends with .parquet, .npz, .faiss" in run(index.path, tmp_path / "rows.csv").output
    assert "is no index" in run(tmp_path, tmp_path / "rows.npz").output
    assert "is not understood" in run(index.path, tmp_path / "rows.npz", "--where", "colour = 3").output
