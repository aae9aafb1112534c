"""`plume-eval hops make`, `plume-eval hops run`, `plume-eval latency`, `plume-eval overhead` and others."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from plume.checkpoints.place import check_place, stay_offline_without_network
from plume.terminal import is_watched, plain_warnings, quiet_libraries, run_app, say
from plume.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False)
hops = typer.Typer(no_args_is_help=True, help="The built-in tasks: what is shown must be followed hop by hop.")
app.add_typer(hops, name="hops")
mmeb = typer.Typer(no_args_is_help=True)
app.add_typer(mmeb, name="mmeb")


def _checked(name_or_path: str | None) -> str | None:
    if name_or_path is not None:
        try:
            check_place(name_or_path)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        stay_offline_without_network(name_or_path)
    return name_or_path


Model = Annotated[str, typer.Option(help="Checkpoint: a folder or a Hub name.", callback=_checked)]
Data = Annotated[Path, typer.Option(help="Folder of the data set.")]


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        say(f"plume-eval {__version__}")
        raise typer.Exit


@app.callback()
def _plume_eval(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quality and speed of plume and its baselines."""


@hops.command("make")
def make(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    task: Annotated[
        Literal["page", "image", "video", "text", "all"], typer.Option(help="Which family; all: a folder for each.")
    ] = "page",
    num_train: Annotated[int, typer.Option(help="Training records.", min=1)] = 4000,
    num_validation: Annotated[int, typer.Option(help="Records to tune with.", min=1)] = 256,
    num_test: Annotated[int, typer.Option(help="Test records; no other record shows the same.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    min_hops: Annotated[int, typer.Option(help="The fewest hops to an answer.")] = 1,
    max_hops: Annotated[int, typer.Option(help="The most; as many records of each number.")] = 6,
    num_symbols: Annotated[
        int | None, typer.Option(help="Symbols to choose from; the family's number if not given.")
    ] = None,
    num_distractors: Annotated[
        int | None, typer.Option(help="Symbols or frames that no path touches; the family's number if not given.")
    ] = None,
    form: Annotated[
        list[str] | None, typer.Option(help="A form of the family; can be repeated; all if not given.")
    ] = None,
) -> None:
    """Write what is shown, and rows to train, to tune and to test with."""
    from plume_eval.hops.make import FAMILIES, Sizes, make_task

    sizes = Sizes(
        num_train=num_train,
        num_validation=num_validation,
        num_test=num_test,
        min_hops=min_hops,
        max_hops=max_hops,
        num_symbols=num_symbols,
        num_distractors=num_distractors,
        forms=tuple(form) if form else None,
    )
    folders = {name: out / name for name in FAMILIES} if task == "all" else {task: out}
    try:
        for name, folder in folders.items():
            make_task(folder, name, sizes, seed=seed, show_progress=is_watched())
            typer.echo(f"{name}: {num_train} training and {num_test} test records in {folder}")
    except (ValueError, FileExistsError) as error:
        raise typer.Exit(_fail(error)) from None


@hops.command("babi")
def babi(
    data: Annotated[Path, typer.Option(help="Folder with the published files qa<task>_*_{train,test}.txt.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    task: Annotated[list[int], typer.Option(help="Number of a task; can be repeated.")],
    max_facts: Annotated[int | None, typer.Option(help="Tell the last so many facts of a story; else all.")] = None,
    num_validation: Annotated[int, typer.Option(help="Training questions per task to tune with.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Of their choice.")] = 0,
) -> None:
    """Write bAbI as a hops data set; the test rows are the official ones."""
    from plume_eval.hops.public import make_babi

    try:
        counts = make_babi(out, data, task, max_facts=max_facts, num_validation=num_validation, seed=seed)
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    for number, of_task in counts.items():
        typer.echo(
            f"task {number}: {of_task['train']} questions to train, {of_task['validation']} to tune and "
            f"{of_task['test']} to test with; {of_task['share_told']:.1%} of these are told all that they need"
        )


@hops.command("prosqa")
def prosqa(
    file: Annotated[Path, typer.Option(help="prosqa_valid.json as published.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    num_train: Annotated[int, typer.Option(help="Graphs to train on.", min=1)] = 20_000,
    seed: Annotated[int, typer.Option(help="Of these graphs.")] = 0,
) -> None:
    """Write ProsQA as a hops data set: one half of the file to tune with, one to test with, graphs to train on."""
    from plume_eval.hops.public import make_prosqa

    try:
        counts = make_prosqa(out, file, num_train=num_train, seed=seed)
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    typer.echo(", ".join(f"{count} {split} rows" for split, count in counts.items()) + f" in {out}")


@hops.command("run")
def run(
    model: Model,
    data: Data,
    mode: Annotated[
        list[str] | None, typer.Option(help="latent, single_pass or explicit; can be repeated; latent if not given.")
    ] = None,
    num_latent_steps: Annotated[int | None, typer.Option(help="K; the checkpoint's own if not given.")] = None,
    document_latent_steps: Annotated[int | None, typer.Option(help="K of the candidates, if another.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per pass.", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for the results files and the picture.")] = None,
) -> None:
    """Measure recall@1 by number of hops; the last line of the output is one JSON object."""
    import json

    from plume import PlumeModel
    from plume_eval.baselines import MODES
    from plume_eval.hops.run import HopsTask, evaluate, evaluate_control, hops_table
    from plume_eval.report import markdown_table, write_report

    known: Any = list(MODES)
    modes = [one for one in known if one in (mode or ["latent"])]
    if unknown := set(mode or ()) - set(modes):
        raise typer.Exit(_fail(ValueError(f"there is no mode {sorted(unknown)[0]!r}; expected {', '.join(known)}")))
    for flag, steps in (("--num-latent-steps", num_latent_steps), ("--document-latent-steps", document_latent_steps)):
        if "latent" not in modes and steps is not None:
            raise typer.Exit(_fail(ValueError(f"{flag} has no effect on {', '.join(modes)}; drop it")))
    quiet_libraries()
    try:
        loaded, task = PlumeModel.from_pretrained(model, dtype="float32").eval(), HopsTask(data)
        results = []
        for one in modes:
            steps = num_latent_steps if one == "latent" else None
            settings = {"num_latent_steps": steps, "batch_size": batch_size}
            targets = document_latent_steps if one == "latent" else None
            result = evaluate(loaded, task, one, **settings, num_target_steps=targets, show_progress=is_watched())
            control = evaluate_control(loaded, task, one, **settings) if task.has_control else None
            results.append({**result, "control": control})
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    table = markdown_table(*hops_table(results))
    typer.echo(table)
    whole = {"model": model, "data": str(data), "settings": {**task.settings, "words": None}, "results": results}
    if out is not None:
        from plume_eval.hops.plots import draw_hops

        command = f"plume-eval hops run --model {model} --data {data} " + " ".join(f"--mode {one}" for one in modes)
        command += "" if num_latent_steps is None else f" --num-latent-steps {num_latent_steps}"
        command += "" if document_latent_steps is None else f" --document-latent-steps {document_latent_steps}"
        counted = f"{results[0]['num_candidates']} symbols, {results[0]['num_queries']} questions"
        text = f"recall@1 [95 %] over {counted}.\n\n{table}"
        if task.has_control:
            control = "; ".join(f"{one['mode']} {one['control']['recall_at_1']['mean']:.3f}" for one in results)
            text += f"\n\nControl (caption to picture, no reasoning): {control}."
        for one in results:
            for form, among in one["of_choices"].items():
                listed = ", ".join(f"{name} {value['mean']:.3f}" for name, value in among.items())
                text += f"\n\nAmong the answers that a question offers, {one['mode']}, {form}: {listed}."
        name = f"hops_{task.settings['task']}_{Path(model).name}"
        path = write_report(out, name, f"Hops, {task.settings['task']}", command, text, whole)
        lines = {one["mode"]: one["by_hops"]["name"] for one in results}
        draw_hops(path.with_suffix(".png"), lines, results[0]["best_rule"])
        typer.echo(f"written: {path}.{{md,json,png}}")
    typer.echo(json.dumps(whole))


@app.command()
def pairs(
    file: Annotated[Path, typer.Argument(help="Held-out rows, .jsonl, with query and target.")],
    model: Model,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="latent, single_pass or explicit; can be repeated; the first two if not given."),
    ] = None,
    num_latent_steps: Annotated[list[int] | None, typer.Option(help="A further K; can be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs at most.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per pass.", min=1)] = 32,
) -> None:
    """Measure recall@1 and MRR on your own pairs; the last line of the output is one JSON object."""
    import json

    import torch

    from plume import PlumeModel
    from plume_eval.pairs import PairsEvaluation

    quiet_libraries()
    modes: Any = mode or ["latent", "single_pass"]
    try:
        evaluation = PairsEvaluation(file, modes, num_latent_steps or (), limit=limit, batch_size=batch_size)
        is_on_gpu = torch.cuda.is_available()
        loaded = PlumeModel.from_pretrained(model, dtype="auto" if is_on_gpu else "float32").eval()
        loaded = loaded.to("cuda") if is_on_gpu else loaded
        numbers = evaluation(loaded, 0, loaded.config.num_latent_steps)
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    typer.echo(
        f"{len(evaluation.queries)} queries, {len(evaluation.targets)} targets, K = {loaded.config.num_latent_steps}"
    )
    for name in [name.removeprefix("recall_at_1_") for name in numbers if name.startswith("recall_at_1_")]:
        typer.echo(f"{name:12}  recall@1 {numbers[f'recall_at_1_{name}']:.3f}  MRR {numbers[f'mrr_{name}']:.3f}")
    typer.echo(json.dumps(numbers))


@hops.command("settings")
def settings(
    model: Model,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder for the results files.")] = None,
) -> None:
    """Measure recall@1 under the engine's settings that change vectors; the last line is one JSON object."""
    import json

    from plume import PlumeModel
    from plume_eval.hops.run import HopsTask
    from plume_eval.hops.settings import compare_settings
    from plume_eval.report import markdown_table, write_report

    quiet_libraries()
    try:
        loaded = PlumeModel.from_pretrained(model, dtype="float32").eval()
        found = compare_settings(loaded, HopsTask(data), show_progress=True)
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    rows = [
        [
            one["setting"],
            *(f"{one['recall_at_1'][form]['mean']:.3f}" for form in found[0]["recall_at_1"]),
            f"{one['reasoning_steps']:.2f}",
            f"{one['lowest_cosine']:.4f}",
            f"{one['mean_cosine']:.4f}",
        ]
        for one in found
    ]
    recalls = [f"recall@1, {form}s" for form in found[0]["recall_at_1"]]
    columns = ["setting", *recalls, "mean steps", "lowest cosine", "mean cosine"]
    table = markdown_table(columns, rows)
    typer.echo(table)
    if out is not None:
        command = f"plume-eval hops settings --model {model} --data {data}"
        text = f"{found[0]['num_queries']} queries, {found[0]['num_candidates']} candidates; cosine of queries to "
        text += f"those of transformers' layers.\n\n{table}"
        write_report(out, "engine_settings", "What the engine's settings cost in quality", command, text, found)
    typer.echo(json.dumps(found))


@app.command()
def probes(
    model: Model,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder for the results files and the picture.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many test questions; else all.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of noise and intervals.")] = 0,
) -> None:
    """Ask whether a model's answers need its latent states, and what these hold; the last line is one JSON object."""
    import json
    from dataclasses import asdict

    from plume import PlumeModel
    from plume_eval.hops.run import HopsTask
    from plume_eval.probes.run import Prober
    from plume_eval.report import markdown_table, write_report

    quiet_libraries()
    try:
        loaded, task = PlumeModel.from_pretrained(model, dtype="float32").eval(), HopsTask(data, limit=limit)
        found = Prober(loaded, task, seed=seed, show_progress=is_watched()).run()
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    table = markdown_table(["probe", "verdict"], [[probe.name, probe.verdict] for probe in found])
    typer.echo(table)
    whole = {"model": model, "data": str(data), "probes": [asdict(probe) for probe in found]}
    if out is not None:
        from plume_eval.probes.plots import draw_probes

        command = f"plume-eval probes --model {model} --data {data}" + (f" --limit {limit}" if limit else "")
        text = (
            f"{len(task.rows)} questions of {task.settings['task']}, K = {loaded.config.num_latent_steps}; intervals "
        )
        text += f"are 95 %, bootstrapped over questions.\n\n{table}"
        name = "_".join(["probes", task.settings["task"], Path(model).name])
        path = write_report(out, name, "Are the latent states used?", command, text, whole)
        draw_probes(path.with_suffix(".png"), {probe.name: probe.values for probe in found}, f"{model} on {data}")
        typer.echo(f"written: {path}.{{md,json,png}}")
    typer.echo(json.dumps(whole))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Where plume-hops has left its results.")],
    out: Annotated[Path, typer.Option(help="Folder for the results files and the pictures.")],
) -> None:
    """Join the results of the hops grid into tables, and say which of the paper's claims they bear out."""
    from plume_eval.hops.report import draw_families, write_text
    from plume_eval.report import write_report

    try:
        text, numbers, lines = write_text(folder)
    except OSError as error:
        raise typer.Exit(_fail(error)) from None
    path = write_report(out, folder.resolve().name, "Does it reason?", f"plume-eval report {folder}", text, numbers)
    draw_families(path, lines)
    typer.echo(text)
    typer.echo(f"written: {path}.{{md,json}} and a picture of each family")


Task = Annotated[
    list[str] | None, typer.Option(help="A task, a group or a modality; can be repeated; all 78 if not given.")
]
FromHub = Annotated[bool, typer.Option("--from-hub", help="Download rows that the local copy does not hold.")]


@mmeb.callback(invoke_without_command=True)
def run_mmeb(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Checkpoint: a folder or a Hub name.", callback=_checked)] = None,
    data: Annotated[Path | None, typer.Option(help="Local copy of TIGER-Lab/MMEB-V2.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for vectors, results and the report.")] = Path("runs/mmeb"),
    task: Task = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="latent, single_pass, explicit or anchor; can be repeated; latent if not given."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The model is another's: how it is to be used; see eval/README.md.")
    ] = None,
    num_latent_steps: Annotated[
        int | None, typer.Option(help="K of queries; the checkpoint's own if not given.")
    ] = None,
    document_latent_steps: Annotated[int | None, typer.Option(help="K of candidates, if another.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Limit of a written rationale; 512 if not given.", min=1)
    ] = None,
    truncate_dim: Annotated[int | None, typer.Option(help="Numbers of a vector that are kept.", min=1)] = None,
    precision: Annotated[Literal["float32", "int8", "binary"], typer.Option(help="Of vectors.")] = "float32",
    template: Annotated[
        list[str] | None, typer.Option(help='A sentence about a class, "{}" its name; can be repeated, for a mean.')
    ] = None,
    prompts: Annotated[
        Literal["vlm2vec", "plume_published"],
        typer.Option(help="plume_published leaves out the prompts of ViDoRe, ViDoSeek and MMLongBench."),
    ] = "vlm2vec",
    batch_size: Annotated[int, typer.Option(help="Inputs per pass at most.", min=1)] = 32,
    from_hub: FromHub = False,
) -> None:
    """Score a model on MMEB-V2, each task as the field reports it; a run that was stopped goes on where it was.

    Several GPUs: accelerate launch -m plume_eval mmeb --model M --data ROOT
    """
    if context.invoked_subcommand is not None:
        return
    if model is None or data is None:
        raise typer.BadParameter("expected --model and --data, or one of the commands check and report")
    from plume_eval.mmeb.command import run_all
    from plume_eval.mmeb.run import Settings

    quiet_libraries()
    try:
        incomplete = run_all(
            model,
            data,
            out,
            task_names=task or (),
            modes=mode or (),
            baseline=baseline,
            num_latent_steps=num_latent_steps,
            document_latent_steps=document_latent_steps,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            settings=Settings(
                truncate_dim=truncate_dim,
                precision=precision,
                templates=tuple(template or ("{}",)),
                prompts=prompts,
                from_hub=from_hub,
            ),
            show_progress=is_watched(),
            say=typer.echo,
            command=_typed("plume-eval mmeb", context.params),
        )
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    if incomplete:
        raise typer.Exit(_fail(RuntimeError(f"{incomplete} results are incomplete; the report says why")))


@mmeb.command("check")
def check_mmeb(
    data: Annotated[Path, typer.Option(help="Local copy of TIGER-Lab/MMEB-V2.")],
    task: Task = None,
    from_hub: FromHub = False,
) -> None:
    """Say for each task what is there and what is missing, before a GPU is paid for."""
    from plume_eval.mmeb.check import check_tasks, table_of
    from plume_eval.mmeb.tasks import find_tasks

    quiet_libraries()
    try:
        if not data.is_dir():
            raise ValueError(f"there is no folder {data}; name the local copy of TIGER-Lab/MMEB-V2 with --data")
        found = check_tasks(find_tasks(task or ()), data, from_hub=from_hub, show_progress=is_watched())
    except ValueError as error:
        raise typer.Exit(_fail(error)) from None
    typer.echo(table_of(found))
    missing = sum(bool(one.problems) for one in found)
    typer.echo(f"{len(found) - missing} of {len(found)} tasks are complete")
    if missing:
        raise typer.Exit(1)


@mmeb.command("report")
def report_mmeb(
    folder: Annotated[list[Path], typer.Argument(help="Folders of results; the first is compared with the others.")],
    out: Annotated[Path, typer.Option(help="Folder for the report and its picture.")],
) -> None:
    """Put results beside each other and beside what was published."""
    from plume_eval.mmeb.report import System, write_files

    try:
        path = write_files(
            [System.read(one) for one in folder], out, f"plume-eval mmeb report {' '.join(map(str, folder))}"
        )
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    typer.echo(f"written: {path}.{{md,json,png}}")


@app.command("mteb")
def run_mteb(
    model: Model,
    benchmark: Annotated[
        list[str] | None, typer.Option(help='Of mteb, for example "ViDoRe(v3)", "MIEB(lite)"; can be repeated.')
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of mteb; can be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for mteb's results.")] = Path("runs/mteb"),
    num_latent_steps: Annotated[int | None, typer.Option(help="K; the checkpoint's own if not given.")] = None,
    document_latent_steps: Annotated[int | None, typer.Option(help="K of documents, if another.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per pass at most.", min=1)] = 32,
) -> None:
    """Run tasks of mteb, such as ViDoRe, MIEB and MVEB; what has a result is not run again."""
    if not benchmark and not task:
        raise typer.BadParameter("expected --benchmark or --task")
    try:
        import mteb  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise typer.Exit(_fail(ImportError("this needs mteb; pip install 'plume-embed[mteb]'"))) from None
    from plume_eval.mteb_model import PlumeMTEB

    quiet_libraries()
    try:
        opened = PlumeMTEB(model, num_latent_steps=num_latent_steps, document_latent_steps=document_latent_steps)
        tasks = [one for name in benchmark or () for one in mteb.get_benchmark(name).tasks]
        tasks += [mteb.get_task(name) for name in task or ()]
        results = mteb.evaluate(
            opened, tasks, cache=mteb.ResultCache(out), encode_kwargs={"batch_size": batch_size}, raise_error=False
        )
    except (ValueError, KeyError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    for result in results.task_results:
        typer.echo(f"{result.task_name}: {result.get_score():.4f}")
    for failed in results.exceptions or ():
        say(f"{failed.task_name}: {failed.exception}", err=True)
    if results.exceptions:
        raise typer.Exit(1)


@app.command()
def serving(
    model: Annotated[str | None, typer.Option(help="Checkpoint: a folder or a Hub name.", callback=_checked)] = None,
    shapes: Annotated[
        Literal["tiny", "mid", "2b", "7b"] | None, typer.Option(help="Random weights of these shapes, instead.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results files.")] = None,
    port: Annotated[int, typer.Option(help="A free one.")] = 8765,
    num_texts: Annotated[int, typer.Option(help="Of a run of throughput.", min=1)] = 2_048,
    num_requests: Annotated[int, typer.Option(help="Over which memory is watched.", min=4)] = 4_000,
    minutes: Annotated[float, typer.Option(help="Of requests at 70 % of capacity.", min=0.1)] = 1,
) -> None:
    """Measure `plume serve`: throughput beside `encode`, overhead, latency under load, memory, draining; minutes."""
    from plume_eval.serving import measure_serving, random_checkpoint, write_serving

    quiet_libraries()
    if (model is None) == (shapes is None):
        raise typer.Exit(_fail(ValueError("give one of --model and --shapes")))
    try:
        with nullcontext(str(model)) if shapes is None else random_checkpoint(shapes) as checkpoint:
            found = measure_serving(
                checkpoint,
                port,
                num_texts=num_texts,
                num_requests=num_requests,
                seconds=60 * minutes,
                report=lambda line: say(line, err=True),
            )
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    settings = f" --num-texts {num_texts} --num-requests {num_requests} --minutes {minutes:g}"
    what, name = (f"--model {model}", "serving") if shapes is None else (f"--shapes {shapes}", f"serving_{shapes}")
    typer.echo(write_serving(name, f"plume-eval serving {what}{settings}", out, found))


@app.command()
def search(
    out: Annotated[Path | None, typer.Option(help="Folder for the results files.")] = None,
    num_things: Annotated[int, typer.Option(help="Of the made collection; three rows each.", min=20)] = 300,
    num_rows: Annotated[int, typer.Option(help="Of the larger one that is timed.", min=300)] = 100_000,
) -> None:
    """Measure what each stage of a search finds and costs, on made vectors whose answers are known; minutes."""
    from plume_eval.report import write_report
    from plume_eval.search import run_search, tables

    quiet_libraries()
    try:
        found = run_search(num_things, num_rows)
    except (ValueError, OSError, ImportError) as error:
        raise typer.Exit(_fail(error)) from None
    text = tables(found)
    typer.echo(text)
    if out is not None:
        command = f"plume-eval search --num-things {num_things} --num-rows {num_rows}"
        write_report(out, "search", "What each stage of a search finds and costs", command, text, found)


@app.command()
def confidence(
    model: Model,
    data: Data,
    num_latent_steps: Annotated[int | None, typer.Option(help="K; the checkpoint's own if not given.", min=2)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results files.")] = None,
) -> None:
    """Judge what could tell right first results from wrong ones: scores, or the way of the latent steps; on hops."""
    from plume import Plume
    from plume_eval.confidence import confidence as measure
    from plume_eval.confidence import table
    from plume_eval.report import write_report

    quiet_libraries()
    try:
        found = measure(Plume(model), data, num_latent_steps)
    except (ValueError, OSError, ImportError) as error:
        raise typer.Exit(_fail(error)) from None
    text = table(found)
    typer.echo(text)
    if out is not None:
        steps = "" if num_latent_steps is None else f" --num-latent-steps {num_latent_steps}"
        command = f"plume-eval confidence --model {model} --data {data}{steps}"
        write_report(out, "confidence", "What tells right results from wrong ones", command, text, found)


@app.command()
def overhead(
    model: Model,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder for the results files.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per pass.", min=1)] = 32,
    num_batches: Annotated[int, typer.Option(help="Batches per call.", min=1)] = 8,
    num_runs: Annotated[int, typer.Option(help="Timed runs.", min=1)] = 9,
) -> None:
    """Measure what `Plume.encode` costs over the bare forward pass, on queries of the built-in task."""
    import json

    from plume import Plume
    from plume_eval.hops.run import HopsTask
    from plume_eval.overhead import encode_overhead
    from plume_eval.report import markdown_table, write_report

    quiet_libraries()
    try:
        plume, count = Plume(model), batch_size * num_batches
        queries = HopsTask(data).queries()[:count]
    except (ValueError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    if len(queries) < count:
        raise typer.Exit(_fail(ValueError(f"{data} has {len(queries)} queries; {num_batches} batches need {count}")))
    if not all(query.images for query in queries):
        raise typer.Exit(_fail(ValueError(f"{data} shows no pictures; name data of the family page or image")))
    inputs = {
        "text": [query.text for query in queries],
        "page": [query.images[0] for query in queries],
        "page and text": [{"image": query.images[0], "text": query.text} for query in queries],
    }
    results = {
        kind: encode_overhead(plume, raws, batch_size=batch_size, num_runs=num_runs) for kind, raws in inputs.items()
    }
    rows = [
        [kind, *(f"{one[name]:.1f}" for name in ("forward_ms", "prepare_ms", "encode_ms")), f"{one['overhead']:.1%}"]
        for kind, one in results.items()
    ]
    table = markdown_table(["input", "forward alone, ms", "preparing alone, ms", "encode, ms", "overhead"], rows)
    typer.echo(table)
    if out is not None:
        command = f"plume-eval overhead --model {model} --data {data} --batch-size {batch_size}"
        command += f" --num-batches {num_batches}"
        text = f"Medians per batch of {batch_size}; {num_batches} batches per call; media decoded before.\n\n{table}"
        title = "What `Plume.encode` costs over the forward pass"
        write_report(out, "encode_overhead", title, command, text, results)
    typer.echo(json.dumps(results))


@app.command()
def latency(
    config: Annotated[Path, typer.Option(help="What to measure: a YAML file, or a name such as latency_demo.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results files.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint, instead of the configuration's.", callback=_checked)
    ] = None,
) -> None:
    """Measure what reasoning costs per query; the last line of the output is one JSON object."""
    import json
    from functools import partial

    from plume_eval.speed.config import ConfigError, read_config
    from plume_eval.speed.implementations import ImplementationError
    from plume_eval.speed.run import GateError, run_bench
    from plume_eval.speed.show import tables, write_results

    quiet_libraries()
    try:
        wanted = read_config(config, {"model": model, "shapes": None} if model else None)
        command = f"plume-eval latency --config {config}" + (f" --model {model}" if model else "")
        save = None if out is None else partial(write_results, config=wanted, command=command, out=out)
        result = run_bench(wanted, after_group=save and partial(save, picture=False))
    except (ConfigError, GateError, ImplementationError, OSError) as error:
        raise typer.Exit(_fail(error)) from None
    typer.echo(tables(result, wanted))
    if save is not None:
        typer.echo(f"written: {save(result)}.{{md,json,png}}")
    typer.echo(json.dumps(result))
    if result["failed"]:
        raise typer.Exit(_fail(RuntimeError("some of it failed: " + "; ".join(result["left_out"]))))


def _typed(program: str, options: dict[str, Any]) -> str:
    """The command with the options that were given."""
    words = [program]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value not in (None, False):
            listed = value if isinstance(value, (list, tuple)) else [value]
            words += [f"{flag} {shlex.quote(str(one))}" for one in listed]
    return " ".join(words)


def _fail(error: Exception) -> int:
    say("\n".join([f"plume-eval: {error}", *getattr(error, "__notes__", ())]), err=True)
    return 1


def main() -> None:
    """Parse, call, exit."""
    with plain_warnings("plume-eval"):
        run_app(app, "plume-eval")


if __name__ == "__main__":
    main()
