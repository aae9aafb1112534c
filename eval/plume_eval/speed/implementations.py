"""The implementations that are compared, behind one interface: the same model, inputs and vectors.

reference      published style: one input at a time, see `plume_eval.speed.reference`
transformers   `PlumeModel.forward`: batched, transformers' layers, launched one by one
compiled       the same over transformers' static cache, the language model in torch.compile
eager          plume's engine, launched one by one
graph          plume's engine, replayed as CUDA graphs
triton         the same with fused kernels for latent steps and written tokens
dependent      the same with kernels that start while those before them end
int8           plume's engine with products in int8 (CPU)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from transformers import StaticCache

from plume.engine.engine import Engine
from plume.engine.layout import BatchLayout, lay_out
from plume.inputs.item import Item
from plume.model.backbone import vision_features
from plume.model.interface import Decoder, Media, Segment, normalize, read_out_column
from plume.model.model import PlumeModel
from plume.model.positions import latent_positions
from plume_eval.baselines import embed_batch
from plume_eval.speed.config import ImplementationName, LatencyConfig
from plume_eval.speed.reference import embed_one, write_one
from plume_eval.speed.writing import Writer

Batch = dict[str, Tensor]

#: Implementations that replay CUDA graphs.
IN_GRAPHS: tuple[ImplementationName, ...] = ("graph", "triton", "dependent")


class ImplementationError(RuntimeError):
    """An implementation that cannot run what its name says."""


class Implementation:
    """One implementation of a model."""

    def __init__(self, model: PlumeModel):
        self.model = model

    def prepare(self, items: Sequence[Item]) -> list[Batch]:
        """Tensors of some inputs, on the CPU, in the batches in which they are run."""
        assert self.model.processor is not None
        return [dict(self.model.processor.encode(items))]

    def embed(self, batches: list[Batch], num_latent_steps: int) -> Tensor:
        """Embeddings on the CPU, `[B, D]`."""
        return torch.cat([self._embed(batch, num_latent_steps).cpu() for batch in batches])

    def write(self, batches: list[Batch], num_tokens: int, *, stops: bool) -> tuple[Tensor, int]:
        """Embeddings after a written rationale, on the CPU, `[B, D]`; and the most tokens that a row has."""
        parts = [self._write(batch, num_tokens, stops) for batch in batches]
        return torch.cat([embedding.cpu() for embedding, _ in parts]), max(count for _, count in parts)

    @torch.inference_mode()
    def run_vision(self, batches: list[Batch]) -> None:
        """Run the vision tower alone."""
        for batch in batches:
            vision_features(self.model.backbone, Media.of(self._on_device(batch)))

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def _embed(self, batch: Batch, num_latent_steps: int) -> Tensor:
        raise NotImplementedError

    def _write(self, batch: Batch, num_tokens: int, stops: bool) -> tuple[Tensor, int]:
        raise NotImplementedError


class Reference(Implementation):
    """See `plume_eval.speed.reference`."""

    def prepare(self, items: Sequence[Item]) -> list[Batch]:
        return [batch for item in items for batch in super(Reference, self).prepare([item])]

    def _embed(self, batch: Batch, num_latent_steps: int) -> Tensor:
        return embed_one(self.model, self._on_device(batch), num_latent_steps)

    def _write(self, batch: Batch, num_tokens: int, stops: bool) -> tuple[Tensor, int]:
        return write_one(self.model, self._on_device(batch), num_tokens, stops)


class Transformers(Implementation):
    """`PlumeModel.forward`."""

    def _embed(self, batch: Batch, num_latent_steps: int) -> Tensor:
        mode = "latent" if num_latent_steps else "single_pass"
        return embed_batch(
            self.model, self._on_device(batch), mode, num_latent_steps=num_latent_steps or None
        ).embedding

    def _write(self, batch: Batch, num_tokens: int, stops: bool) -> tuple[Tensor, int]:
        embedded = embed_batch(self.model, self._on_device(batch), "explicit", max_new_tokens=num_tokens, stops=stops)
        return embedded.embedding, int(embedded.num_reasoning_steps.max())


class InEngine(Implementation):
    """plume's engine."""

    def __init__(self, model: PlumeModel, **settings: Any):
        super().__init__(model)
        self.engine = Engine(model, **settings)
        self._backend = settings.get("backend", self.engine.backend)
        self.writer = Writer(self.engine)
        self._layouts: tuple[list[Batch], list[BatchLayout]] | None = None

    def _check_backend(self) -> None:
        # An engine that cannot honour a request takes something simpler, which must not be timed under its name.
        if self.engine.backend != self._backend:
            raise ImplementationError(
                f"{self._backend} could not be run: the engine fell back to {self.engine.backend}"
            )

    def _embed(self, batch: Batch, num_latent_steps: int) -> Tensor:
        embedding = self.engine(batch, num_latent_steps).embedding
        assert embedding is not None
        self._check_backend()
        return embedding

    def _write(self, batch: Batch, num_tokens: int, stops: bool) -> tuple[Tensor, int]:
        embedding, count = self.writer(batch, num_tokens, stops=stops)
        self._check_backend()
        return embedding, int(count.max())

    @torch.inference_mode()
    def run_vision(self, batches: list[Batch]) -> None:
        if self._layouts is None or self._layouts[0] is not batches:  # laying out is no part of the tower's time
            self._layouts = batches, [lay_out(self.model, batch, 0) for batch in batches]
        with self.engine.on_device():
            for layout in self._layouts[1]:
                self.engine.vision_features(layout)


