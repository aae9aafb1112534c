"""What a latency bench measures; one YAML per model in `configs/eval/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from plume.configurations import find_config
from plume.terminal import did_you_mean

ImplementationName = Literal["reference", "transformers", "compiled", "eager", "graph", "triton", "dependent", "int8"]
IMPLEMENTATIONS: tuple[ImplementationName, ...] = get_args(ImplementationName)
SHAPES = ("tiny", "mid", "2b", "7b")


class ConfigError(ValueError):
    """A bench that cannot be run as written."""


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """How large an input is.

    tokens: of the prefix, visual ones included; text fills it up. pixels: height and width of an image or frame.
    num_frames: of a video; 0 is no video. batch_sizes: those of the run that it is measured at; None: all.
    """

    tokens: int
    pixels: tuple[int, int] | None = None
    num_frames: int = 0
    batch_sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What an implementation is measured for; None: everything."""

    inputs: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None

    def allows(self, name: str, batch_size: int) -> bool:
        """Whether an input is measured at a batch size."""
        has_input = self.inputs is None or name in self.inputs
        return has_input and (self.batch_sizes is None or batch_size in self.batch_sizes)


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """One run of the bench."""

    model: str | None = None
    """A checkpoint: a folder or a Hub name. Either this or `shapes`."""
    shapes: Literal["tiny", "mid", "2b", "7b"] | None = None
    """Shapes of a model of random weights, made on the device: Qwen2-VL's 2B and 7B, and two for a CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    implementations: tuple[ImplementationName, ...] = ("reference", "transformers", "eager")
    """Implementations; see eval/README.md."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """Implementations that are not measured for everything: slow ones, or those that compile for each shape."""
    inputs: Mapping[str, InputSize] = field(default_factory=lambda: {"text": InputSize(tokens=60)})
    """What is embedded."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Inputs per call."""
    num_latent_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """K of the latent mode at batch size 1; elsewhere the single pass and the `main_steps` are measured."""
    main_steps: int = 8
    """The K that is compared with the other modes."""
    num_written_tokens: int = 403
    """Length of the explicit rationale; 403 is the published average. Trained models stop by themselves earlier."""
    written_inputs: tuple[str, ...] | None = None
    """Inputs that explicit writing is measured for; None: all."""
    written_batch_sizes: tuple[int, ...] = (1,)
    """Batch sizes that explicit writing is measured for."""
    stops: bool = False
    """Whether writing ends where the model says so; for trained models."""
    num_runs: int = 9
    """Timed runs of each case at most."""
    num_warm_up: int = 2
    """Runs before them; explicit writing is warmed up with a few tokens."""
    max_seconds_per_case: float = 5.0
    """No further run of a case begins after this; there is at least one."""
    time_limit_s: float | None = None
    """No further case begins after this many seconds; what was left out is named."""
    compile_backend: str = "inductor"
    """Of torch.compile, for the implementation "compiled"."""
    num_threads: int | None = None
    """Of torch; None: `OMP_NUM_THREADS` if it is set, else the number of physical cores."""
    name: str | None = None
    """Of the results files; None: from the model."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shapes is None):
            raise ConfigError(f"give one of model and shapes; received model={self.model!r}, shapes={self.shapes!r}")
        if self.shapes not in (None, *SHAPES):
            raise ConfigError(f"shapes is {self.shapes!r}; expected one of {', '.join(SHAPES)}")
        for implementation in self.implementations:
            if implementation not in IMPLEMENTATIONS:
                raise ConfigError(
                    f"implementations holds {implementation!r}; expected some of {', '.join(IMPLEMENTATIONS)}"
                )
        for name in self.limits:
            if name not in self.implementations:
                raise ConfigError(f"limits holds {name!r}; implementations are {', '.join(self.implementations)}")
        for name in self.written_inputs or ():
            if name not in self.inputs:
                raise ConfigError(f"written_inputs holds {name!r}; inputs are {', '.join(self.inputs)}")
        for name in ("num_runs", "num_written_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.inputs or not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError("expected at least one input and batch sizes from 1")

    def allows(self, implementation: str, name: str, batch_size: int) -> bool:
        """Whether an implementation is measured for an input at a batch size."""
        own = self.inputs[name].batch_sizes
        return (own is None or batch_size in own) and self.limits.get(implementation, Limit()).allows(name, batch_size)

    @property
    def label(self) -> str:
        """How results call this model."""
        return self.name or self.shapes or Path(str(self.model)).name


def read_config(path: Path, changes: Mapping[str, Any] | None = None) -> LatencyConfig:
    """A configuration from YAML.

    Args:
        path: the file.
        changes: fields that replace its own.

    Raises:
        ConfigError: no such field, or a value that cannot be measured, named with the file.
    """
    try:
        path = find_config("eval", path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    given = {**given, **(changes or {})}
    known = [field.name for field in fields(LatencyConfig)]
    for name in given:
        if name not in known:
            remedy = did_you_mean(name, known, f"known are {', '.join(known)}")
            raise ConfigError(f"{path}: unknown field {name!r}; {remedy}")
    try:
        if "inputs" in given:
            given["inputs"] = {name: InputSize(**_tuples(size)) for name, size in given["inputs"].items()}
        if "limits" in given:
            given["limits"] = {name: Limit(**_tuples(limit)) for name, limit in given["limits"].items()}
        return LatencyConfig(**_tuples(given))
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
