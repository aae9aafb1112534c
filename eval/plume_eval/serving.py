"""What `plume serve` costs beside `Plume.encode`, and how it bears load: a server as a process, clients as threads.

Requests hold texts. Capacity is what many clients get that each wait for their answer; load then arrives at random
times, whether or not the answers keep up.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from plume import Plume

_START_S, _END_S = 300, 120
#: Of an open loop at most, which bounds what can be under way at once.
_CLIENTS = 256


class Client:
    """One connection, kept open, and opened again where the server has closed it meanwhile."""

    def __init__(self, port: int):
        self._port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_END_S)

    def ask(self, texts: Sequence[str]) -> int:
        """Embed some texts; the status."""
        body = json.dumps({"input": list(texts), "encoding_format": "base64"})
        return self._sent("POST", "/v1/embeddings", body)[0]

    def read(self, path: str) -> str:
        """The answer of a route."""
        return self._sent("GET", path, None)[1].decode()

    def _sent(self, method: str, path: str, body: str | None) -> tuple[int, bytes]:
        for is_last in (False, True):
            try:
                self._connection.request(method, path, body)
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (http.client.RemoteDisconnected, ConnectionError):
                self._connection.close()
                if is_last:
                    raise
        raise AssertionError


@contextmanager
def served(model: str, port: int, *words: object) -> Iterator[subprocess.Popen]:
    """A server, once it is ready; ended at the end."""
    command = [sys.executable, "-m", "plume", "serve", "--model", model, "--port", str(port), *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _START_S
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise ValueError(f"the server did not start: {' '.join(command)}")
            try:
                if json.loads(Client(port).read("/ready"))["status"] == "ready":
                    break
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def texts_of(plume: Plume, count: int, seed: int = 0) -> list[str]:
    """Texts of 4 to 24 words of the checkpoint's own vocabulary."""
    processor = plume.plume_model.processor
    assert processor is not None
    words = sorted(word for word in processor.tokenizer.get_vocab() if word.isalpha())
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(4, 24))) for _ in range(count)]


