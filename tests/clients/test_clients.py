"""One test per library that embeds with a saved folder; `make test-clients` runs them with those libraries."""

from __future__ import annotations

import numpy as np
import pytest

from plume import Plume

pytestmark = pytest.mark.clients

TEXTS = ["a red kite", "rain over the sea", "the price of tea"]
LONG = "kite " * 9000


@pytest.fixture(scope="module")
def folder(plume_folder):
    return str(plume_folder)


@pytest.fixture(scope="module")
def expected(folder):
    """What `Plume` gives for the texts."""
    return Plume(folder, device="cpu").encode(TEXTS)


def agree(found, expected):
    return np.allclose(np.asarray(found, dtype=np.float32), expected, atol=1e-5)


def test_langchain(folder, expected):
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(model_name=folder, model_kwargs={"device": "cpu"})
    assert agree(embeddings.embed_documents(TEXTS), expected)
    assert agree(embeddings.embed_query(TEXTS[0]), expected[0])
    lenient = {"device": "cpu", "processor_kwargs": {"truncate": True}}
    embeddings = HuggingFaceEmbeddings(model_name=folder, model_kwargs=lenient)
    with pytest.warns(UserWarning, match="3 inputs hold 1 longer than .* and 1 without content"):
        assert len(embeddings.embed_documents(["a", "", LONG])) == 3


def test_llama_index(folder, expected):
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    embedding = HuggingFaceEmbedding(model_name=folder, device="cpu")
    assert agree(embedding.get_text_embedding_batch(TEXTS), expected)


def test_haystack(folder, expected):
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.embedders.sentence_transformers import SentenceTransformersDocumentEmbedder

    embedder = SentenceTransformersDocumentEmbedder(
        model=folder, device=ComponentDevice.from_str("cpu"), progress_bar=False
    )
    embedder.warm_up()
    found = embedder.run([Document(content=text) for text in TEXTS])["documents"]
    assert agree([document.embedding for document in found], expected)


def test_chroma(folder, expected):
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    assert agree(SentenceTransformerEmbeddingFunction(model_name=folder, device="cpu")(TEXTS), expected)


def test_qdrant(folder, expected):
    from qdrant_client import QdrantClient
    from qdrant_client.models import Distance, PointStruct, VectorParams

    client = QdrantClient(":memory:")
    client.create_collection("kites", vectors_config=VectorParams(size=expected.shape[1], distance=Distance.COSINE))
    client.upsert("kites", [PointStruct(id=place, vector=vector.tolist()) for place, vector in enumerate(expected)])
    query = Plume(folder, device="cpu").encode(TEXTS[1])
    assert client.query_points("kites", query=query.tolist(), limit=1).points[0].id == 1


def test_lancedb(folder, expected):
    from lancedb.embeddings import get_registry

    function = get_registry().get("sentence-transformers").create(name=folder, device="cpu")
    assert agree(function.generate_embeddings(TEXTS), expected)
    assert function.ndims() == expected.shape[1]


def test_faiss(expected):
    from sentence_transformers.util.quantization import semantic_search_faiss

    hits, *_ = semantic_search_faiss(expected, corpus_embeddings=expected, top_k=1)
    assert [row[0]["corpus_id"] for row in hits] == [0, 1, 2]


def test_setfit(folder):
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    data = Dataset.from_dict({"text": [f"kite {n}" for n in range(4)] + [f"tea {n}" for n in range(4)]})
    data = data.add_column("label", [0] * 4 + [1] * 4)
    model = SetFitModel.from_pretrained(folder, device="cpu")
    args = TrainingArguments(batch_size=4, num_epochs=1, max_steps=2, report_to="none", save_strategy="no")
    Trainer(model=model, args=args, train_dataset=data).train()
    assert len(model.predict(["kite 9", "tea 9"])) == 2


@pytest.mark.parametrize("library", ["bertopic", "keybert"])
def test_topics_and_keywords_are_found_with_the_object_that_was_given(folder, expected, library):
    import importlib

    backend = importlib.import_module(
        {"bertopic": "bertopic.backend._utils", "keybert": "keybert.backend._utils"}[library]
    )
    model = Plume(folder, device="cpu")
    chosen = backend.select_backend(model)
    assert chosen.embedding_model is model
    assert agree(chosen.embed(TEXTS), expected)


def test_pandas_and_parquet(folder, expected, tmp_path):
    import pandas as pd

    pd.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "texts.parquet")
    assert agree(Plume(folder, device="cpu").encode(pd.read_parquet(tmp_path / "texts.parquet")["text"]), expected)


def test_mteb_keeps_the_results_of_each_k_apart(folder, tmp_path):
    import mteb
    from mteb.cache import ResultCache
    from mteb.mocks.mock_tasks import MockRetrievalTask

    cache = ResultCache(tmp_path)
    for steps in (0, 4):
        model = Plume(folder, device="cpu", num_latent_steps=steps, truncate=True)
        mteb.evaluate(model, MockRetrievalTask(), cache=cache)
    revisions = {path.parent.name for path in tmp_path.rglob("MockRetrievalTask.json")}
    assert len(revisions) == 2
    assert {name[-2:] for name in revisions} == {"K0", "K4"}


@pytest.mark.filterwarnings("ignore:plume. transformers' own layers run")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(folder, expected, bits):
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    found = Plume(folder, device="cpu", model_kwargs={"quantization_config": quantised}).encode(TEXTS)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert 0 < np.abs(found - expected).max() < {4: 0.5, 8: 0.1}[bits]
