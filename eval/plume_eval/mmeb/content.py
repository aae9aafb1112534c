"""What is embedded: an instruction, a text, an image or the frames of a video, none of it loaded yet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StoredImage:
    """An image in a row of a data set, which stays on disk until it is read.

    rows: of the data set. index: which one. name: how messages call it. source: tells the files of the rows apart.
    """

    rows: Any = field(repr=False, compare=False)
    index: int
    name: str
    source: str = ""

    def read_bytes(self) -> bytes:
        """The image file."""
        return self.rows[self.index]["image"]["bytes"]


@dataclass(frozen=True)
class Content:
    """A query or a candidate.

    instruction: what to do with it. text: its text. image: a file, or the row that holds it.
    frames: files, in order; or a video file. ending: what VLM2Vec-V2 reads behind it.
    """

    instruction: str = ""
    text: str = ""
    image: Path | StoredImage | None = None
    frames: tuple[Path, ...] = ()
    ending: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.instruction, str):
            raise TypeError(f"its text is {self.text!r:.40}; expected a string")

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
        """What is not there, if something is not. Frames were listed; a video file stands for a folder without."""
        if isinstance(self.image, Path) and not self.image.is_file():
            return str(self.image)
        if self.is_video_file and not self.frames[0].is_file():
            return f"neither frames in {self.frames[0].with_suffix('')} nor {self.frames[0].name}"
        return ""

    @property
    def name(self) -> str:
        """How messages call it: its files, or its text."""
        if self.image is not None:
            return str(self.image) if isinstance(self.image, Path) else self.image.name
        return str(self.frames[0].parent) if self.frames else repr(f"{self.words:.60}")


class Keys:
    """Digests of contents, which change with what would be embedded: of files their path, size and time of change."""

    def __init__(self, root: Path):
        """Begin.

        Args:
            root: of the data; paths are taken from there on, so that the data may move.
        """
        self._root = root
        self._facts: dict[Path, str] = {}

    def of(self, content: Content) -> str:
        """The key of a content.

        Raises:
            OSError: a file is gone.
        """
        said = [content.instruction, content.text, content.ending]
        if isinstance(content.image, StoredImage):
            said += [content.image.source, str(content.image.index)]
        files: Sequence[Path] = [content.image] if isinstance(content.image, Path) else content.frames
        said += map(self._file, files)
        return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()

    def _file(self, file: Path) -> str:
        if file not in self._facts:
            facts = file.stat()
            place = file.relative_to(self._root) if file.is_relative_to(self._root) else file
            self._facts[file] = f"{place} {facts.st_size} {facts.st_mtime_ns}"
        return self._facts[file]
