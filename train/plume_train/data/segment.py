"""Cuts a written rationale into segments that the curriculum replaces by latent steps.

The segments, joined, are the rationale again to the last character. The published rule cuts numbers apart ("3." from
"5") and drops white space between sentences; this one does neither.
"""

from __future__ import annotations

import itertools
import re

# A sentence ends after a run of CJK terminators, after ASCII terminators (with closing quotes or brackets) before
# white space or the end, or at a line break. White space belongs to the sentence that it follows.
_SENTENCE_END = re.compile(r"(?:[。！？]+|[.!?]+[\"'”’)\]]*(?=\s|$)|\n)\s*")
# "1. " at the start of a line numbers the text behind it and is no sentence of its own.
_LIST_NUMBER = re.compile(r"^\s*\(?\d+[.)]\s*$")


def sentences(text: str) -> list[str]:
    """The sentences of a text, white space kept.

    Example:
        >>> sentences("It rose 3.5 points. It fell.")
        ['It rose 3.5 points. ', 'It fell.']
    """
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        if not text[start:end].strip() or _LIST_NUMBER.match(text[start:end]):
            continue
        found.append(text[start:end])
        start = end
    if start < len(text):
        if text[start:].strip() or not found:
            found.append(text[start:])
        else:
            found[-1] += text[start:]
    return found


def segments(rationale: str, num_segments: int, *, whole_sentences: bool = False) -> list[str]:
    """Exactly `num_segments` consecutive parts of a rationale, whole sentences where there are enough.

    With more sentences than segments, the first ones get one more. With fewer, the text is cut at white space into
    parts of balanced length, and at characters where there is no white space.

    Args:
        rationale: may be empty, which gives empty segments.
        num_segments: S, at least 1.
        whole_sentences: with fewer sentences than segments, leave the last segments empty instead (Coconut).

    Example:
        >>> segments("A. B. C. D. E.", 4)
        ['A. B. ', 'C. ', 'D. ', 'E.']
    """
    parts = sentences(rationale)
    if len(parts) < num_segments and whole_sentences:
        return parts + [""] * (num_segments - len(parts))
    if len(parts) < num_segments:
        parts = [piece for piece in re.split(r"(?<=\s)(?=\S)", rationale) if piece]
        if len(parts) < num_segments:
            parts = list(rationale)
        return _balanced(parts, num_segments)
    whole, extra = divmod(len(parts), num_segments)
    cuts = [0]
    for index in range(num_segments):
        cuts.append(cuts[-1] + whole + (index < extra))
    return ["".join(parts[a:b]) for a, b in itertools.pairwise(cuts)]


def _balanced(parts: list[str], num_segments: int) -> list[str]:
    """Join small parts so that the segments end as near as can be to equal lengths.

    Each segment gets at least one part while there are enough.
    """
    total = sum(map(len, parts))
    cuts, length = [0], 0
    for index in range(1, num_segments):
        cut = cuts[-1]
        most = max(len(parts) - (num_segments - index), cut)  # leave one part for each later segment
        while cut < most and (cut == cuts[-1] or length + len(parts[cut]) / 2 <= total * index / num_segments):
            length += len(parts[cut])
            cut += 1
        cuts.append(cut)
    cuts.append(len(parts))
    return ["".join(parts[a:b]) for a, b in itertools.pairwise(cuts)]
