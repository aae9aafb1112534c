"""Which process loads what, and in which order tests run."""

from __future__ import annotations

import signal


def pytest_configure(config):
    """Load the fixtures where tests run: the process that hands them out to others has no use for torch.

    A shell's background ignores Ctrl-C, and what the tests start would inherit that; some of it must hear it.
    """
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """What starts processes comes first, so that one worker runs all of it: side by side they wait for one another."""
    items.sort(key=lambda item: item.get_closest_marker("launching") is None)
