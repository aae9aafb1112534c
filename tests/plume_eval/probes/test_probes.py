"""The probes: interventions do what they say, and verdicts follow from what is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot
from typer.testing import CliRunner

from plume import Item, PlumeModel
from plume_eval.__main__ import app
from plume_eval.hops.make import Sizes, make_task
from plume_eval.hops.run import HopsTask
from plume_eval.metrics import Estimate
from plume_eval.probes.interventions import (
    CutDecoder,
    constant,
    frozen_gates,
    noise,
    of_another_row,
    renumbered_steps,
    replaced_inputs,
    shown_columns,
)
from plume_eval.probes.run import Prober, Read, area_under_curve, judged


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    make_task(folder, "page", Sizes(num_train=60, num_validation=1, num_test=24, max_hops=3), show_progress=False)
    return HopsTask(folder)


class Skilled(Prober):
    """Probes a model of random weights as if it had learnt something."""

    def beyond_rules(self):
        probe = super().beyond_rules()
        probe.values["difference"]["low"] = 0.1
        return probe


@pytest.fixture
def batch(model):
    return dict(model.processor.encode([Item.parse("a red kite"), Item.parse("rain"), Item.parse("blue")]))


def test_nothing_replaced_changes_nothing(model, batch):
    expected = model(**batch).embedding
    seen = []

    def keep(inputs, step):
        seen.append(step)
        return inputs

    with replaced_inputs(model, keep):
        assert torch.equal(model(**batch).embedding, expected)
    assert seen == [0, 1, 2, 3]
    with renumbered_steps(model, [0, 1, 2, 3]):
        assert torch.equal(model(**batch).embedding, expected)
    own = model.transition
    with pytest.raises(RuntimeError, match="stop"), replaced_inputs(model, keep):
        raise RuntimeError("stop")
    assert model.transition is own


def test_noise_has_the_length_of_what_it_replaces():
    inputs = torch.randn(5, 7) * torch.arange(1, 6)[:, None]
    drawn = noise(torch.Generator().manual_seed(1))(inputs, 0)
    assert torch.allclose(drawn.norm(dim=-1), inputs.norm(dim=-1))
    assert (torch.cosine_similarity(drawn, inputs).abs() < 0.99).all()


def test_equal_inputs_of_another_row_change_nothing_and_others_do(model):
    same = dict(model.processor.encode([Item.parse("red")] * 2))
    other = dict(model.processor.encode([Item.parse("red"), Item.parse("rain")]))
    for batch, is_same in ((same, True), (other, False)):
        with replaced_inputs(model, of_another_row):
            found = model(**batch).embedding
        assert torch.allclose(found, model(**batch).embedding, atol=1e-6) == is_same


def test_constant_inputs_hide_the_input_from_the_steps_but_not_from_the_read_out(model, batch):
    means = torch.randn(4, 64)
    fed = []
    with replaced_inputs(model, constant(means)):
        handle = model.backbone.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**batch)
        handle.remove()
    for step in range(3):
        assert torch.equal(fed[1 + step][:, 0], means[step].expand(3, -1))


def test_frozen_gates_are_the_same_for_every_input(model, batch):
    wanted = torch.full((4, 4), 0.25)
    with frozen_gates(model, wanted):
        assert torch.equal(model(**batch).gates, wanted.expand(3, 4, 4))
    assert not torch.equal(model(**batch).gates, wanted.expand(3, 4, 4))


def test_what_is_cut_from_the_context_is_not_seen_any_more(model, picture):
    items = [Item.parse({"image": picture(56, 56, seed), "text": "red"}) for seed in (1, 2)]
    read = [dict(model.processor.encode([item])) for item in items]
    vectors = {}
    for after in (0, 2, 3):
        inputs = [model.read_inputs(batch, num_latent_steps=4) for batch in read]
        hidden = [shown_columns(model, one) for one in inputs]
        assert all(mask.sum() == 4 for mask in hidden)
        rolled = [
            model.roll_out(one, decoder=CutDecoder(model, mask, after))[1]
            for one, mask in zip(inputs, hidden, strict=True)
        ]
        vectors[after] = rolled[0].suffix[:, -1]
        plain = model.roll_out(inputs[0])[1]
        assert torch.allclose(rolled[0].states[:, : after + 1], plain.states[:, : after + 1], atol=1e-5)
        assert not torch.allclose(rolled[0].suffix, plain.suffix, atol=1e-4)
    assert not torch.allclose(vectors[0], vectors[3], atol=1e-4)


def test_text_is_hidden_up_to_the_question(model):
    inputs = model.read_inputs(dict(model.processor.encode([Item.parse("red. kite. blue")])))
    tokens = model.processor.tokenizer.convert_ids_to_tokens(inputs.prefix_ids[0])
    shown = [token for token, hidden in zip(tokens, shown_columns(model, inputs)[0], strict=True) if hidden]
    assert shown[-1] == "."
    assert "blue" not in shown


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {},
            [
                "K = 0",
                "candidates at K = 0",
                "more steps",
                "noise",
                "another's",
                "mean",
                "gates frozen",
                "context cut",
                "early exit",
                "experts",
            ],
        ),
        ({"transition": "identity"}, ["noise", "a step skipped", "a step repeated", "decoded by the head"]),
        ({"latents": "parallel", "refinements": 1}, ["noise", "mean", "gates frozen", "decoded by a linear probe"]),
        ({"latents": "parallel"}, ["K = 0", "K against hops", "decoded by the head", "confidence"]),
    ],
    ids=["sequential", "identity", "refined", "one pass"],
)
def test_every_kind_of_model_is_probed(model, task, fields, expected):
    probed, _ = model.reconfigured(**fields, num_latent_steps=3)
    found = {probe.name: probe for probe in Skilled(probed, task).run()}
    assert set(expected) <= set(found)
    assert ("noise" in found) == (not probed.config.is_one_pass)
    assert all(probe.verdict for probe in found.values())
    json.dumps([probe.values for probe in found.values()])


@pytest.mark.parametrize("needs_steps", [True, False])
def test_a_model_that_needs_no_steps_is_told_from_one_that_does(model, task, monkeypatch, needs_steps):
    """Answers are put in: right at first, then wrong under any intervention, or right always."""
    size, calls = len(task.symbols), []

    def read(prober, *args, **kwargs):
        calls.append(1)
        answers = (task.answers + 1) % size if needs_steps and len(calls) > 1 else task.answers
        return Read(torch.eye(size)[torch.as_tensor(answers)], torch.zeros(1), None)

    monkeypatch.setattr(Prober, "read", read)
    monkeypatch.setattr(Prober, "symbols_at", lambda *_: torch.eye(size))
    prober = Prober(model, task)
    prober.steps, prober.candidates = 4, torch.eye(size)
    prober.real = prober.read()
    prober.right = prober.is_right(prober.real.vectors)
    wanted = "the answers need them" if needs_steps else "no difference that can be told from noise"
    assert ("more steps than trained with do harm" in prober.more_steps().verdict) == needs_steps
    for probe in (
        prober.without_steps(),
        prober.random_inputs(),
        prober.inputs_of_another(),
        prober.skipped(),
    ):
        assert wanted in probe.verdict, probe.name


def test_a_linear_probe_finds_what_states_hold_and_nothing_in_shuffled_labels(model, task, monkeypatch):
    """States are put in that hold hop k + 1 of the path, and nothing else."""

    def read(prober, *args, **kwargs):
        paths = torch.as_tensor(prober.task.paths)
        held = one_hot(paths.clamp(min=0), len(task.symbols)).float() * (paths >= 0)[..., None]
        return Read(torch.zeros(1), held[:, 1:], None)

    monkeypatch.setattr(Prober, "read", read)
    prober = Prober(model, task)
    prober.steps, prober.real = 2, prober.read()
    probe = prober.decoded_by_a_linear_probe()
    assert probe.values["own_hop"] > 0.8  # sixty training questions
    assert probe.values["chance"] < 0.4
    assert "each state holds its own hop" in probe.verdict


def test_a_probe_that_a_model_has_too_few_steps_for_says_so(model, task):
    probed, _ = model.reconfigured(num_latent_steps=1)
    found = {probe.name: probe for probe in Skilled(probed, task).run()}
    assert found["a step skipped"].verdict == "Not possible at K = 1"
    assert found["a step repeated"].values["recall_by_step"]


def test_a_probed_model_can_still_be_trained(model, task):
    Skilled(model, task).run()
    model.train()
    model(**model.processor.encode([Item.parse("red")])).embedding.sum().backward()


def test_the_words_of_a_prompt_are_not_hidden(backbone_folder):
    model = PlumeModel.from_backbone(str(backbone_folder), num_latent_steps=2)  # whose prompt has full stops
    inputs = model.read_inputs(dict(model.processor.encode([Item.parse("red. kite. blue")])))
    hidden = shown_columns(model, inputs)[0]
    assert 3 < hidden.sum() < len(hidden) / 2 + 60
    assert not hidden[inputs.anchor_column[0] :].any()


def test_areas_and_verdicts_are_what_they_are_defined_to_be():
    signal, wrong = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert area_under_curve(signal, wrong) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert area_under_curve(signal, np.zeros(4, dtype=bool)) is None
    assert judged(0.9, 0.95, Estimate(-0.05, -0.1, -0.01)).endswith("the answers are better without")
    assert judged(0.9, 0.88, Estimate(0.02, 0.01, 0.03)).endswith("a small part needs them")


def test_the_command_writes_a_page(plume_folder, task, tmp_path):
    words = ["probes", "--model", str(plume_folder), "--data", str(task.folder), "--limit", "12"]
    said = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "no skill that a probe could take away" in said.output
    (page,) = tmp_path.glob("probes_page_*.md")
    assert page.with_suffix(".png").stat().st_size > 5_000
    assert json.loads(said.output.splitlines()[-1])["probes"]
