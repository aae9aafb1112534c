"""A plume checkpoint as mteb wants a model: text, images and video, the task's instruction on queries.

mteb takes an instance: `mteb.evaluate(PlumeMTEB("folder"), tasks)`. Loading by name through mteb would ask for
torchvision, which plume does not need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mteb.models import ModelMeta  # type: ignore[import-not-found]
from mteb.models.abs_encoder import AbsEncoder  # type: ignore[import-not-found]
from mteb.models.modality_collators import FramesCollator  # type: ignore[import-not-found]
from mteb.types import PromptType  # type: ignore[import-not-found]

from plume import Plume

_MEDIA = ("image", "video")
#: Batches of mteb that are embedded in one call, so that inputs of similar length meet.
_BATCHES_PER_CALL = 8


class PlumeMTEB(AbsEncoder):
    """Embeds for mteb.

    The number of latent steps is in `ModelMeta.experiment_kwargs`, and the fingerprint of the weights is the revision,
    so that mteb keeps results of different ones apart.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        num_latent_steps: int | None = None,
        document_latent_steps: int | None = None,
        **kwargs: Any,
    ):
        """Open a checkpoint.

        Args:
            model: a folder or a Hub name.
            revision: of the Hub.
            device: where it runs.
            num_latent_steps: K; None is the checkpoint's own, for queries as its gate decides where it has one.
            document_latent_steps: K of documents and of labels in words; None is the checkpoint's own, or that of
                queries.
            kwargs: as for `Plume`.

        Raises:
            ValueError: it is no plume checkpoint, or cannot run this K.
        """
        hub = {} if revision is None else {"revision": revision}
        # Corpora hold empty texts and texts of any length, which mteb expects a model to take.
        self.model = Plume(model, device=device, **{"truncate": True, **hub, **kwargs})
        config = self.model.plume_config
        query = self.model.default_steps("query") if num_latent_steps is None else num_latent_steps
        document = config.document_steps(query) if document_latent_steps is None else document_latent_steps
        self.model.num_latent_steps = {"query": query, "document": document}
        told: dict[str, Any] = {"num_latent_steps": "gated" if query is None else query}
        if document != query:
            told["document_latent_steps"] = document
        if (dim := self.model.truncate_dim) is not None:
            told["truncate_dim"] = dim
        source = self.model.source
        size = sum(weight.numel() for weight in self.model.plume_model.parameters())
        self.mteb_model_meta = ModelMeta(
            loader=type(self),
            name=f"local/{Path(source).name}" if Path(source).is_dir() else source,
            revision=self.model.fingerprint,
            release_date=None,
            languages=None,
            n_parameters=size,
            memory_usage_mb=size * self.model.plume_model.dtype.itemsize / 2**20,
            max_tokens=self.model.max_seq_length,
            embed_dim=self.model.get_embedding_dimension(),
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch", "Sentence Transformers"],
            similarity_fn_name="cosine",  # type: ignore[arg-type]
            use_instructions=True,
            training_datasets=None,
            modalities=["text", "image", "video"],
            experiment_kwargs=told,
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors of what a data loader of mteb yields, `[N, D]`.

        Args:
            inputs: batches with any of "text", "image" and "video", each a list.
            task_metadata: of the task; its instruction stands before queries.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: the side, where a task has two.
            batch_size: inputs per pass at most.
            show_progress_bar: show a bar.
            kwargs: what else mteb passes; not used.
        """
        features = set(inputs.dataset.features)
        if "video" in features:
            inputs.collate_fn = self._collate
        side = self._side(task_metadata, features, prompt_type)
        instruction = self.get_task_instruction(task_metadata, prompt_type) if side == "query" else None
        vectors, batches = [], iter(inputs)
        while some := list(islice(batches, _BATCHES_PER_CALL)):
            vectors.append(
                self.model.encode(
                    [row for batch in some for row in _rows(batch)],
                    task=side,
                    instruction=instruction,
                    batch_size=batch_size,
                    show_progress_bar=show_progress_bar,
                )
            )
        return np.concatenate(vectors)

    def _side(self, task: Any, features: set[str], prompt_type: PromptType | None) -> Literal["query", "document"]:
        """Whether something is asked or found; in zero-shot tasks labels are found, which are words for media."""
        if prompt_type is not None:
            return "query" if prompt_type == PromptType.query else "document"
        is_about_media = not set(_MEDIA).isdisjoint(task.modalities)
        return "document" if is_about_media and features.isdisjoint(_MEDIA) else "query"

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """A batch whose videos are the frames that plume takes of a clip."""
        config = self.model.plume_config
        if config.video_fps is not None:
            collate: Any = FramesCollator(fps=config.video_fps, max_frames=config.video_max_frames)
            return collate(rows)
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        for place, decoder in enumerate(batch["video"]):
            count = decoder.metadata.num_frames
            chosen = np.linspace(0, count - 1, min(config.video_num_frames, count)).astype(int).tolist()
            batch["video"][place] = decoder.get_frames_at(chosen).data
        return batch


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in (*_MEDIA, "text") if name in batch]
    return [dict(zip(names, parts, strict=True)) for parts in zip(*(batch[name] for name in names), strict=True)]
