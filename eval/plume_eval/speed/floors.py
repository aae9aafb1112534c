"""What physics allows: time at the device's measured bandwidth and arithmetic rate, without launches and waiting.

A pass over n positions of B rows must at least read every weight once and compute 2 operations per weight and position:

    floor = max(bytes / bandwidth, operations / rate)

Bandwidth is that of a copy (bytes read and written), the rate that of a product of two large matrices, both measured
when the run starts, on random data. Attention counts 4 D operations per pair of positions, and its keys and values.

Letters: B batch, D hidden size, L prefix length, K latent steps, S suffix length, T written tokens, N patches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from plume.model.backbone import is_tied
from plume.model.model import PlumeModel
from plume.model.transition import MixtureOfExperts


@dataclass(frozen=True)
class Device:
    """bytes_per_s: of a copy, read and written. operations_per_s: of a matrix product in the model's dtype."""

    bytes_per_s: float
    operations_per_s: float

    def ms(self, num_bytes: float, operations: float) -> float:
        """The least time that this much work takes, in milliseconds."""
        return 1000 * max(num_bytes / self.bytes_per_s, operations / self.operations_per_s)


def measure_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Measure copy bandwidth and matrix rate; a few seconds."""
    is_gpu = device.type == "cuda"
    source = torch.randn((1 << 28) if is_gpu else (1 << 25), device=device)  # 1 GiB; 128 MiB
    target = torch.empty_like(source)
    side = 8192 if is_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copied = _seconds(lambda: target.copy_(source), is_gpu)
    multiplied = _seconds(lambda: a @ b, is_gpu)
    return Device(2 * source.nbytes / copied, 2 * side**3 / multiplied)


def _seconds(work: Callable[[], object], is_gpu: bool) -> float:
    times = []
    for run in range(8):
        begin = time.perf_counter()
        work()
        if is_gpu:
            torch.cuda.synchronize()
        if run >= 3:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


@dataclass(frozen=True)
class Work:
    """Sizes of a model, of which bytes and operations follow; counts are parameters."""

    text: int
    head: int
    expert: int
    num_experts: int
    top_k: int
    has_shared_expert: bool
    vision: int
    merger: int
    patches_per_token: int
    hidden_size: int
    num_layers: int
    cached_per_token: int
    vision_width: int
    vision_depth: int
    bytes_per_number: int

    @classmethod
    def of(cls, model: PlumeModel) -> Work:
        """The sizes of a model."""
        config, backbone, adapter = model.backbone.config.get_text_config(), model.backbone, model.transition
        routed = isinstance(adapter, MixtureOfExperts)
        channels = config.hidden_size // config.num_attention_heads
        vision = backbone.config.vision_config
        head = model.lm_head.weight if model.lm_head is not None else backbone.get_input_embeddings().weight
        assert model.lm_head is not None or is_tied(backbone.config)
        return cls(
            text=_count(backbone.language_model.layers),
            head=head.numel(),
            expert=_count(adapter.experts[0]) if routed else _count(adapter),
            num_experts=model.config.num_experts if routed else 0,
            top_k=model.config.top_k if routed else 0,
            has_shared_expert=not routed or adapter.shared_expert is not None,
            vision=_count(backbone.visual) - _count(backbone.visual.merger),
            merger=_count(backbone.visual.merger),
            patches_per_token=backbone.visual.spatial_merge_size**2,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            cached_per_token=2 * config.num_hidden_layers * config.num_key_value_heads * channels,
            vision_width=getattr(vision, "embed_dim", vision.hidden_size),
            vision_depth=vision.depth,
            bytes_per_number=next(backbone.parameters()).element_size(),
        )

    def vision_ms(self, device: Device, lengths: tuple[int, ...]) -> float:
        """Tower over images of so many patches each."""
        attention = 4 * self.vision_width * self.vision_depth * sum(length**2 for length in lengths)
        products = 2 * (self.vision + self.merger / self.patches_per_token) * sum(lengths)
        return device.ms((self.vision + self.merger) * self.bytes_per_number, products + attention)

    def prefill_ms(self, device: Device, num_rows: int, num_tokens: int) -> float:
        """Prefix (and suffix) of B rows of so many tokens, causal."""
        attention = 2 * self.hidden_size * self.num_layers * num_tokens**2
        return device.ms(self.text * self.bytes_per_number, num_rows * (2 * self.text * num_tokens + attention))

    def pass_ms(
        self, device: Device, num_rows: int, num_cached: float, num_new: int = 1, *, adapter: bool, head: bool
    ) -> float:
        """A pass over `num_new` positions of each row behind `num_cached` ones, with adapter or output head."""
        used = self.has_shared_expert + min(self.num_experts, num_rows * self.top_k) if adapter else 0
        weights = self.text + used * self.expert + (self.head if head else 0)
        per_row = self.text + (self.has_shared_expert + self.top_k) * self.expert * adapter + self.head * head
        cached = num_rows * num_cached * self.cached_per_token
        attention = 4 * self.hidden_size * self.num_layers * num_cached * num_new
        operations = num_rows * (2 * per_row * num_new + attention)
        return device.ms((weights + cached) * self.bytes_per_number, operations)

    def rollout_ms(self, device: Device, num_rows: int, num_cached: int, num_steps: int, num_suffix: int) -> float:
        """K passes, the last of them with the suffix; K = 0 adds nothing to the prefill."""
        passes = [
            self.pass_ms(
                device, num_rows, num_cached + step, 1 + num_suffix * (step == num_steps - 1), adapter=True, head=False
            )
            for step in range(num_steps)
        ]
        return sum(passes)

    def writing_ms(self, device: Device, num_rows: int, num_cached: int, num_tokens: int) -> float:
        """T tokens, one pass each."""
        middle = num_cached + num_tokens / 2
        return num_tokens * self.pass_ms(device, num_rows, middle, adapter=False, head=True)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
