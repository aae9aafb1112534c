"""Who embeds: plume in each of its modes, or a model of others by the prompts that its authors document.

An embedder takes contents and says for which side they are. What cannot be embedded gets a row of NaN and a reason; it
stops nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from PIL import Image

from plume import Plume
from plume.embedder.encode import SkippedInputsWarning, plan_batches
from plume.inputs.item import Item
from plume_eval.baselines import embed_batch
from plume_eval.mmeb.content import Content
from plume_eval.mmeb.vectors import EmbeddedShard

Side = Literal["query", "document"]
Mode = Literal["latent", "single_pass", "explicit", "anchor"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Embedder(Protocol):
    """What the harness asks of a model.

    name: of the folders of its vectors and results. settings: whatever changes vectors, plain data; weights are told by
    their fingerprint. runs_with: what else a reader of results should know. dimension: numbers of a vector.
    """

    name: str
    settings: Mapping[str, Any]
    runs_with: Mapping[str, Any]
    dimension: int

    def embed(self, contents: Sequence[Content], side: Side) -> EmbeddedShard:
        """Vectors of some contents, in their order."""
        ...


class PlumeEmbedder:
    """A plume checkpoint: latent steps, a single pass, a written rationale, or the anchor."""

    def __init__(
        self,
        model: str,
        *,
        mode: Mode = "latent",
        num_latent_steps: int | None = None,
        document_latent_steps: int | None = None,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        max_tokens_per_batch: int = 32_768,
        **kwargs: Any,
    ):
        """Open it.

        Args:
            model: a folder or a Hub name.
            mode: "latent" takes K steps, "single_pass" none, "explicit" writes a rationale until `<gen_emb>`, and
                "anchor" reads the anchor in place of the embedding, without steps.
            num_latent_steps: K of the mode "latent"; None is the checkpoint's own, for queries as its gate decides
                where it has one.
            document_latent_steps: K of candidates; None is the checkpoint's own, or that of queries.
            max_new_tokens: limit of a rationale.
            batch_size: inputs per pass at most.
            max_tokens_per_batch: tokens per pass at most, padding included.
            kwargs: as for `Plume`.

        Raises:
            ValueError: it is no plume checkpoint, a setting has no effect in this mode, or it cannot run this K.
        """
        if mode != "latent" and (num_latent_steps, document_latent_steps) != (None, None):
            raise ValueError(f"the number of latent steps has no effect on the mode {mode}; drop it")
        self._plume = Plume(model, **kwargs)
        of_queries = self._plume.default_steps("query") if num_latent_steps is None else num_latent_steps
        of_documents = self._plume.plume_config.document_steps(of_queries)
        of_documents = of_documents if document_latent_steps is None else document_latent_steps
        self._steps = {"query": of_queries, "document": of_documents} if mode == "latent" else dict.fromkeys(_SIDES, 0)
        self._plume.num_latent_steps = self._steps  # type: ignore[assignment]  # refuses what it cannot run
        self._mode: Mode = mode
        self._max_new_tokens, self._batch_size, self._max_tokens = max_new_tokens, batch_size, max_tokens_per_batch
        counts = "-".join("gated" if count is None else str(count) for count in dict.fromkeys(self._steps.values()))
        base = self._plume.source.rstrip("/").rpartition("/")[2]
        self.name = f"{base}_{mode}" + (f"_K{counts}" if mode == "latent" else "")
        config = self._plume.plume_config
        self.settings: Mapping[str, Any] = {
            "weights": self._plume.fingerprint,
            "mode": mode,
            "num_latent_steps": self._steps,
            "max_new_tokens": max_new_tokens if mode == "explicit" else None,
            "dtype": str(self._plume.plume_model.dtype).removeprefix("torch."),
            "video_num_frames": config.video_num_frames,
        }
        self.runs_with: Mapping[str, Any] = {
            "model": model,
            "batch_size": batch_size,
            "max_tokens_per_batch": max_tokens_per_batch,
        }
        self.dimension = self._plume.get_embedding_dimension()

    def embed(self, contents: Sequence[Content], side: Side) -> EmbeddedShard:
        """Vectors of some contents, in their order."""
        began = time.perf_counter()
        steps = self._steps[side]
        if self._mode in ("explicit", "anchor") or steps is None:  # what a gate takes must be counted
            shard = self._in_batches(contents)
        else:
            shard = self._encode(contents, steps)
        shard.seconds = time.perf_counter() - began
        return shard

    def _encode(self, contents: Sequence[Content], steps: int) -> EmbeddedShard:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = self._plume.encode(
                [content.input for content in contents],
                num_latent_steps=steps,
                on_error="skip",
                batch_size=self._batch_size,
                max_tokens_per_batch=self._max_tokens,
                show_progress_bar=False,
            )
        errors = {}
        for warning in caught:
            if isinstance(warning.message, SkippedInputsWarning):
                errors |= {error.index: str(error) for error in warning.message.errors if error.index is not None}
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return EmbeddedShard(vectors, errors, reasoning_steps=steps * (len(contents) - len(errors)))

    @torch.inference_mode()
    def _in_batches(self, contents: Sequence[Content]) -> EmbeddedShard:
        model = self._plume.plume_model.eval()
        processor = model.processor
        assert processor is not None
        items, errors = {}, {}
        for row, content in enumerate(contents):
            try:
                items[row] = processor.fit(Item.parse(content.input, f"input {row}", processor.limits), f"input {row}")
            except (ValueError, OSError) as error:
                errors[row] = str(error)
        vectors = np.full((len(contents), self.dimension), np.nan, dtype=np.float32)
        texts = [""] * len(contents) if self._mode == "explicit" else []
        rows, steps, unfinished = list(items), 0, 0
        lengths = [processor.num_tokens(items[row]) for row in rows]
        for numbers in plan_batches(lengths, self._batch_size, self._max_tokens):
            batch = dict(processor.encode([items[rows[number]] for number in numbers]).to(model.device))
            if self._mode == "anchor":
                found = model(**batch, num_latent_steps=0).anchor_embedding
            else:
                mode: Mode = "explicit" if self._mode == "explicit" else "latent"
                embedded = embed_batch(model, batch, mode, max_new_tokens=self._max_new_tokens)
                found = embedded.embedding
                steps += int(embedded.num_reasoning_steps.sum())
                unfinished += int((~embedded.is_complete).sum())
                for number, tokens in zip(numbers, embedded.written, strict=False):  # latent steps write nothing
                    texts[rows[number]] = processor.tokenizer.decode(tokens)
            vectors[[rows[number] for number in numbers]] = found.float().cpu().numpy()
        return EmbeddedShard(vectors, errors, texts, unfinished, steps)


_SIDES: tuple[Side, ...] = get_args(Side)


def loaded_media(content: Content, num_frames: int) -> tuple[Image.Image | None, list[Image.Image]]:
    """The image of a content and its frames, evenly chosen, for models that take PIL images."""
    raw = content.input
    item = Item.parse({"image": raw["image"]}) if "image" in raw else None
    frames = list(_chosen(content, num_frames))
    return (item.images[0] if item else None), frames


def _chosen(content: Content, num_frames: int) -> Iterator[Image.Image]:
    if content.is_video_file:
        video = Item.parse({"video": content.frames[0], "max_frames": num_frames}).videos[0]
        yield from (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video.frames)
        return
    count = len(content.frames)
    for place in np.linspace(0, count - 1, min(num_frames, count)).astype(int) if count else ():
        yield Item.parse(content.frames[place]).images[0]
