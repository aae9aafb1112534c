"""Joins demos of several seeds and settings into one results file with pictures: `demo_results.py RUN...`."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

from plume.terminal import Parser, run_script
from plume_eval.report import markdown_header, markdown_table

#: What differs between runs; the rest of the header must be equal.
_VARYING = ("command", "commit", "minutes", "task", "model")


def join(folders: list[Path]) -> tuple[dict, dict[str, list[dict]]]:
    """The common header, and the reports by task (a task without its seed)."""
    reports = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    common = {key: value for key, value in reports[0]["header"].items() if key not in _VARYING}
    by_task: dict[str, list[dict]] = {}
    for report in reports:
        own = report["header"]
        if any(own[key] != common[key] for key in common):
            raise SystemExit(f"runs of different origin: {own} and {common}; run them again from one commit")
        by_task.setdefault(f"{own['task'].rsplit(', seed', 1)[0]}, {own['model']}", []).append(report)
    return common, by_task


def task_table(reports: list[dict]) -> str:
    """One row per system: recall of each seed, cost, latency as a ratio within its own run."""
    rows = []
    for system in dict.fromkeys(one["system"] for report in reports for one in report["results"]):
        found = [one for report in reports for one in report["results"] if one["system"] == system]
        bases = [
            next(one for one in report["results"] if one["mode"] == "single_pass")
            for report in reports
            if any(one["system"] == system for one in report["results"])
        ]
        ratios = [
            statistics.median(
                one["latency_ms"][size] / base["latency_ms"][size] for one, base in zip(found, bases, strict=True)
            )
            for size in ("1", "32")
        ]
        recall = [", ".join(f"{one['recall_at_1'][form]['mean']:.3f}" for one in found) for form in ("name", "picture")]
        steps = statistics.mean(one["reasoning_steps"] for one in found)
        rows.append([system, *recall, f"{steps:.1f}", *(f"{ratio:.1f}x" for ratio in ratios)])
    columns = [
        "system",
        "recall@1, names (each seed)",
        "recall@1, pictures (each seed)",
        "steps or tokens per query",
        "latency to single pass, batch 1",
        "latency to single pass, batch 32",
    ]
    return markdown_table(columns, rows)


def main() -> None:
    """Parse, join, write."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of plume-demo; pictures are the first one's")
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    options = parser.parse_args()
    common, by_task = join(options.runs)
    name = f"demo_cpu_{common['date'][:4]}{common['date'][5:7]}"
    commands = [report["header"]["command"] for reports in by_task.values() for report in reports]
    parts = ["# Demo", markdown_header({"commands": "; ".join(f"`{command}`" for command in commands), **common})]
    for task, reports in by_task.items():
        seeds = ", ".join(report["header"]["task"].rsplit("seed ", 1)[1] for report in reports)
        minutes, commits = (
            ", ".join(str(report["header"][key]) for report in reports) for key in ("minutes", "commit")
        )
        parts += [f"## {task}", f"Seeds {seeds}; minutes {minutes}; commits {commits}.", task_table(reports)]
    parts.append(
        "Latency is the median wall time from tensors to embeddings, as a ratio to the single pass of the same run "
        "(median over seeds). recall@1 is over all symbols; intervals and milliseconds are in the JSON file."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    joined = {"header": common, "runs": [report for reports in by_task.values() for report in reports]}
    (options.out / f"{name}.json").write_text(json.dumps(joined) + "\n", encoding="utf-8")
    for picture in ("training", "inside", "search"):
        shutil.copy(options.runs[0] / f"{picture}.png", options.out / f"{name}_{picture}.png")


if __name__ == "__main__":
    run_script("demo_results.py", main)
