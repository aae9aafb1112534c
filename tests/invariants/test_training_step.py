"""One objective, many ways to compute its gradient: in one pass, by GradCache, row by row, with checkpointing."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn.functional import cross_entropy

from plume import PlumeModel
from plume_train.config import PlumeTrainingArguments
from plume_train.curriculum import PAPER, Curriculum, Stage
from plume_train.data.collate import SUPERVISED, PairCollator, StagedRecords, _Entry
from plume_train.data.records import Records
from plume_train.data.rows import Side
from plume_train.data.sampler import Draw
from plume_train.data.vectors import VectorStore
from plume_train.objective import objective as objective_module
from plume_train.objective.gradcache import Step
from plume_train.objective.losses import Contrast
from plume_train.objective.objective import Objective

EVERY_TERM = {
    "reconstruct_weight": 0.4,
    "matryoshka_dims": [8, 32],
    "matryoshka_weight": 0.7,
    "per_step_weight": 0.5,
    "alignment_weight": 0.3,
    "uniformity_weight": 0.2,
    "distillation_weight": 2.0,
    "ranking_weight": 3.0,
    "ranking_temperature": 0.1,
    "learn_temperature": True,
    "num_negatives": 2,
    "false_negative_margin": 0.05,
    "duplicate_similarity": 0.99,
    "hardness": 3.0,
    "same_side_negatives": True,
    "balance_weight": 10.0,
    "temperature": 0.1,
}


@pytest.fixture
def rows(tmp_path):
    """Six rows: text and images mixed, an equal target, hard negatives of different number."""
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (56, 84), colour).save(tmp_path / f"{name}.png")
    lines = [
        {"query": {"text": "red kite", "rationale": "It is red. It flies.", "answer": "kite"}, "target": "kite"},
        {"query": {"text": "what", "image": "a.png", "rationale": "Red. All of it."}, "target": {"image": "b.png"}},
        {"query": {"image": ["a.png", "b.png"]}, "target": "table", "negatives": ["red", {"image": "a.png"}, "kite"]},
        {"query": "blue", "target": "kite", "negatives": ["table"]},
        {"query": {"image": "b.png"}, "target": {"text": "blue", "rationale": "Blue is blue. So it is."}},
        {"query": "red table", "target": {"image": "a.png", "text": "red"}},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return StagedRecords(Records(file))


@pytest.fixture
def trainee(plume_folder):
    model = PlumeModel.from_pretrained(plume_folder).double().train()
    model.backbone.visual.requires_grad_(False)
    model.backbone.visual.merger.requires_grad_(True)
    return model


CURRICULUM = Curriculum(stages=PAPER, num_segments=4)
DRAWS = {
    "explicit": [(0, 0)] * 6,
    "middle": [(2, 2)] * 6,
    "latent": [(4, 4)] * 6,
    "mixed stages": [(4, 4), (2, 2), (4, 4), (0, 0), (4, 4), (1, 1)],
}


def arguments(tmp_path, **settings):
    return PlumeTrainingArguments(
        model="m", train_file=["f"], output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **settings
    )


def batch_of(model, rows, args, draws, chosen=range(6), **more):
    most = max(steps for _, steps in draws)
    collate = PairCollator(
        model.processor,
        model.config,
        CURRICULUM,
        micro_batch_size=args.micro_batch_size,
        micro_batch_tokens=args.micro_batch_tokens,
        num_negatives=args.num_negatives,
        teacher_roles=SUPERVISED if args.distillation_weight else (),
        teacher_vectors=VectorStore(args.teacher_vectors) if args.teacher_vectors else None,
        reconstruct=args.reconstruct if args.reconstruct_weight else None,
        reconstruct_sees=args.reconstruct_sees,
        **more,
    )
    batch = collate([rows[Draw(row, *draws[row], most, 4)] for row in chosen])
    for one in (one for passes in batch["passes"].values() for one in passes):
        if "pixel_values" in one["inputs"]:
            one["inputs"]["pixel_values"] = one["inputs"]["pixel_values"].double()
    return batch


def gradients(model, rows, args, draws, way="direct", seed=0, kind=Objective, chosen=range(6)):
    """Terms and gradients of the batch; the learnt scalars are among them."""
    objective = kind(args, model.config.num_experts)
    scalars = objective.build_scalars()
    model.loss_scalars = scalars and scalars.double()
    model.zero_grad()
    batch = batch_of(model, rows, args, draws, chosen)
    torch.manual_seed(seed)
    step = Step(
        model=model,
        objective=objective,
        accelerator=Accelerator(cpu=True),
        autocast=nullcontext,
        vision_is_frozen=True,
    )
    parts = getattr(step, way)(batch)
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return parts, found


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() / (1 + one[name].abs().max().item()) for name in one)


@pytest.mark.parametrize("stage", DRAWS)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5])
def test_gradcache_over_micro_batches_of_any_size_equals_none_for_every_term(
    trainee, rows, tmp_path, stage, micro_batch_size
):
    args = arguments(tmp_path, **EVERY_TERM)
    parts, whole = gradients(trainee, rows, args, DRAWS[stage])
    assert all(part.abs().sum() > 0 for name, part in parts.items() if name != "uniformity" and "balance" not in name)
    cut = arguments(tmp_path, **EVERY_TERM, micro_batch_size=micro_batch_size)
    cached_parts, cached = gradients(trainee, rows, cut, DRAWS[stage], "cached")
    assert largest_difference(parts, cached_parts) < 1e-9
    assert largest_difference(whole, cached) < 1e-9


@pytest.mark.parametrize("tokens", [1, 40, 100, 400])
def test_passes_of_a_number_of_tokens_hold_no_more_and_change_no_gradient(trainee, rows, tmp_path, tokens):
    args = arguments(tmp_path, **EVERY_TERM)
    parts, whole = gradients(trainee, rows, args, DRAWS["mixed stages"])
    cut = arguments(tmp_path, **EVERY_TERM, micro_batch_tokens=tokens)
    cached_parts, cached = gradients(trainee, rows, cut, DRAWS["mixed stages"], "cached")
    assert largest_difference(parts, cached_parts) < 1e-9
    assert largest_difference(whole, cached) < 1e-9
    passes = [
        one["inputs"] for of in batch_of(trainee, rows, cut, DRAWS["mixed stages"])["passes"].values() for one in of
    ]
    sizes = [
        (len(one["input_ids"]), one["input_ids"].shape[1] + one["suffix_ids"].shape[1] + one["max_latent_steps"])
        for one in passes
    ]
    assert all(count == 1 or count * length <= tokens for count, length in sizes)
    together = [count for count, _ in sizes]
    assert max(together) == 1 if tokens == 1 else max(together) > 1


@pytest.mark.parametrize("way", ["direct", "cached"])
def test_places_of_equal_content_share_a_row_and_change_no_gradient(trainee, rows, tmp_path, monkeypatch, way):
    args = arguments(tmp_path, **EVERY_TERM, micro_batch_size=2 if way == "cached" else None)
    draws, chosen = [*DRAWS["mixed stages"][:3], (4, 4), (4, 4), (1, 1)], [0, 3, 0, 1, 4, 4]

    def found():
        batch = batch_of(trainee, rows, args, draws, chosen)
        num_rows = {role: sum(len(one["counts"]) for one in of) for role, of in batch["passes"].items()}
        return num_rows, gradients(trainee, rows, args, draws, way, chosen=chosen)

    shared, (parts, gradient) = found()
    monkeypatch.setattr(_Entry, "content", property(id))
    alone, (alone_parts, alone_gradient) = found()
    assert shared == {"query": 4, "target": 3, "negative": 3}
    assert alone == {"query": 6, "target": 6, "negative": 12}
    assert largest_difference(parts, alone_parts) < 1e-9
    # transformers' norms are in float32, where a gradient of two places rounds otherwise than two gradients.
    assert largest_difference(gradient, alone_gradient) < 1e-6


def test_a_negative_of_several_rows_is_one_row(trainee, rows, tmp_path):
    """Whatever their targets are, unless something of a target is to be said."""
    rows.records = [replace(rows.records[row], negatives=(Side("sea"),)) for row in (0, 3, 5)]
    args = arguments(tmp_path, num_negatives=1, reconstruct_weight=1.0, reconstruct="target")
    batch = batch_of(trainee, rows, args, DRAWS["latent"], range(3))
    assert batch["places"]["negative"].tolist() == [0, 0, 0]
    assert batch["passes"]["negative"][0]["counts"].tolist() == [3]
    rows.records = [replace(one, query=Side("blue")) for one in rows.records]
    assert batch_of(trainee, rows, args, DRAWS["latent"], range(3))["places"]["query"].tolist() == [0, 0, 1]
    plain = arguments(tmp_path, num_negatives=1)
    assert batch_of(trainee, rows, plain, DRAWS["latent"], range(3))["places"]["query"].tolist() == [0, 0, 0]


def test_the_written_pass_of_a_teacher_keeps_to_the_tokens_too(trainee, rows, tmp_path):
    args = arguments(tmp_path, distillation_weight=1.0, micro_batch_tokens=60)
    batch = batch_of(trainee, rows, args, DRAWS["latent"])
    for one in batch["passes"]["query"]:
        count, length = one["inputs"]["input_ids"].shape
        written = one["teacher"]["suffix_ids"].shape[1]
        assert count == 1 or count * (length + written) <= 60


def test_what_is_to_be_written_otherwise_shares_no_row(trainee, rows, tmp_path):
    """Equal content at another stage, and beside another rationale."""
    draws = [(4, 4), (4, 4), (4, 4), (2, 2), (4, 4), (4, 4)]
    assert batch_of(trainee, rows, arguments(tmp_path), draws, [0, 3])["places"]["target"].tolist() == [0, 1]
    target = rows.records[0].target
    rows.records = [replace(rows.records[0], target=replace(target, rationale=text)) for text in ("", "A kite.", "")]
    batch = batch_of(trainee, rows, arguments(tmp_path), DRAWS["middle"], [0, 1, 2])
    assert batch["places"]["target"].tolist() == [0, 1, 0]
    assert batch["passes"]["target"][0]["counts"].tolist() == [2, 1]


class ObjectiveWithTwoMoreTerms(Objective):
    """Written as train/README.md says; the row term also counts on hard negatives."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weights = self.weights | {"energy": 0.3, "spread": 0.2}

    def represent(self, output, micro_batch, written=None):
        return super().represent(output, micro_batch, written) | {"last_state": output.states[:, -1]}

    def row_terms(self, output, micro_batch, num_rows, written=None):
        return super().row_terms(output, micro_batch, num_rows, written) | {"energy": output.states.square().sum()}

    def batch_terms(self, representations, batch):
        states = [one["last_state"] for side in representations.values() for one in side]
        return super().batch_terms(representations, batch) | {"spread": torch.cat(states).std()}


