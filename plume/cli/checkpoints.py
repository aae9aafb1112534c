"""`plume convert`, `plume run`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from plume.cli.inputs import check_model
from plume.cli.running import running, stop
from plume.terminal import say


def convert(
    source: Annotated[str, typer.Argument(help="Published PLUME checkpoint: a folder or a Hub name.")],
    destination: Annotated[Path, typer.Argument(help="Where to write; must be new or empty.")],
) -> None:
    """Turn a published PLUME checkpoint into a folder that opens everywhere."""
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        stop(f"{destination} is not empty; name a new folder")
    check_model(source)

    from safetensors import SafetensorError

    from plume import PlumeModel
    from plume.checkpoints.folder import is_stock
    from plume.checkpoints.published import is_published

    try:
        if not is_stock(source) or not is_published(source):
            stop(f"{source} holds no adapter of the published format (latent_moe_transition.*); nothing to convert")
        beside = destination.with_name(f".{destination.name}.part{os.getpid()}") / destination.name
        with running(lambda: f"nothing was written to {destination}"):
            try:
                model = PlumeModel.from_pretrained(source)
                model.save_pretrained(beside)
                beside.replace(destination)
            finally:
                shutil.rmtree(beside.parent, ignore_errors=True)
    except (ValueError, OSError, SafetensorError) as error:
        stop(str(error))
    config = model.config
    say(
        f"{destination}: K = {config.num_latent_steps}, {config.num_experts} experts, "
        f"positions {config.latent_positions}, {sum(p.numel() for p in model.parameters()):,} parameters"
    )


def run(
    program: Annotated[str, typer.Argument(help="Any program in Python, for example mteb.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
) -> None:
    """Start another program that has imported plume, so that it opens checkpoints which it is given by name."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (found := shutil.which(program, path=places)) is None:
        stop(f"there is no program {program!r}; name one as you would start it, for example `plume run mteb run -m F`")
    before = os.environ.get("PYTHONPATH")
    home = str(Path(__file__).parents[1] / "autoload")
    os.environ["PYTHONPATH"] = home if not before else f"{home}{os.pathsep}{before}"
    os.execv(found, [program, *(arguments or [])])
