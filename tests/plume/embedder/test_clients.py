"""What sentence-transformers, transformers and peft expect of a saved folder and of `Plume`."""

from __future__ import annotations

import json
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, TripletEvaluator
from transformers import AutoModel, AutoProcessor

from plume import Engine, InputError, Item, Plume, PlumeModel, PlumeProcessor
from plume.model.interface import padded_on_the_left
from plume.model.transition import MixtureOfExperts
from tests.processes import run

LORA = LoraConfig(target_modules=r".*language_model.*q_proj", r=4, init_lora_weights=False)
PROMPT = "First {content} then<disc_emb><bot>"


@pytest.fixture(scope="module")
def opened(plume_folder):
    """The folder as `Plume` and as plain SentenceTransformer."""
    return {"plume": Plume(plume_folder, device="cpu"), "plain": SentenceTransformer(str(plume_folder), device="cpu")}


@pytest.fixture(params=["plume", "plain"])
def opener(request):
    return {"plume": Plume, "plain": SentenceTransformer}[request.param]


def test_padding_on_either_side_gives_the_same_rows(model):
    texts = [Item.parse("red"), Item.parse("a red kite over the sea")]
    batch = dict(model.processor.encode(texts))
    expected = model(**batch).embedding
    pad = {"input_ids": torch.full((2, 3), 7), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    behind = {name: torch.cat([batch[name], pad[name]], dim=1) for name in pad}
    around = {name: torch.cat([pad[name], behind[name]], dim=1) for name in pad}
    for moved in (behind, around):
        assert torch.allclose(model(**moved).embedding, expected, atol=1e-6)
        assert torch.allclose(Engine(model)(moved).embedding, expected, atol=1e-5)


def test_rows_move_as_a_whole():
    ids = torch.tensor([[1, 2, 9, 9], [9, 3, 4, 9], [9, 9, 5, 6], [9, 9, 9, 9]])
    found, mask = padded_on_the_left(ids, ids != 9)
    assert found.tolist() == [[9, 9, 1, 2], [9, 9, 3, 4], [9, 9, 5, 6], [9, 9, 9, 9]]
    assert torch.equal(mask, found != 9)


LOSSES = {
    "in-batch negatives": losses.MultipleNegativesRankingLoss,
    "triplet": losses.TripletLoss,
    "matryoshka": lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [64, 16]),
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_hard_negatives_train_and_evaluate_with_sentence_transformers_losses(tmp_path, plume_folder, opener, loss):
    model = opener(str(plume_folder), device="cpu")
    rows = [{"anchor": f"a {i}", "positive": f"b {i} is longer than {i}", "negative": f"c {i}"} for i in range(8)]
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows)
    before = model[0].model.transition.router.weight.clone()
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, loss=LOSSES[loss](model)
    )
    trainer.train()
    assert not torch.equal(model[0].model.transition.router.weight, before)
    assert np.isfinite(trainer.state.log_history[0]["eval_loss"])


@pytest.mark.parametrize("name", ["plume", "plain"])
def test_a_probe_can_be_trained_on_vectors_that_were_made_without_gradients(opened, name):
    model = opened[name].eval()
    with torch.no_grad():
        vectors = model(model.preprocess(["red", "blue kite"]))["sentence_embedding"]
    probe = torch.nn.Linear(64, 2)
    probe(vectors).sum().backward()
    assert torch.allclose(probe.weight.grad[0], vectors.sum(dim=0), atol=1e-6)


def test_nothing_that_leaves_the_engine_is_an_inference_tensor(model):
    batch = model.processor.encode([Item.parse("red")])
    for steps in (0, 2):
        assert not any(value.is_inference() for value in Engine(model)(batch, steps).values())
    with torch.inference_mode():
        assert Engine(model)(batch).embedding.is_inference()