def test_terms_that_are_added_count_on_every_side_and_under_gradcache(trainee, rows, tmp_path):
    kind = ObjectiveWithTwoMoreTerms
    args = arguments(tmp_path, num_negatives=2)
    parts, whole = gradients(trainee, rows, args, DRAWS["mixed stages"], kind=kind)
    assert {"energy_query", "energy_target", "energy_negative", "spread"} <= parts.keys()
    cut = arguments(tmp_path, num_negatives=2, micro_batch_size=2)
    cached_parts, cached = gradients(trainee, rows, cut, DRAWS["mixed stages"], "cached", kind=kind)
    assert largest_difference(parts, cached_parts) < 1e-9
    assert largest_difference(whole, cached) < 1e-9
    plain = gradients(trainee, rows, args, DRAWS["mixed stages"])[1]
    assert largest_difference(whole, plain) > 1e-3


@pytest.fixture
def other_vectors(rows, tmp_path):
    """Of another embedder, for all rows but the last."""
    store = VectorStore.create(tmp_path / "vectors", {"model": "other", "dim": 5})
    generator = np.random.default_rng(0)
    for index in range(5):
        record = rows.records[index]
        for name, sides in (("query", [record.query]), ("target", [record.target, *record.negatives])):
            found = generator.normal(size=(len(sides), 5))
            store.add(name, sides, found / np.linalg.norm(found, axis=1, keepdims=True))
    return store


