"""`plume serve`: every API gives the vectors of `Plume.encode`; what is wrong is said in one shape."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import signal
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient

from plume import Plume
from plume.serving.app import make_app
from plume.serving.errors import RequestError
from plume.serving.media import Ceilings
from plume.serving.requests import read_openai
from plume.serving.service import Held, Service, Settings
from tests.processes import free_port, started

TEXTS = ["a red kite", "blue", "what bird is it", "table"]


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture(scope="module")
def service(plume_folder):
    settings = Settings(
        model=str(plume_folder),
        served_as="tiny",
        device="cpu",
        dimensions=(16,),
        max_body_bytes=2_000_000,
        ceilings=Ceilings(
            inputs=64, media=3, image_pixels=1_000_000, text_characters=10_000, request_characters=150_000, videos=1
        ),
    )
    service = Service(settings)
    service.load()
    yield service
    service.close(30)


@pytest.fixture(scope="module")
def client(service):
    return TestClient(make_app(service), raise_server_exceptions=False)


def png(picture, kind="PNG") -> str:
    written = io.BytesIO()
    picture.save(written, kind)
    return base64.b64encode(written.getvalue()).decode()


def vectors_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([one["embedding"] for one in answer.json()["data"]], dtype=np.float32)


def same(found, expected):
    assert np.abs(np.asarray(found, dtype=np.float32) - np.asarray(expected)).max() < 2e-6


# Vectors.


def test_openai_gives_the_vectors_of_encode_in_every_encoding(client, plume):
    expected = plume.encode(TEXTS)
    answer = client.post("/v1/embeddings", json={"input": TEXTS, "model": "tiny", "user": "somebody"})
    same(vectors_of(answer), expected)
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert [one["index"] for one in body["data"]] == [0, 1, 2, 3]
    processor = plume.plume_model.processor
    count = sum(processor.exact_lengths([processor.parse(text) for text in TEXTS]))
    assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}
    one = client.post("/v1/embeddings", json={"input": TEXTS[0]})
    same(vectors_of(one), expected[:1])
    coded = client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()["data"]
    same([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in coded], expected)
    bits = client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "ubinary"}).json()["data"]
    assert [one["embedding"] for one in bits] == np.packbits(expected >= 0, axis=1).tolist()
    short = client.post("/v1/embeddings", json={"input": TEXTS, "dimensions": 16})
    same(vectors_of(short), plume.encode(TEXTS, truncate_dim=16))
    same(vectors_of(client.post("/v1/embeddings", json={"input": TEXTS, "dimensions": 64})), expected)


def test_own_fields_choose_steps_side_and_instruction(client, plume):
    ask = {"input": TEXTS, "num_latent_steps": 0, "instruction": "Find the bird:", "input_type": "query"}
    expected = plume.encode(TEXTS, num_latent_steps=0, instruction="Find the bird:")
    same(vectors_of(client.post("/v1/embeddings", json=ask)), expected)
    assert np.abs(expected - plume.encode(TEXTS)).max() > 1e-3


def test_media_come_as_messages_items_and_parts(client, plume, picture):
    image = picture(80, 60)
    data = f"data:image/png;base64,{png(image)}"
    asked = {"text": "what is it", "image": image}
    expected = plume.encode([{"role": "user", "content": [{"type": "image", "image": image},
                                                         {"type": "text", "text": "what is it"}]}])  # fmt: skip
    parts = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": "what is it"}]
    user = {"role": "user", "content": parts}
    for body in (
        {"messages": [user]},
        {"messages": [[user]]},
        {"input": [user], "model": "tiny"},
        {"input": [[user]]},
        {"input": [{"image": data, "text": "what is it"}]},
        {"input": [{"image": png(image), "text": "what is it"}]},
        {"input": [{"content": [{"type": "image_url", "image_url": data}, parts[1]]}]},
    ):
        same(vectors_of(client.post("/v1/embeddings", json=body)), expected)
    same(expected, plume.encode([asked]))
    system = {"role": "system", "content": "Find the bird:"}
    found = client.post("/v1/embeddings", json={"messages": [system, user]})
    same(vectors_of(found), plume.encode([asked], instruction="Find the bird:"))
    told = client.post("/v1/embeddings", json={"messages": [user, {"role": "assistant", "content": ""}],
                                               "add_generation_prompt": False})  # fmt: skip
    same(vectors_of(told), expected)
    several = client.post("/v1/embeddings", json={"messages": [[user], [{"role": "user", "content": "blue"}]]})
    same(vectors_of(several), np.stack([expected, plume.encode("blue")]))
    for kind in ("JPEG", "WEBP", "GIF"):
        assert client.post("/v1/embeddings", json={"input": [{"image": png(image, kind)}]}).status_code == 200


def test_a_video_is_decoded_in_a_process_of_its_own(client, service, plume, tmp_path, picture):
    frames = [picture(56, 56, seed) for seed in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    content = base64.b64encode((tmp_path / "clip.gif").read_bytes()).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:image/gif;base64,{content}"}}
    found = client.post("/v1/embeddings", json={"messages": [{"role": "user", "content": [part]}]})
    same(vectors_of(found), plume.encode([tmp_path / "clip.gif"]))
    broken = {**part, "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    refused = client.post("/v1/embeddings", json={"messages": [{"role": "user", "content": [broken]}]})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("a video cannot be decoded")


def test_a_large_photo_is_seen_as_encode_sees_it(client, plume, picture, tmp_path):
    """A JPEG of more than twice the size that the model looks at is decoded at a smaller one."""
    small = plume.plume_model.processor.limits.pixels[1]
    side = int((4.5 * small) ** 0.5)
    if side**2 > 1_000_000:
        side = 990
    picture(33, 33).resize((side, side)).save(tmp_path / "photo.jpg", quality=95)
    content = base64.b64encode((tmp_path / "photo.jpg").read_bytes()).decode()
    found = client.post("/v1/embeddings", json={"input": [{"image": content}]})
    same(vectors_of(found), plume.encode([tmp_path / "photo.jpg"]))


def test_cohere_and_tei(client, plume, picture):
    expected = plume.encode(TEXTS)
    body = {"model": "tiny", "texts": TEXTS, "input_type": "search_query",
            "embedding_types": ["float", "base64", "binary", "ubinary"]}  # fmt: skip
    found = client.post("/v2/embed", json=body).json()
    same(found["embeddings"]["float"], expected)
    same([np.frombuffer(base64.b64decode(one), "<f4") for one in found["embeddings"]["base64"]], expected)
    unsigned = np.array(found["embeddings"]["ubinary"])
    assert (np.array(found["embeddings"]["binary"]) == unsigned - 128).all()
    assert (unsigned == np.packbits(expected >= 0, axis=1)).all()
    assert found["texts"] == TEXTS
    many = client.post("/v2/embed", json={"texts": TEXTS, "embedding_types": ["base64"] * 4_000}).json()
    assert list(many["embeddings"]) == ["base64"]  # each is written once
    image = picture()
    by_image = client.post("/v2/embed", json={"images": [f"data:image/png;base64,{png(image)}"], "input_type": "image"})
    same(by_image.json()["embeddings"]["float"], plume.encode([image]))
    mixed = {"inputs": [{"content": [{"type": "text", "text": "blue"}]}], "input_type": "classification"}
    same(client.post("/v2/embed", json=mixed).json()["embeddings"]["float"], plume.encode(["blue"]))
    same(client.post("/embed", json={"inputs": TEXTS}).json(), expected)
    same(client.post("/embed", json={"inputs": "blue"}).json(), plume.encode(["blue"]))
    same(client.post("/", json={"inputs": "blue"}).json(), plume.encode(["blue"]))


def test_vectors_do_not_depend_on_the_company(client, plume, picture):
    images = [picture(56 + 28 * seed, 56, seed) for seed in range(4)]
    asked = [*TEXTS, *images]
    expected = plume.encode(asked)

    def ask(number):
        one = asked[number % 8]
        item = one if isinstance(one, str) else {"image": png(one)}
        steps = {"num_latent_steps": 0} if number % 3 == 0 else {}
        return vectors_of(client.post("/v1/embeddings", json={"input": [item], **steps}))[0]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(48)))
    without = plume.encode(asked, num_latent_steps=0)
    for number, vector in enumerate(found):
        same(vector, (without if number % 3 == 0 else expected)[number % 8])


@pytest.mark.parametrize("route", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_ranking_is_by_cosine_and_off_by_default(plume_folder, plume, client, route):
    documents = [*TEXTS, {"text": "a blue kite"}, "blue"]
    body = {"query": "what table", "documents": documents, "model": "ranks"}
    assert client.post(route, json=body).status_code == 404
    assert client.get("/info").json()["rerank"] is None
    service = Service(Settings(model=str(plume_folder), served_as="ranks", device="cpu", does_rank=True))
    service.load()
    ranks = TestClient(make_app(service))
    scores = plume.encode_document([*TEXTS, "a blue kite", "blue"]) @ plume.encode_query("what table")
    results = ranks.post(route, json={**body, "return_documents": True}).json()["results"]
    assert [one["index"] for one in results] == np.argsort(-scores, kind="stable").tolist()
    same([one["relevance_score"] for one in results], np.sort(scores)[::-1])
    told = [documents[one["index"]] for one in results]
    assert [one["document"] for one in results] == [{"text": one} if isinstance(one, str) else one for one in told]
    tei = {"query": "what table", "texts": TEXTS, "return_text": True}
    told = ranks.post(route, json=tei).json()
    assert [(one["text"], one["index"]) for one in told] == [(TEXTS[one["index"]], one["index"]) for one in told]
    assert [one["index"] for one in told] == np.argsort(-scores[:4], kind="stable").tolist()
    short = ranks.post(route, json={**body, "top_n": 2}).json()["results"]
    assert [set(one) for one in short] == [{"index", "relevance_score"}] * 2
    for wrong, param in (
        ({**body, "documents": []}, "documents"),
        ({**body, "documents": ["x", 3]}, "documents[1]"),
        ({**body, "query": None}, "query"),
        ({**body, "top_n": 0}, "top_n"),
        ({**tei, "raw_scores": True}, "raw_scores"),
    ):
        answer = ranks.post(route, json=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    service.close(30)


# What is refused.


def bomb() -> str:
    """A PNG of a few bytes that claims 13,000 x 13,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    whole = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    return base64.b64encode(whole).decode()


