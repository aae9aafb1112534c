"""Training runs at toy size: it learns, workers see the stage, a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json

import pytest
import torch

from plume import PlumeModel
from plume_train.config import PlumeTrainingArguments, arguments_from, parse_arguments
from plume_train.curriculum import PAPER, Curriculum
from plume_train.data.collate import PairCollator, StagedRecords
from plume_train.data.records import Records
from plume_train.data.sampler import Draw
from plume_train.objective.gradcache import Step
from plume_train.run import load_model, train
from plume_train.throughput import METHODS, pairs_per_second
from tests.plume_train.runs import settings


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_a_run_goes_through_its_stages_and_saves_a_checkpoint(tmp_path, start, hops_folder):
    seen = []
    args = settings(tmp_path, start, hops_folder, evaluate_every=5, train_vision=True)
    model = train(args, lambda model, step, num_latent_steps: seen.append((step, model.training)) or {"recall": 0.5})
    assert seen == [(5, False), (10, False)]
    assert model.config.num_latent_steps == 2
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    stages = {line["step"]: line["num_latent_steps"] for line in log if "contrastive" in line}
    assert [stages[step] for step in range(1, 11)] == [0] * 4 + [1] * 3 + [2] * 3
    assert {"loss", "cross_entropy_query", "anchor_contrastive", "teacher_forced_recall"} <= set(log[0])
    assert "recall_in_batch" not in log[0]  # recall behind the words of the data has a name of its own
    last = next(line for line in reversed(log) if "contrastive" in line)
    assert "recall_in_batch" in last
    assert "teacher_forced_recall" not in last
    assert last["state_norm_ratio"] > 0
    assert "expert_load_3" in next(line for line in log if line.get("num_latent_steps") == 2)
    reopened = PlumeModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(weight, reopened.state_dict()[name]) for name, weight in weights(model).items())


def test_the_loss_falls(tmp_path, start, hops_folder):
    alone = {"contrastive_weight": 0.0, "anchor_contrastive_weight": 0.0, "learning_rate": 5e-3}
    explicit = {"stage_ratios": None, "stage_shares": None, "curriculum": "explicit"}
    train(settings(tmp_path, start, hops_folder, max_steps=40, **explicit, **alone))
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [line["cross_entropy_query"] for line in log if "cross_entropy_query" in line]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize(
    ("asked", "learns"),
    [
        ({"train_merger": False}, {"language_model"}),
        ({}, {"language_model", "merger"}),
        ({"train_vision": True, "train_merger": False}, {"language_model", "merger", "blocks", "patch_embed"}),
    ],
    ids=["language model", "merger too (as published)", "all"],
)
def test_the_vision_tower_is_frozen_unless_asked(tmp_path, start, hops_folder, asked, learns):
    before = weights(load_model(settings(tmp_path, start, hops_folder)))
    after = weights(train(settings(tmp_path, start, hops_folder, max_steps=2, warmup_steps=0, **asked)))
    changed = {name for name in before if name.startswith("backbone") and not torch.equal(before[name], after[name])}
    parts = {"language_model", "merger", "blocks", "patch_embed"}
    assert {part for part in parts if any(f".{part}." in name for name in changed)} == learns


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, start, hops_folder):
    class Stop(Exception):  # noqa: N818
        pass

    def interrupt(model, step, num_latent_steps):
        if step == 6:
            raise Stop
        return {}

    whole = weights(train(settings(tmp_path, start, hops_folder, output_dir=str(tmp_path / "whole"))))
    saving = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "auto"}
    with pytest.raises(Stop):
        train(settings(tmp_path, start, hops_folder, evaluate_every=3, **saving), interrupt)
    resumed = weights(train(settings(tmp_path, start, hops_folder, **saving)))
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_workers_prepare_rows_for_the_stage_of_their_step(tmp_path, start, hops_folder):
    results = [
        weights(
            train(
                settings(
                    tmp_path,
                    start,
                    hops_folder,
                    dataloader_num_workers=workers,
                    output_dir=str(tmp_path / str(workers)),
                )
            )
        )
        for workers in (0, 2)
    ]
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name


def test_a_batch_holds_what_the_stage_says(plume_folder, hops_folder):
    model = PlumeModel.from_pretrained(plume_folder)
    curriculum = Curriculum(stages=PAPER, num_segments=2)
    collate = PairCollator(model.processor, model.config, curriculum)
    data = StagedRecords(Records(hops_folder / "train.jsonl"))
    batch = collate([data[Draw(row, stage, steps, 2, 4)] for row, stage, steps in [(0, 0, 0), (1, 2, 1), (2, 4, 2)]])
    (one,) = batch["passes"]["query"]
    query = one["inputs"]
    assert query["num_latent_steps"].tolist() == [0, 1, 2]
    assert query["suffix_ids"].shape == query["labels"].shape
    written = query["suffix_mask"].sum(dim=1).tolist()
    assert written[0] > written[1] > written[2] == 2  # <eot><gen_emb>
    assert ((query["labels"] == -100) == (query["suffix_mask"] == 0)).all()
    assert batch["query_keys"].dtype == torch.int64
    same = data.records[0].target.text == data.records[2].target.text
    assert (batch["target_keys"][0] == batch["target_keys"][2]).item() == same


def test_an_unknown_key_of_a_yaml_file_is_named_with_a_hint(tmp_path):
    (tmp_path / "bad.yaml").write_text("lerning_rate: 1.0\n")
    with pytest.raises(ValueError, match=r"bad\.yaml: unknown key 'lerning_rate'; did you mean 'learning_rate'"):
        parse_arguments(["--config", str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("on_bad_row: raise", "on_bad_row must be one of 'error', 'skip'; received 'raise'"),
        ("last_state_predicts: next-word", "last_state_predicts must be one of"),
        ("curriculum: papr", "curriculum must be one of 'paper'"),
        ("balance_weight: much", "balance_weight must be a number; received 'much'"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused(tmp_path, setting, message):
    (tmp_path / "bad.yaml").write_text(f"{setting}\nmodel: a\ntrain_file: b\noutput_dir: {tmp_path}\n")
    with pytest.raises(ValueError, match=message):
        arguments_from(tmp_path / "bad.yaml", use_cpu=True)


def test_flags_win_over_the_yaml_file(tmp_path, start, hops_folder):
    (tmp_path / "base.yaml").write_text("temperature: 0.1\nnum_segments: 3\n")
    (tmp_path / "run.yaml").write_text(
        f"extends: base.yaml\nmodel: {start}\ntrain_file: x.jsonl\nnum_segments: 4\noutput_dir: {tmp_path}\n"
    )
    args = parse_arguments(["--config", str(tmp_path / "run.yaml"), "--num_segments", "5", "--use_cpu", "true"])
    assert (args.temperature, args.num_segments, args.model) == (0.1, 5, str(start))


def test_objects_are_json_on_the_command_line(tmp_path):
    flags = ["--model", "m", "--train_file", "a.jsonl", "b.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    args = parse_arguments([*flags, "--plume_config", '{"top_k": 1}', "--task_weights", '{"birds": 0.5}'])
    assert (args.plume_config, args.task_weights, args.evaluation_arguments) == ({"top_k": 1}, {"birds": 0.5}, {})
    assert args.train_file == ["a.jsonl", "b.jsonl"]


def test_a_checkpoint_is_not_silently_changed_by_new_settings(tmp_path, plume_folder, hops_folder):
    args = settings(tmp_path, plume_folder, hops_folder, plume_config={"read_out": "<gen_emb>!"})
    with pytest.raises(ValueError, match=r"plume_config\.read_out='<gen_emb>!', but the checkpoint .* was made with"):
        load_model(args)


def test_a_checkpoint_can_get_another_way_to_make_latent_inputs(tmp_path, plume_folder, hops_folder, capsys):
    old = PlumeModel.from_pretrained(plume_folder)
    changed = {"latents": "parallel", "refinements": 1, "transition": "mlp"}
    model = load_model(settings(tmp_path, plume_folder, hops_folder, plume_config=changed))
    assert "what it lacked begins anew: transition, latent_inputs" in capsys.readouterr().err
    assert {name: getattr(model.config, name) for name in changed} == changed
    for name, weight in old.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight)
    with pytest.raises(ValueError, match="refinements=1 belongs to parallel latents"):
        load_model(settings(tmp_path, plume_folder, hops_folder, plume_config={"refinements": 1}))


def test_the_throughput_of_every_way_is_measured_at_every_number_of_steps(plume_folder, hops_folder):
    model = PlumeModel.from_pretrained(plume_folder)
    before = weights(model)
    args = PlumeTrainingArguments(num_segments=2, output_dir="unused", use_cpu=True, report_to="none")
    found = pairs_per_second(model, list(Records(hops_folder / "train.jsonl"))[:4], args, num_runs=1, num_warm_up=0)
    assert [one["num_latent_steps"] for one in found[:: len(METHODS)]] == [0, 1, 2]
    assert {one["method"] for one in found} == set(METHODS)
    assert all(one["speed_up"] == 1 for one in found if one["method"] == "loop over rows")
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_a_way_that_needs_too_much_memory_is_named_and_the_others_are_measured(plume_folder, hops_folder, monkeypatch):
    direct = Step.direct

    def limited(self, batch):
        if all(len(passes) == 1 for passes in batch["passes"].values()):
            raise torch.OutOfMemoryError("too little")
        return direct(self, batch)

    monkeypatch.setattr(Step, "direct", limited)
    args = PlumeTrainingArguments(num_segments=2, output_dir="unused", use_cpu=True, report_to="none")
    records = list(Records(hops_folder / "train.jsonl"))[:4]
    saved: list[list] = []
    found = pairs_per_second(
        PlumeModel.from_pretrained(plume_folder),
        records,
        args,
        num_runs=1,
        num_warm_up=0,
        save=lambda results: saved.append([one["num_latent_steps"] for one in results]),
    )
    assert saved[1] == [0] * 4 + [2] * 4  # the ends come first
    assert {one["method"] for one in found if one["seconds"] is None} == {"batch", "batch, checkpointing"}
    assert all(one["pairs_per_second"] is None for one in found if one["seconds"] is None)
