"""`plume-train soup`: the mean of weights, of models that have the same ones."""

from __future__ import annotations

import json

import pytest
import torch

from plume import PlumeModel
from plume.random_models import SHORT_STRINGS, save_tiny_backbone
from plume_train.soup import soup

WORDS = ["red", "kite", "blue"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models that began alike, of different K."""
    folder = tmp_path_factory.mktemp("soup")
    save_tiny_backbone(folder / "backbone", WORDS, num_layers=1, vision_layers=1)
    for seed, name in enumerate("ab"):
        model = PlumeModel.from_backbone(str(folder / "backbone"), num_latent_steps=2 + seed, **SHORT_STRINGS)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        model.save_pretrained(folder / name)
    return folder


def state(folder):
    return PlumeModel.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("weights", [(), (1.0, 3.0), (0.0, 1.0)])
def test_every_weight_is_the_weighted_mean(models, tmp_path, weights):
    told = ["--weights", *map(str, weights)] if weights else []
    assert soup([str(models / "a"), str(models / "b"), "--out", str(tmp_path / "out"), *told]) == 0
    share = weights[0] / sum(weights) if weights else 0.5
    one, two, found = (state(folder) for folder in (models / "a", models / "b", tmp_path / "out"))
    for key, value in found.items():
        assert torch.allclose(value, share * one[key] + (1 - share) * two[key], atol=1e-6), key
    assert PlumeModel.from_pretrained(tmp_path / "out").config.num_latent_steps == 2


def test_each_model_and_the_mean_are_measured(models, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"query": w, "target": w}) + "\n" for w in WORDS))
    data = ("--data", str(tmp_path / "pairs.jsonl"))
    assert soup([str(models / "a"), str(models / "b"), "--out", str(tmp_path / "out"), *data]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(": recall@1")[0] for line in told[:3]] == [
        str(models / "a"),
        str(models / "b"),
        "their mean",
    ]
    assert "with K = 2" in told[0]
    assert "with K = 3" in told[1]


def test_what_cannot_be_averaged_is_refused_with_what_differs(models, tmp_path):
    other = PlumeModel.from_pretrained(models / "a").reconfigured(transition="mlp")[0]
    other.save_pretrained(tmp_path / "mlp")
    out = ("--out", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"transition is 'moe' in .* and 'mlp' in .*; they cannot be averaged"):
        soup([str(models / "a"), str(tmp_path / "mlp"), *out])
    save_tiny_backbone(tmp_path / "backbone", ["red", "kite", "grey"], num_layers=1, vision_layers=1)
    PlumeModel.from_backbone(str(tmp_path / "backbone"), num_latent_steps=2, **SHORT_STRINGS).save_pretrained(
        tmp_path / "words"
    )
    with pytest.raises(ValueError, match="have different tokenizers"):
        soup([str(models / "a"), str(tmp_path / "words"), *out])
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds LoRA's factors.*plume-train merge"):
        soup([str(models / "a"), str(tmp_path / "lora"), *out])
    with pytest.raises(ValueError, match="--weights are 1 2 3; expected 2 numbers"):
        soup([str(models / "a"), str(models / "b"), *out, "--weights", "1", "2", "3"])
    with pytest.raises(ValueError, match="is not empty"):
        soup([str(models / "a"), str(models / "b"), "--out", str(models)])
    with pytest.raises(SystemExit):
        soup([str(models / "a"), *out])
    assert not (tmp_path / "out").exists()
