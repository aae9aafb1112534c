"""The routes: requests of several APIs in, vectors in their shapes out."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import FileResponse, Response
from starlette.requests import ClientDisconnect

from plume.serving.errors import RequestError
from plume.serving.requests import Ranking, Request, read_cohere, read_json, read_openai, read_ranking, read_tei
from plume.serving.service import SHORT_BODY, Answer, Held, Service
from plume.version import __version__

if TYPE_CHECKING:
    from plume.serving.search import Searcher

_access = logging.getLogger("plume.serving.access")

#: What anybody may get: a supervisor needs no key, nor does the page, which asks for it; it holds nothing of an index.
OPEN = ("/health", "/ready", "/", "/page.js")
#: What the id of a result opens.
_SIGNED = re.compile(r"/search/[0-9]+-[0-9a-f]{32}/(thumbnail|file)")
_PAGE = Path(__file__).parent / "page"
#: Of whatever a browser shows.
_GUARDS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
_FILE_POLICY = "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; sandbox"
#: For threads to end.
_CLOSE_S = 5.0

Read = Callable[[Mapping[str, Any]], Request]
Write = Callable[[Request, Answer], Any]


def make_app(service: Service, on_start: Callable[[], None] | None = None, searcher: Searcher | None = None) -> FastAPI:
    """The application.

    Args:
        service: answers.
        on_start: called in the event loop once it runs, for example to begin loading.
        searcher: of the search page; None: there is none.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if on_start is not None:
            on_start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close, _CLOSE_S)

    app = FastAPI(title="plume", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service)
    model = service.settings.name

    async def embed(request: HTTPRequest, read: Read, write: Write) -> Response:
        return await _answered(service, request, read, service.answer, write)

    @app.post("/v1/embeddings", openapi_extra=_body("input"))
    @app.post("/embeddings", include_in_schema=False)
    async def openai_embeddings(request: HTTPRequest) -> Response:
        return await embed(request, read_openai, lambda asked, answer: _as_openai(asked, answer, model))

    @app.post("/v2/embed", openapi_extra=_body("texts"))
    async def cohere_embed(request: HTTPRequest) -> Response:
        return await embed(request, read_cohere, _as_cohere)

    @app.post("/embed", openapi_extra=_body("inputs"))
    @app.post("/", include_in_schema=False)
    async def tei_embed(request: HTTPRequest) -> Response:
        return await embed(request, read_tei, lambda _, answer: answer.vectors)

    if service.settings.does_rank:

        @app.post("/v1/rerank", openapi_extra=_body("documents"))
        @app.post("/v2/rerank", include_in_schema=False)
        @app.post("/rerank", include_in_schema=False)
        async def rerank(request: HTTPRequest) -> Response:
            async def work(connection: str, asked: Ranking, gone: Any, held: Held) -> Answer | None:
                return await service.answer(connection, asked.request, gone, held)

            return await _answered(service, request, read_ranking, work, _as_ranking)

    about = {"id": model, "object": "model", "created": 0, "owned_by": "plume"}

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != model:
            raise RequestError(404, f"there is no such model; this server has {model!r}", "model")
        return _json(about)

    @app.get("/info")
    async def info() -> Response:
        plume = service.plume
        return _json(
            {
                "model_id": model,
                "model_sha": plume.fingerprint,
                "model_dtype": str(plume.plume_model.dtype).removeprefix("torch."),
                "max_input_length": plume.max_seq_length,
                "max_batch_tokens": service.settings.max_batch_tokens,
                "max_client_batch_size": service.settings.ceilings.inputs,
                "version": __version__,
                "embedding_dimension": plume.get_embedding_dimension(),
                "dimensions": [plume.get_embedding_dimension(), *service.settings.dimensions],
                "num_latent_steps": {side: plume.default_steps(side) for side in ("query", "document")},
                "max_latent_steps": plume.plume_config.max_latent_steps,
                "rerank": "cosines of vectors, from -1 to 1" if service.settings.does_rank else None,
            }
        )

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return _json({"status": service.state}, 200 if service.is_alive else 503)

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        is_ready = service.state == "ready" and service.is_alive
        return _json({"status": service.state}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    if searcher is not None:
        _add_search(app, service, searcher)

    @app.exception_handler(RequestError)
    async def refused(_: HTTPRequest, error: RequestError) -> Response:
        return _json(error.body, error.status, error.headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(_: HTTPRequest, error: Any) -> Response:
        told = RequestError(error.status_code, "there is no such route, or not by this method")
        return _json(told.body, told.status)

    @app.exception_handler(Exception)
    async def failed(_: HTTPRequest, error: Exception) -> Response:
        logging.getLogger("plume.serving").error("a request failed", exc_info=error)
        told = RequestError(500, "the server failed to answer this request")
        return _json(told.body, told.status)

    return app


def _add_search(app: FastAPI, service: Service, searcher: Searcher) -> None:
    """The search page and its routes."""
    from plume.serving.search import is_own_name, read_search

    html = (_PAGE / "index.html").read_bytes()
    style = base64.b64encode(hashlib.sha256(html.partition(b"<style>")[2].partition(b"</style>")[0]).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'self'; style-src 'sha256-{style}'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    def check_name(request: HTTPRequest) -> None:
        if service.settings.api_key is None and not is_own_name(request.headers.get("host", "")):
            raise RequestError(403, "without an API key the index is searched under localhost or an IP address alone")

    read = partial(searcher.read, service)
    shown: dict[str, Any] = {"methods": ["GET", "HEAD"], "include_in_schema": False}

    @app.api_route("/", **shown)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers={**_GUARDS, "Content-Security-Policy": policy})

    @app.api_route("/page.js", **shown)
    async def script() -> Response:
        return FileResponse(_PAGE / "page.js", media_type="text/javascript", headers=_GUARDS)

    @app.get("/search")
    async def about(request: HTTPRequest) -> Response:
        check_name(request)
        most = service.plume.plume_config.max_latent_steps
        with service.taking():
            return _json(await read(searcher.about) | {"max_latent_steps": most})

    @app.post("/search", openapi_extra=_body("query"))
    async def search(request: HTTPRequest) -> Response:
        check_name(request)
        work = partial(searcher.search, service)
        return await _answered(service, request, read_search, work, lambda _, answer: answer)

    @app.api_route("/search/{name}/thumbnail", **shown)
    async def thumbnail(request: HTTPRequest, name: str) -> Response:
        check_name(request)
        with service.taking():
            row = await read(lambda: searcher.row(name))
        headers = {**_GUARDS, "Cache-Control": "private, max-age=3600"}
        return Response(row.thumbnail, 200 if row.thumbnail else 404, headers, "image/jpeg")

    @app.api_route("/search/{name}/file", **shown)
    async def file(request: HTTPRequest, name: str) -> Response:
        check_name(request)
        with service.taking():
            path, called, kind = await read(lambda: searcher.file(name))
        headers = _GUARDS if kind == "application/pdf" else {**_GUARDS, "Content-Security-Policy": _FILE_POLICY}
        return _Taken(
            service,
            path,
            media_type=kind or "application/octet-stream",
            headers=headers,
            filename=called,
            content_disposition_type="inline" if kind else "attachment",
        )


class _Taken(FileResponse):
    """A file, which is under way until all of it has been sent."""

    def __init__(self, service: Service, path: Path, **settings: Any):
        super().__init__(path, **settings)
        self._service = service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._service.taking():
            await super().__call__(scope, receive, send)


async def _answered(
    service: Service,
    request: HTTPRequest,
    read: Callable[[Mapping[str, Any]], Any],
    work: Callable[..., Awaitable[Any]],
    write: Callable[[Any, Any], Any],
) -> Response:
    """The body of a request, read, worked on and written as JSON; 499 where the client has gone meanwhile."""
    with service.taking() as held:  # 503 where there is no model, before the body is read
        body = await _read_body(service, request, held)
        gone = asyncio.ensure_future(_gone(request))
        try:
            asked = await _read(service, body, read)
            answer = await work(_connection(request), asked, gone, held)
            return Response(status_code=499) if answer is None else _json(write(asked, answer))
        finally:
            gone.cancel()


async def _read(service: Service, body: bytes, read: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What a body asks for; a long one is read in a thread, so that others need not wait for it."""
    if len(body) <= SHORT_BODY:
        return read(read_json(body))
    return await asyncio.get_running_loop().run_in_executor(service.decoders, lambda: read(read_json(body)))


async def _read_body(service: Service, request: HTTPRequest, held: Held) -> bytes:
    """The body, as long as it is neither too large nor too slow, whatever its headers say.

    Raises:
        RequestError: it is, or too many are being read.
    """
    settings = service.settings
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body_bytes:
                    raise RequestError(413, f"a request may hold {settings.max_body_bytes:,} bytes")
                held.add(len(part))
                parts.append(part)
    except TimeoutError:
        raise RequestError(408, "the request was not sent in time") from None
    except ClientDisconnect:
        raise RequestError(499, "the client has gone") from None
    return b"".join(parts)


async def _gone(request: HTTPRequest) -> None:
    """Returns when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _connection(request: HTTPRequest) -> str:
    client = request.client
    return f"{client.host}:{client.port}" if client else ""


def _as_openai(asked: Request, answer: Answer, model: str) -> dict[str, Any]:
    vectors = encoded(answer.vectors, asked.encodings[0])
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    usage = {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _as_cohere(asked: Request, answer: Answer) -> dict[str, Any]:
    texts = [part.value for one in asked.inputs for part in one.parts if part.kind == "text"]
    return {
        "id": f"{time.time_ns():x}",
        "embeddings": {name: encoded(answer.vectors, name) for name in asked.encodings},
        "texts": texts,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": answer.num_tokens}},
        "response_type": "embeddings_by_type",
    }


def _as_ranking(asked: Ranking, answer: Answer) -> Any:
    """Documents by their cosine to the query, the nearest first; those of equal cosine as they were sent."""
    scores = answer.vectors[1:] @ answer.vectors[0]
    told = ("score", "text") if asked.is_tei else ("relevance_score", "document")
    order = np.argsort(-scores, kind="stable")[: asked.top_n]
    rows = [{"index": int(index), told[0]: float(scores[index])} for index in order]
    for row in rows if asked.documents is not None else ():
        document = asked.documents[row["index"]]  # type: ignore[index]
        row[told[1]] = {"text": document} if isinstance(document, str) and not asked.is_tei else document
    if asked.is_tei:
        return rows
    return {"id": f"{time.time_ns():x}", "results": rows, "usage": {"total_tokens": answer.num_tokens}}


def encoded(vectors: np.ndarray, encoding: str) -> list[Any]:
    """Vectors as an API writes them: numbers, base64 of little-endian float32, or signs packed by eight.

    Example:
        >>> encoded(np.array([[0.5, -0.5, 0.5, 0.5, -0.5, 0.0, 0.0, 0.0]], np.float32), "ubinary")[0].tolist()
        [183]
    """
    if encoding == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    if encoding in ("binary", "ubinary"):
        packed = np.packbits(vectors >= 0, axis=1)
        return list(packed if encoding == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8))
    return [np.ascontiguousarray(vector) for vector in vectors]


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    if isinstance(content, np.ndarray):
        content = np.ascontiguousarray(content)
    written = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(written, status, dict(headers or {}), "application/json")


def _body(field: str) -> dict[str, Any]:
    """What OpenAPI says of a body that the route reads itself."""
    schema = {"type": "object", "required": [field], "properties": {field: {}}}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class Gate:
    """Asks for the key, counts and logs; no middleware of Starlette's own, which would hide that a client has gone."""

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service
        key = service.settings.api_key
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection's request, as ASGI hands it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._may_pass(scope):
                await self.app(scope, receive, watched)
            else:
                told = RequestError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
                await _json(told.body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.service.metrics.requests.labels(route, str(status)).inc()
            milliseconds = round(1000 * (time.monotonic() - began), 1)
            _access.info(json.dumps({"route": route, "status": status, "milliseconds": milliseconds}))

    def _may_pass(self, scope: Any) -> bool:
        path, is_get = scope["path"], scope["method"] in ("GET", "HEAD")
        if self._expected is None or (is_get and (path in OPEN or _SIGNED.fullmatch(path))):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
