"""`plume-train vectors DATA --out FOLDER --model M`: vectors of queries and targets, for mining and for distillation.

The model is a plume checkpoint, or any embedder that sentence-transformers opens and that takes what the rows hold.
`--rows QUERIES TARGETS` takes vectors that something else has made, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from plume.checkpoints.folder import read_config
from plume.checkpoints.place import check_place
from plume.checkpoints.published import is_published
from plume.config import PlumeConfig
from plume.terminal import Parser, counted, is_watched, say
from plume_train.data.read import add_row_flags, read_rows
from plume_train.data.records import Records
from plume_train.data.rows import Side
from plume_train.data.vectors import SIDES, SideName, VectorStore

#: Sides that are embedded, and written, at once.
WINDOW = 1024

Embed = Callable[[SideName, list[Any]], np.ndarray]
"""Vectors of inputs `[N, D]`; rows of NaN where one cannot be embedded."""


def vectors(argv: Sequence[str]) -> int:
    """Write the vectors that a folder lacks.

    Args:
        argv: the command line behind `vectors`.

    Returns:
        0, or 1 if something could not be embedded.

    Raises:
        ValueError: data, a model or arrays that cannot be used.
    """
    options = _parse(argv)
    records = read_rows(options.data, options)
    if options.rows:
        store, num_bad = _from_arrays(records, options), 0
    else:
        store, num_bad = embed_records(
            records,
            options.out,
            options.model,
            num_latent_steps=options.num_latent_steps,
            document_latent_steps=options.document_latent_steps,
            batch_size=options.batch_size,
        )
    num_known = sum(map(int, _known(records, store)))
    say(f"{store.folder}: vectors of {store.dim} numbers for {num_known} of {counted(len(records), 'row')}")
    return 1 if num_bad else 0


def embed_records(
    records: Records,
    folder: Path,
    model: str,
    *,
    num_latent_steps: int | None = None,
    document_latent_steps: int | None = None,
    batch_size: int = 32,
) -> tuple[VectorStore, int]:
    """Vectors of all queries, targets and hard negatives; what the folder holds already is not embedded again.

    Args:
        records: the rows.
        folder: see `plume_train.data.vectors`.
        model: a folder or a Hub name.
        num_latent_steps: K of queries, for a plume checkpoint; None is its own.
        document_latent_steps: K of targets; None is its own, or that of queries.
        batch_size: inputs per pass.

    Returns:
        The vectors, and how many sides could not be embedded.
    """
    embed, about = open_embedder(model, num_latent_steps, document_latent_steps, batch_size)
    store = VectorStore.create(folder, about)
    num_bad = 0
    bar = tqdm(total=len(records), desc="Embedding", unit=" rows", disable=not is_watched())
    waiting: dict[SideName, dict[int, Side]] = {name: {} for name in SIDES}

    def write(name: SideName) -> int:
        sides = list(waiting[name].values())
        found = embed(name, [to_input(side) for side in sides])
        is_bad = np.atleast_1d(np.isnan(found).any(axis=1))
        store.add(name, [side for side, bad in zip(sides, is_bad.tolist(), strict=True) if not bad], found[~is_bad])
        waiting[name].clear()
        return int(is_bad.sum())

    for index in range(len(records)):
        record = records[index]
        sides: dict[SideName, list[Side | None]] = {
            "query": [record.query],
            "target": [record.target, *record.negatives],
        }
        for name, of_name in sides.items():
            for side in of_name:
                if side is not None and (name, side) not in store:
                    waiting[name].setdefault(side.content_key, side)
        bar.update()
        for name in SIDES:
            if len(waiting[name]) >= WINDOW:
                num_bad += write(name)
    num_bad += sum(write(name) for name in SIDES if waiting[name])
    bar.close()
    return store, num_bad


def to_input(side: Side) -> Any:
    """What `encode` takes: a text, or a dict with media before the text."""
    if not (side.images or side.videos or side.instruction):
        return side.text
    found: dict[str, Any] = {}
    if side.images:
        found["image"] = _alone(side.images)
    if side.videos:
        found["video"] = _alone([_alone(clip) for clip in side.videos])
    found |= {name: text for name in ("instruction", "text") if (text := getattr(side, name))}
    return found


def _instructed(one: Any) -> Any:
    """An input as other embedders take it: the instruction before the text, and a text alone as a string."""
    if isinstance(one, str):
        return one
    text = " ".join(one[name] for name in ("instruction", "text") if name in one)
    media = {name: value for name, value in one.items() if name in ("image", "video")}
    return (media | {"text": text} if text else media) if media else text


def _alone(parts: Sequence[Any]) -> Any:
    """The part of a list of one; else the list."""
    return parts[0] if len(parts) == 1 else list(parts)


def open_embedder(
    model: str, num_latent_steps: int | None = None, document_latent_steps: int | None = None, batch_size: int = 32
) -> tuple[Embed, dict[str, Any]]:
    """How a plume checkpoint, or any model of sentence-transformers, embeds, and what tells its vectors from others."""
    if _is_plume(model):
        from plume import Plume

        plume = Plume(model)
        own = plume.plume_config.num_latent_steps
        steps = own if num_latent_steps is None else num_latent_steps
        documents = plume.plume_config.document_steps(steps) if document_latent_steps is None else document_latent_steps
        plume.num_latent_steps = {"query": steps, "document": documents}

        def embed(name: SideName, inputs: list[Any]) -> np.ndarray:
            encode = plume.encode_query if name == "query" else plume.encode_document
            return encode(inputs, batch_size=batch_size, on_error="skip", show_progress_bar=False)

        told = {"model": plume.source, "fingerprint": plume.fingerprint, "num_latent_steps": [steps, documents]}
        return embed, told | {"dim": plume.get_embedding_dimension()}
    if (num_latent_steps, document_latent_steps) != (None, None):
        raise ValueError(f"{model} is no plume checkpoint, and takes no latent steps; drop --num-latent-steps")
    from sentence_transformers import SentenceTransformer

    other = SentenceTransformer(model)

    def embed_otherwise(name: SideName, inputs: list[Any]) -> np.ndarray:
        encode = other.encode_query if name == "query" else other.encode_document
        told = [_instructed(one) for one in inputs]
        return encode(told, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)

    return embed_otherwise, {"model": model, "dim": int(other.get_embedding_dimension() or 0)}


def _is_plume(model: str) -> bool:
    if not (Path(model) / "modules.json").exists():
        check_place(model)
    try:
        config = read_config(model)
    except ValueError:  # some models of sentence-transformers have no configuration of transformers
        return False
    if config.get("model_type") != PlumeConfig.model_type and is_published(model):
        raise ValueError(f"{model} holds published PLUME weights; convert it once with `plume convert`")
    return config.get("model_type") == PlumeConfig.model_type


def _from_arrays(records: Records, options: Any) -> VectorStore:
    arrays = []
    for name in options.rows:
        try:
            array = np.load(name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be read ({error}); expected an array saved by numpy.save") from None
        if array.ndim != 2 or len(array) != len(records):
            raise ValueError(
                f"{name} has the shape {list(array.shape)}; expected [{len(records)}, D], a vector for each row of "
                f"{options.data}"
            )
        arrays.append(array)
    if arrays[0].shape[1] != arrays[1].shape[1]:
        raise ValueError(
            f"{options.rows[0]} has {arrays[0].shape[1]} numbers per vector, {options.rows[1]} {arrays[1].shape[1]}; "
            "expected as many"
        )
    digest = blake2b(digest_size=16)
    for array in arrays:
        for start in range(0, len(array), WINDOW):
            digest.update(np.ascontiguousarray(array[start : start + WINDOW]).tobytes())
    about = {"model": "rows", "fingerprint": digest.hexdigest(), "dim": int(arrays[0].shape[1])}
    store = VectorStore.create(options.out, about)
    for start in range(0, len(records), WINDOW):
        rows = [records[index] for index in range(start, min(start + WINDOW, len(records)))]
        for name, array in zip(SIDES, arrays, strict=True):
            part = np.asarray(array[start : start + len(rows)], dtype=np.float32)
            norms = np.linalg.norm(part, axis=1, keepdims=True)
            if not np.isfinite(norms).all() or not norms.all():
                raise ValueError(f"{options.rows[SIDES.index(name)]} holds a vector that is zero or no number")
            sides = [record.query if name == "query" else record.target for record in rows]
            new = {side.content_key: place for place, side in enumerate(sides) if side and (name, side) not in store}
            places = list(new.values())
            store.add(name, [side for place in places if (side := sides[place]) is not None], (part / norms)[places])
    return store


def _known(records: Records, store: VectorStore) -> Iterator[bool]:
    """Whether each row has both vectors, in windows."""
    rows = (records[index] for index in range(len(records)))
    while window := list(islice(rows, WINDOW)):
        _, queries = store.find("query", [record.query for record in window])
        _, targets = store.find("target", [record.target for record in window])
        yield from queries & targets


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="plume-train vectors",
        description="Write a folder of vectors of queries and targets: what `plume-train mine` searches, and what a "
        "model learns from with `teacher_vectors`. Run it again to go on after an interruption, or to add what rows "
        "are new.",
    )
    parser.add_argument("data", help="rows: .jsonl, .json, .parquet, a folder of `datasets`, or a Hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on with")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a plume checkpoint, or any model of sentence-transformers")
    source.add_argument(
        "--rows", nargs=2, metavar=("QUERIES", "TARGETS"), help="two .npy files instead, a vector for each row"
    )
    parser.add_argument("--num-latent-steps", type=int, help="K of queries (the checkpoint's)")
    parser.add_argument("--document-latent-steps", type=int, help="K of targets (the checkpoint's, or that of queries)")
    parser.add_argument("--batch-size", type=int, default=32, help="inputs per pass (32)")
    add_row_flags(parser)
    return parser.parse_args(argv)
