"""Options of a run: validation, stages that settle, optimiser resets, evaluation, every loss at once, video, check."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from plume import Item, PlumeModel
from plume.random_models import SHORT_STRINGS
from plume_eval.pairs import PairsEvaluation
from plume_train.alarms import FIRST_STEP, LOGS_IN_A_ROW, Alarms, signs
from plume_train.callbacks import named_evaluation, reset_optimizer
from plume_train.config import NOT_HONOURED, SettingsError, arguments_from
from plume_train.curriculum import PAPER, Curriculum
from plume_train.data.check import check
from plume_train.data.records import Records
from plume_train.data.vectors import VectorStore
from plume_train.memory import expected_memory
from plume_train.progress import Progress
from plume_train.run import train
from plume_train.saving import RunError
from tests.mixed import write_clip
from tests.plume_train.runs import settings, stopped_before_its_end


def log_of(folder):
    return [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


def test_every_option_of_the_objective_trains_and_is_logged(tmp_path, start, hops_folder, with_pictures):
    terms = {
        "matryoshka_dims": [8, 16],
        "matryoshka_weight": 0.5,
        "per_step_weight": 0.5,
        "alignment_weight": 0.5,
        "uniformity_weight": 0.1,
        "distillation_weight": 1.0,
        "contrastive_loss": "sigmoid",
        "random_steps": True,
        "micro_batch_size": 2,
        "mix_earlier": 0.2,
        "bf16": True,
        "gradient_checkpointing": True,
        "report_to": ["tensorboard"],
    }
    model = train(settings(tmp_path, start, hops_folder, **terms))
    log = log_of(tmp_path)
    names = {name for line in log for name in line}
    assert {
        "matryoshka",
        "per_step",
        "alignment",
        "uniformity",
        "distillation_query",
        "teacher_cross_entropy_target",
        "gate_entropy",
        "expert_load_3",
        "state_norm",
        "step_cosine",
        "tokens_per_second",
        "peak_memory_gib",
        "teacher_forced_recall/hops/page-tiles-name",
    } <= names
    late = [line for line in log if line.get("num_latent_steps") == 2]
    assert all(0 <= line["gate_entropy"] <= 1 for line in late)
    assert all(sum(line[f"expert_load_{e}"] for e in range(4)) == pytest.approx(1, abs=1e-3) for line in late)
    assert (tmp_path / "out" / "training.png").stat().st_size > 10_000
    assert not any(name.startswith("loss_scalars") for name in model.state_dict())
    assert not any("loss_scalars" in name for name in PlumeModel.from_pretrained(tmp_path / "out").state_dict())


def test_what_stands_beside_contrast_trains_and_is_logged(tmp_path, start, hops_folder):
    """Ranking from written reasoning, labels, temperatures, precisions, fewer steps of targets, instructions."""
    lines = [json.loads(line) for line in (hops_folder / "train.jsonl").read_text().splitlines()]
    for line in lines:
        line["query"]["instruction"] = "Look:"
    (hops_folder / "instructed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    terms = {
        "train_file": str(hops_folder / "instructed.jsonl"),
        "ranking_weight": 1.0,
        "max_labels": 20,
        "temperature_per_task": True,
        "matryoshka_dims": [8, 32],
        "matryoshka_weight": 0.5,
        "matryoshka_precisions": ["float32", "binary"],
        "target_steps": 0,
        "instruction_dropout": 0.5,
        "micro_batch_size": 2,
    }
    model = train(settings(tmp_path, start, hops_folder, **terms))
    names = {name for line in log_of(tmp_path) for name in line}
    assert {"ranking", "teacher_cross_entropy_query", "matryoshka", "contrastive"} <= names
    assert not {"distillation_query", "teacher_cross_entropy_target"} & names
    assert model.config.document_latent_steps == 0
    assert not any(name.startswith("loss_scalars") for name in model.state_dict())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"target_steps": -1}, "target_steps is -1; expected 0 or more"),
        ({"instruction_dropout": 2.0}, "instruction_dropout is 2.0; expected 0 to 1"),
        ({"matryoshka_precisions": ["int4"]}, "holds 'int4'; expected some of float32, int8, binary"),
        ({"max_labels": -1}, "max_labels is -1; expected 0 or more"),
        ({"ranking_temperature": 0.0}, "ranking_temperature must be positive; received 0.0"),
    ],
)
def test_values_that_settings_cannot_have_are_refused(tmp_path, start, hops_folder, wrong, told):
    with pytest.raises(SettingsError, match=re.escape(told)):
        settings(tmp_path, start, hops_folder, **wrong).check()


SIGNS = {
    "states alike": {"step_cosine": 0.99},
    "states long": {"state_norm_ratio": 200.0},
    "router collapsed": {"expert_load_0": 0.95, "expert_load_1": 0.05},
    "contrast without signal": {"recall_in_batch": 0.1, "contrastive": 3.46},  # ln 32
}
SOUND = {
    "step_cosine": 0.9,
    "state_norm_ratio": 8.0,
    "expert_load_0": 0.6,
    "expert_load_1": 0.4,
    "recall_in_batch": 0.1,
    "contrastive": 2.0,
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_that_stays_is_said_once(name, recwarn):
    assert signs(SOUND, 32) == {}
    assert list(signs({**SOUND, **SIGNS[name]}, 32)) == [name]
    alarms, control = Alarms(32), SimpleNamespace()
    bad, good = {"loss": 1.0, **SOUND, **SIGNS[name]}, {"loss": 1.0, **SOUND}

    def log(step, logs, is_first_process=True):
        state = SimpleNamespace(global_step=step, is_world_process_zero=is_first_process)
        alarms.on_log(None, state, control, logs)

    for step in range(10):
        log(step, bad)  # beginnings are odd
    for logs in (bad, bad, good) * 5:  # it does not stay
        log(FIRST_STEP, logs)
    assert not recwarn
    for _ in range(LOGS_IN_A_ROW):
        log(FIRST_STEP, bad, is_first_process=False)
    assert not recwarn
    for _ in range(3 * LOGS_IN_A_ROW):
        log(FIRST_STEP, bad)
        log(FIRST_STEP, {"recall_at_1_latent": 0.5})  # of an evaluation
    assert len(recwarn) == 1
    assert f"plume: step {FIRST_STEP}: " in str(recwarn[0].message)


def test_teacher_forced_recall_is_no_sign_of_contrast_without_signal():
    assert signs({"teacher_forced_recall": 0.03, "contrastive": 3.46}, 32) == {}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"target_steps": 99}, "num_latent_steps=99 exceeds the step table"),
        ({"target_steps": 0, "per_step_weight": 1.0}, "per_step_weight contrasts both sides after every step"),
    ],
)
def test_steps_that_a_model_cannot_give_its_targets_are_refused(tmp_path, start, hops_folder, wrong, told):
    with pytest.raises(ValueError, match=told):
        train(settings(tmp_path, start, hops_folder, **wrong))


def test_as_many_steps_for_targets_as_for_queries_suit_a_contrast_of_every_step(tmp_path, start, hops_folder):
    train(settings(tmp_path, start, hops_folder, target_steps=2, per_step_weight=1.0))
    assert any("per_step" in line for line in log_of(tmp_path))


def test_vectors_that_know_no_row_teach_nothing_and_are_refused(tmp_path, start, hops_folder):
    VectorStore.create(tmp_path / "vectors", {"model": "other", "dim": 4})
    taught = {"ranking_weight": 1.0, "teacher_vectors": str(tmp_path / "vectors")}
    with pytest.raises(SettingsError, match=r"knows none of \d+ rows that were looked up; write them"):
        train(settings(tmp_path, start, hops_folder, **taught))


def test_vectors_that_teach_must_be_there(tmp_path, start, hops_folder):
    with pytest.raises(ValueError, match="holds no vectors; expected a folder that `plume-train vectors` wrote"):
        train(settings(tmp_path, start, hops_folder, ranking_weight=1.0, teacher_vectors=str(tmp_path)))
    useless = settings(tmp_path, start, hops_folder, teacher_vectors=str(tmp_path)).without_effect(
        Records(hops_folder / "train.jsonl")
    )
    assert "teacher_vectors: without effect, since ranking_weight is 0" in useless


def test_bfloat16_autocast_keeps_float32_weights_and_about_the_same_loss(tmp_path, start, hops_folder):
    exact = train(settings(tmp_path, start, hops_folder, max_steps=3))
    losses = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    rough = train(settings(tmp_path, start, hops_folder, max_steps=3, bf16=True, overwrite=True))
    assert {weight.dtype for weight in rough.state_dict().values()} == {torch.float32}
    assert [line["loss"] for line in log_of(tmp_path) if "loss" in line] == pytest.approx(losses, rel=0.1)
    assert exact.dtype == torch.float32


def test_a_stage_that_has_settled_ends_early_and_a_resumed_run_remembers(tmp_path, start, hops_folder):
    changes = {
        "validation_file": str(hops_folder / "train.jsonl"),
        "validate_every": 2,
        "advance": "settled",
        "settle_patience": 1,
        "settle_tolerance": 0.9,  # hardly anything counts as an improvement
        "max_steps": 20,
        "save_strategy": "steps",
        "save_steps": 10,
        "save_total_limit": 5,
    }
    whole = train(settings(tmp_path, start, hops_folder, **changes)).state_dict()
    stages = {line["step"]: line["stage"] for line in log_of(tmp_path) if "loss" in line}
    scheduled = Progress(settings(tmp_path, start, hops_folder).build_curriculum(), 20).borders
    first = min(step for step, stage in stages.items() if stage == 1)
    assert first - 1 < scheduled[1]
    assert any(line.get("validation_stage_settled") == 1.0 for line in log_of(tmp_path))
    assert any("validation_cross_entropy_query" in line for line in log_of(tmp_path))
    shutil.rmtree(tmp_path / "out" / "checkpoint-20")
    (tmp_path / "out" / "model.safetensors").unlink()
    resumed = train(settings(tmp_path, start, hops_folder, **changes)).state_dict()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert {line["step"]: line["stage"] for line in log_of(tmp_path) if "loss" in line} == stages


@pytest.mark.parametrize(
    ("reached_at", "steps_of_k"), [(6, {0: 6, 1: 7, 2: 7}), (None, {0: 20})], ids=["reached", "never"]
)
def test_latent_stages_wait_for_recall_after_the_written_rationale(
    tmp_path, start, hops_folder, recwarn, reached_at, steps_of_k
):
    def evaluate(model, step, num_latent_steps):
        return {"recall_at_1_explicit": 0.95 if step == reached_at else 0.5}

    changes = {"advance": "explicit_recall", "evaluate_every": 2, "max_steps": 20, "dataloader_num_workers": 0}
    model = train(settings(tmp_path, start, hops_folder, **changes), evaluate)
    steps = Counter(line["num_latent_steps"] for line in log_of(tmp_path) if "loss" in line)
    assert steps.keys() == steps_of_k.keys()
    assert 0 <= steps[0] - steps_of_k[0] <= 2  # batches may have been prepared
    assert abs(steps[1] - steps[2]) <= 1
    assert model.config.num_latent_steps == max(steps_of_k)
    told = " ".join(str(warning.message) for warning in recwarn)
    assert ("no latent stage was trained: recall after the written rationale reached 0.500" in told) == (not reached_at)


def test_a_resumed_run_goes_on_waiting_for_recall(tmp_path, start, hops_folder):
    def evaluate(model, step, num_latent_steps):
        return {"recall_at_1_explicit": 0.95 if step == 12 else 0.5}

    changes = {"advance": "explicit_recall", "evaluate_every": 2, "max_steps": 20, "save_steps": 8}
    changes |= {"save_strategy": "steps", "save_total_limit": 5}
    whole = train(settings(tmp_path, start, hops_folder, **changes), evaluate).state_dict()
    shutil.rmtree(tmp_path / "out" / "checkpoint-20")
    shutil.rmtree(tmp_path / "out" / "checkpoint-16")
    stopped_before_its_end(tmp_path / "out")
    resumed = train(settings(tmp_path, start, hops_folder, **changes), evaluate).state_dict()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_recall_that_cannot_decide_is_refused(tmp_path, start, hops_folder):
    changes = {"advance": "explicit_recall", "evaluate_every": 2}
    with pytest.raises(SettingsError, match="needs an evaluation, whose recall decides; set evaluation"):
        train(settings(tmp_path, start, hops_folder, **changes))
    one = {"stage_ratios": [1.0], "stage_shares": [1.0]}
    with pytest.raises(SettingsError, match=r"its first stage must be explicit \(ratio 0\) and not the only one"):
        train(settings(tmp_path, start, hops_folder, **changes, **one), lambda *_: {})
    with pytest.raises(RunError, match='which the evaluation did not give; name the mode "explicit"'):
        train(settings(tmp_path, start, hops_folder, **changes), lambda *_: {"recall_at_1_latent": 1.0})


def test_a_border_moves_only_to_steps_that_nobody_has_prepared():
    progress = Progress(Curriculum(stages=PAPER, num_segments=8), 1000)
    progress.lead = 7
    assert progress.borders == [0, 600, 667, 734, 800]
    assert not progress.note_validation(100, 1.0, patience=2, tolerance=0.01)
    assert not progress.note_validation(110, 0.999, patience=2, tolerance=0.01)
    assert progress.note_validation(120, 1.0, patience=2, tolerance=0.01)
    assert progress.borders == [0, 127, 194, 261, 327]
    assert [progress.stage_at(step) for step in (126, 127, 326, 327)] == [0, 1, 3, 4]


def test_a_reset_makes_the_optimiser_a_new_one():
    def run(reset):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for step in range(4):
            if reset and step == 2:
                reset_optimizer(optimizer)
            if not reset and step == 2:
                optimizer = torch.optim.AdamW([weight], lr=0.1)
            weight.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
            optimizer.step()
        return weight

    assert torch.equal(run(reset=True), run(reset=False))


def test_the_learning_rate_rises_again_and_the_optimiser_is_reset_at_a_change_of_stage(tmp_path, start, hops_folder):
    changes = {"optimizer_reset": "full", "rewarmup_steps": 2, "lr_scheduler_type": "constant"}
    train(settings(tmp_path, start, hops_folder, **changes))
    rates = [line["learning_rate"] for line in log_of(tmp_path) if "loss" in line]
    assert rates == pytest.approx([1e-3] * 4 + [5e-4, 1e-3, 1e-3] + [5e-4, 1e-3, 1e-3])
    changes["overwrite"] = True
    again = train(settings(tmp_path, start, hops_folder, **changes)).state_dict()
    other = train(settings(tmp_path, start, hops_folder, **{**changes, "optimizer_reset": "none"})).state_dict()
    assert any(not torch.equal(weight, again[name]) for name, weight in other.items())


def test_an_evaluation_is_named_in_the_settings(tmp_path, start, hops_folder):
    pairs = [{"query": "red", "target": "blue"}, {"query": {"text": "key"}, "target": "blue"}]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = {"file": str(tmp_path / "held_out.jsonl"), "modes": ["latent", "single_pass", "explicit"]}
    train(
        settings(
            tmp_path,
            start,
            hops_folder,
            evaluation="plume_eval.pairs:PairsEvaluation",
            evaluation_arguments={**arguments, "max_new_tokens": 4},
            evaluate_every=5,
        )
    )
    evaluated = [line for line in log_of(tmp_path) if "recall_at_1_explicit" in line]
    assert [line["step"] for line in evaluated] == [5, 10]
    assert evaluated[0]["recall_at_1_latent"] == 1.0  # both targets are one candidate
    with pytest.raises(SettingsError, match=r"evaluation='plume_eval\.pairs:Nothing' cannot be found"):
        named_evaluation("plume_eval.pairs:Nothing", {})
    with pytest.raises(ValueError, match="there is no mode 'slow'"):
        PairsEvaluation(tmp_path / "held_out.jsonl", ["slow"])


def test_rows_with_videos_and_pictures_in_memory_train(tmp_path, start, hops_folder):
    for index in range(2):
        write_clip(tmp_path / f"{index}.mp4", [0, 80, 160, 240])
        Image.new("RGB", (56, 56), "red").save(tmp_path / f"{index}.png")
    rows = [
        {"query": {"text": "what moves?", "video": f"{i % 2}.mp4"}, "target": {"video": ["0.png", "1.png"]}}
        for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(tmp_path, start, hops_folder).plume_config
    small = {**config, "video_min_pixels": 56 * 56, "video_max_pixels": 56 * 56, "video_num_frames": 2}
    train(
        settings(tmp_path, start, hops_folder, train_file=str(tmp_path / "rows.jsonl"), plume_config=small, max_steps=2)
    )
    assert log_of(tmp_path)[0]["recall_in_batch"] >= 0


def test_rows_that_turn_out_broken_are_skipped_counted_and_listed(tmp_path, start, hops_folder):
    Image.new("RGB", (56, 56), "red").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    rows = [{"query": {"image": name}, "target": f"x {i}"} for i, name in enumerate(["good.png", "bad.png"] * 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train_file": str(tmp_path / "rows.jsonl"), "max_steps": 2, "dataloader_num_workers": 2}
    with pytest.raises(ValueError, match=r"rows\.jsonl:[24].*cannot be read"):
        train(settings(tmp_path, start, hops_folder, **changes))
    with pytest.warns(UserWarning, match="plume: 2 rows were skipped while training; see bad_rows"):
        train(settings(tmp_path, start, hops_folder, **changes, on_bad_row="skip"))
    listed = (tmp_path / "out" / "bad_rows.txt").read_text().splitlines()
    assert sorted(line.split(":")[1] for line in listed) == ["2", "4"]


def test_check_tells_what_is_in_the_data(tmp_path, start, hops_folder, capsys):
    rows = [
        {"query": {"text": "red page", "rationale": "One. Two. Three."}, "target": "blue", "negatives": ["key"]},
        {"query": "red page", "target": "blue"},
        {"query": {"image": "gone.png"}, "target": "blue"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [str(tmp_path / "rows.jsonl"), "--num_segments", "2", "--disable_tqdm", "true"]
    assert check(flags) == 1
    told = capsys.readouterr().out
    assert "2 rows can be used, 1 cannot" in told
    assert "rows.jsonl:3: 'query' names gone.png" in told
    assert "1  rows repeat a query" in told
    assert "'<bot><ct><eot>Three.</think>" in told
    assert "negative 0: 'key'" in told
    assert check([str(hops_folder / "train.jsonl"), "--model", str(start), "--load-media"]) == 0
    told = capsys.readouterr().out
    assert "rows can be used, 0 cannot" in told
    assert "query: image + text" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advance": "settled"}, "advance=settled needs a validation_file"),
        ({"matryoshka_dims": [8]}, "matryoshka_dims and matryoshka_weight go together"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"train_file": []}, "train_file is not set"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, start, hops_folder, changes, message):
    with pytest.raises(SettingsError, match=message):
        train(settings(tmp_path, start, hops_folder, **changes))


def test_gradcache_with_accumulation_is_refused_under_deepspeed(tmp_path, start, hops_folder):
    args = settings(tmp_path, start, hops_folder, micro_batch_size=1, gradient_accumulation_steps=2)
    args.check()
    args.deepspeed_plugin = object()
    with pytest.raises(SettingsError, match="raise per_device_train_batch_size"):
        args.check()


def test_rows_that_became_bad_after_the_scan_or_are_too_long_can_be_skipped(tmp_path, start, hops_folder, monkeypatch):
    Image.new("RGB", (56, 56), "red").save(tmp_path / "here.png")
    rows = [{"query": {"image": "here.png"}, "target": "x"}, {"query": "y " * 5000, "target": "z"}]
    rows += [{"query": f"red {i}", "target": f"blue {i}"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = Records.__init__

    def scanned_then_gone(self, *args, **kwargs):
        real(self, *args, **kwargs)
        (tmp_path / "here.png").unlink(missing_ok=True)

    changes = {"train_file": str(tmp_path / "rows.jsonl"), "max_steps": 1}
    monkeypatch.setattr(Records, "__init__", scanned_then_gone)
    with pytest.warns(UserWarning, match="2 rows were skipped while training"):
        train(settings(tmp_path, start, hops_folder, **changes, on_bad_row="skip"))
    listed = (tmp_path / "out" / "bad_rows.txt").read_text()
    assert "rows.jsonl:1: 'query' names here.png" in listed
    assert "rows.jsonl:2: it has " in listed
    assert "tokens" in listed


def test_rationales_alone_train_without_targets_and_without_a_router(tmp_path, start, hops_folder):
    rows = [{"query": {"text": f"red {i}", "rationale": "One. Two."}} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {**settings(tmp_path, start, hops_folder).plume_config, "transition": "mlp"}
    changes = {
        "train_file": str(tmp_path / "rows.jsonl"),
        "needs_target": False,
        "plume_config": config,
        "max_steps": 4,
    }
    for micro_batch_size in (None, 2):
        out = str(tmp_path / f"out-{micro_batch_size}")
        more = {"micro_batch_size": micro_batch_size, "num_negatives": 1, "output_dir": out}
        with pytest.warns(UserWarning, match="num_negatives: without effect"):
            train(settings(tmp_path, start, hops_folder, **changes, **more))


def test_an_epoch_is_a_pass_over_every_task(tmp_path, start, hops_folder):
    rows = [{"query": f"red {i}", "target": f"blue {i}", "task": str(i % 5)} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train_file": str(tmp_path / "rows.jsonl"), "max_steps": -1, "num_train_epochs": 2}
    train(settings(tmp_path, start, hops_folder, **changes))
    log = log_of(tmp_path)
    assert max(line["step"] for line in log) == 10  # 5 tasks of 2 rows, batches of 4, twice
    assert [line["epoch"] for line in log if "loss" in line] == [step / 5 for step in range(1, 11)]
    changes["overwrite"] = True
    with pytest.raises(SettingsError, match="task_weights names 'b', which is no task of the data"):
        train(settings(tmp_path, start, hops_folder, **changes, task_weights={"b": 2}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_negatives": 2}, "num_negatives: without effect, since no row has hard negatives"),
        ({"learn_temperature": True, "contrastive_loss": "sigmoid"}, "learn_temperature: without effect"),
        ({"per_step_weight": 1.0, "stage_ratios": [0.0], "stage_shares": [1.0]}, "no stage has latent steps"),
        ({"lora_dropout": 0.1}, "lora_rank is 0"),
    ],
)
def test_a_setting_without_effect_is_told(tmp_path, start, hops_folder, changes, message):
    with pytest.warns(UserWarning, match=message):
        train(settings(tmp_path, start, hops_folder, **changes, max_steps=1))


CANNOT_CONTRAST = {
    "a batch of one": ({"per_device_train_batch_size": 1}, [("a", "x"), ("b", "y")], "a batch holds one pair"),
    "one target for all": ({}, [("a", "x"), ("b", "x"), ("c", "x")], "since all its targets are equal"),
    "one query for all": ({}, [("a", "x"), ("a", "y")], "since all its queries are equal"),
    "one row": ({}, [("a", "x")], "since all its queries are equal"),
}


def contrast_told(tmp_path, rows, **changes) -> list[str]:
    file = tmp_path / "rows.jsonl"
    negatives = changes.pop("negatives", None)
    extra = {} if negatives is None else {"negatives": negatives}
    file.write_text("".join(json.dumps({"query": q, "target": t, **extra}) + "\n" for q, t in rows))
    args = arguments_from(
        _yaml(tmp_path), **{"train_file": str(file), "output_dir": str(tmp_path / "out"), "use_cpu": True, **changes}
    )
    return [told for told in args.without_effect(Records(file)) if told.startswith("contrastive_weight")]


def _yaml(tmp_path):
    (tmp_path / "empty.yaml").write_text("model: none\n")
    return tmp_path / "empty.yaml"


@pytest.mark.parametrize("case", CANNOT_CONTRAST)
def test_batches_that_cannot_hold_a_negative_are_told(tmp_path, case):
    changes, rows, message = CANNOT_CONTRAST[case]
    (told,) = contrast_told(tmp_path, rows, **changes)
    assert "without effect" in told
    assert message in told
    assert contrast_told(tmp_path, rows, contrastive_weight=0, anchor_contrastive_weight=0, **changes) == []
    assert contrast_told(tmp_path, rows, contrastive_loss="sigmoid", **changes) == []
    assert contrast_told(tmp_path, rows, negatives=["n"], num_negatives=1, **changes) == []
    if case != "a batch of one":
        assert contrast_told(tmp_path, rows, mask_duplicates=False, **changes) == []
        assert contrast_told(tmp_path, [*rows, ("other", "words")], **changes) == []


def test_a_run_of_batches_of_one_says_so(tmp_path, start, hops_folder):
    with pytest.warns(UserWarning, match="without effect, since a batch holds one pair, which has no negative"):
        train(settings(tmp_path, start, hops_folder, per_device_train_batch_size=1, max_steps=1))


def test_every_argument_of_transformers_is_honoured_or_refused():
    """A list of those that this trainer, or what it inherits, makes work; a new one must be looked at."""
    honoured = """
        output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
        lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
        optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
        activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha
        torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
        logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
        trackio_bucket_id trackio_static_space_id save_only_model save_strategy save_steps save_on_each_node
        save_total_limit restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order remove_unused_columns ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
        debug skip_memory_metrics do_train resume_from_checkpoint local_rank
    """.split()  # noqa: SIM905
    names = {one.name for one in dataclasses.fields(TrainingArguments)}
    assert names - set(honoured) - set(NOT_HONOURED) == set()
    assert not set(honoured) & set(NOT_HONOURED)


@pytest.mark.parametrize("name", NOT_HONOURED)
def test_an_argument_that_cannot_be_honoured_is_refused_with_what_to_do(tmp_path, name):
    values = {
        "eval_strategy": "steps",
        "train_sampling_strategy": "group_by_length",
        "hub_strategy": "end",
        "accelerator_config": {"split_batches": True},
        "include_for_metrics": ["loss"],
        "include_num_input_tokens_seen": "all",
        "average_tokens_across_devices": False,
        "eval_do_concat_batches": False,
        "metric_for_best_model": "loss",
    }
    default = next(one for one in dataclasses.fields(TrainingArguments) if one.name == name).default
    value = values.get(name, True if default in (False, None) else "other" if isinstance(default, str) else 3)
    with pytest.raises(SettingsError, match=f"{name}=.* is not available here: "):
        arguments_from(_yaml(tmp_path), output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_what_a_run_needs_is_said_before_it_starts(tmp_path, start, hops_folder, capsys, monkeypatch):
    args = {"max_steps": 1, "disable_tqdm": False, "optim": "adamw_torch", "per_device_train_batch_size": 4}
    model = train(settings(tmp_path, start, hops_folder, **args))
    told = capsys.readouterr().err
    assert "expected memory: about" in told
    assert "this machine has free" in told
    weights = sum(one.nbytes for one in model.parameters())
    memory = expected_memory(
        model,
        model.backbone.config.get_text_config(),
        num_rows=4,
        num_tokens=50,
        num_labels=40,
        compute_dtype=torch.float32,
        checkpointing=False,
        moments=2,
    )
    frozen = sum(one.nbytes for one in model.parameters() if not one.requires_grad)
    assert memory.weights == weights
    assert memory.gradients == weights - frozen
    assert memory.optimizer == 2 * (weights - frozen)
    monkeypatch.setattr("plume_train.memory.psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    (tmp_path / "second").mkdir()
    with pytest.warns(UserWarning, match=r"will probably not fit; lower micro_batch_size"):
        train(settings(tmp_path / "second", start, hops_folder, **args))


def test_the_bound_on_activations_holds_for_what_a_pass_keeps(tmp_path, start, hops_folder):
    """Against what autograd saves in a pass of the language model, counted once per storage."""
    model = PlumeModel.from_backbone(str(start), **SHORT_STRINGS)
    batch = model.processor.encode([Item.parse("red " * 60)] * 4)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, num_latent_steps=0)
    found = sum(size for pointer, size in kept.items() if pointer not in own)
    shapes = {"num_rows": 4, "num_tokens": batch["input_ids"].shape[1] + 2, "num_labels": 0, "moments": 2}
    text = model.backbone.config.get_text_config()
    memory = expected_memory(model, text, compute_dtype=torch.float32, checkpointing=False, **shapes)
    assert 0.4 < memory.activations / found < 2.5
