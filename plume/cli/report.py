"""`plume report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plume.cli.running import running, stop
from plume.cli.search import maker_of
from plume.terminal import say


def report(
    index: Annotated[Path, typer.Argument(help="The index.")],
    queries: Annotated[
        Path | None, typer.Option(help="A text file of queries like those that are searched for, one in each line.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit corrections to the queries, for `plume search --correct`.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Checkpoint; the one that made the index if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to draw a picture: .png or .svg.")] = None,
) -> None:
    """Tell how an index lies in its space: gaps between kinds, rows that come up for everything, copies."""
    if fit and queries is None:
        stop("--fit needs --queries: what is corrected depends on what is searched for")
    lines: list[str] = []
    if queries is not None:
        try:
            lines = [line.strip() for line in queries.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            stop(f"--queries {queries} cannot be read ({error}); expected a text file with a query in each line")
        if not lines:
            stop(f"--queries {queries} is empty; expected a query in each line")

    from plume import Plume
    from plume.search.index import Index
    from plume.search.report import draw_report
    from plume.search.report import report as look
    from plume.threads import use_physical_cores

    try:
        with running(lambda: "nothing was changed"):
            source, vectors = Index.open(index), None
            if lines:
                use_physical_cores()
                plume = Plume(model or maker_of(source))
                if source.identity.dim < plume.get_embedding_dimension():
                    plume.truncate_dim = source.identity.dim
                vectors = source.query_vectors(lines, plume)
            found = look(source, vectors)
            for line in found.lines():
                say(line)
            if fit and vectors is not None:
                corrections = source.correct(vectors)
                kinds = ", ".join(corrections.means)
                say(f"corrections for {kinds} by {len(vectors)} queries are kept in {index}; use them with --correct")
            if out is not None:
                draw_report(source, found, out)
                say(f"picture in {out}")
    except (ValueError, OSError, ImportError) as error:
        stop(str(error))
