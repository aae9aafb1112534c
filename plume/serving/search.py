"""An index behind the server: what the search page asks for.

The index is read and never written. What a client gets of a row is an id that nobody can make up, and that ends with
the process: with it, and without anything else, it may see the row's thumbnail and open its file, if that still lies
below the folder that was indexed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from plume.checkpoints.fingerprint import fingerprint
from plume.embedder.plume import Plume
from plume.inputs.file_kinds import Kind
from plume.search.filter import Filter
from plume.search.index import Index
from plume.search.query import Compiled
from plume.search.ranking import Hit
from plume.search.store import TABLES, IndexStorageError
from plume.serving.batcher import Entry
from plume.serving.errors import RequestError, wrong
from plume.serving.requests import Asked, Request, read_one_input
from plume.serving.service import Held, Service, cut
from plume.space.cutoff import LEAST_SAMPLE
from plume.tracing.trace import Trace

#: Of a search.
MOST_HITS, MOST_PASSED = 100, 1_000
_LONGEST_PATH = 4_096
#: What a browser may show; whatever else is indexed is given to be saved.
_SHOWN = {
    **dict.fromkeys((".txt", ".md", ".rst"), "text/plain; charset=utf-8"),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "image/jpeg"),
    **{f".{kind}": f"image/{kind}" for kind in ("png", "gif", "webp", "avif", "bmp")},
    **{".pdf": "application/pdf", ".mp4": "video/mp4", ".m4v": "video/mp4", ".webm": "video/webm"},
}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What is searched for.

    query: an input; like: the id of a row instead, whose neighbours are wanted.
    top_k: rows to return, after the first `offset`. num_latent_steps: None takes the index's K of queries.
    wants_steps: whether to tell what each latent step did.
    """

    query: Asked | None = None
    like: str | None = None
    filter: Filter = field(default_factory=Filter)
    hybrid: float = 0.0
    cut: Literal["auto", "drop"] | None = None
    group_by: Literal["file"] | None = None
    top_k: int = 24
    offset: int = 0
    num_latent_steps: int | None = None
    wants_steps: bool = False


