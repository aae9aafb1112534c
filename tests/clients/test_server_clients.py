"""Clients of OpenAI's API that are pointed at `plume serve`, each as its documentation writes it."""

from __future__ import annotations

import base64
import io
import json
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from plume import Plume
from tests.processes import free_port, started

pytestmark = pytest.mark.clients

TEXTS = ["a red kite", "rain over the sea", "the price of tea"]


@pytest.fixture(scope="module")
def expected(plume_folder):
    return Plume(plume_folder, device="cpu").encode(TEXTS)


@pytest.fixture(scope="module")
def address(plume_folder):
    port = free_port()
    command = [sys.executable, "-m", "plume", "serve", "--model", plume_folder, "--served-as", "kite", "--port", port]
    with started(command) as process:
        while True:
            assert process.poll() is None, process.communicate()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"


def agree(found, expected):
    return np.allclose(np.asarray(found, dtype=np.float32), expected, atol=2e-6)


def test_openai(address, expected):
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    for encoding in (openai.omit, "float"):
        answer = client.embeddings.create(model="kite", input=TEXTS, encoding_format=encoding)
        assert agree([one.embedding for one in answer.data], expected)
    assert client.models.retrieve("kite").id == "kite"
    steps = client.embeddings.create(model="kite", input=TEXTS, extra_body={"num_latent_steps": 0})
    assert not agree([one.embedding for one in steps.data], expected)


def test_openai_with_messages_as_vllm_documents_them(address, plume_folder, picture):
    import openai

    written = io.BytesIO()
    image = picture(60, 60)
    image.save(written, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it"}]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.post(
        "/embeddings",
        body={"messages": [{"role": "user", "content": content}], "model": "kite", "encoding_format": "float"},
        cast_to=openai.types.CreateEmbeddingResponse,
    )
    plume = Plume(plume_folder, device="cpu")
    assert agree(answer.data[0].embedding, plume.encode({"image": image, "text": "what is it"}))


def test_langchain_openai(address, expected):
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model="kite", base_url=f"{address}/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert agree(embeddings.embed_documents(TEXTS), expected)
    assert agree(embeddings.embed_query(TEXTS[0]), expected[0])


def test_what_langchain_openai_sends_by_default_is_refused_with_a_remedy(address):
    """Token ids of another vocabulary, which would give other vectors without a word."""
    body = json.dumps({"input": [[64, 2579, 91001]], "model": "kite"}).encode()
    request = urllib.request.Request(f"{address}/v1/embeddings", body)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert "check_embedding_ctx_length=False" in json.loads(error.value.read())["error"]["message"]


@pytest.mark.parametrize("name", ["openai/kite", "hosted_vllm/kite"])
def test_litellm(address, expected, name):
    import litellm

    answer = litellm.embedding(model=name, input=TEXTS, api_base=f"{address}/v1", api_key="none")
    assert agree([one["embedding"] for one in answer.data], expected)


def test_haystack(address, expected):
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    given = {"api_base_url": f"{address}/v1", "api_key": Secret.from_token("none"), "model": "kite"}
    assert agree(OpenAITextEmbedder(**given).run(TEXTS[0])["embedding"], expected[0])
    documents = [Document(content=text) for text in TEXTS]
    found = OpenAIDocumentEmbedder(progress_bar=False, **given).run(documents)["documents"]
    assert agree([document.embedding for document in found], expected)


def test_llama_index(address, expected):
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(model_name="kite", api_base=f"{address}/v1", api_key="none")
    assert agree(embedding.get_text_embedding_batch(TEXTS), expected)
    assert agree(embedding.get_query_embedding(TEXTS[0]), expected[0])


def test_huggingface_hub_s_client_of_tei(address, expected):
    from huggingface_hub import InferenceClient

    assert agree(InferenceClient(base_url=address).feature_extraction(TEXTS[0]), expected[:1])
