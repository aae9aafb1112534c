"""The rows of an index as files for other programs: Parquet, NumPy, FAISS.

Each file says under "plume" what made the vectors (`Identity`, as JSON), since those of another checkpoint or K do not
compare with them. Vectors are those of the index, to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from plume.search.index import Index

#: What can be written, by the end of the name.
SUFFIXES = (".parquet", ".npz", ".faiss")
# Thumbnails take more than all else, and belong to who made the index.
_LEFT_OUT = ("thumbnail",)


def export(index: Index, out: str | os.PathLike, *, where: str | None = None) -> int:
    """Write rows to a file, whole or not at all; the number of rows.

    Args:
        index: whose rows are written.
        out: ends with ".parquet": all columns but thumbnails, the vector as a list of fixed length; with ".npz":
            "vectors" `[N, dim]`, "paths", "pages" and what made them; with ".faiss": an index of inner products, and
            beside it, with ".jsonl" behind the name, what made them in the first line and then one for each id.
        where: a condition in SQL.

    Raises:
        ValueError: another ending, or a condition that is not SQL.
        ImportError: FAISS is not installed.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: expected a name that ends with {', '.join(SUFFIXES)}")
    made = json.dumps(asdict(index.identity))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part{os.getpid()}")
    try:
        if out.suffix == ".parquet":
            count = _write_parquet(index, part, made, where)
        elif out.suffix == ".npz":
            count = _write_npz(index, part, made, where)
        else:
            count = _write_faiss(index, part, out.with_name(f"{out.name}.jsonl"), made, where)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return count


def _write_parquet(index: Index, part: Path, made: str, where: str | None) -> int:
    import pyarrow.parquet as parquet

    writer, count = None, 0
    try:
        for table in index.store.tables(_columns(index), where):
            marked = table.replace_schema_metadata({"plume": made})
            writer = writer or parquet.ParquetWriter(part, marked.schema)
            writer.write_table(marked)
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    return count


def _write_npz(index: Index, part: Path, made: str, where: str | None) -> int:
    vectors, paths, pages = [np.empty((0, index.identity.dim), dtype=np.float32)], [], []
    for table in index.store.tables(["path", "page", "vector"], where):
        vectors.append(_matrix(table))
        paths += table["path"].to_pylist()
        pages += table["page"].to_pylist()
    with part.open("wb") as file:
        np.savez(
            file,
            vectors=np.concatenate(vectors),
            paths=np.array(paths, dtype=str),
            pages=np.array(pages, dtype=np.int32),
            plume=np.array(made),
        )
    return len(paths)


def _write_faiss(index: Index, part: Path, beside: Path, made: str, where: str | None) -> int:
    try:
        import faiss  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError("a .faiss file needs FAISS; pip install faiss-cpu") from None
    found, names = faiss.IndexFlatIP(index.identity.dim), part.with_name(f"{part.name}.jsonl")
    try:
        with names.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({"plume": json.loads(made)}) + "\n")
            for table in index.store.tables(["path", "kind", "page", "start", "end", "vector"], where):
                found.add(_matrix(table))
                for row in table.drop_columns(["vector"]).to_pylist():
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        faiss.write_index(found, os.fspath(part))
        shutil.move(names, beside)
    finally:
        names.unlink(missing_ok=True)
    return found.ntotal


def _columns(index: Index) -> list[str]:
    return [name for name in index.store.columns if name not in _LEFT_OUT]


def _matrix(table: Any) -> np.ndarray:
    """The vectors of some rows, `[n, dim]`."""
    flat = table["vector"].combine_chunks().flatten().to_numpy()
    return np.ascontiguousarray(flat.reshape(-1, table["vector"].type.list_size), dtype=np.float32)
