"""From rows to tensors, at the stage of the curriculum that each row arrives with."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from plume.config import PlumeConfig
from plume.images import load_image
from plume.inputs import Item
from plume.processor import PlumeProcessor
from plume_train.curriculum import Curriculum, Stage
from plume_train.records import Record, Records, Side
from plume_train.sampler import StagedIndex
from plume_train.target import write_target

Batch = dict[str, dict[str, Tensor] | Tensor]
LastStatePredicts = Literal["latent_end", "next_word", "nothing"]


class StagedRecords(Dataset):
    """Rows by `StagedIndex`: each comes with the index of its stage."""

    def __init__(self, records: Records):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: StagedIndex) -> tuple[Record, int]:
        row, stage = index
        return self.records[row], stage


class PairCollator:
    """Makes a batch of `(record, stage)` rows.

    A batch holds "query" and, where rows have targets, "target": keywords of `PlumeModel.forward` with suffixes,
    labels and latent steps of the stage. "query_keys" and "target_keys" `[B]` are equal where the content is.
    """

    def __init__(
        self,
        processor: PlumeProcessor,
        config: PlumeConfig,
        curriculum: Curriculum,
        *,
        last_state_predicts: LastStatePredicts = "latent_end",
        num_cached_images: int = 0,
    ):
        """Set up.

        Args:
            processor: of the model.
            config: gives the templates.
            curriculum: gives the stages.
            last_state_predicts: what the last latent state of a row learns to predict.
            num_cached_images: processed images to hold in memory, in each worker; for small data sets.
        """
        self.processor = processor
        self.config = config
        self.curriculum = curriculum
        self.last_state_predicts: LastStatePredicts = last_state_predicts
        self.num_cached_images = num_cached_images
        self._seen: dict[Path, dict[str, Tensor]] = {}

    def __call__(self, rows: Sequence[tuple[Record, int]]) -> Batch:
        stages = [self.curriculum.stages[stage] for _, stage in rows]
        queries = [record.query for record, _ in rows]
        wheres = [record.where for record, _ in rows]
        batch: Batch = {"query": self._side(queries, stages, wheres), "query_keys": _keys(queries)}
        targets = [record.target for record, _ in rows if record.target is not None]
        if len(targets) == len(rows):
            batch |= {"target": self._side(targets, stages, wheres), "target_keys": _keys(targets)}
        elif targets:
            without = next(record for record, _ in rows if record.target is None)
            raise ValueError(f"{without.where} has no target while other rows of its task have; give it a dataset_name")
        return batch

    def _side(self, sides: Sequence[Side], stages: Sequence[Stage], wheres: Sequence[str]) -> dict[str, Tensor]:
        texts = self.processor.write([Item((*side.images, side.text)) for side in sides])
        vision = self._see([(path, where) for side, where in zip(sides, wheres, strict=True) for path in side.images])
        targets = [
            write_target(self.config, self.curriculum, stage, side.rationale, side.answer)
            for side, stage in zip(sides, stages, strict=True)
        ]
        suffixes = [torch.tensor(self.processor.suffix_ids(target.suffix)) for target in targets]
        return {
            **self.processor(text=texts, vision=vision),
            "suffix_ids": pad_sequence(suffixes, batch_first=True),
            "suffix_mask": pad_sequence([torch.ones_like(ids) for ids in suffixes], batch_first=True),
            "labels": self._labels(suffixes),
            "num_latent_steps": torch.tensor([target.num_latent_steps for target in targets]),
        }

    def _labels(self, suffixes: list[Tensor]) -> Tensor:
        """Every token of a suffix is predicted one position before it, the first by the last latent state."""
        labels = pad_sequence(suffixes, batch_first=True, padding_value=-100)
        if self.last_state_predicts != "latent_end":
            labels[:, 0] = -100
        if self.last_state_predicts == "next_word":
            word = labels[:, 1]
            labels[:, 0] = torch.where(word == self.config.read_out_token_id, -100, word)
        return labels

    def _see(self, images: Sequence[tuple[Path, str]]) -> dict[str, Tensor]:
        seen = [self._see_one(path, where) for path, where in images]
        return {key: torch.cat([one[key] for one in seen]) for key in seen[0]} if seen else {}

    def _see_one(self, path: Path, where: str) -> dict[str, Tensor]:
        if path in self._seen:
            return self._seen[path]
        vision = self.processor.see([load_image(path, where)])
        if len(self._seen) < self.num_cached_images:
            self._seen[path] = vision
        return vision


def _keys(sides: Sequence[Side]) -> Tensor:
    """64-bit integers that are equal where text and media are."""
    contents = ("\0".join([side.text, *map(str, side.images)]) for side in sides)
    digests = (blake2b(content.encode(), digest_size=8).digest() for content in contents)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
