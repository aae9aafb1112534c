"""LoRA: what learns, what is saved, and that the merged folder is the trained model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from plume import Item, PlumeModel
from plume.random_models import save_tiny_backbone
from plume_train.config import SettingsError
from plume_train.lora import add_lora, merge
from plume_train.run import load_model, train
from plume_train.saving import RunError
from tests.plume_train.runs import settings

LORA = {"lora_rank": 4, "learning_rate": 0.05, "warmup_steps": 0, "save_strategy": "steps", "save_steps": 2}


def vectors(model):
    batch = model.processor.encode([Item.parse("red"), Item.parse("follow the page")])
    with torch.inference_mode():
        return model(**batch, num_latent_steps=2).embedding


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "head of its own"])
def test_the_merged_folder_is_the_trained_model(tmp_path, start, hops_folder, tied):
    if not tied:
        words = json.loads((hops_folder / "task.json").read_text())["words"]
        start = tmp_path / "untied"
        save_tiny_backbone(start, words, hidden_size=32, temporal_patch_size=1, tie_word_embeddings=False)
    args = settings(tmp_path, start, hops_folder, max_steps=4, **LORA)
    model = train(args)
    assert type(model) is PlumeModel
    reopened = PlumeModel.from_pretrained(args.output_dir).eval()
    assert torch.equal(vectors(model), vectors(reopened))
    learnt = load_file(args.output_folder / "adapter" / "adapter_model.safetensors")
    names = " ".join(learnt)
    assert "lora_A" in names
    assert "trainable_tokens_delta" in names
    assert "transition.router.weight" in names
    assert "visual.blocks" not in names
    assert ("lm_head" in names) == (not tied)
    assert sum(weight.numel() for weight in learnt.values()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert not list(args.output_folder.glob("checkpoint-*/model.safetensors"))


def test_what_must_learn_learns_and_nothing_else(tmp_path, start, hops_folder):
    before = train(settings(tmp_path, start, hops_folder, max_steps=1, learning_rate=0.0)).state_dict()
    args = settings(tmp_path, start, hops_folder, max_steps=3, train_merger=False, overwrite=True, **LORA)
    after = train(args).state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert any("q_proj" in name for name in changed)
    assert "transition.router.weight" in changed
    assert not any("visual" in name or "layernorm" in name for name in changed)
    rows = "backbone.language_model.embed_tokens.weight"
    ids = {PlumeModel.from_pretrained(args.output_dir).config.anchor_token_id}
    moved = {int(row) for row in (after[rows] != before[rows]).any(dim=1).nonzero()}
    assert ids < moved
    assert len(moved) <= 5


def test_a_resumed_lora_run_equals_an_uninterrupted_one(tmp_path, start, hops_folder):
    changes = {**LORA, "learn_temperature": True, "temperature": 0.1}
    whole = train(settings(tmp_path, start, hops_folder, max_steps=4, **changes)).state_dict()
    out = tmp_path / "out"
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    resumed = train(settings(tmp_path, start, hops_folder, max_steps=4, **changes)).state_dict()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_a_run_can_be_merged(tmp_path, start, hops_folder, base_dtype):
    given = {"max_steps": 4, "bf16": base_dtype != "float32", "base_dtype": base_dtype, **LORA}
    model = train(settings(tmp_path, start, hops_folder, **given))
    assert merge([str(tmp_path / "out" / "checkpoint-4"), str(tmp_path / "merged")]) == 0
    merged = PlumeModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(vectors(merged), vectors(model))
    assert merged.config.num_latent_steps == 2
    with pytest.raises(RunError, match="is not empty; choose another folder"):
        merge([str(tmp_path / "out" / "checkpoint-4"), str(tmp_path / "merged")])
    with pytest.raises(RunError, match=r"holds no adapter_config\.json"):
        merge([str(tmp_path / "merged"), str(tmp_path / "other")])


def test_targets_that_match_nothing_are_refused(tmp_path, start, hops_folder):
    with pytest.raises(SettingsError, match="lora_targets='nothing'"):
        train(settings(tmp_path, start, hops_folder, lora_rank=2, lora_targets="nothing"))


def test_weights_that_are_shared_out_are_refused(tmp_path, start, hops_folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = settings(tmp_path, start, hops_folder, lora_rank=2)
    with pytest.raises(SettingsError, match="lora_rank does not work with ZeRO-3 or FSDP"):
        add_lora(load_model(args), args)


def test_what_is_frozen_may_be_bfloat16_and_what_learns_is_float32(tmp_path, start, hops_folder):
    given = {"max_steps": 4, "bf16": True, **LORA}
    dtypes = {}

    def spy(trainer):
        for name, parameter in trainer.model.named_parameters():
            dtypes.setdefault(parameter.requires_grad, {})[name] = parameter.dtype

    narrow = settings(tmp_path, start, hops_folder, base_dtype="bfloat16", **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plume_train.run.tell_memory", spy)
        model = train(narrow)
    assert set(dtypes[True].values()) == {torch.float32}
    assert any("lora_A" in name for name in dtypes[True])
    assert any("transition" in name for name in dtypes[True])
    assert set(dtypes[False].values()) == {torch.bfloat16}
    # The merged model is what was trained: frozen weights as loaded, what was learnt unrounded.
    loaded = load_model(narrow).state_dict()
    after = model.state_dict()
    assert {one.dtype for one in after.values()} == {torch.float32}
    frozen = "backbone.visual.blocks.0.attn.qkv.weight"
    assert torch.equal(after[frozen], loaded[frozen].float())
    trained = "backbone.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after[trained], after[trained].bfloat16().float())
    reopened = PlumeModel.from_pretrained(narrow.output_dir).eval()
    assert torch.equal(vectors(model), vectors(reopened))


@pytest.mark.parametrize("given", [LORA, {"learning_rate": 1e-3}], ids=["LoRA", "a frozen tower"])
def test_frozen_weights_in_bfloat16_train_as_well(tmp_path, start, hops_folder, given):
    losses = []
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        # At a low temperature an untrained model's loss turns on rounding.
        changes = {"max_steps": 3, "bf16": True, "base_dtype": dtype, "temperature": 1.0, **given}
        train(settings(folder, start, hops_folder, **changes))
        lines = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_base_in_four_bits_is_trained_and_merged(tmp_path, start, hops_folder):
    """QLoRA: frozen layers are packed, the merged model computes what was trained, and a checkpoint merges alike."""
    pytest.importorskip("bitsandbytes")  # in no environment of ours, since peft would import it everywhere
    packed = {}

    def spy(trainer):
        packed.update({name: one for name, one in trainer.model.named_parameters() if one.dtype == torch.uint8})

    given = {"max_steps": 4, "bf16": True, "save_strategy": "steps", "save_steps": 4, **LORA, "base_dtype": "nf4"}
    args = settings(tmp_path, start, hops_folder, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plume_train.run.tell_memory", spy)
        model = train(args)
    assert len(packed) == 14  # seven layers in each of two blocks
    name = "backbone.language_model.layers.0.self_attn.q_proj.weight"
    as_loaded = PlumeModel.from_backbone(args.model, dtype="bfloat16", **args.plume_config).state_dict()[name].float()
    learnt = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    low, high = (learnt[f"base_model.model.{name.replace('weight', f'lora_{part}.weight')}"] for part in "AB")
    base = model.state_dict()[name] - high @ low * (args.lora_alpha / args.lora_rank)
    assert 0.01 < (base - as_loaded).norm() / as_loaded.norm() < 0.2  # what four bits leave
    assert merge([str(tmp_path / "out" / "checkpoint-4"), str(tmp_path / "merged")]) == 0
    assert torch.equal(vectors(PlumeModel.from_pretrained(tmp_path / "merged").eval()), vectors(model))


def test_four_bits_need_lora_and_bitsandbytes(tmp_path, start, hops_folder, monkeypatch):
    with pytest.raises(SettingsError, match="base_dtype=nf4 is for LoRA"):
        train(settings(tmp_path, start, hops_folder, base_dtype="nf4", bf16=True))
    monkeypatch.setattr("plume_train.qlora.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs bitsandbytes; pip install 'plume-embed\[qlora\]'"):
        train(settings(tmp_path, start, hops_folder, base_dtype="nf4", bf16=True, **LORA))


def test_what_makes_latent_inputs_learns_in_full_and_is_saved(tmp_path, start, hops_folder):
    args = settings(tmp_path, start, hops_folder, max_steps=2, stage_ratios=[1.0], stage_shares=[1.0], **LORA)
    args.plume_config |= {"latents": "parallel", "refinements": 1, "latent_scale": "embedding"}
    model = train(args)
    learnt = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {"latent_inputs", "latent_norm", "transition"} <= {part for name in learnt for part in name.split(".")}
    merged = PlumeModel.from_pretrained(tmp_path / "out")
    for name in ("latent_inputs", "latent_norm"):
        assert torch.equal(getattr(merged, name).weight, getattr(model, name).weight)
        saved = next(weight for key, weight in learnt.items() if name in key)
        assert torch.equal(saved, getattr(model, name).weight)


def test_a_narrow_base_without_autocast_is_refused(tmp_path, start, hops_folder):
    with pytest.raises(SettingsError, match="base_dtype=bfloat16 needs bf16=true"):
        train(settings(tmp_path, start, hops_folder, base_dtype="bfloat16", **LORA))