SVG = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>").decode()
EPS = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n").decode()
USER = {"role": "user", "content": "blue"}


@pytest.mark.parametrize(
    ("body", "status", "param", "told"),
    [
        ({}, 400, "input", "a list that is not empty"),
        ({"input": []}, 400, "input", "a list that is not empty"),
        ({"input": ""}, 400, "input", "an input is empty"),
        ({"input": ["blue", " "]}, 400, "input[1]", "an input is empty"),
        ({"input": [1, 2, 3]}, 400, "input", "check_embedding_ctx_length=False"),
        ({"input": [[1, 2], [3]]}, 400, "input", "check_embedding_ctx_length=False"),
        ({"input": [None]}, 400, "input[0]", "expected a string"),
        ({"input": [{"sound": "x"}]}, 400, "input[0]", 'an object with "text", "image" or "video"'),
        ({"input": ["blue"] * 65}, 413, "input", "a request may hold 64 inputs"),
        ({"input": ["x" * 10_001]}, 413, "input[0]", "an input may hold 10,000 characters"),
        ({"input": ["x"], "instruction": "x" * 10_000}, 413, "input[0]", "an input may hold 10,000 characters"),
        ({"input": ["x" * 9_000] * 20}, 413, "input", "a request may hold 150,000 characters of text"),
        ({"input": ["x"] * 20, "instruction": "x" * 9_000}, 413, "input", "150,000 characters of text"),
        ({"messages": [{"role": "system", "content": "x" * 9_999}, USER]}, 413, "messages", "10,000 characters"),
        ({"input": [""] * 5_000}, 413, "input", "a list may hold 4,096 entries"),
        ({"input": [{"video": "AAAA"}] * 2}, 413, "input", "a request may hold 1 videos"),
        ({"input": "blue", "embed_dtype": "float16"}, 400, "embed_dtype", "vectors are float32 alone"),
        ({"input": "blue", "endianness": "big"}, 400, "endianness", "vectors are little alone"),
        ({"input": "blue", "return_multivector": True}, 400, "return_multivector", "is not available"),
        ({"input": ["a " * 4_800] * 2}, 400, "input[0]", "tokens"),
        ({"input": "blue", "model": "other"}, 404, "model", "this server has 'tiny'"),
        ({"input": "blue", "dimensions": 8}, 400, "dimensions", "have 64, 16 numbers"),
        ({"input": "blue", "dimensions": 128}, 400, "dimensions", "have 64, 16 numbers"),
        ({"input": "blue", "dimensions": "16"}, 400, "dimensions", "a whole number"),
        ({"input": "blue", "num_latent_steps": 99}, 400, "num_latent_steps", "at most 32 latent steps"),
        ({"input": "blue", "num_latent_steps": True}, 400, "num_latent_steps", "a whole number"),
        ({"input": "blue", "encoding_format": "int4"}, 400, "encoding_format", "expected float"),
        ({"input": "blue", "input_type": "song"}, 400, "input_type", 'expected "query" or "document"'),
        ({"input": "blue", "chat_template": "{{x}}"}, 400, "chat_template", "is not available"),
        ({"input": "blue", "truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens", "inputs are not cut"),
        ({"input": "blue", "messages": [USER]}, 400, "messages", "send one of them"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "roles system and user"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "data": "x"}]}]}, 400, "messages", "a part must"),
        ({"input": "\ud800"}, 400, "input", "not valid Unicode"),
        ({"input": [{"image": "/etc/passwd"}]}, 400, "input[0]", "not valid base64"),
        ({"input": [{"image": "/etc/passwd1"}]}, 400, "input[0]", "an image cannot be decoded"),
        ({"input": [{"image": "../secret.png"}]}, 400, "input[0]", "not valid base64"),
        ({"input": [{"image": "file:///etc/passwd"}]}, 400, "input[0]", "this server opens no address"),
        ({"input": [{"image": "http://127.0.0.1/x.png"}]}, 400, "input[0]", "this server opens no address"),
        ({"input": [{"image": "HTTP://[::1]/x.png"}]}, 400, "input[0]", "this server opens no address"),
        ({"input": [{"video": "https://example.com/x.mp4"}]}, 400, "input[0]", "this server opens no address"),
        ({"input": [{"image": "secret.png"}]}, 400, "input[0]", "not valid base64"),
        ({"input": [{"image": "data:image/png,AAAA"}]}, 400, "input[0]", "must be in base64"),
        ({"input": [{"image": SVG}]}, 400, "input[0]", "an image cannot be decoded"),
        ({"input": [{"image": EPS}]}, 400, "input[0]", "an image cannot be decoded"),
        ({"input": [{"image": bomb()}]}, 400, "input[0]", "more than 1,000,000 pixels"),
        ({"input": [{"image": ["a"]}]}, 400, "input[0]", "expected image as a data URI"),
        ({"input": [{"image": SVG}] * 4}, 413, "input", "3 images and videos"),
    ],
)  # fmt: skip
def test_what_cannot_be_embedded_is_said_in_one_shape_and_repeats_nothing(client, body, status, param, told):
    answer = client.post("/v1/embeddings", content=json.dumps(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert told in error["message"]
    assert len(error["message"]) < 200
    for secret in ("passwd", "secret", "example.com", "127.0.0.1", "0x"):
        assert secret not in error["message"]


def test_damaged_media_give_one_sentence(client, picture):
    whole = base64.b64decode(png(picture(200, 200)))
    for content in (whole[: len(whole) // 2], whole[:1_000] + b"\0" * 60 + whole[1_060:]):
        answer = client.post("/v1/embeddings", json={"input": [{"image": base64.b64encode(content).decode()}]})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "an image is damaged, too long, or has pixels that cannot be read"


def test_bodies_that_are_no_json_too_large_or_of_no_route(client):
    for content in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
        answer = client.post("/v1/embeddings", content=content)
        assert answer.status_code == 400
        assert "JSON" in answer.json()["error"]["message"]
    answer = client.post("/v1/embeddings", content=b" " * 2_000_001)
    assert (answer.status_code, answer.json()["error"]["message"]) == (413, "a request may hold 2,000,000 bytes")
    for method, path, status in (("GET", "/v1/embeddings", 405), ("POST", "/nothing", 404)):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/v2/embed", {"texts": ["a"], "images": ["b"]}, "exactly one of texts, images and inputs"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["int8"]}, "and no others"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": [["float"]]}, "and no others"),
        ("/embed", {"inputs": "a", "normalize": False}, "always of unit length"),
        ("/embed", {"inputs": [["a", "b"]]}, "expected a string"),
    ],
)
def test_other_apis_refuse_in_the_same_shape(client, path, body, told):
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


