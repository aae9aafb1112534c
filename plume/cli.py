"""The command `plume`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from plume.checkpoints.place import check_place, stay_offline_without_network
from plume.terminal import counted, is_printable, is_watched, plain_warnings, quiet_libraries, run_app, say
from plume.version import __version__

if TYPE_CHECKING:
    from plume import InputError
    from plume.corpus.plan import Job
    from plume.search.index import Index

app = typer.Typer(no_args_is_help=True)

Files = Annotated[
    list[Path] | None,
    typer.Argument(help="Text, image, video and PDF files; a PDF gives its pages. `-` reads names, one per line."),
]
Model = Annotated[str, typer.Option(help="Checkpoint: a folder or a Hub name.")]
Text = Annotated[list[str] | None, typer.Option(help="A text to take as well; may be repeated.")]
Steps = Annotated[int | None, typer.Option(help="K; 0 is a single pass; the checkpoint's own if not given.")]
BatchSize = Annotated[int, typer.Option(help="Inputs per pass.", min=1)]

_DEMO = "runs/demo/latent"
# 768 visual tokens: a page of A4 at 80 dots per inch, and a quarter of what a checkpoint takes.
_INDEX_PIXELS = 768 * 28 * 28
# What a number of a vector takes in a file, by its kind.
_NUMBER_BYTES = {".npz": 4, ".npy": 4, ".jsonl": 24}


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


@app.command()
def encode(
    files: Files = None,
    model: Model = _DEMO,
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
    if out.suffix not in _NUMBER_BYTES:
        _stop(f"--out {out}: expected a name that ends with .npz, .npy or .jsonl")
    paths, refused = _named(files or [])
    if refused and (on_error == "raise" or not (paths or text)):
        _stop("\n".join(refused))
    if not (paths or text):
        _stop("nothing to encode; name files, or give --text")
    _check_model(model)
    _check_writable(out)
    names, inputs, unreadable = _collect(paths, text or [])
    refused += unreadable
    if refused and (on_error == "raise" or not inputs):
        _stop("\n".join(refused))

    import numpy as np

    from plume import Plume
    from plume.threads import use_physical_cores

    skipped: list[InputError] = []
    try:
        with _running(lambda: f"nothing was written to {out}", skipped):
            use_physical_cores()
            plume = Plume(model, int8=int8)
            _check_writable(out, _NUMBER_BYTES[out.suffix] * len(inputs) * plume.plume_config.hidden_size)
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
        _stop(_message(error, names))
    bad = {error.index for error in skipped}
    good = [row for row in range(len(names)) if row not in bad]
    refused += [_message(error, names) for error in skipped]
    if not good:
        _stop("\n".join([*refused, f"nothing was written to {out}"]))
    if num_broken := int(np.isnan(vectors[good]).any(axis=1).sum()):
        _stop(f"{model} gave NaN for {num_broken} inputs; its weights are broken")
    try:
        _write(out, [names[row] for row in good], vectors[good])
    except OSError as error:
        _stop(f"{out} cannot be written ({error.strerror}), and is as it was; free space or choose another --out")
    say(f"{counted(len(good), 'vector')} of {vectors.shape[1]} numbers in {out}")
    for line in refused:
        say(f"skipped: {line}", err=True)
    if refused:
        raise typer.Exit(1)


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="Walked with its subfolders; hidden files are passed over.")],
    model: Model = _DEMO,
    out: Annotated[Path, typer.Option(help="The index; extended if it exists.")] = Path("plume-index"),
    instruction: Annotated[str | None, typer.Option(help="For every document.")] = None,
    query_instruction: Annotated[str | None, typer.Option(help="For every query.")] = None,
    num_latent_steps: Annotated[int | None, typer.Option(help="K of documents; 0 is a single pass.")] = None,
    query_latent_steps: Annotated[int | None, typer.Option(help="K of queries; 0 is a single pass.")] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help=f"Larger images and pages are reduced; {_INDEX_PIXELS:,} if not given.", min=1)
    ] = None,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep this many numbers of each vector.", min=1)] = None,
    batch_size: BatchSize = 32,
    forget: Annotated[bool, typer.Option("--forget", help="Remove the folder's rows instead of adding.")] = False,
) -> None:
    """Embed a folder of text, images, video and PDFs, or bring its index up to date.

    Run it again after files were added, changed or deleted, or after it was interrupted: what has been embedded is not
    embedded again, and settings that are not given stay. Files that cannot be read are listed and left out.
    """
    if not forget:
        if not folder.is_dir():
            from plume.inputs.file_kinds import as_typed

            _stop(f"{as_typed(folder)} is no folder; expected one with files to index, on this machine")
        _check_model(model)

    from plume import Plume
    from plume.search.index import IDENTITY, SETTINGS, Index
    from plume.threads import use_physical_cores

    target: Index | None = None

    def left() -> str:
        rows = 0 if target is None else len(target)
        return f"{out} holds {counted(rows, 'row')}, which stay; run the same command again to go on"

    try:
        with _running(left):
            if forget:
                say(f"{counted(Index.open(out).remove(folder), 'row')} removed from {out}")
                return
            use_physical_cores()
            plume = Plume(model, truncate_dim=truncate_dim)
            settings: dict[str, Any] = {"max_pixels": _INDEX_PIXELS}
            if (out / IDENTITY).exists():
                made = Index.open(out).identity
                settings = {name: getattr(made, name) for name in SETTINGS}
                if truncate_dim is None and made.dim < plume.get_embedding_dimension():
                    plume.truncate_dim = made.dim
            given = {
                "num_latent_steps": num_latent_steps,
                "query_latent_steps": query_latent_steps,
                "instruction": instruction,
                "query_instruction": query_instruction,
                "max_pixels": max_pixels,
            }
            settings |= {name: value for name, value in given.items() if value is not None}
            target = Index.create(out, plume, **settings)
            report = target.update(folder, plume, batch_size=batch_size, show_progress=is_watched())
    except (ValueError, OSError) as error:
        _stop(str(error))
    for skipped in report.skipped:
        say(f"skipped: {skipped.name}: {skipped.reason}", err=True)
    if report.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.others.most_common())
        say(f"passed over, of other kinds: {kinds}", err=True)
    for place, count in report.gone.items():
        say(
            f"gone: {place}, to which {counted(count, 'row')} lead; if it has moved, index it where it is now, and "
            f"forget the old place: plume index {shlex.quote(place)} --forget --out {shlex.quote(str(out))}",
            err=True,
        )
    say(
        f"{counted(len(target), 'row')} in {out}: {report.embedded} embedded, {report.reused} reused, "
        f"{report.removed} removed; {report.unchanged} files unchanged, {len(report.skipped)} skipped"
    )


@app.command()
def search(
    text: Annotated[str | None, typer.Argument(help="Words to search for.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image to search with; may be repeated.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to search with.")] = None,
    index: Annotated[Path, typer.Option(help="The index.")] = Path("plume-index"),
    model: Annotated[str | None, typer.Option(help="Checkpoint; the one that made the index if not given.")] = None,
    top_k: Annotated[int, typer.Option(help="Results at most.", min=1)] = 10,
    words: Annotated[
        str | None, typer.Option(help="Words to look for in texts, pages and names too; the query's if not given.")
    ] = None,
    hybrid: Annotated[
        float | None,
        typer.Option(help="Weight of words beside vectors, 0 to 1; 0.5 with --words, else 0.", min=0, max=1),
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="text, image, video or pdf; may be repeated.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Files below it alone.")] = None,
    path: Annotated[Path | None, typer.Option(help="This file alone.")] = None,
    page: Annotated[int | None, typer.Option(help="This page of PDFs alone.", min=1)] = None,
    since: Annotated[str | None, typer.Option(help="Files written last on this day or later, as 2026-01-31.")] = None,
    until: Annotated[str | None, typer.Option(help="Files written last on this day or before.")] = None,
    where: Annotated[str | None, typer.Option(help="A condition in SQL, for example \"kind = 'pdf'\".")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every row of a large index too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with thumbnails.")] = None,
) -> None:
    """Search an index by words, an image, a video, or all of them as one query.

    Results are those whose vectors are nearest; with --hybrid also those that hold the words themselves.
    """
    query = {key: value for key, value in (("image", image), ("video", video), ("text", text)) if value}
    if not query:
        _stop("nothing to search for; give words, --image or --video")
    if text and not image and not video:
        _check_words(text)
    if model is not None:
        _check_model(model)

    from plume import Plume
    from plume.search.filter import Filter, day_of
    from plume.search.index import Index
    from plume.search.results_page import gallery
    from plume.threads import use_physical_cores

    try:
        with _running(lambda: "nothing was changed"):
            rows = Filter(
                kinds=tuple(kind or ()),
                folder="" if folder is None else str(folder.resolve()),
                path="" if path is None else str(path.resolve()),
                page=page,
                since=day_of(since),
                until=day_of(until),
            )
            source = Index.open(index)
            dim = source.identity.dim
            use_physical_cores()
            plume = Plume(model or _maker(source))
            if dim < plume.get_embedding_dimension():
                plume.truncate_dim = dim
            hits = source.search(
                query, plume, top_k=top_k, where=where, filter=rows, text=words, hybrid=hybrid, exact=exact
            )
    except (ValueError, OSError) as error:
        _stop(_message(error, ["the query"]))
    if html is not None:
        title = " + ".join([*([text] if text else []), *map(str, image or []), *([str(video)] if video else [])])
        try:
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(gallery(hits, title), encoding="utf-8", errors="replace")
        except OSError as error:
            _stop(f"--html {html} cannot be written ({error.strerror}); choose another place")
        say(f"{counted(len(hits), 'result')} in {html}", err=as_json)
    if hits and not as_json and html is None:
        typer.echo("  #   score  kind   file")
    for rank, hit in enumerate(hits, start=1):
        if as_json:
            typer.echo(_json({"rank": rank, **hit.to_dict()}))
        elif html is None:
            place = f"{hit.path}#page={hit.page}" if hit.page else hit.path
            place += "" if hit.is_there else "  (gone)"
            excerpt = " ".join(hit.excerpt.split())[:60]
            line = f"{rank:3}  {hit.score:6.3f}  {hit.kind:5}  {place}" + (f"  {excerpt}" if excerpt else "")
            say(line)
    if lost := [hit for hit in hits if not hit.is_there]:
        say(
            f"{len(lost)} of the results are not there any more, for example {lost[0].path}; index their folder "
            "again, or forget it with `plume index FOLDER --forget`",
            err=True,
        )
    if not hits:
        is_filtered = where is not None or rows.condition is not None
        say("no results" + (" that meet the conditions" if is_filtered else "; the index is empty"), err=True)


@app.command()
def trace(
    files: Files = None,
    model: Model = _DEMO,
    out: Annotated[Path, typer.Option(help="Folder for trace.json and the pictures.")] = Path("trace"),
    text: Text = None,
    instruction: Annotated[str | None, typer.Option(help="For every input.")] = None,
    candidate: Annotated[list[str] | None, typer.Option(help="A text to compare every state with.")] = None,
    num_latent_steps: Steps = None,
) -> None:
    """Show what happened inside: states, gates, nearest words, as a page per input and one JSON file.

    With several inputs, experts.png shows which experts served which modality, and which latent step.
    """
    paths, refused = _named(files or [])
    if refused:
        _stop("\n".join(refused))
    if not (paths or text):
        _stop("nothing to trace; name files, or give --text")
    _check_model(model)
    names, inputs, refused = _collect(paths, text or [])
    if refused:
        _stop("\n".join(refused))

    import torch

    from plume import PlumeModel
    from plume.threads import slow_on_cpu
    from plume.tracing.pictures import draw_expert_use, draw_trace
    from plume.tracing.trace import expert_use
    from plume.tracing.trace import trace as trace_inputs

    try:
        with _running(lambda: f"nothing was written to {out}"):
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
        _stop(_message(error, names))
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
        _stop(f"{out / 'trace.json'} is written, pictures are not: {error}")
    except OSError as error:
        _stop(f"{out} cannot be written ({error.strerror}); choose another --out")
    say(f"{counted(len(traces), 'trace')} in {out}")


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    program: Annotated[str, typer.Argument(help="Any program in Python, for example mteb.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
) -> None:
    """Start another program that has imported plume, so that it opens checkpoints which it is given by name."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (found := shutil.which(program, path=places)) is None:
        _stop(f"there is no program {program!r}; name one as you would start it, for example `plume run mteb run -m F`")
    before = os.environ.get("PYTHONPATH")
    home = str(Path(__file__).parent / "autoload")
    os.environ["PYTHONPATH"] = home if not before else f"{home}{os.pathsep}{before}"
    os.execv(found, [program, *(arguments or [])])


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Published PLUME checkpoint: a folder or a Hub name.")],
    destination: Annotated[Path, typer.Argument(help="Where to write; must be new or empty.")],
) -> None:
    """Turn a published PLUME checkpoint into a folder that opens everywhere."""
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        _stop(f"{destination} is not empty; name a new folder")
    _check_model(source)

    from safetensors import SafetensorError

    from plume import PlumeModel
    from plume.checkpoints.folder import is_stock
    from plume.checkpoints.published import is_published

    try:
        if not is_stock(source) or not is_published(source):
            _stop(f"{source} holds no adapter of the published format (latent_moe_transition.*); nothing to convert")
        beside = destination.with_name(f".{destination.name}.part{os.getpid()}") / destination.name
        with _running(lambda: f"nothing was written to {destination}"):
            try:
                model = PlumeModel.from_pretrained(source)
                model.save_pretrained(beside)
                beside.replace(destination)
            finally:
                shutil.rmtree(beside.parent, ignore_errors=True)
    except (ValueError, OSError, SafetensorError) as error:
        _stop(str(error))
    config = model.config
    say(
        f"{destination}: K = {config.num_latent_steps}, {config.num_experts} experts, "
        f"positions {config.latent_positions}, {sum(p.numel() for p in model.parameters()):,} parameters"
    )


