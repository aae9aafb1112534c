"""`plume export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plume.cli.running import running, stop
from plume.terminal import counted, say


def export(
    index: Annotated[Path, typer.Argument(help="The index.")],
    out: Annotated[Path, typer.Argument(help="Where to write: .parquet, .npz or .faiss.")],
    where: Annotated[str | None, typer.Option(help="A condition in SQL, for example \"kind = 'pdf'\".")] = None,
) -> None:
    """Write the vectors of an index, and what they are of, for other programs."""
    from plume.search.export import export as write
    from plume.search.index import Index

    try:
        with running(lambda: f"nothing was written to {out}"):
            source = Index.open(index)
            count = write(source, out, where=where)
    except (ValueError, OSError, ImportError) as error:
        stop(str(error))
    say(f"{counted(count, 'vector')} of {source.identity.dim} numbers in {out}")
