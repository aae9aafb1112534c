"""The error of an input that cannot be embedded."""

from __future__ import annotations

import re


class InputError(ValueError):
    """An input that cannot be embedded.

    source: which one, as the caller knows it, for example "input 3" or "input 3: kite.png".
    reason: what is wrong, what was expected and what to do; empty where a worker process has put all into `source`.
    index: its place in the list that was passed; None outside of lists.

    Example:
        >>> print(InputError("input 3", "it is empty; expected text"))
        input 3: it is empty; expected text
    """

    def __init__(self, source: str, reason: str = "", index: int | None = None):
        super().__init__(source, reason, index)
        self.source, self.reason, self.index = source, reason, index

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" if self.reason else self.source

    def locate(self, index: int) -> None:
        """Say where in a list the input is."""
        self.index = index
        self.args = self.source, self.reason, index


def no_file(name: str, place: object, expected: str) -> InputError:
    """The error of a place where nothing is."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(place)):
        return InputError(name, f"{place} is an address that plume does not open; download the file, and name its path")
    return InputError(name, f"no file at {place}; expected {expected}")


def located(name: str, file: object) -> str:
    """How an error calls a file of an input, for example "input 3: kite.png"."""
    return name if name == str(file) else f"{name}: {file}"
