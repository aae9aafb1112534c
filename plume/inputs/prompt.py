"""The text around the latent block, in one place for training and inference.

`prefix` writes what stands before it, `suffix` what follows. A chat template that writes the same prefix is made here
too and saved with the processor, for those who render checkpoints without plume.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from plume.config import PlumeConfig
from plume.inputs.item import Item
from plume.inputs.video import Video
from plume.tokens import IMAGE, READ_OUT, VIDEO, VISION_END, VISION_START

# Media and text keep the order of the message. An instruction arrives as a system message (that is how
# sentence-transformers passes prompts); the published models expect it in the user turn, before the text. Outer white
# space of a text is dropped, as in training.
_CHAT_TEMPLATE = """\
{%- macro written(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}{%- for part in content if part.type == "text" -%}{{ part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(instruction="", content="", texts=0, seen=0) -%}
{%- for message in messages if message.role == "user" -%}
    {%- if message.content is string -%}{%- set ns.texts = ns.texts + (1 if message.content else 0) -%}
    {%- else -%}{%- for part in message.content if part.type == "text" and part.text -%}
        {%- set ns.texts = ns.texts + 1 -%}
    {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == "system" -%}
        {%- set ns.instruction = (ns.instruction ~ " " ~ written(message.content)) | trim -%}
    {%- elif message.role == "user" -%}
        {%- set parts = [{"type": "text", "text": message.content}]
            if message.content is string else message.content -%}
        {%- for part in parts -%}
            {%- if part.type == "image" -%}{%- set ns.content = ns.content ~ @IMAGE@ -%}
            {%- elif part.type == "video" -%}{%- set ns.content = ns.content ~ @VIDEO@ -%}
            {%- elif part.text -%}
                {%- set ns.seen = ns.seen + 1 -%}
                {%- set text = part.text.lstrip() if ns.seen == 1 else part.text -%}
                {%- set text = text.rstrip() if ns.seen == ns.texts else text -%}
                {%- if text -%}
                    {%- set space = " " if ns.instruction else "" -%}
                    {%- set ns.content = ns.content ~ ns.instruction ~ space ~ text -%}
                    {%- set ns.instruction = "" -%}
                {%- endif -%}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("plume embeds system and user messages; received role " ~ message.role) }}
    {%- endif -%}
{%- endfor -%}
{{- @BEFORE@ ~ ns.content ~ ns.instruction ~ @AFTER@ -}}
"""


def chat_template(config: PlumeConfig) -> str:
    """The Jinja template that writes the prefix of one input.

    Args:
        config: gives `prompt_template`.
    """
    before, after = config.prompt_template.split("{content}")
    strings = {
        "@IMAGE@": VISION_START + IMAGE + VISION_END,
        "@VIDEO@": VISION_START + VIDEO + VISION_END,
        "@BEFORE@": before,
        "@AFTER@": after,
    }
    template = _CHAT_TEMPLATE
    for placeholder, string in strings.items():
        template = template.replace(placeholder, json.dumps(string, ensure_ascii=False))
    return template


class Piece(NamedTuple):
    """A piece of a prefix. is_users: whether it is a user's text, in which nothing is read as a special token."""

    text: str
    is_users: bool


def prefix_pieces(prompt_template: str, item: Item) -> list[Piece]:
    """The prefix up to `<bot>` in pieces, with one placeholder per image and video.

    Args:
        prompt_template: of the configuration.
        item: the input. Its instruction stands before its first text, or last without any; white space around its
            texts is dropped.
    """
    instruction = item.instruction.strip()
    texts = [index for index, part in enumerate(item.content) if isinstance(part, str) and part]
    before, after = prompt_template.split("{content}")
    pieces = [Piece(before, False)]
    for index, part in enumerate(item.content):
        if not isinstance(part, str):
            medium = VIDEO if isinstance(part, Video) else IMAGE
            pieces.append(Piece(VISION_START + medium + VISION_END, False))
            continue
        text = part.lstrip() if texts and index == texts[0] else part
        text = text.rstrip() if texts and index == texts[-1] else text
        if text:
            pieces.append(Piece(f"{instruction} {text}" if instruction else text, True))
            instruction = ""
    return [*pieces, Piece(instruction, True), Piece(after, False)]


def prefix(prompt_template: str, item: Item) -> str:
    r"""The text up to `<bot>`; see `prefix_pieces`.

    Example:
        >>> from plume import Item
        >>> prefix("{content}<disc_emb><bot>", Item(("red kite ",), instruction="Find:"))
        'Find: red kite<disc_emb><bot>'
    """
    return "".join(piece.text for piece in prefix_pieces(prompt_template, item))


def suffix(config: PlumeConfig, rationale: str = "", answer: str = "", end_turn: bool = False) -> str:
    r"""The text from `<eot>` on.

    Args:
        config: gives the templates.
        rationale: what is still written of the rationale.
        answer: written by `answer_template` if not empty. Published data leave the answer open and keep
            `<gen_emb>` inside it; then no second read-out is appended.
        end_turn: whether the assistant's turn is closed, as in training.

    Example:
        >>> suffix(PlumeConfig(), rationale="It purrs.", answer="A cat.")
        '<eot>It purrs.</think><answer>A cat.</answer>\n<gen_emb>'
        >>> suffix(PlumeConfig())
        '<eot></think>\n<gen_emb>'
    """
    answer = config.answer_template.format(answer=answer) if answer else ""
    text = config.suffix_template.format(rationale=rationale, answer=answer)
    if READ_OUT not in text:
        text += config.read_out
    return text + config.turn_end if end_turn else text