def test_vectors_of_another_embedder_teach_the_rows_that_it_knows(trainee, rows, tmp_path, other_vectors):
    weights = dict.fromkeys(
        ("cross_entropy_weight", "contrastive_weight", "anchor_contrastive_weight", "balance_weight"), 0.0
    )
    taught = {"ranking_weight": 1.0, "ranking_temperature": 0.2, "teacher_vectors": str(other_vectors.folder)}
    args = arguments(tmp_path, **weights, **taught, num_negatives=2)
    parts, whole = gradients(trainee, rows, args, DRAWS["mixed stages"])
    cut = arguments(tmp_path, **weights, **taught, num_negatives=2, micro_batch_size=2)
    cached_parts, cached = gradients(trainee, rows, cut, DRAWS["mixed stages"], "cached")
    assert largest_difference(parts, cached_parts) < 1e-9
    assert largest_difference(whole, cached) < 1e-9
    assert parts["ranking"] > 0
    assert "teacher_cross_entropy_query" not in parts  # nothing is written for it
    # By hand: of the rows that are known, among the targets and the hard negatives that are.
    batch = batch_of(trainee, rows, args, DRAWS["mixed stages"])
    assert batch["is_taught"].tolist() == [True] * 5 + [False]
    assert batch["is_taught_negative"].sum() == 3  # two of the third row, one of the fourth
    losses = []
    with torch.no_grad():
        own, others = {}, {}
        for role, (one,) in batch["passes"].items():
            at = batch["places"][role]
            own[role], others[role] = trainee(**one["inputs"]).embedding[at], one["teacher_vectors"].double()[at]
    is_negative = batch["is_negative"] & batch["is_taught_negative"]
    for front in (True, False):
        first, second = ("query", "target") if front else ("target", "query")
        for row in range(5):
            columns = [column for column in range(5) if {row, column} != {0, 3}]
            rankings = []
            for vectors in (others, own):
                found = vectors[second][columns] @ vectors[first][row]
                if front:
                    kept = is_negative & (batch["negative_keys"] != batch["target_keys"][row])
                    found = torch.cat([found, vectors["negative"][kept] @ vectors[first][row]])
                rankings.append((found / 0.2).log_softmax(dim=0))
            losses.append((rankings[0].exp() * (rankings[0] - rankings[1])).sum())
    assert torch.allclose(torch.stack(losses).mean(), parts["ranking"].double(), atol=1e-6)


