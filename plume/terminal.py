"""Lines for a terminal, which names of files and texts may not steer."""

from __future__ import annotations

import unicodedata

# Controls, format controls, halves of characters, separators of lines and paragraphs, and what stands for nothing.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def is_printable(character: str) -> bool:
    """Whether a character is shown and does nothing else; spaces of all widths are.

    Example:
        >>> is_printable("\N{NARROW NO-BREAK SPACE}"), is_printable("\N{ESCAPE}"), is_printable("\N{LINE SEPARATOR}")
        (True, False, False)
    """
    return unicodedata.category(character) not in _UNPRINTABLE


def printable(text: str, keep: str = "") -> str:
    """The text with a replacement character for each that is not printable.

    Args:
        text: any.
        keep: characters that stay as they are, such as the end of a line.
    """
    return "".join(c if c in keep or is_printable(c) else "\N{REPLACEMENT CHARACTER}" for c in text)
