"""The family "page": follow a table of symbols several times.

A page shows keys, each with a value. The values of the keys that can be reached from a start form one cycle, so that a
path meets no symbol twice, every symbol is a value once, and nothing but following tells them apart. The cycle has at
least twice as many symbols as there are hops at most, so that no answer is nearer backwards. Distractors form a cycle
of their own. Three forms:

    tiles   a tile per row, key and value side by side, in two to five columns
    words   the same in writing, in one of several fonts
    chart   bars: keys along the bottom, values along the left, a bar as high as the value of its key
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random

from PIL import Image, ImageDraw

from plume_eval.hops.puzzle import Difficulty, Family, Puzzle, Shown, need_symbols
from plume_eval.hops.symbols import BACKGROUND, FONTS, TILE, Symbol, alphabet, written

QUESTIONS = (
    "start at {start} and follow the table %d times",
    "follow the table %d times from {start}",
    "which one is %d rows on from {start}",
)
_BAR = (180, 176, 168)

Rows = list[tuple[Symbol, Symbol]]
"""Key and value, in the order in which they are drawn."""


def check(difficulty: Difficulty) -> None:
    """Refuse a page without a path long enough."""
    if difficulty.num_distractors == 1:
        raise ValueError("num_distractors must not be 1, since a row of a page leads to another; ask for 0 or for 2")
    need_symbols(difficulty, max(2 * difficulty.max_hops, difficulty.max_hops + 2) + difficulty.num_distractors)


def make(form: str, symbols: Sequence[Shown], difficulty: Difficulty, rng: Random) -> Puzzle:
    """A page of all symbols."""
    order = rng.sample(list(symbols), len(symbols))
    cut = len(order) - difficulty.num_distractors
    follows = {a: b for cycle in (order[:cut], order[cut:]) for a, b in pairwise([*cycle, *cycle[:1]])}
    rows: Rows = [(key, follows[key]) for key in rng.sample(list(symbols), len(symbols))]  # type: ignore[arg-type]
    path = order[: difficulty.num_hops + 2]
    columns, font = rng.randint(2, min(5, len(rows))), rng.choice(FONTS)
    pictures = {
        "tiles": lambda: draw_tiles(rows, columns),
        "words": lambda: draw_words(rows, font),
        "chart": lambda: draw_chart(rows, symbols),
    }
    return Puzzle(
        form=form,
        key=frozenset((key.name, value.name) for key, value in rows),
        draw=lambda: [pictures[form]()],
        facts="",
        question=rng.choice(QUESTIONS) % difficulty.num_hops,
        path=tuple(symbol.name for symbol in path[:-1]),
        beyond=path[-1].name,
        places=tuple(value.name for _, value in rows),
        reading=tuple(f"{key.name} {value.name}." for key, value in rng.sample(rows, len(rows))),
    )


def draw_tiles(rows: Rows, columns: int) -> Image.Image:
    """Tiles of 28 x 28 pixels, key on the left half, value on the right."""
    lines = math.ceil(len(rows) / columns)
    picture = Image.new("RGB", (columns * TILE, lines * TILE), BACKGROUND)
    for place, row in enumerate(rows):
        left, top = place % columns * TILE, place // columns * TILE
        for side, symbol in enumerate(row):
            picture.paste(symbol.draw(TILE // 2, TILE), (left + side * TILE // 2, top))
    return picture


def draw_words(rows: Rows, font: tuple[float, float]) -> Image.Image:
    """A table in two columns of rows; a symbol is its colour over its shape, 56 x 28 pixels."""
    lines = math.ceil(len(rows) / 2)
    picture = Image.new("RGB", (8 * TILE, lines * TILE), BACKGROUND)
    for place, row in enumerate(rows):
        left, top = place // lines * 4 * TILE, place % lines * TILE
        for side, symbol in enumerate(row):
            picture.paste(written((symbol.colour, symbol.shape), 2 * TILE, TILE, font), (left + side * 2 * TILE, top))
    return picture


def draw_chart(rows: Rows, symbols: Sequence[Shown]) -> Image.Image:
    """Bars over the keys; units of 14 x 14 pixels, the first value is the lowest."""
    unit = TILE // 2
    side = math.ceil((len(rows) + 1) * unit / TILE) * TILE
    picture = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    heights = {symbol: place for place, symbol in enumerate(symbols)}
    for symbol, place in heights.items():
        picture.paste(symbol.draw(unit, unit), (0, side - (place + 2) * unit))  # type: ignore[call-arg]
    for place, (key, value) in enumerate(rows, start=1):
        picture.paste(key.draw(unit, unit), (place * unit, side - unit))
        top = side - (heights[value] + 2) * unit
        draw.rectangle((place * unit + 2, top, (place + 1) * unit - 3, side - unit - 1), fill=_BAR)
    return picture


PAGE = Family(
    name="page",
    forms=("tiles", "words", "chart"),
    medium="image",
    symbols=alphabet,
    make=make,
    check=check,
    num_symbols=12,
    num_distractors=0,
    words=("start", "at", "and", "follow", "the", "table", "times", "from", "which", "one", "is", "rows", "on"),
)
