"""`plume index`, `plume search`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from plume.cli.inputs import (
    DEMO,
    INDEX_PIXELS,
    BatchSize,
    ClipSeconds,
    Model,
    PassageTokens,
    check_model,
    check_words,
    message_of,
)
from plume.cli.output import json_line
from plume.cli.running import running, stop
from plume.terminal import counted, is_watched, say

if TYPE_CHECKING:
    from plume.search.index import Index


def index(
    folder: Annotated[Path, typer.Argument(help="Walked with its subfolders; hidden files are passed over.")],
    model: Model = DEMO,
    out: Annotated[Path, typer.Option(help="The index; extended if it exists.")] = Path("plume-index"),
    instruction: Annotated[str | None, typer.Option(help="For every document.")] = None,
    query_instruction: Annotated[str | None, typer.Option(help="For every query.")] = None,
    num_latent_steps: Annotated[int | None, typer.Option(help="K of documents; 0 is a single pass.")] = None,
    query_latent_steps: Annotated[int | None, typer.Option(help="K of queries; 0 is a single pass.")] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help=f"Larger images and pages are reduced; {INDEX_PIXELS:,} if not given.", min=1)
    ] = None,
    passage_tokens: PassageTokens = None,
    clip_seconds: ClipSeconds = None,
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

            stop(f"{as_typed(folder)} is no folder; expected one with files to index, on this machine")
        check_model(model)

    from plume import Plume
    from plume.search.index import IDENTITY, SETTINGS, Index
    from plume.threads import use_physical_cores

    target: Index | None = None

    def left() -> str:
        rows = 0 if target is None else len(target)
        return f"{out} holds {counted(rows, 'row')}, which stay; run the same command again to go on"

    try:
        with running(left):
            if forget:
                say(f"{counted(Index.open(out).remove(folder), 'row')} removed from {out}")
                return
            use_physical_cores()
            plume = Plume(model, truncate_dim=truncate_dim)
            settings: dict[str, Any] = {"max_pixels": INDEX_PIXELS}
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
                "passage_tokens": passage_tokens,
                "clip_seconds": clip_seconds,
            }
            settings |= {name: value for name, value in given.items() if value is not None}
            target = Index.create(out, plume, **settings)
            report = target.update(folder, plume, batch_size=batch_size, show_progress=is_watched())
    except (ValueError, OSError) as error:
        stop(str(error))
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


def search(
    text: Annotated[str | None, typer.Argument(help="Words to search for.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image to search with; may be repeated.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to search with.")] = None,
    like: Annotated[
        str | None, typer.Option(help="An indexed file that results are like; a page of a PDF as bills.pdf#page=3.")
    ] = None,
    minus: Annotated[list[str] | None, typer.Option(help="A text to go away from; may be repeated.")] = None,
    also: Annotated[list[str] | None, typer.Option("--and", help="A text that must fit too; may be repeated.")] = None,
    either: Annotated[list[str] | None, typer.Option("--or", help="A text that may fit instead.")] = None,
    none: Annotated[list[str] | None, typer.Option("--not", help="A text that must not fit; may be repeated.")] = None,
    index: Annotated[Path, typer.Option(help="The index.")] = Path("plume-index"),
    model: Annotated[str | None, typer.Option(help="Checkpoint; the one that made the index if not given.")] = None,
    top_k: Annotated[int, typer.Option(help="Results at most.", min=1)] = 10,
    correct: Annotated[
        Literal["centre", "hubs"] | None,
        typer.Option(help="Scores without the means of kinds, or less hubs; `plume report --fit` comes first."),
    ] = None,
    group_by: Annotated[
        Literal["file"] | None, typer.Option(help="file: the best page, passage or clip of each file alone.")
    ] = None,
    collapse: Annotated[
        float | None, typer.Option(help="Leave out what has at least this cosine to a better result, as 0.98.")
    ] = None,
    rerank: Annotated[
        str | None, typer.Option(help="A CrossEncoder of sentence-transformers that orders the best results anew.")
    ] = None,
    rerank_k: Annotated[int, typer.Option(help="Results that are reranked.", min=1)] = 50,
    min_score: Annotated[float | None, typer.Option(help="Leave out what has a smaller cosine.")] = None,
    cut: Annotated[
        Literal["auto", "drop"] | None,
        typer.Option(help="auto: leave out what does not stand out of the index. drop: end at the largest drop."),
    ] = None,
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
    """Search an index by words, an image, a video, or all of them as one query, and by what a file is like.

    Results are those whose vectors are nearest; with --hybrid also those that hold the words themselves.
    """
    query = {key: value for key, value in (("image", image), ("video", video), ("text", text)) if value}
    if not query and like is None:
        stop("nothing to search for; give words, --image, --video or --like")
    if text and not image and not video:
        check_words(text)
    if model is not None:
        check_model(model)

    from plume import Plume
    from plume.search.filter import Filter, day_of, indexed_path
    from plume.search.index import Index
    from plume.search.query import inputs_of, joined_query
    from plume.search.rerank import CrossEncoderReranker
    from plume.search.results_page import gallery, place_in_file
    from plume.threads import use_physical_cores

    names: list[str] = []
    try:
        with running(lambda: "nothing was changed"):
            rows = Filter(
                kinds=tuple(kind or ()),
                folder="" if folder is None else str(folder.resolve()),
                path="" if path is None else indexed_path(path),
                page=page,
                since=day_of(since),
                until=day_of(until),
            )
            source = Index.open(index)
            dim = source.identity.dim
            asked = joined_query(query, like=like, minus=minus, also=also, either=either, none=none)
            names = [_name_of(part) for part, _ in inputs_of(asked)]
            plume = None
            if names:
                use_physical_cores()
                plume = Plume(model or maker_of(source))
                if dim < plume.get_embedding_dimension():
                    plume.truncate_dim = dim
            hits = source.search(
                asked,
                plume,
                top_k=top_k,
                where=where,
                filter=rows,
                text=words,
                hybrid=hybrid,
                exact=exact,
                correct=correct,
                group_by=group_by,
                collapse=collapse,
                min_score=min_score,
                cut=cut,
                rerank=None if rerank is None else CrossEncoderReranker(rerank),
                rerank_k=rerank_k,
            )
    except (ValueError, OSError) as error:
        stop(message_of(error, names))
    if html is not None:
        parts = [text, *map(str, image or []), None if video is None else str(video), like and f"like {like}"]
        parts += [f"{sign} {one}" for sign, some in _signs(minus, also, either, none) for one in some]
        title = " + ".join(part for part in parts if part)
        try:
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(gallery(hits, title), encoding="utf-8", errors="replace")
        except OSError as error:
            stop(f"--html {html} cannot be written ({error.strerror}); choose another place")
        say(f"{counted(len(hits), 'result')} in {html}", err=as_json)
    if hits and not as_json and html is None:
        typer.echo("  #   score  kind   file")
    for rank, hit in enumerate(hits, start=1):
        if as_json:
            typer.echo(json_line({"rank": rank, **hit.to_dict()}))
        elif html is None:
            place = hit.path + place_in_file(hit)
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
        if (cut or min_score is not None) and not is_filtered and len(source):
            say("nothing here is close to that; leave out --cut and --min-score to see what is nearest", err=True)
        else:
            why = (
                " that meet the conditions"
                if is_filtered
                else "; it holds nothing else"
                if len(source)
                else "; the index is empty"
            )
            say(f"no results{why}", err=True)


def _name_of(part: Any) -> str:
    """How errors call a part of the query."""
    return part if isinstance(part, str) else "the query"


def _signs(*texts: list[str] | None) -> Iterator[tuple[str, list[str]]]:
    yield from zip(("minus", "and", "or", "not"), (some or [] for some in texts), strict=True)


def maker_of(index: Index) -> str:
    """The checkpoint that made an index."""
    made_with = index.identity.model
    if Path(made_with).is_absolute() and not Path(made_with).is_dir():
        stop(f"the index was made with {made_with}, which is not there any more; say where it is with --model")
    return made_with
