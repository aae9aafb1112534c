"""Rows of an index in a LanceDB table: reading, committing, deleting, the nearest to a vector.

One row per text file, image, video and PDF page. Every read sees the newest version; a commit is whole or not at all.
"""

from __future__ import annotations

import re
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

#: The table's folder is called so, with ".lance" behind it.
TABLE = "items"
#: Rows from which on vectors are indexed, and searches approximate.
APPROXIMATE_FROM = 200_000
#: Roots of rows that came from tables begin so, which no folder does.
TABLES = "table:"
# The index of vectors is called so, with the number of rows that it was made for behind it.
_INDEX = "vectors_"
# Partitions that are searched, and how many times more rows than are asked for are compared exactly.
_PROBES, _REFINED = 100, 50
# Small pieces are joined once so many rows have come, and this share of those that were there.
_COMPACT_FROM, _COMPACT_SHARE = 16_384, 0.25
# How often a read is tried while another process takes files away.
_TRIES = 6
_IDS_PER_STATEMENT = 1024
# Rows that are turned into objects at a time.
_ROWS_AT_ONCE = 4096
# Longer words are not looked for: a SHA-512 in hexadecimal is one of 128.
_LONGEST_WORD = 256
# What an index of format 1 can tell of texts at once: the excerpt of rows of tables, else NULL; CASE is not understood.
_FIRST_TEXT = f"array_element(make_array(excerpt), cast(starts_with(root, '{TABLES}') as bigint))"
# Columns whose words are looked for, and how each is cut into words: names at every sign that is no letter or digit.
_WORDS = {"text": "icu", "name": "simple"}
# Rows that match less than this share of the best are no match: by rank they would stand right behind it, though they
# hold no more than words that nearly all rows hold, or a part of a code.
_LEAST_MATCH = 0.5
# What tells the rows of one file apart, and their vectors.
_AT_PATH = ["path", "page", "size", "mtime_ns", "sha256", "vector"]
# A row is there once for each of these.
_KEYS = ["root", "name", "page", "sha256"]

T = TypeVar("T")


class IndexStorageError(OSError):
    """An index that cannot be read or written: no space, no permission, a damaged file."""


