"""What `plume serve` costs beside `Plume.encode`, and how it bears load: a server as a process, clients as threads.

Requests hold texts. Capacity is what many clients get that each wait for their answer; load then arrives at random
times, whether or not the answers keep up. What is compared takes turns, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from plume import Plume
from plume.inputs.item import Item

_log = logging.getLogger(__name__)
_START_S, _END_S = 300, 120
#: Who wait for their answers, one request each.
_CLOSED_CLIENTS = 64
#: Of the server that is measured: tokens that may wait, and inputs of a batch.
_QUEUE_TOKENS, _MOST_ROWS = 16_384, 32
#: Texts of a request.
_SIZES = (8, 1)
_TURNS = 3
#: Characters of the server's log that are shown with an error.
_LOG_TAIL = 2_000


class Client:
    """One connection, kept open, and opened again where the server has closed it meanwhile."""

    def __init__(self, port: int):
        self._port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_END_S)

    def ask(self, texts: Sequence[str]) -> int:
        """Embed some texts; the status."""
        return self._sent("POST", "/v1/embeddings", _body(texts))[0]

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
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    process = subprocess.Popen(command, stderr=log)
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
    except Exception as error:
        log.seek(0)
        status = process.poll()
        error.add_note(f"the server's exit status is {status}; its log ends:\n{log.read().decode()[-_LOG_TAIL:]}")
        raise
    finally:
        log.close()
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
    num_texts: int = 2_048,
    num_single: int = 100,
    num_requests: int = 4_000,
    num_burst: int = 400,
    seconds: float = 60.0,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Throughput beside `encode`, overhead, latency under load, memory and the time to drain.

    Args:
        model: a checkpoint.
        port: a free one.
        num_texts: of a run of throughput.
        num_single: requests of one text, one after the other.
        num_requests: after which memory is looked at a second time; the first time is after a quarter.
        num_burst: requests of four texts that come at once.
        seconds: of requests at 70 % of capacity.
        report: gets each figure as it comes, so that a run that fails late has not been for nothing.
    """
    plume = Plume(model)
    texts = texts_of(plume, num_texts)
    found = _Reported(report)

    def embed(some: Sequence[str]) -> None:
        plume.encode(list(some), show_progress_bar=False)

    embed(texts)
    with served(model, port, "--max-queue-tokens", _QUEUE_TOKENS) as process:
        found["throughput"], capacity = {}, 0.0  # in texts per second, of the last size
        for size in _SIZES:
            parts = [texts[start : start + size] for start in range(0, num_texts, size)]
            _closed(port, parts, _CLOSED_CLIENTS)
            turns = [
                (_seconds(lambda: embed(texts)), _seconds(lambda parts=parts: _closed(port, parts, _CLOSED_CLIENTS)))
                for _ in range(_TURNS)
            ]
            offline, closed = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
            found["throughput"] = {**found["throughput"], str(size): offline / closed}
            found["encode_ms_per_text"], capacity = 1000 * offline / num_texts, num_texts / closed
        client = Client(port)
        pairs = [
            (_seconds(lambda text=text: embed([text])), _seconds(lambda text=text: client.ask([text])))
            for text in texts[:num_single]
        ]
        found["overhead_ms"] = 1000 * statistics.median(asked - alone for alone, asked in pairs)
        found["encode_ms"] = 1000 * statistics.median(alone for alone, _ in pairs)
        ones = [[text] for text in texts]
        answers = asyncio.run(_open(port, ones, 0.7 * capacity, seconds))
        found["at_70_percent"] = {**_told(answers), "seconds": seconds}
        sixth = len(answers) // 6
        found["first_sixth"], found["last_sixth"] = _told(answers[:sixth]), _told(answers[-sixth:])
        tokens = plume.plume_model.processor.exact_lengths([Item((text,)) for text in texts])  # type: ignore[union-attr]
        fours = [texts[start : start + 4] for start in range(0, num_texts, 4)]
        burst = asyncio.run(_burst(port, [fours[index % len(fours)] for index in range(num_burst)]))
        found["burst"] = {**burst, "bound_ms": 1000 * (_QUEUE_TOKENS / np.mean(tokens) + _MOST_ROWS) / capacity}
        _closed(port, (ones * (num_requests // num_texts + 1))[: num_requests // 4], _CLOSED_CLIENTS)
        before = _resident(client)
        _closed(port, (ones * (num_requests // num_texts + 1))[: num_requests * 3 // 4], _CLOSED_CLIENTS)
        found["memory_growth"] = _resident(client) / before - 1
        with ThreadPoolExecutor(1) as threads:
            last = threads.submit(Client(port).ask, texts[: _QUEUE_TOKENS // 2 // max(tokens)])
            while "plume_queue_inputs 0" in client.read("/metrics") and not last.done():
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            found["drain_seconds"] = _seconds(lambda: process.wait(_END_S))
            if (status := last.result()) != 200:
                raise RuntimeError(f"the request that was under way at SIGTERM got status {status}")
    return dict(found)


class _Reported(dict):
    """A dictionary that tells of each value it is given."""

    def __init__(self, report: Callable[[str], None]):
        super().__init__()
        self._report = report

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._report(f"{name}: {json.dumps(value)}")


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


async def _open(port: int, requests: Sequence[Sequence[str]], rate: float, seconds: float) -> list[tuple[int, float]]:
    """Requests at random times, so many a second on average, whether or not the answers keep up; in their order."""
    rng, crowd = random.Random(0), Crowd(port)
    answers: list[tuple[int, float]] = []

    async def ask(number: int, due: float) -> None:
        answers[number] = await crowd.ask(requests[number % len(requests)], due)

    due = time.perf_counter()
    end = due + seconds
    async with asyncio.TaskGroup() as tasks:  # which forgets a task that is done: an hour has a million
        while (due := due + rng.expovariate(rate)) < end:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            answers.append((0, 0.0))
            tasks.create_task(ask(len(answers) - 1, due))
    return answers


async def _burst(port: int, requests: Sequence[Sequence[str]]) -> dict[str, Any]:
    """All requests at once, each on a connection of its own."""
    crowd = Crowd(port)
    await crowd.open(len(requests))
    now = time.perf_counter()
    return _told(await asyncio.gather(*(crowd.ask(request, now) for request in requests)))


class Crowd:
    """Clients without end: a request takes a connection that is idle, or opens another."""

    def __init__(self, port: int):
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open(self, count: int) -> None:
        """Open connections before they are needed."""
        self._idle += [await asyncio.open_connection("127.0.0.1", self._port) for _ in range(count)]

    async def ask(self, texts: Sequence[str], due: float) -> tuple[int, float]:
        """The status of a request, 0 where the connection broke, and the seconds from when it was due."""
        body = _body(texts).encode()
        request = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        while True:
            if is_new := not self._idle:
                await self.open(1)
            reader, writer = self._idle.pop()
            try:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                break
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                writer.close()
                if is_new:  # the server closes those that have been idle for long
                    _log.warning("a request failed: %r", error)
                    return 0, time.perf_counter() - due
        taken = time.perf_counter() - due
        self._idle.append((reader, writer))
        return int(head.split()[1]), taken


def _body(texts: Sequence[str]) -> str:
    return json.dumps({"input": list(texts), "encoding_format": "base64"})


def _told(answers: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Counts of answers by status, and milliseconds until they came."""
    found: dict[str, Any] = {"requests": len(answers)}
    for name, status in (("answered", 200), ("refused", 429)):
        taken = [1000 * seconds for one, seconds in answers if one == status]
        found[name] = len(taken)
        for at in (50, 99):
            found[f"{name}_p{at}_ms"] = float(np.percentile(taken, at)) if taken else None
    found["others"] = len(answers) - found["answered"] - found["refused"]
    return found


def _resident(client: Client) -> float:
    line = next(one for one in client.read("/metrics").splitlines() if one.startswith("plume_resident_bytes "))
    return float(line.split()[1])


def summary(found: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: what was measured, and what it should be."""
    rows = [
        [
            f"throughput of {_CLOSED_CLIENTS} clients with {size} text{'s' * (size != '1')} a request, of `encode` "
            f"({found['encode_ms_per_text']:.1f} ms per text)",
            f"{ratio:.0%}",
            "90 %",
        ]
        for size, ratio in found["throughput"].items()
    ]
    rows.append(["overhead of a request of one text, p50", f"{found['overhead_ms']:.1f} ms", "3 ms of CPU time"])
    one = found["at_70_percent"]
    counts = f"{one['answered']} of {one['requests']} answered, {one['refused']} put off, {one['others']} others"
    rows.append(
        [
            f"requests of one text at 70 % of capacity, at random times: p99 / p50 ({counts})",
            f"{_ratio(one['answered_p99_ms'], one['answered_p50_ms']):.1f} (p50 {one['answered_p50_ms'] or 0:.0f} ms)",
            "4",
        ]
    )
    first, last = found["first_sixth"]["answered_p99_ms"], found["last_sixth"]["answered_p99_ms"]
    rows.append(
        [
            f"p99 of the last sixth of these {one['seconds'] / 60:g} minutes, of that of the first",
            f"{_ratio(last, first):.0%}",
            "",
        ]
    )
    one = found["burst"]
    rows += [
        [
            f"{one['requests']} requests of four texts at once, {_QUEUE_TOKENS:,} tokens of which may wait: p99 of the "
            f"{one['answered']} that are answered, of what the queue and a batch take at capacity",
            f"{_ratio(one['answered_p99_ms'], one['bound_ms']):.0%}",
            "100 %",
        ],
        [
            f"p99 of the {one['refused']} that are put off ({one['others']} others)",
            "none" if one["refused_p99_ms"] is None else f"{one['refused_p99_ms']:.0f} ms",
            "",
        ],
    ]
    rows += [
        ["growth of memory over the last three quarters of the requests", f"{found['memory_growth']:.1%}", "1 %"],
        [
            "from SIGTERM to the end, with as many texts under way as one may send",
            f"{found['drain_seconds']:.1f} s",
            "",
        ],
    ]
    return rows


def _ratio(one: float | None, other: float | None) -> float:
    return one / other if one and other else float("nan")


@contextmanager
def random_checkpoint(shapes: str) -> Iterator[str]:
    """A folder with a checkpoint of random weights, for as long as it is needed."""
    from plume_eval.speed.cases import make_model
    from plume_eval.speed.config import LatencyConfig

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(LatencyConfig(shapes=shapes), "cpu")  # type: ignore[arg-type]
        model.save_pretrained(folder)
        model.processor.save_pretrained(folder)  # type: ignore[union-attr]
        yield folder


def write_serving(name: str, command: str, out: Path | None, found: dict[str, Any]) -> str:
    """The table, written as a results file where a folder is given."""
    from plume_eval.report import markdown_table, write_report

    text = markdown_table(["", "measured", "target"], summary(found))
    if out is not None:
        write_report(out, name, "What a server costs", command, text, found)
    return text
