"""Which rows of an index a search looks at, by typed fields instead of SQL: what somebody else may ask for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from plume.inputs.file_kinds import Kind
from plume.search.store import quoted

_EPOCH = date(1970, 1, 1).toordinal()


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Rows of some kinds, of a file or below a folder, of a page, written last within some days.

    kinds: none takes all. folder, path: absolute. page: from 1. since, until: the first and the last day, in UTC.

    Example:
        >>> Filter(kinds=("pdf",), folder="/data/it's").condition
        "kind IN ('pdf') AND starts_with(path, '/data/it''s/')"
        >>> Filter(until=date(1970, 1, 1)).condition
        'mtime_ns < 86400000000000'
    """

    kinds: tuple[str, ...] = ()
    folder: str = ""
    path: str = ""
    page: int | None = None
    since: date | None = None
    until: date | None = None

    def __post_init__(self):
        """Refuse kinds that there are not.

        Raises:
            ValueError: names the kind.
        """
        if unknown := set(self.kinds) - set(map(str, Kind)):
            raise ValueError(f"there is no kind {min(unknown)!r}; expected one of {', '.join(map(str, Kind))}")

    @property
    def condition(self) -> str | None:
        """In SQL; None where all rows pass."""
        parts = []
        if self.kinds:
            parts.append(f"kind IN ({', '.join(map(quoted, self.kinds))})")
        if self.folder:
            parts.append(f"starts_with(path, {quoted(self.folder.rstrip('/') + '/')})")
        if self.path:
            parts.append(f"path = {quoted(self.path)}")
        if self.page is not None:
            parts.append(f"kind = 'pdf' AND page = {self.page:d}")
        if self.since is not None:
            parts.append(f"mtime_ns >= {_nanoseconds(self.since)}")
        if self.until is not None:
            parts.append(f"mtime_ns < {_nanoseconds(self.until, days=1)}")
        return " AND ".join(parts) or None


def indexed_path(path: str | os.PathLike) -> str:
    """A path as an index has it: absolute, in the folder that links lead to, under the name that it has there."""
    return str(Path(path).parent.resolve() / Path(path).name)


def day_of(text: str | None) -> date | None:
    """A day as 2026-01-31; None where none is given.

    Raises:
        ValueError: it is no day.
    """
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no day; expected one such as 2026-01-31") from None


def _nanoseconds(day: date, days: int = 0) -> int:
    """From the beginning of 1970 to that of a day, or so many days later, as far as 64 bits count."""
    return max(1 - 2**63, min((day.toordinal() + days - _EPOCH) * 86_400 * 10**9, 2**63 - 1))
