"""Every YAML file loads, and states only what differs."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from plume import PlumeConfig
from plume_eval.speed.config import LatencyConfig, read_config
from plume_train.config import arguments_from, read_yaml
from tests.processes import run

CONFIGS = Path(__file__).parent.parent / "configs"
TRAIN = sorted((CONFIGS / "train").rglob("*.yaml"))
EVAL = sorted((CONFIGS / "eval").glob("*.yaml"))
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", TRAIN, ids=lambda file: file.stem)
def test_a_training_configuration_loads(file):
    given = read_yaml(file)
    if "model" not in given:
        return  # a base of others
    args = arguments_from(file, use_cpu=True)
    PlumeConfig.check_field_names(list(args.plume_config))
    PlumeConfig(**args.plume_config)
    curriculum = args.build_curriculum()
    assert sum(stage.share for stage in curriculum.stages) == pytest.approx(1)


@pytest.mark.parametrize("file", TRAIN, ids=lambda file: file.stem)
def test_a_training_configuration_states_only_what_differs(file):
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "extends" in own:
        base = read_yaml(file.parent / own.pop("extends"))
        repeated = [key for key, value in own.items() if key in base and base[key] == value]
        assert not repeated


@pytest.mark.parametrize("file", EVAL, ids=lambda file: file.stem)
def test_a_latency_configuration_loads_and_states_only_what_differs(file):
    config = read_config(file)
    defaults = {one.name: one.default for one in fields(LatencyConfig)}
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert not [name for name in own if getattr(config, name) == defaults[name]]
    assert config.main_steps in (0, *config.num_latent_steps)


def test_the_papers_recipe_is_the_papers():
    args = arguments_from(CONFIGS / "train" / "paper.yaml", use_cpu=True, train_file="pairs.jsonl")
    args.check()
    curriculum = args.build_curriculum()
    assert args.per_device_train_batch_size * 8 == 1024
    assert (args.num_train_epochs, args.learning_rate, args.temperature) == (5, 5e-5, 0.02)
    assert [curriculum.num_latent_steps(stage) for stage in curriculum.stages] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.stem)
def test_an_accelerate_configuration_loads(file):
    config = load_config_from_file(str(file))
    stage = (getattr(config, "deepspeed_config", None) or {}).get("zero_stage")
    assert file.stem in ("single", "ddp", "fsdp2", f"zero{stage}")
    assert (getattr(config, "fsdp_config", None) or {}).get("fsdp_activation_checkpointing", False) is False


def test_an_installed_package_has_the_configurations_by_name(tmp_path):
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    assert run([*wheel, CONFIGS.parent]).returncode == 0
    with ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from plume.configurations import find_config\n"
        "from importlib.util import find_spec\n"
        "from plume_train.config import read_yaml\n"
        "demo = find_spec('plume_demo').origin\n"
        "print(find_config('accelerate', 'ddp'), demo, read_yaml('demo')['learning_rate'], sep='\\n')"
    )
    packages = [place for place in sys.path if place.endswith("-packages")]  # whose path files are not read again
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}
    done = run([sys.executable, "-S", "-c", code, tmp_path / "site"], cwd=tmp_path, env=environment)
    ddp, demo, rate = done.stdout.splitlines()
    assert Path(ddp) == tmp_path / "site" / "plume" / "_configs" / "accelerate" / "ddp.yaml"
    assert Path(demo) == tmp_path / "site" / "plume_demo.py"
    assert float(rate) == arguments_from("demo", use_cpu=True, train_file="x").learning_rate  # of its `extends`