def measure_serving(
    model: str,
    port: int,
    *,
    num_texts: int = 512,
    num_single: int = 100,
    num_requests: int = 4_000,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Throughput, overhead, latency under load, memory and the time to drain.

    Args:
        model: a checkpoint.
        port: a free one.
        num_texts: of a run of throughput.
        num_single: requests of one text, one after the other.
        num_requests: after which memory is looked at a second time; the first time is after a quarter.
        seconds: of each open loop.
    """
    plume = Plume(model)
    texts = texts_of(plume, num_texts)
    found: dict[str, Any] = {}
    offline = [_seconds(lambda: plume.encode(texts, show_progress_bar=False)) for _ in range(4)][1:]
    alone = [_seconds(lambda text=text: plume.encode([text], show_progress_bar=False)) for text in texts[:num_single]]
    with served(model, port, "--max-queue-tokens", 20_000) as process:
        parts = [texts[start : start + 8] for start in range(0, num_texts, 8)]
        _closed(port, parts, 16)
        closed = [_seconds(lambda: _closed(port, parts, 16)) for _ in range(3)]
        found["throughput_ratio"] = statistics.median(offline) / statistics.median(closed)
        client = Client(port)
        single = [_seconds(lambda text=text: client.ask([text])) for text in texts[:num_single]]
        found["overhead_ms"] = 1000 * (statistics.median(single) - statistics.median(alone))
        found["encode_ms"] = 1000 * statistics.median(alone)
        ones = [[text] for text in texts]
        capacity = len(ones) / _seconds(lambda: _closed(port, ones, 32))
        for name, share in (("at_70_percent", 0.7), ("at_10_times", 10.0)):
            found[name] = _open(port, ones, share * capacity, seconds if share < 1 else seconds / 4)
        _closed(port, (ones * (num_requests // num_texts + 1))[: num_requests // 4], 16)
        before = _resident(client)
        _closed(port, (ones * (num_requests // num_texts + 1))[: num_requests * 3 // 4], 16)
        found["memory_growth"] = _resident(client) / before - 1
        with ThreadPoolExecutor(1) as threads:
            last = threads.submit(Client(port).ask, texts)
            while "plume_queue_inputs 0" in client.read("/metrics") and not last.done():
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            found["drain_seconds"] = _seconds(lambda: process.wait(_END_S))
            found["drain_status"] = last.result()
    return found


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _closed(port: int, requests: Sequence[Sequence[str]], num_clients: int) -> None:
    """All requests by so many clients, each waiting for its answer, and again where it is told to come back."""
    todo, lock = iter(requests), threading.Lock()

    def work() -> None:
        client = Client(port)
        while True:
            with lock:
                request = next(todo, None)
            if request is None:
                return
            while (status := client.ask(request)) == 429:
                time.sleep(0.05)
            if status != 200:
                raise RuntimeError(f"status {status}")

    with ThreadPoolExecutor(num_clients) as threads:
        for done in [threads.submit(work) for _ in range(num_clients)]:
            done.result()


def _open(port: int, requests: Sequence[Sequence[str]], rate: float, seconds: float) -> dict[str, Any]:
    """Requests at random times, so many a second, as long as not all clients wait for an answer."""
    rng, clients = random.Random(0), threading.local()

    def ask(request: Sequence[str], due: float) -> tuple[int, float]:
        if not hasattr(clients, "one"):
            clients.one = Client(port)
        return clients.one.ask(request), time.perf_counter() - due

    with ThreadPoolExecutor(_CLIENTS) as threads:
        asked, due, end = [], time.perf_counter(), time.perf_counter() + seconds
        while due < end:
            due += rng.expovariate(rate)
            time.sleep(max(due - time.perf_counter(), 0))
            asked.append(threads.submit(ask, requests[len(asked) % len(requests)], due))
        answers = [one.result() for one in asked]
    answered = [taken for status, taken in answers if status == 200]
    refused = [taken for status, taken in answers if status == 429]
    p50, p99 = (1000 * float(np.percentile(answered, at)) if answered else None for at in (50, 99))
    return {
        "requests": len(answers),
        "answered": len(answered),
        "refused": len(refused),
        "others": len(answers) - len(answered) - len(refused),
        "p50_ms": p50,
        "p99_ms": p99,
    }


def _resident(client: Client) -> float:
    line = next(one for one in client.read("/metrics").splitlines() if one.startswith("plume_resident_bytes "))
    return float(line.split()[1])


def summary(found: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: what was measured, and what it should be."""
    rows = [
        ["throughput, of offline `encode`", f"{found['throughput_ratio']:.0%}", "90 %"],
        ["overhead of a request of one text, p50", f"{found['overhead_ms']:.1f} ms", "3 ms of CPU time"],
    ]
    for name, told in (
        ("at_70_percent", "70 % of capacity"),
        ("at_10_times", f"10 times capacity, by {_CLIENTS} clients"),
    ):
        one = found[name]
        share = f"{one['answered']} of {one['requests']} answered, {one['refused']} put off, {one['others']} others"
        ratio = one["p99_ms"] / one["p50_ms"] if one["p50_ms"] else float("nan")
        rows.append([f"{told}: p99 / p50", f"{ratio:.1f} ({share})", "4" if "70" in told else ""])
    rows += [
        ["growth of memory over the last three quarters of the requests", f"{found['memory_growth']:.1%}", "1 %"],
        ["from SIGTERM to the end, with a request of all texts under way", f"{found['drain_seconds']:.1f} s", ""],
    ]
    return rows


def write_serving(model: str, out: Path | None, found: dict[str, Any]) -> str:
    """The table, written as a results file where a folder is given."""
    from plume_eval.report import markdown_table, write_report

    text = markdown_table(["", "measured", "target"], summary(found))
    if out is not None:
        write_report(out, "serving", "What a server costs", f"plume-eval serving --model {model}", text, found)
    return text
