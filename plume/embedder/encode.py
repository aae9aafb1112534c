"""One call of `Plume.encode`: inputs are loaded in windows, embedded in batches, and returned in their order.

Letters: N inputs, D hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from sentence_transformers.util import quantize_embeddings
from torch import Tensor
from tqdm.auto import tqdm

from plume.inputs.errors import InputError
from plume.inputs.file_kinds import names_a_file
from plume.inputs.item import Item, MediaLimits
from plume.inputs.processor import PlumeProcessor, warn_of_truncated

# Inputs are loaded and embedded in windows of this many batches, so that a folder of photos need not fit into
# memory, while inputs of similar length still meet in a batch.
_BATCHES_PER_WINDOW = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """An input that is checked and loaded.

    length: tokens, about. index: position in the list that was passed. place: position in the run of batches that it
    is embedded in. prefetcher: prepares its batch, if there is one.
    """

    item: Item
    length: int
    index: int
    place: int = 0
    prefetcher: Prefetcher | None = None


Window = list[Loaded]
"""Some inputs that are in memory together."""


@dataclass(kw_only=True)
class EncodeCall:
    """One call, from raw inputs to vectors; read `run` first.

    inputs: what the user passed. instruction: for inputs that bring none of their own. limits: of media.
    batch_size, max_tokens_per_batch: rows, and tokens with padding, of a pass at most.
    skips_errors: whether inputs that cannot be embedded are skipped; `skipped` then holds their errors.
    loads_ahead: whether the next window is loaded in a thread. num_workers: processes that share the work.
    device: where vectors are wanted.
    run_batches: embeds loaded inputs in order of their places, a given number at a time, `[n, D]`.
    prepare: makes a batch ready for the model in a thread; None where worker processes do it.
    recall, remember: of the vector cache; None without one.
    """

    processor: PlumeProcessor
    inputs: Sequence[Any]
    instruction: str
    limits: MediaLimits
    batch_size: int
    max_tokens_per_batch: int
    skips_errors: bool
    shows_progress: bool
    loads_ahead: bool
    num_workers: int
    device: torch.device
    run_batches: Callable[[Window, int], Tensor]
    prepare: Callable[[Sequence[Item]], Any] | None
    recall: Callable[[Window], tuple[list[tuple[int, Tensor]], Window]] | None
    remember: Callable[[Sequence[int], Tensor], None] | None
    skipped: list[InputError] = field(default_factory=list)
    _num_cut: int = 0
    _num_empty: int = 0
    _path: tuple[int, str] | None = None
    _indices: list[int] = field(default_factory=list)
    _vectors: list[Tensor] = field(default_factory=list)

    def run(self, empty: Tensor) -> Tensor:
        """Vectors of all inputs in their order, `[N, D]`; a row of NaN where one was skipped.

        Args:
            empty: vectors of no inputs, `[0, D]`.
        """
        with (
            ThreadPoolExecutor(2) as threads,
            tqdm(total=len(self.inputs), desc="Encoding", unit="input", disable=not self.shows_progress) as bar,
        ):
            windows = self.windows()
            for window in prefetched(threads, windows) if self.loads_ahead else windows:
                unknown = self.take_cached(window)
                bar.update(len(window) - len(unknown))
                for num_embedded in self.embed(unknown, threads):
                    bar.update(num_embedded)
            bar.update(len(self.skipped))
        return self.in_order(empty)

    def windows(self) -> Iterator[Window]:
        """Inputs, checked, loaded and counted, a few batches at a time; a bad one is raised or skipped."""
        share = _BATCHES_PER_WINDOW * max(self.num_workers, 1)
        return in_windows(
            filter(None, map(self.load, range(len(self.inputs)))),
            max_items=share * self.batch_size,
            max_tokens=share * self.max_tokens_per_batch,
            num_tokens=lambda loaded: loaded.length,
        )

    def load(self, index: int) -> Loaded | None:
        """One input; None if it is skipped.

        Raises:
            InputError: it cannot be embedded, and errors are not skipped.
        """
        name = f"input {index}"
        try:
            raw = self.inputs[index]
            whole = Item.parse(raw, name, self.limits).instructed(self.instruction)
            item = self.processor.fit(whole, name)
            self._num_cut += item is not whole
            self._num_empty += item.is_empty
            if self._path is None and isinstance(raw, str) and names_a_file(raw):
                self._path = index, raw
            return Loaded(item, self.processor.num_tokens(item), index)
        except InputError as error:
            error.locate(index)
            if not self.skips_errors:
                raise
            self.skipped.append(error)
            return None

    def take_cached(self, window: Window) -> Window:
        """Take the vectors that the cache has; returns the other inputs."""
        if self.recall is None:
            return window
        known, unknown = self.recall(window)
        self._indices += [index for index, _ in known]
        self._vectors += [vector[None].to(self.device) for _, vector in known]
        return unknown

    def embed(self, window: Window, threads: ThreadPoolExecutor) -> Iterator[int]:
        """Embed a window in batches of similar length; yields the number of inputs of each run of batches."""
        lengths = [loaded.length for loaded in window]
        for num_rows, numbers in join_batches(plan_batches(lengths, self.batch_size, self.max_tokens_per_batch)):
            rows = [replace(window[number], place=place) for place, number in enumerate(numbers)]
            vectors = self.run_batches(self._with_prefetcher(rows, num_rows, threads), num_rows)
            indices = [row.index for row in rows]
            if self.remember is not None:
                self.remember(indices, vectors)
            self._vectors.append(vectors.to(self.device))
            self._indices += indices
            yield len(rows)

    def in_order(self, empty: Tensor) -> Tensor:
        """Vectors in the order of the inputs, `[N, D]`."""
        vectors = torch.cat(self._vectors) if self._vectors else empty
        ordered = vectors.new_full((len(self.inputs), vectors.shape[1]), torch.nan)
        ordered[self._indices] = vectors
        return ordered

    def warn(self, stacklevel: int) -> None:
        """Say which inputs were skipped, how many were cut or empty, and which text is the name of a file."""
        if self.skipped:
            warnings.warn(SkippedInputsWarning(self.skipped), stacklevel=stacklevel + 1)
        warn_of_truncated(
            self._num_cut, self._num_empty, len(self.inputs), self.processor.max_tokens, stacklevel=stacklevel + 1
        )
        if self._path is not None:
            index, path = self._path
            warnings.warn(
                f"plume: input {index} is the text {path!r}, which is the name of a file too; pass a pathlib.Path to "
                "embed what the file holds",
                stacklevel=stacklevel + 1,
            )

    def _with_prefetcher(self, rows: Window, num_rows: int, threads: ThreadPoolExecutor) -> Window:
        """The same inputs, whose batches are prepared in a thread if they hold media.

        Tokenising text holds Python's lock, so that a thread would only be in the way.
        """
        if self.prepare is None or not any(row.item.images or row.item.videos for row in rows):
            return rows
        items = [row.item for row in rows]
        batches = [items[start : start + num_rows] for start in range(0, len(items), num_rows)]
        prefetcher = Prefetcher(threads, self.prepare, batches)
        return [replace(row, prefetcher=prefetcher) for row in rows]


class SkippedInputsWarning(UserWarning):
    """Inputs that `Plume.encode(on_error="skip")` has left out; `errors` says which and why."""

    def __init__(self, errors: Sequence[InputError]):
        super().__init__(f"{len(errors)} inputs were skipped:\n" + "\n".join(map(str, errors)))
        self.errors = list(errors)


def in_windows(
    values: Iterable[T], *, max_items: int, max_tokens: int, num_tokens: Callable[[T], int]
) -> Iterator[list[T]]:
    """Split values into windows of at most `max_items` and `max_tokens`; a larger value has a window of its own.

    Example:
        >>> list(in_windows([3, 4, 9, 1], max_items=2, max_tokens=8, num_tokens=int))
        [[3, 4], [9], [1]]
    """
    window: list[T] = []
    tokens = 0
    for value in values:
        length = num_tokens(value)
        if window and (len(window) == max_items or tokens + length > max_tokens):
            yield window
            window, tokens = [], 0
        window.append(value)
        tokens += length
    if window:
        yield window


def plan_batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Group inputs by length within a budget of rows and of tokens, padding included.

    Similar lengths share a pass, so that one long page does not stall twenty captions.

    Args:
        lengths: tokens of each input.
        max_rows: inputs per batch at most.
        max_tokens: rows times the longest row of a batch at most; an input beyond it has a batch of its own.

    Returns:
        Indices of the inputs, each exactly once, the longest batch first, so that memory peaks at once.

    Example:
        >>> plan_batches([3, 900, 3, 4, 880], max_rows=8, max_tokens=1000)
        [[1], [4], [3, 0, 2]]
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: equals keep their order
        if not batches or len(batches[-1]) == max_rows or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def join_batches(batches: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Batches that follow each other with the same number of rows, joined, so that one call can run them all.

    Returns:
        Rows per batch, and the indices of such a run; only the last batch of a run may have fewer rows.

    Example:
        >>> join_batches([[4], [0], [1, 2], [3, 5], [6]])
        [(1, [4, 0]), (2, [1, 2, 3, 5, 6])]
    """
    runs: list[tuple[int, list[int]]] = []
    for batch in batches:
        if runs and len(batch) <= runs[-1][0] and len(runs[-1][1]) % runs[-1][0] == 0:
            runs[-1][1].extend(batch)
        else:
            runs.append((len(batch), list(batch)))
    return runs


