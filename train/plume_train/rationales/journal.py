"""Answers as they come, one line each, so that nothing is asked and paid for twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """A file that is only ever appended to.

    Example:
        >>> file = getfixture("tmp_path") / "answers.jsonl"
        >>> Journal(file).add("key", {"answer": "kite"})
        >>> Journal(file).known
        {'key': {'answer': 'kite'}}
    """

    def __init__(self, file: Path):
        """Read what is there; half a line at the end, of a process that was killed, is dropped.

        Raises:
            ValueError: a file of something else, with its place.
        """
        self.file = file
        self.known: dict[str, dict[str, Any]] = {}
        if not file.exists():
            return
        whole = file.read_bytes()
        end = whole.rfind(b"\n") + 1
        for number, line in enumerate(whole[:end].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.known[entry.pop("key")] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{file}:{number} is no answer; move the file away, or write to another place with --out"
                ) from None
        if end < len(whole):
            with file.open("r+b") as opened:
                opened.truncate(end)

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Note an answer."""
        self.known[key] = entry
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps({"key": key, **entry}, ensure_ascii=False) + "\n")
