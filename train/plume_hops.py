"""The hops grid: trains the systems that the evidence compares, and measures each.

`plume-eval report` joins the results.

Every system is a configuration in `configs/train/hops/`, with the paths of family, seed and system put in. Data of the
families are made where they are not there; those of bAbI and ProsQA must be there, `<out>/babi/data` as made by
`plume-eval hops babi`. What is finished is not trained again, and what was stopped goes on, so that the grid can be run
in parts, and by several processes of different seeds or families.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from plume import PlumeModel
from plume.configurations import find_config
from plume.random_models import save_tiny_backbone
from plume.terminal import Parser, is_watched, run_script
from plume_eval.baselines import Mode
from plume_eval.hops.make import FAMILIES, Sizes, make_task
from plume_eval.hops.report import MAIN, RESULT
from plume_eval.hops.run import HopsTask, evaluate, evaluate_control
from plume_train.config import PlumeTrainingArguments, arguments_from
from plume_train.mine import mine
from plume_train.run import train

_HOME = "runs/hops/page"

#: Forms that are trained and measured; the others of a family are made by `plume-eval hops make` as well.
FORMS = {"page": ("tiles",), "image": ("arrows",), "video": ("cups",), "text": ("chain",)}

#: Public sets, whose data must be there.
PUBLIC = ("babi", "prosqa")

#: Layers where those of the others are too few. An arrow leads to one of many cells, before or behind it. In a story,
#: what something is must be brought together, then be found, then be said behind a full stop.
_STORIES = {"num_layers": 3}
_LAYERS = {"image": {"vision_layers": 3}, "text": _STORIES, "babi": _STORIES, "prosqa": _STORIES}

#: Settings of a family's reading. A vision tower of three layers does not learn to look on at a higher rate. To find a
#: sentence by one of its words takes long to learn, and is what all tasks of the public sets need.
_LONG = {"learning_rate": 2e-3, "max_steps": 4000}
_READING = {"image": {"learning_rate": 2e-3}, "babi": _LONG, "prosqa": _LONG}

#: How much longer a family is trained than configs/train/hops says, once it can read: with written reasoning, then.
_LONGER = {"image": (1.5, 1.5), "text": (1.5, 1.5), "babi": (6.0, 2.5), "prosqa": (6.0, 2.5)}

#: The system whose vectors negatives are mined by.
_MINER = "latent"

#: Configurations that others start from.
_STARTS = ("read_easy", "read")


def systems() -> list[str]:
    """Names of all systems: the configurations but what others start from."""
    folder = find_config("train", "hops/base").parent
    return sorted(file.stem for file in folder.glob("*.yaml") if file.stem not in ("base", *_STARTS))


def settings(out: Path, family: str, seed: int, system: str) -> PlumeTrainingArguments:
    """The configuration of a system, its paths under `out`."""
    config = find_config("train", f"hops/{system}")
    args = arguments_from(config)

    def moved(path: str) -> str:
        rest = Path(path).relative_to(_HOME)
        parts = rest.parts if rest.parts[0] == "data" else (str(seed), *rest.parts[1:])
        return str(out / family / Path(*parts))

    has_easy = family in PUBLIC or FAMILIES[family].easy is not None
    start = "runs/hops/page/0/read_easy" if system == "read" and has_easy else args.model
    files = [moved(file) for file in args.train_file if family not in PUBLIC or "control" not in file]
    changes: dict[str, Any] = dict(_READING.get(family, {}))
    if system not in _STARTS:
        longer = _LONGER.get(family, (1.0, 1.0))[mode_of(args) != "explicit"]
        changes = {"max_steps": round(args.max_steps * longer)}
    if system == "explicit_long":  # as long as both together
        changes = {"max_steps": sum(settings(out, family, seed, one).max_steps for one in ("explicit", "latent"))}
    if args.media_root:
        changes["media_root"] = moved(args.media_root)
    return arguments_from(
        config,
        model=moved(start),
        output_dir=moved(str(args.output_dir)),
        train_file=files,
        seed=seed,
        **changes,
    )


def prepare(out: Path, family: str, seed: int, num_train: int) -> None:
    """Data of a family, and a backbone of random weights, where they are not there yet.

    Raises:
        ValueError: the data that are there have another number of training records, or must be made before.
    """
    (out / family).mkdir(parents=True, exist_ok=True)
    data = out / family / "data"
    if family in PUBLIC and not (data / "task.json").exists():
        raise ValueError(f"{data} is not there; make it with `plume-eval hops {family} --out {data}`")
    if not (data / "task.json").exists():
        with TemporaryDirectory(dir=out / family) as unfinished:  # another process may be about it too
            made = Path(unfinished) / "data"
            make_task(made, family, Sizes(num_train=num_train, forms=FORMS[family]), show_progress=is_watched())
            if not data.exists():
                made.rename(data)
    found = json.loads((data / "task.json").read_text(encoding="utf-8"))
    if family not in PUBLIC and found["num_train"] != num_train:
        raise ValueError(
            f"{data} holds {found['num_train']} training records; received --num-train {num_train}; name another --out"
        )
    backbone = out / family / str(seed) / "backbone"
    if not (backbone / "config.json").exists():
        sizes: dict[str, Any] = {"hidden_size": 96, "num_key_value_heads": 4, "vision_width": 96}
        sizes |= _LAYERS.get(family, {})
        save_tiny_backbone(backbone, found["words"], **sizes, temporal_patch_size=1, seed=seed)


def run_system(out: Path, family: str, seed: int, system: str) -> dict[str, Any]:
    """Train a system, after what it starts from, and measure it; what is there already is read."""
    args = settings(out, family, seed, system)
    file = args.output_folder / RESULT
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    _train_start(out, family, seed, Path(args.model).name)
    if args.num_negatives:
        _mine(out, family, seed, Path(args.train_file[0]))
    began = time.perf_counter()
    model = train(args)
    minutes = (time.perf_counter() - began) / 60
    task, mode = HopsTask(out / family / "data"), mode_of(args)
    result: dict[str, Any] = {
        "family": family,
        "seed": seed,
        "system": system,
        "mode": mode,
        "num_latent_steps": model.config.num_latent_steps,
        "minutes": minutes,
        **measure(model, task, mode),
    }
    if mode == "latent":  # the same training mix, read without latent steps
        result["at_zero"] = measure(model, task, "single_pass")
    file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def _train_start(out: Path, family: str, seed: int, start: str) -> None:
    """Train and measure what a system starts from; what is finished is not trained again.

    Raises:
        ValueError: it has been measured, and its model is not there. One that is trained again, on another machine or
            with another number of threads, is another model: what starts from it is not comparable.
    """
    if start == "backbone":
        return
    args = settings(out, family, seed, start)
    if (args.output_folder / RESULT).exists() and not (args.output_folder / "config.json").exists():
        raise ValueError(
            f"{args.output_folder} holds a result without its model, and systems can be compared only if they start "
            "from one model; put the model there, or name another --out"
        )
    if start not in _STARTS:
        run_system(out, family, seed, start)
    _train_start(out, family, seed, Path(args.model).name)
    train(args)


def _mine(out: Path, family: str, seed: int, file: Path) -> None:
    """Hard negatives by the vectors of the system `latent`, which is trained for it where it is not there."""
    if file.exists():
        return
    run_system(out, family, seed, _MINER)
    file.parent.mkdir(parents=True, exist_ok=True)
    model, data = str(out / family / str(seed) / _MINER), out / family / "data"
    mine([str(data / "train.jsonl"), "--model", model, "--out", str(file), "--media-root", str(data)])


def mode_of(args: PlumeTrainingArguments) -> Mode:
    """How a system reasons, as its curriculum says."""
    curriculum = args.build_curriculum()
    last = curriculum.stages[-1]
    if last.ratio == 0:
        return "explicit"
    return "latent" if curriculum.num_latent_steps(last) else "single_pass"


def measure(model: PlumeModel, task: HopsTask, mode: Mode) -> dict[str, Any]:
    """Recall on the test questions, and on the control."""
    control = evaluate_control(model, task, mode) if task.has_control else None
    return {"result": evaluate(model, task, mode), "control": control}


def main() -> None:
    """Parse, run, say what was found."""
    parser = Parser(prog="plume-hops", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/hops"), help="folder of data, models and results")
    parser.add_argument(
        "--family", nargs="+", default=["page"], choices=[*FAMILIES, *PUBLIC], help="which task families"
    )
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="of weights and training")
    parser.add_argument(
        "--system", nargs="+", default=list(MAIN), choices=systems(), help="names of configs/train/hops/*.yaml"
    )
    parser.add_argument("--num-train", type=int, default=8000, help="training records of a family")
    options = parser.parse_args()
    for seed in options.seed:
        for family in options.family:
            try:
                prepare(options.out, family, seed, options.num_train)
                for system in options.system:
                    found = run_system(options.out, family, seed, system)
                    recall = found["result"]["recall_at_1"]["name"]["mean"]
                    print(f"{family}, seed {seed}, {system}: recall@1 {recall:.3f}", flush=True)  # noqa: T201
            except ValueError as error:
                sys.exit(f"plume-hops: {error}")


def start() -> None:
    """The command `plume-hops`."""
    run_script("plume-hops", main)


if __name__ == "__main__":
    start()
