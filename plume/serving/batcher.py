"""Inputs of many connections in batches of one model: a queue bounded in tokens, and one thread that encodes.

Nothing waits for a batch to fill: while the model runs, the queue fills by itself. Connections take turns, so that one
with ten thousand inputs does not keep another waiting for more than a batch. What fails is halved until the input that
it is due to fails alone.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from plume.inputs.item import Item

#: How far a vector's length may be from one.
NORM_TOLERANCE = 1e-3


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


@dataclass(eq=False)
class Entry:
    """One input that waits; `future` gets its vector `[D]`, or its `Trace`."""

    item: Item
    num_tokens: int
    how: How
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


Encode = Callable[[Sequence[Item], How], Sequence[Any] | np.ndarray]
"""Unit vectors of some inputs, `[N, D]`, or their traces."""
Observe = Callable[[Sequence[Entry], float], None]
"""Told of every batch that has been encoded, and the seconds that it took."""


class Batcher:
    """A queue, and the thread that empties it.

    Example:
        >>> batcher = Batcher(lambda items, how: np.eye(4)[: len(items)])
        >>> entry = Entry(Item(("a red kite",)), num_tokens=4, how=How())
        >>> batcher.submit("a connection", [entry])
        >>> entry.future.result().tolist()
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
        self._waiting: OrderedDict[Hashable, deque[Entry]] = OrderedDict()
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

    def submit(self, connection: Hashable, entries: Sequence[Entry]) -> None:
        """Let the inputs of a request wait, all of them or none.

        Args:
            connection: whose turn they take.
            entries: the inputs.

        Raises:
            QueueFullError: there is no room for them now, or never.
            FatalError: nothing is encoded any more.
        """
        tokens = sum(entry.num_tokens for entry in entries)
        share = self.max_queue_tokens // 2
        with self._changed:
            if self._is_over or self._is_closing:
                raise FatalError("nothing is encoded any more")
            if tokens > share and len(entries) > 1:
                raise QueueFullError(None)
            own = sum(entry.num_tokens for entry in self._waiting.get(connection, ()))
            over = max(self._queue_tokens + tokens - self.max_queue_tokens, own + tokens - share)
            if self._queue_tokens and over > 0:
                raise QueueFullError(self._seconds_until(over))
            self._waiting.setdefault(connection, deque()).extend(entries)
            self._queue_tokens += tokens
            self._queue_inputs += len(entries)
            self._changed.notify()

    def drop(self, connection: Hashable, entries: Sequence[Entry]) -> int:
        """Let inputs leave the queue, for example of a client that has gone; returns how many had not been begun."""
        with self._changed:
            gone = {id(entry) for entry in entries if entry.future.cancel()}
            if (queue := self._waiting.get(connection)) is not None:
                kept = deque(entry for entry in queue if id(entry) not in gone)
                left = [entry for entry in queue if id(entry) in gone]
                self._queue_tokens -= sum(entry.num_tokens for entry in left)
                self._queue_inputs -= len(left)
                self._waiting[connection] = kept
                if not kept:
                    del self._waiting[connection]
            return len(gone)

    def close(self, timeout: float | None = None) -> None:
        """Encode what waits, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _seconds_until(self, tokens: int) -> int:
        """When so many tokens will have left the queue, as far as is known: 1 to 60 s."""
        return min(max(round(tokens / self._tokens_per_second), 1), 60) if self._tokens_per_second else 1

    def _run(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            try:
                self._work(batch)
            except BaseException:  # whatever it is, nobody may wait for ever
                self._fail_all(batch)
                if self._stop is not None:
                    self._stop()
                return
            finally:
                self._began = None
            seconds = time.monotonic() - began
            speed = sum(entry.num_tokens for entry in batch) / max(seconds, 1e-6)
            self._tokens_per_second = (
                speed if not self._tokens_per_second else 0.8 * self._tokens_per_second + 0.2 * speed
            )
            if self._observe is not None:
                with suppress(Exception):  # numbers are not worth an answer
                    self._observe(batch, seconds)

    def _next(self) -> list[Entry]:
        """The next batch, once there is one; empty at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                batch = self._take()
                if batch:
                    self._began = time.monotonic()
                    return batch
                if self._is_closing and not self._waiting:
                    return []

    def _take(self) -> list[Entry]:
        """Inputs of like K, of one connection after the other, as many as fit."""
        batch: list[Entry] = []
        longest, progress = 0, True
        served: dict[Hashable, None] = {}
        while progress and len(batch) < self.max_batch_size:
            progress = False
            for connection in list(self._waiting):
                queue = self._waiting[connection]
                head = queue[0]
                if batch and (
                    len(batch) == self.max_batch_size
                    or head.how != batch[0].how
                    or (len(batch) + 1) * max(longest, head.num_tokens) > self.max_batch_tokens
                ):
                    continue
                queue.popleft()
                self._queue_tokens -= head.num_tokens
                self._queue_inputs -= 1
                if not queue:
                    del self._waiting[connection]
                progress = True
                served[connection] = None
                if head.future.set_running_or_notify_cancel():
                    batch.append(head)
                    longest = max(longest, head.num_tokens)
        for connection in served:
            if connection in self._waiting:
                self._waiting.move_to_end(connection)  # so that others come before it in the next batch
        return batch

    def _work(self, batch: Sequence[Entry]) -> None:
        """Encode a batch, or its halves where that fails.

        Raises:
            FatalError: the device is lost.
        """
        try:
            results = self._encode([entry.item for entry in batch], batch[0].how)
            if len(results) != len(batch):
                raise BrokenVectorError("the model returned another number of vectors")
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            self._shrink(batch)
            self._halves(batch, error)
            return
        except Exception as error:  # whatever a model raises is due to an input, unless the device is lost
            if is_fatal(error):
                raise FatalError from error
            self._halves(batch, error)
            return
        self.max_batch_tokens = min(self.max_batch_tokens + self._largest // 64, self._largest)
        for entry, result in zip(batch, results, strict=True):
            if not entry.how.is_traced and not _is_unit(result):
                entry.future.set_exception(BrokenVectorError("the model returned what is no unit vector"))
            else:
                entry.future.set_result(result)

    def _shrink(self, batch: Sequence[Entry]) -> None:
        """Smaller batches for a while, as far as it was the batch and not an input that was too large."""
        if len(batch) > 1:
            padded = len(batch) * max(entry.num_tokens for entry in batch)
            self.max_batch_tokens = max(min(self.max_batch_tokens, padded // 2), self._largest // 16, 1)

    def _halves(self, batch: Sequence[Entry], error: Exception) -> None:
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        self._work(batch[: len(batch) // 2])
        self._work(batch[len(batch) // 2 :])

    def _fail_all(self, batch: Sequence[Entry]) -> None:
        for entry in batch:
            if not entry.future.done():
                entry.future.set_exception(FatalError("nothing is encoded any more"))
        with self._changed:
            self._is_over = True
            left = [entry for queue in self._waiting.values() for entry in queue]
            self._waiting.clear()
            self._queue_tokens = self._queue_inputs = 0
        for entry in left:
            if entry.future.set_running_or_notify_cancel():
                entry.future.set_exception(FatalError("nothing is encoded any more"))


def _is_unit(vector: np.ndarray) -> bool:
    return bool(np.isfinite(vector).all()) and abs(float(np.linalg.norm(vector)) - 1) <= NORM_TOLERANCE


def is_fatal(error: Exception) -> bool:
    """Whether a device is lost after an error, as after an access out of bounds on a GPU."""
    kinds = tuple(kind for name in ("AcceleratorError",) if (kind := getattr(torch, name, None)) is not None)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