class Prefetcher:
    """Prepares the next batch in a thread, while the model runs on this one."""

    def __init__(
        self, threads: ThreadPoolExecutor, prepare: Callable[[Sequence[Item]], Any], batches: Sequence[Sequence[Item]]
    ):
        self._threads, self._prepare = threads, prepare
        self._batches = iter(batches)
        self._start()

    def take(self, items: Sequence[Item]) -> Any:
        """A batch: the one that is prepared, if it is the one whose turn it is."""
        expected = self._batch
        if (
            expected is None
            or len(items) != len(expected)
            or any(a is not b for a, b in zip(items, expected, strict=True))
        ):
            return self._prepare(items)
        ready = self._next.result()
        self._start()
        return ready

    def _start(self) -> None:
        self._batch = next(self._batches, None)
        if self._batch is not None:
            self._next: Future[Any] = self._threads.submit(self._prepare, self._batch)


def prefetched(threads: ThreadPoolExecutor, values: Iterator[T]) -> Iterator[T]:
    """The values of an iterator, the next one being made in a thread meanwhile.

    Example:
        >>> list(prefetched(ThreadPoolExecutor(1), iter("abc")))
        ['a', 'b', 'c']
    """
    end: Any = object()
    waiting = threads.submit(next, values, end)
    while (value := waiting.result()) is not end:
        waiting = threads.submit(next, values, end)
        yield value


