"""The text around the latent block, in one place for training and inference.

`prefix` writes what stands before it, `suffix` what follows. A chat template that writes the same prefix is made here
too and saved with the processor, for those who render checkpoints without plume.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from plume.config import PlumeConfig
from plume.tokens import IMAGE, READ_OUT, VIDEO, VISION_END, VISION_START
from plume.video import Video

if TYPE_CHECKING:
    from plume.inputs import Item

# Media and text keep the order of the message. An instruction arrives as a system message (that is how
# sentence-transformers passes prompts); the published models expect it in the user turn, before the text.
_CHAT_TEMPLATE = """\
{%- macro written(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}{%- for part in content if part.type == "text" -%}{{ part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(instruction="", content="") -%}
{%- for message in messages -%}
    {%- if message.role == "system" -%}
        {%- set ns.instruction = (ns.instruction ~ " " ~ written(message.content)) | trim -%}
    {%- elif message.role == "user" -%}
        {%- set parts = [{"type": "text", "text": message.content}]
            if message.content is string else message.content -%}
        {%- for part in parts -%}
            {%- if part.type == "image" -%}{%- set ns.content = ns.content ~ @IMAGE@ -%}
            {%- elif part.type == "video" -%}{%- set ns.content = ns.content ~ @VIDEO@ -%}
            {%- else -%}
                {%- set space = " " if ns.instruction and part.text else "" -%}
                {%- set ns.content = ns.content ~ ns.instruction ~ space ~ part.text -%}
                {%- set ns.instruction = "" -%}
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


def prefix(prompt_template: str, item: Item) -> str:
    r"""The text up to `<bot>`, with one placeholder per image and video.

    Args:
        prompt_template: of the configuration.
        item: the input; its instruction stands before its first text, or last without any.

    Example:
        >>> from plume import Item
        >>> prefix("{content}<disc_emb><bot>", Item(("red kite",), instruction="Find:"))
        'Find: red kite<disc_emb><bot>'
    """
    instruction = item.instruction.strip()
    pieces = []
    for part in item.content:
        if not isinstance(part, str):
            medium = VIDEO if isinstance(part, Video) else IMAGE
            pieces.append(VISION_START + medium + VISION_END)
        elif part:
            pieces.append(f"{instruction} {part}" if instruction else part)
            instruction = ""
    before, after = prompt_template.split("{content}")
    return "".join([before, *pieces, instruction, after])


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
