"""What an index looks like: its kinds and the gaps between them, hubs, near-copies, and a map as a picture.

Measured on a sample of rows, and where queries are given on these. What is fitted to a half of the queries is measured
on the other half.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from plume.search.corrections import FEWEST_QUERIES, FEWEST_ROWS, Corrections
from plume.search.index import Index
from plume.space.measures import centroid_distance, hit_counts, mixing, separability, skewness, uniformity

#: Rows that are looked at, evenly over the index.
SAMPLE = 4_096
#: Nearest rows of a query that count.
K = 10
# Rows of a kind without which nothing is said of it; largest hubs that are named; a cosine at which rows are copies.
_FEWEST, _NAMED, _COPIES = 20, 5, 0.98
# What searched where no queries are given.
_OWN = "its own rows"
# Rows of the picture.
_DRAWN = 1_500
# Queries that corrections are measured on, at most.
_HELD_OUT = 4_096
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


@dataclass(frozen=True)
class IndexReport:
    """What was found.

    counts: rows of each kind, of the whole index. num_sampled: rows that the rest is about.
    norms: the smallest and the largest length of a vector. spread: uniformity of each kind.
    gaps: for each two kinds the distance of their means and how well they are told apart.
    copies: share of rows with another at a cosine of 0.98 or more.
    skewness, never: of how often rows are among the nearest 10, and the share that never is.
    hubs: the rows that come up most, and for how many queries. by: what the queries were.
    mixing: how often each kind comes up, over its share of rows.
    pairs: for two kinds how many pairs of files there are whose names differ in their ending alone, such as kite.jpg
    and kite.txt, and the share of either side whose other is among its nearest 10 of the rows that were looked at.
    corrected: for each correction skewness and mixing on the half of the queries that had no part in the fit, "none"
    without one. Empty where there are too few queries.
    """

    counts: dict[str, int]
    num_sampled: int
    norms: tuple[float, float]
    spread: dict[str, float]
    gaps: dict[tuple[str, str], tuple[float, float]]
    copies: float
    by: str
    skewness: float
    never: float
    hubs: list[tuple[str, int]]
    mixing: dict[str, float]
    pairs: dict[tuple[str, str], tuple[int, float, float]]
    corrected: dict[str, dict[str, Any]]

    def lines(self) -> list[str]:
        """The same to be read."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items())
        said = [f"{sum(self.counts.values()):,} rows: {kinds}; {self.num_sampled:,} of them looked at"]
        said.append(f"lengths of vectors {self.norms[0]:.4f} to {self.norms[1]:.4f}; near-copies {self.copies:.1%}")
        said += [f"{kind}: uniformity {value:.2f} (lower: more spread out)" for kind, value in self.spread.items()]
        for (one, other), (distance, told) in self.gaps.items():
            said.append(f"{one} and {other}: means {distance:.2f} apart, told apart by a plane in {told:.0%}")
        said.append(
            f"nearest {K} of {self.by}: skewness {self.skewness:.1f} (hubs above 1.4), {self.never:.0%} of rows never "
            "found"
        )
        said += [f"  {count} times: {name}" for name, count in self.hubs]
        said += [f"  {kind} comes up {share:.2f} times its share" for kind, share in self.mixing.items()]
        for (one, other), (count, there, back) in self.pairs.items():
            said.append(
                f"{count} pairs of {one} and {other}: recall@{K} {there:.2f} from {one}, {back:.2f} from {other}"
            )
        if self.by != _OWN and not self.corrected:
            said.append(
                f"corrections are measured with {2 * FEWEST_QUERIES} queries or more, and {FEWEST_ROWS} rows of a kind"
            )
        for name, measured in self.corrected.items():
            shares = ", ".join(f"{kind} {share:.2f}" for kind, share in measured["mixing"].items())
            said.append(f"correct={name}, on held-out queries: skewness {measured['skewness']:.1f}, shares {shares}")
        return said


def report(index: Index, queries: np.ndarray | None = None) -> IndexReport:
    """Look at an index.

    Args:
        index: with rows.
        queries: unit vectors of queries like those that it is searched with, `[Q, dim]`; None: its rows search for each
            other, each leaving itself out.

    Raises:
        ValueError: it is empty.
    """
    rows, vectors = index.store.sampled(SAMPLE, ["path", "kind", "page"])
    if len(rows) < 2:
        raise ValueError(f"{index.path} has {len(rows)} rows; there is nothing to compare")
    norms = np.linalg.norm(vectors, axis=1)
    units, kinds = vectors / norms[:, None], np.array([row["kind"] for row in rows])
    of_kind = {str(kind): units[kinds == kind] for kind in np.unique(kinds) if (kinds == kind).sum() >= _FEWEST}
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    asked = units if queries is None else queries
    counts = _counts_of(cosines, min(K, len(rows) - 1)) if queries is None else hit_counts(asked, units, K)
    best = np.argsort(-counts, kind="stable")[:_NAMED]
    return IndexReport(
        counts={kind: count for (kind,), count in sorted(index.store.counts("kind").items())},
        num_sampled=len(rows),
        norms=(float(norms.min()), float(norms.max())),
        spread={kind: uniformity(some) for kind, some in of_kind.items()},
        gaps={
            (one, other): (centroid_distance(of_kind[one], of_kind[other]), separability(of_kind[one], of_kind[other]))
            for one, other in combinations(of_kind, 2)
        },
        copies=float((cosines.max(axis=1) >= _COPIES).mean()),
        by=_OWN if queries is None else f"{len(asked):,} queries",
        skewness=skewness(counts),
        never=float((counts == 0).mean()),
        hubs=[(_name(rows[at]), int(counts[at])) for at in best],
        mixing=mixing(counts, kinds.tolist()),
        pairs=_recall_of_pairs(rows, cosines),
        corrected={} if queries is None else _corrected(index, queries, units, kinds),
    )


