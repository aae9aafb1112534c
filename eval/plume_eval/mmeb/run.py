"""One task after the other: read, embed what has no vector yet, rank, write the result.

Everything that is embedded goes to disk in shards, which processes take in turn (`accelerate launch`); the first
process ranks. A run that was stopped goes on where it was, and ends with the same files as one that was not, but for
the seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from einops import rearrange
from sentence_transformers.util import quantize_embeddings
from tqdm.auto import tqdm

from plume.space.labels import check_templates, label_vectors
from plume.version import __version__
from plume_eval.metrics import bootstrap
from plume_eval.mmeb.content import Content, Keys
from plume_eval.mmeb.embedders import Embedder, Side
from plume_eval.mmeb.parsers import Faults, TaskData, read_task
from plume_eval.mmeb.ranking import Ranking, measure, rank
from plume_eval.mmeb.rows import MissingDataError
from plume_eval.mmeb.tasks import Task
from plume_eval.mmeb.vectors import EmbeddedShard, Places, VectorStore, write_json, write_lines
from plume_eval.report import commit

Precision = Literal["float32", "int8", "binary"]
#: Inputs of a shard: few enough that little is lost by a stop.
SHARD_SIZE = 128
#: Raised when the same vectors would get another score, so that results from before are made anew.
_SCORING = 1


def processes() -> PartialState:
    """The processes that share the work; one may wait long for another that ranks or writes rationales."""
    return PartialState(timeout=timedelta(days=1))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is done with the data and with vectors.

    truncate_dim: numbers of a vector that are kept; None: all.
    precision: "int8" quantises candidates, each number by the range that candidates have; "binary" keeps the signs of
        both sides.
    templates: sentences about a class, in which "{}" is its name; the vector of a class is that of their mean.
    prompts: as of `read_task`. from_hub: whether rows that are not there are downloaded. shard_size: inputs of a shard.
    """

    truncate_dim: int | None = None
    precision: Precision = "float32"
    templates: tuple[str, ...] = ("{}",)
    prompts: str = "vlm2vec"
    from_hub: bool = False
    shard_size: int = SHARD_SIZE

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ValueError(f"precision must be one of {known}; received {self.precision!r}")
        check_templates(self.templates)
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise ValueError(f"truncate_dim must be at least 1; received {self.truncate_dim}")

    @property
    def suffix(self) -> str:
        """What tells a folder of results from that of whole vectors."""
        dim = f"_dim{self.truncate_dim}" if self.truncate_dim else ""
        prompts = "" if self.prompts == "vlm2vec" else f"_{self.prompts}"
        told = hashlib.blake2b(repr(self.templates).encode(), digest_size=3).hexdigest()
        templates = "" if self.templates == ("{}",) else f"_templates-{told}"
        return dim + templates + ("" if self.precision == "float32" else f"_{self.precision}") + prompts


@dataclass
class _Side:
    """Inputs of one side of a task: their keys in order, and the shards that this task is the first to need."""

    side: Side
    contents: dict[str, Content]
    keys: list[str]
    shards: list[tuple[str, list[str]]] = field(default_factory=list)


