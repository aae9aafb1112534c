"""One training row: three ways to write it, one `Record`.

    plume    {"query": SIDE, "target": SIDE, "negatives": [SIDE, ...], "task": "..."}
             a SIDE is a text, or an object with any of text, image, video, instruction, rationale, answer
    columns  {"query_text": ..., "query_image": ..., "target_text": ..., "negative_text": ..., "task": ...}
             as Hugging Face data sets hold them
    UME-sft  {"qry": {"conversations": [...], "image": [...]}, "pos": {...}, "dataset_name": "..."}
             as published, with all its aliases

Everything is checked here: what is wrong with a row is said with its file and line, and what to do about it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from plume.inputs.errors import InputError
from plume.inputs.file_kinds import ANIMATION_SUFFIXES, VIDEO_SUFFIXES
from plume.inputs.images import BYTES, check_image_file, open_image
from plume.inputs.item import check_unicode
from plume.tokens import ANCHOR, READ_OUT, RESERVED
from plume_train.data.target import UnclosedTag, parse_written

UnclosedAnswerPolicy = Literal["error", "accept"]

_TASK_NAMES = ("task", "dataset_name", "dataset", "subset", "source", "task_name")
_ROOT_NAMES = ("data_path", "media_root", "root")
_COLUMN = re.compile(r"(query|target|negative)_(text|image|video|instruction|rationale|answer)")
_FIELDS = ("text", "image", "images", "video", "videos", "instruction", "rationale", "answer")
_SAMPLED_BYTES = 256
_DIGEST = "plume_digest"
_MEDIA_TAG = re.compile(r"<(image|video)>\n?")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

ImageSource = Path | Image.Image
VideoSource = tuple[Path, ...]
"""One video file, or the frames of a video."""


class RowError(ValueError):
    """A row that cannot be used; names file and line, what was expected and what to do."""


@dataclass(frozen=True)
class Side:
    """Query, target or hard negative of a row."""

    text: str
    images: tuple[ImageSource, ...] = ()
    videos: tuple[VideoSource, ...] = ()
    rationale: str = ""
    answer: str = ""
    instruction: str = ""

    @cached_property
    def key(self) -> int:
        """A 64-bit integer that is equal where instruction, text and media are."""
        digest = blake2b(self.text.encode(), digest_size=8)
        if self.instruction:
            digest.update(b"\0\0\0" + self.instruction.encode())
        for image in self.images:
            digest.update(_embedded(image) if isinstance(image, Image.Image) else b"\0" + str(image).encode())
        for video in self.videos:
            digest.update(b"\0\0" + b"\0".join(str(path).encode() for path in video))
        return int.from_bytes(digest.digest(), "little", signed=True)

    @cached_property
    def content_key(self) -> int:
        """As `key`, of media files by their name and a few pieces: it stays when data are moved."""
        digest = blake2b(replace(self, rationale="", answer="").sample(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def sample(self) -> bytes:
        """What tells this side from others: its texts and embedded images whole, of media files a few pieces."""
        pieces: list[object] = [self.text, self.rationale, self.answer, *([self.instruction] * bool(self.instruction))]
        for medium in (*self.images, *(path for video in self.videos for path in video)):
            pieces.append(_sample(medium) if isinstance(medium, Path) else _embedded(medium))
        return repr(pieces).encode("utf-8", "surrogatepass")


def _embedded(image: Image.Image) -> bytes:
    """A digest of the file that an image came from, or of its pixels."""
    known = image.info.get(_DIGEST)
    return known or blake2b(image.tobytes() + repr((image.size, image.mode)).encode(), digest_size=16).digest()


def _sample(file: Path) -> tuple[str, int, list[bytes]]:
    """Name, size, and some bytes of the start, the middle and the end.

    Not the time of change, which a copy of the data on another machine does not keep.
    """
    size = file.stat().st_size
    pieces = []
    with file.open("rb") as opened:
        for place in (0, size // 2, max(size - _SAMPLED_BYTES, 0)):
            opened.seek(place)
            pieces.append(opened.read(_SAMPLED_BYTES))
    return file.name, size, pieces


#: What stands in the place of a row that could not be loaded.
EMPTY = Side("-")


@dataclass(frozen=True)
class Record:
    """A row. `target` is None where the row only teaches to write a rationale."""

    query: Side
    target: Side | None
    task: str
    where: str
    negatives: tuple[Side, ...] = ()
    batch_group: int | str | None = None
    """Rows of a group meet in a batch, as far as they fit into it; None: of none."""
    error: str = ""
    """Why a row that was fine when the data were scanned is not any more."""

    @property
    def digest(self) -> bytes:
        """Tells rows apart; see `Side.sample`."""
        digest = blake2b(self.task.encode(), digest_size=16)
        for side in (self.query, self.target, *self.negatives):
            digest.update(b"\0" if side is None else side.sample())
        return digest.digest()


@dataclass(frozen=True, kw_only=True)
class RecordFormat:
    """How rows are read."""

    media_root: Path | None = None
    """Folder that media paths are relative to; None: the folder of the data."""
    media_root_only: bool = False
    """Whether media outside that folder are refused: absolute paths, `..`, links that lead out of it."""
    needs_target: bool = True
    """Whether a row without a target is an error."""
    unclosed_answer: UnclosedAnswerPolicy = "error"
    """What to do with an `<answer>` that is never closed; the published data need "accept"."""
    default_task: str = ""
    """Task of rows that name none."""

    def read(self, row: Any, where: str) -> Record:
        """Read one row.

        Args:
            row: as it was parsed.
            where: how errors call the row, "file:line".

        Raises:
            RowError: anything that keeps the row from being used.
        """
        if not isinstance(row, Mapping):
            raise RowError(f"{where}: a {type(row).__name__}; expected an object with 'query' and 'target'")
        try:
            query, target, negatives = self._sides(row, where)
        except InputError as error:
            raise RowError(str(error)) from None
        if query is None:
            named = "'qry'" if "pos" in row else "'query'"
            raise RowError(f"{where}: no query ({named}); add one or drop the row")
        if target is None and self.needs_target:
            named = "'pos'" if "qry" in row else "'target'"
            raise RowError(
                f"{where}: no target ({named}); add one, drop the row, or set needs_target=false to train on "
                "rationales alone"
            )
        sides = [side for name in ("qry", "pos") if isinstance(side := _unwrap(row.get(name)), Mapping)]
        names = [holder[key] for holder in (row, *sides) for key in _TASK_NAMES if holder.get(key)]
        task = str(names[0]) if names else self.default_task
        try:
            check_unicode(task, f"{where}: the task")
        except InputError as error:
            raise RowError(str(error)) from None
        group = row.get("batch_group")
        if isinstance(group, bool) or not isinstance(group, (int, str, type(None))):
            raise RowError(f"{where}: 'batch_group' is a {type(group).__name__}; expected a number or a name")
        return Record(query, target, task, where, negatives, group)

    @property
    def _root(self) -> Path:
        return self.media_root or Path()

    def _sides(self, row: Mapping, where: str) -> tuple[Side | None, Side | None, tuple[Side, ...]]:
        if "qry" in row or "pos" in row:
            return self._published(row, "qry", where), self._published(row, "pos", where), ()
        if any(_COLUMN.fullmatch(str(key)) for key in row):
            row = _from_columns(row)
        negatives = row.get("negatives")
        negatives = negatives if isinstance(negatives, (list, tuple)) else [] if negatives is None else [negatives]
        read = [self._plain(side, f"{where}: negative {index}") for index, side in enumerate(negatives)]
        query, target = (self._plain(row.get(name), f"{where}: {name!r}") for name in ("query", "target"))
        return query, target, tuple(side for side in read if side is not None)

    def _plain(self, side: Any, where: str) -> Side | None:
        """A side of a row in our own format."""
        if isinstance(side, list) and len(side) == 1:
            side = side[0]
        if side is None:
            return None
        if isinstance(side, str):
            side = {"text": side}
        if not isinstance(side, Mapping):
            raise RowError(f"{where} is a {type(side).__name__}; expected a text or an object")
        if unknown := [key for key in side if key not in _FIELDS]:
            raise RowError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(_FIELDS)}")
        texts = {name: side.get(name) or "" for name in ("text", "instruction", "rationale", "answer")}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise RowError(f"{where}: {name!r} is a {type(text).__name__}; expected a string")
        images = _listed(side.get("images") if side.get("image") is None else side.get("image"))
        videos = side.get("videos") if side.get("video") is None else side.get("video")
        return self._checked(texts["text"].strip(), images, _clips(videos, where), texts, (self._root,), where)

    def _published(self, row: Mapping, name: str, where: str) -> Side | None:
        """A side of a row as UME-sft writes it."""
        side = _unwrap(row.get(name))
        where = f"{where}: {name!r}"
        if side is None:
            return None
        if not isinstance(side, Mapping) or not isinstance(turns := side.get("conversations"), list):
            raise RowError(f"{where} has no list 'conversations'; see train/README.md for the formats")
        asked, written = _turns(turns, where)
        images = _listed(side.get("image") or side.get("images"))
        clips = _clips(side.get("video") or side.get("videos"), where)
        for tag, media in (("<image>", images), ("<video>", clips)):
            if (tags := asked.count(tag)) != len(media):
                kind = tag.strip("<>") + "s"
                raise RowError(f"{where} has {len(media)} {kind} but its text holds {tags} {tag}; expected one each")
        try:
            rationale, answer = parse_written(written, self.unclosed_answer == "accept")
        except UnclosedTag as error:
            raise RowError(f"{where}: {error}") from None
        roots = [str(holder[key]) for holder in (side, row) for key in _ROOT_NAMES if holder.get(key)]
        places = [self._root, *(place for root in roots for place in (Path(root), Path(root).parent))]
        text = _MEDIA_TAG.sub("", asked.split(f"\n{ANCHOR}")[0]).strip()
        return self._checked(text, images, clips, {"rationale": rationale, "answer": answer}, places, where)

    def _checked(
        self,
        text: str,
        images: Sequence[Any],
        clips: Sequence[Sequence[str]],
        written: Mapping[str, str],
        roots: Sequence[Path],
        where: str,
    ) -> Side:
        instruction = written.get("instruction", "").strip()
        check_unicode(text + instruction, where)
        _check_written(written["rationale"], f"{where}: the rationale")
        _check_written(written["answer"].replace(READ_OUT, ""), f"{where}: the answer")
        inside = self._root if self.media_root_only else None
        if not text and not images and not clips:
            raise RowError(f"{where} has neither text nor media; add one or drop the row")
        return Side(
            text,
            tuple(_image(image, roots, where, inside) for image in images),
            tuple(tuple(find_media(path, roots, where, inside) for path in clip) for clip in clips),
            written["rationale"].strip(),
            written["answer"].strip(),
            instruction,
        )


def _check_written(text: str, where: str) -> None:
    """Refuse words to be learnt that hold a token which steers the model; in a query or target it is read as text."""
    check_unicode(text, where)
    for token in RESERVED:
        if token in text:
            raise RowError(f"{where} holds {token!r}, a token that plume places itself; remove it")


def is_negative_column(name: str) -> bool:
    """Whether a key of a row holds hard negatives."""
    found = _COLUMN.fullmatch(name)
    return found is not None and found[1] == "negative"


def _from_columns(row: Mapping) -> dict[str, Any]:
    """A row of columns as a row of sides; negatives are lists of equal length, or single values."""
    sides: dict[str, dict[str, Any]] = {}
    for key, value in row.items():
        if (found := _COLUMN.fullmatch(str(key))) and value is not None:
            sides.setdefault(found[1], {})[found[2]] = value
    negatives = sides.pop("negative", {})
    count = max((len(value) for value in negatives.values() if isinstance(value, (list, tuple))), default=1)
    spread = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in negatives.items()}
    rows = [{name: value[i] for name, value in spread.items() if i < len(value)} for i in range(count)]
    return {**row, **sides, "negatives": [row for row in rows if row] or row.get("negatives")}


def _unwrap(side: Any) -> Any:
    return (side[0] if side else None) if isinstance(side, list) else side


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _clips(value: Any, where: str) -> list[tuple[str, ...]]:
    """Videos of a side: a file, a list of files, a list of frames, or a list of lists of frames."""
    listed = _listed(value)
    if listed and all(isinstance(clip, (list, tuple)) for clip in listed):
        clips = [tuple(clip) for clip in listed]
    elif all(isinstance(clip, str) and is_video_file(clip, alone=len(listed) == 1) for clip in listed):
        clips = [(clip,) for clip in listed]
    else:
        clips = [tuple(listed)]
    for clip in clips:
        if not clip or not all(isinstance(path, str) for path in clip):
            raise RowError(f"{where}: 'video' is {value!r}; expected a file or a list of frames")
        for path in clip:
            check_unicode(path, f"{where}: the path of a video")
    return clips


def is_video_file(path: str | Path, *, alone: bool) -> bool:
    """Whether a path of a video is a file that holds it, not one of its frames; a GIF is one where it is `alone`."""
    suffix = Path(path).suffix.lower()
    return suffix in VIDEO_SUFFIXES or (alone and suffix in ANIMATION_SUFFIXES)


def _turns(turns: list, where: str) -> tuple[str, str]:
    """The last text of the user and of the assistant."""
    texts = {"user": "", "assistant": ""}
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise RowError(f"{where}: a turn is a {type(turn).__name__}; expected an object")
        role, text = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content") or ""
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise RowError(
                f"{where}: a turn has role {role!r} and a {type(text).__name__}; expected human or gpt and a string"
            )
        texts[_ROLES[role]] = text
    return texts["user"], texts["assistant"]


def _image(image: Any, roots: Sequence[Path], where: str, inside: Path | None) -> ImageSource:
    if isinstance(image, Image.Image):
        return image
    content = image.get("bytes") if isinstance(image, Mapping) else None
    if content:  # an image of a Hugging Face data set
        if not isinstance(content, BYTES):  # a text would be a place, outside of any `media_root`
            raise RowError(f"{where}: an image's 'bytes' are a {type(content).__name__}; expected bytes")
        try:
            opened = open_image(io.BytesIO(content))
        except Exception as error:  # decoders of broken files raise anything
            raise RowError(f"{where}: an image cannot be read ({error}); drop the row") from None
        opened.info[_DIGEST] = blake2b(content, digest_size=16).digest()
        return opened
    if isinstance(image, Mapping):
        image = image.get("path")
    if not isinstance(image, str):
        raise RowError(f"{where}: an image is a {type(image).__name__}; expected a path")
    check_unicode(image, f"{where}: the path of an image")
    found = find_media(image, roots, where, inside)
    check_image_file(found, where)
    return found


def find_media(path: str, roots: Sequence[Path], where: str, inside: Path | None = None) -> Path:
    """The file that a row means: spelling variants of the published data, in each folder, in order.

    Args:
        path: as the row has it; never a URL.
        roots: folders that it may be relative to.
        where: how errors call the row.
        inside: a folder that it must lie in, all links followed; None lets it be anywhere.

    Raises:
        RowError: names every candidate, or the folder that it leads out of.
    """
    name = path.removeprefix("./")
    for wrong in (".jpgg", ".jpegg"):
        name = name[:-1] if name.endswith(wrong) else name
    variants = [name, f"MMEB-train/{name}"] if name.startswith("images/") else [name]
    candidates = [root / variant for root in dict.fromkeys(roots) for variant in variants]
    for candidate in candidates:
        if os.path.isfile(candidate):  # False too for names that no file can have
            if inside is not None and not candidate.resolve().is_relative_to(inside.resolve()):
                raise RowError(
                    f"{where} names {path}, which lies outside {inside}; move it there, drop the row, or set "
                    "media_root_only=false"
                )
            return candidate
    tried = ", ".join(map(str, candidates))
    raise RowError(f"{where} names {path}, but there is no file {tried}; set media_root or drop the row")
