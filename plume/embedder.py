"""Plume: the user's object. A thin SentenceTransformer over a plume checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings
from tqdm.auto import tqdm

import plume.model  # noqa: F401  # registers the model, so that the folder opens
from plume import checkpoint
from plume.config import PlumeConfig
from plume.inputs import InputError, Item, check_text

# Inputs are loaded and embedded in windows of this many batches, so that a folder of photos need not fit into
# memory, while inputs of like length still meet in a batch.
_BATCHES_PER_WINDOW = 8


class Plume(SentenceTransformer):
    """Embeds text, images and both together into one space of unit vectors.

    Everything of `SentenceTransformer` works: `similarity`, `encode_query`, `truncate_dim`, quantised precision,
    saving, `push_to_hub`.

    Example:
        >>> plume = Plume(getfixture("plume_folder"), device="cpu")
        >>> plume.encode(["a red kite", {"text": "what is this?", "image": Image.new("RGB", (56, 56))}]).shape
        (2, 64)
        >>> plume.encode("a red kite", num_latent_steps=0).shape
        (64,)
    """

    def __init__(self, model_name_or_path: str | Path, **kwargs: Any):
        """Open a checkpoint.

        Args:
            model_name_or_path: a folder or a Hub name.
            kwargs: as for `SentenceTransformer`, for example `device`, `model_kwargs`, `truncate_dim`.

        Raises:
            ValueError: the checkpoint is not plume's.
        """
        hub = {k: kwargs[k] for k in ("revision", "token", "local_files_only") if k in kwargs}
        checkpoint.check_is_plume(model_name_or_path, **hub)
        super().__init__(str(model_name_or_path), **kwargs)

    @property
    def plume_config(self) -> PlumeConfig:
        """The configuration of the loaded checkpoint."""
        transformer: Any = self[0]
        return transformer.model.config

    def encode(  # type: ignore[override]
        self,
        inputs: Any,
        *,
        num_latent_steps: int | None = None,
        instruction: str | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32",
        **kwargs: Any,
    ) -> Any:
        """Embed one input or a list that mixes kinds.

        Args:
            inputs: each a string, a PIL image, a `pathlib.Path` to an image file, or a dict with "text", "image" (one
                or a list) and "instruction".
            num_latent_steps: K; 0 is a single pass; None is the checkpoint's own.
            instruction: for every input that brings none of its own.
            on_error: "raise" stops at the first input that cannot be embedded; "skip" warns, names it, and leaves
                a row of NaN in its place.
            batch_size: inputs per pass.
            show_progress_bar: None shows it when there is more than one batch.
            convert_to_numpy: return a numpy array.
            convert_to_tensor: return a tensor instead.
            precision: quantised by sentence-transformers over all inputs of the call.
            kwargs: as for `SentenceTransformer.encode`.

        Returns:
            Unit vectors `[N, D]`, float32, in the order of the inputs; `[D]` for a single input.

        Raises:
            InputError: an input that cannot be embedded, named by its place in the list.
            ValueError: a K that the checkpoint cannot run.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip"; received {on_error!r}')
        if on_error == "skip" and precision != "float32":
            raise ValueError('on_error="skip" marks rows with NaN, which only precision="float32" can hold')
        if num_latent_steps is not None:
            self.plume_config.check_num_latent_steps(num_latent_steps)
            kwargs["num_latent_steps"] = num_latent_steps
        single = isinstance(inputs, (str, dict, Path, Image.Image, Item))
        raws: Sequence[Any] = [inputs] if single else list(inputs)
        show = len(raws) > batch_size if show_progress_bar is None else show_progress_bar

        if instruction:
            check_text(instruction, "the instruction")
        kept: list[int] = []
        rows: list[torch.Tensor] = []
        skipped: list[str] = []
        window = _BATCHES_PER_WINDOW * batch_size
        with tqdm(total=len(raws), desc="Encoding", unit="input", disable=not show) as bar:
            for start in range(0, len(raws), window):
                stop = min(start + window, len(raws))
                items = self._load(raws, range(start, stop), instruction, None if on_error == "raise" else skipped)
                if items:
                    messages = [item.messages() for item in items.values()]
                    vectors = super().encode(
                        messages, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True, **kwargs
                    )
                    rows.append(vectors if convert_to_tensor or not convert_to_numpy else vectors.cpu())
                    kept += items
                bar.update(stop - start)
        if skipped:
            warnings.warn(f"{len(skipped)} inputs were skipped:\n" + "\n".join(skipped), stacklevel=2)
        whole = torch.cat(rows) if rows else torch.empty(0, self.get_embedding_dimension() or 0)
        if skipped:
            gaps = torch.full((len(raws), whole.shape[1]), torch.nan, device=whole.device)
            gaps[kept] = whole
            whole = gaps
        return _convert(whole, single, precision, convert_to_tensor, convert_to_numpy)

    def _load(
        self, raws: Sequence[Any], places: range, instruction: str | None, skipped: list[str] | None
    ) -> dict[int, Item]:
        """The inputs at these places, checked; bad ones are raised, or described in `skipped`."""
        items = {}
        for index in places:
            try:
                item = Item.parse(raws[index], f"input {index}").instructed(instruction)
                self[0].processor.check_length(item, f"input {index}")  # type: ignore[operator,union-attr]
                items[index] = item
            except InputError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
        return items


def _convert(
    whole: Any, single: bool, precision: Any, as_tensor: bool, as_numpy: bool
) -> torch.Tensor | np.ndarray | list[torch.Tensor]:
    if precision != "float32" and len(whole):
        whole = quantize_embeddings(whole, precision=precision)
    if as_tensor:
        whole = torch.as_tensor(whole)
    elif as_numpy:
        whole = whole.numpy() if isinstance(whole, torch.Tensor) else whole
    else:
        whole = list(torch.as_tensor(whole))
    return whole[0] if single else whole
