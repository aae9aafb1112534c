"""The inference engine: the model's own weights and formulas, without what inference does not need.

`PlumeModel.forward` is the definition. The engine computes the same vectors

  * without asking the device anything on the way: lengths and places are known to the host before (`plume.plan`);
  * with rows packed without gaps in a cache of fixed size (`plume.static_cache`);
  * with layers in less than half of the operations (`plume.stack`, `plume.tower`);
  * and on a GPU as CUDA graphs: the whole rollout, all K passes and the suffix, is one launch;
  * of fused kernels, if they are asked for (`plume.fused`).

A graph has fixed shapes. Rows are filled up to a power of two; prefixes to one of four lengths per octave, caches
likewise from 512 slots on. Lengths within that are data, so that a rollout has few graphs. Vision towers are
captured for the sizes of images that come again. Work runs twice before it is captured, so that the first call of a
shape is slow; call the engine on a few batches like those to come. All graphs of an engine share one pool of memory for
intermediate results, since no two run at once. What is too large for launches to count, or for the memory that
graphs may hold, is launched directly at its own shape, and so is everything without a GPU.

Letters: B batch, L prefix length, D hidden size, K latent steps, S suffix length, m hidden states that are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, get_args

import torch
from torch import Tensor

from plume import backbone as seam
from plume import graphs, tokens
from plume.arguments import last_column
from plume.backbone import Segment
from plume.backends import Backend, choose
from plume.experts import together
from plume.kept import Kept
from plume.model import PlumeModel
from plume.output import PlumeOutput, unit
from plume.parts import UnsupportedModelError, text_parts, tower_parts
from plume.patches import from_bytes
from plume.plan import Plan, plan
from plume.projection import Int8Projection, Projection
from plume.rollout import Rollout, rollout
from plume.rooms import MOST_INPUT_BYTES, Pixels, Prefix, Room
from plume.sharing import SharedPrefixes
from plume.tower import Grid, Tower, segment_attention
from plume.weights import Weights

_LEAST_SLOTS = 512
_MOST_ROWS = 128


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
            model: in eval mode, on one device. What is learnt in place afterwards counts.
            backend: "graph" replays CUDA graphs; "eager" launches every operation; "auto" takes graphs on a GPU.
                "triton" is "graph" with fused kernels for the latent steps (`plume.fused`), whose results do not
                depend on the batch, to the bit, up to 64 rows of a pass. Where something is impossible it warns and
                takes the next simpler one.
            int8: products of backbone and vision tower in int8, on a CPU only: several times faster there, and not the
                same vectors (see eval/README.md for what it costs).
            exit_tolerance: a row stops reasoning at the first step that changes its state by at most this share of its
                norm; None never stops. `num_latent_steps` of the output says how many it took. Under graphs all
                steps run nevertheless, so that it saves time only without.
            dependent_launch: kernels of "triton" start while those before them end; needs compute capability 9.0, and
                else falls back like the rest.
            max_captured_tokens: prefixes of more tokens in all are launched directly.
            max_graphs: kept of each kind and, for prefixes and rollouts, each shape of cache; the least recently used
                ones go.
            max_cache_bytes: of keys and values that graphs hold.
            vision_cache_bytes: features of images that were seen before are kept in so much memory. Images are then
                seen one by one, so that what is kept is to the bit what is seen anew.
            prefix_cache_bytes: likewise what the prefixes hold up to their last image; see `plume.sharing`.

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
        self.model, self.exit_tolerance = model, exit_tolerance
        self._asked: Backend = backend
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

    @torch.inference_mode()
    def __call__(
        self,
        batch: dict[str, Any],
        num_latent_steps: int | Tensor | None = None,
        media_keys: Sequence[tuple[Sequence[str], Sequence[str]]] | None = None,
    ) -> PlumeOutput:
        """Embed a batch.

        Args:
            batch: tensors from the processor; on the CPU they spare the device a question.
            num_latent_steps: K, one number or one per row `[B]`; None: the configuration's.
            media_keys: of the images and of the videos of each row, for the caches, as `plume.content.media_keys`
                makes them; without them nothing is kept.

        Returns:
            `embedding`, `anchor_embedding`, `states`, `gates` and `num_latent_steps` as from `PlumeModel.forward`.

        Raises:
            ValueError: as `PlumeModel.forward`.
        """
        self.refresh()
        return self.run(plan(self.model, batch, num_latent_steps, media_keys=media_keys))

    @property
    def keeps_media(self) -> bool:
        """Whether a cache asks for the keys of media."""
        return bool(self._vision_cache_bytes or self._prefix_cache_bytes)

    @torch.inference_mode()
    def run(self, laid_out: Plan) -> PlumeOutput:
        """Embed a batch that is laid out, with the weights of the last `refresh`."""
        if self._weights.device != self.device:  # moved since, as `encode(device=...)` does
            self.refresh()
        shares = self.shared is not None and any(laid_out.prefix_keys)
        known = shares and self.shared.has_all(laid_out)  # type: ignore[union-attr]
        # The engine computes in the model's dtype, whatever autocast its caller is in.
        with graphs.on(self.device), torch.autocast(self.device.type, enabled=False):
            return self.reason(laid_out, None if known else self.see(laid_out))

    def refresh(self) -> None:
        """Take the model's weights anew if they have been moved or replaced; graphs are then captured again.

        What was learnt in place is in use already; what is remembered of the weights before it is forgotten.
        """
        if self.model.training:
            raise ValueError("the engine runs models in eval mode; call model.eval() first")
        is_same = self._weights.device == self.device and self._weights.are_same()
        if is_same and self._revision is not None and (revision := self._weights.revision()) != self._revision:
            self._revision, is_same = revision, not self._int8
            self._forget_media()
        if not is_same:
            with torch.inference_mode(False):  # else the model's own parameters could not be trained any more
                self._load()

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"plume: {text}", stacklevel=4)

    def _load(self) -> None:
        model, backbone = self.model, self.model.backbone
        self.device = model.device
        if self._int8 and self.device.type != "cpu":
            raise ValueError(f"int8 runs on a CPU only, and the model is on {self.device}; drop it or move the model")
        projection = Int8Projection if self._int8 else Projection
        self.transition = together(model.transition)
        #: What runs: "eager", "graph" or "triton".
        self.backend: Backend
        self.backend, self.stack, warning = choose(
            self._asked, text_parts(backbone), projection, self.transition, dependent_launch=self._dependent_launch
        )
        if warning:
            self._warn(warning)
        try:
            self.tower = Tower(tower_parts(backbone), projection)
        except UnsupportedModelError:  # another family's; transformers' own runs
            self.tower = None
        self._weights = Weights(model)
        self._revision = self._weights.revision() if self._int8 or self.keeps_media else None
        suffix = torch.tensor([model.config.suffix_ids])
        is_real = torch.ones_like(suffix).bool()
        self._read_out = int(last_column(suffix, is_real, model.config.read_out_token_id, tokens.READ_OUT))
        self._suffix_ids = suffix[0].to(self.device)
        self._forget_graphs()
        self._forget_media()

    def _forget_media(self) -> None:
        self._features: Kept[Tensor] = Kept(most_bytes=self._vision_cache_bytes, num_bytes=lambda one: one.nbytes)
        self.shared = SharedPrefixes(self.stack, self._prefix_cache_bytes) if self._prefix_cache_bytes else None

    @property
    def has_graphs(self) -> bool:
        """Whether work is captured."""
        return self.backend != "eager" and graphs.why_not(self.device) is None

    def _forget_graphs(self) -> None:
        self._pool = graphs.new_pool(self.device)
        self._rooms: Kept[Room] = Kept(self._max_graphs, self._max_cache_bytes, lambda room: room.cache.num_bytes)
        self._single_passes: Kept[Prefix] = Kept(self._max_graphs, MOST_INPUT_BYTES, attrgetter("num_bytes"))
        self._towers: Kept[Pixels] = Kept(self._max_graphs, MOST_INPUT_BYTES, attrgetter("num_bytes"))
        self._seen_sizes: Kept[bool] = Kept(16 * self._max_graphs)

    def see(self, laid_out: Plan) -> Tensor | None:
        """Features of the visual tokens of a batch, `[M, D]`; None without media."""
        if laid_out.patches is None or laid_out.grid is None:
            return None
        if not (self._vision_cache_bytes and laid_out.media_keys):
            return self._see(laid_out.patches, laid_out.grid)
        media = zip(laid_out.media_keys, laid_out.grid.split(laid_out.patches), strict=True)
        return torch.cat([self._features.get(key, lambda one=one: self._see(*one).clone()) for key, one in media])

    def _see(self, patches: Tensor, grid: Grid) -> Tensor:
        patches = patches.to(self.device, non_blocking=True)
        if patches.dtype == torch.uint8:
            assert self.model.processor is not None
            patches = from_bytes(patches, self.model.processor.layout())
        if self.tower is None:
            features = seam.see(self.model.backbone, patches, torch.tensor(grid.sizes, device=self.device)).images
            assert features is not None
            return features
        tower, lengths = self.tower, grid.lengths
        rotation = tower.rotation(grid)
        pixels = self._towers.find(lengths)
        if pixels is None:
            attend = segment_attention(lengths, self.stack.norm.dtype, self.device)
            # Sizes of images vary, and most do not come again: captured is what does.
            if not self._seen_sizes.find(lengths) or not self._captures(len(patches) // 4):
                self._seen_sizes.put(lengths, True)
                return tower(patches, rotation, attend)
            pixels = Pixels(patches, *rotation)
            own, cosine, sine = pixels.inputs
            pixels.launch = self.capture(lambda: tower(own, (cosine, sine), attend))
            self._towers.put(lengths, pixels)
        return pixels(patches, *rotation)

    def _captures(self, num_tokens: int) -> bool:
        return self.has_graphs and num_tokens <= self._max_captured_tokens

    def embed(self, laid_out: Plan, features: Tensor | None) -> Tensor:
        """Input embeddings of the prefixes with their vision features in place, `[B, L, D]`."""
        ids = laid_out.ids.to(self.device, non_blocking=True)
        embeds = seam.embed_tokens(self.model.backbone, ids)
        if features is not None:
            places = laid_out.places.to(self.device, non_blocking=True)
            embeds.flatten(end_dim=1).index_copy_(0, places, features.to(embeds.dtype))
        return embeds

    def read(self, laid_out: Plan, embeds: Tensor, room: Room | None = None) -> Tensor:
        """Read the prefixes, into a room if anything is to follow; hidden states at the plan's columns, `[B, m, D]`."""
        columns = laid_out.columns.to(self.device, non_blocking=True)
        positions = laid_out.positions.to(self.device, non_blocking=True)
        size, length = embeds.shape[:2]
        if self.shared is not None and any(laid_out.prefix_keys):
            room = room or Room(self.stack, size, length + 1)
            return self.shared.read(laid_out, embeds, room.cache.first(size))
        rows = power_of_two(size) if room is None else len(room.start)
        shape = rows, bucket(length), columns.shape[1]
        is_kept = rows <= _MOST_ROWS if room is None else room.is_kept
        if not is_kept or not self._captures(shape[0] * shape[1]):
            cache = None if room is None else room.cache.first(size)
            return self.stack.read_prefix(embeds, positions, columns, cache)
        kept = self._single_passes if room is None else room.prefixes
        prefix = kept.get(shape, lambda: self._new_prefix(*shape, room))
        return prefix(embeds, positions, columns)

    def room(self, num_rows: int, num_slots: int) -> Room:
        """Room for so many rows of so many tokens; under graphs one that is used again."""
        rows, slots = power_of_two(num_rows), max(_LEAST_SLOTS, bucket(num_slots + 1))
        parts = self.stack.parts
        per_slot = 2 * len(parts.layers) * parts.num_key_value_heads * parts.channels * self.stack.norm.itemsize
        if not self.has_graphs or rows > _MOST_ROWS or rows * slots * per_slot > self._max_cache_bytes:
            return Room(self.stack, num_rows, num_slots + 1)
        return self._rooms.get(
            (rows, slots), lambda: Room(self.stack, rows, slots, is_kept=True, max_graphs=self._max_graphs)
        )

    def reason(self, laid_out: Plan, features: Tensor | None) -> PlumeOutput:
        """Read the prefixes, take the latent steps and embed; features from `see`."""
        embeds = self.embed(laid_out, features)
        if laid_out.max_latent_steps == 0:
            read = self.read(laid_out, embeds)
            return PlumeOutput(
                embedding=unit(read[:, 2]),
                anchor_embedding=unit(read[:, 0]),
                states=read[:, 1:2].clone(),
                num_latent_steps=laid_out.num_latent_steps.to(self.device),
            )
        size, steps = len(embeds), laid_out.max_latent_steps
        room = self.room(size, embeds.shape[1] + steps + len(self._suffix_ids))
        launch = self.reasoning(room, steps)  # first, since it runs for capture on whatever the room holds
        room.furnish(laid_out, self.read(laid_out, embeds, room))
        result = launch()
        return PlumeOutput(
            embedding=unit(result.suffix[:size, self._read_out]),
            anchor_embedding=unit(result.anchor[:size]),
            states=result.states[:size].clone(),
            gates=None if result.gates is None else result.gates[:size].clone(),
            num_latent_steps=result.num_latent_steps[:size].clone(),
        )

    def reasoning(self, room: Room, steps: int) -> Callable[[], Rollout]:
        """What takes so many latent steps behind the prefixes in a room, and embeds; captured if the room comes again.

        It fills the room's cache further: `room.cache.lengths` must be set before it is called again.
        """

        def work() -> Rollout:
            size = len(room.start)
            suffix = seam.embed_tokens(self.model.backbone, self._suffix_ids.expand(size, -1))
            every = torch.ones(suffix.shape[:2], dtype=torch.bool, device=self.device)
            decoder, adapter = self.stack.decoder(
                room.cache, room.read, self.transition, looks_at_states=self.exit_tolerance is not None
            )
            return rollout(
                decoder,
                adapter,
                Segment(room.read, every[:, :2], room.start.expand(3, 2, -1).mT),
                suffix,
                every,
                num_latent_steps=room.num_latent_steps,
                max_latent_steps=steps,
                anchor_column=torch.zeros_like(room.start),
                start=room.start,
                router_context=self.model.config.router_context,
                exit_tolerance=self.exit_tolerance,
                ends_early=not room.is_kept,
            )

        if not room.is_kept:
            return work
        room.empty()
        return room.work.get(steps, lambda: self.capture(work))

    def _new_prefix(self, rows: int, length: int, num_columns: int, room: Room | None) -> Prefix:
        prefix = Prefix(self.stack, rows, length, num_columns)
        cache = None if room is None else room.cache
        prefix.launch = self.capture(
            lambda: self.stack.read_prefix(prefix.embeds, prefix.positions, prefix.columns, cache)
        )
        return prefix

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Capture work in the memory that all graphs of this engine share; see `plume.graphs.capture`.

        Where that fails everything is launched from now on, and a warning says why, once.
        """
        self.num_captures += 1
        try:
            return graphs.capture(work, self._pool)
        except RuntimeError as error:
            self._warn(f'backend="{self.backend}" falls back to "eager": {str(error).splitlines()[0]}')
            self.backend = "eager"
            self._forget_graphs()
            return work
