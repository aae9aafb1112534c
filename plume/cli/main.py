"""The command `plume`."""

from __future__ import annotations

from typing import Annotated

import typer

from plume.cli.checkpoints import convert, run
from plume.cli.classify import classify
from plume.cli.corpus import corpus
from plume.cli.encode import encode, trace
from plume.cli.export import export
from plume.cli.report import report
from plume.cli.search import index, search
from plume.cli.serve import serve
from plume.terminal import run_app, say
from plume.version import __version__

app = typer.Typer(no_args_is_help=True)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        say(f"plume {__version__}")
        raise typer.Exit


@app.callback()
def _plume(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Multimodal embeddings by latent reasoning."""


for _command in (encode, index, search, classify, report, export, trace):
    app.command()(_command)
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)
for _command in (convert, serve):
    app.command()(_command)
app.add_typer(corpus, name="corpus")


def main() -> None:
    """Parse, call, exit."""
    run_app(app, "plume")
