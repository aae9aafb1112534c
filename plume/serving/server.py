"""`plume serve`: one process, one model, one port."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn

from plume.serving.app import make_app
from plume.serving.service import Service, Settings

if TYPE_CHECKING:
    from plume.serving.search import Searcher

#: Between two looks at whether what waits has been answered.
_LOOK_S = 0.05


class Server(uvicorn.Server):
    """uvicorn's, which is told to stop in three steps: not ready, then nothing under way, then closed."""

    def __init__(self, config: uvicorn.Config, service: Service, notice_seconds: float, grace_seconds: float):
        super().__init__(config)
        self.service, self.notice_seconds, self.grace_seconds = service, notice_seconds, grace_seconds
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: Any = None) -> None:
        """Until a signal."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """At a signal; the second one does not wait."""
        leave, loop = partial(super().handle_exit, sig, frame), self._loop
        if loop is None or self.service.state in ("leaving", "draining", "failed"):
            leave()
            self.force_exit = self.service.state != "failed"
            return
        self.service.leave()
        loop.call_soon_threadsafe(lambda: loop.create_task(self._leave(leave)))

    async def _leave(self, leave: Any) -> None:
        await asyncio.sleep(self.notice_seconds)  # so that a proxy that asks /ready sends no more
        self.service.drain()
        end = time.monotonic() + self.grace_seconds
        while not self.service.is_idle and time.monotonic() < end:
            await asyncio.sleep(_LOOK_S)
        leave()


def serve(
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    notice_seconds: float = 0.0,
    grace_seconds: int = 60,
    searcher: Searcher | None = None,
) -> int:
    """Serve until a signal; returns the exit status.

    Args:
        settings: of the service.
        host: address to listen at; others than this machine's own let others in.
        port: 0 takes a free one, which is logged.
        notice_seconds: after a signal, in which `/ready` says 503 and requests are still taken.
        grace_seconds: for answers that are under way then.
        searcher: of the search page; None: there is none.
    """
    _log_as_json()
    service = Service(settings, None if searcher is None else searcher.open)
    config = uvicorn.Config(
        make_app(service, lambda: threading.Thread(target=load, daemon=True).start(), searcher),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # what was under way has been waited for
    )
    server = Server(config, service, notice_seconds, grace_seconds)

    def load() -> None:
        log = logging.getLogger("plume.serving")
        began = time.monotonic()
        try:
            service.load()
        except Exception as error:  # whatever it is, a server without a model is none
            log.error("the server cannot start: %s", error)
            server.should_exit = True
            return
        gc.collect()
        gc.freeze()  # what stays for good is not looked through again, which would stop all answers for 0.3 s at times
        log.info("ready after %.1f s: %s", time.monotonic() - began, settings.name)
        threading.Thread(target=watch, daemon=True).start()

    def watch() -> None:
        while service.state != "failed":
            time.sleep(1)
        server.should_exit = True

    server.run()
    return 1 if service.state == "failed" else 0


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        found = json.loads(text) if record.name.endswith(".access") else {"message": text}
        if record.exc_info and record.exc_info[0]:  # where, and of what kind; messages may hold what was sent
            frames = "".join(traceback.format_tb(record.exc_info[2]))
            found["error"] = f"{record.exc_info[0].__name__}\n{frames}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return json.dumps({"time": f"{when}Z", "level": record.levelname.lower(), "logger": record.name, **found})


def _log_as_json() -> None:
    """A line of JSON for each event, on stderr; nothing in it comes from the content of a request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    for name in ("plume.serving", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
