"""The command `plume`."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Multimodal embeddings by latent reasoning.")

Files = Annotated[list[Path] | None, typer.Argument(help="Text, image, video and PDF files; a PDF gives its pages.")]
Model = Annotated[str, typer.Option(help="Checkpoint: a folder or a Hub name.")]
Text = Annotated[list[str] | None, typer.Option(help="A text to take as well; may be repeated.")]
Steps = Annotated[int | None, typer.Option(help="K; 0 is a single pass; the checkpoint's own if not given.")]
BatchSize = Annotated[int, typer.Option(help="Inputs per pass.", min=1)]

_DEMO = "runs/demo/latent"


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
    if out.suffix not in (".npz", ".npy", ".jsonl"):
        _stop(f"--out {out}: expected a name that ends with .npz, .npy or .jsonl")
    names, inputs, refused = _collect(files or [], text or [])
    if refused and on_error == "raise":
        _stop(refused[0])
    if not inputs:
        _stop("\n".join(refused) or "nothing to encode; name files, or give --text")

    from plume import InputError, Plume
    from plume.threads import use_physical_cores

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use_physical_cores()
            vectors = Plume(model, int8=int8).encode(
                inputs,
                num_latent_steps=num_latent_steps,
                instruction=instruction,
                prompt_name=prompt_name,
                batch_size=batch_size,
                on_error=on_error,
            )
    except (InputError, ValueError, OSError) as error:
        _stop(_named(str(error), names))
    skipped = [
        line
        for one in caught
        if "inputs were skipped" in str(one.message)
        for line in str(one.message).splitlines()[1:]
    ]
    good = [row for row in range(len(names)) if vectors[row, 0] == vectors[row, 0]]  # NaN marks a skipped row
    if len(good) + len(skipped) != len(names):
        _stop(f"{model} gave NaN for {len(names) - len(skipped) - len(good)} inputs; its weights are broken")
    _write(out, [names[row] for row in good], vectors[good])
    typer.echo(f"{len(good)} vectors of {vectors.shape[1]} numbers in {out}")
    for one in caught:
        if "inputs were skipped" not in str(one.message):
            typer.echo(f"warning: {one.message}", err=True)
    for line in refused + skipped:
        typer.echo(f"skipped: {_named(line, names)}", err=True)
    if refused or skipped:
        raise typer.Exit(1)


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="Walked with its subfolders; hidden files are passed over.")],
    model: Model = _DEMO,
    out: Annotated[Path, typer.Option(help="The index; extended if it exists.")] = Path("plume-index"),
    instruction: Annotated[str, typer.Option(help="For every document.")] = "",
    query_instruction: Annotated[str, typer.Option(help="For every query.")] = "",
    num_latent_steps: Annotated[int | None, typer.Option(help="K of documents; 0 is a single pass.")] = None,
    query_latent_steps: Annotated[int | None, typer.Option(help="K of queries; 0 is a single pass.")] = None,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep this many numbers of each vector.", min=1)] = None,
    batch_size: BatchSize = 32,
    forget: Annotated[bool, typer.Option("--forget", help="Remove the folder's rows instead of adding.")] = False,
) -> None:
    """Embed a folder of text, images, video and PDFs, or bring its index up to date.

    Run it again after files were added, changed or deleted, or after it was interrupted: what has been embedded is not
    embedded again. Files that cannot be read are listed and left out.
    """
    if not forget and not folder.is_dir():
        _stop(f"{folder} is no folder; expected one with files to index")

    from plume import Plume
    from plume.index import Index
    from plume.threads import use_physical_cores

    try:
        if forget:
            typer.echo(f"{Index.open(out).remove(folder)} rows removed from {out}")
            return
        use_physical_cores()
        plume = Plume(model, truncate_dim=truncate_dim)
        target = Index.create(
            out,
            plume,
            num_latent_steps=num_latent_steps,
            query_latent_steps=query_latent_steps,
            instruction=instruction,
            query_instruction=query_instruction,
        )
        report = target.update(folder, plume, batch_size=batch_size)
    except (ValueError, OSError) as error:
        _stop(str(error))
    for skipped in report.skipped:
        typer.echo(_printable(f"skipped: {skipped.name}: {skipped.reason}"), err=True)
    typer.echo(
        f"{len(target)} rows in {out}: {report.embedded} embedded, {report.reused} reused, {report.removed} removed; "
        f"{report.unchanged} files unchanged, {len(report.skipped)} skipped"
    )


@app.command()
def search(
    text: Annotated[str | None, typer.Argument(help="Words to search for.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image to search with; may be repeated.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to search with.")] = None,
    index: Annotated[Path, typer.Option(help="The index.")] = Path("plume-index"),
    model: Annotated[str | None, typer.Option(help="Checkpoint; the one that made the index if not given.")] = None,
    top_k: Annotated[int, typer.Option(help="Results at most.", min=1)] = 10,
    where: Annotated[str | None, typer.Option(help="A condition, for example \"kind = 'pdf'\".")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with thumbnails.")] = None,
) -> None:
    """Search an index by words, an image, a video, or all of them as one query."""
    query = {key: value for key, value in (("image", image), ("video", video), ("text", text)) if value}
    if not query:
        _stop("nothing to search for; give words, --image or --video")

    from plume import Plume
    from plume.gallery import gallery
    from plume.index import Index
    from plume.threads import use_physical_cores

    try:
        source = Index.open(index)
        dim, made_with = source.identity.dim, source.identity.model
        if model is None and Path(made_with).is_absolute() and not Path(made_with).is_dir():
            _stop(f"the index was made with {made_with}, which is not there any more; say where it is with --model")
        use_physical_cores()
        plume = Plume(model or made_with)
        if dim < (plume.get_embedding_dimension() or 0):
            plume.truncate_dim = dim
        hits = source.search(query, plume, top_k=top_k, where=where)
    except (ValueError, OSError) as error:
        _stop(str(error).replace("input 0", "the query"))
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        title = " + ".join([*([text] if text else []), *map(str, image or []), *([str(video)] if video else [])])
        html.write_text(gallery(hits, title), encoding="utf-8")
        typer.echo(f"{len(hits)} results in {html}", err=as_json)
    if hits and not as_json and html is None:
        typer.echo("  #   score  kind   file")
    for rank, hit in enumerate(hits, start=1):
        if as_json:
            typer.echo(json.dumps({"rank": rank, **hit.to_dict()}, ensure_ascii=False))
        elif html is None:
            place = f"{hit.path}#page={hit.page}" if hit.page else hit.path
            excerpt = " ".join(hit.excerpt.split())[:60]
            line = f"{rank:3}  {hit.score:6.3f}  {hit.kind:5}  {place}" + (f"  {excerpt}" if excerpt else "")
            typer.echo(_printable(line))
    if not hits:
        typer.echo("no results" + (f" where {where}" if where else "; the index is empty"), err=True)


@app.command()
def trace(
    files: Files = None,
    model: Model = _DEMO,
    out: Annotated[Path, typer.Option(help="Folder for trace.json and the pictures.")] = Path("trace"),
    text: Text = None,
    candidate: Annotated[list[str] | None, typer.Option(help="A text to compare every state with.")] = None,
    num_latent_steps: Steps = None,
) -> None:
    """Show what happened inside: states, gates, nearest words, as a page per input and one JSON file.

    With several inputs, experts.png shows which experts served which modality.
    """
    names, inputs, refused = _collect(files or [], text or [])
    if refused:
        _stop("\n".join(refused))
    if not inputs:
        _stop("nothing to trace; name files, or give --text")

    import torch

    from plume import PlumeModel
    from plume.draw import draw_expert_use, draw_trace
    from plume.trace import expert_use

    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = PlumeModel.from_pretrained(model).to(device).eval()
        traces = loaded.trace(inputs, num_latent_steps=num_latent_steps, candidates=candidate, names=names)
    except (ValueError, OSError) as error:
        _stop(_named(str(error), names))
    out.mkdir(parents=True, exist_ok=True)
    use = {modality: share.tolist() for modality, share in expert_use(traces).items()}
    whole = {"model": model, "expert_use": use, "traces": [one.to_dict() for one in traces]}
    (out / "trace.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        for number, one in enumerate(traces):
            draw_trace(one, out / f"{number:03}.png")
        if len(traces) > 1 and use:
            draw_expert_use(traces, out / "experts.png")
    except ImportError as error:
        _stop(f"{out / 'trace.json'} is written, pictures are not: {error}")
    typer.echo(f"{len(traces)} traces in {out}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Published PLUME checkpoint: a folder or a Hub name.")],
    destination: Annotated[Path, typer.Argument(help="Where to write; must be new or empty.")],
) -> None:
    """Turn a published PLUME checkpoint into a folder that opens everywhere."""
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        _stop(f"{destination} is not empty; name a new folder")

    from plume import PlumeModel
    from plume.published import is_published

    try:
        if not is_published(source):
            _stop(f"{source} holds no adapter of the published format (latent_moe_transition.*); nothing to convert")
        model = PlumeModel.from_pretrained(source)
        model.save_pretrained(destination)
    except (ValueError, OSError) as error:
        _stop(str(error))
    config = model.config
    typer.echo(
        f"{destination}: K = {config.num_latent_steps}, {config.num_experts} experts, "
        f"positions {config.latent_positions}, {sum(p.numel() for p in model.parameters()):,} parameters"
    )


def _collect(files: Sequence[Path], texts: Sequence[str]) -> tuple[list[str], list[Any], list[str]]:
    """Names and inputs of what can be read, and a line for each file that cannot."""
    from plume.images import InputError
    from plume.inputs import inputs_of

    found: list[tuple[str, Any]] = []
    refused: list[str] = []
    for file in files:
        try:
            found += inputs_of(file)
        except InputError as error:
            refused.append(str(error))
    return [*(name for name, _ in found), *texts], [*(one for _, one in found), *texts], refused


def _named(message: str, names: Sequence[str]) -> str:
    """The message with "input 3" followed by the name that the user knows."""
    return re.sub(
        r"\binput (\d+)\b", lambda found: names[int(found[1])] if int(found[1]) < len(names) else found[0], message
    )


def _printable(line: str) -> str:
    """The line without what would steer a terminal; names of files and texts may hold anything."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def _write(out: Path, names: list[str], vectors: Any) -> None:
    import numpy as np

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, embeddings=vectors, names=np.array(names))
    elif out.suffix == ".npy":
        np.save(out, vectors)
    else:
        lines = (
            json.dumps({"name": name, "embedding": vector.tolist()}, ensure_ascii=False)
            for name, vector in zip(names, vectors, strict=True)
        )
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _stop(message: str) -> NoReturn:
    typer.echo(f"plume: {message}", err=True)
    sys.exit(1)


def main() -> None:
    """Parse, call, exit."""
    app()
