"""Starting processes in tests: whatever they start in turn ends with them, and no result depends on their speed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

#: Not a bound on speed: what has hung is ended, so that a suite ends too.
HANGS_AFTER_S = 1800


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def started(command: Sequence[Any], **settings: Any) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, all of which is ended when the test leaves, however it leaves."""
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=settings.pop("stdout", subprocess.PIPE),
        stderr=settings.pop("stderr", subprocess.PIPE),
        text=True,
        start_new_session=True,
        **settings,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended, and so have all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: Sequence[Any], **settings: Any) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    with started(command, **settings) as process:
        out, errors = process.communicate(timeout=HANGS_AFTER_S)
        return subprocess.CompletedProcess(command, process.returncode, out, errors)
