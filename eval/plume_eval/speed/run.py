"""Run the bench: gate, then every case in turns, then what follows from the times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from plume.engine.layers.vision import Grid
from plume.inputs.item import Item
from plume.model.model import PlumeModel
from plume.threads import use_physical_cores
from plume_eval.speed.cases import make_items, make_model
from plume_eval.speed.clock import Timing, num_launches, timed
from plume_eval.speed.config import ConfigError, LatencyConfig
from plume_eval.speed.floors import Device, Work, measure_device
from plume_eval.speed.implementations import IN_GRAPHS, Batch, Compiled, Implementation, build

#: Least cosine to transformers' layers that an implementation must reach before it is timed; int8 is only reported.
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99}

#: Implementations that are not ours: where they fail they are left out and named.
FOREIGN = ("compiled",)

Mode = Literal["preparing", "vision", "latent", "explicit"]


class GateError(Exception):
    """An implementation that gives other vectors; nothing is timed then."""


@dataclass(frozen=True)
class Case:
    """One thing that is timed. count: K, or tokens written."""

    implementation: str
    input: str
    batch_size: int
    mode: Mode
    count: int = 0


def run_bench(
    config: LatencyConfig, *, show_progress: bool = True, after_group: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """Measure all that a configuration names.

    Args:
        config: what to measure.
        show_progress: whether to draw a progress bar.
        after_group: is given the results so far whenever an input and batch size is done, so that none are lost.

    Returns:
        Plain data for JSON: `cases`, `stages`, `comparisons`, `device`, `cosines`, `left_out`, and `failed`: whether
        something was left out because it failed.

    Raises:
        ConfigError: an implementation that this device cannot run, or a model of parallel latents.
        GateError: an implementation that gives other vectors than transformers' layers.
    """
    threads = torch.get_num_threads()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    else:
        use_physical_cores()
    try:
        return _run(config, show_progress, after_group)
    finally:
        torch.set_num_threads(threads)


def _run(
    config: LatencyConfig, show_progress: bool, after_group: Callable[[dict[str, Any]], Any] | None
) -> dict[str, Any]:
    name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = make_model(config, name)
        if model.config.latents == "parallel":  # stages and floors count a pass for each latent step
            raise ConfigError(
                f"{config.model} has parallel latents, and the bench measures sequential ones; "
                "`plume_eval.latency.latency_ms` times any model"
            )
        implementations = {label: build(label, model, config) for label in config.implementations}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    device = measure_device(model.device, model.dtype)
    bench = _Bench(config, model, implementations, device)
    cosines = bench.gate()
    groups = [(size, name) for size in config.batch_sizes for name in config.inputs if any(bench.cases(size, name))]
    total = sum(len(list(bench.cases(*group))) for group in groups)
    with tqdm(total=total, desc="Latency", unit="case", disable=not show_progress) as bar:
        for size, name in groups:
            cases = list(bench.cases(size, name))
            bar.set_postfix_str(f"{name}, batch size {size}")
            if bench.time_is_up():
                bench.left_out.append(f"{name} at batch size {size}: time is up")
            else:
                try:
                    bench.measure(size, name, cases)
                except RuntimeError as error:  # out of memory, most likely; what was measured before is kept
                    bench.left_out.append(f"{name} at batch size {size}: {_brief(error)}")
                    bench.failed = True
                    for case in cases:
                        bench.timings.pop(case, None)
            bar.update(len(cases))
            if after_group is not None:
                after_group(bench.result(device, cosines))
    return bench.result(device, cosines)


class _Bench:
    def __init__(
        self, config: LatencyConfig, model: PlumeModel, implementations: dict[str, Implementation], device: Device
    ):
        self.config, self.model, self.implementations, self.device = config, model, implementations, device
        self.work = Work.of(model)
        self.timings: dict[Case, Timing] = {}
        self.launches: dict[tuple[str, str], float] = {}  # of the first batch size that is measured
        self.sizes: dict[str, tuple[int, tuple[int, ...]]] = {}  # tokens, lengths of media in patches, of one input
        self.written: dict[Case, int] = {}
        self.left_out: list[str] = []
        self.failed = False
        self._begin = time.perf_counter()

    def time_is_up(self) -> bool:
        """Whether the limit of the configuration has passed."""
        limit = self.config.time_limit_s
        return limit is not None and time.perf_counter() - self._begin > limit

    def result(self, device: Device, cosines: dict[str, float]) -> dict[str, Any]:
        """All that is known so far, as plain data."""
        self.timings = {case: timing for case, timing in self.timings.items() if timing.times_ms}
        return {
            "device": asdict(device),
            "cosines": cosines,
            "cases": self.rows(),
            "stages": self.stages(),
            "comparisons": self.comparisons(),
            "left_out": self.left_out,
            "failed": self.failed,
        }

    def gate(self) -> dict[str, float]:
        """Lowest cosine of each implementation to transformers' layers."""
        baseline = build("transformers", self.model, self.config)
        lowest: dict[str, float] = {}
        for name, implementation in list(self.implementations.items()):
            try:
                lowest[name] = float(torch.tensor([1.0, *self._agreement(name, implementation, baseline)]).min())
            except Exception as error:
                if name not in FOREIGN:
                    raise
                # What others make may fail in its own implementations, which costs no more than itself.
                self.left_out.append(f"{name}: {_brief(error)}")
                del self.implementations[name]
        least = LEAST_COSINE[self.config.dtype]
        for name, cosine in lowest.items():
            if name != "int8" and not cosine >= least:
                raise GateError(
                    f"{name} has cosine {cosine:.5f} to transformers' layers, expected {least} in {self.config.dtype}; "
                    "nothing is timed"
                )
        return lowest

    def _agreement(self, name: str, implementation: Implementation, baseline: Implementation) -> Iterator[float]:
        """Cosines to transformers' layers, of every input that it is measured for, at its smallest batch."""
        assert self.model.processor is not None
        for kind, size in self.config.inputs.items():
            counts = [count for count in self.config.batch_sizes if self.config.allows(name, kind, count)]
            if not counts:
                continue
            items = make_items(self.model.processor, size, min(counts))
            for steps in (0, self.config.main_steps):
                expected = baseline.embed(baseline.prepare(items), steps)
                vectors = implementation.embed(implementation.prepare(items), steps)
                yield from cosine_similarity(vectors, expected).tolist()
            # In half precision the most likely token of random weights is a matter of rounding.
            if name != "int8" and self.config.dtype == "float32":
                expected = baseline.write(baseline.prepare(items), 3, stops=False)[0]
                vectors = implementation.write(implementation.prepare(items), 3, stops=False)[0]
                yield from cosine_similarity(vectors, expected).tolist()

    def cases(self, batch_size: int, name: str) -> Iterator[Case]:
        """What is timed of one input at one batch size."""
        config = self.config
        steps = {0, config.main_steps} | (set(config.num_latent_steps) if batch_size == 1 else {1})
        for label in self.implementations:
            if not config.allows(label, name, batch_size):
                continue
            if self._preparer(label, name, batch_size) == label:
                yield Case(label, name, batch_size, "preparing")
            if config.inputs[name].pixels is not None:
                yield Case(label, name, batch_size, "vision")
            for count in sorted(steps):
                yield Case(label, name, batch_size, "latent", count)
            wanted = config.written_inputs is None or name in config.written_inputs
            if batch_size in config.written_batch_sizes and wanted and label != "int8":
                yield Case(label, name, batch_size, "explicit", config.num_written_tokens)

    def _preparer(self, implementation: str, name: str, batch_size: int) -> str:
        """The first implementation that prepares inputs as this one does; they share what it prepares."""
        measured = [label for label in self.implementations if self.config.allows(label, name, batch_size)]
        return next(
            label
            for label in measured
            if type(self.implementations[label]).prepare is type(self.implementations[implementation]).prepare
        )

    def measure(self, batch_size: int, name: str, cases: Sequence[Case]) -> None:
        """Warm up, count launches, then time all cases in turns, so that a noisy machine disturbs them alike."""
        config = self.config
        assert self.model.processor is not None
        items = make_items(self.model.processor, config.inputs[name], batch_size)
        batches: dict[str, list[Batch]] = {}
        for label in dict.fromkeys(case.implementation for case in cases):
            preparer = self._preparer(label, name, batch_size)
            prepared = batches.get(preparer)
            batches[label] = self.implementations[label].prepare(items) if prepared is None else prepared
        self.sizes[name] = _sizes(batches[next(iter(batches))][0])
        for case in cases:
            begin = time.perf_counter()
            for _ in range(config.num_warm_up if case.mode != "explicit" else 1):
                self._run(case, items, batches[case.implementation], briefly=True)
                if time.perf_counter() - begin > config.max_seconds_per_case:
                    break
        for label, prepared in batches.items():
            if (label, name) not in self.launches:
                self.launches[label, name] = self._launches(self.implementations[label], prepared[:1])
        open_cases = list(cases)
        self.timings |= {case: Timing() for case in cases}
        for run_number in range(config.num_runs):
            if run_number and self.time_is_up():
                break
            for case in list(open_cases):
                timing = self.timings[case]
                timed(partial(self._run, case, items, batches[case.implementation]), self.model.device, timing)
                if sum(timing.times_ms) > 1000 * config.max_seconds_per_case:
                    open_cases.remove(case)

    def _run(self, case: Case, items: Sequence[Item], batches: list[Batch], *, briefly: bool = False) -> None:
        """Run a case once; briefly: with few written tokens, where that captures or compiles as many do."""
        implementation = self.implementations[case.implementation]
        if case.mode == "preparing":
            implementation.prepare(items)
        elif case.mode == "vision":
            implementation.run_vision(batches)
        elif case.mode == "latent":
            implementation.embed(batches, case.count)
        else:
            needs_all = isinstance(implementation, Compiled) or case.implementation in IN_GRAPHS
            num_tokens = min(4, case.count) if briefly and not needs_all else case.count
            self.written[case] = implementation.write(batches, num_tokens, stops=self.config.stops)[1]

    def _launches(self, implementation: Implementation, batches: list[Batch]) -> float:
        """Launches of one step of one batch: those of K = 2 less those of K = 1."""
        for count in (1, 2):  # what is captured or compiled the first time does not count
            implementation.embed(batches, count)
        device = self.model.device
        few, many = (num_launches(partial(implementation.embed, batches, count), device) for count in (1, 2))
        return many - few

    def rows(self) -> list[dict[str, Any]]:
        """A row per case, with its floor."""
        rows = []
        for case, timing in self.timings.items():
            tokens, lengths = self.sizes[case.input]
            floor = self._floor(case)
            median = timing.median_ms
            energy = None if timing.joules is None else timing.joules / len(timing.times_ms) / case.batch_size
            rows.append(
                {
                    **asdict(case),
                    "num_tokens": tokens,
                    "num_patches": sum(lengths),
                    "num_written": self.written.get(case),
                    "num_runs": len(timing.times_ms),
                    "median_ms": median,
                    "p20_ms": timing.percentile(0.2),
                    "p80_ms": timing.percentile(0.8),
                    "items_per_second": 1000 * case.batch_size / median,
                    "peak_memory_bytes": timing.peak_memory_bytes,
                    "joules_per_item": energy,
                    "floor_ms": floor,
                    "times_floor": None if floor is None else median / floor,
                }
            )
        return rows

    def _floor(self, case: Case) -> float | None:
        tokens, lengths = self.sizes[case.input]
        num_rows, suffix = case.batch_size, len(self.model.config.suffix_ids or ())
        if case.mode == "preparing":
            return None
        vision = self.work.vision_ms(self.device, lengths * num_rows) if lengths else 0.0
        if case.mode == "vision":
            return vision
        if case.mode == "explicit":
            count = self.written.get(case, case.count)
            prefill = self.work.prefill_ms(self.device, num_rows, tokens)
            return vision + prefill + self.work.writing_ms(self.device, num_rows, tokens, count)
        single = case.count == 0
        prefill = self.work.prefill_ms(self.device, num_rows, tokens + suffix * single)
        return vision + prefill + self.work.rollout_ms(self.device, num_rows, tokens, case.count, suffix)

    def stages(self) -> list[dict[str, Any]]:
        """Where the time of each implementation goes.

        Vision and preparing are timed by themselves. The rest follows from whole runs: a step is the slope of latency
        over K, between K = 1 and the largest; the suffix is what K = 1 costs beyond the single pass and that step; the
        prefill is the single pass without vision.
        """
        rows = []
        for label, name, size in dict.fromkeys((c.implementation, c.input, c.batch_size) for c in self.timings):
            most = max(case.count for case in self.timings if case.mode == "latent" and case.batch_size == size)
            single, one_step, most_steps = (
                self._median(Case(label, name, size, "latent", count)) for count in (0, 1, most)
            )
            vision = self._median(Case(label, name, size, "vision"))
            step = (most_steps - one_step) / (most - 1) if most > 1 else math.nan
            rows.append(
                {
                    "implementation": label,
                    "input": name,
                    "batch_size": size,
                    "preparing_ms": self._median(Case(self._preparer(label, name, size), name, size, "preparing")),
                    "vision_ms": vision,
                    "prefill_ms": single - vision,
                    "step_ms": step,
                    "suffix_ms": one_step - single - step,
                    "step_floor_ms": self.work.pass_ms(
                        self.device, size, self.sizes[name][0], adapter=True, head=False
                    ),
                    "launches_per_step": self.launches[label, name],
                }
            )
        return rows

    def comparisons(self) -> list[dict[str, Any]]:
        """Ratios, both sides named; the best implementation is the fastest that gives exact vectors."""
        rows = []
        for name, size in dict.fromkeys((case.input, case.batch_size) for case in self.timings):
            latent = self._medians(name, size, "latent", self.config.main_steps)
            single = self._medians(name, size, "latent", 0)
            written = self._medians(name, size, "explicit", self.config.num_written_tokens)
            best = min(latent, key=lambda label: latent[label])
            row: dict[str, Any] = {
                "input": name,
                "batch_size": size,
                "best_latent": best,
                "latent_ms": latent[best],
                "latent_to_single_pass": latent[best] / single[best],
                "reference_latent_to_best": latent["reference"] / latent[best] if "reference" in latent else None,
            }
            if written:
                fastest = min(written, key=lambda label: written[label])
                row |= {"best_explicit": fastest, "best_explicit_to_latent": written[fastest] / latent[best]}
                if "reference" in written:
                    row |= {"reference_explicit_to_latent": written["reference"] / latent[best]}
            rows.append(row)
        return rows

    def _median(self, case: Case) -> float:
        """Median of a case in ms; 0 where it was not measured."""
        timing = self.timings.get(case)
        return timing.median_ms if timing else 0.0

    def _medians(self, name: str, batch_size: int, mode: Mode, count: int) -> dict[str, float]:
        """Median of a case in ms by implementation, for those that measured it and give exact vectors."""
        cases = {label: Case(label, name, batch_size, mode, count) for label in self.implementations if label != "int8"}
        return {label: self.timings[case].median_ms for label, case in cases.items() if case in self.timings}


def _sizes(batch: Batch) -> tuple[int, tuple[int, ...]]:
    """Tokens of the first input, and the lengths of its media in patches."""
    tokens = int(batch["attention_mask"][0].sum())
    grids = [batch[name][:1] for name in ("image_grid_thw", "video_grid_thw") if name in batch]
    return tokens, Grid([tuple(size) for grid in grids for size in grid.tolist()]).lengths  # type: ignore[misc]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
