"""`plume-eval hops make`, `plume-eval hops run`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Quality and speed of plume and its baselines.")
hops = typer.Typer(no_args_is_help=True, help="The built-in task: pictures that must be reasoned over.")
app.add_typer(hops, name="hops")

Data = Annotated[Path, typer.Option(help="Folder of the data set.")]


@hops.command("make")
def make(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    task: Annotated[Literal["page"], typer.Option(help="Which task.")] = "page",
    num_train: Annotated[int, typer.Option(help="Training pages.", min=1)] = 4000,
    num_test: Annotated[int, typer.Option(help="Test pages; no training row shows one of them.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    num_symbols: Annotated[int, typer.Option(help="Keys on a page.")] = 9,
    num_hops: Annotated[int, typer.Option(help="How often the table is followed.")] = 4,
) -> None:
    """Write pictures, training rows and test rows."""
    from plume_eval.hops.make import make_page_task

    try:
        make_page_task(
            out, num_train=num_train, num_test=num_test, seed=seed, num_symbols=num_symbols, num_hops=num_hops
        )
    except (ValueError, FileExistsError) as error:
        raise typer.Exit(_fail(error)) from None
    typer.echo(f"{task}: {num_train} training and {num_test} test pages in {out}")


@hops.command("run")
def run(
    model: Annotated[str, typer.Option(help="Checkpoint: a folder or a Hub name.")],
    data: Data,
    mode: Annotated[Literal["latent", "single_pass", "explicit"], typer.Option(help="How to reason.")] = "latent",
    num_latent_steps: Annotated[int | None, typer.Option(help="K; the checkpoint's own if not given.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per pass.", min=1)] = 64,
) -> None:
    """Measure recall@1 and MRR; the last line of the output is one JSON object."""
    import json

    from plume import PlumeModel
    from plume_eval.hops.run import HopsTask, evaluate

    if mode == "single_pass" and num_latent_steps:
        raise typer.Exit(_fail(ValueError("--num-latent-steps has no effect on a single pass; drop it")))
    try:
        loaded = PlumeModel.from_pretrained(model).eval()
        result = evaluate(
            loaded,
            HopsTask(data),
            mode,
            num_latent_steps=num_latent_steps,
            batch_size=batch_size,
            show_progress=True,
        )
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    typer.echo(json.dumps({"model": model, "data": str(data), **result}))


def _fail(error: Exception) -> int:
    typer.echo(f"plume-eval: {error}", err=True)
    return 1


def main() -> None:
    """Parse, call, exit."""
    app()


if __name__ == "__main__":
    main()
