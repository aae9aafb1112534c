"""Checkpoints: what is made, saved and refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from plume import Item, Plume, PlumeModel
from plume.checkpoints.fingerprint import fingerprint
from plume.random_models import SHORT_STRINGS, save_tiny_backbone


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_keeps_every_weight_of_its_backbone(tmp_path, tied):
    save_tiny_backbone(tmp_path, ["red"], tie_word_embeddings=tied)
    stock = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    model = PlumeModel.from_backbone(str(tmp_path), num_latent_steps=2)
    old = len(AutoTokenizer.from_pretrained(tmp_path))
    for name, weight in stock.model.state_dict().items():
        ours = model.backbone.state_dict()[name]
        assert torch.equal(ours[:old] if "embed_tokens" in name else ours, weight), name
    assert (model.lm_head is None) == tied
    if not tied:
        assert torch.equal(model.lm_head.weight[:old], stock.lm_head.weight)
        assert model.lm_head.weight.shape == model.backbone.get_input_embeddings().weight.shape
        assert model.lm_head.weight[old:].norm(dim=-1).min() > 0


def test_labels_give_the_logits_of_supervised_tokens(model):
    batch = model.processor.encode([Item.parse("red"), Item.parse("blue kite")])
    suffix = torch.tensor([model.processor.suffix_ids("<eot>red<gen_emb>")] * 2)
    labels = suffix.clone()
    labels[1, 1] = -100
    output = model(**batch, suffix_ids=suffix, labels=labels)
    assert output.suffix_logits.shape == (5, model.backbone.config.text_config.vocab_size)
    last = model.backbone.get_input_embeddings().weight @ output.states[0, -1]
    assert torch.allclose(output.suffix_logits[0], last, atol=1e-5)  # <eot> is predicted by the last state
    assert model(**batch).suffix_logits is None


def test_the_embedding_is_float32_and_of_unit_norm_in_bfloat16(backbone_folder):
    model = PlumeModel.from_backbone(str(backbone_folder), dtype=torch.bfloat16, num_latent_steps=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    output = model(**model.processor.encode([Item.parse("red")]))
    for embedding in (output.embedding, output.anchor_embedding):
        assert embedding.dtype == torch.float32
        assert torch.allclose(embedding.norm(dim=-1), torch.ones(1), atol=1e-6)


def test_new_tokens_are_refused_where_they_are_missing_or_misplaced(model):
    batch = dict(model.processor.encode([Item.parse("red"), Item.parse("blue")]))
    moved = {**batch, "input_ids": batch["input_ids"].roll(1, dims=1)}
    with pytest.raises(
        ValueError, match=r"must end with <bot>; write inputs with the checkpoint's processor, processor\(text="
    ):
        model(**moved)
    without = {
        **batch,
        "input_ids": batch["input_ids"].where(batch["input_ids"] != model.config.anchor_token_id, 5),
    }
    with pytest.raises(ValueError, match="prefix 0 holds no <disc_emb>; write inputs with"):
        model(**without)
    with pytest.raises(ValueError, match="suffix 0 holds no <gen_emb>"):
        model(**batch, suffix_ids=torch.tensor([[model.config.latent_end_token_id]] * 2))
    with pytest.raises(ValueError, match="holds 3 numbers for 2 rows"):
        model(**batch, num_latent_steps=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="exceeds the step table of this checkpoint"):
        model(**batch, num_latent_steps=torch.tensor([1, 40]))


def test_an_unknown_field_is_refused_with_a_hint(backbone_folder):
    with pytest.raises(ValueError, match="no field 'num_latent_step'; did you mean 'num_latent_steps'"):
        PlumeModel.from_backbone(str(backbone_folder), num_latent_step=3)


@pytest.mark.parametrize("door", [PlumeModel.from_pretrained, Plume])
def test_a_folder_without_plumes_fields_is_refused_with_a_remedy(backbone_folder, door):
    with pytest.raises(ValueError, match=r"'qwen2_vl' checkpoint without plume's fields .* PlumeModel.from_backbone"):
        door(backbone_folder)


def test_a_folder_with_missing_weights_is_refused(plume_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(plume_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop("transition.router.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, for example transition\.router\.weight"):
        PlumeModel.from_pretrained(broken)


def test_the_saved_folder_describes_itself(plume_folder):
    config = json.loads((plume_folder / "config.json").read_text())
    assert config["num_latent_steps"] == 4
    assert config["prompt_template"] == SHORT_STRINGS["prompt_template"]
    for name in (
        "chat_template.jinja",
        "modules.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
    ):
        assert (plume_folder / name).is_file()


def test_a_fingerprint_tells_checkpoints_apart_and_nothing_else(model, plume_folder, tmp_path):
    own = fingerprint(model)
    assert fingerprint(PlumeModel.from_pretrained(plume_folder, dtype=torch.bfloat16)) == own
    again = PlumeModel.from_pretrained(plume_folder)
    again.config.num_latent_steps = 2
    assert fingerprint(again) == own
    again.config.blank_image_size = 56
    assert fingerprint(again) != own
    trained = PlumeModel.from_pretrained(plume_folder)
    with torch.no_grad():
        for parameter in trained.transition.router.parameters():
            parameter += 0.1
    assert fingerprint(trained) != own


def test_a_fingerprint_reaches_the_last_of_many_weights(model):
    """A position in 32 bits of a float would miss the end of a real embedding matrix, and fail."""
    large = torch.nn.Parameter(torch.zeros(151_936 * 128, dtype=torch.bfloat16))
    model.large = large
    own = fingerprint(model)
    with torch.no_grad():
        large[-1] = 1
    assert fingerprint(model) != own


def test_a_saved_folder_does_not_tell_where_its_backbone_lay(model, plume_folder, backbone_folder):
    for file in ("config.json", "README.md", "processor_config.json", "tokenizer_config.json"):
        assert str(backbone_folder) not in (plume_folder / file).read_text(), file
