"""The family "text": facts about invented concepts, in shuffled order.

Two forms:

chain   every concept is another one; which is it so many steps on?
graph   as in ProsQA (Hao et al., arXiv 2412.06769): a directed acyclic graph in which two of the concepts are asked
        for, of which only one can be reached; the shortest path has the hops that were asked for. Two candidates
        are named, so that guessing is right in half of the cases; so it is in ProsQA
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random

from plume_eval.hops.puzzle import Difficulty, Family, Puzzle, Scene, Shown, need_symbols
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
    if difficulty.num_distractors == 1:
        raise ValueError("num_distractors must not be 1, since a concept is another one; ask for 0 or for 2")
    need_symbols(difficulty, max(2 * difficulty.max_hops, 3) + difficulty.num_distractors)


def make(form: str, symbols: Sequence[Shown], difficulty: Difficulty, rng: Random) -> Puzzle:
    """Facts and a question."""
    names = [symbol.name for symbol in symbols]
    return (_chain if form == "chain" else _graph)(names, difficulty, rng)


def _chain(names: list[str], difficulty: Difficulty, rng: Random) -> Puzzle:
    order, people = rng.sample(names, len(names)), rng.sample(NAMES, 2)
    cut = len(order) - difficulty.num_distractors
    facts = [fact for cycle in (order[:cut], order[cut:]) for fact in pairwise([*cycle, *cycle[:1]])]
    facts += [(people[0], order[0]), (people[1], rng.choice(order))]
    path, beyond = [people[0], *order[: difficulty.num_hops]], order[difficulty.num_hops]
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
    if 2 * num_hops > num_nodes - 2:
        raise ValueError(f"{num_nodes} nodes give no two paths of {num_hops} hops; raise num_symbols")
    for _ in range(_TRIES):
        edges, ways = _random_graph(num_nodes, num_hops, rng)
        nodes = sorted({node for edge in edges for node in edge})
        roots = [node for node in nodes if node not in {b for _, b in edges}]
        if len(roots) <= len(people) and len(nodes) - len(roots) <= len(names):
            break
    else:
        raise ValueError(f"{len(names)} and {len(people)} names are too few for graphs of {num_nodes} nodes; add some")
    of_people, of_concepts = rng.sample(list(people), len(roots)), iter(rng.sample(list(names), len(names)))
    called = {node: of_people.pop() if node in roots else next(of_concepts) for node in nodes}
    path, wrong = ([called[node] for node in way] for way in ways)
    choices = rng.sample([path[-1], wrong[-1]], 2)
    facts = [(called[a], called[b]) for a, b in edges]
    question = rng.choice(CHOICES) % tuple(choices)
    return _puzzle("graph", facts, path, wrong[-1], question, rng, choices)


def _random_graph(size: int, num_hops: int, rng: Random) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Edges from earlier to later nodes, and of each of two roots the nodes of a shortest path of so many hops.

    Nodes 0 and 1 are the roots. Parents of a new node are nodes that the one, the other or any root leads to, deep ones
    rather than shallow ones, so that paths become long. A node of a path has the one before it among its parents, and
    none that its root reaches sooner or that the other root reaches. Both paths are made alike, so that nothing but
    following tells which root leads to which end.
    """
    chosen = rng.sample(range(2, size), 2 * num_hops)
    ways = [[0, *sorted(chosen[:num_hops])], [1, *sorted(chosen[num_hops:])]]
    before = {b: (a, root) for root, way in enumerate(ways) for a, b in pairwise(way)}
    edges: list[tuple[int, int]] = []
    origin, depth = [1, 2], [0, 0]  # 1, 2, 3 and 0: the first, the second, both or neither root leads there
    distance = [[0.0, math.inf], [math.inf, 0.0]]  # from each root
    for node in range(2, size):
        count = sum(rng.random() < _PARENTS / 6 for _ in range(6))  # close to a Poisson number
        draw = rng.random()
        parents: set[int] = set()
        if node in before:
            parent, root = before[node]
            parents, least = {parent}, distance[root][parent]
            pool = [one for one in range(node) if origin[one] in (0, root + 1) and distance[root][one] >= least]
        else:
            allowed = {0, 1} if draw <= _FROM_ONE else {0, 2} if draw <= _FROM_OTHER else {0, 1, 2, 3}
            pool = [one for one in range(node) if origin[one] in allowed]
        weights = [1 + 1.5 * depth[one] for one in pool]
        while len(parents) < min(count, len(pool)):
            parents.add(rng.choices(pool, weights)[0])
        edges += [(parent, node) for parent in sorted(parents)]
        reach = 0
        for parent in parents:
            reach |= origin[parent]
        origin.append(reach)
        depth.append(1 + max((depth[parent] for parent in parents), default=-1))
        for of_root in distance:
            of_root.append(1 + min((of_root[parent] for parent in parents), default=math.inf))
    return edges, ways


def _puzzle(
    form: str, facts: list[Fact], path: list[str], beyond: str, question: str, rng: Random, choices: Sequence[str] = ()
) -> Puzzle:
    facts = rng.sample(facts, len(facts))
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
        reading=tuple(f"{a} {b}." for a, b in rng.sample(facts, len(facts))),
    )


def make_easy(symbols: Sequence[Shown], rng: Random) -> Scene:
    """A cycle of three concepts or more, and two people, without the words between.

    What stands side by side is easier to find than what words stand between; where to look is the same.
    """
    order = rng.sample([symbol.name for symbol in symbols], rng.randint(3, len(symbols)))
    people = rng.sample(NAMES, 2)
    facts = [*pairwise([*order, order[0]]), *((name, rng.choice(order)) for name in people)]
    told = [f"{a} {b}." for a, b in facts]
    return Scene(
        draw=list,
        facts=" ".join(rng.sample(told, len(told))),
        reading=tuple(rng.sample(told, len(told))),
    )


TEXT = Family(
    name="text",
    easy=make_easy,
    forms=("chain", "graph"),
    medium=None,
    symbols=concepts,
    make=make,
    check=check,
    num_symbols=12,
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
