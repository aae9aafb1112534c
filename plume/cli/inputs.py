"""Arguments that several commands take, and what they name."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from plume.checkpoints.place import check_place, stay_offline_without_network
from plume.cli.running import stop

Files = Annotated[
    list[Path] | None,
    typer.Argument(help="Text, image, video and PDF files; a PDF gives its pages. `-` reads names, one per line."),
]

Model = Annotated[str, typer.Option(help="Checkpoint: a folder or a Hub name.")]

Text = Annotated[list[str] | None, typer.Option(help="A text to take as well; may be repeated.")]

Steps = Annotated[int | None, typer.Option(help="K; 0 is a single pass; the checkpoint's own if not given.")]

BatchSize = Annotated[int, typer.Option(help="Inputs per pass.", min=1)]

PassageTokens = Annotated[int | None, typer.Option(help="Longer texts become passages of so many tokens, a row each.")]

ClipSeconds = Annotated[
    float | None, typer.Option(help="Longer videos get rows of clips of so many seconds, beside the whole.")
]

DEMO = "runs/demo/latent"
#: Of images and pages in an index, 768 visual tokens: a page of A4 at 80 dots per inch, a quarter of what is taken.
INDEX_PIXELS = 768 * 28 * 28


def readable(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Files that plume reads, as far as their names tell, and a line for each of the others."""
    from plume.inputs.file_kinds import as_typed, why_not_read

    paths = [path for file in files for path in (_from_stdin() if str(file) == "-" else [file])]
    reasons = {path: why_not_read(path) for path in paths}
    return [path for path in paths if reasons[path] is None], [
        f"{as_typed(path)}: {why}" for path, why in reasons.items() if why
    ]


def _from_stdin() -> list[Path]:
    return [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().splitlines() if line.strip()]


def collect(files: Sequence[Path], texts: Sequence[str]) -> tuple[list[str], list[Any], list[str]]:
    """Names and inputs of what can be read, and a line for each file that cannot."""
    from plume.inputs.errors import InputError
    from plume.inputs.item import inputs_in_file

    found: list[tuple[str, Any]] = []
    refused: list[str] = []
    for file in files:
        try:
            found += inputs_in_file(file)
        except InputError as error:
            refused.append(str(error))
    named = [text if text.strip() else f"--text {text!r}" for text in texts]
    return [*(name for name, _ in found), *named], [*(raw for _, raw in found), *texts], refused


def check_model(name_or_path: str) -> None:
    """Stop before anything is imported if there can be no such checkpoint."""
    try:
        check_place(name_or_path)
    except ValueError as error:
        is_default = name_or_path == DEMO
        stop(f"{error}" + "; that is the default of --model, which `plume-demo` makes" * is_default)
    stay_offline_without_network(name_or_path)


def check_words(text: str) -> None:
    """Ask back where words to search for are the name of a file."""
    from plume.inputs.file_kinds import SUFFIXES, Kind, kind_of

    path = Path(text)
    if path.suffix.lower() not in SUFFIXES or text != text.strip() or (" " in text and not path.is_file()):
        return
    flag = {Kind.IMAGE: "--image", Kind.VIDEO: "--video"}.get(kind_of(path) or Kind.TEXT)
    by = f"search by it with {flag} {shlex.quote(text)}" if flag else "search by words from it"
    stop(f"{text!r} is the name of a file, not words; {by}, or add a space to search for the name")


def message_of(error: Exception, names: Sequence[str]) -> str:
    """What an error says, with the name of the input that the user knows."""
    from plume import InputError

    if isinstance(error, InputError) and error.index is not None:
        return f"{names[error.index]}: {error.reason}"
    return str(error)
