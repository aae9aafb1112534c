"""The inference engine: the model's own weights and formulas, without what inference does not need.

`PlumeModel.forward` is the definition. The engine computes the same vectors

  * without asking the device anything on the way: lengths and columns are known to the host (`plume.engine.layout`);
  * with rows packed without gaps in a cache of fixed size, and layers in less than half of the operations
    (`plume.engine.layers.text`, `plume.engine.layers.vision`);
  * on a GPU, as CUDA graphs: the whole rollout, all K passes and the suffix, is one launch;
  * with fused kernels, if they are requested (`plume.engine.fused.decoder`).

A graph has fixed shapes. Rows are filled up to a power of two; prefixes to one of four lengths per octave, caches
likewise from 512 slots on. Lengths within that are data, so that a rollout has few graphs. Vision towers are captured
for the sizes of images that come again. Work runs twice before it is captured, so that the first call of a shape is
slow; call the engine on a few batches like those to come. All graphs of an engine share one pool of memory for
intermediate results, since no two run at once. Batches so large that launches do not count, or that the memory for
graphs does not hold, run without a graph at their own shape, and so does everything without a GPU.

Letters: B batch, L prefix length, D hidden size, K latent steps, S suffix length, m hidden states that are read,
M visual tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, get_args

import torch
from torch import Tensor

from plume.engine import graphs
from plume.engine.backends import Backend, choose_backend
from plume.engine.buffers import MAX_INPUT_BYTES, PrefixBuffers, RolloutBuffers, VisionBuffers
from plume.engine.layers.text import JoinedInt8Linear, JoinedLinear
from plume.engine.layers.vision import Grid, VisionTower, segment_attention
from plume.engine.layers.weights import (
    BorrowedWeights,
    UnsupportedModelError,
    text_weights,
    vision_weights,
)
from plume.engine.layout import BatchLayout, MediaKeys, lay_out
from plume.engine.lru import LRUCache
from plume.engine.prefix_cache import PrefixCache
from plume.inputs.patches import from_bytes
from plume.model.backbone import vision_features
from plume.model.interface import Media, PlumeOutput, Segment, normalize, read_out_column
from plume.model.model import PlumeModel
from plume.model.rollout import Rollout, rollout
from plume.model.transition import scaled

_MIN_SLOTS = 512
_MAX_ROWS = 128


def bucket(length: int) -> int:
    """The next of four lengths per octave, at least 32.

    Example:
        >>> [bucket(length) for length in (1, 60, 300, 1300)]
        [32, 64, 320, 1536]
    """
    step = max(32, 1 << (length - 1).bit_length() >> 3)
    return -(-length // step) * step


def power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


class Engine:
    """Embeds batches of a model's processor.

    Example:
        >>> model = getfixture("model")
        >>> engine = Engine(model)
        >>> from plume import Item
        >>> batch = model.processor.encode([Item.parse("a red kite"), Item.parse("rain")])
        >>> output = engine(batch)
        >>> torch.allclose(output.embedding, model(**batch).embedding, atol=1e-5)
        True
    """

    def __init__(
        self,
        model: PlumeModel,
        *,
        backend: Backend = "auto",
        int8: bool = False,
        exit_tolerance: float | None = None,
        dependent_launch: bool = False,
        max_captured_tokens: int = 8192,
        max_graphs: int = 256,
        max_cache_bytes: int = 8 << 30,
        vision_cache_bytes: int = 0,
        prefix_cache_bytes: int = 0,
    ):
        """Prepare a model; its weights are shared, not copied.

        Args:
            model: in eval mode, on one device. Later changes of its weights in place take effect.
            backend: "graph" replays CUDA graphs; "eager" launches every operation. "triton" is "graph" with fused
                kernels for the latent steps (`plume.engine.fused.decoder`), whose results do not depend on the
                batch, to the bit, up to 64 rows of a pass. Where something is impossible it warns and takes the next
                simpler one. "auto" takes kernels in bfloat16 on devices for which they have been tuned (an H200 so
                far), graphs on other GPUs.
            int8: products of backbone and vision tower in int8, on a CPU only: several times faster there, and not the
                same vectors (see eval/README.md for what it costs).
            exit_tolerance: a row stops reasoning at the first step that changes its state by at most this share of its
                norm; None never stops. `num_latent_steps` of the output says how many it took. Under graphs all
                steps run nevertheless, so that it saves time only without.
            dependent_launch: kernels of "triton" start while those before them end; needs compute capability 9.0, and
                else falls back like the rest.
            max_captured_tokens: prefixes of more tokens in all are launched directly.
            max_graphs: of each kind and, for prefixes and rollouts, of each shape of cache; the least recently used
                ones are dropped.
            max_cache_bytes: of keys and values that graphs hold.
            vision_cache_bytes: memory for the features of images that come again. The tower then runs image by image,
                so that cached features equal fresh ones to the bit.
            prefix_cache_bytes: memory for what prefixes hold up to their last image; see `plume.engine.prefix_cache`.

        Raises:
            ValueError: an argument that cannot be honoured.
            UnsupportedModelError: a model that the engine has not been written for.
        """
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; received {backend!r}")
        if dependent_launch and backend != "triton":
            raise ValueError(f'dependent_launch belongs to backend="triton"; received backend={backend!r}')
        if exit_tolerance is not None and not exit_tolerance >= 0:
            raise ValueError(f"exit_tolerance must be at least 0; received {exit_tolerance}")
        if exit_tolerance is not None and model.config.latents == "parallel":
            raise ValueError("exit_tolerance is for sequential latents; this checkpoint's are parallel; drop it")
        self.model, self.exit_tolerance = model, exit_tolerance
        self._requested: Backend = backend
        self._int8, self._dependent_launch = int8, dependent_launch
        self._max_captured_tokens, self._max_graphs, self._max_cache_bytes = (
            max_captured_tokens,
            max_graphs,
            max_cache_bytes,
        )
        self._vision_cache_bytes, self._prefix_cache_bytes = vision_cache_bytes, prefix_cache_bytes
        self._warned: set[str] = set()
        #: Graphs captured so far; it stands still once the shapes of the work have been seen.
        self.num_captures = 0
        self._load()

    def __call__(
        self,
        batch: Mapping[str, Any],
        num_latent_steps: int | Tensor | None = None,
        media_keys: MediaKeys | None = None,
    ) -> PlumeOutput:
        """Embed a batch.

        Args:
            batch: tensors from the processor; on the CPU, since others are copied there and the GPU waits.
            num_latent_steps: K, one number or one per row `[B]`; None: the configuration's, or 0 where a gate says so.
            media_keys: of the images and of the videos of each row, for the caches, as
                `plume.embedder.digests.media_keys` makes them; without them nothing is cached.

        Returns:
            `embedding`, `anchor_embedding`, `states`, `gates` and `num_latent_steps` as from `PlumeModel.forward`.

        Raises:
            ValueError: as `PlumeModel.forward`.
        """
        self.refresh()
        return self.run(lay_out(self.model, batch, num_latent_steps, media_keys=media_keys))

    def run(self, layout: BatchLayout) -> PlumeOutput:
        """Embed a batch that is laid out, with the weights of the last `refresh`."""
        with torch.inference_mode():
            if self._weights.device != self.device:  # moved since, as `encode(device=...)` does
                self.refresh()
            # The engine computes in the model's dtype, whatever autocast its caller is in.
            with self.on_device(), torch.autocast(self.device.type, enabled=False):
                needs_vision = not (self._shares_prefixes(layout) and self.prefix_cache.has_all(layout))
                output = self.embed(layout, self.vision_features(layout) if needs_vision else None)
        if not torch.is_inference_mode_enabled():  # a caller may train something on the vectors
            output = PlumeOutput(**{name: value.clone() for name, value in output.items()})
        return output

    def vision_features(self, layout: BatchLayout) -> Tensor | None:
        """Features of the visual tokens of a batch, `[M, D]`; None without media."""
        media = layout.media
        if media.patches is None or media.grid is None:
            return None
        if not (self._vision_cache_bytes and media.keys):
            return self._run_tower(media.patches, media.grid)
        return torch.cat(
            [
                self._features.get_or_make(key, lambda medium=medium: self._run_tower(*medium).clone())
                for key, medium in zip(media.keys, media.grid.split(media.patches), strict=True)
            ]
        )

    def embed(self, layout: BatchLayout, features: Tensor | None) -> PlumeOutput:
        """Read the prefixes, take the latent steps and embed; features from `vision_features`."""
        embeds = self.embed_prefix(layout, features)
        if layout.is_one_pass:
            states, steps = self.read_prefix(layout, embeds), layout.num_latent_steps.to(self.device)
            is_own_state = torch.arange(layout.max_latent_steps + 1, device=self.device) <= steps[:, None]
            return PlumeOutput(
                embedding=normalize(states[:, -1]),
                anchor_embedding=normalize(states[:, 0]),
                states=states[:, 1:-1].masked_fill(~is_own_state[..., None], 0),
                num_latent_steps=steps,
            )
        size, steps = len(embeds), layout.max_latent_steps
        buffers = self.rollout_buffers(size, embeds.shape[1] + steps + len(self._suffix_ids))
        # First, since it runs for capture on whatever they hold.
        launch = self.rollout_launcher(buffers, steps, layout.is_gated)
        buffers.fill(layout, self.read_prefix(layout, embeds, buffers))
        result = launch()
        return PlumeOutput(
            embedding=normalize(result.suffix[:size, self._read_out]),
            anchor_embedding=normalize(result.anchor[:size]),
            states=result.states[:size].clone(),
            gates=None if result.gates is None else result.gates[:size].clone(),
            num_latent_steps=result.num_latent_steps[:size].clone(),
        )

    def embed_prefix(self, layout: BatchLayout, features: Tensor | None) -> Tensor:
        """Input embeddings of what is read first, vision features and known latent inputs in place, `[B, L, D]`."""
        ids = layout.ids.to(self.device, non_blocking=True)
        embeds = self.layers.embed_tokens(ids)
        if features is not None:
            columns = layout.media.columns.to(self.device, non_blocking=True)
            embeds.flatten(end_dim=1).index_copy_(0, columns, features.to(embeds.dtype))
        if self.model.latent_inputs is not None and layout.is_one_pass:
            inputs = self.model.latent_inputs(layout.latent_steps.to(self.device, non_blocking=True))
            columns = layout.latent_columns.to(self.device, non_blocking=True)
            embeds.flatten(end_dim=1).index_copy_(0, columns, inputs)
        return embeds

    def read_prefix(self, layout: BatchLayout, embeds: Tensor, buffers: RolloutBuffers | None = None) -> Tensor:
        """Read the prefixes, into buffers if anything follows; hidden states at the layout's columns, `[B, m, D]`."""
        columns = layout.columns.to(self.device, non_blocking=True)
        positions = layout.positions.to(self.device, non_blocking=True)
        size, length = embeds.shape[:2]
        if self._shares_prefixes(layout):
            buffers = buffers or RolloutBuffers(self.layers, size, length + 1)
            return self.prefix_cache.read(layout, embeds, buffers.cache.first(size))
        rows = power_of_two(size) if buffers is None else len(buffers.start)
        shape = rows, bucket(length), columns.shape[1]
        is_reused = rows <= _MAX_ROWS if buffers is None else buffers.is_reused
        if not is_reused or not self._captures(shape[0] * shape[1]):
            cache = None if buffers is None else buffers.cache.first(size)
            return self.layers.read_prefix(embeds, positions, columns, cache)
        graphs_of_prefixes = self._single_passes if buffers is None else buffers.prefixes
        launch = graphs_of_prefixes.get_or_make(shape, lambda: self._captured_prefix(*shape, buffers))
        return launch(embeds, positions, columns)

    def rollout_buffers(self, num_rows: int, num_slots: int) -> RolloutBuffers:
        """Buffers for so many rows of so many tokens; under graphs those of an earlier batch."""
        rows, slots = power_of_two(num_rows), max(_MIN_SLOTS, bucket(num_slots + 1))
        weights = self.layers.weights
        per_slot = 2 * len(weights.layers) * weights.num_key_value_heads * weights.channels * self.layers.norm.itemsize
        if not self.has_graphs or rows > _MAX_ROWS or rows * slots * per_slot > self._max_cache_bytes:
            return RolloutBuffers(self.layers, num_rows, num_slots + 1)
        return self._buffers.get_or_make(
            (rows, slots), lambda: RolloutBuffers(self.layers, rows, slots, max_graphs=self._max_graphs)
        )

    def rollout_launcher(self, buffers: RolloutBuffers, steps: int, is_gated: bool = False) -> Callable[[], Rollout]:
        """A function that takes latent steps behind the prefixes in some buffers, and embeds.

        It is captured if the buffers are reused. It fills the cache further: set `buffers.cache.lengths` before it is
        called again.
        """

        def roll_out() -> Rollout:
            suffix = self.layers.embed_tokens(self._suffix_ids.expand(len(buffers.start), -1))
            is_real = torch.ones(suffix.shape[:2], dtype=torch.bool, device=self.device)
            return rollout(
                self.layers.decoder(buffers.cache, buffers.prefix_states),
                self.adapter,
                Segment(buffers.prefix_states, is_real[:, :2], buffers.start.expand(3, 2, -1).mT),
                suffix,
                is_real,
                num_latent_steps=buffers.num_latent_steps,
                max_latent_steps=steps,
                anchor_column=torch.zeros_like(buffers.start),
                start=buffers.start,
                router_context=self.model.config.router_context,
                latent_inputs=self.model.embed_latents(steps),
                refinements=self.model.config.refinements,
                gate=self.model.thinks if is_gated else None,
                exit_tolerance=self.exit_tolerance,
                ends_early=not buffers.is_reused,
            )

        if not buffers.is_reused:
            return roll_out
        buffers.reset()
        return buffers.graphs.get_or_make((steps, is_gated), lambda: self.capture(roll_out))

    def on_device(self) -> AbstractContextManager:
        """Makes the model's GPU the one that streams and graphs belong to."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @property
    def caches_media(self) -> bool:
        """Whether a cache asks for the keys of media."""
        return bool(self._vision_cache_bytes or self._prefix_cache_bytes)

    @property
    def has_graphs(self) -> bool:
        """Whether work is captured."""
        return self.backend != "eager" and graphs.unsupported_reason(self.device) is None

    def refresh(self) -> None:
        """Take the model's weights anew if they have been moved or replaced; graphs are then captured again.

        Changes in place are in use already; results of the weights before them are dropped from the caches.
        """
        if self.model.training:
            raise ValueError("the engine runs models in eval mode; call model.eval() first")
        is_same = self._weights.device == self.device and self._weights.are_same()
        if is_same and self._revision is not None and (revision := self._weights.revision()) != self._revision:
            self._revision, is_same = revision, not self._int8
            self._clear_media_caches()
        if not is_same:
            with torch.inference_mode(False):  # else the model's own parameters could not be trained any more
                self._load()

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Capture work in the memory that all graphs of this engine share; see `plume.engine.graphs.capture`.

        Where that fails everything is launched directly from now on, and a warning says why, once.
        """
        self.num_captures += 1
        try:
            return graphs.capture(work, self._pool)
        except RuntimeError as error:
            self._warn(f'backend="{self.backend}" falls back to "eager": {str(error).splitlines()[0]}')
            self.backend = "eager"
            self._clear_graphs()
            return work

    def _load(self) -> None:
        model, backbone = self.model, self.model.backbone
        if len(devices := {parameter.device for parameter in model.parameters()}) > 1:
            raise UnsupportedModelError(f"its weights are on several devices ({', '.join(sorted(map(str, devices)))})")
        self.device = model.device
        if self.device.type == "meta":
            raise UnsupportedModelError("its weights are offloaded")
        if self._int8 and self.device.type != "cpu":
            raise ValueError(f"int8 runs on a CPU only, and the model is on {self.device}; drop it or move the model")
        linear = JoinedInt8Linear if self._int8 else JoinedLinear
        choice = choose_backend(
            self._requested,
            text_weights(backbone),
            model.transition,
            linear=linear,
            dependent_launch=self._dependent_launch,
        )
        #: What runs: "eager", "graph" or "triton".
        self.backend: Backend = choice.name
        norm = model.latent_norm
        self.layers, self.adapter = choice.layers, choice.adapter if norm is None else scaled(choice.adapter, norm)
        if choice.warning:
            self._warn(choice.warning)
        try:
            self.tower = VisionTower(vision_weights(backbone), linear)
        except UnsupportedModelError:  # another family's; transformers' own runs
            self.tower = None
        self._weights = BorrowedWeights(model)
        self._revision = self._weights.revision() if self._int8 or self.caches_media else None
        suffix = torch.tensor([model.config.suffix_ids])
        self._read_out = int(read_out_column(model.config, suffix, torch.ones_like(suffix).bool()))
        self._suffix_ids = suffix[0].to(self.device)
        self._clear_graphs()
        self._clear_media_caches()

    def _clear_media_caches(self) -> None:
        self._features: LRUCache[Tensor] = LRUCache(max_bytes=self._vision_cache_bytes, size_of=attrgetter("nbytes"))
        self.prefix_cache = PrefixCache(self.layers, self._prefix_cache_bytes)

    def _clear_graphs(self) -> None:
        self._pool = graphs.new_pool(self.device)
        self._buffers: LRUCache[RolloutBuffers] = LRUCache(
            self._max_graphs, self._max_cache_bytes, attrgetter("cache.num_bytes")
        )
        self._single_passes: LRUCache[PrefixBuffers] = LRUCache(
            self._max_graphs, MAX_INPUT_BYTES, attrgetter("num_bytes")
        )
        self._towers: LRUCache[VisionBuffers] = LRUCache(self._max_graphs, MAX_INPUT_BYTES, attrgetter("num_bytes"))
        self._seen_sizes: LRUCache[bool] = LRUCache(16 * self._max_graphs)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"plume: {text}", stacklevel=4)

    def _shares_prefixes(self, layout: BatchLayout) -> bool:
        return bool(self._prefix_cache_bytes) and any(layout.media.prefix_keys)

    def _captures(self, num_tokens: int) -> bool:
        return self.has_graphs and num_tokens <= self._max_captured_tokens

    def _run_tower(self, patches: Tensor, grid: Grid) -> Tensor:
        patches = patches.to(self.device, non_blocking=True)
        if patches.dtype == torch.uint8:
            assert self.model.processor is not None
            patches = from_bytes(patches, self.model.processor.patch_format())
        if self.tower is None:
            media = Media(patches, torch.tensor(grid.sizes, device=self.device))
            features = vision_features(self.model.backbone, media).images
            assert features is not None
            return features
        tower, lengths = self.tower, grid.lengths
        rotation = tower.rotation(grid)
        if not self._captures(len(patches) // tower.weights.merge**2):
            return tower(patches, rotation, segment_attention(lengths, self.layers.norm.dtype, self.device))
        if (buffers := self._towers.get(lengths)) is None:
            attend = segment_attention(lengths, self.layers.norm.dtype, self.device)
            if not self._seen_sizes.get(lengths):  # most sizes of images do not come again; those that do are captured
                self._seen_sizes.put(lengths, True)
                return tower(patches, rotation, attend)
            buffers = VisionBuffers(patches, *rotation)
            inputs, cosine, sine = buffers.inputs
            buffers.launch = self.capture(lambda: tower(inputs, (cosine, sine), attend))
            self._towers.put(lengths, buffers)
        return buffers(patches, *rotation)

    def _captured_prefix(
        self, rows: int, length: int, num_columns: int, buffers: RolloutBuffers | None
    ) -> PrefixBuffers:
        prefix = PrefixBuffers(self.layers, rows, length, num_columns)
        cache = None if buffers is None else buffers.cache
        prefix.launch = self.capture(
            lambda: self.layers.read_prefix(prefix.embeds, prefix.positions, prefix.columns, cache)
        )
        return prefix