def test_a_contrast_of_weight_zero_is_not_computed(trainee, rows, tmp_path, monkeypatch):
    calls = []
    whole = objective_module.info_nce
    monkeypatch.setattr(objective_module, "info_nce", lambda *args: calls.append(1) or whole(*args))
    for weights, names in (
        ({}, {"contrastive", "anchor_contrastive"}),
        ({"anchor_contrastive_weight": 0.0}, {"contrastive"}),
    ):
        calls.clear()
        parts, _ = gradients(trainee, rows, arguments(tmp_path, **weights), DRAWS["latent"])
        assert {name for name in parts if "contrastive" in name} == names
        assert len(calls) == len(names)


def test_each_task_has_a_temperature_of_its_own(trainee, rows, tmp_path):
    args = arguments(tmp_path, temperature_per_task=True, temperature=0.1)
    objective = Objective(args, trainee.config.num_experts, ["a", "rows", "z", "rows"])
    trainee.loss_scalars = scalars = objective.build_scalars().double()
    with torch.no_grad():
        scalars.values[:, :2] += torch.tensor([[1.0], [0.5], [2.0]])
    step = Step(model=trainee, objective=objective, accelerator=Accelerator(cpu=True), autocast=nullcontext)
    batch = batch_of(trainee, rows, args, DRAWS["latent"])
    assert batch["task"] == "rows"
    found = step.direct(batch)["contrastive"]
    gradient = scalars.values.grad
    assert gradient[1, :2].abs().min() > 0
    assert gradient[[0, 2]].abs().max() == 0
    shared = arguments(tmp_path, temperature=0.1 / torch.tensor(0.5).exp().item())
    trainee.loss_scalars = None
    assert torch.allclose(found, gradients(trainee, rows, shared, DRAWS["latent"])[0]["contrastive"], atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_labels_of_a_task_are_columns_once_each(trainee, rows, tmp_path, micro_batch_size):
    """As hard negatives of every row, without those of the batch; other processes have the rest of them."""
    labels = {"rows": [rows.records[row].target for row in (0, 1, 2, 4, 5)]}
    args = arguments(tmp_path, temperature=0.1, micro_batch_size=micro_batch_size)
    batch = batch_of(trainee, rows, args, DRAWS["latent"], labels=labels)
    step = Step(model=trainee, objective=Objective(args, 4), accelerator=Accelerator(cpu=True), autocast=nullcontext)
    trainee.loss_scalars = None
    found = (step.cached if micro_batch_size else step.direct)(batch)["contrastive"]
    with torch.no_grad():
        query, target, negative = (
            torch.cat([trainee(**one["inputs"]).embedding for one in batch["passes"][role]])[batch["places"][role]]
            for role in ("query", "target", "negative")
        )
    label_of = [0, 1, 2, 0, 3, 4]
    forwards = cross_entropy(query @ negative.T / 0.1, torch.tensor(label_of))
    scores = (target @ query.T / 0.1).masked_fill(
        torch.tensor([[one == other and row != column for column, other in enumerate(label_of)]
                      for row, one in enumerate(label_of)]), -torch.inf)  # fmt: skip
    backwards = cross_entropy(scores, torch.arange(6))
    assert torch.allclose(found.double(), (forwards + backwards) / 2, atol=1e-5)
    shares = [batch_of(trainee, rows, args, DRAWS["latent"], labels=labels, share=(rank, 2)) for rank in (0, 1)]
    assert [one["is_negative"].tolist() for one in shares] == [[True] * 3, [True, True, False]]
    keys = [key for one in shares for key in one["negative_keys"][one["is_negative"]].tolist()]
    assert sorted(keys) == sorted(side.key for side in labels["rows"])
    other = batch_of(trainee, rows, args, DRAWS["latent"], labels={"another": labels["rows"]})
    assert not other["has_labels"]
    assert "negative" not in other["passes"]


def test_a_label_that_is_right_for_a_query_in_another_row_is_no_negative_of_it(trainee, rows, tmp_path):
    """Rows 0, 3 and 5, with labels kite, table and red; to the first query table is right as well."""
    args = arguments(tmp_path, temperature=0.1)
    records = [rows.records[row] for row in (0, 3, 5)]
    sides = [Side("kite"), Side("table"), Side("red")]
    rows.records = [replace(record, target=side) for record, side in zip(records, sides, strict=True)]
    labels = {"rows": sides}
    right = {"rows": {records[0].query.key: (sides[0].key, sides[1].key)}}
    batch = batch_of(trainee, rows, args, DRAWS["latent"], range(3), labels=labels, right_labels=right)
    trainee.loss_scalars = None
    found = Step(
        model=trainee, objective=Objective(args, 4), accelerator=Accelerator(cpu=True), autocast=nullcontext
    ).direct(batch)["contrastive"]
    with torch.no_grad():
        query, target, negative = (
            trainee(**batch["passes"][role][0]["inputs"]).embedding[batch["places"][role]]
            for role in ("query", "target", "negative")
        )
    forwards, backwards = query @ negative.T / 0.1, target @ query.T / 0.1
    forwards[0, 1] = backwards[1, 0] = -torch.inf
    own = torch.arange(3)
    expected = (cross_entropy(forwards, own) + cross_entropy(backwards, own)) / 2
    assert torch.allclose(found.double(), expected, atol=1e-6)
    # Terms that contrast with the batch's own targets leave them out in both directions.
    keys = {name: batch[name] for name in ("query_keys", "target_keys", "right_keys")}
    contrast = Contrast.of(batch["is_pair"], **keys)
    assert not contrast.allowed_targets[0, 1]
    assert not contrast.allowed[1, 0]
    assert contrast.allowed_targets[2, 1]


def test_targets_take_no_more_steps_than_they_are_allowed(trainee, rows, tmp_path):
    """Their rationale is shortened as the stage says, and nothing stands in its place."""
    args = arguments(tmp_path, num_negatives=2, reconstruct_weight=1.0)
    for target_steps, expected in ((None, 2), (1, 1), (0, 0)):
        batch = batch_of(trainee, rows, args, DRAWS["middle"], target_steps=target_steps)
        inputs = {role: one["inputs"] for role, (one,) in batch["passes"].items()}
        assert inputs["query"]["num_latent_steps"].tolist() == [2] * 6
        for role in ("target", "negative"):
            assert set(inputs[role]["num_latent_steps"].tolist()) == {expected}
        assert batch["num_gates"] == 6 * (2 + expected)
        assert inputs["target"]["max_latent_steps"] == expected  # nor are more run
        assert ("reconstruction" in inputs["target"]) == (expected > 0)
        if expected:
            row = batch["places"]["target"][4]
            assert max(inputs["target"]["reconstruction"]["groups"][row].tolist()) == expected - 1
    alone = batch_of(trainee, rows, args, DRAWS["middle"], target_steps=0)["passes"]["target"][0]["inputs"]
    with torch.no_grad():
        found = trainee(**alone).embedding
        plain = {name: one for name, one in alone.items() if not name.startswith("reconstruction")}
        assert torch.allclose(found, trainee(**{**plain, "max_latent_steps": 0}).embedding, atol=1e-9)


@pytest.mark.parametrize("term", ["cross_entropy", "contrastive", "anchor_contrastive", "balance", "sigmoid"])
def test_gradcache_is_exact_for_each_term_alone(trainee, rows, tmp_path, term):
    weights = dict.fromkeys(
        ("cross_entropy_weight", "contrastive_weight", "anchor_contrastive_weight", "balance_weight"), 0.0
    )
    loss = {"contrastive_loss": "sigmoid", "contrastive_weight": 1.0} if term == "sigmoid" else {f"{term}_weight": 1.0}
    settings = {**weights, **loss, "temperature": 0.1}
    _, whole = gradients(trainee, rows, arguments(tmp_path, **settings), DRAWS["mixed stages"])
    cut = arguments(tmp_path, **settings, micro_batch_size=2)
    _, cached = gradients(trainee, rows, cut, DRAWS["mixed stages"], "cached")
    assert any(gradient.abs().max() > 1e-6 for gradient in whole.values())
    assert largest_difference(whole, cached) < 1e-9


def test_gradcache_draws_the_same_dropout_twice(trainee, rows, tmp_path):
    for module in trainee.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    args = arguments(tmp_path, micro_batch_size=2)
    _, kept = gradients(trainee, rows, args, DRAWS["latent"])  # the same passes, all graphs kept
    _, cached = gradients(trainee, rows, args, DRAWS["latent"], "cached")
    assert largest_difference(kept, cached) < 1e-9
    _, other = gradients(trainee, rows, args, DRAWS["latent"], "cached", seed=1)
    assert largest_difference(kept, other) > 1e-6


@pytest.mark.parametrize("fields", [{}, {"latents": "parallel"}, {"latents": "parallel", "refinements": 2}], ids=str)
@pytest.mark.parametrize("way", ["direct", "cached"])
def test_activation_checkpointing_changes_no_gradient(trainee, rows, tmp_path, way, fields):
    trainee, _ = trainee.reconfigured(**fields)
    args = arguments(tmp_path, **EVERY_TERM, micro_batch_size=4)
    _, without = gradients(trainee, rows, args, DRAWS["mixed stages"], way)
    trainee.gradient_checkpointing_enable()
    calls = []
    layer = trainee.backbone.language_model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    _, with_it = gradients(trainee, rows, args, DRAWS["mixed stages"], way)
    assert largest_difference(without, with_it) < 1e-9
    if fields:
        return
    passes = 6 + 6 if way == "cached" else 6  # of two sides and negatives, each of up to 5 feeds; replays double them
    assert len(calls) > 1.5 * passes


@pytest.mark.parametrize(("num_steps", "said"), [(4, 2), (1, 1), (0, None)])
def test_nothing_is_to_be_said_from_steps_that_a_row_does_not_take(trainee, rows, tmp_path, num_steps, said):
    """With random steps a fully latent row takes fewer than its stage has; the first row has two sentences."""
    args = arguments(tmp_path, reconstruct_weight=1.0)
    batch = batch_of(trainee, rows, args, [(4, num_steps)] * 6, chosen=[0])
    inputs = batch["passes"]["query"][0]["inputs"]
    if said is None:
        assert "reconstruction" not in inputs
        return
    groups = set(inputs["reconstruction"]["groups"].flatten().tolist()) - {-1}
    assert len(groups) >= said
    assert max(groups) < num_steps


def test_reentrant_checkpointing_is_refused(trainee):
    with pytest.raises(ValueError, match="loses gradients that flow through the cache"):
        trainee.gradient_checkpointing_enable({"use_reentrant": True})


def test_a_batch_of_latent_loops_equals_a_loop_over_rows(trainee, rows, tmp_path):
    """Cross-entropy and vectors of rows alone, joined by the formulas of the paper."""
    args = arguments(tmp_path, temperature=0.1, balance_weight=0.0)
    draws = DRAWS["mixed stages"]
    parts, _ = gradients(trainee, rows, args, draws)
    objective = Objective(args, trainee.config.num_experts)
    entropies, vectors = {"query": [], "target": []}, {"query": [], "target": []}
    for row in range(6):
        batch = batch_of(trainee, rows, args, draws, [row])
        for role, (one,) in batch["passes"].items():
            output = trainee(**{**one["inputs"], "max_latent_steps": None})
            entropies[role] += objective.row_terms(output, one, batch["num_supervised"][role]).values()
            vectors[role].append(output.embedding)
    for role, values in entropies.items():
        assert torch.allclose(torch.stack(values).mean(), parts[f"cross_entropy_{role}"], atol=1e-9)
    query, target = (torch.cat(vectors[role]).double() for role in ("query", "target"))
    scores = query @ target.T / 0.1
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed[0, 3] = allowed[3, 0] = False  # both targets are "kite"
    scores = scores.masked_fill(~allowed, -torch.inf)
    own = scores.diagonal()
    expected = ((scores.logsumexp(1) - own).mean() + (scores.logsumexp(0) - own).mean()) / 2
    assert torch.allclose(expected, parts["contrastive"].double(), atol=1e-5)


def test_a_row_that_cannot_be_loaded_weighs_nothing(trainee, rows, tmp_path):
    args = arguments(tmp_path, **EVERY_TERM)
    trainee.loss_scalars = None
    curriculum = replace(CURRICULUM, stages=(Stage(ratio=1.0, share=1.0),))

    def terms(chosen, on_bad_row):
        collate = PairCollator(
            trainee.processor,
            trainee.config,
            curriculum,
            num_negatives=2,
            teacher_roles=SUPERVISED,
            on_bad_row=on_bad_row,
        )
        batch = collate([rows[Draw(row, 0, 4, 4, 0)] for row in chosen])
        for one in (one for passes in batch["passes"].values() for one in passes):
            if "pixel_values" in one["inputs"]:
                one["inputs"]["pixel_values"] = one["inputs"]["pixel_values"].double()
        objective = Objective(args, trainee.config.num_experts)
        step = Step(model=trainee, objective=objective, accelerator=Accelerator(cpu=True), autocast=nullcontext)
        return step.direct(batch), batch

    alone, _ = terms([0, 1, 3, 4], "error")
    whole = rows.records[5].target.images[0].read_bytes()
    place = rows.records[5].target.images[0].parent / "c.png"
    place.write_bytes(whole[: len(whole) // 2])
    lines = (place.parent / "rows.jsonl").read_text().replace('"a.png", "text": "red"', '"c.png", "text": "red"')
    (place.parent / "rows.jsonl").write_text(lines)
    with_bad, batch = terms([0, 1, 3, 4, 5], "skip")
    assert len(batch["bad_rows"]) == 1
    assert "rows.jsonl:6" in batch["bad_rows"][0]
    assert largest_difference(alone, with_bad) < 1e-9


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_passes_share_what_autocast_makes_of_the_weights(trainee, rows, tmp_path, monkeypatch, micro_batch_size):
    """Each pass's own copy would live until backward; sixteen rows, one by one, then fill a GPU."""
    model = trainee.float()
    weight = model.backbone.language_model.layers[0].mlp.gate_proj.weight
    objective = Objective(arguments(tmp_path, micro_batch_size=micro_batch_size), model.config.num_experts)
    batch = batch_of(model, rows, objective.args, DRAWS["latent"])
    for one in (one for passes in batch["passes"].values() for one in passes):
        if "pixel_values" in one["inputs"]:
            one["inputs"]["pixel_values"] = one["inputs"]["pixel_values"].float()

    def run() -> tuple[set[int], dict]:
        copies: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype == torch.bfloat16 and tensor.shape[::-1] == weight.shape:
                copies[tensor.data_ptr()] = tensor
            return tensor

        model.zero_grad()
        autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        step = Step(model=model, objective=objective, accelerator=Accelerator(cpu=True), autocast=autocast)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step.direct(batch)
        return set(copies), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    shared, gradients_shared = run()
    monkeypatch.setattr(Step, "_casts_kept", lambda self: nullcontext())
    own, gradients_own = run()
    num_passes = sum(len(passes) for passes in batch["passes"].values())
    assert len(own) == num_passes * len(shared)
    assert gradients_shared.keys() == gradients_own.keys()
    for name, gradient in gradients_own.items():
        assert (gradient - gradients_shared[name]).norm() <= 2e-2 * gradient.norm() + 1e-6, name
