"""What hops questions are about: coloured glyphs, and invented concepts; each has a name and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

SHAPES = ("disc", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (226, 54, 54),
    "blue": (44, 92, 230),
    "yellow": (246, 214, 44),
    "green": (28, 168, 82),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
_BEGINNINGS = ("w", "y", "z", "r", "t", "g", "l", "b", "d", "f", "j", "k", "n", "s", "v", "h")
_ENDINGS = ("umpus", "erpus", "impus", "orpus")

#: The mean colour of Qwen2-VL's image normalisation: an empty background becomes zero.
BACKGROUND = (123, 117, 104)
INK = (12, 12, 12)
#: One visual token of Qwen2-VL: 2 x 2 patches of 14 pixels.
TILE = 28
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Symbol:
    """A coloured glyph; its name is one word, for example "red-disc"."""

    shape: str
    colour: str

    @property
    def name(self) -> str:
        """The word for this symbol."""
        return f"{self.colour}-{self.shape}"

    def draw(self, width: int = TILE, height: int = TILE) -> Image.Image:
        """The glyph in the middle of an empty RGB picture; not to be changed."""
        return _glyph(self.shape, self.colour, width, height)


@dataclass(frozen=True)
class Concept:
    """Something invented, for example "wumpus"; its picture is the written word."""

    name: str

    def draw(self, width: int = 2 * TILE, height: int = TILE) -> Image.Image:
        """The word in the middle of an empty RGB picture; not to be changed."""
        return written((self.name,), width, height)


def alphabet(size: int) -> list[Symbol]:
    """The first `size` glyphs, such that n² of them are n shapes in n colours.

    Raises:
        ValueError: more than there are.

    Example:
        >>> [symbol.name for symbol in alphabet(4)]
        ['red-disc', 'red-square', 'blue-disc', 'blue-square']
    """
    _check_size(size, len(SHAPES) * len(COLOURS))
    grid = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    chosen = sorted(grid, key=lambda cell: (max(cell), cell))[:size]
    colours = list(COLOURS)
    return [Symbol(SHAPES[s], colours[c]) for c, s in sorted(chosen)]


def concepts(size: int) -> list[Concept]:
    """The first `size` invented concepts.

    Raises:
        ValueError: more than there are.

    Example:
        >>> [concept.name for concept in concepts(3)]
        ['wumpus', 'yumpus', 'zumpus']
    """
    _check_size(size, len(_BEGINNINGS) * len(_ENDINGS))
    return [Concept(beginning + ending) for ending in _ENDINGS for beginning in _BEGINNINGS][:size]


def _check_size(size: int, limit: int) -> None:
    if not 2 <= size <= limit:
        raise ValueError(f"num_symbols must lie in 2..{limit}; received {size}")


#: Ways to write: size in pixels and width of the stroke around a letter.
FONTS = ((10.0, 0.0), (11.0, 0.0), (9.0, 0.4))


@lru_cache(maxsize=4096)
def written(lines: tuple[str, ...], width: int, height: int, font: tuple[float, float] = FONTS[0]) -> Image.Image:
    """Lines of text in the middle of an empty RGB picture; not to be changed.

    Args:
        lines: from top to bottom.
        width: of the picture, pixels.
        height: likewise.
        font: one of `FONTS`.
    """
    image = Image.new("RGB", (width, height), BACKGROUND)
    size, stroke = font
    face = ImageFont.load_default(size)
    ImageDraw.Draw(image).multiline_text(
        (width / 2, height / 2), "\n".join(lines), INK, face, "mm", 1, "center", stroke_width=stroke
    )
    return image


@lru_cache(maxsize=4096)
def _glyph(shape: str, colour: str, width: int, height: int) -> Image.Image:
    big_width, big_height = width * _OVERSAMPLING, height * _OVERSAMPLING
    image = Image.new("RGB", (big_width, big_height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    radius = 0.42 * min(big_width, big_height)
    x, y = big_width / 2, big_height / 2
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    fill = COLOURS[colour]
    if shape == "disc":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=fill)
    elif shape == "cross":
        arm = radius / 3
        draw.rectangle((x - arm, top, x + arm, bottom), fill=fill)
        draw.rectangle((left, y - arm, right, y + arm), fill=fill)
    else:
        draw.ellipse((left, top, right, bottom), outline=fill, width=int(radius * 0.45))
    return image.resize((width, height), Image.Resampling.BOX)