def _recall_of_pairs(
    rows: list[dict[str, Any]], cosines: np.ndarray
) -> dict[tuple[str, str], tuple[int, float, float]]:
    of_stem: dict[str, dict[str, int]] = defaultdict(dict)
    for at, row in enumerate(rows):
        if row["page"] <= 1:  # the whole, or the first page
            of_stem[os.path.splitext(row["path"])[0]].setdefault(row["kind"], at)
    places: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for kinds in of_stem.values():
        for one, other in combinations(sorted(kinds), 2):
            places[one, other].append((kinds[one], kinds[other]))
    found = {}
    for names, pairs in places.items():
        there, back = (
            np.mean([(cosines[a] > cosines[a, b]).sum() < K for a, b in some])
            for some in (pairs, [(b, a) for a, b in pairs])
        )
        found[names] = (len(pairs), float(there), float(back))
    return found


def _counts_of(scores: np.ndarray, k: int) -> np.ndarray:
    """How often each row is among the best k, of scores `[Q, N]`, `[N]`."""
    return np.bincount(np.argpartition(-scores, k - 1, axis=1)[:, :k].ravel(), minlength=scores.shape[1])


def _corrected(index: Index, queries: np.ndarray, rows: np.ndarray, kinds: np.ndarray) -> dict[str, dict[str, Any]]:
    """What each correction does, fitted to one half of the queries and measured on the other."""
    fitted, held_out = queries[::2], queries[1::2][:_HELD_OUT]
    if len(fitted) < FEWEST_QUERIES or len(held_out) < FEWEST_QUERIES:
        return {}
    try:
        corrections = Corrections.fitted(index.store, fitted)
    except ValueError:  # no kind has rows enough
        return {}
    found = {}
    for how in (None, "centre", "hubs"):
        scores = held_out @ rows.T if how is None else corrections.scores(how, held_out, rows, kinds.tolist())
        counts = _counts_of(scores, min(K, len(rows)))
        name = "none" if how is None else how
        found[name] = {"skewness": skewness(counts), "mixing": mixing(counts, kinds.tolist())}
    return found


def _name(row: dict[str, Any]) -> str:
    return row["path"] + (f"#page={row['page']}" if row["page"] else "")


def draw_report(index: Index, found: IndexReport, out: Path) -> None:
    """A picture: a map of the rows by kind, cosines within kinds and across them, and how often rows come up.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("pictures need matplotlib; pip install 'plume-embed[plot]'") from None
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows, vectors = index.store.sampled(_DRAWN, ["kind"])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kinds = np.array([row["kind"] for row in rows])
    low = PCA(min(50, *units.shape), random_state=0).fit_transform(units)
    near = max(2.0, min(30.0, (len(units) - 1) / 3))
    places = TSNE(perplexity=near, init="pca", random_state=0).fit_transform(low) if len(units) > 10 else low[:, :2]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1.3, 1, 1))
    colours = dict(zip(sorted(set(kinds.tolist())), _COLOURS, strict=False))
    cosines = units @ units.T
    bins = np.linspace(min(0.0, float(cosines.min())), 1, 60)
    for kind, colour in colours.items():
        is_kind = kinds == kind
        left.scatter(*places[is_kind].T, s=6, color=colour, label=f"{kind} ({found.counts[kind]:,})", linewidths=0)
        within = cosines[np.ix_(is_kind, is_kind)]
        within = within[np.triu_indices(len(within), 1)]
        if len(within):
            middle.hist(within, bins, density=True, histtype="step", color=colour, label=f"{kind}, {kind}")
    across = cosines[kinds[:, None] != kinds[None]]
    if len(across):
        middle.hist(across, bins, density=True, histtype="step", color="black", label="two kinds")
    left.set(title="map of rows (t-SNE)", xticks=[], yticks=[])
    left.legend(markerscale=2.5)
    middle.set(title="cosines of two rows", xlabel="cosine", yticks=[])
    middle.legend()
    names = [os.path.basename(name) for name, _ in found.hubs][::-1]
    right.barh([name if len(name) < 30 else f"{name[:27]}..." for name in names], [n for _, n in found.hubs][::-1])
    right.set(title=f"rows that come up most for {found.by}", xlabel=f"times among the nearest {K}")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
