"""What the model is to write after the latent block, at a stage of the curriculum. No tensors here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from plume.config import PlumeConfig
from plume.inputs import prompt
from plume.tokens import LATENT, LATENT_START, READ_OUT
from plume_train.curriculum import Curriculum, Stage
from plume_train.data.segment import segments

_THINK = re.compile(r"<think>(.*?)</think>", re.IGNORECASE | re.DOTALL)
_THINK_TAG = re.compile(r"</?think>", re.IGNORECASE)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)


class UnclosedTag(ValueError):  # noqa: N818  # named for what it is
    """A `<think>` or an `<answer>` that is never closed."""


def parse_written(text: str, accept_unclosed: bool = False) -> tuple[str, str]:
    r"""Rationale and answer of an assistant's turn.

    Args:
        text: `<think>rationale</think><answer>answer</answer>`; either part may be absent.
        accept_unclosed: take all but the rationale for the answer where no `<answer>` is closed, as the published data
            need; it then holds their `<gen_emb>` too.

    Raises:
        UnclosedTag: an open `<think>`; an open `<answer>`, or an answer without any, unless that is accepted.

    Example:
        >>> parse_written("<think>It purrs.</think><answer>A cat.</answer>\n<gen_emb>")
        ('It purrs.', 'A cat.')
        >>> parse_written("<think>It purrs.</think>A cat.\n<gen_emb>", accept_unclosed=True)
        ('It purrs.', 'A cat.\n<gen_emb>')
    """
    think = _THINK.search(text)
    if think is None and _THINK_TAG.search(text):
        raise UnclosedTag("<think> is not closed by </think>; close it or drop the row")
    rationale = think.group(1).strip() if think else ""
    if answer := _ANSWER.search(text):
        return rationale, answer.group(1).strip()
    # Without a closed tag, all but the rationale is the answer, and may hold the read-out.
    rest = _ANSWER_TAG.sub("", _THINK.sub("", text)).strip()
    is_open = _ANSWER_TAG.search(text) is not None
    if not is_open and not rest.replace(READ_OUT, "").strip():
        return rationale, ""
    if not accept_unclosed:
        what = "<answer> is not closed by </answer>" if is_open else f"{rest!r:.60} stands outside <answer>...</answer>"
        raise UnclosedTag(
            f"{what}; close it, or set unclosed_answer=accept to keep all but the rationale as the answer, as the "
            "published data need"
        )
    return rationale, rest


@dataclass(frozen=True)
class Target:
    """What follows `<bot>`: `num_latent_steps` latent steps, then the supervised text `suffix`."""

    num_latent_steps: int
    suffix: str

    @property
    def layout(self) -> str:
        """The whole assistant turn as text, with a placeholder for each latent step; for people to read."""
        return LATENT_START + LATENT * self.num_latent_steps + self.suffix


def write_target(
    config: PlumeConfig,
    curriculum: Curriculum,
    stage: Stage,
    rationale: str,
    answer: str = "",
    num_latent_steps: int | None = None,
) -> Target:
    """The target of one side at a stage.

    Args:
        config: gives the templates.
        curriculum: gives the number of segments and of latent steps.
        stage: the stage.
        rationale: the whole written rationale; may be empty.
        answer: the written answer; may be empty.
        num_latent_steps: latent steps, where they are not the stage's.
    """
    parts = segments(rationale, curriculum.num_segments, whole_sentences=curriculum.whole_sentences)
    remaining = "".join(parts[curriculum.num_replaced_segments(stage) :])
    answer = "" if stage.drop_answer else answer
    steps = curriculum.num_latent_steps(stage) if num_latent_steps is None else num_latent_steps
    return Target(steps, prompt.suffix(config, remaining, answer, end_turn=True))
