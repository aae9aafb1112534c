"""From rows to tensors, at the stage of the curriculum that each row arrives with.

A batch has a place for every query, target and hard negative, and a list of passes for each of these roles. Places of
equal content share one row of a pass, which is encoded once. Rows are put into passes by length, and each pass is
padded to its own. A row that cannot be loaded leaves an empty place that counts for nothing, so that every process has
the same number of places and of latent steps; `leveled` sees to the number of passes.

Letters: B rows of a batch, H hard negatives of a batch, b rows of a pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from plume.config import PlumeConfig
from plume.inputs.errors import InputError
from plume.inputs.images import load_image
from plume.inputs.item import Item
from plume.inputs.processor import PlumeProcessor
from plume.inputs.video import Video, load_video
from plume.model.reconstruction import Sees
from plume.tokens import LATENT_END
from plume_train.curriculum import Curriculum
from plume_train.data.records import OnBadRow, Records
from plume_train.data.rows import EMPTY, Record, RowError, Side, VideoSource, is_video_file
from plume_train.data.sampler import Draw
from plume_train.data.segment import segments
from plume_train.data.target import write_target
from plume_train.data.vectors import SideName, VectorStore

Role = Literal["query", "target", "negative"]
Reconstruct = Literal["rationale", "target"]
LastStatePredicts = Literal["latent_end", "next_word", "nothing"]

#: Sides that are taught to write, and whose gates are balanced.
SUPERVISED: tuple[Role, ...] = ("query", "target")


class Pass(TypedDict):
    """One micro-batch of one role.

    inputs: keywords of `PlumeModel.forward`.
    counts `[b]`: how many places of the batch a row stands at; 0 at empty ones.
    teacher: keywords that replace those of `inputs` for the explicit pass of distillation.
    teacher_vectors `[b, T]`: of another embedder; zero where it has none.
    """

    inputs: dict[str, Any]
    counts: Tensor
    teacher: NotRequired[dict[str, Any]]
    teacher_vectors: NotRequired[Tensor]


class Batch(TypedDict):
    """What a process trains on at once.

    passes: micro-batches of each role.
    places: for each place of a role, its row in the joined passes.
    filler: for each role, a pass of one empty row, which no place stands at; only for several processes.
    num_supervised: places with labels, by role.
    num_gates: latent steps of all places that count, both sides.
    num_tokens: real tokens of all passes, prefix and suffix, visual tokens included.
    is_pair `[B]`: False at empty places.
    takes_all_steps `[B]`: rows whose K is the largest of the batch.
    most_steps: that K.
    query_keys, target_keys `[B]`, negative_keys `[H]`: integers that are equal where the content is.
    right_keys `[B, R]`: with labels, keys of those that are right for a query; None without labels.
    is_negative `[H]`: False at empty places.
    is_forced: whether vectors are read behind words of the data, a rationale or an answer.
    has_labels: whether all targets of the task are among the hard negatives.
    is_taught `[B]`, is_taught_negative `[H]`: rows whose ranking a teacher knows; None without one.
    task, stage, where: of the rows; stage is the run's.
    bad_rows: why entries are empty.
    """

    passes: dict[Role, list[Pass]]
    places: dict[Role, Tensor]
    filler: dict[Role, Pass]
    num_supervised: dict[Role, Tensor]
    num_gates: Tensor
    num_tokens: Tensor
    is_pair: Tensor
    takes_all_steps: Tensor
    most_steps: int
    query_keys: Tensor | None
    target_keys: Tensor | None
    negative_keys: Tensor | None
    right_keys: Tensor | None
    is_negative: Tensor | None
    is_forced: bool
    has_labels: bool
    is_taught: Tensor | None
    is_taught_negative: Tensor | None
    task: str
    stage: int
    where: list[str]
    bad_rows: list[str]


class StagedRecords(Dataset):
    """Rows by `Draw`: each comes with how it is to be prepared."""

    def __init__(self, records: Records):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: Draw) -> tuple[Record, Draw]:
        try:
            return self.records[draw.row], draw
        except RowError as error:  # it could be read when the data were scanned
            return replace(self.records.empty(draw.row), error=str(error)), draw


class PairCollator:
    """Makes a `Batch` of `(record, draw)` rows."""

    def __init__(
        self,
        processor: PlumeProcessor,
        config: PlumeConfig,
        curriculum: Curriculum,
        *,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        num_negatives: int = 0,
        labels: Mapping[str, Sequence[Side]] | None = None,
        right_labels: Mapping[str, Mapping[int, Sequence[int]]] | None = None,
        share: tuple[int, int] = (0, 1),
        target_steps: int | None = None,
        teacher_roles: Sequence[Role] = (),
        teacher_vectors: VectorStore | None = None,
        touch_all: bool = False,
        last_state_predicts: LastStatePredicts = "latent_end",
        reconstruct: Reconstruct | None = None,
        reconstruct_sees: Sees = "own_step",
        on_bad_row: OnBadRow = "error",
        num_cached_images: int = 0,
    ):
        """Set up.

        Args:
            processor: of the model.
            config: gives the templates.
            curriculum: gives the stages.
            micro_batch_size: rows of a pass at most; None: all.
            micro_batch_tokens: tokens of a pass at most, padding included; a longer row has one to itself.
            num_negatives: entries for hard negatives per row; further ones are left out, missing ones stay empty.
            labels: all targets of some tasks, which take the place of those in the batch.
            right_labels: keys of the right ones, of queries that have several.
            share: rank of this process and number of processes, which share the labels out.
            target_steps: K of targets and negatives at most; None: as queries.
            teacher_roles: sides whose explicit pass is added, for distillation.
            teacher_vectors: of another embedder, which teaches how candidates rank; None: written queries do.
            touch_all: whether every pass is to involve every part of the model, for several processes.
            last_state_predicts: what the last latent state of a row learns to predict.
            reconstruct: what is to be said from latent steps alone; None: nothing.
            reconstruct_sees: which latent steps it sees.
            on_bad_row: what to do where media cannot be decoded: raise, or leave the entry of the pair empty.
            num_cached_images: processed images to hold in memory, in each worker; for small data sets.
        """
        self.processor = processor
        self.config = config
        self.curriculum = curriculum
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.num_negatives = num_negatives
        self.labels, self.share = labels or {}, share
        self.right_labels = right_labels or {}
        self.target_steps = target_steps
        self.teacher_roles = teacher_roles
        self.teacher_vectors = teacher_vectors
        self.touch_all = touch_all
        self.last_state_predicts: LastStatePredicts = last_state_predicts
        self.reconstruct: Reconstruct | None = reconstruct
        self.reconstruct_sees: Sees = reconstruct_sees
        self.on_bad_row: OnBadRow = on_bad_row
        self._media = MediaLoader(processor, num_cached_images)

    def __call__(self, rows: Sequence[tuple[Record, Draw]]) -> Batch:
        records, draws = [record for record, _ in rows], [draw for _, draw in rows]
        bad_rows: list[str] = []
        entries: dict[Role, list[_Entry]] = {"query": [], "target": [], "negative": []}
        for record, draw in rows:
            for role, of_role in self._places(record, draw, bad_rows).items():
                entries[role] += of_role
        labels = self.labels.get(records[0].task, ())
        entries["negative"] += self._label_entries(labels, draws[0], bad_rows)
        entries = {role: of_role for role, of_role in entries.items() if of_role}
        most_steps = draws[0].most_steps
        passes: dict[Role, list[Pass]] = {}
        places: dict[Role, Tensor] = {}
        for role, of_role in entries.items():
            micro_batches, places[role] = self._packed(role, of_role, most_steps)
            passes[role] = [self._pass(role, micro_batch, most_steps) for micro_batch in micro_batches]
        supervised: dict[Role, list[Pass]] = {role: passes[role] for role in SUPERVISED if role in passes}
        counted = [
            (micro_batch["inputs"]["num_latent_steps"] * micro_batch["counts"]).sum()
            for micro_batches in supervised.values()
            for micro_batch in micro_batches
        ]
        return Batch(
            passes=passes,
            places=places,
            filler=self._fillers(list(passes), draws[0], most_steps) if self.share[1] > 1 else {},
            num_supervised={
                role: torch.stack([_num_labelled(micro_batch) for micro_batch in micro_batches]).sum()
                for role, micro_batches in supervised.items()
            },
            num_gates=torch.stack(counted).sum(),
            num_tokens=torch.stack(
                [_num_tokens(micro_batch) for micro_batches in passes.values() for micro_batch in micro_batches]
            ).sum(),
            is_pair=_counts(entries["query"]),
            takes_all_steps=torch.tensor([draw.num_steps == most_steps for draw in draws]),
            most_steps=most_steps,
            query_keys=_keys(entries["query"]),
            target_keys=_keys(entries["target"]) if "target" in entries else None,
            negative_keys=_keys(entries["negative"]) if "negative" in entries else None,
            right_keys=self._right_keys(records) if labels else None,
            is_negative=_counts(entries["negative"]) if "negative" in entries else None,
            is_forced=any(self._is_forced(entry) for role in SUPERVISED for entry in entries.get(role, ())),
            has_labels=bool(labels),
            **self._who_is_taught(entries),
            task=records[0].task,
            stage=draws[0].current_stage,
            where=[record.where for record in records],
            bad_rows=bad_rows,
        )

    def _right_keys(self, records: Sequence[Record]) -> Tensor:
        """As wide for every batch of a task, on all processes; the own target stands where a query has fewer."""
        several = self.right_labels.get(records[0].task, {})
        width = max(map(len, several.values()), default=1)
        rows = []
        for record in records:
            own = EMPTY.key if record.target is None else record.target.key
            keys = several.get(record.query.key, ())
            rows.append([*keys, *[own] * (width - len(keys))])
        return torch.tensor(rows)

    def _taught(self, role: Role, entries: Sequence[_Entry]) -> tuple[Tensor, Tensor]:
        """Vectors of another embedder, and where it has one."""
        assert self.teacher_vectors is not None
        name: SideName = "query" if role == "query" else "target"
        vectors, known = self.teacher_vectors.find(name, [entry.side if entry.counts else None for entry in entries])
        return torch.from_numpy(vectors), torch.from_numpy(known)

    def _who_is_taught(self, entries: dict[Role, list[_Entry]]) -> dict[str, Tensor | None]:
        if self.teacher_vectors is None or "target" not in entries:
            written = torch.tensor([bool(entry.side.rationale) for entry in entries["query"]])
            return {"is_taught": written, "is_taught_negative": None}
        known = {role: self._taught(role, of_role)[1] for role, of_role in entries.items()}
        return {"is_taught": known["query"] & known["target"], "is_taught_negative": known.get("negative")}

    def _places(self, record: Record, draw: Draw, bad_rows: list[str]) -> dict[Role, list[_Entry]]:
        """What a row fills: one entry per side that it has, and those of its negatives."""
        # All targets of a task of labels are written alike, and stand among the negatives already.
        is_label = record.task in self.labels
        num_negatives = 0 if is_label else self.num_negatives
        target = record.target
        if target is not None and is_label:
            target = replace(target, rationale="", answer="")
        sides: dict[Role, list[Side]] = {
            "query": [record.query],
            "target": [target] if target else [],
            "negative": list(record.negatives[:num_negatives]) if target else [],
        }
        try:
            if record.error:
                raise RowError(record.error)
            entries: dict[Role, list[_Entry]] = {
                role: [self._entry(role, side, draw, record) for side in of] for role, of in sides.items()
            }
        except (InputError, RowError) as error:
            if self.on_bad_row == "error":
                raise
            bad_rows.append(str(error))
            entries = {role: [self._empty(draw) for _ in of] for role, of in sides.items()}
        if record.target:
            entries["negative"] += [self._empty(draw) for _ in range(num_negatives - len(entries["negative"]))]
        return entries

    def _is_forced(self, entry: _Entry) -> bool:
        """Whether words of the data stand before the read-out of a row."""
        stage, side = self.curriculum.stages[entry.draw.stage], entry.side
        writes_answer = side.answer and not stage.drop_answer and self.config.answer_template
        return bool(writes_answer or (side.rationale and stage.ratio < 1))

    def _label_entries(self, labels: Sequence[Side], draw: Draw, bad_rows: list[str]) -> list[_Entry]:
        """This process's labels of a task, as many as every other's."""
        rank, count = self.share
        mine: list[Side | None] = list(labels[rank::count])
        mine += [None] * (-(-len(labels) // count) - len(mine))
        entries = []
        for side in mine:
            try:
                item, vision = self._media.load(side or EMPTY, "a label")
            except InputError as error:
                if self.on_bad_row == "error":
                    raise
                bad_rows.append(str(error))
                side, (item, vision) = None, self._media.load(EMPTY, "an empty place")
            entries.append(_Entry(side or EMPTY, draw, item, vision, counts=side is not None))
        return entries

    def _entry(self, role: Role, side: Side, draw: Draw, record: Record) -> _Entry:
        keeps = draw.is_instructed or (record.task in self.labels and side is not record.query)
        read = side if keeps else replace(side, instruction="")
        item, vision = self._media.load(read, record.where)
        target, wanted = record.target, ""
        if role == "query" and self.reconstruct == "target" and target and not target.images and not target.videos:
            wanted = target.text
        return _Entry(side, draw, item, vision, counts=True, wanted=wanted)

    def _empty(self, draw: Draw) -> _Entry:
        item, vision = self._media.load(EMPTY, "an empty place")
        return _Entry(EMPTY, draw, item, vision, counts=False)

    def _fillers(self, roles: Sequence[Role], draw: Draw, most_steps: int) -> dict[Role, Pass]:
        return {role: self._pass(role, [(self._empty(draw), 0)], most_steps) for role in roles}

    def _packed(
        self, role: Role, entries: Sequence[_Entry], most_steps: int
    ) -> tuple[list[list[tuple[_Entry, int]]], Tensor]:
        """Rows of passes with the number of places that each fills, and for each place its row in the joined passes."""
        row_of = [entry.content for entry in entries]
        rows = dict(zip(row_of[::-1], entries[::-1], strict=True))  # the first entry of each content
        filled = Counter(content for content, entry in zip(row_of, entries, strict=True) if entry.counts)
        contents = list(dict.fromkeys(row_of))
        size, budget = self.micro_batch_size or len(contents), self.micro_batch_tokens or math.inf
        micro_batches: list[list[Hashable]] = [contents]
        if self.micro_batch_tokens or size < len(contents):
            read = self._num_read([rows[content] for content in contents])
            said = [self._num_said(role, rows[content], most_steps) for content in contents]
            lengths = dict(zip(contents, zip(read, said, strict=True), strict=True))
            steps = self._capped(role, most_steps)
            micro_batches, longest = [], (0, 0)
            for content in sorted(contents, key=lambda content: -sum(lengths[content])):
                length = lengths[content]
                both = max(longest[0], length[0]), max(longest[1], length[1])
                count = len(micro_batches[-1]) + 1 if micro_batches else 0
                if not micro_batches or count > size or count * (sum(both) + steps) > budget:
                    micro_batches.append([])
                    both = length
                micro_batches[-1].append(content)
                longest = both
        place = {content: index for index, content in enumerate(chain.from_iterable(micro_batches))}
        return (
            [[(rows[content], filled[content]) for content in of_pass] for of_pass in micro_batches],
            torch.tensor([place[content] for content in row_of]),
        )

    def _num_said(self, role: Role, entry: _Entry, most_steps: int) -> int:
        """Tokens of the suffix of a row, of the longer one where a second pass writes its whole rationale."""
        own = len(self._suffix(role, entry)[0])
        if role not in self.teacher_roles or not most_steps:
            return own
        return max(own, len(self._suffix(role, entry, explicit=True)[0]))

    def _num_read(self, entries: Sequence[_Entry]) -> list[int]:
        """Tokens of the prefixes of some rows, visual ones included."""
        merged = self.processor.image_processor.merge_size**2
        visual = [
            sum(int(grid.prod(dim=-1).sum()) // merged for name, grid in entry.vision.items() if "grid_thw" in name)
            for entry in entries
        ]
        texts = self.processor.num_written_tokens([entry.item for entry in entries])
        return [of_text + of_media for of_text, of_media in zip(texts, visual, strict=True)]

    def _pass(self, role: Role, rows: Sequence[tuple[_Entry, int]], most_steps: int) -> Pass:
        entries = [entry for entry, _ in rows]
        keys = dict.fromkeys(key for entry in entries for key in entry.vision)
        vision = {key: torch.cat([entry.vision[key] for entry in entries if key in entry.vision]) for key in keys}
        inputs = {
            **self.processor.encode([entry.item for entry in entries], vision=vision),
            **self._written(role, entries),
            "max_latent_steps": self._capped(role, most_steps),
            "touch_all": self.touch_all,
        }
        if self.reconstruct is not None and inputs["max_latent_steps"] and role in SUPERVISED:
            inputs |= self._reconstruction(role, entries)
        result = Pass(inputs=inputs, counts=torch.tensor([count for _, count in rows]))
        if self.teacher_vectors is not None:
            vectors, _ = self._taught(role, entries)
            result["teacher_vectors"] = vectors
        if role in self.teacher_roles and most_steps:
            inputs["keep_layers"] = True
            result["teacher"] = {**self._written(role, entries, explicit=True), "max_latent_steps": 0}
        return result

    def _written(self, role: Role, entries: Sequence[_Entry], explicit: bool = False) -> dict[str, Any]:
        """Suffixes and latent steps of some rows; `explicit` writes the whole rationale, whatever the stage."""
        written_of = [self._suffix(role, entry, explicit) for entry in entries]
        suffixes = [torch.tensor(ids) for ids, _ in written_of]
        written = {
            "suffix_ids": pad_sequence(suffixes, batch_first=True),
            "suffix_mask": pad_sequence([torch.ones_like(ids) for ids in suffixes], batch_first=True),
            "num_latent_steps": torch.tensor([steps for _, steps in written_of]),
        }
        if role in SUPERVISED:
            written["labels"] = self._labels(suffixes).masked_fill(~_counts(entries)[:, None], -100)
        return written

    def _suffix(self, role: Role, entry: _Entry, explicit: bool = False) -> tuple[list[int], int]:
        """Token ids of the suffix of a row, and its latent steps."""
        stage, steps = self.curriculum.stages[entry.draw.stage], self._steps(role, entry)
        if explicit:
            stage, steps = replace(stage, ratio=0.0, drop_answer=False), 0
        side = entry.side
        target = write_target(self.config, self.curriculum, stage, side.rationale, side.answer, steps)
        return self.processor.suffix_ids(target.suffix), target.num_latent_steps

    def _steps(self, role: Role, entry: _Entry) -> int:
        """K of a row: the stage's, or fewer with random_steps; of targets and negatives `target_steps` at most."""
        return self._capped(role, entry.draw.num_steps)

    def _capped(self, role: Role, steps: int) -> int:
        return steps if role == "query" or self.target_steps is None else min(steps, self.target_steps)

    def _reconstruction(self, role: Role, entries: Sequence[_Entry]) -> dict[str, Any]:
        """What some rows are to say from their latent steps, group by group; one empty column where it is nothing."""
        ids, labels, groups, places = [], [], [], []
        for entry in entries:
            row: list[list[int]] = [[], [], [], []]
            for group, text in enumerate(self._said(role, entry)):
                if text.strip() and entry.counts:
                    tokens = self.processor.suffix_ids(LATENT_END + text)
                    read, count = tokens[:-1], len(tokens) - 1
                    for column, values in zip(row, (read, tokens[1:], [group] * count, range(count)), strict=True):
                        column.extend(values)
            for column, values in zip((ids, labels, groups, places), row, strict=True):
                column.append(torch.tensor(values, dtype=torch.long))
        width = max(max(map(len, ids)), 1)
        padded = [
            torch.stack([F.pad(row, (0, width - len(row)), value=empty) for row in column])
            for column, empty in ((ids, 0), (labels, -100), (groups, -1), (places, 0))
        ]
        steps = self.curriculum.steps_per_segment if self.reconstruct == "rationale" else 1
        named = dict(zip(("ids", "groups", "places"), (padded[0], *padded[2:]), strict=True))
        return {
            "reconstruction": {**named, "sees": self.reconstruct_sees, "steps_per_group": max(steps, 1)},
            "reconstruction_labels": padded[1],
        }

    def _said(self, role: Role, entry: _Entry) -> list[str]:
        """The segments that latent steps stand for, or the text of the target."""
        steps = self._steps(role, entry)
        if self.reconstruct == "target":
            return [entry.wanted] if role == "query" and steps else []
        curriculum, stage = self.curriculum, self.curriculum.stages[entry.draw.stage]
        parts = segments(entry.side.rationale, curriculum.num_segments, whole_sentences=curriculum.whole_sentences)
        return parts[: min(curriculum.num_replaced_segments(stage), steps // max(curriculum.steps_per_segment, 1))]

    def _labels(self, suffixes: list[Tensor]) -> Tensor:
        """Every token of a suffix is predicted one position before it, the first by the last latent state."""
        labels = pad_sequence(suffixes, batch_first=True, padding_value=-100)
        if self.last_state_predicts != "latent_end":
            labels[:, 0] = -100
        if self.last_state_predicts == "next_word":
            word = labels[:, 1]
            labels[:, 0] = torch.where(word == self.config.read_out_token_id, -100, word)
        return labels


@dataclass(frozen=True)
class _Entry:
    """One side of a row, ready to be joined with others; `item` holds stand-ins for the media in `vision`.

    wanted: the row's target, where it is a text alone and a query is to say it.
    """

    side: Side
    draw: Draw
    item: Item
    vision: dict[str, Tensor]
    counts: bool
    wanted: str = ""

    @property
    def content(self) -> Hashable:
        """Equal where the model reads and writes the same, so that one pass serves several places."""
        side, how = self.side, self.draw[1:]  # all but which row it is
        return self.counts, side.key, side.rationale, side.answer, self.wanted, how


class MediaLoader:
    """Media of sides as tensors, some of them cached."""

    def __init__(self, processor: PlumeProcessor, max_cached: int):
        self.processor, self.max_cached = processor, max_cached
        self._cache: dict[int, tuple[Item, dict[str, Tensor]]] = {}

    def load(self, side: Side, where: str) -> tuple[Item, dict[str, Tensor]]:
        """The side as an input with stand-ins for its media, and their patches.

        Raises:
            InputError: names the row of a medium that cannot be decoded, or of an input that is too long.
        """
        if side.key in self._cache:
            return self._cache[side.key]
        limits = self.processor.limits
        images = [load_image(image, where, limits.pixels, limits.background) for image in side.images]
        videos = [self._load_video(video, where) for video in side.videos]
        item = self.processor.fit(self.processor.complete(Item((*images, *videos, side.text), side.instruction)), where)
        vision = self.processor.pack_media(item.images, item.videos) if item.images or item.videos else {}
        loaded = replace(item, content=tuple(_stand_in(part) for part in item.content)), vision
        if vision and len(self._cache) < self.max_cached:
            self._cache[side.key] = loaded
        return loaded

    def _load_video(self, video: VideoSource, where: str) -> Video:
        """A file, sampled as the checkpoint says, or all frames of a list."""
        limits = self.processor.limits
        if len(video) == 1 and is_video_file(video[0], alone=True):
            return load_video(video[0], limits.sampling, where, limits.background)
        all_frames = replace(limits.sampling, num_frames=len(video), fps=None)
        return load_video(list(video), all_frames, where, limits.background)


def _stand_in(part: Any) -> Any:
    if isinstance(part, Video):
        return replace(part, frames=part.frames[:0])
    return part if isinstance(part, str) else None


def _counts(entries: Sequence[_Entry]) -> Tensor:
    return torch.tensor([entry.counts for entry in entries])


def _num_labelled(micro_batch: Pass) -> Tensor:
    return ((micro_batch["inputs"]["labels"] != -100).any(dim=1) * micro_batch["counts"]).sum()


def _num_tokens(micro_batch: Pass) -> Tensor:
    inputs = micro_batch["inputs"]
    return inputs["attention_mask"].sum() + inputs["suffix_mask"].sum() + inputs["num_latent_steps"].sum()


def _keys(entries: Sequence[_Entry]) -> Tensor:
    """64-bit integers that are equal where text and media are."""
    return torch.tensor([entry.side.key for entry in entries])
