"""The user's object and the other doors of the same folder."""

from __future__ import annotations

import warnings

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings
from transformers import AutoModel

from plume import InputError, Item, Plume, PlumeModel, pages
from plume.engine.engine import Engine
from plume.random_models import SHORT_STRINGS
from plume.search.index import Index


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
    with pytest.raises(InputError, match="input 1: it is empty"):
        plume.encode(inputs)
    with pytest.warns(UserWarning, match="2 inputs were skipped") as caught:
        vectors = plume.encode(inputs, on_error="skip")
    assert "input 3: it is a int" in str(caught[0].message)
    assert np.isnan(vectors[[1, 3]]).all()
    assert np.allclose(vectors[[0, 2]], plume.encode(["red", "blue"]), atol=1e-6)
    with pytest.warns(UserWarning, match="1 inputs"):
        assert plume.encode([""], on_error="skip").shape == (1, 64)


def test_an_input_that_is_too_long_is_named_and_does_not_cost_the_others(plume):
    inputs = ["red", "z " * 5000, "blue"]
    with pytest.raises(InputError, match=r"input 1: it has 500\d tokens, the model takes 4096"):
        plume.encode(inputs)
    with pytest.warns(UserWarning, match="input 1"):
        vectors = plume.encode(inputs, on_error="skip", truncate_dim=16, batch_size=1)
    assert np.isnan(vectors).any(axis=1).tolist() == [False, True, False]


def test_windows_keep_order_and_values(plume, monkeypatch):
    inputs = [f"kite {number}" for number in range(23)]
    whole = plume.encode(inputs)
    monkeypatch.setattr("plume.embedder.encode._BATCHES_PER_WINDOW", 1)
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


def test_every_door_gives_the_same_embedding_to_the_bit(plume_folder, model, tmp_path):
    plume = Plume(plume_folder, device="cpu", backend="torch")
    batch = dict(model.processor.encode([Item.parse("a red kite")]))
    expected = model(**batch).embedding
    assert torch.equal(AutoModel.from_pretrained(plume_folder).eval()(**batch).embedding, expected)
    stock = SentenceTransformer(str(plume_folder), device="cpu")
    assert torch.equal(stock.encode(["a red kite"], convert_to_tensor=True), expected)
    assert torch.equal(plume.encode(["a red kite"], convert_to_tensor=True), expected)

    model.save_pretrained(tmp_path / "again")
    assert torch.equal(PlumeModel.from_pretrained(tmp_path / "again").eval()(**batch).embedding, expected)
    plume.save_pretrained(str(tmp_path / "saved"))
    reopened = Plume(tmp_path / "saved", device="cpu", backend="torch")
    assert torch.equal(reopened.encode(["a red kite"], convert_to_tensor=True), expected)


def everything(picture, two_page_pdf):
    frames = np.stack([np.asarray(picture(56, 56, seed)) for seed in range(3)])
    message = [
        {"role": "system", "content": "Find:"},
        {"role": "user", "content": [{"type": "text", "text": "red "}, {"type": "image", "image": picture()}]},
    ]
    return [
        "a red kite",
        picture(84, 56),
        {"image": [picture(), picture(28, 28, 1)], "text": "which?"},
        {"video": frames, "text": "what moves?"},
        pages(two_page_pdf)[0],
        message,
        {"text": "kite", "instruction": "Find:"},
        *(f"caption {number} " * number for number in range(1, 9)),
    ]


def test_embeddings_do_not_depend_on_how_inputs_are_grouped(plume, picture, two_page_pdf):
    inputs = everything(picture, two_page_pdf)
    whole = plume.encode(inputs)
    alone = np.stack([plume.encode(one) for one in inputs])
    assert np.allclose(whole, alone, atol=1e-5)
    for budget in ({"batch_size": 3}, {"max_tokens_per_batch": 1}, {"max_tokens_per_batch": 40}):
        assert np.allclose(plume.encode(inputs, **budget), whole, atol=1e-5)


