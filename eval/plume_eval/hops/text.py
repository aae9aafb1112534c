"""The family "text": facts about invented concepts, in shuffled order.

Two forms:

chain   every concept is another one; which is it so many steps on?
graph   as in ProsQA (Hao et al., arXiv 2412.06769): a directed acyclic graph in which two of the concepts are asked
        for, of which only one can be reached; the shortest path has the hops that were asked for. Two candidates
        are named, so that guessing is right in half of the cases; so it is in ProsQA
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from random import Random

from plume_eval.hops.puzzle import Difficulty, Family, Puzzle, Shown, need_symbols
from plume_eval.hops.symbols import concepts

NAMES = ("alex", "bob", "carol", "davis", "eva", "fae", "jack", "max", "polly", "rex", "sally", "stella", "tom", "wren")
QUESTIONS = ("what is {start} %d steps on", "go %d steps on from {start}", "start at {start} and go on %d times")
CHOICES = ("is {start} a %s or %s", "which is {start} a %s or %s")
#: Of the nodes of a graph: how many come from one root, from the other, from either; and the mean number of parents.
_FROM_ONE, _FROM_OTHER, _PARENTS = 0.35, 0.7, 1.9
_TRIES = 1000

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
    return graph_puzzle(names, NAMES, len(names) + 2, difficulty.num_hops, rng)


def graph_puzzle(names: Sequence[str], people: Sequence[str], num_nodes: int, num_hops: int, rng: Random) -> Puzzle:
    """A puzzle of the form "graph".

    Args:
        names: of concepts.
        people: names of what has no parents.
        num_nodes: of the graph.
        num_hops: length of the shortest path.
        rng: of everything random.

    Raises:
        ValueError: no such graph was found.
    """
    for _ in range(_TRIES if num_hops < num_nodes - 2 else 0):
        edges, origin, way = _random_graph(num_nodes, num_hops, rng)
        others = [node for node in range(2, num_nodes) if origin[node] == 2]
        nodes = sorted({node for edge in edges for node in edge} | {0, 1})
        roots = [node for node in nodes if node not in {b for _, b in edges}]
        if others and len(roots) <= len(people) and len(nodes) - len(roots) <= len(names):
            break
    else:
        raise ValueError(f"{num_nodes} nodes give no graph with a path of {num_hops} hops; raise num_symbols")
    of_people, of_concepts = rng.sample(list(people), len(roots)), iter(rng.sample(list(names), len(names)))
    called = {node: of_people.pop() if node in roots else next(of_concepts) for node in nodes}
    # The wrong one is part of as many facts as the right one, nearly, so that counting does not tell them apart.
    uses = Counter((node, side) for edge in edges for side, node in enumerate(edge))
    rng.shuffle(others)
    other = min(others, key=lambda node: sum(abs(uses[node, side] - uses[way[-1], side]) for side in (0, 1)))
    path = [called[node] for node in way]
    choices = rng.sample([path[-1], called[other]], 2)
    facts = [(called[a], called[b]) for a, b in edges]
    question = rng.choice(CHOICES) % tuple(choices)
    return _puzzle("graph", facts, path, called[other], question, rng, choices)


def _random_graph(size: int, num_hops: int, rng: Random) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Edges from earlier to later nodes; which root leads to each node; a shortest path from root 0, its nodes.

    Nodes 0 and 1 are the roots; 1, 2, 3 and 0 mean that the first, the second, both or neither leads there. Parents of
    a new node are nodes of one origin, of the other, or of any, deep ones rather than shallow ones, so that paths
    become long. A node of the path has the one before it among its parents, and none that the first root reaches sooner
    or that the second one reaches.
    """
    way = [0, *sorted(rng.sample(range(2, size), num_hops))]
    before = dict(zip(way[1:], way, strict=False))
    edges: list[tuple[int, int]] = []
    origin, depth, distance = [1, 2], [0, 0], [0.0, math.inf]
    for node in range(2, size):
        count = sum(rng.random() < _PARENTS / 6 for _ in range(6))  # close to a Poisson number
        draw = rng.random()
        allowed = {0, 1} if draw <= _FROM_ONE else {0, 2} if draw <= _FROM_OTHER else {0, 1, 2, 3}
        parents = {before[node]} if node in before else set()
        if node in before:
            least = distance[before[node]]
            pool = [parent for parent in range(node) if origin[parent] < 2 and distance[parent] >= least]
        else:
            pool = [parent for parent in range(node) if origin[parent] in allowed]
        weights = [1 + 1.5 * depth[parent] for parent in pool]
        while len(parents) < min(count, len(pool)):
            parents.add(rng.choices(pool, weights)[0])
        edges += [(parent, node) for parent in sorted(parents)]
        reach = 0
        for parent in parents:
            reach |= origin[parent]
        origin.append(reach)
        depth.append(1 + max((depth[parent] for parent in parents), default=-1))
        distance.append(1 + min((distance[parent] for parent in parents), default=math.inf))
    return edges, origin, way


def _puzzle(
    form: str, facts: list[Fact], path: list[str], beyond: str, question: str, rng: Random, choices: Sequence[str] = ()
) -> Puzzle:
    ordered, facts = facts, rng.sample(facts, len(facts))
    told = [f"every {a} is a {b}." if a.endswith("pus") else f"{a} is a {b}." for a, b in facts]
    return Puzzle(
        form=form,
        key=frozenset(facts),
        draw=list,
        facts=" ".join(told),
        question=question,
        path=tuple(path),
        beyond=beyond,
        places=(*(b for _, b in facts), *choices),
        reading=tuple(f"{b} follows {a}." for a, b in ordered),
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
