"""What every family of hops tasks makes: a puzzle, that is something shown, a question, and the path to its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

from PIL import Image

Medium = Literal["image", "video"]
#: Where a question names its start; a composed query shows it as a picture instead.
START = "{start}"


class Shown(Protocol):
    """A symbol: it has a name and a picture."""

    @property
    def name(self) -> str:
        """One word."""
        ...

    def draw(self) -> Image.Image:
        """Its picture."""
        ...


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard puzzles are.

    num_symbols: symbols to choose from. num_hops: of this puzzle. max_hops: of the data set; every path could be
    followed one hop further than that. num_distractors: symbols, frames or facts that no path touches.
    """

    num_symbols: int
    num_hops: int
    max_hops: int
    num_distractors: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Something shown.

    draw: the picture, or the frames of a video; empty where everything is said in `facts`.
    facts: what precedes the question. reading: everything that is shown, a sentence each, to learn to read.
    """

    draw: Callable[[], list[Image.Image]]
    facts: str
    reading: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Puzzle(Scene):
    """A scene, and a question whose answer is found by following it hop by hop.

    form: which of the family's forms. key: equal where the same is shown, however it is drawn.
    question: holds `{start}` once.
    path: names of the symbols met, the start first and the answer last. beyond: the one behind the answer, or the
    wrong one of two that the question names.
    places: names in the order in which they are shown, for shallow rules.
    whens: what ends the sentence of each hop.
    """

    form: str
    key: Hashable
    question: str
    path: tuple[str, ...]
    beyond: str
    places: tuple[str, ...]
    whens: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The symbol reached."""
        return self.path[-1]

    @property
    def sentences(self) -> list[str]:
        """The reasoning, one sentence per hop: the symbol reached."""
        whens = self.whens or ("",) * (len(self.path) - 1)
        return [f"{symbol}{when}." for symbol, when in zip(self.path[1:], whens, strict=True)]

    @property
    def hard_negatives(self) -> list[str]:
        """Symbols on the path, the answers of fewer hops and of one more; never the answer."""
        return [name for name in dict.fromkeys((*reversed(self.path), self.beyond)) if name != self.answer]

    @property
    def guesses(self) -> dict[str, str]:
        """What rules answer that do not follow the path."""
        counts = Counter(self.places)
        return {
            "start": self.path[0],
            "one hop": self.path[1],
            "first shown": self.places[0],
            "last shown": self.places[-1],
            "most often shown": max(self.places, key=lambda name: counts[name]),
        }


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of puzzle.

    forms: ways to show it. symbols: so many of them. make: a puzzle of a form.
    easy: a scene of a few of the symbols, to begin reading with, where whole ones teach nothing at first.
    medium: what `Scene.draw` gives. num_symbols, num_distractors: where nothing else is asked for.
    words: what questions, facts and sentences are written with, beside the symbols' names.
    """

    name: str
    forms: tuple[str, ...]
    medium: Medium | None
    symbols: Callable[[int], Sequence[Shown]]
    make: Callable[[str, Sequence[Shown], Difficulty, Random], Puzzle]
    check: Callable[[Difficulty], None]
    num_symbols: int
    num_distractors: int
    words: tuple[str, ...]
    easy: Callable[[Sequence[Shown], Random], Scene] | None = None


def need_symbols(difficulty: Difficulty, least: int) -> None:
    """Refuse a path that has too few symbols to lead through.

    Raises:
        ValueError: names what is needed.
    """
    if difficulty.num_symbols < least:
        raise ValueError(
            f"{difficulty.max_hops} hops and {difficulty.num_distractors} distractors need at least {least} symbols; "
            f"received num_symbols={difficulty.num_symbols}; raise it, or ask for fewer hops"
        )