# Load, life and death.


def test_a_full_queue_is_429_with_a_time_to_come_back(client, service, monkeypatch):
    monkeypatch.setattr(service.batcher, "max_queue_tokens", 8)
    may_run, is_running = threading.Event(), threading.Event()
    encode = service.batcher._encode

    def slow(items, how):
        is_running.set()
        may_run.wait(30)
        return encode(items, how)

    monkeypatch.setattr(service.batcher, "_encode", slow)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(client.post, "/v1/embeddings", json={"input": "blue"})
        assert is_running.wait(30)
        second = threads.submit(client.post, "/v1/embeddings", json={"input": "blue"})
        while not service.batcher.queue_inputs:
            time.sleep(0.01)
        third = client.post("/v1/embeddings", json={"input": "blue"})
        assert third.status_code == 429
        assert 1 <= int(third.headers["retry-after"]) <= 60
        assert third.json()["error"]["type"] == "rate_limit_error"
        may_run.set()
        assert first.result(30).status_code == second.result(30).status_code == 200


def test_a_poisoned_input_fails_alone(client, service, monkeypatch, plume):
    encode = service.batcher._encode

    def poisoned(items, how):
        if any("poison" in item.text for item in items):
            raise RuntimeError("inside: poison")
        return encode(items, how)

    monkeypatch.setattr(service.batcher, "_encode", poisoned)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(client.post, "/v1/embeddings", json={"input": [text]})
                 for text in [*TEXTS, "poison", *TEXTS]]  # fmt: skip
        answers = [one.result(60) for one in asked]
    assert [answer.status_code for answer in answers] == [200] * 4 + [500] + [200] * 4
    assert answers[4].json()["error"]["message"] == "an input could not be embedded"
    same(np.concatenate([vectors_of(answer) for answer in answers[:4]]), plume.encode(TEXTS))


