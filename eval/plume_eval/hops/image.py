"""The family "image": follow arrows from one shape to the next on a grid.

A cell holds a shape and an arrow. The arrow points up, down, left or right; white ones lead to the next cell, black
ones to the one behind it. Two forms of question:

    arrows  follow the arrows so many times
    count   follow them until more than so many shapes of a colour were met, the start included, and once more
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from random import Random

from PIL import Image, ImageDraw

from plume_eval.hops.puzzle import Difficulty, Family, Puzzle, Scene, Shown, need_symbols
from plume_eval.hops.symbols import BACKGROUND, COLOURS, TILE, Symbol, alphabet

QUESTIONS = (
    "start at {start} and follow the arrows %d times",
    "follow the arrows %d times from {start}",
    "which one is %d arrows on from {start}",
)
COUNTING = (
    "start at {start} and follow the arrows until more than %d %s ones were met and once more",
    "from {start} follow the arrows to the one behind the first with more than %d %s ones met",
)
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
LENGTHS = {"white": 1, "black": 2}

Arrow = tuple[str, str]
"""Direction and colour."""


def check(difficulty: Difficulty) -> None:
    """Refuse a grid without a path long enough; distractors are the cells that the path does not touch."""
    side = math.isqrt(difficulty.num_symbols)
    if side < 2 or side * side != difficulty.num_symbols:
        raise ValueError(
            f"an image is a square grid: num_symbols must be 4, 9, ... 36; received {difficulty.num_symbols}"
        )
    need_symbols(difficulty, difficulty.max_hops + 2 + difficulty.num_distractors)


def make(form: str, symbols: Sequence[Shown], difficulty: Difficulty, rng: Random) -> Puzzle:
    """A grid of all symbols."""
    side = math.isqrt(len(symbols))
    cells = rng.sample(list(symbols), len(symbols))
    way = _find_path(side, difficulty.num_hops + 2, rng)
    arrows: list[Arrow] = [rng.choice(_targets(side, cell))[0] for cell in range(len(cells))]
    for a, b in pairwise(way):
        arrows[a] = rng.choice([arrow for arrow, cell in _targets(side, a) if cell == b])
    path: list[Symbol] = [cells[cell] for cell in way]  # type: ignore[misc]
    question = rng.choice(QUESTIONS) % difficulty.num_hops
    if form == "count":
        colour = path[-3].colour
        before = sum(symbol.colour == colour for symbol in path[:-2]) - 1
        question = rng.choice(COUNTING) % (before, colour)
    follows = {cells[cell].name: cells[_target(side, cell, arrow)].name for cell, arrow in enumerate(arrows)}
    return Puzzle(
        form=form,
        key=(tuple(symbol.name for symbol in cells), tuple(arrows)),
        draw=lambda: [draw_grid(side, dict(enumerate(zip(cells, arrows, strict=True))))],  # type: ignore[arg-type]
        facts="",
        question=question,
        path=tuple(symbol.name for symbol in path[:-1]),
        beyond=path[-1].name,
        places=tuple(follows.values()),
        reading=tuple(f"{a} {follows[a]}." for a in rng.sample(list(follows), len(follows))),
    )


def make_easy(symbols: Sequence[Shown], rng: Random) -> Scene:
    """A grid in which cells are empty; arrows lead to cells that are not.

    A cell's own arrow is said before where it leads: a model that finds the cell by then has only to look on.
    """
    side = math.isqrt(len(symbols))
    while True:
        cells = rng.sample(range(len(symbols)), rng.randint(2, len(symbols) - 2))
        shown = dict(zip(cells, rng.sample(list(symbols), len(cells)), strict=True))
        ways = {cell: [way for way in _targets(side, cell) if way[1] in shown] for cell in cells}
        if all(ways.values()):
            break
    chosen = {cell: rng.choice(ways[cell]) for cell in cells}
    return Scene(
        draw=lambda: [draw_grid(side, {cell: (shown[cell], chosen[cell][0]) for cell in cells})],  # type: ignore[misc]
        facts="",
        reading=tuple(f"{shown[at].name} {' '.join(arrow)} {shown[to].name}." for at, (arrow, to) in chosen.items()),
    )


def _find_path(side: int, length: int, rng: Random) -> list[int]:
    """Cells that arrows can lead through, none of them twice."""
    while True:
        way = [rng.randrange(side * side)]
        while len(way) < length:
            open_cells = sorted({cell for _, cell in _targets(side, way[-1])} - set(way))
            if not open_cells:
                break
            way.append(rng.choice(open_cells))
        if len(way) == length:
            return way


def _targets(side: int, cell: int) -> list[tuple[Arrow, int]]:
    """Every arrow that a cell may have, and where it leads."""
    found = []
    for direction, (down, right) in DIRECTIONS.items():
        for colour, length in LENGTHS.items():
            row, column = cell // side + length * down, cell % side + length * right
            if 0 <= row < side and 0 <= column < side:
                found.append(((direction, colour), row * side + column))
    return found


def _target(side: int, cell: int, arrow: Arrow) -> int:
    (down, right), length = DIRECTIONS[arrow[0]], LENGTHS[arrow[1]]
    return cell + length * (down * side + right)


def draw_grid(side: int, cells: Mapping[int, tuple[Symbol, Arrow]]) -> Image.Image:
    """Tiles of 28 x 28 pixels, shape on the left half, arrow on the right; by place, row by row."""
    picture = Image.new("RGB", (side * TILE, side * TILE), BACKGROUND)
    for place, (symbol, arrow) in cells.items():
        left, top = place % side * TILE, place // side * TILE
        picture.paste(symbol.draw(TILE // 2, TILE), (left, top))
        _draw_arrow(picture, arrow, left + TILE // 2, top)
    return picture


def _draw_arrow(picture: Image.Image, arrow: Arrow, left: int, top: int) -> None:
    direction, colour = arrow
    down, right = DIRECTIONS[direction]
    x, y, length = left + 7, top + 14, 6
    tip = (x + right * length, y + down * length)
    tail = (x - right * length, y - down * length)
    wings = [(x + down * 4, y + right * 4), (x - down * 4, y - right * 4)]
    draw = ImageDraw.Draw(picture)
    draw.line((tail, (x, y)), fill=COLOURS[colour], width=2)
    draw.polygon([tip, *wings], fill=COLOURS[colour])


IMAGE = Family(
    name="image",
    easy=make_easy,
    forms=("arrows", "count"),
    medium="image",
    symbols=alphabet,
    make=make,
    check=check,
    num_symbols=9,
    num_distractors=0,
    words=(
        *("start", "at", "and", "follow", "the", "arrows", "times", "from", "which", "one", "is", "on", "until"),
        *("more", "than", "ones", "were", "met", "once", "to", "behind", "first", "with", *COLOURS, *DIRECTIONS),
    ),
)