def test_the_token_budget_separates_long_inputs_from_short_ones(plume, picture, monkeypatch):
    seen = []
    run = plume.engine.run

    def spy(laid_out):
        seen.append(tuple(laid_out.ids.shape))
        return run(laid_out)

    monkeypatch.setattr(plume.engine, "run", spy)
    captions = ["red kite"] * 20
    plume.encode([*captions[:10], picture(560, 560), *captions[10:]], max_tokens_per_batch=512)
    assert [rows for rows, _ in seen] == [1, 20]
    assert seen[1][1] < 10


def test_queries_and_documents_may_have_different_numbers_of_steps(plume_folder, plume):
    both = Plume(plume_folder, device="cpu", num_latent_steps={"query": 3, "document": 0})
    assert np.array_equal(both.encode_query("red"), plume.encode("red", num_latent_steps=3))
    assert np.array_equal(both.encode_document(["red"]), plume.encode(["red"], num_latent_steps=0))
    asked = {"query": 1, "document": 2}
    assert np.array_equal(plume.encode_query("red", num_latent_steps=asked), plume.encode("red", num_latent_steps=1))
    assert np.array_equal(both.encode("red", num_latent_steps=2), plume.encode("red", num_latent_steps=2))
    with pytest.raises(ValueError, match="call encode_query or encode_document"):
        both.encode("red")
    with pytest.raises(ValueError, match='needs "query" and "document"'):
        Plume(plume_folder, device="cpu", num_latent_steps={"query": 3})
    with pytest.raises(ValueError, match="exceeds the step table"):
        Plume(plume_folder, device="cpu", num_latent_steps={"query": 99, "document": 0})


def test_presets_are_instructions_in_the_user_turn(plume):
    for name in ("retrieve", "classify", "question"):
        expected = plume.encode("red", instruction=plume.prompts[name])
        assert np.array_equal(plume.encode("red", prompt_name=name), expected)
    with pytest.raises(ValueError, match="'summarise' not found"):
        plume.encode("red", prompt_name="summarise")
    with pytest.raises(ValueError, match="give instruction, or prompt or prompt_name"):
        plume.encode("red", prompt_name="retrieve", instruction="Find:")


def test_all_precisions_and_lengths_are_those_of_sentence_transformers(plume):
    texts = [f"kite {number}" for number in range(12)]
    whole = plume.encode(texts)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        expected = quantize_embeddings(whole, precision=precision)
        assert np.array_equal(plume.encode(texts, precision=precision), expected)
    short = plume.encode(texts, truncate_dim=16, normalize_embeddings=True)
    assert np.allclose(short, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-6)


def test_two_processes_give_what_one_gives(plume, picture, two_page_pdf):
    inputs = [*everything(picture, two_page_pdf), picture(280, 280), *["kite " * 30] * 3]  # short and long ones
    settings = {"batch_size": 4, "max_tokens_per_batch": 64, "num_latent_steps": 4}
    with pytest.warns(UserWarning, match=f"input {len(inputs)}: it is empty"):
        found = plume.encode([*inputs, ""], device=["cpu", "cpu"], on_error="skip", **settings)
    assert np.allclose(found[:-1], plume.encode(inputs), atol=1e-5)
    assert np.isnan(found[-1]).all()


@pytest.mark.parametrize("kind", range(6))
def test_sentence_transformers_gives_the_same_for_every_kind(plume, plume_folder, picture, two_page_pdf, kind):
    inputs = everything(picture, two_page_pdf)
    inputs[4] = pages(two_page_pdf)[0].render(10_000)
    stock = SentenceTransformer(str(plume_folder), device="cpu")
    same_layers = Plume(plume_folder, device="cpu", backend="torch")
    for one, tolerance in ((same_layers, 0), (plume, 2e-6)):
        assert np.allclose(stock.encode([inputs[kind]]), one.encode([inputs[kind]]), rtol=0, atol=tolerance)
        expected = stock.encode(["red"], prompt="Find:")
        assert np.allclose(expected, one.encode(["red"], instruction="Find:"), rtol=0, atol=tolerance)


