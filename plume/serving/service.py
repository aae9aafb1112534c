"""A checkpoint behind a queue: from what a request asks for to vectors, with everything that may go wrong between."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from plume.embedder.encode import image_settings, limits_of, pixel_settings
from plume.embedder.plume import Plume
from plume.inputs.errors import InputError
from plume.inputs.item import Item, MediaLimits, check_unicode
from plume.inputs.processor import PlumeProcessor
from plume.serving.batcher import Batcher, BrokenVectorError, Entry, FatalError, How, QueueFullError
from plume.serving.errors import RequestError, wrong
from plume.serving.fetch import Fetcher
from plume.serving.media import Ceilings, VideoDecoder, content_of, decode_image, is_address
from plume.serving.metrics import Metrics
from plume.serving.requests import Asked, Part, Request, Side
from plume.tracing.trace import Trace, trace

State = Literal["loading", "ready", "leaving", "draining", "failed"]
"""Of a server; "leaving" takes requests still, while whoever asks whether it is ready sends no more."""

#: Bytes of a body, and inputs and characters of texts, that are read faster than a thread is told to.
SHORT_BODY, _FEW_INPUTS, _FEW_CHARACTERS = 16_384, 16, 4_096
#: Addresses that are fetched at once.
_FETCHES = 8

_log = logging.getLogger("plume.serving")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a server.

    model: a folder or a Hub name. served_as: what clients call it. device: None takes the best that there is.
    input_type: the side of inputs whose request does not say; None leaves it open, where that is possible.
    does_rank: whether documents are put in order by their cosines to a query, as `/rerank` of other servers does.
    allowed_media_domains: hosts that media may be fetched from; none: no address is opened.
    dimensions: lengths below the model's that vectors may be cut to.
    max_batch_size, max_batch_tokens: of a pass; max_queue_tokens: that may wait.
    vector_cache_bytes: memory for vectors of inputs that come again.
    max_body_bytes: of a request; max_pending_bytes: of all that are being read or decoded.
    num_decoders: threads that read requests. body_seconds: that a client may take to send one.
    stuck_seconds: of a batch, after which the server counts as dead.
    api_key: that requests must bear; None: none.
    """

    model: str
    served_as: str = ""
    device: str | None = None
    input_type: Side | None = None
    does_rank: bool = False
    allowed_media_domains: tuple[str, ...] = ()
    dimensions: tuple[int, ...] = ()
    max_batch_size: int = 32
    max_batch_tokens: int = 32_768
    max_queue_tokens: int = 262_144
    vector_cache_bytes: int = 0
    max_body_bytes: int = 50_000_000
    max_pending_bytes: int = 400_000_000
    num_decoders: int = 4
    body_seconds: float = 30.0
    stuck_seconds: float = 120.0
    api_key: str | None = field(default=None, repr=False)
    ceilings: Ceilings = field(default_factory=Ceilings)

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_as or self.model.rstrip("/").rpartition("/")[2] or self.model


@dataclass(frozen=True)
class Answer:
    """vectors: of the inputs, `[N, D]`, float32. num_tokens: of all inputs."""

    vectors: np.ndarray
    num_tokens: int


class Held:
    """Bytes of a request that are in memory, counted while they come; of the event loop alone."""

    def __init__(self, service: Service):
        self._service = service
        self.size = 0

    def add(self, count: int) -> None:
        """Count some more.

        Raises:
            RequestError: too many are in memory, of all requests together.
        """
        service = self._service
        if service.pending_bytes + count > service.settings.max_pending_bytes:
            service.metrics.rejected.labels("pending bytes").inc()
            raise RequestError(429, "too many requests are being read; try again later", retry_after=1)
        service.pending_bytes += count
        self.size += count


