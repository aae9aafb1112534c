"""What is embedded: an instruction, a text, an image or the frames of a video, none of it loaded yet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StoredImage:
    """An image in a row of a data set, which stays on disk until it is read."""

    rows: Any = field(repr=False, compare=False)
    index: int
    name: str

    def read_bytes(self) -> bytes:
        """The image file."""
        return self.rows[self.index]["image"]["bytes"]


@dataclass(frozen=True)
class Content:
    """A query or a candidate.

    instruction: what to do with it. text: its text. image: a file, or the row that holds it.
    frames: files, in order; or a video file.
    """

    instruction: str = ""
    text: str = ""
    image: Path | StoredImage | None = None
    frames: tuple[Path, ...] = ()

    @property
    def words(self) -> str:
        """Instruction and text, as models without a place of their own for instructions read them.

        Example:
            >>> Content("Find the image:", " a red kite ").words
            'Find the image: a red kite'
        """
        return f"{self.instruction} {self.text.strip()}".strip()

    @property
    def input(self) -> dict[str, Any]:
        """As `Plume.encode` takes it."""
        media: dict[str, Any] = {}
        if self.image is not None:
            media["image"] = self.image if isinstance(self.image, Path) else self.image.read_bytes()
        if self.frames:
            media["video"] = self.frames[0] if self.is_video_file else list(self.frames)
        return {**media, "text": self.words} if self.words else media

    @property
    def is_video_file(self) -> bool:
        """Whether the frames are those of a file that is decoded."""
        return len(self.frames) == 1 and self.frames[0].suffix == ".mp4"

    @property
    def missing(self) -> str:
        """The file that is not there, if one is not."""
        files = [self.image] if isinstance(self.image, Path) else []
        return next((str(file) for file in (*files, *self.frames) if not file.is_file()), "")

    @property
    def name(self) -> str:
        """How messages call it: its files, or its text."""
        if self.image is not None:
            return str(self.image) if isinstance(self.image, Path) else self.image.name
        return str(self.frames[0].parent) if self.frames else repr(f"{self.words:.60}")

    def key(self) -> str:
        """A digest that changes with what would be embedded: files by path, size and time of change, rows by bytes."""
        digest = hashlib.blake2b(repr((self.instruction, self.text)).encode(), digest_size=16)
        if isinstance(self.image, StoredImage):
            digest.update(self.image.read_bytes())
        files: Sequence[Path] = [self.image] if isinstance(self.image, Path) else self.frames
        for file in files:
            facts = file.stat()
            digest.update(repr((str(file), facts.st_size, facts.st_mtime_ns)).encode())
        return digest.hexdigest()
