"""The task "page": follow a table of symbols several times.

A page is a picture of tiles. Each tile shows a key symbol and a value symbol side by side. A question names a start
and how often to follow the table; the answer is the symbol reached. Values are drawn independently, so a symbol may
be the value of several keys and a path may run into a cycle; what a guess is worth depends on the page. Without a
picture and without tensors this file is the task's logic; `draw_page` is its picture.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from plume_eval.hops.symbols import BACKGROUND, TILE, Symbol, draw_symbol


@dataclass(frozen=True)
class Page:
    """A table: its rows in the order in which the tiles are drawn."""

    rows: tuple[tuple[Symbol, Symbol], ...]

    def path(self, start: Symbol, num_hops: int) -> list[Symbol]:
        """The symbols met, `num_hops + 1` of them, the start included."""
        table = dict(self.rows)
        path = [start]
        for _ in range(num_hops):
            path.append(table[path[-1]])
        return path


def make_page(symbols: list[Symbol], rng: random.Random) -> Page:
    """A page of all keys in random order, with values drawn independently."""
    keys = rng.sample(symbols, len(symbols))
    return Page(tuple((key, rng.choice(symbols)) for key in keys))


def question(start: Symbol, num_hops: int) -> str:
    """What is asked of a page.

    Example:
        >>> question(Symbol("disc", "red"), 4)
        'start at red-disc and follow the table 4 times'
    """
    return f"start at {start.name} and follow the table {num_hops} times"


def rationale(path: list[Symbol]) -> str:
    """The reasoning, one sentence per hop; it begins with the symbol reached.

    Example:
        >>> rationale([Symbol("disc", "red"), Symbol("ring", "blue"), Symbol("disc", "blue")])
        'blue-ring follows red-disc. blue-disc follows blue-ring.'
    """
    return " ".join(f"{reached.name} follows {left.name}." for left, reached in pairwise(path))


def words(symbols: list[Symbol]) -> list[str]:
    """Every word that questions, rationales and answers use."""
    return [symbol.name for symbol in symbols] + [
        "start",
        "at",
        "and",
        "follow",
        "read",
        "the",
        "table",
        "times",
        "follows",
    ]


def draw_page(page: Page) -> Image.Image:
    """The picture: tiles of 28 x 28 pixels in a square grid, key on the left half, value on the right."""
    columns = math.ceil(math.sqrt(len(page.rows)))
    lines = math.ceil(len(page.rows) / columns)
    picture = Image.new("RGB", (columns * TILE, lines * TILE), BACKGROUND)
    for place, row in enumerate(page.rows):
        left, top = place % columns * TILE, place // columns * TILE
        for side, symbol in enumerate(row):
            picture.paste(draw_symbol(symbol, TILE // 2, TILE), (left + side * TILE // 2, top))
    return picture
