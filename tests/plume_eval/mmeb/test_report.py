"""Means, comparisons and costs of results; what was printed against the tasks it lists."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from plume_eval.mmeb.report import System, audit, compare, cost, write_files, write_text
from plume_eval.mmeb.tasks import all_tasks, means, published


def system(name: str, chance: float, seed: int, *, num_queries: int = 40, leave_out: tuple[str, ...] = ()) -> System:
    rng, results = random.Random(seed), {}
    for task in all_tasks():
        values = [float(rng.random() < chance) for _ in range(num_queries)]
        results[task.name] = {
            "score": sum(values) / num_queries,
            "is_complete": task.name not in leave_out,
            "problems": ["3 queries; expected 40"] if task.name in leave_out else [],
            "per_query": {"rows": list(range(num_queries)), "values": values},
            "cost": {"query": {"num_inputs": 10, "reasoning_steps": 4.0, "seconds": 0.5}},
        }
    return System(name, results)


def test_published_aggregates_come_from_the_listed_tasks_where_they_do():
    (plume,) = [one for one in published() if one.system == "PLUME-2B"]
    found = means(plume.tasks)
    assert (plume.means["image"], plume.means["video"], plume.means["visdoc"], plume.means["all"]) == (
        66.3,
        44.1,
        67.5,
        61.6,
    )
    assert found["all"] == pytest.approx((36 * found["image"] + 18 * found["video"] + 24 * found["visdoc"]) / 78)
    assert found["all"] == pytest.approx(61.45, abs=0.005)  # printed as 61.6
    table = audit()
    assert "| PLUME-2B | all | 61.6 | 61.45 |" in table
    assert "| PLUME-2B | video |" not in table  # 44.1, which it is
    assert "| VLM2Vec-V2-2B | OOD | 39.4 | 43.95 |" in table
    assert not any("UME-R1-2B | all" in line for line in table.splitlines())


def test_a_mean_with_a_missing_task_is_not_given():
    whole, part = system("a", 0.5, 0), system("b", 0.5, 1, leave_out=("GQA",))
    assert set(means(whole.scores)) >= {"I-QA", "image", "all", "V-QA"}
    assert {"I-QA", "image", "all"}.isdisjoint(means(part.scores))
    assert "V-QA" in means(part.scores)
    text, _ = write_text([whole, part])
    assert "| b | GQA | 3 queries; expected 40 |" in text


def test_a_better_system_wins_and_an_equal_one_does_not():
    good, bad = system("good", 0.9, 0), system("bad", 0.2, 1)
    found = compare(good, bad)
    assert len(found.wins) == 78
    assert found.losses == []
    assert found.mean.low < found.mean.mean < found.mean.high
    assert found.mean.mean == pytest.approx(np.mean(list(good.scores.values())) - np.mean(list(bad.scores.values())))
    same = compare(good, good)
    assert (same.wins, same.losses, same.mean.low, same.mean.high) == ([], [], 0, 0)
    with pytest.raises(ValueError, match="no complete task in common"):
        compare(good, System("none", {}))


def test_costs_are_means_over_inputs():
    assert cost(system("a", 0.5, 0)) == {
        "num_inputs": 780,
        "ms_per_input": pytest.approx(50),
        "steps_per_input": pytest.approx(4),
    }
    assert cost(System("none", {})) == {}


def test_a_report_is_written_with_its_picture(tmp_path):
    one = system("latent", 0.6, 0)
    for name, result in one.results.items():
        (tmp_path / "latent").mkdir(exist_ok=True)
        (tmp_path / "latent" / f"{name}.json").write_text(json.dumps(result))
    path = write_files([System.read(tmp_path / "latent"), system("single", 0.5, 1)], tmp_path, "the command")
    text = path.with_suffix(".md").read_text()
    assert "## latent less single" in text
    assert path.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match="holds no results"):
        System.read(Path(tmp_path))