def test_evaluators_run_with_their_defaults(opened):
    for model in opened.values():
        found = EmbeddingSimilarityEvaluator(["a", "b", "c"], ["a", "d", "e"], [1.0, 0.2, 0.3])(model)
        assert 0 < found["pearson_cosine"] <= 1
        assert TripletEvaluator(["a"], ["a"], ["f"])(model)["cosine_accuracy"] == 1


def test_calls_that_the_library_allows_mean_what_they_mean_there(opened):
    plume, plain = opened["plume"], opened["plain"]
    expected = plain.encode(["red", "blue"])
    assert np.allclose(plume.encode(("red", "blue"), precision=None), expected, atol=1e-6)
    rows = plume.encode(["red", "blue"], output_value=None)
    assert np.allclose(torch.stack([row["sentence_embedding"] for row in rows]), expected, atol=1e-6)
    assert plume.encode("red", output_value=None)["sentence_embedding"].shape == (64,)
    both = {"prompt": "Find:", "prompt_name": "classify"}
    assert np.allclose(plume.encode("red", **both), plain.encode("red", **both), atol=1e-6)
    with pytest.raises(ValueError, match="one hidden state and no mean of tokens"):
        plume.encode("red", output_value="token_embeddings")


@pytest.mark.filterwarnings("ignore:plume. transformers' own layers run")
@pytest.mark.parametrize("saved_by", ["plume", "plain", "model"])
def test_an_adapter_keeps_the_prompt_of_its_base_model(tmp_path, backbone_folder, opener, saved_by):
    base = tmp_path / "base"
    PlumeModel.from_backbone(str(backbone_folder), num_latent_steps=2, prompt_template=PROMPT).save_pretrained(base)
    opens = {"plume": Plume, "plain": SentenceTransformer, "model": PlumeModel.from_pretrained}[saved_by]
    model = opens(str(base))
    model.add_adapter(LORA)
    model.eval()
    if saved_by == "model":
        expected = model(**model.processor(text=["red"])).embedding[0].detach()
    else:
        expected = model.encode("red", convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "config.json").exists()
    found = opener(str(tmp_path / "adapter"), device="cpu").encode("red", convert_to_tensor=True)
    assert torch.allclose(found, expected, atol=1e-6)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "adapter"), PlumeModel)


def test_an_adapter_without_its_base_model_says_so(tmp_path, plume_folder):
    base = shutil.copytree(plume_folder, tmp_path / "base")
    model = PlumeModel.from_pretrained(base)
    model.add_adapter(LORA)
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(base)
    for opens in (Plume, PlumeModel.from_pretrained, PlumeProcessor.from_pretrained):
        with pytest.raises(
            ValueError, match=r"is an adapter of '.*base', which cannot be read \(there is no such folder"
        ):
            opens(tmp_path / "adapter")


def test_a_processor_that_is_saved_alone_keeps_its_prompt(tmp_path, backbone_folder):
    model = PlumeModel.from_backbone(str(backbone_folder), prompt_template=PROMPT, background="black")
    model.processor.save_pretrained(tmp_path / "alone")
    for opens in (PlumeProcessor, AutoProcessor):
        processor = opens.from_pretrained(tmp_path / "alone")
        assert processor.write([Item.parse("red")]) == ["First red then<disc_emb><bot>"]
        assert processor.limits.background == "black"


@pytest.mark.parametrize("config", [None, {"model_type": "qwen2_vl"}])
def test_a_processor_without_its_configuration_is_refused(tmp_path, plume_folder, config):
    folder = shutil.copytree(plume_folder, tmp_path / "kite")
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        PlumeProcessor.from_pretrained(folder)


LONG = "kite " * 3000


