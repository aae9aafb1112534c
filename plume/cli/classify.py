"""`plume classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plume.cli.inputs import DEMO, BatchSize, Files, Model, Steps, Text, check_model, collect, message_of, readable
from plume.cli.output import json_line
from plume.cli.running import running, stop
from plume.terminal import counted, is_watched, say


def classify(
    files: Files = None,
    label: Annotated[list[str] | None, typer.Option(help="What an input may be; two at least.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Instead of --label: a folder with a folder of examples for each label.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help='A sentence about a label, as "a photo of a {}."; several are averaged.')
    ] = None,
    calibrate_on: Annotated[
        Path | None, typer.Option(help="Fit probabilities to a folder with a folder of inputs for each label.")
    ] = None,
    model: Model = DEMO,
    text: Text = None,
    instruction: Annotated[str | None, typer.Option(help="For every input; the checkpoint's preset if none.")] = None,
    num_latent_steps: Steps = None,
    batch_size: BatchSize = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Tell which of some labels fits each input best, without training.

    Probabilities say how often that is right only after --calibrate-on, and never that none of the labels is.
    """
    if (label is None) == (examples is None):
        stop("give --label for each label, or --examples with a folder for each")
    paths, refused = readable(files or [])
    names, inputs, unreadable = collect(paths, text or [])
    if refused := [*refused, *unreadable]:
        stop("\n".join(refused))
    if not inputs:
        stop("nothing to classify; name files, or give --text")
    check_model(model)
    labels: Any = label
    if examples is not None:
        labels = {name: [one for _, one in some] for name, some in _by_label(examples, "--examples").items()}
    labelled = {} if calibrate_on is None else _by_label(calibrate_on, "--calibrate-on")
    num_labelled = sum(map(len, labelled.values()))

    from plume import Plume
    from plume.threads import use_physical_cores

    settings: dict[str, Any] = {
        "instruction": instruction,
        "num_latent_steps": num_latent_steps,
        "batch_size": batch_size,
        "show_progress_bar": is_watched() and len(inputs) > batch_size,
    } | ({} if template is None else {"templates": template})
    calibration = None
    known = names
    try:
        with running(lambda: "nothing was written"):
            use_physical_cores()
            plume = Plume(model)
            if labelled:
                answers = [name for name, some in labelled.items() for _ in some]
                known = [name for some in labelled.values() for name, _ in some]
                rows = [one for some in labelled.values() for _, one in some]
                calibration = plume.calibrate(rows, labels, answers, **settings)
                known = names
            chances = plume.classify(inputs, labels, calibration=calibration, **settings)
    except (ValueError, OSError) as error:
        stop(message_of(error, known))
    if calibration is not None and (quality := calibration.quality) is not None:
        say(
            f"temperature {calibration.temperature:.4f}; of {counted(num_labelled, 'labelled input')} "
            f"{quality['accuracy']:.1%} right, calibration error {quality['error']:.3f} ({quality['error_before']:.3f} "
            "before), each half fitted to the other",
            err=True,
        )
    for name, row in zip(names, chances, strict=True):
        told = dict(zip(labels, map(float, row), strict=True))
        if as_json:
            typer.echo(json_line({"name": name, "labels": told}))
        else:
            best = max(told, key=lambda one: told[one])
            say(f"{told[best]:6.3f}  {best}  {name}")


def _by_label(folder: Path, option: str) -> dict[str, list[tuple[str, Any]]]:
    """Names and inputs of the files of each folder in a folder, by its name; a PDF gives its pages."""
    if not folder.is_dir():
        stop(f"{option} {folder} is no folder; expected one with a folder of files for each label")
    found: dict[str, list[tuple[str, Any]]] = {}
    refused: list[str] = []
    for one in sorted(folder.iterdir()):
        if one.is_dir() and not one.name.startswith("."):
            paths, wrong = readable(sorted(file for file in one.iterdir() if not file.name.startswith(".")))
            names, inputs, unreadable = collect(paths, [])
            found[one.name] = list(zip(names, inputs, strict=True))
            refused += [*wrong, *unreadable]
    if refused:
        stop("\n".join(refused))
    empty = [name for name, files in found.items() if not files]
    if len(found) < 2 or empty:
        why = f"{empty[0]} holds no file that plume reads" if empty else "it must hold two folders at least"
        stop(f"{option} {folder}: {why}; expected a folder of files for each label")
    return found
