"""One training run, from settings to a saved checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from plume.config import PlumeConfig
from plume.model import PlumeModel
from plume_train.collate import StagedRecords
from plume_train.config import PlumeTrainingArguments
from plume_train.records import RecordFormat, Records
from plume_train.trainer import Evaluate, PlumeTrainer


def train(args: PlumeTrainingArguments, evaluate: Evaluate | None = None) -> PlumeModel:
    """Train, and save the model in `args.output_dir`.

    A run that was interrupted goes on from its last checkpoint when started again with `resume_from_checkpoint=auto`.

    Args:
        args: the settings.
        evaluate: called every `args.evaluate_every` steps.

    Returns:
        The trained model; its `num_latent_steps` is that of the last stage.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which cannot share out a batch of images; start one "
            "process per GPU with `accelerate launch -m plume_train ...`, or set CUDA_VISIBLE_DEVICES to one"
        )
    set_seed(args.seed)
    records = load_records(args)
    curriculum = args.build_curriculum()
    model = load_model(args)
    for stage in curriculum.stages:
        model.config.check_num_latent_steps(curriculum.num_latent_steps(stage))
    model.config.num_latent_steps = curriculum.num_latent_steps(curriculum.stages[-1])
    model.backbone.visual.requires_grad_(args.train_vision)
    if args.max_steps < 0:
        rows_per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        args.max_steps = math.ceil(args.num_train_epochs * len(records) / rows_per_step)

    trainer = PlumeTrainer(model, args, StagedRecords(records), curriculum, evaluate)
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if resume == "auto" else resume)
    trainer.save_model(args.output_dir)
    return model.eval()


def load_records(args: PlumeTrainingArguments) -> Records:
    """The rows of a run; bad ones that are skipped are listed in `bad_rows.txt`."""
    file = Path(args.train_file)
    records = Records(
        file,
        row_format=RecordFormat(
            media_root=Path(args.media_root) if args.media_root else file.parent,
            needs_target=args.needs_target,
            unclosed_answer=args.unclosed_answer,
        ),
        on_bad_row=args.on_bad_row,
        show_progress=not args.disable_tqdm,
    )
    if records.bad_rows:
        report = args.output_folder / "bad_rows.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("\n".join(records.bad_rows) + "\n", encoding="utf-8")
    return records


def load_model(args: PlumeTrainingArguments) -> PlumeModel:
    """A plume checkpoint as it is, or a stock one with a new adapter.

    Raises:
        ValueError: `plume_config` contradicts the plume checkpoint it starts from.
    """
    assert isinstance(args.plume_config, dict)
    found, _ = PlumeConfig.get_config_dict(args.model)
    if found.get("model_type") != PlumeConfig.model_type:
        return PlumeModel.from_backbone(args.model, dtype="float32", **args.plume_config)
    model = PlumeModel.from_pretrained(args.model, dtype="float32")
    for name, value in args.plume_config.items():
        if (saved := getattr(model.config, name, None)) != value:
            raise ValueError(
                f"plume_config.{name}={value!r}, but the checkpoint {args.model} was made with {saved!r}; remove it "
                "from plume_config, or start from a stock backbone"
            )
    return model