def test_a_blank_image_before_text_is_a_field_of_the_checkpoint(backbone_folder, tmp_path):
    model = PlumeModel.from_backbone(str(backbone_folder), blank_image_size=56, **SHORT_STRINGS).eval()
    model.save_pretrained(tmp_path)
    blank = Image.new("RGB", (56, 56), "white")
    plume = Plume(tmp_path, device="cpu")
    assert np.allclose(plume.encode("red"), plume.encode({"image": blank, "text": "red"}), atol=1e-6)
    assert np.allclose(SentenceTransformer(str(tmp_path), device="cpu").encode("red"), plume.encode("red"), atol=1e-6)
    config = model.config.to_dict()
    assert config["blank_image_size"] == 56


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_value": "token_embeddings"}, "Plume.trace returns states"),
        ({"output_value": None, "precision": "int8"}, "drop precision"),
        ({"max_tokens_per_batch": 0}, "must be at least 1"),
        ({"on_error": "ignore"}, '"raise" or "skip"'),
        ({"processing_kwargs": {"text": {"max_length": 9}}}, "cut with truncate=True"),
        ({"processing_kwargs": {"image": {"min_pixels": 784}}}, "can be set for a call"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused(plume, settings, message):
    with pytest.raises(ValueError, match=message):
        plume.encode("red", **settings)


def test_the_size_of_images_can_be_set_for_one_call(plume, picture):
    settings = {"image": {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}}
    found = plume.encode([picture(280, 280), "red"], processing_kwargs=settings)
    expected = plume.encode([picture(280, 280).resize((56, 56), Image.Resampling.BICUBIC), "red"])
    assert np.allclose(found, expected, atol=1e-6)


def test_an_error_while_preparing_the_next_batch_is_raised(plume, picture, monkeypatch):
    encode = type(plume.plume_model.processor).encode

    def fail(self, items, *arguments, **keywords):
        if any(item.text == "bad" for item in items):
            raise RuntimeError("the disk is gone")
        return encode(self, items, *arguments, **keywords)

    monkeypatch.setattr(type(plume.plume_model.processor), "encode", fail)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        plume.encode([{"image": picture(), "text": "red"}, {"image": picture(28, 28), "text": "bad"}], batch_size=1)


def test_the_steps_of_the_constructor_hold_for_traces_and_indices_too(plume_folder, tmp_path):
    both = Plume(plume_folder, device="cpu", num_latent_steps={"query": 3, "document": 0})
    assert len(both.trace("red")[0].states) == 4
    identity = Index.create(tmp_path / "index", both).identity
    assert (identity.query_latent_steps, identity.num_latent_steps) == (3, 0)


def test_what_the_embedder_was_given_is_saved_with_it(plume_folder, tmp_path):
    given = Plume(plume_folder, device="cpu", truncate_dim=16, prompts={"mine": "Find:"})
    given.save_pretrained(str(tmp_path))
    again = Plume(tmp_path, device="cpu")
    assert again.prompts["mine"] == "Find:"
    assert again.encode("red", prompt_name="mine", num_latent_steps=np.int64(2)).shape[0] in (16, 64)
    again.plume_model.save_pretrained(tmp_path)
    assert Plume(tmp_path, device="cpu").prompts["mine"] == "Find:"


def test_nothing_but_bad_inputs_leaves_rows_of_the_right_length(plume):
    with pytest.warns(UserWarning, match="1 inputs were skipped"):
        assert plume.encode([""], on_error="skip", truncate_dim=16).shape == (1, 16)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"video": "QUJD" * 2000}, "no file at QUJD"),
        ({"image": "QUJD" * 2000}, "no file at"),
        ({"image": "http://127.0.0.1:bad/a b.png"}, "cannot be downloaded"),
        ({"image": "http://127.0.0.1:9/ä b.png"}, "cannot be downloaded"),
        ({"video": ["a.png"], "max_frames": 0.5}, "'max_frames' is 0.5; expected a whole number"),
    ],
)
def test_whatever_is_wrong_with_an_input_it_is_skipped_and_named_briefly(plume, raw, message):
    with pytest.warns(UserWarning, match="input 1: ") as caught:
        vectors = plume.encode(["red", raw], on_error="skip")
    assert np.isnan(vectors).any(axis=1).tolist() == [False, True]
    assert message in str(caught[0].message)
    assert len(str(caught[0].message)) < 500