class RowStore:
    """The table of an index, whose vectors have `dim` numbers."""

    def __init__(self, path: Path, dim: int, *, must_be_new: bool = False):
        """Open the table in a folder, or make it.

        Args:
            path: the folder of the index.
            dim: length of the vectors.
            must_be_new: whether a table that is there is an error.

        Raises:
            IndexStorageError: it cannot be read or written.
        """
        self.path, self.dim = path, dim
        database, schema = _connect(path), schema_of(dim)

        def table() -> Any:
            if not must_be_new and (path / f"{TABLE}.lance").exists():
                return database.open_table(TABLE)
            return database.create_table(TABLE, schema=schema, exist_ok=not must_be_new)

        self._table = _trying(path, table)
        self._schema = self._table.schema  # tables of older versions declare no key
        self._num_new = 0  # rows since they have been joined
        self._sample: tuple[Any, tuple[np.ndarray, np.ndarray, int]] | None = None  # of a version

    @property
    def has_texts(self) -> bool:
        """Whether rows keep their texts; those of an index of format 1 do not until it is brought up to date."""
        if "text" not in self._schema.names:
            self._schema = self._read(lambda table: table.schema)  # somebody else may have done that meanwhile
        return "text" in self._schema.names

    def add_columns(self) -> None:
        """Make room for what rows of older versions lack.

        Nobody has read their texts yet; rows of tables have their excerpt, which is all there is.
        """
        first = {"text": _FIRST_TEXT, "start": "cast(NULL as double)", "end": "cast(NULL as double)"}
        lacking = {name: how for name, how in first.items() if name not in self._schema.names}
        if lacking := {} if not lacking else self._lacking(first):
            self._write(lambda table: table.add_columns(lacking))
            self._schema = self._read(lambda table: table.schema)

    def _lacking(self, columns: dict[str, str]) -> dict[str, str]:
        self._schema = self._read(lambda table: table.schema)  # somebody else may have made them meanwhile
        return {name: how for name, how in columns.items() if name not in self._schema.names}

    def __len__(self) -> int:
        return self._read(lambda table: table.count_rows())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers out.

        Raises:
            ValueError: another process is writing.
        """
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is writing to the index {self.path}; wait until it is done") from None
        try:
            self._read(lambda table: table.checkout_latest())  # of who held the lock before
            yield
        finally:
            lock.release()

    def rows(self, columns: Sequence[str], root: Path | None = None) -> list[dict[str, Any]]:
        """Some columns of all rows, or of those of one folder."""

        def select(table: Any) -> list[dict[str, Any]]:
            search = table.search().select(list(columns)).limit(None)
            return (search if root is None else search.where(f"root = {quoted(str(root))}")).to_arrow().to_pylist()

        return self._read(select)

    def by_name(self, root: Path) -> Iterator[dict[str, Any]]:
        """Rows of a folder without vectors, in the order of a walk; they are read at once, as columns."""
        compute = _compute()

        def select(table: Any) -> Any:
            search = table.search().select(["name", "sha256", "page", "num_pages", "size", "mtime_ns"]).limit(None)
            return search.where(f"root = {quoted(str(root))}").to_arrow()

        found = self._read(select)
        found = found.cast(_large(found.schema))  # columns of more than 2 GiB cannot be put in order else
        keys = compute.replace_substring(found["name"], "/", "\0")  # as `walk_key` has it
        found = found.take(compute.sort_indices(keys))
        for batch in found.to_batches(max_chunksize=_ROWS_AT_ONCE):
            yield from batch.to_pylist()

    def rows_with(self, contents: Sequence[str], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Some columns, or all, of the rows with one of these SHA-256."""
        return self._rows_where(f"sha256 IN ({', '.join(map(quoted, contents))})", columns)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Commit rows, all or none of them."""
        import pyarrow as pa

        self._add(pa.Table.from_pylist(list(rows), schema=self._schema))

    def add_missing(self, rows: Any) -> int:
        """Commit those rows of a table of Arrow that are not there yet, all or none of them; their number."""
        import pyarrow as pa

        known = set()
        contents = sorted(set(rows["sha256"].to_pylist()))
        for start in range(0, len(contents), _IDS_PER_STATEMENT):
            for row in self.rows_with(contents[start : start + _IDS_PER_STATEMENT], _KEYS):
                known.add(tuple(row[name] for name in _KEYS))
        is_new = [tuple(row[name] for name in _KEYS) not in known for row in rows.select(_KEYS).to_pylist()]
        if new := sum(is_new):
            added = rows.filter(pa.array(is_new))
            if "text" not in added.column_names:  # of shards of an older version
                is_table = _compute().starts_with(added["root"], TABLES)
                text = _compute().if_else(is_table, added["excerpt"], pa.scalar(None, pa.string()))
                added = added.append_column("text", text)
            for name in {"start", "end"} - set(added.column_names):
                added = added.append_column(name, pa.nulls(len(added), pa.float64()))
            self._add(added.select(self._schema.names).cast(self._schema))
        return new

    def _add(self, committed: Any) -> None:
        self._write(lambda table: table.add(committed))
        self._num_new += len(committed)
        if self._num_new > max(_COMPACT_FROM, _COMPACT_SHARE * (len(self) - self._num_new)):
            self.compact(wipe=False)

    def delete(self, root: Path, files: Sequence[tuple[str, str]]) -> None:
        """Delete the rows of some files, given by name and SHA-256."""
        each = (f"(name = {quoted(name)} AND sha256 = {quoted(sha)})" for name, sha in files)
        where = f"root = {quoted(str(root))} AND ({' OR '.join(each)})"
        self._write(lambda table: table.delete(where))

    def delete_root(self, root: Path) -> int:
        """Delete all rows of a folder; the number deleted."""
        where = f"root = {quoted(str(root))}"
        count = self._read(lambda table: table.count_rows(where))
        self._write(lambda table: table.delete(where))
        return count

    def touch(self, root: Path, stats: dict[tuple[str, str], tuple[int, int]]) -> None:
        """Take note of the size and time of change of files whose content is as it was, by name and SHA-256."""
        names = list(dict.fromkeys(name for name, _ in stats))
        for start in range(0, len(names), _IDS_PER_STATEMENT):
            some = names[start : start + _IDS_PER_STATEMENT]
            where = f"root = {quoted(str(root))} AND name IN ({', '.join(map(quoted, some))})"
            rows = [(row, stats.get((row["name"], row["sha256"]))) for row in self._rows_where(where, _KEYS)]
            self.amend([{**row, "size": stat[0], "mtime_ns": stat[1]} for row, stat in rows if stat is not None])

    def without_text(self, root: Path) -> list[dict[str, Any]]:
        """What tells the rows of a folder whose text nobody has read yet: name, content, page, size, time of change."""
        where = f"root = {quoted(str(root))} AND text IS NULL"
        return self._rows_where(where, ["root", "name", "kind", "sha256", "page", "size", "mtime_ns"])

    def amend(self, rows: Sequence[dict[str, Any]]) -> None:
        """Change some columns of rows that are there; each brings what tells it apart: root, name, page and SHA-256."""
        import pyarrow as pa

        if rows:
            changed = pa.Table.from_pylist(list(rows), schema=pa.schema([self._schema.field(name) for name in rows[0]]))
            self._write(lambda table: table.merge_insert(_KEYS).when_matched_update_all().execute(changed))

    def drop_doubled(self) -> int:
        """Delete rows that are there more than once; the number deleted."""
        rows = self._read(lambda table: table.search().with_row_id(True).select(_KEYS).limit(None).to_arrow())
        groups = rows.group_by(_KEYS).aggregate([("_rowid", "min"), ("_rowid", "count")])
        twice = groups.filter(_compute().greater(groups["_rowid_count"], 1))
        both = rows.join(twice.select([*_KEYS, "_rowid_min"]), _KEYS, join_type="inner") if len(twice) else rows[:0]
        doubled = [row["_rowid"] for row in both.to_pylist() if row["_rowid"] != row["_rowid_min"]]
        for start in range(0, len(doubled), _IDS_PER_STATEMENT):
            ids = ", ".join(map(str, doubled[start : start + _IDS_PER_STATEMENT]))
            self._write(lambda table, ids=ids: table.delete(f"_rowid IN ({ids})"))
        return len(doubled)

    def compact(self, wipe: bool) -> None:
        """Join the many small pieces that commits leave behind, and index the vectors where there are many.

        Args:
            wipe: also take files off the disk that nothing refers to any more. One that has lost only few of its rows
                is not written anew, and still holds their bytes. A search that runs at this moment reads again.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it says what is said above
            older = timedelta(0) if wipe else None
            self._write(lambda table: table.optimize(cleanup_older_than=older, delete_unverified=wipe))
        self._num_new = 0
        self._index_words()
        self._index_vectors()

    def _index_words(self) -> None:
        """Make the indices of words, once there are rows; rows that come later are looked through, and put in here."""
        if not self.has_texts or not len(self):
            return
        from lancedb.index import FTS

        there = set(self._read(lambda table: [one.name for one in table.list_indices()]))
        for column, cut in _WORDS.items():
            if (name := f"words_{column}") not in there:  # of any language: no stems, no words that are left out
                config = FTS(
                    base_tokenizer=cut,
                    stem=False,
                    remove_stop_words=False,
                    with_position=False,
                    max_token_length=_LONGEST_WORD,
                )
                self._write(
                    lambda table, one=(column, config, name): table.create_index(one[0], config=one[1], name=one[2])
                )

    def _index_vectors(self) -> None:
        """Make an index of vectors in a large table; anew once the table has twice the rows that it was made for.

        Rows that come later are put into it by `optimize`, and until then are compared one by one.
        """
        count, made_for = len(self), self._indexed_rows()
        if count >= APPROXIMATE_FROM and count >= 2 * max(made_for, default=0):
            from lancedb.index import IvfRq

            name = f"{_INDEX}{count}"
            self._write(lambda table: table.create_index("vector", config=IvfRq(distance_type="cosine"), name=name))
            made_for.append(count)
        for older in sorted(made_for)[:-1]:  # also those of a run that was killed in between
            self._write(lambda table, older=older: table.drop_index(f"{_INDEX}{older}"))

    def _indexed_rows(self) -> list[int]:
        """Rows that each index of vectors was made for."""
        names = self._read(lambda table: [one.name for one in table.list_indices()])
        return [int(name.removeprefix(_INDEX)) for name in names if name.startswith(_INDEX)]

    def nearest(
        self,
        vector: np.ndarray,
        limit: int,
        where: str | None = None,
        *,
        exact: bool = False,
        columns: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """The rows nearest to a unit vector `[dim]`, best first, with `_rowid`; `_distance` is one minus the cosine.

        Args:
            vector: of a query.
            limit: rows at most.
            where: a condition in SQL.
            exact: compare with every row, also where there is an index of vectors; distances are exact in any case.
            columns: of the rows; None: all but whole texts.

        Raises:
            ValueError: the condition is not SQL.
        """
        told = [name for name in self._schema.names if name != "text"] if columns is None else columns

        def select(table: Any) -> list[dict[str, Any]]:
            search = table.search(vector).distance_type("cosine").select([*told, "_distance"])
            if exact:
                search = search.bypass_vector_index()
            else:  # where a condition leaves too few rows, in more partitions
                search = search.minimum_nprobes(_PROBES).maximum_nprobes(0).refine_factor(_REFINED)
            return self._found(search, limit, where)

        return self._read_where(select, where)

    def matching(
        self, words: str, limit: int, where: str | None = None, *, columns: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Rows whose text or name holds some of the words, best first, with `_rowid`; `_score` is that of BM25.

        Those that match less than half as well as the best are left out.

        Args:
            words: any text.
            limit: rows at most.
            where: a condition in SQL.
            columns: of the rows.

        Raises:
            ValueError: the condition is not SQL, or the index keeps no texts.
        """
        if not self.has_texts:
            raise ValueError(
                f"the index {self.path} was made before texts were kept; run `plume index FOLDER --out {self.path}` "
                "again: it reads the texts, and embeds nothing that is there"
            )
        from lancedb.query import MultiMatchQuery

        def select(table: Any) -> list[dict[str, Any]]:
            if not table.count_rows():
                return []
            query = MultiMatchQuery(unicodedata.normalize("NFC", words), list(_WORDS))  # pyright: ignore[reportCallIssue]
            search = table.search(query, query_type="fts").select([*columns, "_score"])
            found = self._found(search, limit, where)
            least = _LEAST_MATCH * max((row["_score"] for row in found), default=0.0)
            return [row for row in found if row["_score"] > least]

        return self._read_where(select, where)

    def products(self, vectors: np.ndarray, where: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers and kinds of all rows `[N]`, and products of vectors `[C, dim]` with them at unit length, `[C, N]`.

        Raises:
            ValueError: the condition is not SQL.
        """

        def scan(table: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            search = table.search().select(["kind", "vector"]).with_row_id(True).limit(None)
            search = search if where is None else search.where(checked_condition(where))
            numbers, kinds = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=str)]
            products = [np.empty((len(vectors), 0), dtype=np.float32)]
            for batch in search.to_batches():
                rows = batch["vector"].flatten().to_numpy().reshape(-1, self.dim)
                numbers.append(batch["_rowid"].to_numpy().astype(np.int64))
                kinds.append(np.array(batch["kind"].to_pylist(), dtype=str))
                products.append(vectors @ rows.T / np.linalg.norm(rows, axis=1))
            return np.concatenate(numbers), np.concatenate(kinds), np.concatenate(products, axis=1)

        return self._read_where(scan, where)

    def sample(self, count: int, of_each: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Kinds and unit vectors `[n, dim]` of rows; the same until the index changes.

        The first are at even distances, `count` at most; how many these are comes last. Behind them are more rows of
        kinds of which these are fewer than `of_each`, up to that number.
        """

        def select(table: Any) -> tuple[np.ndarray, np.ndarray, int]:
            key = table.version, count, of_each
            if self._sample is None or self._sample[0] != key:
                told = table.search().select(["kind"]).with_row_id(True).limit(None).to_arrow()
                kinds, numbers = np.array(told["kind"].to_pylist(), dtype=str), told["_rowid"].to_numpy()
                even = _evenly(np.arange(len(kinds)), count)
                more = [np.empty(0, dtype=np.int64)]
                for kind in np.unique(kinds):
                    if (kinds[even] == kind).sum() < of_each:
                        more.append(np.setdiff1d(_evenly(np.flatnonzero(kinds == kind), of_each), even))
                places = np.concatenate([even, *more])
                rows = self.vectors([int(number) for number in numbers[places]])
                there = [at for at in range(len(places)) if int(numbers[places[at]]) in rows]  # others have just gone
                units = np.array([rows[int(numbers[places[at]])] for at in there], dtype=np.float32).reshape(
                    -1, self.dim
                )
                units /= np.linalg.norm(units, axis=1, keepdims=True)
                self._sample = key, (kinds[places[there]], units, sum(at < len(even) for at in there))
            return self._sample[1]

        return self._read(select)

    def sampled(self, count: int, columns: Sequence[str]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Some columns of rows at even distances, and their vectors as they are `[count, dim]`."""

        def select(table: Any) -> Any:
            places = _evenly(np.arange(table.count_rows()), count).tolist()
            search = table.take_offsets(places) if places else table.search().limit(0)
            return search.select([*columns, "vector"]).to_arrow()

        found = self._read(select)
        vectors = np.reshape(found["vector"].combine_chunks().flatten().to_numpy(), (-1, self.dim)).astype(np.float32)
        return found.drop_columns(["vector"]).to_pylist(), vectors

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self._schema.names)

    def tables(self, columns: Sequence[str], where: str | None = None) -> Iterator[Any]:
        """Some columns of all rows as tables of Arrow, one at least, a part of the rows in each.

        Raises:
            ValueError: the condition is not SQL.
        """
        import pyarrow as pa

        def begin(table: Any) -> Any:
            search = table.search().select([name for name in columns if name in self._schema.names]).limit(None)
            return (search if where is None else search.where(checked_condition(where))).to_batches()

        batches = self._read_where(begin, where)
        yield pa.Table.from_batches([], batches.schema)
        for batch in batches:
            yield pa.Table.from_batches([batch])

    def rows_at(self, path: str) -> list[dict[str, Any]]:
        """The rows of a file: page, content, vector, and what they know of the file on disk."""
        return self._rows_where(f"path = {quoted(path)}", [*_AT_PATH, *({"start"} & set(self._schema.names))])

    def vectors(self, numbers: Sequence[int]) -> dict[int, np.ndarray]:
        """Vectors `[dim]` of rows by the numbers that `nearest` and `matching` gave."""

        def select(table: Any) -> Any:
            return table.search().where(_numbered(numbers)).with_row_id(True).select(["vector"]).limit(None).to_arrow()

        found = self._read(select)
        vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.dim)
        return dict(zip(found["_rowid"].to_pylist(), vectors, strict=True))

    @staticmethod
    def _found(search: Any, limit: int, where: str | None) -> list[dict[str, Any]]:
        search = search.with_row_id(True).limit(limit)
        return (search.where(checked_condition(where), prefilter=True) if where is not None else search).to_list()

    def _read_where(self, select: Callable[[Any], T], where: str | None) -> T:
        try:
            return self._read(select)
        except ValueError as error:
            if not where:
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(f"where={where!r} is not understood: {reason}; expected a condition in SQL") from None

    def counts(self, *columns: str) -> dict[tuple[Any, ...], int]:
        """How many rows have the same values of some columns."""
        import pyarrow as pa

        def count(table: Any) -> dict[tuple[Any, ...], int]:
            found: Counter[tuple[Any, ...]] = Counter()
            for batch in table.search().select(list(columns)).limit(None).to_batches():
                groups = pa.Table.from_batches([batch]).group_by(list(columns)).aggregate([([], "count_all")])
                for group in groups.to_pylist():
                    found[tuple(group[name] for name in columns)] += group["count_all"]
            return dict(found)

        return self._read(count)

    def numbered(
        self, numbers: Sequence[int], *, with_texts: bool = False, columns: Sequence[str] | None = None
    ) -> dict[int, dict[str, Any]]:
        """Rows by the numbers that `nearest` gave; without those that are gone, or were compacted."""
        told = list(columns or (name for name in self._schema.names if with_texts or name != "text"))

        def select(table: Any) -> list[dict[str, Any]]:
            search = table.search().where(_numbered(numbers)).with_row_id(True).select(told)
            return search.limit(None).to_arrow().to_pylist()

        return {row["_rowid"]: row for row in self._read(select)}

    def _read(self, work: Callable[[Any], T]) -> T:
        """Read from the newest version; once more where another process has just deleted files of the one before."""
        return _trying(self.path, lambda: work(self._table), self._table.checkout_latest)

    def _rows_where(self, where: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        def select(table: Any) -> list[dict[str, Any]]:
            search = table.search().where(where).limit(None)
            return (search if columns is None else search.select(list(columns))).to_arrow().to_pylist()

        return self._read(select)

    def _write(self, work: Callable[[Any], Any]) -> None:
        """Write; `locked` keeps others out, so that a failure is one of storage."""
        _trying(self.path, lambda: work(self._table), tries=1)


def _trying(path: Path, work: Callable[[], T], refresh: Callable[[], Any] | None = None, tries: int = _TRIES) -> T:
    """Do something with LanceDB, several times if files disappear meanwhile; its errors become ours."""
    for left in reversed(range(tries)):
        try:
            if refresh is not None and left < tries - 1:
                refresh()
            return work()
        except (RuntimeError, OSError) as error:
            if left and "not found" in str(error).lower():
                time.sleep(0.02 * 2 ** (tries - left))
                continue
            reason = _reason(error)
            raise IndexStorageError(
                f"the index {path} cannot be used ({reason}); what was committed before is safe: make sure that the "
                "disk has space and may be written to, and run it again"
            ) from error
    raise AssertionError


def _reason(error: Exception) -> str:
    """The innermost cause that LanceDB names."""
    text = " ".join(str(error).split())
    for sign in ("No space left on device", "Permission denied", "Read-only file system", "Disk quota exceeded"):
        if sign.lower() in text.lower():
            return sign
    return text[:300]


def checked_condition(where: str) -> str:
    r"""A condition that LanceDB reads to its end; it drops whatever follows a condition, without a word.

    Raises:
        ValueError: it is blank, or its parentheses do not pair.

    Example:
        >>> checked_condition("kind = ')'")
        "(kind = ')'\n)"
    """
    depth = 0
    for sign in re.sub(r"'(?:[^']|'')*'|\"[^\"]*\"", "", where):
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            break
    if depth or not where.strip():
        raise ValueError(f"where={where!r} is not understood: expected one condition in SQL, such as \"kind = 'pdf'\"")
    return f"({where}\n)"


def schema_of(dim: int) -> Any:
    """Columns of an index whose vectors have so many numbers."""
    import pyarrow as pa

    # A key that is declared makes LanceDB notice two processes that merge the same new rows; `add` does not look at it.
    key = {"lance-schema:unenforced-primary-key": "true"}
    columns = {
        "root": pa.string(),
        "name": pa.string(),
        "path": pa.string(),
        "kind": pa.string(),
        "page": pa.int32(),
        "num_pages": pa.int32(),
        "start": pa.float64(),
        "end": pa.float64(),
        "sha256": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "excerpt": pa.string(),
        "text": pa.string(),
        "thumbnail": pa.binary(),
        "vector": pa.list_(pa.float32(), dim),
    }
    return pa.schema(
        pa.field(name, kind, nullable=name not in _KEYS, metadata=key if name in _KEYS else None)
        for name, kind in columns.items()
    )


def _evenly(places: np.ndarray, count: int) -> np.ndarray:
    """So many of some places at most, at even distances."""
    return places[np.linspace(0, len(places), min(count, len(places)), endpoint=False).astype(int)]


def _numbered(numbers: Sequence[int]) -> str:
    return f"_rowid IN ({', '.join(map(str, numbers))})" if numbers else "false"


def _large(schema: Any) -> Any:
    import pyarrow as pa

    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return pa.schema([pa.field(one.name, large.get(one.type, one.type)) for one in schema])


def _compute() -> Any:
    """Arrow's functions, which are not known to type checkers."""
    import pyarrow.compute

    return pyarrow.compute


def _connect(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lancedb
    except ImportError:
        raise ImportError("an index needs LanceDB; pip install 'plume-embed[index]'") from None
    # Other processes may write meanwhile: every read takes the newest version.
    return lancedb.connect(str(path), read_consistency_interval=timedelta(0))


def quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