def image_settings(kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a call says of images, as sentence-transformers passes it."""
    return (kwargs.get("processing_kwargs") or {}).get("image")


def pixel_settings(processor: PlumeProcessor | None, max_pixels: int | None) -> dict[str, Any]:
    """What a call of `encode` is told where larger images are to be reduced to a number of pixels; None: nothing.

    Raises:
        ValueError: the number is below what smaller images are enlarged to.
    """
    if max_pixels is None or processor is None:
        return {}
    least, _ = processor.limits.pixels  # type: ignore[misc]
    if max_pixels < least:
        raise ValueError(f"max_pixels is {max_pixels:,}, and smaller images are enlarged to {least:,}; raise it")
    return {"processing_kwargs": {"image": {"size": {"shortest_edge": least, "longest_edge": max_pixels}}}}


def limits_of(processor: PlumeProcessor, kwargs: Mapping[str, Any]) -> MediaLimits:
    """How large media may be in a call: the checkpoint's limits, but for what the call says.

    Raises:
        ValueError: it says something else than the size of images.
    """
    settings = kwargs.get("processing_kwargs") or {}
    if set(settings) - {"image"} or set(settings.get("image") or {}) - {"size"}:
        raise ValueError(
            f'processing_kwargs={settings!r}: only {{"image": {{"size": ...}}}} can be set for a call; texts are '
            "cut with truncate=True and max_seq_length, and frames are set in the configuration or in the input"
        )
    size = (image_settings(kwargs) or {}).get("size")
    return replace(processor.limits, pixels=(size["shortest_edge"], size["longest_edge"])) if size else processor.limits


def converted(
    vectors: Any, single: bool, precision: Any, as_tensor: bool, as_numpy: bool
) -> torch.Tensor | np.ndarray | list[torch.Tensor]:
    """Vectors in the precision and the form that a call asks for; of a single input without the first axis."""
    if precision != "float32" and len(vectors):
        vectors = quantize_embeddings(vectors, precision=precision)
    if as_tensor:
        vectors = torch.as_tensor(vectors)
    elif as_numpy:
        vectors = vectors.numpy() if isinstance(vectors, torch.Tensor) else vectors
    else:
        vectors = list(torch.as_tensor(vectors))
    return vectors[0] if single else vectors
