"""The measurement of `encode` against the bare forward pass runs and says what it measured."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from plume_eval.__main__ import app


def test_the_overhead_is_measured_and_written(plume_folder, hops_folder, tmp_path):
    arguments = ["--batch-size", "2", "--num-batches", "3", "--num-runs", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["overhead", "--model", str(plume_folder), "--data", str(hops_folder), *arguments])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("*.json")
    saved = json.loads(file.read_text())
    assert saved["results"].keys() == {"text", "page", "page and text"}
    for one in saved["results"].values():
        assert one["overhead"] == pytest.approx(one["encode_ms"] / one["forward_ms"] - 1)
        assert one["prepare_ms"] > 0
    assert "plume-eval overhead" in saved["command"]


def test_too_few_queries_are_refused(plume_folder, hops_folder):
    result = CliRunner().invoke(app, ["overhead", "--model", str(plume_folder), "--data", str(hops_folder)])
    assert result.exit_code == 1
    assert "has 6 queries; 8 batches need 256" in result.output