class Evaluation:
    """The tasks of one embedder."""

    def __init__(
        self,
        embedder: Embedder,
        root: Path,
        out: Path,
        settings: Settings | None = None,
        *,
        show_progress: bool = False,
    ):
        """Open the folder of results.

        Args:
            embedder: who embeds.
            root: local copy of the data.
            out: `out/vectors` gets vectors, `out/<embedder>` a file for each task.
            settings: what else changes a score.
            show_progress: show a bar for each task, with the time left.

        Raises:
            ValueError: the folder holds vectors of other settings.
        """
        self.embedder, self.root = embedder, root
        self.settings = settings or Settings()
        self.folder = out / f"{embedder.name}{self.settings.suffix}"
        self._processes = processes()
        if (dim := self.settings.truncate_dim) is not None and dim > embedder.dimension:
            raise ValueError(f"truncate_dim={dim} is more than the {embedder.dimension} numbers of a vector")
        with self._processes.main_process_first():
            self._store = VectorStore(out / "vectors" / embedder.name, embedder.settings)
        self._places: Places = {}
        self._keys = Keys(root)
        self._tried: set[str] = set()  # shards of this run, whose errors are not tried again
        self._shows_progress = show_progress and self._processes.is_main_process

    def run(self, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """Results of tasks, in their order; of other processes than the first, none."""
        results = []
        for number, task in enumerate(tasks, start=1):
            result = self._task(task, f"{task.name} ({number} of {len(tasks)})")
            if result is not None:
                results.append(result)
        return results

    def _task(self, task: Task, name: str) -> dict[str, Any] | None:
        data = self._read(task)
        if isinstance(data, str):
            return self._write(task, {"problems": [data], "num_queries": 0}) if self._is_main else None
        if not data.queries:
            facts = {"problems": data.problems, "notes": data.notes, "num_queries": 0}
            return self._write(task, facts) if self._is_main else None
        sides = [self._side("query", data.queries), self._side("document", self._documents(data))]
        print_of_data = self._fingerprint(data, sides)
        shards = [shard for side in sides for shard, _ in side.shards]
        plan = self._agree(lambda: self._plan(task, print_of_data, shards))
        for side in sides:
            self._places |= {
                key: (shard, row)
                for shard, keys in side.shards
                if plan["known"] is None or self._store.holds(shard)  # of a finished task some may have been deleted
                for row, key in enumerate(keys)
            }
        if plan["known"] is not None:
            return plan["known"] if self._is_main else None
        self._embed(sides, set(plan["wanted"]), name)
        self._processes.wait_for_everyone()
        return self._score(data, sides, print_of_data) if self._is_main else None

    def _read(self, task: Task) -> TaskData | str:
        """The task's data, or what is missing; the first process reads first, since it may download."""

        def read() -> TaskData | str:
            try:
                return read_task(task, self.root, from_hub=self.settings.from_hub, prompts=self.settings.prompts)
            except MissingDataError as error:
                return str(error)

        mine: list[TaskData | str] = []

        def first() -> str:
            mine.append(read())
            return mine[0] if isinstance(mine[0], str) else ""

        missing = self._agree(first)
        data = mine[0] if mine else missing or read()
        if not missing and isinstance(data, str):
            raise MissingDataError(f"{task.name}: the first process has read it, and this one cannot: {data}")
        return data

    def _plan(self, task: Task, print_of_data: str, shards: Sequence[str]) -> dict[str, Any]:
        """The result if there is one, and the shards that are to be embedded."""
        known = self._finished(task, print_of_data)
        if known is not None:
            return {"known": known, "wanted": []}
        tried = self._tried
        wanted = [one for one in shards if not (self._store.holds(one) if one in tried else self._store.is_whole(one))]
        return {"known": None, "wanted": wanted}

    def _agree(self, decide: Callable[[], Any]) -> Any:
        """What the first process decides; the others wait for it."""
        decided = [decide() if self._is_main else None]
        broadcast_object_list(decided)
        return decided[0]

    def _documents(self, data: TaskData) -> list[Content]:
        """What is embedded of each candidate: itself, or of a class a sentence for each template."""
        return [
            replace(content, text=template.replace("{}", content.text)) if data.task.group.endswith("-CLS") else content
            for content in data.candidates.values()
            for template in (self.settings.templates if data.task.group.endswith("-CLS") else ("{}",))
        ]

    @property
    def _is_main(self) -> bool:
        return self._processes.is_main_process

    def _side(self, side: Side, contents: Sequence[Content]) -> _Side:
        """Keys of some contents, and shards of those that no earlier task of this run has."""
        keys = [f"{side} {self._keys.of(content)}" for content in contents]
        by_key = dict(zip(keys, contents, strict=True))
        new = [key for key in by_key if key not in self._places]
        size = self.settings.shard_size
        result = _Side(side, by_key, keys)
        for start in range(0, len(new), size):
            part = new[start : start + size]
            result.shards.append((self._store.name(part), part))
        return result

    def _embed(self, sides: Sequence[_Side], wanted: set[str], name: str) -> None:
        """Embed this process's share of what has no vectors yet."""
        todo = [(side, shard, keys) for side in sides for shard, keys in side.shards if shard in wanted]
        mine = todo[self._processes.process_index :: self._processes.num_processes]
        self._tried |= wanted
        total = sum(len(keys) for _, _, keys in mine)
        with tqdm(total=total, desc=name, unit="input", disable=not self._shows_progress) as bar:
            for side, shard, keys in mine:
                contents = [side.contents[key] for key in keys]
                self._store.save(shard, self.embedder.embed(contents, side.side))
                bar.update(len(keys))

    def _collect(self, side: _Side) -> tuple[torch.Tensor, list[str | None], list[str]]:
        """Vectors of a side `[n, D]`, why one is missing, and what was written, in the order of its keys."""
        shards: dict[str, EmbeddedShard] = {}
        rows = []
        for key in side.keys:
            name, row = self._places[key]
            if name not in shards:
                shards[name] = self._store.load(name)
            rows.append((shards[name], row))
        vectors = torch.from_numpy(np.stack([shard.vectors[row] for shard, row in rows]))
        errors: list[str | None] = [shard.errors.get(row) for shard, row in rows]
        errors = [
            error or (None if torch.isfinite(vector).all() else "its vector is not finite")
            for error, vector in zip(errors, vectors, strict=True)
        ]
        return vectors, errors, [shard.texts[row] if shard.texts else "" for shard, row in rows]

    def _score(self, data: TaskData, sides: Sequence[_Side], print_of_data: str) -> dict[str, Any]:
        queries, query_errors, texts = self._collect(sides[0])
        names = list(data.candidates)
        sentences, sentence_errors, _ = self._collect(sides[1])
        count = len(sentences) // len(names)
        candidates = sentences
        if count > 1:
            candidates = torch.from_numpy(label_vectors(rearrange(sentences.numpy(), "(n t) d -> n t d", t=count)))
        candidate_errors = [
            next(filter(None, sentence_errors[start : start + count]), None)
            for start in range(0, len(sentences), count)
        ]
        faults = Faults()
        for name, error in zip(names, candidate_errors, strict=True):
            if error:
                faults.add("candidates that could not be embedded", f"{data.candidates[name].name}: {error}")
        numbers = {
            name: number for number, (name, error) in enumerate(zip(names, candidate_errors, strict=True)) if not error
        }
        kept: list[int] = []
        labels: list[dict[int, int]] = []
        pools: list[list[int]] = []
        for row, error in enumerate(query_errors):
            if error:
                faults.add("queries that could not be embedded", f"{data.queries[row].name}: {error}")
                continue
            there = {numbers[name]: grade for name, grade in data.labels[row].items() if name in numbers}
            if not there:
                continue
            kept.append(row)
            labels.append(there)
            if data.pools is not None:
                pools.append([numbers[name] for name in data.pools[row] if name in numbers])
        cost = self._cost(sides)
        unfinished = sum(side["num_unfinished"] for side in cost.values())
        told = [f"{unfinished} rationales reached their limit without a read-out"] if unfinished else []
        facts: dict[str, Any] = {
            "problems": data.problems + faults.lines(),
            "notes": data.notes + told,
            "num_failed": sum(map(bool, query_errors)) + sum(map(bool, candidate_errors)),
            "revisions": data.revisions,
            "num_queries": len(kept),
            "num_candidates": len(numbers),
            "fingerprint": print_of_data,
            "cost": cost,
        }
        if kept:
            among = None if data.pools is None else pools
            if among is None and len(numbers) < len(names):  # what could not be embedded is in no pool
                among = [list(numbers.values())] * len(kept)
            ready = self._compress(queries[kept], candidates.nan_to_num())
            device = "cuda" if torch.cuda.is_available() else "cpu"
            ranking = rank(ready[0].to(device), ready[1].to(device), labels, among)
            metrics = measure(ranking.candidates, labels)
            facts |= {
                "num_ties": int(ranking.is_tied.sum()),
                "metrics": {name: float(values.mean()) for name, values in metrics.items()},
                "score": float(metrics[data.task.metric].mean()),
                "interval": vars(bootstrap(metrics[data.task.metric])),
                "per_query": {"rows": kept, "values": [round(float(v), 6) for v in metrics[data.task.metric]]},
            }
            self._write_rankings(data, kept, labels, names, ranking, texts)
        return self._write(data.task, facts)

    def _write_rankings(
        self,
        data: TaskData,
        kept: Sequence[int],
        labels: Sequence[Mapping[int, int]],
        names: Sequence[str],
        ranking: Ranking,
        texts: Sequence[str],
    ) -> None:
        """Write what was found for each query, for people to read."""
        rows = []
        for place, row in enumerate(kept):
            found = zip(ranking.candidates[place].tolist(), ranking.scores[place].tolist(), strict=True)
            content = data.queries[row]
            rows.append(
                {
                    "query": content.words,
                    "media": content.name if content.image is not None or content.frames else None,
                    "labels": {names[number]: grade for number, grade in labels[place].items()},
                    "found": [[names[number], round(score, 6)] for number, score in found if number >= 0][:5],
                    **({"written": texts[row]} if texts[row] else {}),
                }
            )
        write_lines(self.folder / "rankings" / f"{data.task.name}.jsonl", rows)

    def _compress(self, queries: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors as they are compared: cut, then quantised."""
        dim, precision = self.settings.truncate_dim, self.settings.precision
        if dim is not None:
            queries, candidates = (torch.nn.functional.normalize(one[:, :dim], dim=-1) for one in (queries, candidates))
        if precision == "binary":
            queries, candidates = ((one > 0).float() * 2 - 1 for one in (queries, candidates))
        elif precision == "int8":
            lowest, highest = candidates.min(dim=0).values, candidates.max(dim=0).values
            quantised = quantize_embeddings(
                candidates.numpy(), precision="int8", ranges=torch.stack([lowest, highest]).numpy()
            )
            steps = ((highest - lowest) / 255).clamp(min=1e-12)
            candidates = (torch.from_numpy(np.asarray(quantised, dtype=np.float32)) + 128) * steps + lowest
        return queries, candidates

    def _cost(self, sides: Sequence[_Side]) -> dict[str, Any]:
        """What embedding has taken, of the shards that this task was the first to need."""
        cost: dict[str, Any] = {}
        for side in sides:
            shards = [self._store.load(name) for name, _ in side.shards]
            embedded = sum(len(shard.vectors) - len(shard.errors) for shard in shards)
            cost[side.side] = {
                "num_inputs": embedded,
                "num_unfinished": sum(shard.num_unfinished for shard in shards),
                "reasoning_steps": sum(shard.reasoning_steps for shard in shards) / max(embedded, 1),
                "seconds": sum(shard.seconds for shard in shards),
            }
        return cost

    def _fingerprint(self, data: TaskData, sides: Iterable[_Side]) -> str:
        """Digest of all that a task's score depends on."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (
            [side.keys for side in sides],
            list(data.candidates),
            data.labels,
            data.pools,
            data.problems,
            data.notes,
            data.revisions,
            (self.settings.truncate_dim, self.settings.precision, self.settings.templates),
            dict(self.embedder.settings),
            (__version__, _SCORING),
        ):
            digest.update(json.dumps(part, sort_keys=True).encode())
        return digest.hexdigest()

    def _finished(self, task: Task, fingerprint: str) -> dict[str, Any] | None:
        file = self.folder / f"{task.name}.json"
        if not file.exists():
            return None
        result = json.loads(file.read_text(encoding="utf-8"))
        return result if result.get("fingerprint") == fingerprint and not result["num_failed"] else None

    def _write(self, task: Task, facts: Mapping[str, Any]) -> dict[str, Any]:
        result = {
            "task": task.name,
            "group": task.group,
            "modality": task.modality,
            "metric": task.metric,
            "score": None,
            "is_complete": not facts["problems"],
            "repository": task.repository,
            "revision": task.revision,
            "labels": task.labels,
            "prompts": self.settings.prompts,
            "query_prompt": task.query_prompt,
            "candidate_prompt": task.candidate_prompt,
            "templates": list(self.settings.templates) if task.group.endswith("-CLS") else None,
            "truncate_dim": self.settings.truncate_dim,
            "precision": self.settings.precision,
            "system": self.embedder.name,
            "settings": {**self.embedder.settings, **self.embedder.runs_with},
            "plume": __version__,
            "commit": commit(),
            **facts,
        }
        write_json(self.folder / f"{task.name}.json", result)
        return result
