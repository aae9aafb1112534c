"""While a command runs: what it says, and what is left where it is stopped."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from plume.terminal import plain_warnings, quiet_libraries, say

if TYPE_CHECKING:
    from plume import InputError


@contextmanager
def running(state: Callable[[], str], skipped: list[InputError] | None = None) -> Iterator[None]:
    """Say warnings in a line as they come; where SIGINT or SIGTERM stops the work, say what it leaves.

    Args:
        state: what is left, if it is stopped.
        skipped: gets the inputs that `Plume.encode` skips; they are not said.
    """
    caught = signal.SIGINT

    def terminate(number: int, frame: Any) -> NoReturn:
        nonlocal caught
        caught = signal.Signals(number)
        raise KeyboardInterrupt

    def take(warning: Any) -> bool:
        if skipped is None or not hasattr(warning, "errors"):
            return False
        skipped.extend(warning.errors)  # a SkippedInputsWarning
        return True

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with plain_warnings("plume", take):
            quiet_libraries()
            yield
    except KeyboardInterrupt:
        say(f"plume: stopped; {state()}", err=True)
        sys.exit(128 + caught)
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(message: str) -> NoReturn:
    """Say what is wrong, and end with status 1."""
    for number, line in enumerate(message.splitlines() or [""]):
        say(line if number else f"plume: {line}", err=True)
    sys.exit(1)
