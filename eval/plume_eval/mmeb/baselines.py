"""Models of others in the same harness, each by the prompts that its authors document.

    vlm2vec-v2            a single pass, the last token; no chat template (VLM2Vec, arXiv 2507.04590)
    gme                   a single pass, the last token, the instruction as system message (arXiv 2412.16855)
    ume-r1                writes a rationale, reads `<gen_emb>` (arXiv 2511.00405)
    qwen3-vl-embedding    through sentence-transformers, the instruction as system message
    sentence-transformers any SentenceTransformer or CLIP by its name

The first three are Qwen2-VL and run on transformers' own model, with plume's processor, which needs no torchvision.
Prompts are tested on random weights; no published weights of these models have been run here.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from plume.checkpoints.fingerprint import add_weights
from plume.config import PlumeConfig
from plume.embedder.encode import plan_batches
from plume.inputs.item import Item
from plume.inputs.processor import PlumeProcessor
from plume.tokens import ANCHOR, READ_OUT
from plume_eval.mmeb.content import Content
from plume_eval.mmeb.embedders import Embedder, Side, loaded_media
from plume_eval.mmeb.vectors import EmbeddedShard

_IMAGE, _VIDEO, _BEGIN, _END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
_UME_R1 = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. \n"
    "First output the thinking process in <think> </think> tags and then summarize the entire input in a word or "
    "sentence. \nFinally, use the <gen_emb> tag to represent the entire input."
)


def vlm2vec_text(content: Content, side: Side) -> str:
    r"""The input of VLM2Vec-V2: a bare token for the medium, instruction and text; image tasks have new lines around.

    Example:
        >>> vlm2vec_text(Content("Find it:", "a kite", image=Path("kite.png"), ending="\n"), "query")
        '<|image_pad|>\nFind it: a kite\n'
    """
    token = _IMAGE if content.image is not None else _VIDEO if content.frames else ""
    return f"{token}{content.ending or ' '}{content.words}{content.ending}" if token else content.words + content.ending


def gme_text(content: Content, side: Side) -> str:
    """The input of GME: the instruction of a query is the system message; candidates have none but the default."""
    system = content.instruction if side == "query" and content.instruction else "You are a helpful assistant."
    return f"<|im_start|>system\n{system}<|im_end|>\n{_user(content, content.text.strip())}<|endoftext|>"


def ume_r1_text(content: Content, side: Side) -> str:
    """The input of UME-R1: instruction, text, `<disc_emb>`, the request to reason; without a medium a white image."""
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    return default + _user(content, f"{content.words}\n{ANCHOR}\n{_UME_R1}", has_blank=True)


def _user(content: Content, text: str, has_blank: bool = False) -> str:
    token = _VIDEO if content.frames else _IMAGE if content.image is not None or has_blank else ""
    medium = f"{_BEGIN}{token}{_END}" if token else ""
    return f"<|im_start|>user\n{medium}{text}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Recipe:
    """How a Qwen2-VL embedder is used.

    text: the input as it is tokenised. has_flat_positions: whether visual tokens count as text ones. writes: whether a
    rationale is written first. blank_side: of the white image that an input without a medium has; 0: it has none.
    pixels: of an image, at least and at most. num_frames: of a video.
    """

    text: Callable[[Content, Side], str]
    has_flat_positions: bool = False
    writes: bool = False
    blank_side: int = 0
    pixels: tuple[int, int] = (3136, 1_003_520)
    num_frames: int = 8


RECIPES: Mapping[str, Recipe] = {
    "vlm2vec-v2": Recipe(vlm2vec_text),
    "gme": Recipe(gme_text, has_flat_positions=True, pixels=(256 * 784, 1280 * 784)),
    "ume-r1": Recipe(ume_r1_text, writes=True, blank_side=56, pixels=(784, 2_359_296)),
}


class Qwen2VLEmbedder:
    """A published Qwen2-VL embedder: VLM2Vec-V2, GME or UME-R1."""

    def __init__(
        self, recipe: str, model: str, *, device: str = "cpu", batch_size: int = 32, max_new_tokens: int = 512
    ):
        """Open it; an adapter of peft is merged into its base model.

        Args:
            recipe: a name of `RECIPES`.
            model: a folder or a Hub name.
            device: where it runs.
            batch_size: inputs per pass at most.
            max_new_tokens: limit of a rationale.

        Raises:
            OSError: there is no such model.
        """
        self._recipe = RECIPES[recipe]
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        self._model = loaded.to(device).eval()
        if hasattr(self._model, "peft_config"):
            from peft.tuners.tuners_utils import BaseTunerLayer

            for module in self._model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge()
        low, high = self._recipe.pixels
        config = PlumeConfig(video_num_frames=self._recipe.num_frames)
        self._processor = PlumeProcessor.from_backbone(model, config, min_pixels=low, max_pixels=high)
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self.name = f"{Path(model).name}_{recipe}"
        self.settings: Mapping[str, Any] = {
            "weights": _digest(self._model),
            "baseline": recipe,
            "dtype": str(dtype).removeprefix("torch."),
            "pixels": list(self._recipe.pixels),
            "video_num_frames": self._recipe.num_frames,
            "max_new_tokens": max_new_tokens if self._recipe.writes else None,
        }
        self.runs_with: Mapping[str, Any] = {"model": model, "batch_size": batch_size}
        self.dimension: int = self._model.config.get_text_config().hidden_size

    @torch.inference_mode()
    def embed(self, contents: Sequence[Content], side: Side) -> EmbeddedShard:
        """Vectors of some contents, in their order."""
        began = time.perf_counter()
        items, errors = {}, {}
        for row, content in enumerate(contents):
            try:
                # The text is the recipe's; what stands here for it lets an input without media pass.
                raw = {**content.input, "text": "."}
                if (blank := self._recipe.blank_side) and content.image is None and not content.frames:
                    raw["image"] = Image.new("RGB", (blank, blank), "white")
                items[row] = Item.parse(raw, f"input {row}", self._processor.limits)
            except (ValueError, OSError) as error:
                errors[row] = str(error)
        rows = list(items)
        vectors = np.full((len(contents), self.dimension), np.nan, dtype=np.float32)
        texts = [""] * len(contents) if self._recipe.writes else []
        steps, unfinished = 0, 0
        read_out = self._processor.tokenizer.convert_tokens_to_ids(READ_OUT)
        lengths = [self._processor.num_tokens(items[row]) + len(contents[row].words) // 4 for row in rows]
        for numbers in plan_batches(lengths, self._batch_size, 32_768):
            at = [rows[number] for number in numbers]
            inputs = self._tensors([self._recipe.text(contents[row], side) for row in at], [items[row] for row in at])
            if not self._recipe.writes:
                found = self._states(inputs)[:, -1]
            else:
                written = self._write(inputs)
                found = self._at_read_out(inputs, written)
                for row, tokens in zip(at, written, strict=True):
                    texts[row] = self._processor.tokenizer.decode(tokens, skip_special_tokens=False)
                    steps += len(tokens)
                    unfinished += tokens[-1] != read_out
            vectors[at] = F.normalize(found.float(), dim=-1).cpu().numpy()
        return EmbeddedShard(vectors, errors, texts, unfinished, steps, time.perf_counter() - began)

    def _tensors(self, texts: Sequence[str], items: Sequence[Item]) -> dict[str, Tensor]:
        """A batch, padded on the left; a placeholder becomes as many tokens as its image or video has."""
        processor = self._processor
        images = [image for item in items for image in item.images]
        videos = [video for item in items for video in item.videos]
        media = processor.pack_media(images, videos)
        texts = list(texts)
        for token, grids in ((_IMAGE, media.get("image_grid_thw")), (_VIDEO, media.get("video_grid_thw"))):
            merged = processor.image_processor.merge_size**2
            counts = iter([] if grids is None else (grids.prod(dim=-1) // merged).tolist())
            texts = [text.replace(token, token * next(counts), 1) if token in text else text for text in texts]
        batch = processor.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        tensors = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        tensors |= {name: media[name] for name in names if name in media}
        return {name: tensor.to(self._model.device) for name, tensor in tensors.items()}

    def _states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """States after the last norm, `[B, L, D]`."""
        inputs = {**inputs, "mm_token_type_ids": self._kinds(inputs["input_ids"])}
        if self._recipe.has_flat_positions:
            positions = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions.expand(3, *positions.shape)
        return self._model.model(**inputs).last_hidden_state

    def _kinds(self, ids: Tensor) -> Tensor:
        config = self._model.config
        return (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()

    def _write(self, inputs: Mapping[str, Tensor]) -> list[list[int]]:
        """Rationales, greedily, up to `<gen_emb>`."""
        tokenizer = self._processor.tokenizer
        stop = [tokenizer.convert_tokens_to_ids(READ_OUT), tokenizer.eos_token_id]
        whole = self._model.generate(
            **inputs,
            mm_token_type_ids=self._kinds(inputs["input_ids"]),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            suppress_tokens=[self._model.config.image_token_id, self._model.config.video_token_id],
            eos_token_id=[token for token in stop if token is not None],
            pad_token_id=tokenizer.pad_token_id,
        )
        new = whole[:, inputs["input_ids"].shape[1] :].tolist()
        return [_until(row, stop) for row in new]

    def _at_read_out(self, inputs: Mapping[str, Tensor], written: Sequence[Sequence[int]]) -> Tensor:
        """The state at the last written token, which is `<gen_emb>` where one was written, `[B, D]`."""
        states = []
        for row, tokens in enumerate(written):  # a pass of its own each, so that no padding stands in the middle
            keep = inputs["attention_mask"][row].bool()
            prefix = inputs["input_ids"][row][keep]
            ids = torch.cat([prefix, torch.tensor(tokens, dtype=prefix.dtype, device=prefix.device)])[None]
            media = self._media_of(inputs, row)
            states.append(self._states({"input_ids": ids, "attention_mask": torch.ones_like(ids), **media})[0, -1])
        return torch.stack(states)

    def _media_of(self, inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """The patches of one row of a batch."""
        config, found = self._model.config, {}
        names = (
            (config.image_token_id, "image_grid_thw", "pixel_values"),
            (config.video_token_id, "video_grid_thw", "pixel_values_videos"),
        )
        for token, grid_name, patches_name in names:
            if grid_name not in inputs:
                continue
            grids = inputs[grid_name]
            has_medium = (inputs["input_ids"] == token).any(dim=1).tolist()  # one medium of a kind in a row at most
            if not has_medium[row]:
                continue
            place = sum(has_medium[:row])
            counts = grids.prod(dim=-1).tolist()
            begin = sum(counts[:place])
            found |= {grid_name: grids[place : place + 1], patches_name: inputs[patches_name][begin:][: counts[place]]}
        return found


def _until(tokens: Sequence[int], stop: Sequence[int | None]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens) - 1)
    return list(tokens[: end + 1])


class SentenceTransformerEmbedder:
    """Any model that sentence-transformers opens.

    A model that takes messages gets text and media of a content together. One that reads one kind at a time, such as
    CLIP, gets each part alone; the vector is the mean of the parts' unit vectors, frames being parts as well.
    """

    def __init__(
        self, model: str, *, device: str = "cpu", batch_size: int = 32, instructs: bool = False, num_frames: int = 8
    ):
        """Open it.

        Args:
            model: a folder or a Hub name.
            device: where it runs.
            batch_size: inputs per pass.
            instructs: as Qwen3-VL-Embedding wants it: the instruction of a query is passed as `prompt`, candidates have
                "Represent the user's input." and no instruction of their own; else instructions are parts of texts.
            num_frames: of a video.
        """
        from sentence_transformers import SentenceTransformer

        self._model: Any = SentenceTransformer(model, device=device)
        self._batch_size, self._instructs, self._num_frames = batch_size, instructs, num_frames
        self._kinds = set(getattr(self._model, "modalities", None) or ["text"])
        self.name = Path(model).name + ("_instructed" if instructs else "")
        self.settings: Mapping[str, Any] = {
            "weights": _digest(self._model),
            "baseline": "qwen3-vl-embedding" if instructs else "sentence-transformers",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "video_num_frames": num_frames,
        }
        self.runs_with: Mapping[str, Any] = {"model": model, "batch_size": batch_size}
        self.dimension: int = self._model.get_embedding_dimension()

    def embed(self, contents: Sequence[Content], side: Side) -> EmbeddedShard:
        """Vectors of some contents, in their order."""
        began = time.perf_counter()
        sums = np.zeros((len(contents), self.dimension), dtype=np.float32)
        errors: dict[int, str] = {}
        for start in range(0, len(contents), self._batch_size):  # media of a batch are in memory at once
            groups: dict[str, list[tuple[int, Any]]] = {}
            for row, content in enumerate(contents[start : start + self._batch_size], start=start):
                try:
                    for part in self._parts(content):
                        groups.setdefault(self._prompt(content, side), []).append((row, part))
                except (ValueError, OSError) as error:
                    errors[row] = str(error)
            for prompt, parts in groups.items():
                found = self._model.encode(
                    [part for _, part in parts],
                    batch_size=self._batch_size,
                    normalize_embeddings=True,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                    **({"prompt": prompt} if prompt else {}),
                )
                np.add.at(sums, [row for row, _ in parts], found)
        vectors = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        vectors[list(errors)] = np.nan
        return EmbeddedShard(vectors, errors, seconds=time.perf_counter() - began)

    def _prompt(self, content: Content, side: Side) -> str:
        if not self._instructs:
            return ""
        if side == "document" or not content.instruction:
            return "Represent the user's input."
        instruction = content.instruction.strip()
        return instruction if instruction[-1] in ".?!:;" else f"{instruction}."

    def _parts(self, content: Content) -> list[Any]:
        """What is encoded for a content: one dict, or its parts one by one.

        Raises:
            ValueError: the model reads none of that kind, or there is nothing to read.
        """
        text = content.text if self._instructs else content.words
        needed = {"image"} if content.image is not None or content.frames else {"text"}
        if not needed <= self._kinds:
            raise ValueError(f"this model reads {', '.join(sorted(self._kinds))}; the input has {needed.pop()}s")
        image, frames = loaded_media(content, self._num_frames)
        if "message" in self._kinds:
            media = {"image": image} if image is not None else {"video": frames} if frames else {}
            return [{**media, **({"text": text} if text.strip() or not media else {})}]
        parts = [*([image] if image is not None else []), *frames, *([text] if text.strip() else [])]
        if not parts:
            raise ValueError("it is empty")
        return parts


def _digest(model: torch.nn.Module) -> str:
    """Tells weights apart."""
    digest = hashlib.blake2b(digest_size=8)
    add_weights(digest, model)
    return digest.hexdigest()


BASELINES = (*RECIPES, "qwen3-vl-embedding", "sentence-transformers")


def open_baseline(
    name: str, model: str, *, device: str = "cpu", batch_size: int = 32, max_new_tokens: int = 512
) -> Embedder:
    """A model of others.

    Args:
        name: how it is used, one of `BASELINES`.
        model: a folder or a Hub name.
        device: where it runs.
        batch_size: inputs per pass at most.
        max_new_tokens: limit of a rationale.

    Raises:
        ValueError: there is no such name.
        OSError: there is no such model.
    """
    if name in RECIPES:
        return Qwen2VLEmbedder(name, model, device=device, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if name in BASELINES:
        instructs = name == "qwen3-vl-embedding"
        num_frames = 64 if instructs else 8
        return SentenceTransformerEmbedder(
            model, device=device, batch_size=batch_size, instructs=instructs, num_frames=num_frames
        )
    raise ValueError(f"there is no baseline {name!r}; expected one of {', '.join(BASELINES)}")