class Service:
    """What the routes call.

    Example:
        >>> service = Service(Settings(model=str(getfixture("plume_folder")), device="cpu"))
        >>> service.load()
        >>> service.state
        'ready'
        >>> service.close()
    """

    def __init__(self, settings: Settings, on_load: Callable[[Plume], None] | None = None):
        """Make what needs no model.

        Args:
            settings: of the server.
            on_load: told of the model once it is there, before requests are taken; its errors end the server.
        """
        self.settings = settings
        self._on_load = on_load
        self.state: State = "loading"
        self.metrics = Metrics()
        self.decoders = ThreadPoolExecutor(settings.num_decoders, thread_name_prefix="plume-decode")
        self.videos = VideoDecoder(settings.ceilings)
        self.fetcher = Fetcher(settings.allowed_media_domains)
        self.fetchers = ThreadPoolExecutor(_FETCHES, thread_name_prefix="plume-fetch")
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="plume-index")  # which wait for disks
        self.video_threads = ThreadPoolExecutor(1, thread_name_prefix="plume-video")  # so that texts go on meanwhile
        self.pending_bytes = self.in_flight = 0
        self._plume: Plume | None = None
        self._batcher: Batcher | None = None

    # What runs once.

    def load(self) -> None:
        """Open the checkpoint, embed one text and one image, so that what is made lazily is there, and be ready."""
        settings = self.settings
        try:
            plume = Plume(settings.model, device=settings.device, vector_cache_bytes=settings.vector_cache_bytes)
            if unknown := [dim for dim in settings.dimensions if not 1 <= dim <= plume.plume_config.hidden_size]:
                raise ValueError(f"vectors of {unknown[0]} numbers cannot be cut from {plume.plume_config.hidden_size}")
            from PIL import Image

            plume.encode(["a red kite"], show_progress_bar=False, task=settings.input_type or "query")
            plume.encode([Image.new("RGB", (56, 56), "red")], show_progress_bar=False, task="document")
            if self._on_load is not None:
                self._on_load(plume)
        except Exception:
            self.state = "failed"
            raise
        self._plume = plume
        self._batcher = batcher = Batcher(
            self._encode,
            max_batch_size=settings.max_batch_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_queue_tokens=settings.max_queue_tokens,
            observe=lambda batch, seconds: self.metrics.see_batch(batch, seconds, time.monotonic() - seconds),
            stop=self._fail,
        )
        watch = self.metrics.watch
        watch("plume_queue_tokens", "Tokens that wait", lambda: batcher.queue_tokens)
        watch("plume_queue_inputs", "Inputs that wait", lambda: batcher.queue_inputs)
        watch("plume_pending_bytes", "Bytes of requests that are being read", lambda: self.pending_bytes)
        watch("plume_resident_bytes", "Memory of the process", resident_bytes)
        if (cache := plume.vector_cache) is not None:
            watch("plume_vector_cache_hits", "Inputs whose vector was remembered", lambda: cache.num_hits)
        if (engine := plume.engine) is not None:
            watch("plume_graph_captures", "CUDA graphs that were captured", lambda: engine.num_captures)
        if self.state == "loading":
            self.state = "ready"

    def leave(self) -> None:
        """Be not ready any more; requests are still taken."""
        if self.state in ("loading", "ready"):
            self.state = "leaving"

    def drain(self) -> None:
        """Take no more requests; those that have been taken are answered."""
        if self.state != "failed":
            self.state = "draining"

    def close(self, timeout: float | None = None) -> None:
        """Answer what waits, and end all threads and processes."""
        self.drain()
        if self._batcher is not None:
            self._batcher.close(timeout)
        for threads in (self.decoders, self.fetchers, self.readers, self.video_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self.videos.close()

    def _fail(self) -> None:
        self.state = "failed"

    # What may be asked at any time.

    @property
    def plume(self) -> Plume:
        """The model.

        Raises:
            RequestError: it is not there yet, or not any more.
        """
        if self.state in ("ready", "leaving") and self._plume is not None:
            return self._plume
        told = {"loading": "the model is being loaded", "draining": "the server is being stopped"}
        self.metrics.rejected.labels(self.state).inc()
        raise RequestError(503, told.get(self.state, "the server has failed"), retry_after=5)

    @property
    def batcher(self) -> Batcher:
        """The queue of a model that is there."""
        assert self._batcher is not None
        return self._batcher

    @property
    def is_alive(self) -> bool:
        """Whether work gets done; True while loading."""
        if self.state == "failed":
            return False
        batcher = self._batcher
        return batcher is None or (batcher.is_alive and batcher.busy_seconds() < self.settings.stuck_seconds)

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self.in_flight

    @contextmanager
    def taking(self) -> Iterator[Held]:
        """A request that is taken, from its body to its answer.

        Raises:
            RequestError: none is taken now.
        """
        _ = self.plume
        held = Held(self)
        self.in_flight += 1
        try:
            yield held
        finally:
            self.in_flight -= 1
            self.pending_bytes -= held.size

    # What a request goes through.

    async def answer(
        self, connection: Hashable, request: Request, gone: asyncio.Future[Any], held: Held
    ) -> Answer | None:
        """Vectors of the inputs of a request; None where its client has gone meanwhile.

        Args:
            connection: whose turn it takes in the queue.
            request: as it was read.
            gone: is done when the client has gone.
            held: counts what is in memory.

        Raises:
            RequestError: it cannot be answered.
        """
        entries = await self.decoded(request, gone, held)
        found = None if entries is None else await self.results(connection, entries, request.inputs, gone)
        if entries is None or found is None:
            return None
        vectors = np.stack(found).astype(np.float32, copy=False)
        return Answer(cut(vectors, request.dimensions), sum(entry.num_tokens for entry in entries))

    async def results(
        self, connection: Hashable, entries: Sequence[Entry], inputs: Sequence[Asked], gone: asyncio.Future[Any]
    ) -> list[Any] | None:
        """What the encode thread makes of some entries; None where the client has gone meanwhile.

        Args:
            connection: whose turn they take in the queue.
            entries: which wait, all or none.
            inputs: what each of them comes from, for errors to name.
            gone: is done when the client has gone.

        Raises:
            RequestError: the queue is full, or one of them cannot be embedded.
        """
        batcher = self.batcher
        try:
            job = batcher.submit(connection, entries)
        except QueueFullError as error:
            self.metrics.rejected.labels("queue full").inc()
            if error.seconds is None:
                most = batcher.max_queue_tokens // 2
                raise RequestError(413, f"a request may hold {most:,} tokens; send fewer inputs at once") from None
            raise RequestError(429, "the queue is full; try again later", retry_after=error.seconds) from None
        except FatalError as error:
            raise self._refusal(error, "") from None
        waiting = asyncio.wrap_future(job.future)
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                return None
            results = waiting.result()
        finally:
            if not job.future.done():  # this request was cancelled
                self.metrics.cancelled.inc(batcher.drop(job))
            waiting.cancel()
        for asked, result in zip(inputs, results, strict=True):
            if isinstance(result, BaseException):
                raise self._refusal(result, asked.param)
        self.metrics.latent_steps.inc(sum(self._steps(how) * n for how, n in Counter(e.how for e in entries).items()))
        return results

    async def decoded(self, request: Request, gone: asyncio.Future[Any], held: Held) -> list[Entry] | None:
        """The inputs of a request, ready to wait; None where the client has gone meanwhile.

        Raises:
            RequestError: one of them cannot be embedded, or is too large.
        """
        if _is_short(request):
            with self._timed("decode"):
                self._check_number(request)
                return self._entries(request)
        decoded = asyncio.ensure_future(self._decoded(request, held))
        await asyncio.wait({decoded, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not decoded.done():
            decoded.cancel()
            return None
        return decoded.result()

    async def _decoded(self, request: Request, held: Held) -> list[Entry]:
        """The inputs of a request, fetched and decoded in threads; those with video in a thread of their own."""
        with self._timed("decode"):
            self._check_number(request)
            request = await self._fetched(request, held)
            has_video = any(part.kind == "video" for asked in request.inputs for part in asked.parts)
            threads = self.video_threads if has_video else self.decoders
            return await asyncio.get_running_loop().run_in_executor(threads, self._entries, request)

    async def _fetched(self, request: Request, held: Held) -> Request:
        """The request with the content of media that it says the address of."""
        parts = [part for asked in request.inputs for part in asked.parts if part.kind != "text"]
        if not any(is_address(part.value) for part in parts):
            return request
        loop, ceilings = asyncio.get_running_loop(), self.settings.ceilings
        most = {"image": ceilings.image_bytes, "video": ceilings.video_bytes}

        async def fetched(part: Part) -> Part:
            if part.kind == "text" or not is_address(part.value):
                return part
            fetch, url = self.fetcher.fetch, part.value.strip()
            content = await loop.run_in_executor(self.fetchers, fetch, url, most[part.kind], part.param)
            held.add(len(content))
            return replace(part, value=content)

        with self._timed("fetch"):
            inputs = [
                replace(asked, parts=tuple(await asyncio.gather(*map(fetched, asked.parts))))
                for asked in request.inputs
            ]
        return replace(request, inputs=inputs)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.metrics.seconds.labels(stage).observe(time.monotonic() - began)

    def _check_number(self, request: Request) -> None:
        ceilings = self.settings.ceilings
        if len(request.inputs) > ceilings.inputs:
            raise RequestError(413, f"a request may hold {ceilings.inputs:,} inputs", "input")
        parts = [part for asked in request.inputs for part in asked.parts]
        if sum(part.kind != "text" for part in parts) > ceilings.media:
            raise RequestError(413, f"a request may hold {ceilings.media:,} images and videos", "input")
        if sum(part.kind == "video" for part in parts) > ceilings.videos:
            raise RequestError(413, f"a request may hold {ceilings.videos:,} videos", "input")
        length = sum(len(part.value) for part in parts if part.kind == "text")
        length += sum(len(asked.instruction or request.instruction) for asked in request.inputs)
        if length > ceilings.request_characters:
            raise RequestError(413, f"a request may hold {ceilings.request_characters:,} characters of text", "input")

    def _steps(self, how: How) -> int:
        """K of an input; of one whose gate decides, 0."""
        assert self._plume is not None
        steps = how.num_latent_steps
        return (self._plume.default_steps(how.side or "query") if steps is None else steps) or 0

    def _entries(self, request: Request) -> list[Entry]:
        """Inputs, checked, decoded and counted.

        Raises:
            RequestError: what is wrong with the request, or with which of its inputs.
        """
        plume = self._plume
        assert plume is not None
        config = plume.plume_config
        if request.model not in (None, "", self.settings.name, self.settings.model):
            raise RequestError(404, f"there is no such model; this server has {self.settings.name!r}", "model")
        self._check_dimensions(request, plume)
        sides = [asked.side or request.side or self.settings.input_type for asked in request.inputs]
        if request.num_latent_steps is not None:
            try:
                config.check_num_latent_steps(request.num_latent_steps)
            except ValueError:
                raise wrong(
                    f"this model takes at most {config.max_latent_steps} latent steps", "num_latent_steps"
                ) from None
        elif None in sides and config.document_steps() != config.num_latent_steps:
            raise wrong('queries and documents differ here; say input_type "query" or "document"', "input_type")
        processor = plume.plume_model.processor
        assert processor is not None
        limits = limits_of(processor, pixel_settings(processor, request.max_pixels))
        items = [self._item(asked, request.instruction, processor, limits) for asked in request.inputs]
        return [
            Entry(item, length, How(request.num_latent_steps, side, request.max_pixels))
            for item, length, side in zip(items, processor.exact_lengths(items), sides, strict=True)
        ]

    def _item(self, asked: Asked, instruction: str, processor: PlumeProcessor, limits: MediaLimits) -> Item:
        ceilings = self.settings.ceilings
        content: list[Any] = []
        instruction = asked.instruction or instruction
        length = len(instruction) + sum(len(part.value) for part in asked.parts if part.kind == "text")
        if length > ceilings.text_characters:
            raise RequestError(413, f"an input may hold {ceilings.text_characters:,} characters", asked.param)
        for part in asked.parts:
            if part.kind == "text":
                content += [part.value] if part.value else []
            elif part.kind == "image":
                raw = content_of(part.value, ceilings.image_bytes, part.param)
                content.append(decode_image(raw, ceilings, limits, part.param))
            else:
                raw = content_of(part.value, ceilings.video_bytes, part.param)
                own, most = limits.sampling, ceilings.video_frames
                sampling = replace(own, num_frames=min(own.num_frames, most), max_frames=min(own.max_frames, most))
                content.append(self.videos.decode(raw, sampling, limits.background, part.param))
        item = Item(tuple(content), instruction)
        try:
            for text in (*(part for part in content if isinstance(part, str)), item.instruction):
                check_unicode(text, asked.param)
            if item.is_empty and not limits.takes_empty:
                raise wrong("an input is empty", asked.param)
            return processor.fit(item, asked.param)
        except InputError as error:  # its reasons speak of lengths, not of content
            raise wrong(error.reason, asked.param) from None

    def _check_dimensions(self, request: Request, plume: Plume) -> None:
        whole = plume.get_embedding_dimension()
        wanted = whole if request.dimensions is None else request.dimensions
        if wanted != whole and wanted not in self.settings.dimensions:
            lengths = ", ".join(map(str, (whole, *self.settings.dimensions)))
            raise wrong(f"vectors of this model have {lengths} numbers", "dimensions")
        if wanted % 8 and {"binary", "ubinary"} & set(request.encodings):
            raise wrong("bits are packed by eight, which the length of these vectors is no multiple of", "dimensions")

    def _encode(self, items: Sequence[Item], how: How) -> np.ndarray | list[Trace]:
        assert self._plume is not None
        settings = pixel_settings(self._plume.plume_model.processor, how.max_pixels)
        if how.is_traced:
            return trace(
                self._plume.plume_model,
                list(items),
                num_latent_steps=how.num_latent_steps,
                images_kwargs=image_settings(settings),
            )
        return self._plume.encode(
            list(items),
            num_latent_steps=how.num_latent_steps,
            task=how.side,
            batch_size=len(items),
            max_tokens_per_batch=2**62,  # the queue has seen to it
            show_progress_bar=False,
            **settings,
        )

    def _refusal(self, error: BaseException, param: str) -> RequestError:
        if isinstance(error, InputError):
            return wrong(error.reason, param)
        if isinstance(error, FatalError):
            return RequestError(503, "the server has failed", retry_after=30)
        _log.error("an input could not be embedded: %s", type(error).__name__, exc_info=error)
        told = str(error) if isinstance(error, BrokenVectorError) else "an input could not be embedded"
        return RequestError(500, told, param)


def _is_short(request: Request) -> bool:
    """Whether a request holds a few short texts, which are counted at once."""
    parts = [part for asked in request.inputs for part in asked.parts]
    if len(parts) > _FEW_INPUTS or any(part.kind != "text" for part in parts):
        return False
    length = sum(len(part.value) for part in parts)
    length += sum(len(asked.instruction or request.instruction) for asked in request.inputs)
    return length <= _FEW_CHARACTERS


def cut(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The beginnings of unit vectors `[N, D]`, of unit length again."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    short = vectors[:, :dimensions]
    return short / np.linalg.norm(short, axis=1, keepdims=True)


def resident_bytes() -> float:
    """Memory that this process has."""
    import psutil

    return float(psutil.Process().memory_info().rss)
