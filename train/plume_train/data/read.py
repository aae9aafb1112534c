"""How commands that take rows read them: flags as the trainer's settings of the same names, and the rows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from plume.terminal import counted, is_watched, say
from plume_train.data.records import JsonLines, OnBadRow, Records, open_source
from plume_train.data.rows import RecordFormat, UnclosedAnswerPolicy

_NUM_TOLD = 3


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """`--media-root`, `--on-bad-row` and `--unclosed-answer`."""
    parser.add_argument("--media-root", help="folder that media paths are relative to (the data's)")
    parser.add_argument("--on-bad-row", choices=get_args(OnBadRow), default="error", help="stop at it, or leave it out")
    parser.add_argument("--unclosed-answer", choices=get_args(UnclosedAnswerPolicy), default="error",
                        help='of rationales that are written already; the published data need "accept"')  # fmt: skip


def read_rows(data: str, options: Any) -> Records:
    """The rows of some data; those that are left out are told.

    Args:
        data: as the trainer's `train_file`.
        options: with the flags of `add_row_flags`.

    Raises:
        RowError: a row that cannot be used, unless such are left out.
        ValueError: no row can be used.
    """
    row_format = RecordFormat(
        media_root=Path(options.media_root) if options.media_root else None, unclosed_answer=options.unclosed_answer
    )
    records = Records(data, row_format=row_format, on_bad_row=options.on_bad_row, show_progress=is_watched())
    if records.bad_rows:
        say(f"{counted(len(records.bad_rows), 'row')} that cannot be used, left out:", err=True)
        for bad in records.bad_rows[:_NUM_TOLD]:
            say(f"  {bad}", err=True)
    return records


def check_writable(records: Records, data: str) -> None:
    """Refuse rows that no line of JSON can hold, before anything is done with them.

    Raises:
        ValueError: names what the first such row holds.
    """
    if isinstance(open_source(data), JsonLines):
        return
    for row in map(records.raw, range(len(records))):
        for name, value in row.items() if isinstance(row, dict) else ():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{data} holds a {type(value).__name__} in {name!r}, which a file .jsonl cannot; write its media "
                    "to files first, and their paths into the rows (train/README.md, A row)"
                ) from None
