"""The family "video": follow something from frame to frame.

All frames show the same places, a symbol each. Two forms:

    cups    a ball lies under one cup; each frame swaps two of them, which are raised; distractors are swaps that take
            another ball along in the same way, so that only the start tells whose path is asked for
    walk    a figure goes from landmark to landmark and never comes back; distractors are frames in which it stays. The
            path that is asked for begins anywhere on its way. Counting the frames in which it moves answers too, so
            that it needs fewer layers than hops
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from plume_eval.hops.puzzle import Difficulty, Family, Puzzle, Shown, need_symbols
from plume_eval.hops.symbols import BACKGROUND, INK, TILE, Symbol, alphabet

QUESTIONS = {
    "cups": (
        "the ball starts at {start} and moves %d times",
        "where is the ball that starts at {start} after it moved %d times",
    ),
    "walk": (
        "the figure passes {start} and walks on %d times",
        "where is the figure that passes {start} after it walked on %d times",
    ),
}
#: Moves of the figure before the path that is asked for, at most.
_MOST_BEFORE = 2
_CUP, _RAISED, _FIGURE = (90, 84, 72), (236, 230, 216), (12, 12, 12)


def check(difficulty: Difficulty) -> None:
    """Refuse too few places to walk past."""
    need_symbols(Difficulty(**{**vars(difficulty), "num_distractors": 0}), difficulty.max_hops + 3 + _MOST_BEFORE)


def make(form: str, symbols: Sequence[Shown], difficulty: Difficulty, rng: Random) -> Puzzle:
    """A clip of as many frames whatever the number of hops."""
    path_length = difficulty.num_hops + 2
    first = rng.randint(0, _MOST_BEFORE) if form == "walk" else 0
    moves = difficulty.max_hops + 2 + _MOST_BEFORE * (form == "walk")  # the last frame is never that of the answer
    is_move = [True] * moves + [False] * difficulty.num_distractors
    rng.shuffle(is_move)
    places: list[Symbol] = rng.sample(list(symbols), len(symbols))  # type: ignore[arg-type]
    frames, way, whens = (_shuffle if form == "cups" else _walk)(places, is_move, rng)
    told = [" ".join(symbol.name for symbol in frame) + "." for frame in frames]
    path = [symbol.name for symbol in way[first : first + path_length]]
    draw = _draw_cups if form == "cups" else _draw_walk
    return Puzzle(
        form=form,
        key=(form, tuple(symbol.name for symbol in places), tuple(told)),
        draw=lambda: [draw(places, frame, number) for number, frame in enumerate(frames)],
        facts="",
        question=rng.choice(QUESTIONS[form]) % difficulty.num_hops,
        path=tuple(path[:-1]),
        beyond=path[-1],
        places=tuple(symbol.name for frame in frames for symbol in frame),
        reading=tuple(told),
        whens=tuple(f" in frame {when}" for when in whens[first : first + difficulty.num_hops]),
    )


Moves = tuple[list[tuple[Symbol, ...]], list[Symbol], list[int]]
"""What each frame shows, the places that were passed, and the frames in which the next one was reached."""


def _shuffle(places: list, is_move: Sequence[bool], rng: Random) -> Moves:
    """Swaps of two cups, of which one holds the ball, or another one; neither goes back to where it came from."""
    start, decoy = rng.sample(places, 2)
    ways, frames, whens = [[start], [decoy]], [], []
    for number, moves in enumerate(is_move, start=1):
        way, other = ways if moves else ways[::-1]
        to = rng.choice([place for place in places if place not in (*way[-2:], other[-1])])
        frames.append(tuple(rng.sample([way[-1], to], 2)))
        way.append(to)
        if moves:
            whens.append(number)
    return frames, ways[0], whens


def _walk(places: list, is_move: Sequence[bool], rng: Random) -> Moves:
    """A figure at one landmark per frame, from the first on."""
    way, frames, whens = [rng.choice(places)], [], []
    frames.append((way[-1],))
    for number, moves in enumerate(is_move, start=2):
        if moves:
            way.append(rng.choice([place for place in places if place not in way]))
            whens.append(number)
        frames.append((way[-1],))
    return frames, way, whens


def _columns(places: Sequence[Symbol]) -> int:
    return math.ceil(math.sqrt(len(places)))


def _draw_places(places: Sequence[Symbol]) -> Image.Image:
    columns = _columns(places)
    picture = Image.new("RGB", (columns * TILE, math.ceil(len(places) / columns) * TILE), BACKGROUND)
    for place, symbol in enumerate(places):
        corner = place % columns * TILE, place // columns * TILE
        picture.paste(symbol.draw(TILE // 2, TILE), corner)
    return picture


def _draw_cups(places: Sequence[Symbol], swapped: Sequence[Symbol], number: int) -> Image.Image:
    """A cup beside each symbol; those that are swapped are raised."""
    picture, columns = _draw_places(places), _columns(places)
    draw = ImageDraw.Draw(picture)
    for place, symbol in enumerate(places):
        left, top = place % columns * TILE + TILE // 2, place // columns * TILE
        is_raised = symbol in swapped
        base = top + (18 if is_raised else 25)
        cup = [(left + 1, base), (left + 12, base), (left + 10, base - 14), (left + 3, base - 14)]
        draw.polygon(cup, fill=_RAISED if is_raised else _CUP)
        if is_raised:
            draw.line((left + 1, top + 25, left + 12, top + 25), fill=_RAISED, width=2)
    return picture


def _draw_walk(places: Sequence[Symbol], at: Sequence[Symbol], number: int) -> Image.Image:
    """A figure beside the symbol that it passes; its legs tell one frame from the next, even if it stays."""
    picture, columns = _draw_places(places), _columns(places)
    place = places.index(at[0])
    left, top = place % columns * TILE + TILE // 2, place // columns * TILE
    draw = ImageDraw.Draw(picture)
    draw.ellipse((left + 4, top + 4, left + 10, top + 10), fill=_FIGURE)
    draw.line((left + 7, top + 10, left + 7, top + 18), fill=INK, width=2)
    for side in (-4, 4):
        x = left + 7 + side
        draw.line((left + 7, top + 18, x if number % 2 else left + 7 + side // 2, top + 25), fill=INK, width=2)
        draw.line((left + 7, top + 12, x, top + 16), fill=INK, width=1)
    return picture


VIDEO = Family(
    name="video",
    forms=("cups", "walk"),
    medium="video",
    symbols=alphabet,
    make=make,
    check=check,
    num_symbols=12,
    num_distractors=4,
    words=(
        *("the", "ball", "starts", "at", "and", "moves", "times", "where", "is", "that", "after", "it", "moved"),
        *("figure", "passes", "walks", "on", "walked", "in", "frame"),
    ),
)
