"""`plume-eval mmeb`: every mode that was asked for on the same data, then a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plume_eval.mmeb.baselines import open_baseline
from plume_eval.mmeb.embedders import MODES, Embedder, Mode, PlumeEmbedder
from plume_eval.mmeb.report import System, write_files
from plume_eval.mmeb.run import Evaluation, Settings, processes
from plume_eval.mmeb.tasks import find_tasks

#: Limit of a rationale where none is given.
_MAX_NEW_TOKENS = 512


def run_all(
    model: str,
    data: Path,
    out: Path,
    *,
    task_names: Sequence[str] = (),
    modes: Sequence[str] = (),
    baseline: str | None = None,
    num_latent_steps: int | None = None,
    document_latent_steps: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    settings: Settings | None = None,
    show_progress: bool = False,
    say: Callable[[str], Any] = print,
    command: str = "run_all",
) -> int:
    """Score a model in each mode, write a file for each task and a report; returns how many results are incomplete.

    Args:
        model: a folder or a Hub name.
        data: local copy of TIGER-Lab/MMEB-V2.
        out: folder for vectors, results and the report.
        task_names: tasks, groups or modalities; all if there are none.
        modes: of a plume checkpoint; "latent" if there are none.
        baseline: how a model of others is used, in place of modes.
        num_latent_steps: as of `PlumeEmbedder`.
        document_latent_steps: likewise.
        max_new_tokens: likewise.
        batch_size: inputs per pass at most.
        settings: of the evaluation.
        show_progress: show a bar for each task.
        say: takes lines for the user.
        command: what was typed, for the report.

    Raises:
        ValueError: unknown names, no data folder, or settings that cannot be honoured.
    """
    wanted = find_tasks(task_names)
    if not data.is_dir():
        raise ValueError(f"there is no folder {data}; name the local copy of TIGER-Lab/MMEB-V2 with --data")
    if max_new_tokens is not None and "explicit" not in modes and baseline != "ume-r1":
        raise ValueError("--max-new-tokens has no effect where nothing is written; drop it")
    has_classes = any(task.group.endswith("-CLS") for task in wanted)
    if settings is not None and settings.templates != Settings().templates and not has_classes:
        raise ValueError("--template has no effect without a classification task; drop it")
    folders, incomplete = [], 0
    steps = {"num_latent_steps": num_latent_steps, "document_latent_steps": document_latent_steps}
    for embedder in _embedders(model, modes, baseline, steps, max_new_tokens or _MAX_NEW_TOKENS, batch_size):
        evaluation = Evaluation(embedder, data, out, settings, show_progress=show_progress)
        results = evaluation.run(wanted)
        folders.append(evaluation.folder)
        if processes().is_main_process:
            bad = sum(not one["is_complete"] for one in results)
            say(f"{embedder.name}: {len(results) - bad} of {len(results)} tasks complete, in {evaluation.folder}")
            incomplete += bad
        del embedder, evaluation  # before the next one is opened
    if processes().is_main_process:
        path = write_files([System.read(folder) for folder in folders], out, command)
        say(f"written: {path}.{{md,json,png}}")
    return incomplete


def _embedders(
    model: str,
    modes: Sequence[str],
    baseline: str | None,
    steps: Mapping[str, int | None],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[Embedder]:
    device = str(processes().device)
    told = [f"--{name.replace('_', '-')}" for name, value in steps.items() if value is not None]
    if baseline is not None:
        if unused := ["--mode"] * bool(modes) + told:
            raise ValueError(f"{unused[0]} has no effect on a baseline; drop it")
        yield open_baseline(baseline, model, device=device, batch_size=batch_size, max_new_tokens=max_new_tokens)
        return
    if unknown := set(modes) - set(MODES):
        raise ValueError(f"there is no mode {sorted(unknown)[0]!r}; expected {', '.join(MODES)}")
    chosen: list[Mode] = [mode for mode in MODES if mode in (modes or ("latent",))]
    if "latent" not in chosen and told:
        raise ValueError(f"{told[0]} has no effect on {', '.join(chosen)}; drop it")
    for mode in chosen:
        yield PlumeEmbedder(
            model,
            mode=mode,
            device=device,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            num_latent_steps=steps["num_latent_steps"] if mode == "latent" else None,
            document_latent_steps=steps["document_latent_steps"] if mode == "latent" else None,
        )