@pytest.mark.parametrize("how", ["its client has gone", "it is cancelled"])
def test_a_request_that_nobody_waits_for_leaves_the_queue(service, monkeypatch, how):
    """A server above this one, such as Ray's, cancels a request when its client has gone or its time is over."""
    may_run, is_running = threading.Event(), threading.Event()
    encode = service.batcher._encode

    def slow(items, how):
        is_running.set()
        may_run.wait(30)
        return encode(items, how)

    monkeypatch.setattr(service.batcher, "_encode", slow)

    async def go():
        loop = asyncio.get_running_loop()
        request = read_openai({"input": TEXTS})
        stays = asyncio.ensure_future(service.answer("stays", request, loop.create_future(), Held(service)))
        await loop.run_in_executor(None, is_running.wait, 30)
        gone = loop.create_future()
        leaves = asyncio.ensure_future(service.answer("leaves", request, gone, Held(service)))
        while not service.batcher.queue_inputs:
            await asyncio.sleep(0.01)
        if how == "it is cancelled":
            leaves.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaves
        else:
            gone.set_result(None)
            assert await leaves is None
        assert service.batcher.queue_inputs == 0
        may_run.set()
        return await stays

    assert asyncio.run(go()).vectors.shape == (4, 64)


@pytest.mark.parametrize(
    ("body", "is_inline"),
    [
        ({"input": TEXTS}, True),
        ({"input": ["a"] * 60}, False),
        ({"input": TEXTS, "instruction": "find " * 500}, False),
        ({"input": "word " * 900}, False),
    ],
)
def test_only_a_few_short_texts_are_counted_in_the_event_loop(service, client, monkeypatch, body, is_inline):
    entries, threads = service._entries, []

    def noted(request):
        threads.append(threading.current_thread().name)
        return entries(request)

    monkeypatch.setattr(service, "_entries", noted)
    assert client.post("/v1/embeddings", json=body).status_code == 200
    assert threads[0].startswith("plume-decode") != is_inline


