"""Answers hops questions from what a model is given, pixels, frames and words, and from nothing else."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from plume_eval.hops.symbols import COLOURS, FONTS, TILE, alphabet, written

_HALF = TILE // 2
_GLYPHS = alphabet(36)


def solve(row: dict, folder: Path) -> str:
    """The answer of a row of `plume-eval hops make`."""
    query = row["query"]
    family, form, _ = row["task"].removeprefix("hops/").split("-")
    pictures = [Image.open(folder / path).convert("RGB") for path in query.get("image", [])]
    text = query["text"]
    if family == "text":
        return _from_text(form, text)
    start = _glyph_in(pictures.pop()) if "this one" in text else next(n for n in _names() if n in text.split())
    if family == "video":
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(folder / query["video"]))]
        return _from_frames(form, frames, start, _number(text))
    follows = {"tiles": _tiles, "words": _words, "chart": _chart, "arrows": _arrows, "count": _arrows}[form](
        pictures[0]
    )
    if form == "count":
        most, colour = re.search(rf"more than (\d+) ({'|'.join(COLOURS)}) ones", text).groups()
        met, at = start.startswith(colour), start
        while met <= int(most):
            at = follows[at]
            met += at.startswith(colour)
        return follows[at]
    for _ in range(_number(text)):
        start = follows[start]
    return start


def read_easy(row: dict, folder: Path) -> set[tuple[str, str]]:
    """What leads to what in a row of few symbols."""
    if "image" in row["query"]:
        return set(_arrows(Image.open(folder / row["query"]["image"][0]).convert("RGB")).items())
    return {tuple(fact.split()) for fact in row["query"]["text"].removesuffix(". read").split(". ")}


def _names() -> list[str]:
    return [symbol.name for symbol in _GLYPHS]


def _number(text: str) -> int:
    return int(re.search(r"\b(\d+)\b", text).group())


def _difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).mean())


def _glyph_in(picture: Image.Image) -> str:
    """The symbol that looks most like a picture."""
    return min(_GLYPHS, key=lambda symbol: _difference(picture, symbol.draw(*picture.size))).name


def _is_empty(picture: Image.Image) -> bool:
    return len(picture.getcolors()) == 1


def _cells(picture: Image.Image, width: int, height: int) -> list[Image.Image]:
    return [
        picture.crop((left, top, left + width, top + height))
        for top in range(0, picture.height - height + 1, height)
        for left in range(0, picture.width - width + 1, width)
    ]


def _tiles(page: Image.Image) -> dict[str, str]:
    cells = [cell for cell in _cells(page, TILE, TILE) if not _is_empty(cell)]
    halves = [_cells(cell, _HALF, TILE) for cell in cells]
    return {_glyph_in(key): _glyph_in(value) for key, value in halves}


def _words(page: Image.Image) -> dict[str, str]:
    def read(cell: Image.Image) -> str:
        ways = [(symbol, font) for symbol in _GLYPHS for font in FONTS]
        looks = [written((s.colour, s.shape), *cell.size, font) for s, font in ways]
        return ways[int(np.argmin([_difference(cell, look) for look in looks]))][0].name

    rows = [_cells(row, 2 * TILE, TILE) for row in _cells(page, 4 * TILE, TILE) if not _is_empty(row)]
    return {read(key): read(value) for key, value in rows}


def _chart(page: Image.Image) -> dict[str, str]:
    units = _cells(page, _HALF, _HALF)
    side = page.width // _HALF
    grid = [units[row * side : (row + 1) * side] for row in range(side)]
    follows = {}
    for column in range(1, side):
        if _is_empty(grid[-1][column]):
            continue
        top = next(row for row in range(side) if len(grid[row][column].getcolors()) > 1)
        follows[_glyph_in(grid[-1][column])] = _glyph_in(grid[top][0])
    return follows


def _arrows(picture: Image.Image) -> dict[str, str]:
    side = picture.width // TILE
    symbols, steps = {}, {}
    for place, cell in enumerate(_cells(picture, TILE, TILE)):
        if _is_empty(cell):
            continue
        symbol, arrow = _cells(cell, _HALF, TILE)
        symbols[place] = _glyph_in(symbol)
        pixels = np.asarray(arrow, dtype=int)
        is_arrow = np.abs(pixels - pixels[0, 0]).sum(axis=2) > 0
        rows, columns = np.nonzero(is_arrow)
        # The head is heavier than the tail: it lies on that side of the middle of the arrow's extent.
        down = rows.mean() - (rows.min() + rows.max()) / 2
        right = columns.mean() - (columns.min() + columns.max()) / 2
        length = 1 if pixels[is_arrow].mean() > 128 else 2
        steps[place] = length * (side * int(np.sign(down)) if abs(down) > abs(right) else int(np.sign(right)))
    return {symbol: symbols[place + steps[place]] for place, symbol in symbols.items()}


def _from_frames(form: str, frames: list[Image.Image], start: str, moves: int) -> str:
    def beside(frame: Image.Image) -> list[tuple[str, np.ndarray]]:
        halves = [_cells(cell, _HALF, TILE) for cell in _cells(frame, TILE, TILE)]
        return [(_glyph_in(symbol), np.asarray(rest, dtype=int)) for symbol, rest in halves if not _is_empty(symbol)]

    at, count, has_passed = start, 0, form == "cups"
    for frame in frames:
        places = beside(frame)
        if form == "cups":
            raised = [name for name, rest in places if (rest.mean(axis=2) > 200).any()]
            assert len(raised) == 2
            to = next(name for name in raised if name != at) if at in raised else at
        else:
            (to,) = [name for name, rest in places if (rest.mean(axis=2) < 60).any()]
        has_passed = has_passed or to == start
        if has_passed and to != at:
            at, count = to, count + 1
        if count == moves:
            return at
    raise AssertionError("the clip ends too early")


def _from_text(form: str, text: str) -> str:
    facts = re.findall(r"(?:every )?([a-z]+) is a ([a-z]+)\.", text)
    asked = text.rpartition(". ")[2]
    start = next(word for word in asked.split() if word in {a for a, _ in facts})
    if form == "chain":
        follows = dict(facts)
        for _ in range(_number(asked)):
            start = follows[start]
        return start
    reached, queue = {start}, deque([start])
    while queue:
        node = queue.popleft()
        new = {b for a, b in facts if a == node} - reached
        reached |= new
        queue += new
    choices = re.search(r"\ba ([a-z]+) or ([a-z]+)", asked).groups()
    (answer,) = [word for word in choices if word in reached]
    return answer
