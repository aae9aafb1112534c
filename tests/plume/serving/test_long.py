"""What a server promises, at length: company, clients that go or do not read, a crash, ten thousand requests."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from PIL import Image

from plume import Plume
from tests.processes import free_port, started

pytestmark = [pytest.mark.slow, pytest.mark.launching]

WORDS = ("a", "red", "kite", "blue", "table", "what", "bird", "is", "it", "ü", "1234")


@contextmanager
def served(folder, port: int, *options: object) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "plume", "serve", "--model", folder, "--port", port, "--device", "cpu", *options]
    settings = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **settings) as process:
        while True:
            assert process.poll() is None
            try:
                if asked(port, "/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        yield process


def asked(port: int, path: str, body: dict | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def embedded(port: int, inputs: list) -> np.ndarray:
    """Vectors of some inputs; tries again where it is told to."""
    while True:
        status, content = asked(port, "/v1/embeddings", {"input": inputs, "encoding_format": "base64"})
        if status == 200:
            rows = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in json.loads(content)["data"]]
            return np.stack(rows)
        assert status == 429, content
        time.sleep(0.05)


def metric(port: int, name: str) -> float:
    lines = asked(port, "/metrics")[1].decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(count)]


def picture(colour: str) -> tuple[Image.Image, dict]:
    image, written = Image.new("RGB", (56, 84), colour), io.BytesIO()
    image.save(written, "PNG")
    return image, {"image": base64.b64encode(written.getvalue()).decode()}


def test_a_thousand_inputs_have_the_same_vectors_in_any_company(plume_folder):
    pictures = [picture(colour) for colour in ("red", "green", "blue", "white")]
    words = texts(996)
    raw, sent = [*words, *(one for one, _ in pictures)], [*words, *(one for _, one in pictures)]
    expected = Plume(plume_folder, device="cpu").encode(raw)
    port = free_port()
    with served(plume_folder, port), ThreadPoolExecutor(16) as threads:
        for seed in range(3):
            rng = random.Random(seed)
            order = rng.sample(range(1000), 1000)
            parts = []
            while order:
                size = rng.randint(1, 20)
                parts.append(order[:size])
                order = order[size:]
            found = threads.map(lambda part: embedded(port, [sent[index] for index in part]), parts)
            for part, vectors in zip(parts, found, strict=True):
                np.testing.assert_allclose(vectors, expected[part], atol=1e-5)


def test_inputs_of_a_hundred_clients_that_go_are_not_embedded(plume_folder):
    port, body = free_port(), json.dumps({"input": texts(200)}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with served(plume_folder, port, "--max-queue-tokens", 10_000_000):
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head + body)
                time.sleep(0.05)
        while metric(port, "plume_queue_inputs") or metric(port, "plume_pending_bytes"):
            time.sleep(0.1)
        num_embedded, num_cancelled = metric(port, "plume_inputs_total"), metric(port, "plume_cancelled_inputs_total")
        assert num_cancelled > 0
        assert num_embedded + num_cancelled <= 20_000  # those that went before they waited are in neither
        assert num_embedded < 10_000
        assert embedded(port, ["blue"]).shape[0] == 1


def test_clients_that_never_read_do_not_disturb_others(plume_folder):
    port, body = free_port(), json.dumps({"input": texts(2_000)}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with served(plume_folder, port, "--max-queue-tokens", 10_000_000) as process:
        embedded(port, texts(200))
        memory = psutil.Process(process.pid).memory_info().rss
        silent = []
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            connection.sendall(head + body)
            silent.append(connection)
        for _ in range(50):
            assert embedded(port, ["blue"]).shape[0] == 1
        while metric(port, "plume_queue_inputs"):
            time.sleep(0.1)
        assert metric(port, "plume_inputs_total") >= 20 * 2_000  # they were answered, as far as they let themselves be
        assert psutil.Process(process.pid).memory_info().rss - memory < 200_000_000
        for connection in silent:
            connection.close()


def test_a_killed_server_gives_no_half_answer_and_starts_again(plume_folder):
    port = free_port()
    with (
        served(plume_folder, port, "--max-queue-tokens", 10_000_000) as process,
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(asked, port, "/v1/embeddings", {"input": texts(2_000)})
        while not metric(port, "plume_queue_inputs"):
            assert not waiting.done()
        process.send_signal(signal.SIGKILL)
        with pytest.raises((OSError, http.client.HTTPException)):
            waiting.result(60)
    with served(plume_folder, port):
        assert embedded(port, ["blue"]).shape[0] == 1


def test_ten_thousand_requests_leave_nothing_behind(plume_folder):
    port, rng = free_port(), random.Random(0)
    images = [picture(colour)[1] for colour in ("red", "green", "blue")]
    some = texts(500)

    def ask(_: object) -> None:
        kind = rng.randrange(10)
        if kind == 0:
            assert asked(port, "/v1/embeddings", {"input": [{"image": "AAAA"}]})[0] == 400
        elif kind == 1:
            embedded(port, [rng.choice(images)])
        else:
            embedded(port, rng.sample(some, rng.randint(1, 4)))

    with served(plume_folder, port) as process, ThreadPoolExecutor(8) as threads:
        own = psutil.Process(process.pid)
        list(threads.map(ask, range(1_000)))
        memory, num_files = own.memory_info().rss, own.num_fds()
        list(threads.map(ask, range(9_000)))
        assert own.memory_info().rss < 1.03 * memory
        assert own.num_fds() <= num_files + 8  # connections that are being closed
