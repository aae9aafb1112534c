"""Joins the results of the hops grid: tables by family, system and number of hops, and what they say of the paper.

Comparisons are paired, seed by seed. Intervals are 95 %, Student's over seeds; with fewer than three seeds they are
over questions alone, and no claim gets a verdict. They are not corrected for the number of comparisons.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from plume_eval.hops.run import hops_columns
from plume_eval.metrics import Estimate, bootstrap
from plume_eval.report import markdown_table

RESULT = "hops.json"
#: The systems that the pictures compare, and that `plume-hops` trains unless it is told others.
MAIN = ("explicit", "explicit_long", "latent", "parallel", "refined_1", "no_latents", "single_pass")
_NUM_RESAMPLES = 2000
_STARTS = ("named", "shown")
#: Seeds that a verdict needs.
MIN_SEEDS = 3


@dataclass(frozen=True)
class Claim:
    """Something that the paper says, as a comparison of two systems of the grid.

    text: with the paper's figures (MMEB-V2, mean of 78 tasks). better, worse: systems. margin: how much worse `better`
    may be for the claim to hold; 0 asks that it is better.
    """

    text: str
    better: str
    worse: str
    margin: float = 0.0


#: arXiv 2604.02073, tables 1 to 6; section, figures and readings as in its text.
CLAIMS = (
    Claim(
        "latent steps are as good as written reasoning (61.6 against UME-R1's 60.1)", "latent", "explicit_long", 0.02
    ),
    Claim("latent steps beat a single pass (61.6 against VLM2Vec-V2's 58.0)", "latent", "single_pass"),
    Claim("the latent transition matters (61.6, without 58.8)", "latent", "no_latents"),
    Claim("the curriculum matters (61.6, from stage 0 to the last at once 54.8)", "latent", "stages_1"),
    Claim("experts beat a single MLP (61.6, 59.2)", "latent", "adapter_mlp"),
    Claim("the router needs the anchor (61.6, 60.1)", "latent", "no_anchor"),
    Claim("the router needs the step embedding (61.6, 60.4)", "latent", "no_step_embedding"),
    Claim("the shared expert matters (61.6, 60.3)", "latent", "no_shared_expert"),
    Claim("two experts per step beat one (61.6, 60.8)", "latent", "top_1"),
    Claim("more stages beat two (61.6 with four, 59.0)", "latent", "stages_2"),
    Claim("more steps beat fewer (61.6 with K = 8, 59.9 with K = 4)", "latent", "steps_4"),
)
#: Comparisons that are ours, not the paper's.
QUESTIONS = (
    Claim("sequential latents beat constant ones, read in one pass", "latent", "parallel"),
    Claim("sequential latents beat one refinement", "latent", "refined_1"),
    Claim("one refinement beats one pass", "refined_1", "parallel"),
    Claim("the adapter matters (against none, Coconut)", "latent", "adapter_identity"),
    Claim("latent steps beat a single pass of equal training compute", "latent", "single_pass_compute"),
    Claim("targets may do without latent steps (TRACE)", "target_single_pass", "latent", 0.02),
    Claim("weights on harder negatives help (LLaVE)", "hardness", "latent"),
    Claim("a margin against false negatives helps (Qwen3-VL-Embedding)", "false_negatives", "latent"),
    Claim("negatives of the same side help", "same_side", "latent"),
    Claim("mined negatives help", "mined", "latent"),
    Claim("learning ranks from written reasoning helps (LaSER)", "rank_written", "latent"),
)
NOT_TESTABLE = (
    "MMEB-V2 scores (61.6 over 78 tasks): its data and a model of 2B parameters are not here",
    "298 ms per sample and 30 times faster than writing on an H20: latency is measured by `plume-eval latency`",
    "experts specialise by modality and task: every model here is trained on one family",
)

#: Published accuracies in per cent, of models trained for a task alone unless it says otherwise: LSTM (arXiv
#: 1502.05698), MemN2N (three hops, from the README of a reimplementation of arXiv 1503.08895), Universal Transformers
#: (arXiv 1807.03819, mean of runs), GPT-2 and Coconut (arXiv 2412.06769).
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "babi": {
        "LSTM, 1k": {"task 2": 20, "task 3": 20, "task 15": 21, "task 16": 23},
        "MemN2N, 1k": {"task 2": 83, "task 3": 54, "task 15": 100, "task 16": 44},
        "Universal Transformer, 10k, joint": {"task 2": 98.3, "task 3": 95.4, "task 15": 98.4, "task 16": 99.1},
    },
    "prosqa": {"GPT-2, written steps": {"graph": 77.5}, "Coconut": {"graph": 97.0}},
}

Runs = dict[str, dict[int, dict[str, Any]]]
"""Results by system and seed."""


def read_results(folder: Path) -> dict[str, Runs]:
    """All results below a folder, by family, system and seed.

    Raises:
        FileNotFoundError: there is none.
    """
    found: dict[str, Runs] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.rglob(RESULT)):
        result = json.loads(file.read_text(encoding="utf-8"))
        found[result["family"]][result["system"]][result["seed"]] = result
    if not found:
        raise FileNotFoundError(f"{folder} holds no {RESULT}; run `plume-hops --out {folder}` first")
    return {family: dict(runs) for family, runs in found.items()}


def rights(runs: dict[int, dict[str, Any]], pick: Callable[[dict[str, Any]], dict[str, Any]]) -> np.ndarray:
    """Which questions are answered rightly, `[seeds, Q]`; targets by name."""
    return np.array([[float(digit) for digit in pick(runs[seed])["right"]["name"]] for seed in sorted(runs)])


def estimate(values: np.ndarray) -> Estimate:
    """Mean of `[seeds, Q]` and its interval: Student's over the seeds' means, or over questions with one or two seeds.

    Two seeds say hardly anything of the spread between seeds, and one says nothing.
    """
    if len(values) < MIN_SEEDS:
        return bootstrap(values.mean(axis=0), _NUM_RESAMPLES)
    means = values.mean(axis=1)
    half = float(student.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return Estimate(float(means.mean()), float(means.mean()) - half, float(means.mean()) + half)


def family_table(runs: Runs, num_hops: np.ndarray) -> tuple[str, dict[str, dict[str, dict]]]:
    """A family's systems by number of hops as Markdown, and the same as numbers.

    Args:
        runs: of the family.
        num_hops: of each test question, `[Q]`.
    """
    counts = np.unique(num_hops)
    rows, numbers = [], {}
    for system, of_system in runs.items():
        right = rights(of_system, lambda one: one["result"])
        by_hops = {str(count): estimate(right[:, num_hops == count]) for count in counts}
        numbers[system] = {count: asdict(value) for count, value in by_hops.items()}
        numbers[system]["all"] = asdict(estimate(right))
        first = next(iter(of_system.values()))
        zero = ""
        if "at_zero" in first:
            zero = f"{rights(of_system, lambda one: one['at_zero']['result']).mean():.3f}"
        controls = [one["control"]["recall_at_1"]["mean"] for one in of_system.values() if one["control"]]
        minutes = np.mean([one["minutes"] for one in of_system.values()])
        cells = [_cell(value) for value in by_hops.values()]
        starts = [one["result"]["by_start"]["name"] for one in of_system.values()]
        by_start = [
            np.mean([one[start]["mean"] for one in starts]) if start in starts[0] else None for start in _STARTS
        ]
        steps = first["num_latent_steps"] if first["mode"] == "latent" else ""
        last = [
            _cell(estimate(right)),
            *("" if one is None else f"{one:.2f}" for one in by_start),
            zero,
            f"{np.mean(controls):.3f}" if controls else "",
            f"{minutes:.0f}",
        ]
        rows.append([system, len(of_system), steps, *cells, *last])
    rule = next(iter(next(iter(runs.values())).values()))["result"]["best_rule"]
    shown = [f"{rule['by_hops'][str(count)]['recall_at_1']:.2f}" for count in counts]
    rows.append([f"best rule ({rule['rule']})", "", "", *shown, f"{rule['recall_at_1']:.2f}", *[""] * 5])
    columns = [
        "system",
        "seeds",
        "K",
        *hops_columns(counts),
        "all",
        "start named",
        "start shown",
        "same model at K = 0",
    ]
    return markdown_table([*columns, "control", "minutes"], rows), numbers


def public_table(family: str, runs: Runs) -> str:
    """Accuracy of each task of a public set, among the answers that its questions offer, beside published figures."""
    published = PUBLISHED[family]
    first = next(iter(next(iter(runs.values())).values()))["result"]["of_choices"]["name"]
    names = sorted((name for name in first if name != "all"), key=lambda name: (len(name), name))
    rows = []
    for name in names:
        ours = [
            np.mean([one["result"]["of_choices"]["name"][name]["mean"] for one in of_system.values()])
            for of_system in runs.values()
        ]
        theirs = [f"{of_system[name]:g}" if name in of_system else "" for of_system in published.values()]
        rows.append([name, *(f"{100 * value:.1f}" for value in ours), *theirs])
    columns = ["accuracy, per cent", *runs, *(f"{name} (published)" for name in published)]
    return markdown_table(columns, rows)


def _cell(value: Estimate) -> str:
    return f"{value.mean:.2f} [{max(value.low, 0):.2f}, {min(value.high, 1):.2f}]"  # a recall is no more than 1


def judge(claim: Claim, runs: Runs) -> tuple[str, Estimate | None]:
    """Whether a claim holds on a family, and the paired difference."""
    if claim.better not in runs or claim.worse not in runs:
        missing = [system for system in (claim.better, claim.worse) if system not in runs]
        return f"not run ({', '.join(missing)})", None
    seeds = sorted(set(runs[claim.better]) & set(runs[claim.worse]))
    if not seeds:
        return "not run (no seed in common)", None
    pairs = [
        rights({seed: runs[system][seed] for seed in seeds}, lambda one: one["result"])
        for system in (claim.better, claim.worse)
    ]
    difference = estimate(pairs[0] - pairs[1])
    if len(seeds) < MIN_SEEDS:
        return f"no verdict: {len(seeds)} seed{'s' * (len(seeds) > 1)} of at least {MIN_SEEDS}", difference
    if difference.low > -claim.margin:
        return "holds", difference
    if difference.high < -claim.margin:
        return "does not hold", difference
    return "undecided", difference


def claims_table(claims: Sequence[Claim], families: dict[str, Runs]) -> tuple[str, list[dict[str, Any]]]:
    """Every claim on every family as Markdown, and as numbers."""
    rows, numbers = [], []
    for claim in claims:
        for family, runs in families.items():
            verdict, difference = judge(claim, runs)
            rows.append([claim.text, family, "" if difference is None else str(difference), verdict])
            numbers.append({"claim": claim.text, "family": family, "verdict": verdict})
            numbers[-1]["difference"] = None if difference is None else asdict(difference)
    return markdown_table(["claim", "family", "difference in recall@1 [95 %]", "verdict"], rows), numbers


def write_text(folder: Path) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """The report as Markdown, its numbers, and the lines of a picture for each family."""
    families = read_results(folder)
    parts, numbers, lines = [], {}, {}
    for family, runs in families.items():
        first = next(iter(next(iter(runs.values())).values()))["result"]
        num_hops = np.array(first["num_hops"])
        table, of_family = family_table(runs, num_hops)
        layers = first["num_layers"]
        parts.append(
            f"## {family}\n\n{first['num_queries']} test questions, {first['num_candidates']} candidates. Layers that "
            f"see what a question is about: {layers}. A single pass can follow as many hops if each layer follows "
            f"one, and at most {2**layers - 1} if each doubles what the one before it has found.\n\n{table}"
        )
        if family in PUBLISHED:
            parts[-1] += f"\n\n{public_table(family, runs)}"
        numbers[family] = of_family
        lines[family] = {"lines": of_family, "rule": first["best_rule"]}
    told, numbers["claims"] = claims_table(CLAIMS, families)
    parts.append(
        "## What the paper says\n\nIts figures are MMEB-V2's, the differences are ours; their intervals are not "
        f"corrected for the number of comparisons.\n\n{told}"
    )
    parts.append("Not testable at this scale:\n\n" + "\n".join(f"- {text}" for text in NOT_TESTABLE))
    told, numbers["questions"] = claims_table(QUESTIONS, families)
    parts.append(f"## What it does not say\n\n{told}")
    return "\n\n".join(parts), numbers, lines


def draw_families(path: Path, lines: dict[str, dict[str, Any]]) -> list[Path]:
    """A picture per family: recall against hops, a line per system of `MAIN`."""
    from plume_eval.hops.plots import draw_hops  # needs matplotlib

    written = []
    for family, of_family in lines.items():
        shown = {system: values for system, values in of_family["lines"].items() if system in MAIN}
        file = path.with_name(f"{path.name}_{family}.png")
        by_hops = {name: {k: v for k, v in values.items() if k != "all"} for name, values in shown.items()}
        draw_hops(file, by_hops, of_family["rule"])
        written.append(file)
    return written
