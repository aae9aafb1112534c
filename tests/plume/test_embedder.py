"""The user's object and the other doors of the same folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from plume import InputError, Item, Plume, PlumeModel


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


def mixed(picture):
    return [
        "a red kite",
        picture(84, 56),
        {"text": "what is this?", "image": picture(56, 84, 1)},
        {"text": "table", "instruction": "Find the"},
    ]


def test_a_mixed_list_gives_unit_vectors_in_its_order(plume, model, picture):
    vectors = plume.encode(mixed(picture), batch_size=3)
    assert vectors.shape == (4, 64)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for raw, vector in zip(mixed(picture), vectors, strict=True):
        alone = model(**model.processor.encode([Item.parse(raw)])).embedding[0].detach().numpy()
        assert np.allclose(vector, alone, atol=1e-5)


def test_a_single_input_gives_a_single_vector(plume, picture):
    assert plume.encode("a red kite").shape == (64,)
    assert plume.encode(picture()).shape == (64,)


def test_the_number_of_latent_steps_is_a_knob_of_the_call(plume, model):
    batch = model.processor.encode([Item.parse("red")])
    for steps in (0, 1, 7):
        expected = model(**batch, num_latent_steps=steps).embedding[0].detach().numpy()
        assert np.allclose(plume.encode("red", num_latent_steps=steps), expected, atol=1e-6)
    assert not np.allclose(plume.encode("red", num_latent_steps=0), plume.encode("red"), atol=1e-3)


@pytest.mark.parametrize("steps", [33, -1])
def test_steps_that_the_checkpoint_cannot_run_are_refused(plume, steps):
    with pytest.raises(ValueError, match="num_latent_steps"):
        plume.encode("red", num_latent_steps=steps)


def test_an_instruction_changes_the_embedding_and_is_written_in_the_user_turn(plume):
    told = plume.encode("red", instruction="Find the")
    assert np.allclose(told, plume.encode({"text": "red", "instruction": "Find the"}))
    assert np.allclose(told, plume.encode("Find the red"), atol=1e-6)
    assert np.allclose(told, plume.encode("red", prompt="Find the "), atol=1e-6)


def test_bad_inputs_are_named_and_do_not_cost_the_others(plume):
    inputs = ["red", "", "blue", 4]
    with pytest.raises(InputError, match="input 1 is empty"):
        plume.encode(inputs)
    with pytest.warns(UserWarning, match="2 inputs were skipped") as caught:
        vectors = plume.encode(inputs, on_error="skip")
    assert "input 3 is a int" in str(caught[0].message)
    assert np.isnan(vectors[[1, 3]]).all()
    assert np.allclose(vectors[[0, 2]], plume.encode(["red", "blue"]), atol=1e-6)
    with pytest.warns(UserWarning, match="1 inputs"):
        assert plume.encode([""], on_error="skip").shape == (1, 64)


def test_an_input_that_is_too_long_is_named_and_does_not_cost_the_others(plume):
    inputs = ["red", "z " * 5000, "blue"]
    with pytest.raises(InputError, match=r"input 1 has 500\d tokens, the model takes 4096"):
        plume.encode(inputs)
    with pytest.warns(UserWarning, match="input 1"):
        vectors = plume.encode(inputs, on_error="skip", truncate_dim=16, batch_size=1)
    assert np.isnan(vectors).any(axis=1).tolist() == [False, True, False]
    with pytest.raises(InputError, match="the instruction: the text holds '<bot>'"):
        plume.encode(inputs, instruction="<bot>", on_error="skip")


def test_windows_keep_order_and_values(plume, monkeypatch):
    inputs = [f"kite {number}" for number in range(23)]
    whole = plume.encode(inputs)
    monkeypatch.setattr("plume.embedder._BATCHES_PER_WINDOW", 1)
    assert np.allclose(plume.encode(inputs, batch_size=4), whole, atol=1e-5)


def test_what_sentence_transformers_offers_still_works(plume):
    vectors = plume.encode(["red", "blue"], convert_to_tensor=True)
    assert isinstance(vectors, torch.Tensor)
    assert plume.similarity(vectors, vectors).shape == (2, 2)
    assert plume.encode(["red", "blue"], truncate_dim=16).shape == (2, 16)
    assert plume.encode(["red", "blue"], precision="ubinary").shape == (2, 8)
    assert np.allclose(plume.encode_query(["red"]), plume.encode(["red"]))
    assert plume.get_embedding_dimension() == 64
    assert plume.encode([]).shape == (0, 64)


def test_every_door_gives_the_same_embedding_to_the_bit(plume, plume_folder, model, tmp_path):
    batch = dict(model.processor.encode([Item.parse("a red kite")]))
    expected = model(**batch).embedding
    assert torch.equal(AutoModel.from_pretrained(plume_folder).eval()(**batch).embedding, expected)
    stock = SentenceTransformer(str(plume_folder), device="cpu")
    assert torch.equal(stock.encode(["a red kite"], convert_to_tensor=True), expected)
    assert torch.equal(plume.encode(["a red kite"], convert_to_tensor=True), expected)

    model.save_pretrained(tmp_path / "again")
    assert torch.equal(PlumeModel.from_pretrained(tmp_path / "again").eval()(**batch).embedding, expected)
    plume.save_pretrained(str(tmp_path / "saved"))
    reopened = Plume(tmp_path / "saved", device="cpu")
    assert torch.equal(reopened.encode(["a red kite"], convert_to_tensor=True), expected)
