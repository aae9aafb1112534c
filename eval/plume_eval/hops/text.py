"""The family "text": facts about invented concepts, in shuffled order.

Two forms:

chain   every concept is another one; which is it so many steps on?
graph   as in ProsQA (Hao et al., arXiv 2412.06769): a directed acyclic graph in which two of the concepts are asked
        for, of which only one can be reached; the shortest path has the hops that were asked for. Two candidates
        are named, so that guessing is right in half of the cases; so it is in ProsQA
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from random import Random

from plume_eval.hops.puzzle import Difficulty, Family, Puzzle, Shown, need_symbols
from plume_eval.hops.symbols import concepts

NAMES = ("alex", "bob", "carol", "davis", "eva", "fae", "jack", "max", "polly", "rex", "sally", "stella", "tom", "wren")
QUESTIONS = ("what is {start} %d steps on", "go %d steps on from {start}", "start at {start} and go on %d times")
CHOICES = ("is {start} a %s or a %s", "which is {start} a %s or a %s")
#: Of the nodes of a graph: how many come from one root, from the other, from either; and the mean number of parents.
_FROM_ONE, _FROM_OTHER, _PARENTS = 0.35, 0.7, 1.5
_TRIES = 10_000

Fact = tuple[str, str]
"""Something, and what it is."""


def check(difficulty: Difficulty) -> None:
    """Refuse too few concepts."""
    need_symbols(difficulty, 2 * (difficulty.max_hops + 1) + difficulty.num_distractors)


def make(form: str, symbols: Sequence[Shown], difficulty: Difficulty, rng: Random) -> Puzzle:
    """Facts and a question."""
    names = [symbol.name for symbol in symbols]
    return (_chain if form == "chain" else _graph)(names, difficulty, rng)


def _chain(names: list[str], difficulty: Difficulty, rng: Random) -> Puzzle:
    order, people = rng.sample(names, len(names)), rng.sample(NAMES, 2)
    cut = len(order) // 2
    chains = [[people[0], *order[:cut]], [people[1], *order[cut:]]]
    facts = [(a, b) for chain in chains for a, b in pairwise(chain)]
    *path, beyond = chains[0][: difficulty.num_hops + 2]
    return _puzzle("chain", facts, path, beyond, rng.choice(QUESTIONS) % difficulty.num_hops, rng)


def _graph(names: list[str], difficulty: Difficulty, rng: Random) -> Puzzle:
    for _ in range(_TRIES):
        edges, origin = _random_graph(len(names) + 2, rng)
        distance = _distances(0, edges)
        ends = [node for node, steps in distance.items() if steps == difficulty.num_hops and origin[node] == 1]
        others = [node for node in range(2, len(origin)) if origin[node] == 2]
        if ends and others:
            break
    else:
        raise ValueError(
            f"{len(names)} symbols give no graph with a path of {difficulty.num_hops} hops; raise num_symbols"
        )
    called = [*rng.sample(NAMES, 2), *rng.sample(names, len(names))]
    end, other = rng.choice(ends), rng.choice(others)
    path = [called[node] for node in _shortest(0, end, edges, rng)]
    choices = rng.sample([called[end], called[other]], 2)
    facts = [(called[a], called[b]) for a, b in edges]
    return _puzzle("graph", facts, path, called[other], rng.choice(CHOICES) % tuple(choices), rng, choices)


def _random_graph(size: int, rng: Random) -> tuple[list[tuple[int, int]], list[int]]:
    """Edges from earlier to later nodes, and where each node can be reached from: 1, 2, both (3) or neither (0).

    Nodes 0 and 1 are the roots. Parents of a new node are nodes of one origin, of the other, or of any, deep ones
    rather than shallow ones, so that paths become long.
    """
    edges: list[tuple[int, int]] = []
    origin, depth = [1, 2], [0, 0]
    for node in range(2, size):
        count = min(sum(rng.random() < _PARENTS / 6 for _ in range(6)), node)  # close to a Poisson number
        draw = rng.random()
        allowed = {0, 1} if draw <= _FROM_ONE else {0, 2} if draw <= _FROM_OTHER else {0, 1, 2, 3}
        pool = [parent for parent in range(node) if origin[parent] in allowed]
        weights = [1 + 1.5 * depth[parent] for parent in pool]
        parents = {rng.choices(pool, weights)[0] for _ in range(count)} if pool else set()
        edges += [(parent, node) for parent in sorted(parents)]
        reach = 0
        for parent in parents:
            reach |= origin[parent]
        origin.append(reach)
        depth.append(1 + max((depth[parent] for parent in parents), default=-1))
    return edges, origin


def _distances(start: int, edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Length of the shortest path to every node that can be reached."""
    found, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for a, b in edges:
            if a == node and b not in found:
                found[b] = found[node] + 1
                queue.append(b)
    return found


def _shortest(start: int, end: int, edges: Sequence[tuple[int, int]], rng: Random) -> list[int]:
    """One of the shortest paths."""
    distance, way = _distances(start, edges), [end]
    while way[0] != start:
        before = [a for a, b in edges if b == way[0] and distance.get(a) == distance[way[0]] - 1]
        way.insert(0, rng.choice(before))
    return way


def _puzzle(
    form: str, facts: list[Fact], path: list[str], beyond: str, question: str, rng: Random, choices: Sequence[str] = ()
) -> Puzzle:
    facts = rng.sample(facts, len(facts))
    told = [f"{a} is a {b}." if a in NAMES else f"every {a} is a {b}." for a, b in facts]
    return Puzzle(
        form=form,
        key=frozenset(facts),
        draw=list,
        facts=" ".join(told),
        question=question,
        path=tuple(path),
        beyond=beyond,
        places=(*(b for _, b in facts), *choices),
        reading=tuple(f"{a} {b}." for a, b in rng.sample(facts, len(facts))),
    )


TEXT = Family(
    name="text",
    forms=("chain", "graph"),
    medium=None,
    symbols=concepts,
    make=make,
    check=check,
    num_symbols=16,
    num_distractors=0,
    words=(
        *NAMES,
        "is",
        "a",
        "every",
        "what",
        "steps",
        "on",
        "go",
        "from",
        "start",
        "at",
        "and",
        "times",
        "or",
        "which",
    ),
)
