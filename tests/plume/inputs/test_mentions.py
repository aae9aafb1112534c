"""Texts that mention the model's own tokens: spelt as text through every door, wherever a token would come together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from plume import Item, Plume, PlumeModel
from plume.tokens import RESERVED

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture(scope="module")
def steering(plume) -> set[int]:
    return set(
        plume.tokenizer.convert_tokens_to_ids([token for token in RESERVED if token in plume.tokenizer.get_vocab()])
    )


def ids(model, raw) -> list[int]:
    return model.processor.encode([model.processor.parse(raw)])["input_ids"][0].tolist()


@pytest.mark.parametrize("token", RESERVED)
def test_a_mentioned_token_is_spelt(plume, steering, token):
    model = plume.plume_model
    own = [one for one in ids(model, "red") if one in steering]
    for text in (f"a {token} b", token, f"{token}{token}", f"red{token}"):
        found = ids(model, text)
        assert [one for one in found if one in steering] == own
        # Nothing of the text is lost: its characters are all there, apart from white space.
        spelt = plume.tokenizer.decode([one for one in found if one not in steering])
        assert spelt.replace(" ", "") == text.replace(" ", "")
    assert np.isfinite(plume.encode(f"a {token} b")).all()


def ways(token: str, picture) -> dict:
    """Inputs whose parts make the token only when they are joined."""
    head, tail = token[:3], token[3:]
    return {
        "texts of a dict": {"text": [f"a {head}", f"{tail} b"]},
        "parts of a message": {
            "role": "user",
            "content": [{"type": "text", "text": head}, {"type": "text", "text": tail}],
        },
        "turns of a chat": [{"role": "user", "content": head}, {"role": "user", "content": tail}],
        "beside an image": {"image": picture, "text": [head, tail]},
        "an instruction": {"text": "red", "instruction": f"say {token}"},
        "instruction and text": [{"role": "system", "content": token}, {"role": "user", "content": token}],
        "three parts": {"text": list(token)},
    }


@pytest.mark.parametrize(
    "token", ["<gen_emb>", "<|image_pad|>", "<|video_pad|>", "<bot>", "<|im_end|>", "<|vision_start|>"]
)
def test_a_token_that_is_put_together_from_parts_is_spelt(plume, steering, picture, token):
    model = plume.plume_model
    for way, raw in ways(token, picture()).items():
        plain = {"image": picture(), "text": "red"} if way == "beside an image" else "red"
        own = [one for one in ids(model, plain) if one in steering]
        assert [one for one in ids(model, raw) if one in steering] == own, way
    vectors = plume.encode([*ways(token, picture()).values(), "red"], on_error="skip")
    assert np.isfinite(vectors).all()
    assert np.allclose(vectors[-1], plume.encode("red"), atol=1e-5)


def test_tokens_that_users_added_are_tokens_beside_a_mention(plume_folder):
    model = PlumeModel.from_pretrained(plume_folder)
    model.processor.tokenizer.add_tokens(["<ITEM>"])
    item = model.processor.tokenizer.convert_tokens_to_ids("<ITEM>")
    assert ids(model, "red <ITEM> <gen_emb> <ITEM>").count(item) == 2
    text = "red <ITEM> kite"
    mentioned, plain = ids(model, f"{text} <gen_emb>"), ids(model, text)
    assert mentioned[: len(plain) - 2] == plain[:-2]  # spelling a mention changes nothing before it


def test_every_door_spells_a_mention(plume_folder, plume):
    text = "what does <gen_emb> mean?"
    expected = plume.encode(text)
    stock = SentenceTransformer(str(plume_folder), device="cpu")
    assert np.allclose(stock.encode(text), expected, atol=2e-6)
    model = plume.plume_model
    alone = model(**model.processor.encode([Item.parse(text)])).embedding[0].detach()
    assert np.allclose(alone, expected, atol=2e-6)
    assert np.abs(expected - plume.encode("what does mean?")).max() > 1e-3


def test_the_documentation_of_this_repository_can_be_embedded(plume):
    """Its texts mention the tokens; the limit of length is the only one that counts."""
    chunks = [
        part
        for name in ("README.md", "plume/tokens.py", "train/README.md")
        for part in (ROOT / name).read_text(encoding="utf-8").split("\n\n")
        if 0 < len(part.strip()) < 900
    ]
    assert any("<gen_emb>" in chunk for chunk in chunks)
    chosen = [chunk for chunk in chunks if "<" in chunk][:12]
    assert np.isfinite(plume.encode(chosen)).all()


def test_white_space_around_a_text_changes_nothing(plume, picture):
    """It is stripped in training and in the published evaluation; between the parts of an input it stays."""
    model = plume.plume_model
    write = model.processor.write
    for raw, plain in (
        ("\n red kite \t", "red kite"),
        ({"text": " red ", "image": picture()}, {"text": "red", "image": picture()}),
        ({"text": [" red ", " kite "]}, {"text": ["red ", " kite"]}),
        ({"text": " red", "instruction": " Find: "}, {"text": "red", "instruction": "Find:"}),
    ):
        assert write([Item.parse(raw)]) == write([Item.parse(plain)])
        assert torch.equal(*(torch.tensor(ids(model, one)) for one in (raw, plain)))
    messages = [{"role": "user", "content": [{"type": "text", "text": t} for t in (" a ", "", " b ", " ")]}]
    assert model.processor.apply_chat_template(messages) == write([model.processor.parse(messages)])[0]