def test_an_order_that_was_not_expected_costs_time_but_not_truth(plume, picture, monkeypatch):
    """Should another version of sentence-transformers sort otherwise, prepared tensors must not meet other rows."""
    inputs = [{"image": picture(28, 28, seed), "text": "red"} for seed in range(7)]
    expected = plume.encode(inputs, batch_size=2)
    monkeypatch.setattr(Plume, "_input_length", staticmethod(lambda sample: sample.place))
    assert np.allclose(plume.encode(inputs, batch_size=2), expected, atol=1e-5)


def test_containers_of_inputs_are_lists_and_others_say_what_to_pass(plume):
    frame = pd.DataFrame({"text": ["red", "blue"], "kind": ["a", "b"]})
    expected = plume.encode(["red", "blue"])
    table = datasets.Dataset.from_pandas(frame)
    sound = [
        ("red", "blue"),
        frame["text"],
        frame["text"].to_numpy(),
        np.array(["red", "blue"]),
        pd.Index(["red", "blue"]),
        iter(["red", "blue"]),
        (one for one in ("red", "blue")),
        {"red": 1, "blue": 2}.keys(),
        table["text"],
        [{"text": "red"}, {"text": "blue"}],
        frame[["text"]].to_dict("records"),
    ]
    for inputs in sound:
        vectors = plume.encode(inputs)
        assert np.allclose(vectors, expected, atol=1e-6), type(inputs)
    for inputs in (frame, frame[["text"]], pa.Table.from_pandas(frame)):
        with pytest.raises(InputError, match="whose items are its columns; expected a list of inputs: pass one column"):
            plume.encode(inputs)
    for inputs in ({"red", "blue"}, frozenset({"red"})):
        with pytest.raises(InputError, match="which has no order"):
            plume.encode(inputs)


@pytest.mark.parametrize("bad", [None, 5, 2.5, True, object()], ids=["None", "5", "2.5", "True", "object"])
def test_what_is_neither_an_input_nor_a_list_is_named_through_every_door(plume, tmp_path, bad):
    kind = type(bad).__name__
    for call in (plume.encode, plume.encode_query, plume.encode_document, plume.trace):
        with pytest.raises(InputError, match=f"the inputs: they are a {kind}; expected one input or a list of them"):
            call(bad)
    for inputs in (["red", bad], [bad]):
        with pytest.raises(InputError, match=f"input {len(inputs) - 1}: it is a {kind}; expected a string"):
            plume.encode(inputs)


def test_vectors_that_are_cut_are_unit_vectors_of_what_is_kept(plume_folder, plume):
    whole = plume.encode(["red", "blue kite"])
    for dim in (1, 16, 64):
        expected = whole[:, :dim] / np.linalg.norm(whole[:, :dim], axis=1, keepdims=True)
        cut = Plume(plume_folder, device="cpu", truncate_dim=dim)
        assert np.allclose(cut.encode(["red", "blue kite"]), expected, atol=1e-6)
        assert np.allclose(plume.encode(["red", "blue kite"], truncate_dim=dim), expected, atol=1e-6)
        assert np.allclose(plume.encode_query("red", truncate_dim=dim), expected[0], atol=1e-6)
        with plume.truncate_embeddings(dim):
            assert np.allclose(plume.encode_document(["red", "blue kite"]), expected, atol=1e-6)
        assert plume.encode([], truncate_dim=dim).shape == (0, dim)


