"""What a model is asked for one side of a row, and what tells the question from others."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from plume.inputs.images import load_image
from plume.inputs.video import Sampling, load_video
from plume_train.data.rows import ImageSource, Record, Side, VideoSource, is_video_file

SideName = Literal["query", "target"]

#: Longest edge of a picture that is sent; a server throws most of a larger one away.
MAX_EDGE = 1024
NUM_FRAMES = 8

SYSTEM = (
    "You write down the reasoning that leads from an input to what a search should find for it. Reply with JSON alone: "
    '{"steps": [...], "answer": "..."}. "steps" holds 2 to 8 sentences of 5 to 40 words in the language of the input; '
    "each says one thing that can be seen or concluded, in order, so that the last leads to the answer. Do not give "
    'the answer before the last step. Do not speak of this task, of yourself, or of "the image". "answer" is what is '
    "to be found, in a few words."
)

#: What is asked, by the kind of input; a task may have words of its own.
PROMPTS = {
    "question": "Answer the question: say what must be looked at, what is there, and what follows from it.",
    "change": "Say what is shown, what the words ask to change, what stays, and what then should be found.",
    "picture": "Say what is shown, each thing with its surroundings, and what that makes it.",
    "words": "Say what is meant, what a text or picture must hold to fit it, and what would only seem to fit.",
    "target": "Say what this holds, what is special about it, and which question it answers.",
}

SCHEMA = {
    "type": "object",
    "properties": {"steps": {"type": "array", "items": {"type": "string"}}, "answer": {"type": "string"}},
    "required": ["steps", "answer"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """One side of a row.

    row: its number. name: which side. content: what it holds. goal: what a query must lead to. prompt: what is asked.
    """

    row: int
    name: SideName
    content: Side
    goal: Side | None
    prompt: str

    @classmethod
    def of(cls, row: int, record: Record, name: SideName, prompts: Mapping[str, str]) -> Question | None:
        """The question about a side of a row; None if the side is missing or has a rationale.

        Args:
            row: number of the record.
            record: the row.
            name: which side.
            prompts: words for tasks by their name, before those for kinds of input.
        """
        side = record.query if name == "query" else record.target
        if side is None or side.rationale:
            return None
        prompt = prompts.get(record.task) or PROMPTS["target" if name == "target" else _kind(side)]
        return cls(row, name, side, record.target if name == "query" else None, prompt)

    @cached_property
    def digest(self) -> bytes:
        """Of what is asked, and what it is checked by: texts whole, of media files a few pieces (`Side.sample`)."""
        goal = self.goal.sample() if self.goal else b""
        return blake2b(b"\0".join([self.content.sample(), goal, self.prompt.encode(), SYSTEM.encode()])).digest()

    def key(self, **settings: Any) -> str:
        """Tells an answer from answers to other questions, and from other models' answers."""
        told = json.dumps(settings, sort_keys=True).encode()
        return blake2b(self.digest + told, digest_size=16).hexdigest()

    def messages(self, not_taken: str = "") -> list[dict[str, Any]]:
        """As an OpenAI-compatible server takes them, with pictures as data URLs.

        Args:
            not_taken: why the last answer was not taken; "" where there was none.

        Raises:
            InputError: a file that cannot be decoded.
        """
        where = f"row {self.row + 1}"
        pictures = [_picture(source, where) for source in self.content.images]
        pictures += [url for video in self.content.videos for url in _frames(video, where)]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
        text = "\n\n".join(part for part in (self.prompt, self.content.instruction, self.content.text) if part)
        user = [*parts, {"type": "text", "text": text}] if parts else text
        asked: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        if not_taken:
            again = f"The last answer was not taken: {not_taken}. Write another."
            asked.append({"role": "user", "content": again})
        return asked


def num_tokens(messages: list[dict[str, Any]]) -> int:
    """About how many tokens a request has: four bytes of text each, or 28 x 28 pixels as Qwen-VL reads them."""
    total = 0
    for message in messages:
        parts = message["content"]
        several: list[dict[str, Any]] = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        for part in several:
            if part["type"] == "text":
                total += len(part["text"].encode()) // 4
            else:
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                width, height = Image.open(io.BytesIO(data)).size
                total += width * height // 28**2
    return total


def _kind(side: Side) -> str:
    if "?" in side.text or "？" in side.text:
        return "question"
    if side.images or side.videos:
        return "change" if side.text else "picture"
    return "words"


def _picture(source: ImageSource, where: str) -> str:
    return _read(source, where) if isinstance(source, Path) else _data_url(load_image(source, where))


@lru_cache(maxsize=32)
def _read(path: Path, where: str) -> str:
    return _data_url(load_image(path, where))


def _frames(video: VideoSource, where: str) -> list[str]:
    if len(video) == 1 and is_video_file(video[0], alone=True):
        frames: torch.Tensor = load_video(video[0], Sampling(num_frames=NUM_FRAMES, fps=None), where).frames
        return [_data_url(Image.fromarray(frame.permute(1, 2, 0).numpy())) for frame in frames]
    chosen = [video[index * len(video) // NUM_FRAMES] for index in range(NUM_FRAMES)]
    return [_read(frame, where) for frame in dict.fromkeys(chosen)]


def _data_url(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((MAX_EDGE, MAX_EDGE))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()
