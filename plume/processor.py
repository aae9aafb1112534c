"""From text and images to left-padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from plume import prompt
from plume.config import PlumeConfig
from plume.inputs import InputError, Item
from plume.tokens import IMAGE

#: Pixels per image of the published evaluation: at least one visual token, at most 3,009.
MIN_PIXELS, MAX_PIXELS = 784, 2_359_296


class PlumeProcessor(ProcessorMixin):
    """Image processor and tokenizer of a checkpoint, with the chat template that writes its prefix.

    Images always go through the PIL backend, so that embeddings do not depend on whether torchvision is
    installed. Texts are always padded on the left and never truncated.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        if not isinstance(image_processor, Qwen2VLImageProcessorPil):
            # A saved folder names the class of both backends alike, so the torchvision one may come back.
            image_processor = Qwen2VLImageProcessorPil.from_dict(image_processor.to_dict())
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        config: PlumeConfig,
        *,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        **hub_kwargs,
    ) -> PlumeProcessor:
        """The processor of a stock Qwen-VL checkpoint, with plume's prefix; tokens are added elsewhere.

        Args:
            name_or_path: a folder or a Hub name.
            config: gives the prompt.
            min_pixels: smaller images are enlarged to this many pixels.
            max_pixels: larger images are reduced to this many pixels.
            hub_kwargs: `revision`, `token` and the like.
        """
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", **hub_kwargs)
        size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        images = Qwen2VLImageProcessorPil.from_pretrained(name_or_path, size=size, **hub_kwargs)
        return cls(images, tokenizer, chat_template=prompt.chat_template(config))

    def __call__(  # type: ignore[override]
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        images_kwargs: dict | None = None,
        vision: Mapping[str, Tensor] | None = None,
        **ignored,
    ) -> BatchFeature:
        """Tensors of prefixes that the chat template has written.

        Args:
            images: all images of the batch, flat or one list per text.
            text: the prefixes, each with one image placeholder per image.
            images_kwargs: passed to the image processor, for example `size`.
            vision: what `see` returned for the images, where they have been processed already.
            ignored: padding, truncation and other settings of transformers' processors, which are fixed here.

        Returns:
            `input_ids` and `attention_mask` `[B, L]`, and with images `pixel_values` (all patches of the batch) and
            `image_grid_thw` `[images, 3]`.

        Raises:
            ValueError: placeholders and images differ in number, or a prefix exceeds the model's length.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        flat = [one for row in images or [] for one in (row if isinstance(row, (list, tuple)) else [row])]
        if vision is None:
            vision = self.see(flat, **(images_kwargs or {}))
        num_images = len(vision["image_grid_thw"]) if vision else 0
        if (placeholders := sum(row.count(IMAGE) for row in texts)) != num_images:
            raise ValueError(
                f"the texts hold {placeholders} image placeholders for {num_images} images; expected one each"
            )
        if num_images:
            texts = self._expand(texts, vision["image_grid_thw"])
        tokens = self.tokenizer(texts, padding=True, truncation=False, return_tensors="pt", return_token_type_ids=False)
        self._check_length(tokens["attention_mask"].sum(dim=1).tolist())
        return BatchFeature({**tokens, **vision})

    def write(self, items: Sequence[Item]) -> list[str]:
        """The prefixes of some inputs, with one placeholder per image."""
        return [self.apply_chat_template(item.messages(), tokenize=False) for item in items]  # type: ignore[misc]

    def see(self, images: Sequence[Any], **images_kwargs) -> dict[str, Tensor]:
        """Patches of some images, `pixel_values` and `image_grid_thw`; empty without images."""
        return dict(self.image_processor(images, return_tensors="pt", **images_kwargs)) if images else {}

    def encode(self, items: Sequence[Item]) -> BatchFeature:
        """Tensors of some inputs: `write` and `see`, then `__call__`."""
        return self(text=self.write(items), images=[image for item in items for image in item.images])

    def check_length(self, item: Item, name: str) -> None:
        """Refuse an input that is longer than the model takes.

        Raises:
            InputError: names the input and its length.
        """
        per_image = self.image_processor.size["longest_edge"] // (14 * self.image_processor.merge_size) ** 2
        written = self.write([item])[0]
        # No token is shorter than a byte, so most inputs need not be tokenised to know.
        if len(written.encode()) + per_image * len(item.images) > self.tokenizer.model_max_length:
            try:
                self.encode([item])
            except ValueError as error:
                raise InputError(f"{name}: {str(error).removeprefix('row 0 of the batch ')}") from None

    def suffix_ids(self, text: str) -> list[int]:
        """Token ids of a suffix, tokenised as a whole."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _expand(self, texts: list[str], grids: Any) -> list[str]:
        # One placeholder stands for all visual tokens of its image: patches / merge_size ** 2.
        counts = iter((grids.prod(dim=-1) // self.image_processor.merge_size**2).tolist())
        expanded = []
        for text in texts:
            first, *rest = text.split(IMAGE)
            expanded.append(first + "".join(IMAGE * next(counts) + piece for piece in rest))
        return expanded

    def _check_length(self, lengths: list[int]) -> None:
        limit = self.tokenizer.model_max_length
        for row, length in enumerate(lengths):
            if length > limit:
                raise ValueError(
                    f"row {row} of the batch has {length} tokens, the model takes {limit}; shorten the text or "
                    "lower the image processor's longest_edge (nothing is truncated)"
                )