@pytest.mark.parametrize("dim", [-1, 0, 65, 999, 1.5, True, "16"])
def test_a_length_that_vectors_do_not_have_is_refused(plume_folder, plume, dim):
    message = "truncate_dim must be a whole number from 1 to 64, or None"
    with pytest.raises(ValueError, match=message):
        plume.encode("red", truncate_dim=dim)
    with pytest.raises(ValueError, match=message):
        Plume(plume_folder, device="cpu", truncate_dim=dim)
    with pytest.raises(ValueError, match=message), plume.truncate_embeddings(dim):
        plume.encode("red")


def test_the_name_that_sentence_transformers_gave_inputs_before_works(plume):
    expected = plume.encode(["red", "blue"])
    for call in (plume.encode, plume.encode_query, plume.encode_document):
        assert np.allclose(call(sentences=["red", "blue"]), expected, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_quantised_vectors_can_be_compared(plume, precision, as_tensor):
    texts = ["red kite", "red kites", "a table", "blue", "kite table", "red blue"]
    vectors = plume.encode(texts, precision=precision, convert_to_tensor=as_tensor)
    found = plume.similarity(vectors, vectors)
    assert found.shape == (6, 6)
    assert torch.allclose(found.diagonal(), torch.ones(6), atol=1e-5)
    assert torch.allclose(plume.similarity_pairwise(vectors, vectors), torch.ones(6), atol=1e-5)
    if "binary" in precision:  # a bit is the sign of a number
        signs = np.where(plume.encode(texts) > 0, 1.0, -1.0)
        assert np.allclose(found, signs @ signs.T / 64, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_autocast_around_a_call_changes_nothing(plume_folder, picture, tmp_path, backend, kind):
    inputs = ["red kite", {"image": picture(), "text": "blue"}, {"video": [picture(), picture(seed=1)]}]
    plume = Plume(plume_folder, device="cpu", backend=backend)
    expected = plume.encode(inputs)
    with torch.autocast(kind, dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(plume.encode(inputs), expected)
        assert np.array_equal(plume.encode_query(inputs[1]), plume.encode_query(inputs[1]))
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / "a.txt").write_text("red kite")
        index = Index.create(tmp_path / "index", plume)
        assert index.update(tmp_path / "notes", plume, show_progress=False).embedded == 1
        assert index.search("red kite", plume)[0].score == pytest.approx(1, abs=1e-5)
        if backend == "auto":
            model = plume.plume_model
            batch = model.processor.encode([model.processor.parse(one) for one in inputs])
            assert np.allclose(plume.engine(batch).embedding, expected, atol=1e-6)
            assert np.allclose(Engine(model)(batch, num_latent_steps=2).embedding.norm(dim=-1), 1)


def test_integers_that_may_be_numbers_or_bits_are_not_compared(plume):
    vectors = plume.encode(["red kite", "a table"], truncate_dim=32, precision="binary")
    for kind in (np.int8, np.uint8):
        with pytest.raises(ValueError, match=r"may be that many numbers, or the bits of 32"):
            plume.similarity(vectors.astype(kind), vectors.astype(kind))
    whole = np.array([[3, 4], [4, 3]])
    for numbers in (whole, whole.tolist(), torch.as_tensor(whole)):
        assert plume.similarity(numbers, numbers)[0, 1].item() == pytest.approx(0.96)


def test_similarities_do_not_depend_on_a_callers_autocast(plume):
    vectors = plume.encode(["red kite", "a table", "blue"], convert_to_tensor=True)
    expected = plume.similarity(vectors, vectors), plume.similarity_pairwise(vectors, vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plume.similarity(vectors, vectors), expected[0])
        assert torch.equal(plume.similarity_pairwise(vectors, vectors), expected[1])
