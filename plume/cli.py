"""The command `plume`."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Multimodal embeddings by latent reasoning.")

TEXT_SUFFIXES = {".txt", ".md", ".rst"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


@app.callback()
def _commands() -> None:
    # With a callback, typer keeps "encode" a command of its own although it is the only one.
    pass


@app.command()
def encode(
    files: Annotated[list[Path] | None, typer.Argument(help="Text and image files.")] = None,
    model: Annotated[str, typer.Option(help="Checkpoint: a folder or a Hub name.")] = "runs/demo/latent",
    out: Annotated[Path, typer.Option(help="Where to write: .npz, .npy or .jsonl.")] = Path("vectors.npz"),
    text: Annotated[list[str] | None, typer.Option(help="A text to embed as well; may be repeated.")] = None,
    instruction: Annotated[str | None, typer.Option(help="For every input.")] = None,
    num_latent_steps: Annotated[
        int | None, typer.Option(help="K; 0 is a single pass; the checkpoint's own if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per pass.", min=1)] = 32,
    on_error: Annotated[
        Literal["skip", "raise"], typer.Option(help="Skip inputs that cannot be embedded, or stop.")
    ] = "skip",
) -> None:
    """Write one unit vector per input.

    A text file is one input. Inputs that cannot be embedded are named, the others are written all the same, and the
    exit status is 1.
    """
    if out.suffix not in (".npz", ".npy", ".jsonl"):
        _stop(f"--out {out}: expected a name that ends with .npz, .npy or .jsonl")
    names, inputs, refused = _collect(files or [], text or [])
    if refused and on_error == "raise":
        _stop(refused[0])
    if not inputs:
        _stop("\n".join(refused) or "nothing to encode; name files, or give --text")

    from plume import InputError, Plume

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = Plume(model).encode(
                inputs,
                num_latent_steps=num_latent_steps,
                instruction=instruction,
                batch_size=batch_size,
                on_error=on_error,
            )
    except (InputError, ValueError, OSError) as error:
        _stop(_named(str(error), names))
    refused_by_model = sum(str(one.message).count("\n") for one in caught if "were skipped" in str(one.message))
    good = [row for row in range(len(names)) if vectors[row, 0] == vectors[row, 0]]  # NaN marks a skipped row
    refused += [
        line
        for one in caught
        if "inputs were skipped" in str(one.message)
        for line in str(one.message).splitlines()[1:]
    ]
    if len(good) + refused_by_model != len(names):
        _stop(f"{model} gave NaN for {len(names) - refused_by_model - len(good)} inputs; its weights are broken")
    _write(out, [names[row] for row in good], vectors[good])
    typer.echo(f"{len(good)} vectors of {vectors.shape[1]} numbers in {out}")
    for line in refused:
        typer.echo(f"skipped: {_named(line, names)}", err=True)
    if refused:
        raise typer.Exit(1)


def _collect(files: list[Path], texts: list[str]) -> tuple[list[str], list[str | Path], list[str]]:
    """Names and inputs of what can be read, and a line for each file that cannot."""
    names: list[str] = []
    inputs: list[str | Path] = []
    refused: list[str] = []
    for file in files:
        try:
            found: str | Path
            if file.suffix.lower() in TEXT_SUFFIXES:
                found = file.read_text(encoding="utf-8")
            elif file.suffix.lower() in IMAGE_SUFFIXES:
                found = file
            else:
                kinds = ", ".join(sorted(TEXT_SUFFIXES | IMAGE_SUFFIXES))
                raise ValueError(f"unknown kind of file; expected one of {kinds}")
        except (OSError, ValueError) as error:
            refused.append(f"{file}: {error}")
        else:
            names.append(str(file))
            inputs.append(found)
    return [*names, *texts], [*inputs, *texts], refused


def _named(message: str, names: list[str]) -> str:
    """The message with "input 3" followed by the name that the user knows."""
    for index in reversed(range(len(names))):
        message = message.replace(f"input {index}", names[index])
    return message


def _write(out: Path, names: list[str], vectors) -> None:
    import numpy as np

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, embeddings=vectors, names=np.array(names))
    elif out.suffix == ".npy":
        np.save(out, vectors)
    else:
        lines = (
            json.dumps({"name": name, "embedding": vector.tolist()})
            for name, vector in zip(names, vectors, strict=True)
        )
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _stop(message: str) -> NoReturn:
    typer.echo(f"plume: {message}", err=True)
    sys.exit(1)


def main() -> None:
    """Parse, call, exit."""
    app()
