"""`plume serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from plume.cli.inputs import DEMO, check_model
from plume.cli.running import stop
from plume.cli.search import maker_of
from plume.terminal import quiet_libraries


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
            model = model or maker_of(Index.open(index))
        except (ValueError, OSError, ImportError) as error:
            stop(str(error))
        searcher = Searcher(index)
    model = model or DEMO
    check_model(model)
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
