"""The alphabet of the hops pages: coloured glyphs with a name each."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("disc", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (226, 54, 54),
    "blue": (44, 92, 230),
    "yellow": (246, 214, 44),
    "green": (28, 168, 82),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}

#: The mean colour of Qwen2-VL's image normalisation: an empty background becomes zero.
BACKGROUND = (123, 117, 104)
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


def alphabet(size: int) -> list[Symbol]:
    """The first `size` symbols, such that n² symbols are n shapes in n colours.

    Raises:
        ValueError: more symbols than there are.

    Example:
        >>> [symbol.name for symbol in alphabet(4)]
        ['red-disc', 'red-square', 'blue-disc', 'blue-square']
    """
    limit = len(SHAPES) * len(COLOURS)
    if not 2 <= size <= limit:
        raise ValueError(f"num_symbols must lie in 2..{limit}; received {size}")
    grid = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    chosen = sorted(grid, key=lambda cell: (max(cell), cell))[:size]
    colours = list(COLOURS)
    return [Symbol(SHAPES[s], colours[c]) for c, s in sorted(chosen)]


def draw_symbol(symbol: Symbol, width: int = TILE, height: int = TILE) -> Image.Image:
    """A symbol in the middle of an empty RGB picture."""
    big_width, big_height = width * _OVERSAMPLING, height * _OVERSAMPLING
    image = Image.new("RGB", (big_width, big_height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    radius = 0.42 * min(big_width, big_height)
    x, y = big_width / 2, big_height / 2
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    fill = COLOURS[symbol.colour]
    if symbol.shape == "disc":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif symbol.shape == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif symbol.shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=fill)
    elif symbol.shape == "diamond":
        draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=fill)
    elif symbol.shape == "cross":
        arm = radius / 3
        draw.rectangle((x - arm, top, x + arm, bottom), fill=fill)
        draw.rectangle((left, y - arm, right, y + arm), fill=fill)
    else:
        draw.ellipse((left, top, right, bottom), outline=fill, width=int(radius * 0.45))
    return image.resize((width, height), Image.Resampling.BOX)