class _StaticDecoder(Decoder):
    """transformers' text model over its static cache; what follows the prefix goes through `run`."""

    def __init__(self, text_model: Any, run: Any, cache: StaticCache, num_slots: int):
        self.text_model, self.run, self.cache, self.num_slots = text_model, run, cache, num_slots
        self.mask: Tensor | None = None

    def feed(self, segment: Segment, *, with_layers: bool = False) -> Tensor:
        run = self.run
        if self.mask is None:  # slots that are not filled yet lie in the future, which the causal mask hides
            free = segment.mask.new_ones(len(segment.mask), self.num_slots - len(segment))
            self.mask = torch.cat([segment.mask, free], dim=1).long()
            run = self.text_model
        hidden = run(
            inputs_embeds=segment.embeds,
            attention_mask=self.mask,
            position_ids=segment.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden.clone()  # the next run of a compiled graph writes to the same memory

    def forget(self, segment: Segment) -> None:
        raise ImplementationError("the static cache cannot be cut back, as refinements of parallel latents need")


class Compiled(Implementation):
    """transformers' layers over its static cache, compiled; the prefix and the vision tower are not."""

    def __init__(self, model: PlumeModel, backend: str, num_new: int):
        """Prepare.

        Args:
            model: the model.
            backend: of torch.compile.
            num_new: tokens behind a prefix at most. All calls take a cache with that much room, so that each batch size
                and prefix length is compiled for twice: one new token, and the suffix.
        """
        super().__init__(model)
        self._num_new = num_new
        text_model = model.backbone.language_model
        # Beyond its limit torch.compile runs what it was given uncompiled, under the name of the compiled.
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 256, True
        mode = "reduce-overhead" if backend == "inductor" and model.device.type == "cuda" else None
        self._run = torch.compile(text_model, backend=backend, dynamic=False, mode=mode)
        self._caches: dict[tuple[int, int], StaticCache] = {}

    def _decoder(self, num_rows: int, length: int) -> _StaticDecoder:
        num_slots = -(-(length + self._num_new) // 128) * 128
        text_model = self.model.backbone.language_model
        key = num_rows, num_slots
        if key not in self._caches:
            self._caches[key] = StaticCache(config=text_model.config, max_cache_len=num_slots)
        self._caches[key].reset()
        return _StaticDecoder(text_model, self._run, self._caches[key], num_slots)

    @torch.inference_mode()
    def _embed(self, batch: Batch, num_latent_steps: int) -> Tensor:
        model = self.model
        inputs = model.read_inputs(self._on_device(batch), num_latent_steps=num_latent_steps)
        decoder = self._decoder(len(inputs.prefix_ids), inputs.prefix_ids.shape[1])
        _, result = model.roll_out(inputs, decoder=decoder)
        column = read_out_column(model.config, inputs.suffix_ids, inputs.suffix_mask)
        return normalize(result.suffix[torch.arange(len(column), device=column.device), column])

    @torch.inference_mode()
    def _write(self, batch: Batch, num_tokens: int, stops: bool) -> tuple[Tensor, int]:
        model = self.model
        prefix, start = model.embed_prefix(model.read_inputs(self._on_device(batch)))
        decoder = self._decoder(len(start), len(prefix))
        decoder.feed(prefix)
        token = torch.full_like(start, model.config.latent_end_token_id or 0)
        is_writing = torch.ones_like(start).bool()
        is_real = is_writing[:, None]
        embedding, count = None, torch.zeros_like(token)
        for written in range(num_tokens + 1):
            segment = Segment(model.embed_tokens(token[:, None]), is_real, latent_positions(start, written))
            hidden = decoder.feed(segment)[:, 0]
            embedding = hidden if embedding is None else torch.where(is_writing[:, None], hidden, embedding)
            if written:
                is_writing = is_writing & ~((token == model.config.read_out_token_id) & stops)
                count += is_writing
                if stops and not is_writing.any():
                    break
            token = model.logits(hidden).argmax(dim=-1)
        assert embedding is not None
        return normalize(embedding), int(count.max())


def build(name: ImplementationName, model: PlumeModel, config: LatencyConfig) -> Implementation:
    """An implementation by its name.

    Raises:
        ValueError: the device cannot run it.
    """
    if name in IN_GRAPHS and model.device.type != "cuda":
        raise ValueError(f"{name} needs a CUDA device")
    if name == "reference":
        return Reference(model)
    if name == "transformers":
        return Transformers(model)
    if name == "compiled":
        suffix = len(model.config.suffix_ids or ())
        most = max(config.num_written_tokens + 1, max(*config.num_latent_steps, config.main_steps) + suffix)
        return Compiled(model, config.compile_backend, most)
    if name == "int8":
        return InEngine(model, int8=True)
    if name == "dependent":
        return InEngine(model, backend="triton", dependent_launch=True)
    return InEngine(model, backend=name)
