"""`plume corpus`: plan, run, commit, status."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plume.cli.inputs import DEMO, INDEX_PIXELS, ClipSeconds, Model, PassageTokens, check_model
from plume.cli.running import running, stop
from plume.terminal import counted, say

if TYPE_CHECKING:
    from plume.corpus.plan import Job

corpus = typer.Typer(no_args_is_help=True, help="Embed a corpus that outgrows one machine, and bring it into an index.")

Folder = Annotated[Path, typer.Argument(help="The folder of the job, as `plan` made it.")]

Place = Annotated[str | None, typer.Option("--model", help="Where the checkpoint is now, if it has moved.")]


@corpus.command()
def plan(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of files, Parquet, a Lance table, a data set that is saved or on the Hub. Tables have a "
            "column text, image, bytes or path."
        ),
    ],
    job: Annotated[Path, typer.Option(help="Folder for the plan and the results, seen by all machines.")],
    model: Model = DEMO,
    shard_size: Annotated[int, typer.Option(help="Items of a shard, which one worker embeds.", min=1)] = 4096,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    column: Annotated[str | None, typer.Option(help="Of a table, where it has several of these.")] = None,
    instruction: Annotated[str, typer.Option(help="For every document.")] = "",
    query_instruction: Annotated[str, typer.Option(help="For every query.")] = "",
    num_latent_steps: Annotated[int | None, typer.Option(help="K of documents; 0 is a single pass.")] = None,
    query_latent_steps: Annotated[int | None, typer.Option(help="K of queries; 0 is a single pass.")] = None,
    passage_tokens: PassageTokens = None,
    clip_seconds: ClipSeconds = None,
    max_pixels: Annotated[int, typer.Option(help="Larger images and pages are reduced.", min=1)] = INDEX_PIXELS,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep this many numbers of each vector.", min=1)] = None,
    sample: Annotated[int, typer.Option(help="Contents to embed for an estimate; 0 makes none.", min=0)] = 32,
) -> None:
    """List what a source holds, in shards, and estimate the work.

    Run it again after the source has grown: what is planned stays; what is new, or could not be read, gets new shards.
    """
    check_model(model)

    from plume import Plume
    from plume.corpus.plan import Job
    from plume.corpus.sources import entries
    from plume.corpus.work import ShardWorker
    from plume.search.index import Identity
    from plume.threads import use_physical_cores

    try:
        with running(lambda: "run the same command again"):
            use_physical_cores()
            origin = Identity.of(
                Plume(model, truncate_dim=truncate_dim),
                num_latent_steps=num_latent_steps,
                query_latent_steps=query_latent_steps,
                instruction=instruction,
                query_instruction=query_instruction,
                max_pixels=max_pixels,
                passage_tokens=passage_tokens,
                clip_seconds=clip_seconds,
            )
            found = entries(source, split=split, column=column)
            made = Job.create(job, origin)
            report = made.plan(found, shard_size)
            for skipped in report.skipped:
                say(f"skipped: {skipped.name}: {skipped.reason}", err=True)
            say(
                f"{counted(report.new, 'item')} in {counted(len(report.shards), 'new shard')}; "
                f"{report.known} planned before, {len(report.skipped)} skipped"
            )
            if sample and made.left():
                left = ShardWorker(job, model=model).estimate(sample)
                say(
                    f"about {left.contents:,} contents to embed, {left.tokens:,} tokens, {_duration(left.seconds)} on "
                    f"one device like this, by a sample of {left.sampled}"
                )
    except (ValueError, OSError, ImportError) as error:
        stop(str(error))


@corpus.command("run")
def run_corpus(
    job: Folder,
    model: Place = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the best there is if not given.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="A Ray cluster: its address, auto for the one that runs, local for one here.")
    ] = None,
    actors: Annotated[int, typer.Option(help="Models on the cluster at most.", min=1)] = 1,
    gpus_per_actor: Annotated[float, typer.Option(help="0: they run on CPUs.", min=0)] = 1.0,
) -> None:
    """Embed the shards that are left, here or on Ray.

    Run it again after anything has died: what is finished stays. Several may run at once, for example one per GPU.
    """
    from tqdm.auto import tqdm

    from plume.corpus.plan import Job

    try:
        with running(lambda: "what is finished stays; run the same command again to go on"):
            work = Job.open(job)
            total = len(work.left())
            with tqdm(total=total, desc="Embedding", unit="shard", disable=None) as bar:
                if ray is not None:
                    from plume.corpus.on_ray import run_on_ray

                    run_on_ray(
                        work, ray, actors=actors, num_gpus=gpus_per_actor, model=model, done=lambda _: bar.update()
                    )
                elif work.left():
                    from plume.corpus.work import ShardWorker, run_here
                    from plume.threads import use_physical_cores

                    use_physical_cores()
                    run_here(ShardWorker(job, device=device, model=model), lambda _: bar.update())
    except (ValueError, OSError, ImportError) as error:
        stop(str(error))
    _say_status(work)


@corpus.command()
def commit(
    job: Folder, out: Annotated[Path, typer.Option(help="The index; made if missing.")] = Path("plume-index")
) -> None:
    """Bring finished shards into an index, each row once, also after an interruption; other shards may still run."""
    from plume.corpus.commit import commit as bring
    from plume.corpus.plan import Job

    try:
        with running(lambda: "run the same command again to go on"):
            work = Job.open(job)
            done = bring(work, out)
    except (ValueError, OSError, ImportError) as error:
        stop(str(error))
    say(f"{counted(done.added, 'row')} added to {out} from {counted(done.shards, 'shard')}; {done.present} were there")
    _say_status(work)


@corpus.command()
def status(job: Folder) -> None:
    """Say what of a job is done, and what could not be embedded."""
    from plume.corpus.plan import Job

    try:
        work = Job.open(job)
        for refused in work.status().skipped:
            say(f"skipped: {refused.name}: {refused.reason}", err=True)
    except (ValueError, OSError, ImportError) as error:
        stop(str(error))
    _say_status(work)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 600 else f"{seconds / 3600:.1f} hours"


def _say_status(job: Job) -> None:
    now = job.status()
    say(f"{now.done} of {counted(now.planned, 'shard')} done: {counted(now.rows, 'row')}, {len(now.skipped)} skipped")
