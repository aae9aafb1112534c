"""Inputs of many connections in batches of one model: a queue bounded in tokens, and one thread that encodes.

Nothing waits for a batch to fill: while the model runs, the queue fills by itself. Connections take turns of a quarter
of a batch, so that one with ten thousand inputs does not keep another waiting for long, and within a round of turns
inputs of like length share a batch. What fails is halved until the input that it is due to fails alone.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from plume.inputs.item import Item

#: How far a vector's length may be from one.
NORM_TOLERANCE = 1e-3
#: A batch may hold as much padding as tokens, and an input add a quarter of its length; this much is free in any case,
#: since a pass of its own costs more.
FREE_PADDING = 1_024


class QueueFullError(Exception):
    """The queue has no room for a request now; `seconds` says when to try again, None that it never will."""

    def __init__(self, seconds: int | None):
        super().__init__("the queue is full")
        self.seconds = seconds


class BrokenVectorError(RuntimeError):
    """The model returned what is no unit vector."""


class FatalError(RuntimeError):
    """The device failed in a way after which nothing works any more."""


@dataclass(frozen=True)
class How:
    """What inputs of a batch share.

    num_latent_steps: K; None for the checkpoint's own. side: which may decide K. max_pixels: larger images are reduced;
    None: the checkpoint's own limit. is_traced: whether what happens inside is asked for, instead of vectors.
    """

    num_latent_steps: int | None = None
    side: Any = None
    max_pixels: int | None = None
    is_traced: bool = False


@dataclass(frozen=True, eq=False)
class Entry:
    """One input that is to be encoded."""

    item: Item
    num_tokens: int
    how: How
    arrived: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Job:
    """Inputs that were submitted together; `future` gets what came of each: a vector `[D]`, a `Trace`, or an error."""

    connection: Hashable
    entries: Sequence[Entry]
    future: Future[list[Any]] = field(default_factory=Future)
    results: list[Any] = field(init=False)
    num_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.results, self.num_left = [None] * len(self.entries), len(self.entries)

    def end(self) -> None:
        """Hand out the results, unless they have been, or nobody waits for them any more."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(self.results)


class _Place(NamedTuple):
    """An input of a job."""

    job: Job
    at: int

    @property
    def entry(self) -> Entry:
        return self.job.entries[self.at]

    def settle(self, result: Any) -> None:
        self.job.results[self.at] = result
        self.job.num_left -= 1


@dataclass(eq=False)
class _Connection:
    """What waits of a connection. tokens: of all of it. num_taken: inputs of it since its turn began."""

    waiting: deque[_Place] = field(default_factory=deque)
    tokens: int = 0
    num_taken: int = 0


Encode = Callable[[Sequence[Item], How], Sequence[Any] | np.ndarray]
"""Unit vectors of some inputs, `[N, D]`, or their traces."""
Observe = Callable[[Sequence[Entry], float], None]
"""Told of every batch that has been encoded, and the seconds that it took."""


