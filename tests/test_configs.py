"""Every YAML file loads, and states only what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from plume import PlumeConfig
from plume_train.config import arguments_from, read_yaml

TRAIN = sorted((Path(__file__).parent.parent / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize("file", TRAIN, ids=lambda file: file.stem)
def test_a_training_configuration_loads(file):
    given = read_yaml(file)
    if "model" not in given:
        return  # a base of others
    args = arguments_from(file)
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
