"""`plume-train check DATA`: what is in a data set, and what the model will see of it, before a GPU is paid for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from plume.checkpoints.folder import read_config
from plume.config import PlumeConfig
from plume.inputs import prompt
from plume.inputs.errors import InputError
from plume.inputs.processor import PlumeProcessor
from plume.terminal import say
from plume.tokens import IMAGE, VIDEO, VISION_END, VISION_START
from plume_train.config import PlumeTrainingArguments, SettingsError, arguments_of, settings_parser
from plume_train.curriculum import Curriculum
from plume_train.data.collate import MediaLoader
from plume_train.data.records import Records
from plume_train.data.rows import Record, RecordFormat, RowError, Side
from plume_train.data.segment import sentences
from plume_train.data.target import write_target

NUM_SHOWN = 10

_HELP = """\
plume-train check DATA ... [--load-media] [--SETTING VALUE ...]

Look at training data before a GPU is paid for: bad rows, tasks, lengths, stages, and what the model is to write.

  DATA          files .jsonl, .json, .parquet, a folder that `datasets` has saved, or the name of a data set on the Hub
  --load-media  decode every image and video, and count its tokens
  --model, --num_segments, --config and every other setting of a training run (`plume-train --help`) may follow"""


def check(argv: Sequence[str]) -> int:
    """Print what is in a data set.

    Args:
        argv: files, then any settings of a training run (`--config`, `--model`, `--num_segments`, ...).

    Returns:
        0 where every row can be used, 1 otherwise.
    """
    args, load_media = _parse(argv)
    records = Records(
        args.train_file,
        row_format=RecordFormat(
            media_root=Path(args.media_root) if args.media_root else None,
            media_root_only=args.media_root_only,
            needs_target=args.needs_target,
            unclosed_answer=args.unclosed_answer,
        ),
        on_bad_row="skip",
        show_progress=args.shows_bars,
    )
    config, processor = _model(args)
    if args.target_steps is not None:
        config.document_latent_steps = args.target_steps
    report = Report(args.build_curriculum(), config, processor, load_media, args.max_steps)
    for index in tqdm(range(len(records)), desc="Reading rows", disable=not args.shows_bars):
        try:
            report.add(records[index])
        except RowError as error:  # it could be read when the data were scanned
            report.bad_rows.append(str(error))
    report.bad_rows = records.bad_rows + report.bad_rows
    say("\n".join(report.lines() + report.shown(records)), keep="\n")
    return 1 if report.bad_rows else 0


class Report:
    """Counts of what rows hold."""

    def __init__(
        self,
        curriculum: Curriculum,
        config: PlumeConfig,
        processor: PlumeProcessor | None,
        load_media: bool = False,
        num_steps: int = -1,
    ):
        """Set up.

        Args:
            curriculum: gives segments and stages.
            config: gives the templates.
            processor: counts tokens; None: a quarter of the bytes, without media.
            load_media: whether to decode every medium, not only look for its file; tokens of media need it.
            num_steps: optimiser steps of the training, if they are known.
        """
        self.num_steps = num_steps
        self.curriculum = curriculum
        self.config = config
        self.processor = processor
        self.load_media = load_media
        self.media = MediaLoader(processor, 0) if processor else None
        self.bad_rows: list[str] = []
        self.tasks: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, str]] = Counter()
        self.prefix_tokens: list[int] = []
        self.suffix_tokens: list[int] = []
        self.num_sentences: list[int] = []
        self.num_negatives: list[int] = []
        self.contents: dict[str, Counter[Any]] = {"query": Counter(), "target": Counter(), "pair": Counter()}

    def add(self, record: Record) -> None:
        """Count a row."""
        try:
            lengths = [self._lengths(side, record.where) for side in (record.query, record.target) if side]
        except InputError as error:
            self.bad_rows.append(str(error))
            return
        self.tasks[record.task] += 1
        self.num_negatives.append(len(record.negatives))
        for name, side in (("query", record.query), ("target", record.target)):
            if side is None:
                continue
            self.kinds[name, _kind(side)] += 1
            self.contents[name][side.key] += 1
            if side.rationale:
                self.num_sentences.append(len(sentences(side.rationale)))
        if record.target:
            self.contents["pair"][record.query.key, record.target.key] += 1
        for prefix, suffix in lengths:
            self.prefix_tokens.append(prefix)
            self.suffix_tokens.append(suffix)

    def lines(self) -> list[str]:
        """The counts, for people."""
        total = sum(self.tasks.values())
        lines = [
            f"\n{total} rows can be used, {len(self.bad_rows)} cannot",
            *(f"  {row}" for row in self.bad_rows[:20]),
        ]
        if len(self.bad_rows) > 20:
            lines.append(f"  ... and {len(self.bad_rows) - 20} more")
        lines += ["", "tasks", *(f"  {count:>8}  {task}" for task, count in self.tasks.most_common())]
        lines += ["", "sides", *(f"  {count:>8}  {name}: {kind}" for (name, kind), count in sorted(self.kinds.items()))]
        exact = "tokens" if self.processor else "tokens, about (name a --model to count them)"
        media = "" if self.processor and self.load_media else ", without media"
        lines += [
            "",
            exact,
            f"  prefix{media}: {_spread(self.prefix_tokens)}",
            f"  suffix, whole rationale: {_spread(self.suffix_tokens)}",
        ]
        segments = self.curriculum.num_segments
        short = sum(count < segments for count in self.num_sentences)
        lines += [
            "",
            "rationales",
            f"  {len(self.num_sentences)} of {len(self.prefix_tokens)} sides have one",
            f"  sentences: {_spread(self.num_sentences)}",
            f"  {short} have fewer sentences than the {segments} segments, and are cut between words instead",
        ]
        lines += ["", "stages", *self._stages()]
        if any(self.num_negatives):
            lines += ["", f"hard negatives per row: {_spread(self.num_negatives)}"]
        lines += ["", "duplicates (left out of each other's negatives)"]
        for name, counter in self.contents.items():
            repeated = sum(count - 1 for count in counter.values())
            lines.append(f"  {repeated:>8}  rows repeat a {name}")
        return lines

    def _stages(self) -> list[str]:
        curriculum = self.curriculum
        lines = [
            f"  {index}: K = {curriculum.num_latent_steps(stage)}, {stage.share:.0%} of the steps"
            for index, stage in enumerate(curriculum.stages)
        ]
        known = self.num_steps if self.num_steps > 0 else 1_000_000
        return lines + [f"  {lost}" for lost in curriculum.collapsed(known)]

    def shown(self, records: Records) -> list[str]:
        """The first rows, as the model will see them at each stage."""
        lines = ["", f"the first {min(NUM_SHOWN, len(records))} rows, as the model will see them"]
        lines += [f"  prompt: {self.config.prompt_template!r}"]
        for index in range(min(NUM_SHOWN, len(records))):
            try:
                record = records[index]
            except RowError:
                continue
            lines += ["", record.where]
            named: list[tuple[str, Side | None]] = [("query", record.query), ("target", record.target)]
            named += [(f"negative {index}", side) for index, side in enumerate(record.negatives)]
            for name, side in named:
                if side is None:
                    continue
                lines.append(f"  {name}: {_content(side)!r}")
                if name.startswith("negative"):
                    continue
                for stage_index, stage in enumerate(self.curriculum.stages):
                    steps = self.curriculum.num_latent_steps(stage)
                    steps = steps if name == "query" else self.config.document_steps(steps)
                    target = write_target(self.config, self.curriculum, stage, side.rationale, side.answer, steps)
                    lines.append(f"    stage {stage_index}: {target.layout!r}")
        return lines

    def _lengths(self, side: Side, where: str) -> tuple[int, int]:
        """Tokens of prefix and suffix."""
        explicit = prompt.suffix(self.config, side.rationale, side.answer, end_turn=True)
        if self.processor is None or self.media is None:
            return len(self._written(side).encode()) // 4, len(explicit.encode()) // 4
        suffix = len(self.processor.suffix_ids(explicit))
        if not self.load_media:
            limit = self.processor.max_tokens
            prefix = len(self.processor.suffix_ids(self._written(side)))
            if prefix > limit and not self.processor.truncate:
                raise InputError(where, f"it has {prefix} tokens, the model takes {limit}; shorten it or drop the row")
            return prefix, suffix
        item, vision = self.media.load(side, where)
        tokens = self.processor.encode([item], vision=vision)
        return tokens["input_ids"].shape[1], suffix

    def _written(self, side: Side) -> str:
        before, after = self.config.prompt_template.split("{content}")
        return before + _content(side) + after


def _content(side: Side) -> str:
    """A side as it stands in the prompt, with one placeholder for each medium."""
    media = [(IMAGE, len(side.images)), (VIDEO, len(side.videos))]
    text = " ".join(part for part in (side.instruction, side.text) if part)
    return "".join((VISION_START + medium + VISION_END) * count for medium, count in media) + text


def _kind(side: Side) -> str:
    counts = [(len(side.images), "image"), (len(side.videos), "video")]
    named = [kind if count == 1 else f"{count} {kind}s" for count, kind in counts if count]
    return " + ".join([*named, *(["text"] if side.text else [])])


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    middle, high = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)]
    return f"median {middle}, 95 % below {high + 1}, most {ordered[-1]}"


def _model(args: PlumeTrainingArguments) -> tuple[PlumeConfig, PlumeProcessor | None]:
    """Templates and tokenizer of the model to be trained; plume's own templates without one."""
    assert isinstance(args.plume_config, dict)
    if not args.model:
        return PlumeConfig(**args.plume_config), None
    found = read_config(args.model)
    if found.get("model_type") == PlumeConfig.model_type:
        return PlumeConfig.from_pretrained(args.model), PlumeProcessor.from_pretrained(args.model)
    config = PlumeConfig(**args.plume_config)
    return config, PlumeProcessor.from_backbone(args.model, config)


def _parse(argv: Sequence[str]) -> tuple[PlumeTrainingArguments, bool]:
    parser = settings_parser("plume-train check")
    if {"-h", "--help"} & set(argv):
        say(_HELP, keep="\n")
        sys.exit()
    parser.add_argument("data", nargs="*")
    parser.add_argument("--load-media", action="store_true")
    flags = vars(parser.parse_args(argv))
    data, load_media = flags.pop("data"), flags.pop("load_media")
    files: dict[str, Any] = {"train_file": data} if data else {}
    args = arguments_of(flags, use_cpu=True, **files)
    if not args.train_file:
        raise SettingsError("no data is named; expected for example `plume-train check pairs.jsonl`")
    args.check_data()
    return args, load_media
