"""What a model has written: read leniently, and why it is not taken where it is not."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from plume.tokens import RESERVED
from plume_train.data.rows import Side

NUM_STEPS = range(2, 9)
NUM_WORDS = range(5, 41)
#: Share of four-word runs that may come again.
MOST_REPEATED = 0.2
#: Share of the target's own words that give it away.
MOST_TOLD = 0.6
#: Words of a target up to which the answer must be the target.
SHORT = 6

_REFUSALS = ("i cannot", "i can't", "i'm sorry", "i am sorry", "as an ai", "i'm unable", "i am unable", "i won't")
_META = ("the image", "the picture", "the user", "the prompt", "the input", "this task", "the question asks", "json")
_SMALL = set("and are as at be by for from in is it its of on or that this to was with".split())  # noqa: SIM905
_SCRIPTS = (
    "LATIN",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
    "CYRILLIC",
    "ARABIC",
    "HEBREW",
    "GREEK",
    "DEVANAGARI",
    "THAI",
)
#: Scripts that put no spaces between words.
_UNSPACED = ("CJK", "THAI")


class RejectedError(ValueError):
    """An answer that is not taken; the message is the reason, as the report counts it.

    tokens: in and out, where the answer was not handed on and so cannot be counted elsewhere.
    """

    def __init__(self, reason: str, tokens: tuple[int, int] = (0, 0)):
        super().__init__(reason)
        self.tokens = tokens


@dataclass(frozen=True)
class Answer:
    """steps: sentences in order. text: what they lead to."""

    steps: tuple[str, ...]
    text: str

    @property
    def rationale(self) -> str:
        """The steps as a row holds them: one sentence each."""
        return " ".join(step if step.endswith((".", "!", "?", "。", "！", "？")) else f"{step}." for step in self.steps)


def read_answer(written: str) -> Answer:
    """Find the JSON object in what was written, whatever stands around it.

    Raises:
        RejectedError: there is none, or it has no steps.

    Example:
        >>> read_answer('Sure! {"steps": ["It is red.", "It flies."], "answer": "kite"} Anything else?').text
        'kite'
    """
    start, end = written.find("{"), written.rfind("}")
    try:
        found = json.loads(written[start : end + 1])
        steps = [" ".join(str(step).split()) for step in found["steps"]]
        answer = " ".join(str(found.get("answer") or "").split())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RejectedError(_refusal(written) or "no JSON with steps") from None
    return Answer(tuple(step for step in steps if step), answer)


def check_answer(answer: Answer, asked: Side, goal: Side | None) -> None:
    """Refuse what would teach something wrong.

    Args:
        answer: what was written about `asked`.
        asked: the side that it is about.
        goal: the other side, which it must lead to without giving it away; None: nothing.

    Raises:
        RejectedError: the reason.
    """
    whole = " ".join((*answer.steps, answer.text))
    if refusal := _refusal(whole):
        raise RejectedError(refusal)
    if any(token in whole for token in RESERVED):
        raise RejectedError("mentions a token of the model")
    if any(_holds(whole, words) and not _holds(asked.text, words) for words in _META):
        raise RejectedError("speaks of the task instead of the content")
    if len(answer.steps) not in NUM_STEPS:
        raise RejectedError("too few or too many steps")
    expected, script = _script(asked.text), _script(whole)
    if expected and script != expected:
        raise RejectedError("another script than the input's")
    if script not in _UNSPACED and any(len(step.split()) not in NUM_WORDS for step in answer.steps):
        raise RejectedError("a step is too short or too long")
    words = _words(" ".join(answer.steps))
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if sum(count - 1 for count in runs.values()) > MOST_REPEATED * max(1, runs.total()):
        raise RejectedError("repeats itself")
    if goal is not None and goal.text:
        _check_goal(answer, asked, goal)


def _check_goal(answer: Answer, asked: Side, goal: Side) -> None:
    target = _words(goal.text)
    plain = f" {' '.join(target)} "
    own = {word for word in target if word not in _SMALL} - set(_words(asked.text))
    for step in answer.steps[:-1]:
        words = _words(step)
        gives_all = target and own and plain in f" {' '.join(words)} "
        if gives_all or (len(own) >= 3 and len(own & set(words)) > MOST_TOLD * len(own)):
            raise RejectedError("gives the target away before the last step")
    if is_short(goal):
        written = f" {' '.join(_words(answer.text))} "
        if not written.strip() or (plain not in written and written not in plain):
            raise RejectedError("the answer is not the target")


def is_short(goal: Side) -> bool:
    """Whether a target is so few words, and nothing else, that an answer must say them."""
    return 0 < len(_words(goal.text)) <= SHORT and not (goal.images or goal.videos)


def _refusal(written: str) -> str:
    start = written.lstrip()[:200].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return "a refusal" if any(_holds(start, words) for words in _REFUSALS) else ""


def _holds(text: str, words: str) -> bool:
    """Whether a text holds some words, as words.

    Example:
        >>> _holds("As an AI, I do not see it.", "as an ai"), _holds("It serves as an airport.", "as an ai")
        (True, False)
    """
    return re.search(rf"\b{re.escape(words)}\b", text, re.IGNORECASE) is not None


def _words(text: str) -> list[str]:
    return [
        word for word in re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()) if word not in _ARTICLES
    ]


_ARTICLES = ("a", "an", "the")


def _script(text: str) -> str:
    """The script that most letters are of; empty where there are too few to tell."""
    letters = [unicodedata.name(c, "") for c in text if c.isalpha()]
    counts = Counter(next((script for script in _SCRIPTS if name.startswith(script)), "") for name in letters)
    counts["CJK"] += counts.pop("HIRAGANA", 0) + counts.pop("KATAKANA", 0)
    script, count = counts.most_common(1)[0] if letters else ("", 0)
    return script if count >= 10 else ""
