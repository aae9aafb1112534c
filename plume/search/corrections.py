"""Corrections of an index's scores, fitted to queries and kept beside it; the vectors stay as they are.

`corrections.npz` holds the mean of queries, the mean of each kind's rows, and a bank of queries. A search uses it where
it is told to (`Index.search(correct=...)`); fitted again, or the file removed, nothing of it is left.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from zipfile import BadZipFile

import numpy as np

from plume.search.store import RowStore
from plume.space.corrections import centred, hub_bias, less_hubs

Correct = Literal["centre", "hubs"]
"""Whether means are taken away, of queries and of each kind of rows; or what is near to everything counts less."""

FILE = "corrections.npz"
#: Queries, and rows of a kind, that a mean is taken of at least.
FEWEST_QUERIES, FEWEST_ROWS = 100, 100
_MOST_IN_BANK = 2_048
_MOST_ROWS, _OF_EACH_KIND = 20_000, 1_000
_MEAN_OF = "mean_of_"
_TINY = 1e-12


@dataclass(frozen=True)
class Corrections:
    """What scores are corrected by.

    query_mean: `[D]`. means: `[D]` of each kind that has rows enough. bank: queries, `[B, D]`.
    num_rows: of the index when it was fitted.
    """

    query_mean: np.ndarray
    means: dict[str, np.ndarray]
    bank: np.ndarray
    num_rows: int

    @classmethod
    def fitted(cls, store: RowStore, queries: np.ndarray) -> Corrections:
        """Fit to the rows of an index and queries like those that it is searched with, unit vectors `[Q, D]`.

        Raises:
            ValueError: too few of them, or of every kind of rows.
        """
        if queries.ndim != 2 or queries.shape[1] != store.dim or not np.isfinite(queries).all():
            raise ValueError(f"queries are {list(queries.shape)}; expected finite vectors [Q, {store.dim}]")
        if len(queries) < FEWEST_QUERIES:
            raise ValueError(f"{len(queries)} queries are too few to correct by; expected at least {FEWEST_QUERIES}")
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        kinds, units, _ = store.sample(_MOST_ROWS, _OF_EACH_KIND)
        means = {
            str(kind): units[kinds == kind].mean(axis=0)
            for kind in np.unique(kinds)
            if (kinds == kind).sum() >= FEWEST_ROWS
        }
        if not means:
            raise ValueError(f"no kind has {FEWEST_ROWS} rows, of which a mean could be taken")
        bank = queries[np.linspace(0, len(queries), min(len(queries), _MOST_IN_BANK), endpoint=False).astype(int)]
        return cls(queries.mean(axis=0), means, bank, len(store))

    @classmethod
    def read(cls, folder: Path, dim: int) -> Corrections:
        """Those of an index.

        Raises:
            ValueError: there are none, or they are damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no corrections; fit them: plume report {folder} --queries FILE --fit")
        try:
            with np.load(path) as file:
                means = {name.removeprefix(_MEAN_OF): file[name] for name in file if name.startswith(_MEAN_OF)}
                found = cls(file["query_mean"], means, file["bank"].astype(np.float32), int(file["num_rows"]))
            shapes = {found.query_mean.shape, found.bank.shape[1:], *(mean.shape for mean in means.values())}
            if shapes != {(dim,)} or not means:
                raise ValueError(f"vectors are not of {dim} numbers")
        except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}); fit it again, or remove it") from None
        return found

    def write(self, folder: Path) -> None:
        """Keep them beside an index, in the place of others."""
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{FILE}.")
        try:
            with os.fdopen(handle, "wb") as file:
                means = {f"{_MEAN_OF}{kind}": mean for kind, mean in self.means.items()}
                bank = self.bank.astype(np.float16)
                np.savez(file, query_mean=self.query_mean, bank=bank, num_rows=np.array(self.num_rows), **means)  # type: ignore[arg-type]
            Path(name).replace(folder / FILE)
        finally:
            Path(name).unlink(missing_ok=True)

    def scores(self, how: Correct, queries: np.ndarray, rows: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
        """Corrected scores of unit vectors `[N, D]` for queries `[Q, D]`, `[Q, N]`."""
        if how == "hubs":
            return less_hubs(queries @ rows.T, hub_bias(rows, self.bank))
        means = self._means()
        of_rows = {kind: means.get(kind, means[""]) for kind in kinds}
        return centred(queries, rows, self.query_mean, np.stack([of_rows[kind] for kind in kinds]))

    def compared(self, query: np.ndarray) -> np.ndarray:
        """What unit vectors of rows are multiplied by for `centred_by`: the centred query, then each kind's mean."""
        return np.stack([self.looked_for("centre", query), *self._means().values()]).astype(np.float32)

    def centred_by(self, products: np.ndarray, kinds: np.ndarray, query: np.ndarray) -> np.ndarray:
        """The scores of "centre" of all rows `[N]`, from the products of `compared` with them, `[.., N]`.

        With x of unit length |x - m|^2 is 1 - 2 x . m + |m|^2, so that no row is needed once more.
        """
        own, scores = self.looked_for("centre", query), np.empty(products.shape[1], dtype=np.float64)
        names = list(self._means())
        for place, (kind, mean) in enumerate(self._means().items(), start=1):
            is_kind = kinds == kind if kind else ~np.isin(kinds, names)
            squares = 1 - 2 * products[place, is_kind] + mean @ mean
            scores[is_kind] = (products[0, is_kind] - own @ mean) / np.sqrt(np.maximum(squares, _TINY))
        return scores

    def _means(self) -> dict[str, np.ndarray]:
        """The mean of each kind, and under "" that for kinds which have too few rows for one of their own."""
        return {**self.means, "": np.mean(list(self.means.values()), axis=0)}

    def looked_for(self, how: Correct, query: np.ndarray) -> np.ndarray:
        """The vector to whose nearest rows the best ones belong."""
        vector = query - self.query_mean if how == "centre" else query
        return vector / max(np.linalg.norm(vector), _TINY)  # one query that is the mean of all has no direction


def check_correct(how: str | None) -> None:
    """Refuse a correction that there is not.

    Raises:
        ValueError: names it.
    """
    if how is not None and how not in get_args(Correct):
        raise ValueError(f"correct is {how!r}; expected one of {', '.join(get_args(Correct))}, or None")