def test_a_server_says_whether_it_is_there(plume_folder, service, client):
    assert client.get("/health").json() == client.get("/ready").json() == {"status": "ready"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/v1/models/other").status_code == 404
    assert client.head("/health").status_code == 200
    info = client.get("/info").json()
    assert (info["embedding_dimension"], info["num_latent_steps"]) == (64, {"query": 4, "document": 4})
    loading = Service(Settings(model=str(plume_folder), device="cpu"))
    early = TestClient(make_app(loading))
    assert early.get("/health").status_code == 200
    assert early.get("/ready").status_code == 503
    refused = early.post("/v1/embeddings", json={"input": "blue"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    loading.leave()
    assert early.get("/ready").status_code == 503
    loading.drain()
    assert "being stopped" in early.post("/v1/embeddings", json={"input": "blue"}).json()["error"]["message"]
    assert early.get("/ready").status_code == 503
    loading.close()
    wrong = Service(Settings(model=str(plume_folder / "nothing"), device="cpu"))
    with pytest.raises(ValueError, match="no folder at"):
        wrong.load()
    assert TestClient(make_app(wrong)).get("/health").status_code == 503
    wrong.close()


def test_a_batch_that_does_not_end_shows(service, client, monkeypatch):
    monkeypatch.setattr(service.batcher, "_began", time.monotonic() - 1_000)
    assert client.get("/health").status_code == 503
    assert client.get("/ready").status_code == 503


def test_the_key_is_asked_for_everywhere_but_where_a_supervisor_looks(plume_folder):
    service = Service(Settings(model=str(plume_folder), device="cpu", api_key="secret"))
    client = TestClient(make_app(service))
    for method, path in (("POST", "/v1/embeddings"), ("POST", "/v2/embed"), ("POST", "/embed"), ("GET", "/metrics"),
                         ("GET", "/info"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/x")):  # fmt: skip
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401
            assert "secret" not in answer.text
        assert client.request(method, path, headers={"Authorization": "Bearer secret"}).status_code != 401
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 503
    assert "secret" not in repr(service.settings)
    service.close()


def test_metrics_tell_of_stages_and_sizes_and_of_no_request(client):
    client.post("/v1/embeddings", json={"input": ["a red kite"] * 3, "num_latent_steps": 2})
    text = client.get("/metrics").text
    for name in ("plume_queue_tokens", "plume_queue_inputs", "plume_batch_inputs_bucket", "plume_batch_tokens_sum",
                 'plume_stage_seconds_count{stage="queue"}', 'plume_stage_seconds_count{stage="decode"}',
                 'plume_stage_seconds_count{stage="encode"}', "plume_latent_steps_total", "plume_resident_bytes",
                 'plume_requests_total{route="/v1/embeddings",status="200"}', "plume_padding_ratio"):  # fmt: skip
        assert name in text
    assert "plume_graph_captures 0.0" in text
    assert "plume_vector_cache_hits" not in text
    assert "kite" not in text


def test_inputs_that_come_again_are_remembered_where_there_is_memory_for_it(plume_folder, plume):
    service = Service(Settings(model=str(plume_folder), device="cpu", vector_cache_bytes=100_000))
    service.load()
    client = TestClient(make_app(service))

    def hits() -> float:
        return float(client.get("/metrics").text.partition("\nplume_vector_cache_hits ")[2].splitlines()[0])

    before = hits()
    for side in ("query", "document", "query", "query"):
        answer = client.post("/v1/embeddings", json={"input": ["a table"], "num_latent_steps": 3, "input_type": side})
        same(vectors_of(answer), plume.encode(["a table"], num_latent_steps=3))
    assert hits() == before + 3
    service.close(30)


async def asked_by_hand(service, receive) -> int:
    """The status of a request whose messages come from `receive`."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "query_string": b"",
             "client": ("127.0.0.1", 1), "http_version": "1.1", "scheme": "http", "server": ("a", 1),
             "root_path": "", "asgi": {"version": "3.0"}}  # fmt: skip
    await make_app(service)(scope, receive, send)
    return sent[0]["status"]


def test_a_slow_body_is_not_waited_for(service):
    object.__setattr__(service.settings, "body_seconds", 0.05)
    try:
        assert asyncio.run(asked_by_hand(service, lambda: asyncio.sleep(30))) == 408
    finally:
        object.__setattr__(service.settings, "body_seconds", 30.0)


def test_bytes_that_are_being_read_are_counted_while_they_come(client, service, monkeypatch):
    object.__setattr__(service.settings, "max_pending_bytes", 1_000)
    seen, body = [], b'{"input": "blue"}'

    async def slow():
        async def receive():
            seen.append(service.pending_bytes)
            if len(seen) == 1:
                return {"type": "http.request", "body": b" " * 900, "more_body": True}
            if len(seen) == 2:  # another request meanwhile
                other = await asyncio.get_running_loop().run_in_executor(
                    None, lambda: client.post("/v1/embeddings", content=body.ljust(200))
                )
                seen.append(other.status_code)
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.sleep(30)

        return await asked_by_hand(service, receive)

    try:
        assert asyncio.run(slow()) == 200
        assert seen[:3] == [0, 900, 429]
        assert service.pending_bytes == service.in_flight == 0
    finally:
        object.__setattr__(service.settings, "max_pending_bytes", 400_000_000)


def test_a_client_that_breaks_off_is_no_error(service, caplog):
    async def broken():
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive():
            return next(messages)

        return await asked_by_hand(service, receive)

    assert asyncio.run(broken()) == 499
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_a_request_that_was_taken_is_answered_while_the_server_drains(plume_folder, plume, monkeypatch):
    service = Service(Settings(model=str(plume_folder), device="cpu"))
    service.load()
    client = TestClient(make_app(service))
    may_go, is_decoding = threading.Event(), threading.Event()
    entries = service._entries

    def slow(*args):
        is_decoding.set()
        may_go.wait(30)
        return entries(*args)

    monkeypatch.setattr(service, "_entries", slow)
    with ThreadPoolExecutor(1) as threads:
        taken = threads.submit(client.post, "/v1/embeddings", json={"input": TEXTS})
        assert is_decoding.wait(30)
        service.leave()
        assert client.get("/ready").status_code == 503
        service.drain()
        assert not service.is_idle
        assert client.post("/v1/embeddings", json={"input": "blue"}).status_code == 503
        may_go.set()
        same(vectors_of(taken.result(30)), plume.encode(TEXTS))
    assert service.is_idle
    service.close(30)


def test_videos_do_not_stop_texts(client, service, monkeypatch):
    may_go, is_decoding = threading.Event(), threading.Event()

    def slow(*args):
        is_decoding.set()
        may_go.wait(30)
        raise RequestError(400, "a video cannot be decoded")

    monkeypatch.setattr(service.videos, "decode", slow)
    with ThreadPoolExecutor(8) as threads:
        videos = [threads.submit(client.post, "/v1/embeddings", json={"input": [{"video": "AAAA"}]}) for _ in range(6)]
        assert is_decoding.wait(30)
        assert client.post("/v1/embeddings", json={"input": "blue"}).status_code == 200
        may_go.set()
        assert {one.result(60).status_code for one in videos} == {400}


def test_queries_and_documents_that_differ_must_be_told_apart(plume_folder, tmp_path):
    from plume import PlumeModel

    model, _ = PlumeModel.from_pretrained(plume_folder).reconfigured(document_latent_steps=1)
    model.save_pretrained(tmp_path / "uneven")
    plume = Plume(tmp_path / "uneven", device="cpu")
    for default, bare in ((None, 400), ("document", 200)):
        service = Service(Settings(model=str(tmp_path / "uneven"), device="cpu", input_type=default))
        service.load()
        client = TestClient(make_app(service))
        answer = client.post("/v1/embeddings", json={"input": TEXTS})
        assert answer.status_code == bare
        if default:
            same(vectors_of(answer), plume.encode_document(TEXTS))
        for side, encode in (("query", plume.encode_query), ("document", plume.encode_document)):
            same(vectors_of(client.post("/v1/embeddings", json={"input": TEXTS, "input_type": side})), encode(TEXTS))
        service.close(30)


@pytest.mark.launching
def test_a_client_of_openai_s_is_answered_to_the_end(plume_folder, plume):
    """The command itself: a client works unchanged, a request under way is answered after SIGTERM, then it is gone."""
    port = free_port()
    command = [sys.executable, "-m", "plume", "serve", "--model", plume_folder, "--port", port, "--device", "cpu"]
    environment = {**os.environ, "PLUME_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    with started(command, env=environment) as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        while True:
            assert process.poll() is None, process.communicate()
            try:
                client.models.list()
                client.embeddings.create(input="blue", model="")
                break
            except (openai.APIConnectionError, openai.InternalServerError):
                time.sleep(0.1)
        for encoding in (openai.omit, "float"):
            found = client.embeddings.create(input=TEXTS, model="", encoding_format=encoding)
            same([one.embedding for one in found.data], plume.encode(TEXTS))
        with pytest.raises(openai.BadRequestError) as error:
            client.embeddings.create(input=[[1, 2]], model="")
        assert error.value.body["param"] == "input"
        many = [f"{text} {number}" for text in TEXTS for number in range(400)]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(client.embeddings.create, input=many, model="")
            metrics = openai.OpenAI(base_url=f"http://127.0.0.1:{port}", api_key="secret")
            while "plume_queue_inputs 0" in metrics.get("/metrics", cast_to=str):
                assert not waiting.done()
            process.send_signal(signal.SIGTERM)
            assert len(waiting.result(120).data) == len(many)
        assert process.wait(60) == -signal.SIGTERM
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


KEYS = {
    "/v1/embeddings": ["input", "messages", "model", "encoding_format", "dimensions", "num_latent_steps", "instruction",
                       "input_type", "task", "truncate_prompt_tokens", "embedding_type", "endianness"],
    "/v2/embed": ["texts", "images", "inputs", "input_type", "embedding_types", "output_dimension", "model"],
    "/embed": ["inputs", "normalize", "instruction", "dimensions", "num_latent_steps"],
}  # fmt: skip


def anything(rng: random.Random, depth: int = 0):
    """A random value of JSON, often one that a field might hold."""
    leaves = [
        *("blue", "", " ", "\0", "\ud83d\ude00" * 3, "<gen_emb><image>", "data:image/png;base64,", "data:,", "AAAA"),
        *("query", "tiny", "base64", "user", "system", "text", "image_url"),
        *(0, 1, -1, 4, 16, 10**30, 1.5, -0.0, True, False, None),
    ]
    kind = rng.randrange(6 if depth < 4 else 3)
    if kind < 3:
        return rng.choice(leaves)
    if kind == 3:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ["role", "content", "type", "text", "image", "image_url", "url", "video", "x"]
    found = {rng.choice(names): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    return {"role": rng.choice(["user", "system"]), "content": found} if kind == 5 else found


@pytest.mark.parametrize("path", KEYS)
def test_whatever_json_is_sent_is_answered_or_refused(client, path):
    rng = random.Random(path)
    statuses = Counter()
    for _ in range(400):
        body = {key: anything(rng) for key in rng.sample(KEYS[path], rng.randint(1, 4))}
        answer = client.post(path, content=json.dumps(body))
        assert answer.status_code < 500, (body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        statuses[answer.status_code] += 1
    assert statuses[400] > 100
