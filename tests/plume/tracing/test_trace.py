"""Looking inside: what a trace holds is what the model computed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

from plume import Item, Plume, PlumeModel
from plume.cli.main import app
from plume.random_models import SHORT_STRINGS, save_tiny_backbone
from plume.tracing.pictures import draw_expert_use, draw_trace
from plume.tracing.trace import expert_use
from plume.tracing.trace import trace as trace_inputs


@torch.no_grad()
def test_a_trace_holds_what_the_forward_pass_computed(model, picture):
    inputs = ["a red kite", {"image": picture(), "text": "what $is$ this?"}]
    traces = trace_inputs(model, inputs, candidates=["blue", picture(28, 28)], num_words=3, names=["first", "second"])
    output = model(**model.processor.encode([Item.parse(raw) for raw in inputs]))
    embeddings = torch.stack(
        [model(**model.processor.encode([Item.parse(c)])).embedding[0] for c in ("blue", picture(28, 28))]
    )
    weight = model.backbone.get_input_embeddings().weight
    for row, trace in enumerate(traces):
        assert trace.name == ("first", "second")[row]
        assert trace.modality == ("text", "image+text")[row]
        assert torch.allclose(trace.states, output.states[row], atol=1e-5)
        assert torch.allclose(trace.gates, output.gates[row], atol=1e-5)
        assert torch.allclose(trace.norms, output.states[row].norm(dim=-1), atol=1e-4)
        for step in range(4):
            kept = output.gates[row, step].argsort(descending=True)[:2]
            assert trace.experts[step].tolist() == kept.tolist()
            states = output.states[row]
            assert trace.step_cosine[step] == pytest.approx(
                cosine_similarity(states[step + 1], states[step], dim=0).item(), abs=1e-5
            )
        for state, words in zip(output.states[row], trace.words, strict=True):
            chances = (weight @ state).softmax(dim=0)
            assert words[0][1] == pytest.approx(chances.max().item(), rel=1e-4)
            assert words[0][0] == model.processor.tokenizer.decode([int(chances.argmax())])
            assert len(words) == 3
            assert np.allclose(
                trace.to_candidates, cosine_similarity(trace.states[:, None], embeddings[None], dim=-1), atol=1e-5
            )
        assert torch.allclose(
            trace.to_embedding, cosine_similarity(output.states[row], output.embedding[row : row + 1]), atol=1e-5
        )


def test_an_untied_head_reads_the_states(tmp_path):
    save_tiny_backbone(tmp_path, ["red"], tie_word_embeddings=False)
    model = PlumeModel.from_backbone(str(tmp_path), num_latent_steps=1, **SHORT_STRINGS).eval()
    (trace,) = trace_inputs(model, ["red"])
    best = model.lm_head(trace.states[1]).argmax()
    assert trace.words[1][0][0] == model.processor.tokenizer.decode([int(best)])


def test_a_model_without_a_router_or_without_steps_has_no_gates(backbone_folder, model, tmp_path):
    plain = PlumeModel.from_backbone(str(backbone_folder), transition="identity", num_latent_steps=2, **SHORT_STRINGS)
    (trace,) = trace_inputs(plain.eval(), ["red"])
    assert trace.gates is None
    assert trace.experts is None
    assert trace.states.shape == (3, 64)
    draw_trace(trace, tmp_path / "plain.png")
    with pytest.raises(ValueError, match="no input went through a router"):
        draw_expert_use([trace], tmp_path / "use.png")
    (single,) = trace_inputs(model, ["red"], num_latent_steps=0)
    assert single.states.shape == (1, 64)
    assert expert_use([single]) == {}
    draw_trace(single, tmp_path / "single.png")
    for name in ("plain", "single"):
        assert Image.open(tmp_path / f"{name}.png").width > 500


def test_expert_use_counts_the_kept_experts_by_modality(model, picture):
    traces = trace_inputs(model, ["red", "blue kite", picture(), "table"])
    use = expert_use(traces)
    assert list(use) == ["image", "text"]
    counts = torch.zeros(4)
    for trace in traces[:2] + traces[3:]:
        for expert in trace.experts.flatten():
            counts[expert] += 1
    assert torch.allclose(use["text"], counts / counts.sum())


def test_the_embedder_traces_too_and_json_holds_all_but_the_states(plume_folder):
    (trace,) = Plume(plume_folder, device="cpu").trace("a red kite", num_latent_steps=2, candidates=["blue"])
    saved = json.loads(json.dumps(trace.to_dict()))
    assert saved["num_latent_steps"] == 2
    assert np.allclose(saved["gates"], trace.gates)
    assert len(saved["words"]) == len(saved["norms"]) == len(saved["cosine_to_candidates"]) == 3
    assert saved["candidates"] == ["blue"]
    assert "states" not in saved


def test_the_command_writes_a_page_per_input_and_one_json(plume_folder, tmp_path, picture, two_page_pdf):
    picture().save(tmp_path / "a b.png")
    arguments = [str(tmp_path / "a b.png"), str(two_page_pdf), "--text", "a kite", "--candidate", "red"]
    out = tmp_path / "trace"
    result = CliRunner().invoke(app, ["trace", *arguments, "--model", str(plume_folder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"00{number}.png" for number in range(4)),
        "experts.png",
        "trace.json",
    ]
    saved = json.loads((out / "trace.json").read_text())
    assert [one["name"].rpartition("/")[2] for one in saved["traces"]] == [
        "a b.png",
        "two pages.pdf#page=1",
        "two pages.pdf#page=2",
        "a kite",
    ]
    assert sum(saved["expert_use"]["image"]) == pytest.approx(1)
    bad = CliRunner().invoke(app, ["trace", str(tmp_path / "none.png"), "--model", str(plume_folder)])
    assert bad.exit_code == 1
    assert "none.png: there is no such file" in bad.output
