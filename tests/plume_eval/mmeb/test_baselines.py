"""Models of others: their prompts, and their vectors against transformers by hand, on random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from plume.random_models import save_tiny_backbone
from plume.tokens import ANCHOR, READ_OUT
from plume_eval.mmeb import baselines
from plume_eval.mmeb.baselines import (
    BASELINES,
    RECIPES,
    Qwen2VLEmbedder,
    SentenceTransformerEmbedder,
    gme_text,
    open_baseline,
    ume_r1_text,
    vlm2vec_text,
)
from plume_eval.mmeb.content import Content, StoredImage


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A Qwen2-VL that knows the tokens of UME-R1."""
    folder = tmp_path_factory.mktemp("qwen")
    save_tiny_backbone(folder, ["red", "blue", "kite", ANCHOR, READ_OUT])
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        Image.new("RGB", (56, 56 + 28 * number), (80 * number, 20, 90)).save(file)
    return files


def test_the_prompts_are_those_of_the_authors(pictures):
    image, text = Content("Find it:", "a kite", pictures[0], ending="\n"), Content("Find it:", "a kite ")
    page = Content("Understand it.", image=StoredImage(None, 0, "page 0"))
    clip = Content("Recognize it.", frames=tuple(pictures))
    assert vlm2vec_text(image, "query") == "<|image_pad|>\nFind it: a kite\n"
    assert vlm2vec_text(Content("Find it:", "a kite", ending="\n\n"), "query") == "Find it: a kite\n\n"
    assert vlm2vec_text(page, "document") == "<|image_pad|> Understand it."
    assert vlm2vec_text(clip, "query") == "<|video_pad|> Recognize it."
    assert vlm2vec_text(Content(text="yes"), "document") == "yes"
    assert gme_text(text, "query") == (
        "<|im_start|>system\nFind it:<|im_end|>\n<|im_start|>user\na kite<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )
    assert gme_text(page, "document") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|><|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    asked = ume_r1_text(image, "query")
    assert "<|vision_start|><|image_pad|><|vision_end|>Find it: a kite\n<disc_emb>\nRepresent the above input" in asked
    assert asked.endswith("use the <gen_emb> tag to represent the entire input.<|im_end|>\n<|im_start|>assistant\n")


def by_hand(folder: Path, text: str, image: Path | None, flat: bool) -> np.ndarray:
    """One input by transformers' own processor and model."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs: dict = {}
    if image is not None:
        settings, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(str(folder))
        low, high = RECIPES["gme" if flat else "vlm2vec-v2"].pixels
        settings = {**settings, "size": {"shortest_edge": low, "longest_edge": high}}
        packed = Qwen2VLImageProcessorPil.from_dict(settings)(Image.open(image), return_tensors="pt")
        count = int(packed["image_grid_thw"].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
        inputs = dict(packed)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    kinds = (ids == model.config.image_token_id).int()
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1) if flat else None
    with torch.no_grad():
        states = model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            position_ids=positions,
            **inputs,
        ).last_hidden_state
    return F.normalize(states[0, -1], dim=-1).numpy()


@pytest.mark.parametrize("recipe", ["vlm2vec-v2", "gme"])
def test_vectors_are_the_last_state_of_each_input_alone(backbone, pictures, recipe):
    contents = [Content("red", "kite", image=file) for file in pictures] + [
        Content("", "blue kite"),
        Content("red", ""),
    ]
    found = Qwen2VLEmbedder(recipe, str(backbone), batch_size=5).embed(contents, "query")
    assert found.errors == {}
    for content, vector in zip(contents, found.vectors, strict=True):
        text = RECIPES[recipe].text(content, "query")
        expected = by_hand(backbone, text, content.image, flat=RECIPES[recipe].has_flat_positions)
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_ume_r1_reads_the_state_of_what_it_has_written_last(backbone, pictures):
    contents = [
        Content("red", "kite", image=pictures[1]),
        Content("", "blue"),
        Content("", "kite", frames=tuple(pictures[:1])),
    ]
    embedder = Qwen2VLEmbedder("ume-r1", str(backbone), max_new_tokens=5)
    found = embedder.embed(contents, "query")
    assert 3 <= found.reasoning_steps <= 15
    assert all(found.texts)
    alone = [embedder.embed([content], "query") for content in contents]
    for row, one in enumerate(alone):
        assert found.texts[row] == one.texts[0]
        np.testing.assert_allclose(found.vectors[row], one.vectors[0], atol=1e-5)
    assert len(found.vectors) == 3


def test_an_input_that_cannot_be_read_gets_no_vector(backbone, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    contents = [Content("", "kite"), Content("", "", image=tmp_path / "bad.png")]
    found = Qwen2VLEmbedder("gme", str(backbone)).embed(contents, "document")
    assert list(found.errors) == [1]
    assert np.isnan(found.vectors[1]).all()
    assert np.isfinite(found.vectors[0]).all()


class Recorded:
    """In place of a SentenceTransformer: says what it was asked."""

    def __init__(self, modalities):
        self.modalities, self.calls = modalities, []

    def encode(self, inputs, *, prompt=None, **settings):
        self.calls.append((list(inputs), prompt))
        return np.eye(len(inputs), 4, dtype=np.float32)

    def get_embedding_dimension(self):
        return 4

    def named_parameters(self):
        return {}.items()

    dtype = torch.float32


def opened(monkeypatch, modalities, **settings) -> tuple[SentenceTransformerEmbedder, Recorded]:
    import sentence_transformers

    inside = Recorded(modalities)
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda *_, **__: inside)
    return SentenceTransformerEmbedder("org/model", **settings), inside


def test_qwen3_vl_embedding_gets_the_instruction_as_prompt(monkeypatch, pictures):
    embedder, inside = opened(monkeypatch, ["text", "image", "video", "message"], instructs=True)
    embedder.embed([Content("Find the image", "a kite"), Content("Why?", "red", image=pictures[0])], "query")
    (first, prompt), (second, other) = inside.calls
    assert (first, prompt) == ([{"text": "a kite"}], "Find the image.")
    assert (list(second[0]), other) == (["image", "text"], "Why?")
    embedder.embed([Content("Understand it.", "", image=pictures[0])], "document")
    assert inside.calls[2][1] == "Represent the user's input."
    assert list(inside.calls[2][0][0]) == ["image"]


def test_a_clip_reads_parts_alone_and_their_mean_is_the_vector(monkeypatch, pictures):
    embedder, inside = opened(monkeypatch, ["text", "image"])
    found = embedder.embed([Content("Find it:", "a kite", image=pictures[0]), Content(text="yes")], "query")
    ((parts, prompt),) = inside.calls
    assert prompt is None
    assert isinstance(parts[0], Image.Image)
    assert parts[1:] == ["Find it: a kite", "yes"]
    np.testing.assert_allclose(found.vectors[0], [0.5**0.5, 0.5**0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found.vectors[1], [0, 0, 1, 0], atol=1e-6)
    frames = embedder.embed([Content(frames=tuple(pictures))], "document")
    np.testing.assert_allclose(frames.vectors[0], [3**-0.5] * 3 + [0], atol=1e-6)


def test_what_a_model_does_not_read_is_an_error_and_no_zero(monkeypatch, pictures):
    embedder, _ = opened(monkeypatch, ["text"])
    found = embedder.embed([Content("Find it:", "a kite", pictures[0]), Content(), Content(text="yes")], "query")
    assert found.errors == {0: "this model reads text; the input has images", 1: "it is empty"}
    assert np.isnan(found.vectors[:2]).all()
    assert np.isfinite(found.vectors[2]).all()


def test_any_sentence_transformer_opens_by_its_name(plume_folder):
    embedder = open_baseline("sentence-transformers", str(plume_folder))
    found = embedder.embed([Content("red", "kite"), Content(text="blue")], "document")
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)


def test_names_of_baselines():
    assert set(RECIPES) < set(BASELINES)
    with pytest.raises(ValueError, match="there is no baseline 'bm25'; expected one of vlm2vec-v2, gme, ume-r1"):
        baselines.open_baseline("bm25", "model")