def read_search(body: Mapping[str, Any]) -> SearchRequest:
    """The body of `/search`.

    Raises:
        RequestError: names the field.
    """
    query, like = body.get("query"), body.get("like")
    if (query is None) == (like is None):
        raise wrong('expected one of "query" and "like"', "query")
    if like is not None and not isinstance(like, str):
        raise wrong("expected the id of a result", "like")
    kinds = body.get("kinds") or []
    if not isinstance(kinds, list) or len(kinds) > len(Kind) or not all(isinstance(kind, str) for kind in kinds):
        raise wrong("expected a list of kinds, each of them once", "kinds")
    folder = body.get("folder") or ""
    if not isinstance(folder, str) or len(folder) > _LONGEST_PATH or not _is_unicode(folder):
        raise wrong("expected the path of a folder", "folder")
    try:
        rows = Filter(kinds=tuple(kinds), folder=folder, since=_day(body, "since"), until=_day(body, "until"))
    except ValueError as error:
        raise wrong("there is no such kind; expected text, image, video or pdf", "kinds") from error
    hybrid = body.get("hybrid", 0)
    if isinstance(hybrid, bool) or not isinstance(hybrid, (int, float)) or not 0 <= hybrid <= 1:
        raise wrong("expected the weight of words, from 0 to 1", "hybrid")
    cut, group_by = body.get("cut"), body.get("group_by")
    if cut not in (None, "auto", "drop"):
        raise wrong('expected "auto" or "drop"', "cut")
    if cut == "drop" and hybrid:
        raise wrong('"drop" looks at one order of scores, and words give a second; expected "auto"', "cut")
    if group_by not in (None, "file"):
        raise wrong('expected "file"', "group_by")
    steps = body.get("num_latent_steps")
    return SearchRequest(
        query=None if query is None else read_one_input(query, "query"),
        like=like,
        filter=rows,
        hybrid=float(hybrid),
        cut=cut,
        group_by=group_by,
        top_k=_whole(body, "top_k", 24, 1, MOST_HITS),
        offset=_whole(body, "offset", 0, 0, MOST_PASSED),
        num_latent_steps=None if steps is None else _whole(body, "num_latent_steps", 0, 0, 2**31),
        wants_steps=body.get("steps") is True,
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise wrong(f"expected a whole number from {least:,} to {most:,}", name)
    return value


def _day(body: Mapping[str, Any], name: str) -> date | None:
    value = body.get(name)
    if value in (None, ""):
        return None
    with suppress(ValueError, TypeError):
        return date.fromisoformat(value)
    raise wrong("expected a day, such as 2026-01-31", name)


class Searcher:
    """What the routes of the page call; `open` comes first."""

    def __init__(self, path: Path):
        """Take note of an index; nothing is opened.

        Args:
            path: the folder of the index.
        """
        self.path = path
        self._secret = secrets.token_bytes(32)
        self._index: Index | None = None

    def open(self, plume: Plume) -> None:
        """Open the index.

        Args:
            plume: whose vectors must be those of the index, or begin with them.

        Raises:
            ValueError: there is no index, or another checkpoint has made it.
        """
        index = Index.open(self.path)
        made, dim = index.identity, plume.plume_config.hidden_size
        found = replace(made, model=plume.source, fingerprint=fingerprint(plume.plume_model), dim=min(made.dim, dim))
        made.check_same(found, self.path)
        self._index = index

    @property
    def index(self) -> Index:
        """The index.

        Raises:
            RequestError: it is not open yet.
        """
        if self._index is None:
            raise RequestError(503, "the index is being opened", retry_after=5)
        return self._index

    async def search(
        self, service: Service, connection: Hashable, request: SearchRequest, gone: asyncio.Future[Any], held: Held
    ) -> dict[str, Any] | None:
        """What was found; None where the client has gone meanwhile.

        Raises:
            RequestError: it cannot be searched for.
        """
        identity, traced = self.index.identity, None
        steps = identity.query_latent_steps if request.num_latent_steps is None else request.num_latent_steps
        if request.like is not None:
            like = request.like
            vector = (await self.read(service, lambda: self.row(like))).vector
        else:
            assert request.query is not None
            asked = Request(
                inputs=[request.query],
                num_latent_steps=steps,
                side="query",
                instruction=identity.query_instruction,
                max_pixels=identity.max_pixels,
            )
            entries = await service.decoded(asked, gone, held)
            if entries is None:
                return None
            if request.wants_steps:
                (one,) = entries
                entries.append(Entry(one.item, one.num_tokens, replace(one.how, is_traced=True)))
            found = await service.results(connection, entries, [request.query] * len(entries), gone)
            if found is None:
                return None
            (vector, *traced) = found
            vector = cut(vector[None], identity.dim)[0]
        vector = vector / np.linalg.norm(vector)
        parts = () if request.query is None else request.query.parts
        words = " ".join(part.value for part in parts if part.kind == "text")
        if request.hybrid and not self.index.store.has_texts:
            raise wrong(
                "the index was made before texts were kept; run `plume index` again, which embeds nothing", "hybrid"
            )

        if request.cut == "auto" and 0 < len(self.index) < LEAST_SAMPLE:
            raise wrong(f"the index has fewer than {LEAST_SAMPLE} rows, too few to say what stands out", "cut")

        def look() -> dict[str, Any]:
            hits = self.index.nearest(
                Compiled.of(vector),
                top_k=request.top_k,
                offset=request.offset,
                filter=request.filter,
                text=words,
                hybrid=request.hybrid,
                cut=request.cut,
                group_by=request.group_by,
            )
            return {
                "hits": [self._told(hit) for hit in hits],
                "num_latent_steps": None if request.query is None else steps,
                "steps": _steps(traced[0], vector, hits) if traced else None,
            }

        with service.metrics.seconds.labels("search").time():
            return await self.read(service, look)

    async def read(self, service: Service, work: Callable[[], T]) -> T:
        """Read from the index in a thread.

        Raises:
            RequestError: it cannot be read.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(service.readers, work)
        except IndexStorageError as error:
            raise RequestError(503, "the index cannot be read at the moment", retry_after=5) from error

    def about(self) -> dict[str, Any]:
        """What is in the index, and how it was made."""
        index = self.index
        kinds: dict[str, int] = {}
        folders: dict[str, int] = {}
        for (kind, root), count in sorted(index.store.counts("kind", "root").items()):
            kinds[kind] = kinds.get(kind, 0) + count
            folders[root] = folders.get(root, 0) + count
        return {
            "rows": sum(kinds.values()),
            "kinds": kinds,
            "folders": folders,
            "num_latent_steps": index.identity.num_latent_steps,
            "query_latent_steps": index.identity.query_latent_steps,
        }

    def row(self, name: str) -> Hit:
        """The row of an id.

        Raises:
            RequestError: there is none, or not any more.
        """
        number, _, _ = name.partition("-")
        hit = self.index.row(int(number)) if number.isascii() and number.isdigit() and len(number) < 20 else None
        if hit is None or not hmac.compare_digest(self._name(hit).encode(), name.encode("utf-8", "replace")):
            raise RequestError(404, "there is no such result any more; search again")
        return hit

    def file(self, name: str) -> tuple[Path, str, str | None]:
        """The file of an id, what it is called, and its type where a browser may show it.

        Raises:
            RequestError: it is gone, or does not lie below the folder that was indexed.
        """
        hit = self.row(name)
        try:
            path, root = Path(hit.path).resolve(strict=True), Path(hit.root).resolve(strict=True)
        except OSError:
            path = root = Path(hit.path)
        if root not in path.parents or not path.is_file():
            raise RequestError(404, "the file is not there any more")
        called = Path(hit.path)
        return path, called.name, _SHOWN.get(called.suffix.lower())

    def _name(self, hit: Hit) -> str:
        """The id of a row, which holds until the index is compacted."""
        said = f"{hit.row}\0{hit.path}\0{hit.page}\0{hit.changed}"
        return f"{hit.row}-{hmac.new(self._secret, said.encode(), hashlib.sha256).hexdigest()[:32]}"

    def _told(self, hit: Hit) -> dict[str, Any]:
        return {
            **hit.to_dict(),
            "id": self._name(hit),
            "name": hit.path.rpartition("/")[2],
            "changed": datetime.fromtimestamp(hit.changed, UTC).date().isoformat() if hit.changed else None,
            "has_thumbnail": bool(hit.thumbnail),
            "is_there": hit.is_there,
            "has_file": hit.is_there and not hit.root.startswith(TABLES),
        }


def _steps(traced: Trace, vector: np.ndarray, hits: list[Hit]) -> list[dict[str, Any]]:
    """What each state is near to: words, the vector `[dim]` that searched, and the rows that were found."""
    states = cut(traced.states.numpy(), len(vector))
    states = states / np.linalg.norm(states, axis=1, keepdims=True)
    rows = np.stack([hit.vector / np.linalg.norm(hit.vector) for hit in hits]) if hits else np.empty((0, len(vector)))
    return [
        {
            "words": [{"token": token, "probability": chance} for token, chance in traced.words[step]],
            "experts": traced.experts[step - 1].tolist() if step and traced.experts is not None else [],
            "cosine_to_embedding": float(states[step] @ vector),
            "cosine_to_hits": (states[step] @ rows.T).tolist(),
        }
        for step in range(len(traced.states))
    ]


def is_own_name(host: str) -> bool:
    """Whether a `Host` header names this machine by a number, or as localhost.

    Only names can be made to lead here by a page elsewhere (DNS rebinding), which could then read what is indexed.

    Example:
        >>> is_own_name("127.0.0.1:8000"), is_own_name("[::1]"), is_own_name("kite.example:8000")
        (True, True, False)
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    name = name.strip("[]")
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
