"""LanceDB's registry: a table of one's own has the vectors of `Plume`, also after it is opened again."""

from __future__ import annotations

import io

import lancedb
import numpy as np
import pytest
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector
from PIL import Image

from plume import Plume
from plume.search.lancedb_function import PlumeEmbeddings


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu", truncate_dim=16)


def table_of(path, function, kind):
    class Row(LanceModel):
        content: kind = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    return lancedb.connect(path).create_table("rows", schema=Row)


def test_texts_and_queries(plume, plume_folder, tmp_path):
    function = get_registry().get("plume").create(model=str(plume_folder), device="cpu", truncate_dim=16)
    assert isinstance(function, PlumeEmbeddings)
    texts = ["a red kite", "blue", "a table"]
    table_of(tmp_path, function, str).add([{"content": text} for text in texts])
    again = lancedb.connect(tmp_path).open_table("rows")
    rows = again.search("red kite").distance_type("cosine").limit(3).to_list()
    scores = plume.encode_document(texts) @ plume.encode_query("red kite")
    assert [row["content"] for row in rows] == [texts[index] for index in np.argsort(-scores)]
    assert np.allclose([1 - row["_distance"] for row in rows], np.sort(scores)[::-1], atol=1e-5)
    assert np.allclose(rows[0]["vector"], plume.encode_document(rows[0]["content"]), atol=2e-6)


def test_images_by_content_and_by_path(plume, plume_folder, tmp_path):
    pictures = {colour: Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")}
    settings = {"model": str(plume_folder), "device": "cpu", "truncate_dim": 16, "num_latent_steps": 2}
    expected = plume.encode_document(list(pictures.values()), num_latent_steps=2)
    contents, paths = [], []
    for colour, picture in pictures.items():
        written = io.BytesIO()
        picture.save(written, "PNG")
        contents.append(written.getvalue())
        picture.save(tmp_path / f"{colour}.png")
        paths.append(str(tmp_path / f"{colour}.png"))
    for name, column, kind, values in (("bytes", "text", bytes, contents), ("paths", "image", str, paths)):
        table = table_of(tmp_path / name, get_registry().get("plume").create(column=column, **settings), kind)
        table.add([{"content": value} for value in values])
        assert np.allclose(np.stack(table.to_arrow()["vector"].to_pylist()), expected, atol=2e-6)
        (nearest,) = table.search(pictures["blue"]).limit(1).to_list()
        assert nearest["content"] == values[1]
