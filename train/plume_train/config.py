"""Settings of a training run: transformers' training arguments and plume's, in one place.

One name per knob: a field here is a key of the YAML file, a command-line flag and an attribute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from tqdm.auto import tqdm
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from plume.checkpoints.place import check_place
from plume.configurations import find_config
from plume.terminal import Parser, did_you_mean, is_watched, printable
from plume_train.curriculum import PRESETS, Curriculum, Stage
from plume_train.data.records import Records, check_source

#: What vectors are kept in.
Precision = Literal["float32", "int8", "binary"]


class SettingsError(ValueError):
    """Settings that cannot be used; names them and what to change."""


#: Linear layers of the language model, never those of the vision tower or of the transition adapter.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


_VALIDATE = "set validation_file and validate_every, or evaluation and evaluate_every"
_BEST = f"no checkpoint is chosen by a metric; {_VALIDATE}, and compare them in log.jsonl"
_PUSH = "nothing is pushed while training; afterwards call PlumeModel.from_pretrained(output_dir).push_to_hub(name)"
_ORDER = "the sampler of the curriculum decides the order of rows; use task_weights and mixing_temperature"
_LOADER = "every process draws its own part of each batch, so that accelerate does not touch the loader"
#: Arguments of transformers that this trainer cannot honour, and what to do instead.
NOT_HONOURED = {
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval", "do_predict"), _VALIDATE),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only"), _VALIDATE),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"), _VALIDATE),
    **dict.fromkeys(("include_for_metrics", "bf16_full_eval", "fp16_full_eval"), _VALIDATE),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _PUSH),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUSH),
    **dict.fromkeys(("train_sampling_strategy", "length_column_name", "dataloader_drop_last"), _ORDER),
    "accelerator_config": _LOADER,
    "parallelism_config": "tensor and context parallel models are not supported; use ZeRO-3 or FSDP2",
    "ignore_data_skip": "a run goes on in its data where it stopped; remove it",
    "enable_jit_checkpoint": "a run that is stopped goes on from its last checkpoint; set save_steps",
    "label_smoothing_factor": "the cross-entropy of the suffix has no smoothing; remove it",
    "label_names": "the loss reads its own batches; remove it",
    "average_tokens_across_devices": "the loss averages over rows of all processes; remove it",
    "include_num_input_tokens_seen": "tokens_per_second is logged; remove it",
    "auto_find_batch_size": "another batch has other negatives; set micro_batch_size, which bounds the memory instead",
    "torch_compile": "the cache grows from pass to pass, so that each would be compiled anew; remove it",
    "torch_compile_backend": "torch_compile is not available; remove it",
    "torch_compile_mode": "torch_compile is not available; remove it",
    "use_liger_kernel": "it knows no plume model; remove it",
    "liger_kernel_config": "it knows no plume model; remove it",
    "use_cache": "latent steps always use the key/value cache; remove it",
}


@dataclass(kw_only=True)
class PlumeTrainingArguments(TrainingArguments):
    """Settings of a training run. Unset ones are transformers' or the paper's."""

    model: str = ""
    """A plume checkpoint, or a stock Qwen-VL one, which then gets an adapter."""

    train_file: list[str] = field(default_factory=list)
    """Training rows: JSONL, JSON, parquet, a `datasets` folder or a Hub name; see train/README.md."""

    validation_file: list[str] = field(default_factory=list)
    """Held-out rows in the same formats; their loss is measured every `validate_every` steps."""

    instruction_dropout: float = 0.0
    """Probability that a row is trained without the instructions of its sides."""

    media_root: str | None = None
    """Folder that media paths are relative to; None is the folder of each file."""

    media_root_only: bool = False
    """Refuse rows whose media lie outside that folder; absolute paths, `..`, links that lead out of it."""

    num_cached_images: int = 0
    """Processed images to hold in memory, per data-loader worker."""

    overwrite: bool = False
    """Whether what another run, or a finished one, left in `output_dir` is replaced."""

    task_weights: dict | str | None = field(default_factory=dict)
    """How often a task is seen, relative to once per pass over the data; JSON on the command line."""

    mixing_temperature: float = 1.0
    """A task of n rows is seen in proportion to n^(1/T), T being this; larger values make tasks more alike."""

    plume_config: dict | str | None = field(default_factory=dict)
    """Fields of `PlumeConfig` for a model from a stock checkpoint; of a plume one those that say how latent inputs are
    made; JSON on the command line."""

    curriculum: Literal["paper", "published", "explicit", "direct"] = "paper"
    """Stages by name; `stage_ratios` and `stage_shares` override it."""

    stage_ratios: list[float] | None = None
    """Share of the rationale that is latent, for each stage."""

    stage_shares: list[float] | None = None
    """Share of the training steps of each stage; sums to 1."""

    num_segments: int = 8
    """S, segments that a rationale is cut into."""

    steps_per_segment: int = 1
    """c, latent steps that stand for one segment; the largest K is S c."""

    whole_sentences: bool = False
    """Whether a rationale of few sentences leaves the last segments empty; otherwise it is cut within sentences."""

    mix_earlier: float = 0.0
    """Probability that a row is trained at an earlier stage, each equally likely."""

    random_steps: bool = False
    """Whether batches of fully latent stages draw K from 1 to M; any K then works at inference."""

    target_steps: int | None = None
    """K of targets at most; 0 encodes them in a single pass, None as queries (TRACE)."""

    advance: Literal["schedule", "settled", "explicit_recall"] = "schedule"
    """When a stage ends: at its share of the steps; or before that once the validation loss has settled; or, for the
    explicit one, not before recall after the model's own written rationale is good enough, in an evaluation."""

    explicit_recall: float = 0.9
    """The `recall_at_1_explicit` of the evaluation that ends the explicit stage; with advance=explicit_recall."""

    settle_patience: int = 3
    """Validations in a row without improvement after which a stage counts as settled."""

    settle_tolerance: float = 0.01
    """What counts as an improvement of the validation loss, relative to its best value."""

    validate_every: int = 100
    """Steps between validations, where there is a `validation_file`."""

    optimizer_reset: Literal["none", "full"] = "none"
    """At a change of stage: keep the optimiser's state, or drop it; for AdamW what the published code does."""

    rewarmup_steps: int = 0
    """Steps over which the learning rate rises again after a change of stage."""

    needs_target: bool = True
    """Whether a row without a target is an error; false trains on rationales alone."""

    unclosed_answer: Literal["error", "accept"] = "error"
    """What to do with an `<answer>` that is never closed; the published data need "accept"."""

    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a bad row, or skip it and list it in `bad_rows.txt`."""

    last_state_predicts: Literal["latent_end", "next_word", "nothing"] = "latent_end"
    """`<eot>` (PLUME), the first word behind it, or nothing (Coconut)."""

    num_negatives: int = 0
    """Hard negatives per row; rows with more give their first ones, rows with fewer leave places empty."""

    mask_duplicates: bool = True
    """Whether rows with an equal target or query are no negatives of each other."""

    micro_batch_size: int | None = None
    """Rows of one pass of the model. Smaller than the batch, GradCache computes the same gradients in less memory."""

    micro_batch_tokens: int | None = None
    """Tokens of one pass at most, visual ones and padding included, without those that reconstruction says; rows of
    like length share it. For inputs of unlike length, where a number that fits long ones is too small for short."""

    contrastive_loss: Literal["info_nce", "sigmoid"] = "info_nce"
    """Softmax over candidates (paper), or every pair alone (SigLIP)."""

    false_negative_margin: float | None = None
    """Leaves out negatives that are nearer than the own pair by this; 0.1 for Qwen3-VL-Embedding."""

    duplicate_similarity: float | None = None
    """Cosine above which two queries, or targets, are no negatives (WeMM)."""

    hardness: float = 0.0
    """Times its cosine, added to a negative's logit: harder ones weigh more (LLaVE: 9)."""

    same_side_negatives: bool = False
    """Whether other queries are negatives of a query too, and other targets of a target."""

    temperature: float = 0.02
    """Contrastive logits are divided by it; with "sigmoid" the loss learns its own factor and bias instead."""

    learn_temperature: bool = False
    """Whether one temperature per contrastive term is learnt; from `temperature` on."""

    temperature_per_task: bool = False
    """Whether each task learns temperatures of its own (RzenEmbed); from `temperature` on."""

    max_labels: int = 0
    """Tasks of at most so many distinct targets are classification: queries are told apart from all of these, and not
    from what is in the batch (Qwen3-VL-Embedding)."""

    matryoshka_dims: list[int] = field(default_factory=list)
    """Lengths at which a cut embedding must work too; their loss has `matryoshka_weight`."""

    matryoshka_precisions: list[str] = field(default_factory=lambda: ["float32"])
    """Precisions at which it must, of float32, int8 and binary; the last two as in an index."""

    cross_entropy_weight: float = 1.0
    """Of the suffix cross-entropy of each side."""

    contrastive_weight: float = 1.0
    """Of InfoNCE on the embedding."""

    anchor_contrastive_weight: float = 1.0
    """Of InfoNCE on the anchor embedding."""

    balance_weight: float = 0.1
    """Of the router's balance."""

    matryoshka_weight: float = 0.0
    """Of InfoNCE on embeddings cut to `matryoshka_dims`."""

    per_step_weight: float = 0.0
    """Of InfoNCE after every latent step (GIRCSE)."""

    alignment_weight: float = 0.0
    """Of InfoNCE between the embedding of one side and the anchor embedding of the other."""

    uniformity_weight: float = 0.0
    """Of the log mean Gaussian potential between embeddings of a side."""

    distillation_weight: float = 0.0
    """Of the distance of states at `<gen_emb>`, latent from written (CODI)."""

    teacher_cross_entropy_weight: float = 1.0
    """Of the cross-entropy of the written reasoning that distillation learns from."""

    ranking_weight: float = 0.0
    """Of the divergence of in-batch rankings from a teacher's, written reasoning (LaSER: 10) or `teacher_vectors`."""

    ranking_temperature: float = 0.02
    """Similarities of both are divided by it."""

    teacher_vectors: str | None = None
    """Folder of `plume-train vectors` of a bigger embedder (WeMM); None: the model's own written reasoning."""

    reconstruct_weight: float = 0.0
    """Of the cross-entropy of text that is said from latent steps alone (SIM-CoT, BToks); one more pass per side."""

    reconstruct: Literal["rationale", "target"] = "rationale"
    """What they say: the sentences that they stand for, or the target's text."""

    reconstruct_sees: Literal["own_step", "up_to_step", "all"] = "own_step"
    """Which steps a sentence sees; those that stand for it, those and the earlier ones, or all."""

    train_vision: bool = False
    """Whether the vision tower learns too; the published training froze it."""

    train_merger: bool = True
    """Whether the layer between vision tower and language model learns; the published training let it."""

    base_dtype: Literal["float32", "bfloat16", "nf4"] = "float32"
    """Of the weights that are frozen, for example of the language model with LoRA; what learns is float32. "bfloat16"
    halves their memory and needs `bf16`."""

    lora_rank: int = 0
    """Rank of LoRA on the language model; 0 trains all its weights. Adapter and new token rows learn in full."""

    lora_alpha: int = 32
    """Scale of LoRA, divided by its rank."""

    lora_dropout: float = 0.0
    """Dropout before LoRA."""

    lora_targets: str = LORA_TARGETS
    """Regular expression of the layers that get LoRA; the default names the language model's."""

    evaluation: str = ""
    """What to call during training, "module:name"; called with `evaluation_arguments`, it returns the evaluation."""

    evaluation_arguments: dict | str | None = field(default_factory=dict)
    """Arguments of `evaluation`; JSON on the command line."""

    evaluate_every: int = 0
    """Steps between evaluations; 0 never."""

    def __post_init__(self):
        self._refuse_not_honoured()
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise SettingsError(" ".join(str(error).split())) from None
        for name in ("plume_config", "task_weights", "evaluation_arguments"):
            value = getattr(self, name)
            try:
                setattr(self, name, json.loads(value) if isinstance(value, str) else value or {})
            except json.JSONDecodeError as error:
                raise SettingsError(
                    f'{name} is {value!r:.80}, which is not JSON ({error}); expected an object such as {{"name": 1}}'
                ) from None
            if not isinstance(getattr(self, name), dict):
                raise SettingsError(f'{name} is {value!r:.80}; expected an object such as {{"name": 1}}')
        for name in ("train_file", "validation_file"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        if isinstance(self.resume_from_checkpoint, bool):  # how YAML reads yes and no
            self.resume_from_checkpoint = "auto" if self.resume_from_checkpoint else "no"
        self.logging_nan_inf_filter = False  # a loss that is no number stops the run; see trainer.py
        if (self.stage_ratios is None) != (self.stage_shares is None):
            raise SettingsError("stage_ratios and stage_shares go together; set both or neither")
        if self.stage_ratios and self.stage_shares and len(self.stage_ratios) != len(self.stage_shares):
            raise SettingsError(
                f"stage_ratios has {len(self.stage_ratios)} entries and stage_shares {len(self.stage_shares)}; "
                "expected one each per stage"
            )
        for name, hint in get_type_hints(PlumeTrainingArguments).items():
            if name not in PlumeTrainingArguments.__annotations__:
                continue
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                listed = ", ".join(map(repr, get_args(hint)))
                raise SettingsError(f"{name} must be one of {listed}; received {value!r}")
            if hint in (int, float) and not isinstance(value, (int, float)):
                raise SettingsError(f"{name} must be a number; received {value!r}")

    def _refuse_not_honoured(self) -> None:
        for setting in fields(TrainingArguments):
            if setting.name not in NOT_HONOURED:
                continue
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            value = getattr(self, setting.name)
            if value != default and not (default == "no" and value is False):  # how YAML and flags read no
                raise SettingsError(f"{setting.name}={value!r} is not available here: {NOT_HONOURED[setting.name]}")
        if self.save_strategy == "best":
            raise SettingsError(f"save_strategy='best' is not available here: {_BEST}")

    @property
    def output_folder(self) -> Path:
        """`output_dir`, which is always set."""
        return Path(self.output_dir or "trainer_output")

    @property
    def shows_bars(self) -> bool:
        """Whether progress bars are drawn: by one process, in a terminal."""
        return self.should_save and not self.disable_tqdm and is_watched()

    def tell(self, text: str) -> None:
        """Say something of the run, once for all processes."""
        if self.should_save:
            tqdm.write(printable(text), file=sys.stderr)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term by its name."""
        ending = "_weight"
        return {
            setting.name.removesuffix(ending): getattr(self, setting.name)
            for setting in fields(self)
            if setting.name.endswith(ending)
        }

    def check(self) -> None:
        """Refuse settings that contradict each other, before anything is loaded.

        Raises:
            SettingsError: names the settings and what to change.
        """
        for name in ("model", "train_file"):
            if not getattr(self, name):
                raise SettingsError(f"{name} is not set; give it in the YAML file or as --{name}")
        if not self.output_dir:
            raise SettingsError("output_dir is empty; name a folder")
        try:
            check_place(self.model)
        except ValueError as error:
            raise SettingsError(f"model: {error}") from None
        if Path(self.model).resolve() == self.output_folder.resolve():
            raise SettingsError(f"output_dir and model are both {self.model}; choose another output_dir")
        self._check_reports()
        if self.evaluation and not self.evaluate_every:
            raise SettingsError(f"evaluation={self.evaluation!r} would never be called; set evaluate_every")
        if self.advance == "settled" and not self.validation_file:
            raise SettingsError(
                "advance=settled needs a validation_file, whose loss decides; set one or advance=schedule"
            )
        if self.reconstruct_weight and self.reconstruct == "target" and self.reconstruct_sees != "all":
            raise SettingsError(
                f"reconstruct=target is one text, for which no step stands; set reconstruct_sees=all instead of "
                f"{self.reconstruct_sees}"
            )
        if bool(self.matryoshka_dims) != bool(self.matryoshka_weight):
            raise SettingsError("matryoshka_dims and matryoshka_weight go together; set both or neither")
        known = get_args(Precision)
        if unknown := [name for name in self.matryoshka_precisions or [""] if name not in known]:
            raise SettingsError(f"matryoshka_precisions holds {unknown[0]!r}; expected some of {', '.join(known)}")
        if self.max_labels < 0:
            raise SettingsError(f"max_labels is {self.max_labels}; expected 0 or more")
        rules = ("false_negative_margin", "duplicate_similarity", "hardness", "same_side_negatives")
        for name in rules if self.contrastive_loss == "sigmoid" else ():
            if getattr(self, name) not in (None, 0, False):
                raise SettingsError(f"{name} belongs to contrastive_loss=info_nce; received sigmoid; drop one of them")
        bounds = {"false_negative_margin": 2, "duplicate_similarity": 1, "hardness": None, "instruction_dropout": 1}
        for name, most in bounds.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= (value if most is None else most):
                bound = "at least 0" if most is None else f"0 to {most}"
                raise SettingsError(f"{name} is {value}; expected {bound}")
        for name, least in (
            ("temperature", 1e-6),
            ("mixing_temperature", 1e-3),
            ("ranking_temperature", 1e-6),
            ("validate_every", 1),
        ):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be positive; received {getattr(self, name)}")
        weights = self.task_weights or {}
        if bad := [task for task, weight in weights.items() if weight < 0]:  # type: ignore[union-attr]
            raise SettingsError(f"task_weights of {bad[0]!r} is negative; expected 0 or more")
        if self.base_dtype != "float32" and not self.bf16:
            raise SettingsError(f"base_dtype={self.base_dtype} needs bf16=true, under which what learns stays float32")
        if self.target_steps is not None and self.target_steps < 0:
            raise SettingsError(f"target_steps is {self.target_steps}; expected 0 or more")
        for name in ("micro_batch_size", "micro_batch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1; received {value}")
        is_cut = self.micro_batch_size or self.micro_batch_tokens
        if self.deepspeed_plugin is not None and is_cut and self.gradient_accumulation_steps > 1:
            raise SettingsError(
                "gradient_accumulation_steps and micro_batch_size or micro_batch_tokens do not work together with "
                "DeepSpeed; raise per_device_train_batch_size instead: GradCache makes it cheap, and it adds negatives"
            )

    def check_data(self) -> None:
        """Refuse data that is not there, or that the run would replace, before any row is read.

        Raises:
            SettingsError: names the setting and what there is.
        """
        for name in ("train_file", "validation_file"):
            for place in getattr(self, name) or []:
                try:
                    check_source(place)
                except OSError as error:
                    raise SettingsError(f"{name}: {error}") from None
        if self.overwrite:
            needed = [self.model, *(self.train_file or []), *(self.validation_file or [])]
            if lost := [place for place in needed if self.output_folder.resolve() in Path(place).resolve().parents]:
                raise SettingsError(
                    f"{lost[0]} lies in output_dir, which overwrite=true would replace; choose another output_dir"
                )

    def _check_reports(self) -> None:
        """Trackers are otherwise asked for once the model is loaded."""
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to or []:
            if name in ("none", "all"):
                continue
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
                remedy = did_you_mean(name, INTEGRATION_TO_CALLBACK, f"known are {known}")
                raise SettingsError(f"report_to is {name!r}; {remedy}")
            if name not in get_available_reporting_integrations():
                raise SettingsError(f"report_to is {name!r}, which needs the package {name}; pip install {name}")

    def without_effect(self, records: Records) -> list[str]:
        """Settings that change nothing, each with the reason.

        Args:
            records: the data.
        """
        has_negatives = records.has_negatives
        curriculum = self.build_curriculum()
        steps = [curriculum.num_latent_steps(stage) for stage in curriculum.stages]
        is_latent = any(count and stage.ratio == 1 for count, stage in zip(steps, curriculum.stages, strict=True))
        reasons = [
            (
                "learn_temperature",
                self.learn_temperature and self.contrastive_loss == "sigmoid",
                "the sigmoid loss learns",
            ),
            ("random_steps", self.random_steps and not is_latent, "no stage is fully latent"),
            ("per_step_weight", self.per_step_weight and not any(steps), "no stage has latent steps"),
            ("distillation_weight", self.distillation_weight and not any(steps), "no stage has latent steps"),
            (
                "ranking_weight",
                self.ranking_weight and not self.teacher_vectors and not any(steps),
                "no stage has latent steps",
            ),
            ("teacher_vectors", self.teacher_vectors and not self.ranking_weight, "ranking_weight is 0"),
            ("reconstruct_weight", self.reconstruct_weight and not any(steps), "no stage has latent steps"),
            ("optimizer_reset", self.optimizer_reset != "none" and len(steps) == 1, "there is one stage"),
            ("rewarmup_steps", self.rewarmup_steps and len(steps) == 1, "there is one stage"),
            (
                "max_labels",
                self.max_labels and not records.labels,
                f"every task has more than {self.max_labels} targets",
            ),
            (
                "matryoshka_precisions",
                self.matryoshka_precisions != ["float32"] and not self.matryoshka_dims,
                "matryoshka_dims is empty",
            ),
            ("temperature_per_task", self.temperature_per_task and len(set(records.tasks)) == 1, "there is one task"),
            ("num_negatives", self.num_negatives and not has_negatives, "no row has hard negatives"),
            ("negatives of the data", has_negatives and not self.num_negatives, "num_negatives is 0"),
            (
                "instruction_dropout",
                self.instruction_dropout and not records.has_instructions,
                "no row has an instruction",
            ),
            ("lora_dropout", self.lora_dropout and not self.lora_rank, "lora_rank is 0"),
        ]
        told = [f"{name}: without effect, since {why}" for name, applies, why in reasons if applies]
        told += [f"stage_ratios: {lost}" for lost in curriculum.collapsed(self.max_steps)] if self.max_steps > 0 else []
        return told + self._repeating(records) + self._without_contrast(records)

    def _repeating(self, records: Records) -> list[str]:
        """Tasks whose batches show rows more than once, which are no negatives of themselves."""
        size = self.per_device_train_batch_size * self.world_size
        weights: Any = self.task_weights or {}
        small = {task: count for task, count in Counter(records.tasks).items() if count < size and weights.get(task, 1)}
        return [
            f"per_device_train_batch_size: a batch has {size} places, and the task {task!r} {count} rows, which are "
            f"shown more than once in it; lower it to {max(count // self.world_size, 1)} or fewer"
            for task, count in sorted(small.items())
        ]

    def _without_contrast(self, records: Records) -> list[str]:
        """Batches that cannot hold a negative, so that nothing in them is told apart."""
        is_used = self.contrastive_loss == "info_nce" and (self.contrastive_weight or self.anchor_contrastive_weight)
        if not is_used or (self.num_negatives and records.has_negatives):
            return []
        name = "contrastive_weight, anchor_contrastive_weight"
        if self.per_device_train_batch_size * self.world_size == 1:
            return [
                f"{name}: without effect, since a batch holds one pair, which has no negative; raise "
                "per_device_train_batch_size (micro_batch_size bounds the memory), or use hard negatives"
            ]
        if not self.mask_duplicates:
            return []
        return [
            f"{name}: without effect on the task {task!r}, since all its {side} are equal, and equal ones are no "
            "negatives of each other; give its rows another task's name, hard negatives, or mask_duplicates=false"
            for task, side in records.uniform_tasks()
        ]

    def build_curriculum(self) -> Curriculum:
        """The curriculum of these settings; the answer is dropped in the last stage that is fully latent."""
        stages = PRESETS[self.curriculum]
        if self.stage_ratios and self.stage_shares:
            last = len(self.stage_ratios) - 1
            stages = tuple(
                Stage(ratio=ratio, share=share, drop_answer=index == last and ratio == 1)
                for index, (ratio, share) in enumerate(zip(self.stage_ratios, self.stage_shares, strict=True))
            )
        try:
            return Curriculum(
                stages=stages,
                num_segments=self.num_segments,
                steps_per_segment=self.steps_per_segment,
                whole_sentences=self.whole_sentences,
                mix_earlier=self.mix_earlier,
                random_steps=self.random_steps,
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None


# Where our trainer needs something else than transformers' default.
_DEFAULTS: dict[str, Any] = {
    "remove_unused_columns": False,
    "report_to": "none",
    "save_total_limit": 2,
    "resume_from_checkpoint": "auto",
    "disable_tqdm": False,  # transformers' is whether its own notes are silenced
    "logging_steps": 10,
    "logging_first_step": True,
    "ddp_find_unused_parameters": False,  # every pass touches every part
}


def parse_arguments(argv: Sequence[str], **overrides: Any) -> PlumeTrainingArguments:
    """Read `--config FILE` and flags; flags win.

    Args:
        argv: the command line without the program's name.
        overrides: settings that win over both.

    Raises:
        SettingsError: an unknown key or flag, named with the nearest known one, or a value that a setting cannot have.
    """
    return arguments_of(vars(settings_parser().parse_args(argv)), **overrides)


def arguments_of(flags: Mapping[str, Any], **overrides: Any) -> PlumeTrainingArguments:
    """Settings from parsed flags, one of which may be `config`, a YAML file; see `parse_arguments`."""
    settings = {**_DEFAULTS, **(read_yaml(flags["config"]) if "config" in flags else {}), **flags, **overrides}
    settings.pop("config", None)
    return PlumeTrainingArguments(**settings)


class SettingsParser(HfArgumentParser, Parser):
    """A flag for every setting; what is wrong with them is a `SettingsError`."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))


def settings_parser(program: str = "plume-train") -> SettingsParser:
    """Parses flags into the settings that were given, and no others."""
    parser = SettingsParser(PlumeTrainingArguments, prog=program)  # type: ignore[arg-type]
    parser.add_argument("--config", help="YAML file with any of the settings below, or a name: demo, lora, paper")
    for action in parser._actions:
        if action.dest != "help":
            action.default = argparse.SUPPRESS
    return parser


def arguments_from(config: str | Path, **overrides: Any) -> PlumeTrainingArguments:
    """The settings of a YAML file with some replaced, for use from Python."""
    return PlumeTrainingArguments(**{**_DEFAULTS, **read_yaml(config), **overrides})


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The keys of a YAML file, or of one that comes with plume; `extends: FILE` takes those of a file beside it first.

    Raises:
        SettingsError: names file, key and the nearest known key.
    """
    try:
        file = find_config("train", file)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingsError(f"{file} cannot be read ({error.strerror}); expected a YAML file of settings") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise SettingsError(f"{file} holds a {type(settings).__name__}; expected lines such as learning_rate: 1.0e-4")
    if (base := settings.pop("extends", None)) is not None:
        settings = {**read_yaml(file.parent / base), **settings}
    known = {field.name for field in fields(PlumeTrainingArguments)}
    for key, value in settings.items():
        if key not in known:
            remedy = did_you_mean(key, known, "`plume-train --help` lists the settings")
            raise SettingsError(f"{file}: unknown key {key!r}; {remedy}")
        try:
            settings[key] = _as_a_flag(_flags()[key], value)
        except SettingsError as error:
            raise SettingsError(f"{file}: {error}") from None
    return settings


@cache
def _flags() -> dict[str, argparse.Action]:
    return {action.dest: action for action in settings_parser()._actions}


def _as_a_flag(flag: argparse.Action, value: Any) -> Any:
    """A value of a YAML file as the command line would read it: there 1e-4 is a number, and `no` in quotes is false.

    Raises:
        SettingsError: it is none of the flag's type.
    """
    if isinstance(value, list):
        return [_as_a_flag(flag, part) for part in value]
    if value is None or isinstance(value, Mapping) or flag.type in (None, str) or not callable(flag.type):
        return value
    try:
        typed = flag.type(str(value))
        if flag.choices is None or typed in flag.choices:
            return typed
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        pass
    kind = {int: "a whole number", float: "a number"}.get(flag.type, "true or false")  # type: ignore[call-overload]
    expected = f"one of {', '.join(map(repr, flag.choices))}" if flag.choices else kind
    raise SettingsError(f"{flag.dest} must be {expected}; received {value!r}")
