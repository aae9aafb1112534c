"""From text, images and video to left-padded tensors.

Prefixes of a batch differ in length. They are padded here, on the *left*, as every Qwen-VL processor does it: all of
them then end in the same column, where `PlumeModel` reads the state at `<bot>` and latent steps follow in every row at
once; its attention mask hides the padding. `plume.engine.layout` takes the padding out again, since the engine's rows
begin in the first column. Suffixes differ in length only in training, begin in the same column, and are padded on the
right by the collator.

Letters: B batch, L prefix length, padded.
"""

from __future__ import annotations

import json
import math
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from plume import tokens
from plume.config import PlumeConfig
from plume.inputs import prompt
from plume.inputs.errors import InputError
from plume.inputs.images import MAX_PIXELS, MIN_PIXELS, load_image, seen_size
from plume.inputs.item import Item, MediaLimits
from plume.inputs.patches import PatchFormat, pack_images, pack_videos
from plume.inputs.video import Sampling, Video, load_video
from plume.tokens import IMAGE, LATENT_START, VIDEO

# A tokenizer keeps its settings between calls, so that two threads must not use it at once.
_TOKENIZING = threading.Lock()
_RESERVED = re.compile("(" + "|".join(map(re.escape, tokens.RESERVED)) + ")")


class PlumeProcessor(ProcessorMixin):
    """Image processor and tokenizer of a checkpoint, with the chat template that writes its prefix.

    The image processor holds the settings; its work is done by `plume.inputs.patches`, so that embeddings do not depend
    on whether torchvision is installed. Texts are always padded on the left.

    Args:
        image_processor: of Qwen2-VL, for the sizes of images.
        tokenizer: its `model_max_length` is the length of an input at most (`max_seq_length` in sentence-transformers).
        chat_template: writes the prefix of an input.
        truncate: whether a text that is too long is cut at its end, and an input without content taken as an empty
            text; both are refused otherwise. It is saved with the processor.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        truncate: bool = False,
    ):
        if not isinstance(image_processor, Qwen2VLImageProcessorPil):
            # A saved folder names the class of both backends alike, so the torchvision one may come back.
            image_processor = Qwen2VLImageProcessorPil.from_dict(image_processor.to_dict())
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.truncate = truncate
        self.adopt(PlumeConfig())

    def adopt(self, config: PlumeConfig) -> PlumeProcessor:
        """Take over what the model's configuration says of inputs: prompt, video frames, blank image."""
        # Looked up for every input; transformers' configurations answer slowly.
        self._config, self._template, self._blank_side = config, config.prompt_template, config.blank_image_size
        if self.chat_template is None:
            self.chat_template = prompt.chat_template(config)
        return self

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        config: PlumeConfig,
        *,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        images_from: str | None = None,
        **hub_kwargs,
    ) -> PlumeProcessor:
        """The processor of a stock Qwen-VL checkpoint, with plume's prefix; tokens are added elsewhere.

        Args:
            name_or_path: a folder or a Hub name.
            config: gives the prompt and what is taken from a video.
            min_pixels: smaller images are enlarged to this many pixels.
            max_pixels: larger images are reduced to this many pixels.
            images_from: where the image processor comes from, if not from the same place.
            hub_kwargs: `revision`, `token` and the like.

        Raises:
            ValueError: limits of pixels that contradict each other.
        """
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", **hub_kwargs)
        check_pixels(min_pixels, max_pixels)
        saved, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(images_from or name_or_path, **hub_kwargs)
        # Where a file holds them, these override the size that a caller gives, without a word.
        settings = {name: value for name, value in saved.items() if name not in ("min_pixels", "max_pixels")}
        size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        images = Qwen2VLImageProcessorPil.from_dict({**settings, "size": size})
        return cls(images, tokenizer, chat_template=prompt.chat_template(config)).adopt(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:  # type: ignore[override]
        """Load the processor of a plume checkpoint; what concerns inputs in its `config.json` applies.

        Where there is an adapter and no configuration, that of the adapter's base model applies.

        Raises:
            ValueError: there is no configuration, or another model's, so that the prompt is not known.
        """
        processor: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        names = ("cache_dir", "revision", "token", "local_files_only")
        hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return processor.adopt(_read_config(pretrained_model_name_or_path, hub))

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> Any:  # type: ignore[override]
        """Save the processor; also the model's configuration, which has the prompt, unless the folder holds one."""
        saved = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        folder = Path(save_directory)
        # An adapter's folder has that of its base model, and would count as a whole model with one of its own.
        if not (folder / CONFIG_NAME).exists() and not (folder / ADAPTER_CONFIG_NAME).exists():
            self._config.save_pretrained(folder)
        return saved

    @property
    def limits(self) -> MediaLimits:
        """How large media of an input may be under this checkpoint, and how they are read."""
        config, size = self._config, self.image_processor.size
        return MediaLimits(
            pixels=(size["shortest_edge"], size["longest_edge"]),
            background=config.background,
            takes_empty=self.truncate,
            sampling=Sampling(
                num_frames=config.video_num_frames,
                fps=config.video_fps,
                max_frames=config.video_max_frames,
                min_pixels=config.video_min_pixels,
                max_pixels=config.video_max_pixels,
            ),
        )

    @property
    def max_tokens(self) -> int:
        """Text and visual tokens of an input at most, with its prompt."""
        if (limit := self.tokenizer.model_max_length) is None:
            raise ValueError("max_seq_length is None; expected a number of tokens, for example 32768")
        return limit

    def parse(self, raw: Any, name: str = "the input") -> Item:
        """Check and load an input as this checkpoint sees it (`Item.parse` with its limits of pixels and frames).

        Raises:
            InputError: see `Item.parse`.
        """
        return Item.parse(raw, name, self.limits)

    def fit(self, item: Item, name: str = "the input") -> Item:
        """The input, no longer than the model takes: the same one, or with `truncate` one whose text is cut at its end.

        Raises:
            InputError: it is longer, and texts are not truncated, or its prompt and media alone are longer.
        """
        limit, text = self.max_tokens, item.text + item.instruction + self._template
        # No token is shorter than a byte, so most inputs need not be tokenised.
        if len(text.encode()) + self._num_visual_tokens(self.complete(item)) <= limit:
            return item
        if (length := self._length(item)) <= limit:
            return item
        if not self.truncate:
            raise InputError(name, f"it has {_too_long(length, limit)}")
        content = list(item.content)
        texts = [place for place, part in enumerate(content) if isinstance(part, str)]
        while texts and length > limit:
            # Tokens at the new end may join otherwise than before, so that it is counted again.
            content[texts[-1]] = self._without_last_tokens(content[texts[-1]], length - limit)
            if not content[texts[-1]]:
                texts.pop()
            length = self._length(Item(tuple(content), item.instruction))
        if length > limit:
            raise InputError(
                name,
                f"its prompt and media alone have {length} tokens, the model takes {limit}; raise max_seq_length, or "
                "take fewer or smaller images",
            )
        return Item(tuple(content), item.instruction)

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, *, tokenize: bool = False, **kwargs
    ) -> Any:
        """Write or tokenise chat messages, as transformers and sentence-transformers ask for it.

        Args:
            conversation: messages of one input, or a list of such lists.
            chat_template: instead of the checkpoint's.
            tokenize: return tensors of text and media instead of text. Media are then loaded as `encode` loads them.
            kwargs: as in transformers; padding and truncation are fixed here.
        """
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template, tokenize=False, **kwargs)
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        inputs = [conversation] if single else conversation
        images_kwargs = (kwargs.get("processor_kwargs") or kwargs).get("images_kwargs")
        batch = self._encode_raw(inputs, images_kwargs)
        return batch if kwargs.get("return_dict") else batch["input_ids"]

    def __call__(  # type: ignore[override]
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Any] | None = None,
        images_kwargs: dict | None = None,
        vision: Mapping[str, Tensor] | None = None,
        **ignored,
    ) -> BatchFeature:
        """Tensors of some inputs, or of prefixes that `write` or the chat template has written.

        Texts that all end with `<bot>` are prefixes; others are inputs, which get the checkpoint's prompt.

        Args:
            images: one per text, or one list per text; for prefixes all images of the batch, flat or likewise.
            text: one text or several; None where images or videos stand alone. Prefixes hold one placeholder per image
                and video, inputs none.
            videos: as images; each anything that `plume.inputs.video.load_video` takes.
            images_kwargs: `size` of images, as `pack_media` takes it.
            vision: what `pack_media` returned for the media, where they have been processed already.
            ignored: padding, truncation and other settings of transformers' processors, which are fixed here.

        Returns:
            `input_ids` and `attention_mask` `[B, L]`; with images `pixel_values` (all patches of the batch) and
            `image_grid_thw` `[images, 3]`; with videos `pixel_values_videos`, `video_grid_thw` and
            `second_per_grid_ts`.

        Raises:
            ValueError: texts, placeholders and media differ in number; or an input that cannot be embedded.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts or not all(text.rstrip().endswith(LATENT_START) for text in texts):
            return self._encode_raw(_joined(texts, images, videos), images_kwargs)
        flat = [image for row in images or [] for image in (row if isinstance(row, (list, tuple)) else [row])]
        if vision is None:
            vision = self.pack_media(flat, videos or (), **(images_kwargs or {}))
        return self._batch(self._tokenize(texts), vision)

    def write(self, items: Sequence[Item]) -> list[str]:
        """The prefixes of some inputs as text, with one placeholder per image and video; for people to read."""
        return [prompt.prefix(self._template, self.complete(item)) for item in items]

    def pack_media(
        self, images: Sequence[Any] = (), videos: Sequence[Any] = (), size: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Patches of some images and videos; empty without any.

        Args:
            images: anything that `load_image` takes.
            videos: anything that `load_video` takes.
            size: "shortest_edge" and "longest_edge", pixels of an image at least and at most; None: the checkpoint's.
        """
        limits = self.limits
        return self._pack_loaded(
            [load_image(image, background=limits.background) for image in images],
            [load_video(video, limits.sampling, background=limits.background) for video in videos],
            size,
        )

    def _pack_loaded(
        self,
        images: Sequence[Image.Image],
        videos: Sequence[Video],
        size: Mapping[str, int] | None,
        as_bytes: bool = False,
    ) -> dict[str, Tensor]:
        patch_format = self.patch_format(size)
        packed: dict[str, Tensor] = {}
        if images:
            packed |= pack_images(images, patch_format, as_bytes and not videos)
        if videos:
            packed |= pack_videos(videos, patch_format)
        return packed

    def patch_format(self, size: Mapping[str, int] | None = None) -> PatchFormat:
        """How this checkpoint's vision tower expects patches; `size` as in `pack_media`."""
        settings = self.image_processor
        size = dict(settings.size) if size is None else size
        return PatchFormat(
            pixels=(size["shortest_edge"], size["longest_edge"]),
            mean=tuple(settings.image_mean),
            std=tuple(settings.image_std),
            patch=settings.patch_size,
            merge=settings.merge_size,
            temporal=settings.temporal_patch_size,
        )

    def encode(
        self,
        items: Sequence[Item],
        images_kwargs: dict | None = None,
        vision: Mapping[str, Tensor] | None = None,
        as_bytes: bool = False,
    ) -> BatchFeature:
        """Tensors of some inputs, as `__call__` returns them.

        A text that mentions a token which steers the model, for example `<gen_emb>`, is spelt as text.

        Args:
            items: the inputs.
            images_kwargs: `size` of images, as `pack_media` takes it.
            vision: what `pack_media` returned for the media, where they have been processed already.
            as_bytes: patches of images as bytes, for the engine on a GPU; see `pack_images`. Not where there is video.
        """
        complete = [self.complete(item) for item in items]
        if vision is None:
            images = [image for item in complete for image in item.images]
            videos = [video for item in complete for video in item.videos]
            vision = self._pack_loaded(images, videos, (images_kwargs or {}).get("size"), as_bytes)
        return self._batch(self._prefix_ids(complete), vision)

    def _encode_raw(self, inputs: Sequence[Any], images_kwargs: dict | None) -> BatchFeature:
        """Tensors of inputs as users pass them; warns of texts that are cut or empty, where that is allowed."""
        parsed = [self.parse(raw, f"input {index}") for index, raw in enumerate(inputs)]
        items = [self.fit(item, f"input {index}") for index, item in enumerate(parsed)]
        num_cut = sum(item is not whole for item, whole in zip(items, parsed, strict=True))
        warn_of_truncated(num_cut, sum(item.is_empty for item in items), len(items), self.max_tokens)
        return self.encode(items, images_kwargs)

    def num_tokens(self, item: Item) -> int:
        """About how many tokens an input takes: exact for its media, a quarter of its bytes for its text."""
        num_bytes = len((item.text + item.instruction + self._template).encode())
        return self._num_visual_tokens(self.complete(item)) + 1 + num_bytes // 4

    def num_written_tokens(self, items: Sequence[Item]) -> list[int]:
        """Tokens of the prefixes of some inputs as they are written, with one placeholder per image and video."""
        return [len(ids) for ids in self._prefix_ids([self.complete(item) for item in items])]

    def exact_lengths(self, items: Sequence[Item]) -> list[int]:
        """Tokens of some inputs, their prompt and visual ones included."""
        items = [self.complete(item) for item in items]
        return [
            len(ids) + self._num_visual_tokens(item) - len(item.images) - len(item.videos)  # placeholders are among ids
            for ids, item in zip(self._prefix_ids(items), items, strict=True)
        ]

    def _length(self, item: Item) -> int:
        return self.exact_lengths([item])[0]

    def _without_last_tokens(self, text: str, num_tokens: int) -> str:
        offsets = _speller(self.tokenizer, len(self.tokenizer)).encode(text, add_special_tokens=False).offsets
        kept = len(offsets) - num_tokens
        return text[: offsets[kept][0]] if kept > 0 else ""

    def suffix_ids(self, text: str) -> list[int]:
        """Token ids of a suffix, tokenised as a whole."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def complete(self, item: Item) -> Item:
        """The input with the blank image that some checkpoints expect before text alone."""
        if self._blank_side is None or item.images or item.videos:
            return item
        blank = Image.new("RGB", (self._blank_side, self._blank_side), "white")
        return Item((blank, *item.content), item.instruction)

    def _num_visual_tokens(self, item: Item) -> int:
        settings = self.image_processor
        pixels = settings.size["shortest_edge"], settings.size["longest_edge"]
        num_pixels = sum(math.prod(seen_size(image.width, image.height, pixels)) for image in item.images)
        for video in item.videos:
            frames, _, height, width = video.frames.shape
            num_pixels += -(-frames // settings.temporal_patch_size) * height * width
        return num_pixels // (settings.patch_size * settings.merge_size) ** 2

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        settings = {"truncation": False, "return_attention_mask": False, "return_token_type_ids": False}
        with _TOKENIZING:
            return self.tokenizer(texts, verbose=False, **settings)["input_ids"] if texts else []

    def _prefix_ids(self, items: Sequence[Item]) -> list[list[int]]:
        """Token ids of the prefixes, with one placeholder per image and video."""
        prefixes = [prompt.prefix_pieces(self._template, item) for item in items]
        texts = ["".join(piece.text for piece in pieces) for pieces in prefixes]
        rows = self._tokenize(texts)
        for row, (pieces, text) in enumerate(zip(prefixes, texts, strict=True)):
            mentions = any("<" in piece.text for piece in pieces if piece.is_users)
            if mentions and _num_reserved(text) > sum(_num_reserved(p.text) for p in pieces if not p.is_users):
                rows[row] = self._spelt(pieces)
        return rows

    def _spelt(self, pieces: Sequence[prompt.Piece]) -> list[int]:
        """Token ids of a prefix whose user's text mentions reserved tokens, which are read as text there."""
        vocabulary, speller = self.tokenizer.get_vocab(), _speller(self.tokenizer, len(self.tokenizer))
        ids: list[int] = []
        text = ""
        for piece in pieces:
            # Text and tokens in turn; text on both sides of a border between pieces is tokenised as one.
            for part in [piece.text] if piece.is_users else _RESERVED.split(piece.text):
                if not piece.is_users and part in tokens.RESERVED:
                    ids += [vocabulary[token] for token in speller.encode(text, add_special_tokens=False).tokens]
                    ids.append(vocabulary[part])
                    text = ""
                else:
                    text += part
        return ids + [vocabulary[token] for token in speller.encode(text, add_special_tokens=False).tokens]

    def _batch(self, rows: Sequence[Sequence[int]], vision: Mapping[str, Tensor]) -> BatchFeature:
        """Left-padded tensors of prefixes that hold one placeholder per image and video."""
        for placeholder, grid in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw")):
            rows = self._expand(rows, placeholder, vision.get(grid))
        self._check_length([len(row) for row in rows])
        ids = [torch.tensor(row) for row in rows]
        pad = {"batch_first": True, "padding_side": "left"}
        return BatchFeature(
            {
                "input_ids": pad_sequence(ids, padding_value=self.tokenizer.pad_token_id, **pad),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], **pad),
                **vision,
            }
        )

    def _expand(self, rows: Sequence[Sequence[int]], placeholder: str, grids: Tensor | None) -> Sequence[Sequence[int]]:
        # One placeholder stands for all visual tokens of its image or video: patches / merge_size ** 2.
        token_id = self.tokenizer.convert_tokens_to_ids(placeholder)
        num_media = 0 if grids is None else len(grids)
        if (count := sum(row.count(token_id) for row in rows)) != num_media:
            raise ValueError(f"the texts hold {count} times {placeholder} for {num_media} of them; expected one each")
        if grids is None:
            return rows
        lengths = iter((grids.prod(dim=-1) // self.image_processor.merge_size**2).tolist())
        return [
            [token for part in row for token in ([token_id] * next(lengths) if part == token_id else [part])]
            for row in rows
        ]

    def _check_length(self, lengths: list[int]) -> None:
        limit = self.max_tokens
        for row, length in enumerate(lengths):
            if length > limit:
                raise ValueError(f"row {row} of the batch has {_too_long(length, limit)}")


def _read_config(name_or_path: Any, hub: Mapping[str, Any]) -> PlumeConfig:
    fields, _ = PlumeConfig.get_config_dict(name_or_path, **hub)
    if fields.get("model_type") != PlumeConfig.model_type:
        what = f"is that of a {fields['model_type']!r} model" if fields.get("model_type") else "is missing"
        raise ValueError(
            f"{name_or_path}: {CONFIG_NAME}, which has the prompt of this processor, {what}; save the model there, or "
            "the processor by itself in an empty folder"
        )
    return PlumeConfig.from_dict(fields)


def check_pixels(min_pixels: int, max_pixels: int) -> None:
    """Refuse limits of an image's pixels that cannot be met.

    Raises:
        ValueError: says what was received and what is possible.
    """
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(
            f"min_pixels must be at least 1 and at most max_pixels; received min_pixels={min_pixels} and "
            f"max_pixels={max_pixels}"
        )


def warn_of_truncated(num_cut: int, num_empty: int, num_inputs: int, max_tokens: int, stacklevel: int = 1) -> None:
    """Say how many of some inputs were cut to the model's length, and how many had no content; silent without any."""
    cut = f"{num_cut:,} longer than {max_tokens:,} tokens, whose text was cut" if num_cut else ""
    empty = f"{num_empty:,} without content, taken as empty texts" if num_empty else ""
    if cut or empty:
        what = " and ".join(filter(None, (cut, empty)))
        warnings.warn(f"plume: {num_inputs:,} inputs hold {what}", stacklevel=stacklevel + 1)


def _joined(texts: Sequence[str], images: Sequence[Any] | None, videos: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Inputs as dicts, of texts and media that belong together row by row; either may be missing."""
    columns = {"text": texts, "image": images, "video": videos}
    columns = {
        kind: list(column) if isinstance(column, (list, tuple)) else [column]
        for kind, column in columns.items()
        if column is not None and not (isinstance(column, (list, tuple)) and not column)
    }
    lengths = {f"{len(column)} {kind}s" for kind, column in columns.items()}
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError(
            f"the processor received {' and '.join(sorted(lengths)) or 'nothing'}; expected one image or video, or one "
            "list of them, for each text"
        )
    if any(placeholder in text for text in texts for placeholder in (IMAGE, VIDEO)):
        raise ValueError(
            f"a text holds {IMAGE} or {VIDEO}, but no prompt around it; leave placeholders out, or write the text with "
            "processor.apply_chat_template(messages)"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _num_reserved(text: str) -> int:
    return len(_RESERVED.findall(text))


@lru_cache(maxsize=2)
def _speller(tokenizer: Any, num_tokens: int) -> Tokenizer:
    """The tokenizer without the reserved tokens; its own ids are not to be used.

    Args:
        tokenizer: of the checkpoint.
        num_tokens: that it has; others have been added when it changes.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in tokens.RESERVED]
    return Tokenizer.from_str(json.dumps(state))


def _too_long(length: int, limit: int) -> str:
    return (
        f"{length} tokens, the model takes {limit}; shorten the text, take fewer frames, lower the image processor's "
        "longest_edge, or let texts be cut with truncate=True"
    )
