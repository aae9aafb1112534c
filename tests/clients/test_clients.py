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


MOCKS = [
    "MockRetrievalTask",
    "MockInstructionRetrieval",
    "MockClassificationTask",
    "MockSTSTask",
    "MockAny2AnyRetrievalI2TTask",
    "MockAny2AnyRetrievalT2ITask",
    "MockImageClassificationTask",
    "MockZeroShotClassificationTask",
    "MockVideoRetrievalT2V",
    "MockVideoZeroshotClassificationTask",
]


@pytest.mark.filterwarnings("ignore")  # of scikit-learn, on so few rows; of texts that are empty
@pytest.mark.parametrize("name", MOCKS)
def test_mteb_runs_its_tasks_of_text_images_and_video(folder, tmp_path, name):
    import mteb
    from mteb.cache import ResultCache
    from mteb.mocks import mock_tasks

    from plume_eval.mteb_model import PlumeMTEB

    if "Video" in name:
        pytest.importorskip("torchcodec", exc_type=(ImportError, RuntimeError))
    model, task, cache = (
        PlumeMTEB(folder, device="cpu", num_latent_steps=2),
        getattr(mock_tasks, name)(),
        ResultCache(tmp_path),
    )
    settings = {"cache": cache, "encode_kwargs": {"batch_size": 4}, "show_progress_bar": False}
    first = mteb.evaluate(model, task, **settings).task_results[0]
    assert np.isfinite(first.get_score())
    (file,) = tmp_path.rglob(f"{task.metadata.name}.json")
    assert file.parent.name == "num_latent_steps_2"
    model.encode = None  # the cache is asked, not the model
    again = mteb.evaluate(model, task, **settings).task_results[0]
    assert again.get_score() == pytest.approx(first.get_score())  # rounded on disk


@pytest.mark.filterwarnings("ignore")
def test_mteb_is_run_by_the_command(folder, tmp_path, monkeypatch):
    import mteb
    from mteb.mocks import mock_tasks
    from typer.testing import CliRunner

    from plume_eval.__main__ import app

    monkeypatch.setattr(mteb, "get_task", lambda name: getattr(mock_tasks, name)())
    command = ["mteb", "--model", folder, "--out", str(tmp_path), "--num-latent-steps", "1", "--task"]
    shown = CliRunner().invoke(app, [*command, "MockRetrievalTask"])
    assert shown.exit_code == 0, shown.output
    assert "MockRetrievalTask: 0." in shown.output or "MockRetrievalTask: 1." in shown.output
    assert len(list(tmp_path.rglob("MockRetrievalTask.json"))) == 1


def test_mteb_gives_instructions_and_steps_to_the_right_side(folder):
    from datasets import Dataset
    from mteb.mocks.mock_tasks import MockRetrievalTask, MockZeroShotClassificationTask
    from mteb.types import PromptType
    from torch.utils.data import DataLoader

    from plume_eval.mteb_model import PlumeMTEB

    model = PlumeMTEB(folder, device="cpu", num_latent_steps=3, document_latent_steps=0)
    seen = []
    model.model.encode = lambda rows, **said: (
        seen.append((rows, said["task"], said["instruction"])) or np.ones((len(rows), 4))
    )

    def asked(task, prompt_type, **columns):
        loader = DataLoader(Dataset.from_dict(columns), batch_size=2)
        side = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default", "prompt_type": prompt_type}
        model.encode(loader, **side)
        return seen.pop()

    rows, side, instruction = asked(MockRetrievalTask(), PromptType.query, id=["1"], text=["a kite"], query=["a kite"])
    assert (rows, side, instruction) == ([{"text": "a kite"}], "query", "Retrieve text based on user query.")
    assert asked(MockRetrievalTask(), PromptType.document, text=["a kite"])[1:] == ("document", None)
    assert asked(MockZeroShotClassificationTask(), None, text=["a photo of a kite"])[1:] == ("document", None)
    assert model.mteb_model_meta.experiment_kwargs == {"num_latent_steps": 3, "document_latent_steps": 0}


@pytest.mark.filterwarnings("ignore:plume. transformers' own layers run")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(folder, expected, bits):
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    found = Plume(folder, device="cpu", model_kwargs={"quantization_config": quantised}).encode(TEXTS)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert 0 < np.abs(found - expected).max() < {4: 0.5, 8: 0.1}[bits]