def _named(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Files that plume reads, as far as their names tell, and a line for each of the others."""
    from plume.inputs.file_kinds import as_typed, why_not_read

    paths = [path for file in files for path in (_from_stdin() if str(file) == "-" else [file])]
    reasons = {path: why_not_read(path) for path in paths}
    return [path for path in paths if reasons[path] is None], [
        f"{as_typed(path)}: {why}" for path, why in reasons.items() if why
    ]


def _from_stdin() -> list[Path]:
    return [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().splitlines() if line.strip()]


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: a folder or a Hub name; the one that made --index if not given.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="An index, which the page at / searches; else there is none.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    served_as: Annotated[str, typer.Option(help="What clients call the model; its last name if not given.")] = "",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the best there is if not given.")] = None,
    input_type: Annotated[
        Literal["query", "document"] | None, typer.Option(help="The side of inputs whose request does not say.")
    ] = None,
    rerank: Annotated[
        bool, typer.Option("--rerank", help="Also answer /v1/rerank, by cosines; a cross-encoder ranks better.")
    ] = False,
    allowed_media_domains: Annotated[
        list[str] | None, typer.Option(help="A host that media may be fetched from; may be repeated; else none is.")
    ] = None,
    dimensions: Annotated[
        list[int] | None, typer.Option(help="A length that vectors may be cut to on request; may be repeated.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Inputs per pass.", min=1)] = 32,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens per pass, padding included.", min=1)] = 32_768,
    max_queue_tokens: Annotated[int, typer.Option(help="Tokens that may wait; beyond, 429.", min=1)] = 262_144,
    vector_cache_bytes: Annotated[int, typer.Option(help="Memory for vectors of inputs that come again.", min=0)] = 0,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of a request.", min=1)] = 50_000_000,
    api_key: Annotated[
        str | None, typer.Option(envvar="PLUME_API_KEY", help="That requests must bear; better in PLUME_API_KEY.")
    ] = None,
    notice_seconds: Annotated[
        float, typer.Option(help="After a signal, in which /ready says 503 and requests are taken.", min=0)
    ] = 0.0,
    grace_seconds: Annotated[int, typer.Option(help="For answers under way then.", min=1)] = 60,
) -> None:
    """Serve vectors over HTTP, by the APIs of OpenAI, vLLM, Jina, Cohere and TEI.

    One process and one model per GPU. What waits is bounded in tokens, what a request may hold is bounded before it is
    decoded, and no request opens a path, or an address of a host that is not allowed. With an index there is a page
    that searches it by words and pictures, and opens the files that were indexed.
    """
    searcher = None
    if index is not None:
        from plume.search.index import Index
        from plume.serving.search import Searcher

        try:
            model = model or _maker(Index.open(index))
        except (ValueError, OSError, ImportError) as error:
            _stop(str(error))
        searcher = Searcher(index)
    model = model or _DEMO
    _check_model(model)
    from plume.serving.server import serve as run
    from plume.serving.service import Settings

    quiet_libraries()
    settings = Settings(
        model=model,
        served_as=served_as,
        device=device,
        input_type=input_type,
        does_rank=rerank,
        allowed_media_domains=tuple(allowed_media_domains or ()),
        dimensions=tuple(dimensions or ()),
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        max_queue_tokens=max_queue_tokens,
        vector_cache_bytes=vector_cache_bytes,
        max_body_bytes=max_body_bytes,
        api_key=api_key or None,
    )
    status = run(
        settings,
        host=host,
        port=port,
        notice_seconds=notice_seconds,
        grace_seconds=grace_seconds,
        searcher=searcher,
    )
    if status:
        raise typer.Exit(status)


corpus = typer.Typer(no_args_is_help=True, help="Embed a corpus that outgrows one machine, and bring it into an index.")
app.add_typer(corpus, name="corpus")
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
    model: Model = _DEMO,
    shard_size: Annotated[int, typer.Option(help="Items of a shard, which one worker embeds.", min=1)] = 4096,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    column: Annotated[str | None, typer.Option(help="Of a table, where it has several of these.")] = None,
    instruction: Annotated[str, typer.Option(help="For every document.")] = "",
    query_instruction: Annotated[str, typer.Option(help="For every query.")] = "",
    num_latent_steps: Annotated[int | None, typer.Option(help="K of documents; 0 is a single pass.")] = None,
    query_latent_steps: Annotated[int | None, typer.Option(help="K of queries; 0 is a single pass.")] = None,
    max_pixels: Annotated[int, typer.Option(help="Larger images and pages are reduced.", min=1)] = _INDEX_PIXELS,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep this many numbers of each vector.", min=1)] = None,
    sample: Annotated[int, typer.Option(help="Contents to embed for an estimate; 0 makes none.", min=0)] = 32,
) -> None:
    """List what a source holds, in shards, and estimate the work.

    Run it again after the source has grown: what is planned stays; what is new, or could not be read, gets new shards.
    """
    _check_model(model)

    from plume import Plume
    from plume.corpus.plan import Job
    from plume.corpus.sources import entries
    from plume.corpus.work import ShardWorker
    from plume.search.index import Identity
    from plume.threads import use_physical_cores

    try:
        with _running(lambda: "run the same command again"):
            use_physical_cores()
            origin = Identity.of(
                Plume(model, truncate_dim=truncate_dim),
                num_latent_steps=num_latent_steps,
                query_latent_steps=query_latent_steps,
                instruction=instruction,
                query_instruction=query_instruction,
                max_pixels=max_pixels,
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
        _stop(str(error))


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
        with _running(lambda: "what is finished stays; run the same command again to go on"):
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
        _stop(str(error))
    _say_status(work)


@corpus.command()
def commit(
    job: Folder, out: Annotated[Path, typer.Option(help="The index; made if missing.")] = Path("plume-index")
) -> None:
    """Bring finished shards into an index, each row once, also after an interruption; other shards may still run."""
    from plume.corpus.commit import commit as bring
    from plume.corpus.plan import Job

    try:
        with _running(lambda: "run the same command again to go on"):
            work = Job.open(job)
            done = bring(work, out)
    except (ValueError, OSError, ImportError) as error:
        _stop(str(error))
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
        _stop(str(error))
    _say_status(work)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 600 else f"{seconds / 3600:.1f} hours"


def _say_status(job: Job) -> None:
    now = job.status()
    say(f"{now.done} of {counted(now.planned, 'shard')} done: {counted(now.rows, 'row')}, {len(now.skipped)} skipped")


def _maker(index: Index) -> str:
    """The checkpoint that made an index."""
    made_with = index.identity.model
    if Path(made_with).is_absolute() and not Path(made_with).is_dir():
        _stop(f"the index was made with {made_with}, which is not there any more; say where it is with --model")
    return made_with


def _check_model(name_or_path: str) -> None:
    """Stop before anything is imported if there can be no such checkpoint."""
    try:
        check_place(name_or_path)
    except ValueError as error:
        is_default = name_or_path == _DEMO
        _stop(f"{error}" + "; that is the default of --model, which `plume-demo` makes" * is_default)
    stay_offline_without_network(name_or_path)


def _check_words(text: str) -> None:
    """Ask back where words to search for are the name of a file."""
    from plume.inputs.file_kinds import SUFFIXES, Kind, kind_of

    path = Path(text)
    if path.suffix.lower() not in SUFFIXES or text != text.strip() or (" " in text and not path.is_file()):
        return
    flag = {Kind.IMAGE: "--image", Kind.VIDEO: "--video"}.get(kind_of(path) or Kind.TEXT)
    by = f"search by it with {flag} {shlex.quote(text)}" if flag else "search by words from it"
    _stop(f"{text!r} is the name of a file, not words; {by}, or add a space to search for the name")


def _collect(files: Sequence[Path], texts: Sequence[str]) -> tuple[list[str], list[Any], list[str]]:
    """Names and inputs of what can be read, and a line for each file that cannot."""
    from plume.inputs.errors import InputError
    from plume.inputs.item import inputs_in_file

    found: list[tuple[str, Any]] = []
    refused: list[str] = []
    for file in files:
        try:
            found += inputs_in_file(file)
        except InputError as error:
            refused.append(str(error))
    named = [text if text.strip() else f"--text {text!r}" for text in texts]
    return [*(name for name, _ in found), *named], [*(raw for _, raw in found), *texts], refused


def _message(error: Exception, names: Sequence[str]) -> str:
    """What an error says, with the name of the input that the user knows."""
    from plume import InputError

    if isinstance(error, InputError) and error.index is not None:
        return f"{names[error.index]}: {error.reason}"
    return str(error)


def _json(content: dict[str, Any]) -> str:
    """One line of JSON, in which what would steer a terminal is escaped."""
    line = json.dumps(content, ensure_ascii=False)
    return "".join(c if is_printable(c) else json.dumps(c)[1:-1] for c in line)


def _check_writable(out: Path, num_bytes: int = 4096) -> None:
    """Stop before the work if its result, of so many bytes, could not be written."""
    try:
        if out.is_dir():
            _stop(f"--out {out} is a folder; name a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        _stop(f"--out {out} cannot be written ({error.strerror}); choose another place")


def _write(out: Path, names: list[str], vectors: Any) -> None:
    """Write a file whole or not at all: beside its place, and renamed at the end."""
    import numpy as np

    beside = out.with_name(f".{out.name}.part{os.getpid()}")
    try:
        with beside.open("wb") as file:
            if out.suffix == ".npz":
                np.savez(file, embeddings=vectors, names=np.array(names))
            elif out.suffix == ".npy":
                np.save(file, vectors)
            else:
                for name, vector in zip(names, vectors, strict=True):
                    line = json.dumps({"name": name, "embedding": vector.tolist()}, ensure_ascii=False)
                    file.write(f"{line}\n".encode(errors="backslashreplace"))  # names need not be Unicode
            file.flush()
            os.fsync(file.fileno())
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _running(state: Callable[[], str], skipped: list[InputError] | None = None) -> Iterator[None]:
    """Say warnings in a line as they come; where SIGINT or SIGTERM stops the work, say what it leaves.

    Args:
        state: what is left, if it is stopped.
        skipped: gets the inputs that `Plume.encode` skips; they are not said.
    """
    caught = signal.SIGINT

    def terminate(number: int, frame: Any) -> NoReturn:
        nonlocal caught
        caught = signal.Signals(number)
        raise KeyboardInterrupt

    def take(warning: Any) -> bool:
        if skipped is None or not hasattr(warning, "errors"):
            return False
        skipped.extend(warning.errors)  # a SkippedInputsWarning
        return True

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with plain_warnings("plume", take):
            quiet_libraries()
            yield
    except KeyboardInterrupt:
        say(f"plume: stopped; {state()}", err=True)
        sys.exit(128 + caught)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(message: str) -> NoReturn:
    for number, line in enumerate(message.splitlines() or [""]):
        say(line if number else f"plume: {line}", err=True)
    sys.exit(1)


def main() -> None:
    """Parse, call, exit."""
    run_app(app, "plume")