class Batcher:
    """A queue, and the thread that empties it.

    Example:
        >>> batcher = Batcher(lambda items, how: np.eye(4)[: len(items)])
        >>> job = batcher.submit("a connection", [Entry(Item(("a red kite",)), num_tokens=4, how=How())])
        >>> job.future.result()[0].tolist()
        [1.0, 0.0, 0.0, 0.0]
        >>> batcher.close()
    """

    def __init__(
        self,
        encode: Encode,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 32_768,
        max_queue_tokens: int = 262_144,
        observe: Observe | None = None,
        stop: Callable[[], None] | None = None,
    ):
        """Start the thread.

        Args:
            encode: called from the thread alone.
            max_batch_size: inputs of a batch at most.
            max_batch_tokens: tokens of a batch at most, padding included; a longer input has one to itself.
            max_queue_tokens: tokens that may wait, of one connection at most half of them; one input alone is taken
                whatever its length.
            observe: see `Observe`.
            stop: called once nothing can be encoded any more.
        """
        self._encode, self._observe, self._stop = encode, observe, stop
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.max_queue_tokens = max_queue_tokens
        self._turn = max(max_batch_size // 4, 1)  # inputs of a connection before others have theirs
        self._waiting: OrderedDict[Hashable, _Connection] = OrderedDict()  # whose turn comes first
        self._changed = threading.Condition()
        self._queue_tokens = self._queue_inputs = 0
        self._began: float | None = None
        self._is_closing = self._is_over = False
        self._largest = max_batch_tokens
        self._tokens_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="plume-encode", daemon=True)
        self._thread.start()

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        return self._queue_tokens

    @property
    def queue_inputs(self) -> int:
        """Inputs that wait."""
        return self._queue_inputs

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def busy_seconds(self) -> float:
        """How long the batch that runs has been running."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def submit(self, connection: Hashable, entries: Sequence[Entry]) -> Job:
        """Let the inputs of a request wait, all of them or none.

        Args:
            connection: whose turn they take.
            entries: the inputs, at least one.

        Raises:
            QueueFullError: there is no room for them now, or never.
            FatalError: nothing is encoded any more.
            ValueError: there are none.
        """
        if not entries:
            raise ValueError("a job holds no input; expected at least one")
        job = Job(connection, entries)
        tokens = sum(entry.num_tokens for entry in entries)
        share = self.max_queue_tokens // 2
        with self._changed:
            if self._is_over or self._is_closing:
                raise FatalError("nothing is encoded any more")
            if tokens > share and len(entries) > 1:
                raise QueueFullError(None)
            own = self._waiting[connection].tokens if connection in self._waiting else 0
            over = max(self._queue_tokens + tokens - self.max_queue_tokens, own + tokens - share)
            if self._queue_tokens and over > 0:
                raise QueueFullError(self._seconds_until(over))
            waits = self._waiting.setdefault(connection, _Connection())
            waits.waiting.extend(_Place(job, index) for index in range(len(entries)))
            self._count(waits, tokens, len(entries))
            self._changed.notify()
        return job

    def drop(self, job: Job) -> int:
        """Let a job leave the queue, for example of a client that has gone; returns how many had not been begun."""
        with self._changed:
            job.future.cancel()
            if (waits := self._waiting.get(job.connection)) is None:
                return 0
            gone = [place for place in waits.waiting if place.job is job]
            waits.waiting = deque(place for place in waits.waiting if place.job is not job)
            self._count(waits, -sum(place.entry.num_tokens for place in gone), -len(gone))
            if not waits.waiting:
                del self._waiting[job.connection]
            return len(gone)

    def close(self, timeout: float | None = None) -> None:
        """Encode what waits, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _count(self, waits: _Connection, tokens: int, inputs: int) -> None:
        waits.tokens += tokens
        self._queue_tokens += tokens
        self._queue_inputs += inputs

    def _seconds_until(self, tokens: int) -> int:
        """When so many tokens will have left the queue, as far as is known: 1 to 60 s."""
        return min(max(round(tokens / self._tokens_per_second), 1), 60) if self._tokens_per_second else 1

    def _run(self) -> None:
        batch: list[_Place] = []
        try:
            while batch := self._next():
                began = time.monotonic()
                self._work(batch)
                self._began = None
                self._see(batch, time.monotonic() - began)
                batch = []
        except BaseException:  # whatever it is, nobody may wait for ever
            self._began = None
            self._fail_all(batch)
            if self._stop is not None:
                self._stop()

    def _see(self, batch: Sequence[_Place], seconds: float) -> None:
        """Take note of what a batch took."""
        speed = sum(place.entry.num_tokens for place in batch) / max(seconds, 1e-6)
        self._tokens_per_second = 0.8 * self._tokens_per_second + 0.2 * speed if self._tokens_per_second else speed
        if self._observe is not None:
            with suppress(Exception):  # numbers are not worth an answer
                self._observe([place.entry for place in batch], seconds)

    def _next(self) -> list[_Place]:
        """The next batch, once there is one; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if not self._waiting:
                return []
            self._began = time.monotonic()
            return self._take()

    def _take(self) -> list[_Place]:
        """The input whose turn it is, and of those that come next the ones nearest to it in length, as many as fit."""
        (_, first), *others = self._coming(2 * self.max_batch_size)
        length = first.entry.num_tokens
        others.sort(key=lambda one: (one[0], abs(one[1].entry.num_tokens - length)))  # no later turn before an earlier
        batch, tokens, longest = [first], length, length
        for _, place in others:
            if len(batch) == self.max_batch_size:
                break
            own, padded = place.entry.num_tokens, len(batch) * longest
            new_longest = max(longest, own)
            new_padded = (len(batch) + 1) * new_longest
            if (
                new_padded <= self.max_batch_tokens
                and new_padded - padded - own <= max(own // 4, FREE_PADDING)
                and new_padded - tokens - own <= max(tokens + own, FREE_PADDING)
            ):
                batch.append(place)
                tokens, longest = tokens + own, new_longest
        self._remove(batch)
        return batch

    def _coming(self, most: int) -> list[tuple[int, _Place]]:
        """Inputs in the order of their turns, of the first one's K, each with the number of its turn."""
        coming: list[tuple[int, _Place]] = []
        how = next(iter(self._waiting.values())).waiting[0].entry.how
        for turn in count():
            had = len(coming)
            for waits in self._waiting.values():
                start = max(turn * self._turn - waits.num_taken, 0)
                ones = islice(waits.waiting, start, (turn + 1) * self._turn - waits.num_taken)
                coming += [(turn, place) for place in ones if place.entry.how == how]
                if len(coming) >= most:
                    return coming[:most]
            if len(coming) == had:
                break
        return coming

    def _remove(self, batch: Sequence[_Place]) -> None:
        """Take inputs out of the queue; who has had its turn, or has led this batch, goes to its end."""
        taken: dict[Hashable, set[_Place]] = {}
        for place in batch:
            taken.setdefault(place.job.connection, set()).add(place)
        for connection, places in taken.items():
            waits, passed, left = self._waiting[connection], [], len(places)
            is_head_taken = waits.waiting[0] in places
            while left:
                place = waits.waiting.popleft()
                left -= place in places
                if place not in places:
                    passed.append(place)
            waits.waiting.extendleft(reversed(passed))
            self._count(waits, -sum(place.entry.num_tokens for place in places), -len(places))
            waits.num_taken += len(places)
            if not waits.waiting:
                del self._waiting[connection]
            elif connection == batch[0].job.connection or (is_head_taken and waits.num_taken >= self._turn):
                waits.num_taken = 0
                self._waiting.move_to_end(connection)
            else:  # what comes next of it has still to lead a batch, or to join one
                waits.num_taken = min(waits.num_taken, self._turn - 1)

    def _work(self, batch: Sequence[_Place]) -> None:
        """Encode a batch, or its halves where that fails; jobs that it ends get their results.

        Raises:
            FatalError: the device is lost.
        """
        failure: Exception | None = None
        results: Sequence[Any] | np.ndarray = ()
        try:
            results = self._encode([place.entry.item for place in batch], batch[0].entry.how)
            if len(results) != len(batch):
                raise BrokenVectorError("the model returned another number of vectors")
        except Exception as error:  # whatever a model raises is due to an input, unless the device is lost
            if is_fatal(error):
                raise FatalError from error
            failure = error
        if failure is None:
            self.max_batch_tokens = min(self.max_batch_tokens + self._largest // 64, self._largest)
            for place, result in zip(batch, results, strict=True):
                is_right = place.entry.how.is_traced or _is_unit(result)
                place.settle(result if is_right else BrokenVectorError("the model returned what is no unit vector"))
            _end_jobs(batch)
            return
        if isinstance(failure, torch.OutOfMemoryError):
            failure.__traceback__ = None  # whose frames hold what the pass has made
            torch.cuda.empty_cache()
            self._shrink(batch)
        if len(batch) == 1:
            batch[0].settle(failure)
            _end_jobs(batch)
            return
        self._work(batch[: len(batch) // 2])
        self._work(batch[len(batch) // 2 :])

    def _shrink(self, batch: Sequence[_Place]) -> None:
        """Smaller batches for a while, as far as it was the batch and not an input that was too large."""
        if len(batch) > 1:
            padded = len(batch) * max(place.entry.num_tokens for place in batch)
            self.max_batch_tokens = max(min(self.max_batch_tokens, padded // 2), self._largest // 16, 1)

    def _fail_all(self, batch: Sequence[_Place]) -> None:
        with self._changed:
            self._is_over = True
            left = [place for waits in self._waiting.values() for place in waits.waiting]
            self._waiting.clear()
            self._queue_tokens = self._queue_inputs = 0
        for place in (*batch, *left):
            if place.job.results[place.at] is None:
                place.settle(FatalError("nothing is encoded any more"))
        _end_jobs((*batch, *left))


def _end_jobs(places: Sequence[_Place]) -> None:
    """Hand out the results of jobs all of whose inputs have one."""
    for job in {place.job: None for place in places}:
        if not job.num_left:
            job.end()


def _is_unit(vector: np.ndarray) -> bool:
    return bool(np.isfinite(vector).all()) and abs(float(np.linalg.norm(vector)) - 1) <= NORM_TOLERANCE


def is_fatal(error: Exception) -> bool:
    """Whether a device is lost after an error, as after an access out of bounds on a GPU."""
    kinds = tuple(kind for name in ("AcceleratorError",) if (kind := getattr(torch, name, None)) is not None)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
