"""Settings of a training run of toy size."""

from __future__ import annotations

import json

from plume.random_models import SHORT_STRINGS
from plume_train.config import arguments_from


def settings(tmp_path, start, hops_folder, **changes):
    (tmp_path / "run.yaml").write_text("num_segments: 2\nlogging_steps: 1\n")
    given = {
        "model": str(start),
        "plume_config": {**SHORT_STRINGS, "expert_dropout": 0.0},
        "train_file": str(hops_folder / "train.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "stage_ratios": [0.0, 0.5, 1.0],
        "stage_shares": [0.4, 0.3, 0.3],
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 10,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return arguments_from(tmp_path / "run.yaml", **{**given, **changes})


def stopped_before_its_end(folder):
    """Let a finished run count as one that was stopped while it saved its model."""
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": False}))