@pytest.mark.parametrize("way", ["constructor", "folder"])
def test_truncation_is_opted_in_by_constructor_or_folder(tmp_path, plume_folder, opener, way):
    settings = {"processor_kwargs": {"truncate": True}} if opener is SentenceTransformer else {"truncate": True}
    model = opener(str(plume_folder), device="cpu", **settings)
    model.max_seq_length = 300
    if way == "folder":
        model.save_pretrained(str(tmp_path / "kite"))
        model = opener(str(tmp_path / "kite"), device="cpu")
    with pytest.warns(UserWarning, match="4 inputs hold 1 longer than 300 tokens, .* and 2 without content"):
        vectors = model.encode(["red", LONG, "", " \n"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors[2], vectors[3], atol=1e-6)
    processor = model[0].processor
    fitted = processor.fit(Item.parse(LONG))
    assert LONG.startswith(fitted.text)
    assert np.allclose(vectors[1], Plume(plume_folder, device="cpu").encode(fitted.text), atol=1e-5)
    assert processor.exact_lengths([fitted]) == [300]


def test_nothing_is_truncated_unless_that_is_asked_for(opened):
    for model in opened.values():
        with pytest.raises(InputError, match=r"or let texts be cut with truncate=True"):
            model.encode([LONG * 10])
        with pytest.raises(InputError, match="it is empty"):
            model.encode(["red", ""])


@pytest.mark.parametrize("text", ["<gen_emb>é漢😀 " * 200, "<disc_emb>" * 300, "ab\n" * 900])
def test_a_text_is_cut_to_the_limit_whatever_its_tokens_are(plume_folder, picture, text):
    processor = Plume(plume_folder, device="cpu", truncate=True)[0].processor
    processor.tokenizer.model_max_length = 320
    item = Item.parse({"text": ["first", text], "image": picture(56, 56), "instruction": "Find:"})
    fitted = processor.fit(item)
    assert 300 < processor.exact_lengths([fitted])[0] <= 320
    assert fitted.images == item.images
    assert item.text.startswith(fitted.text)
    processor.tokenizer.model_max_length = 8
    with pytest.raises(InputError, match=r"its prompt and media alone have .* raise max_seq_length"):
        processor.fit(item)


def test_a_text_that_names_a_file_is_told_of_once(tmp_path, plume_folder, picture, monkeypatch):
    picture(56, 56).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    plume = Plume(plume_folder, device="cpu")
    with pytest.warns(UserWarning, match=r"input 1 is the text 'photo\.png', which is the name of a file") as told:
        plume.encode(["red", "photo.png", "photo.png"])
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plume.encode(["nosuch.png", "see photo.png"])


def test_results_of_another_k_are_another_models(plume_folder, tmp_path):
    cards = {steps: Plume(plume_folder, num_latent_steps=steps, device="cpu").model_card_data for steps in (None, 0, 4)}
    revisions = {card.base_model_revision for card in cards.values()}
    assert len(revisions) == len({None: 4, 0: 0, 4: 4}.values()) - 1  # None is the checkpoint's K, 4
    assert {card.model_name for card in cards.values()} == {f"local/{plume_folder.name}"}
    plume = Plume(plume_folder, device="cpu")
    plume.num_latent_steps = {"query": 4, "document": 0}
    assert plume.model_card_data.base_model_revision.endswith("-K4-K0")
    with pytest.raises(ValueError, match="exceeds the step table"):
        plume.num_latent_steps = 99
    other = shutil.copytree(plume_folder, tmp_path / plume_folder.name)
    model = PlumeModel.from_pretrained(other)
    with torch.no_grad():
        model.transition.router.weight.add_(1)
    model.save_pretrained(other)
    assert Plume(other, device="cpu").model_card_data.base_model_revision not in revisions


def test_the_object_is_known_by_the_name_of_its_type(opened):
    assert "sentence_transformers" in str(type(opened["plume"]))  # where BERTopic and KeyBERT look
    assert isinstance(opened["plume"], SentenceTransformer)


def test_the_processor_writes_the_prompt_of_plain_inputs(model, plume_folder, picture):
    processor, image = AutoProcessor.from_pretrained(plume_folder), picture(56, 56)
    plume = Plume(plume_folder, device="cpu")
    for given, inputs in (
        ({"text": ["red", "<bot> blue"]}, ["red", "<bot> blue"]),
        ({"text": "what?", "images": image}, [{"text": "what?", "image": image}]),
        ({"images": [image, [image, image]]}, [{"image": image}, {"image": [image, image]}]),
    ):
        found = model(**processor(**given, return_tensors="pt")).embedding.detach()
        assert np.allclose(found, plume.encode(inputs), atol=1e-5)
    written = processor.write([Item.parse("red")])
    assert torch.equal(processor(text=written)["input_ids"], processor(text=["red"])["input_ids"])
    for given, message in (
        ({"text": ["a", "b"], "images": [image]}, "1 images and 2 texts; expected one image"),
        ({}, "received nothing"),
        ({"text": "<|image_pad|>what?", "images": [image]}, "but no prompt around it"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**given)


def test_tokens_without_the_prompt_are_refused_with_what_writes_it(model):
    ids = model.processor.tokenizer("red", return_tensors="pt")
    with pytest.raises(ValueError, match=r"must end with <bot>; write inputs with .*processor\.apply_chat_template"):
        model(**ids)


def test_peft_wraps_the_model_for_feature_extraction(plume_folder):
    model = PlumeModel.from_pretrained(plume_folder)
    batch = model.processor(text=["red"])
    expected = model(**batch).embedding
    settings = {**LORA.to_dict(), "task_type": TaskType.FEATURE_EXTRACTION, "init_lora_weights": True}
    wrapped = get_peft_model(model, LoraConfig(**{k: v for k, v in settings.items() if k != "peft_type"}))
    assert torch.allclose(wrapped(**batch).embedding, expected, atol=1e-6)
    with pytest.raises(ValueError, match="pass no inputs_embeds"):
        wrapped(**batch, inputs_embeds=torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match="returns no attentions"):
        wrapped(**batch, output_attentions=True)


def test_compile_is_refused_where_the_engine_runs_the_model(opened):
    with pytest.raises(ValueError, match='open the model with backend="torch"'):
        opened["plume"].compile()


def test_weights_that_accelerate_offloads_give_the_same_vectors(tmp_path, plume_folder, opener):
    expected = Plume(plume_folder, device="cpu").encode(["red", "a blue kite"])
    kwargs = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that transformers' layers run
        found = opener(str(plume_folder), model_kwargs=kwargs).encode(["red", "a blue kite"])
    assert np.allclose(found, expected, atol=1e-5)


def test_dynamic_quantisation_runs_and_leaves_the_router_exact(plume_folder, opener):
    model = opener(str(plume_folder), device="cpu")
    expected = model.encode(["red", "a blue kite"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        found = quantised.encode(["red", "a blue kite"])
    adapter = quantised[0].model.transition
    assert isinstance(adapter, MixtureOfExperts)
    assert isinstance(adapter.router, torch.nn.Linear)
    assert not isinstance(adapter.experts[0].fc1, torch.nn.Linear)
    assert 0 < np.abs(found - expected).max() < 0.2


def test_a_program_that_knows_a_name_alone_is_run_with_plume(plume_folder):
    code = "import sys, transformers as t; print(type(t.AutoConfig.from_pretrained(sys.argv[1])).__name__)"
    done = run([sys.executable, "-m", "plume", "run", sys.executable, "-c", code, plume_folder])
    assert done.stdout == "PlumeConfig\n"
    wrong = run([sys.executable, "-m", "plume", "run", "nosuch", "--model", "F"])
    assert wrong.stderr.startswith("plume: there is no program 'nosuch'")
    code = "import sys; print(*sys.argv[1:])"
    passed_on = run([sys.executable, "-m", "plume", "run", sys.executable, "-c", code, "--help", "--model", "F"])
    assert passed_on.stdout == "--help --model F\n"


def test_a_folder_says_what_must_be_installed(plume_folder):
    settings = json.loads((plume_folder / "config_sentence_transformers.json").read_text())
    assert settings["requirements"]["plume-embed"]["specifier"] == ">=0.1"
    card = (plume_folder / "README.md").read_text()
    assert card.index("pip install plume-embed") < card.index("from plume import Plume")
    assert "pipeline_tag" not in card
