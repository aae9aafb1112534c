"""`plume encode`, `plume trace`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from plume.cli.inputs import DEMO, BatchSize, Files, Model, Steps, Text, check_model, collect, message_of, readable
from plume.cli.output import NUMBER_BYTES, check_writable, write_vectors
from plume.cli.running import running, stop
from plume.terminal import counted, is_watched, say

if TYPE_CHECKING:
    from plume import InputError


def encode(
    files: Files = None,
    model: Model = DEMO,
    out: Annotated[Path, typer.Option(help="Where to write: .npz, .npy or .jsonl.")] = Path("vectors.npz"),
    text: Text = None,
    instruction: Annotated[str | None, typer.Option(help="For every input.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="A preset instead: retrieve, classify or question.")] = None,
    num_latent_steps: Steps = None,
    batch_size: BatchSize = 32,
    on_error: Annotated[
        Literal["skip", "raise"], typer.Option(help="Skip inputs that cannot be embedded, or stop.")
    ] = "skip",
    int8: Annotated[bool, typer.Option("--int8", help="Products in int8, on a CPU: faster, other vectors.")] = False,
) -> None:
    """Write one unit vector per input.

    A text file is one input, a page of a PDF too. Inputs that cannot be embedded are named, the others are written all
    the same, and the exit status is 1.
    """
    if out.suffix not in NUMBER_BYTES:
        stop(f"--out {out}: expected a name that ends with .npz, .npy or .jsonl")
    paths, refused = readable(files or [])
    if refused and (on_error == "raise" or not (paths or text)):
        stop("\n".join(refused))
    if not (paths or text):
        stop("nothing to encode; name files, or give --text")
    check_model(model)
    check_writable(out)
    names, inputs, unreadable = collect(paths, text or [])
    refused += unreadable
    if refused and (on_error == "raise" or not inputs):
        stop("\n".join(refused))

    import numpy as np

    from plume import Plume
    from plume.threads import use_physical_cores

    skipped: list[InputError] = []
    try:
        with running(lambda: f"nothing was written to {out}", skipped):
            use_physical_cores()
            plume = Plume(model, int8=int8)
            check_writable(out, NUMBER_BYTES[out.suffix] * len(inputs) * plume.plume_config.hidden_size)
            vectors = plume.encode(
                inputs,
                num_latent_steps=num_latent_steps,
                instruction=instruction,
                prompt_name=prompt_name,
                batch_size=batch_size,
                show_progress_bar=is_watched() and len(inputs) > batch_size,
                on_error=on_error,
            )
    except (ValueError, OSError, ImportError) as error:
        stop(message_of(error, names))
    bad = {error.index for error in skipped}
    good = [row for row in range(len(names)) if row not in bad]
    refused += [message_of(error, names) for error in skipped]
    if not good:
        stop("\n".join([*refused, f"nothing was written to {out}"]))
    if num_broken := int(np.isnan(vectors[good]).any(axis=1).sum()):
        stop(f"{model} gave NaN for {num_broken} inputs; its weights are broken")
    try:
        write_vectors(out, [names[row] for row in good], vectors[good])
    except OSError as error:
        stop(f"{out} cannot be written ({error.strerror}), and is as it was; free space or choose another --out")
    say(f"{counted(len(good), 'vector')} of {vectors.shape[1]} numbers in {out}")
    for line in refused:
        say(f"skipped: {line}", err=True)
    if refused:
        raise typer.Exit(1)


def trace(
    files: Files = None,
    model: Model = DEMO,
    out: Annotated[Path, typer.Option(help="Folder for trace.json and the pictures.")] = Path("trace"),
    text: Text = None,
    instruction: Annotated[str | None, typer.Option(help="For every input.")] = None,
    candidate: Annotated[list[str] | None, typer.Option(help="A text to compare every state with.")] = None,
    num_latent_steps: Steps = None,
) -> None:
    """Show what happened inside: states, gates, nearest words, as a page per input and one JSON file.

    With several inputs, experts.png shows which experts served which modality, and which latent step.
    """
    paths, refused = readable(files or [])
    if refused:
        stop("\n".join(refused))
    if not (paths or text):
        stop("nothing to trace; name files, or give --text")
    check_model(model)
    names, inputs, refused = collect(paths, text or [])
    if refused:
        stop("\n".join(refused))

    import torch

    from plume import PlumeModel
    from plume.threads import slow_on_cpu
    from plume.tracing.pictures import draw_expert_use, draw_trace
    from plume.tracing.trace import expert_use
    from plume.tracing.trace import trace as trace_inputs

    try:
        with running(lambda: f"nothing was written to {out}"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            # On a CPU in float32, as everywhere: few have fast products of bfloat16.
            loaded = PlumeModel.from_pretrained(model, dtype="auto" if device == "cuda" else torch.float32)
            if device == "cpu" and (warning := slow_on_cpu(loaded)):
                warnings.warn(warning, stacklevel=1)
            loaded = loaded.to(device).eval()
            traces = trace_inputs(
                loaded,
                inputs,
                num_latent_steps=num_latent_steps,
                candidates=candidate,
                names=names,
                instruction=instruction,
            )
    except (ValueError, OSError) as error:
        stop(message_of(error, names))
    use = {modality: share.tolist() for modality, share in expert_use(traces).items()}
    whole = {"model": model, "expert_use": use, "traces": [steps.to_dict() for steps in traces]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
        # The names of files need not be Unicode.
        (out / "trace.json").write_text(lines, encoding="utf-8", errors="backslashreplace")
        for number, steps in enumerate(traces):
            draw_trace(steps, out / f"{number:03}.png")
        if len(traces) > 1 and use:
            draw_expert_use(traces, out / "experts.png")
    except ImportError as error:
        stop(f"{out / 'trace.json'} is written, pictures are not: {error}")
    except OSError as error:
        stop(f"{out} cannot be written ({error.strerror}); choose another --out")
    say(f"{counted(len(traces), 'trace')} in {out}")
