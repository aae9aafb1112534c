"""The demo: a small Qwen2-VL learns to reason about pictures, in words and then in latent steps.

Makes pages, pre-trains a small backbone to read them, trains an explicit, a latent and a single-pass embedder, and
compares them on held-out pages. `make demo` runs it in a clone, `plume-demo` anywhere.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plume import PlumeModel
from plume.configurations import find_config
from plume.random_models import save_tiny_backbone
from plume.terminal import Parser, counted, is_watched, run_script
from plume.tracing.pictures import draw_trace
from plume.tracing.trace import trace
from plume_eval.baselines import Mode, embed
from plume_eval.hops.inside import look_inside
from plume_eval.hops.make import Sizes, make_task, write_examples
from plume_eval.hops.plots import draw_inside, draw_search, draw_training
from plume_eval.hops.run import HopsTask, evaluate
from plume_eval.latency import latency_ms
from plume_eval.report import header, markdown_header, markdown_table
from plume_train.config import PlumeTrainingArguments, arguments_from
from plume_train.run import train

MARKER = "demo.json"

#: Name of a system, its checkpoint, how it reasons.
SYSTEMS: list[tuple[str, str, Mode]] = [
    ("explicit chain of thought", "explicit", "explicit"),
    ("latent", "latent", "latent"),
    ("single pass", "single_pass", "single_pass"),
]
ABLATIONS: list[tuple[str, str, Mode]] = [
    ("latent, no curriculum", "no_curriculum", "latent"),
    ("latent, no adapter", "no_adapter", "latent"),
    ("latent, last state predicts `<eot>`", "end_token", "latent"),
]

#: What is said when a part of the training begins.
TITLES = {
    "read": "Learning to read pages",
    "explicit": "Learning to reason in words",
    "": "From words to latent steps",
    "single_pass": "For comparison: a single pass, twice as many rows, no rationale",
    "no_curriculum": "Ablation: latent steps without a curriculum",
    "no_adapter": "Ablation: the curriculum without an adapter",
    "end_token": "Ablation: the last latent state predicts <eot>",
    "compare": "Comparing on held-out pages",
}

PICTURES = {
    "training.png": "recall over training",
    "inside.png": "which hop each latent state holds: h0 holds hop 1, and so on; the last state holds none",
    "trace.png": "the same for one page, with the experts of each step",
    "search.png": "one question, and the symbols nearest to it",
}

#: What is trained after reading, and which curves are drawn meanwhile.
RUNS: list[tuple[str, dict[str, Mode]]] = [
    ("explicit", {"latent steps, then the rest in words": "explicit"}),
    ("", {"latent steps, then the rest in words": "explicit", "latent steps only": "latent"}),
    ("single_pass", {"single pass": "single_pass"}),
]
ABLATION_RUNS: list[tuple[str, dict[str, Mode]]] = [
    ("no_curriculum", {"latent, no curriculum": "latent"}),
    ("no_adapter", {"latent, no adapter": "latent"}),
    ("end_token", {"latent, last state predicts <eot>": "latent"}),
]


#: Folders of the models that are trained.
OUTPUTS = ("read", *(name or "latent" for name, _ in RUNS + ABLATION_RUNS))

#: Of the whole time, as one run on two cores took it; what comes after reading and the trainings takes the rest.
SHARES = {"read": 0.14, "explicit": 0.18, "": 0.3, "single_pass": 0.35}
SHARES |= dict.fromkeys(("no_curriculum", "no_adapter", "end_token"), 0.3)


class Pace:
    """Says which part begins, and how long the rest will take on this machine."""

    def __init__(self, names: Sequence[str]):
        self.names, self.start = [*names, "compare"], time.perf_counter()
        self.total = sum(SHARES[name] for name in names) + 0.03

    def begin(self, name: str) -> None:
        """Announce a part."""
        place = self.names.index(name)
        done = sum(SHARES[earlier] for earlier in self.names[:place])
        minutes = (time.perf_counter() - self.start) / 60
        left = f", about {counted(max(round(minutes * (self.total - done) / done), 1), 'minute')} to go" if done else ""
        say(f"Part {place + 1} of {len(self.names)}{left}: {TITLES[name]}")


def say(title: str) -> None:
    """Print a heading."""
    print(f"\n{title}", flush=True)  # noqa: T201


def settings(name: str, out: Path, seed: int, num_hops: int) -> PlumeTrainingArguments:
    """`configs/train/demo_<name>.yaml` with its paths under `out`; one segment and one latent step per hop."""
    config = find_config("train", f"demo_{name}" if name else "demo")
    args = arguments_from(config)
    moved: dict = {key: getattr(args, key).replace("runs/demo", str(out)) for key in ("model", "output_dir")}
    moved["train_file"] = [file.replace("runs/demo", str(out)) for file in args.train_file]
    stages = {}
    if args.stage_ratios is not None and 1 < len(args.stage_ratios) != num_hops:
        last = 0.36
        stages = {
            "stage_ratios": [(hop + 1) / num_hops for hop in range(num_hops)],
            "stage_shares": [(1 - last) / (num_hops - 1)] * (num_hops - 1) + [last],
        }
    fields = {**args.plume_config, "num_latent_steps": num_hops} if name == "read" else args.plume_config
    return arguments_from(
        config,
        **{**moved, **stages, "seed": seed, "num_segments": num_hops, "plume_config": fields},
        evaluate_every=0 if name == "read" else 50 if name in ("single_pass", "no_curriculum") else 25,
    )


class Watch:
    """Evaluates on a part of the held-out questions while training goes on, and keeps the curves."""

    def __init__(self, task: HopsTask, first_step: int, modes: dict[str, Mode]):
        self.task = task
        self.first_step = first_step
        self.modes = modes
        self.curves: dict[str, list[tuple[int, float]]] = {name: [] for name in modes}

    def __call__(self, model: PlumeModel, step: int, num_latent_steps: int) -> dict[str, float]:
        """Recall@1 of each mode at this step; the explicit one takes the latent steps of the current stage."""
        numbers = {}
        for name, mode in self.modes.items():
            steps = num_latent_steps if mode == "explicit" else None
            result = evaluate(model, self.task, mode, num_latent_steps=steps, forms=("name",))
            numbers[name] = result["recall_at_1"]["name"]["mean"]
            self.curves[name].append((self.first_step + step, numbers[name]))
        return {f"recall_{name}": value for name, value in numbers.items()}


def train_all(out: Path, seed: int, num_hops: int, with_ablations: bool) -> dict[str, list[tuple[int, float]]]:
    """Train every system; returns recall curves by name."""
    runs = RUNS + (ABLATION_RUNS if with_ablations else [])
    pace = Pace(["read", *(name for name, _ in runs)])
    watched = HopsTask(out / "data", limit=128)
    curves: dict[str, list[tuple[int, float]]] = {}
    pace.begin("read")
    train(settings("read", out, seed, num_hops))
    for name, modes in runs:
        pace.begin(name)
        args = settings(name, out, seed, num_hops)
        continues = "explicit" in Path(args.model).name
        watch = Watch(watched, settings("explicit", out, seed, num_hops).max_steps * continues, modes)
        train(args, watch)
        for curve, points in watch.curves.items():
            curves.setdefault(curve, []).extend(points)
    pace.begin("compare")
    return curves


def compare(out: Path, systems: list[tuple[str, str, Mode]]) -> list[dict]:
    """Quality and latency of every system on the held-out pages."""
    task = HopsTask(out / "data")
    queries = task.queries()
    results = []
    for name, folder, mode in systems:
        model = PlumeModel.from_pretrained(out / folder).eval()
        result = evaluate(model, task, mode)
        result["latency_ms"] = {str(size): latency_ms(model, queries[:size], mode) for size in (1, 32)}
        results.append({"system": name, **result})
        print(f"  {name}: recall@1 {result['recall_at_1']['name']['mean']:.3f}", flush=True)  # noqa: T201
    return results


def table(results: list[dict]) -> str:
    """The comparison as Markdown."""
    base = next(one for one in results if one["mode"] == "single_pass")["latency_ms"]
    rows = []
    for one in results:
        recall = [
            "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**one["recall_at_1"][form]) for form in ("name", "picture")
        ]
        times = [f"{one['latency_ms'][size]:.2f} ({one['latency_ms'][size] / base[size]:.1f}x)" for size in base]
        rows.append([one["system"], *recall, f"{one['reasoning_steps']:.1f}", *times])
    columns = [
        "system",
        "recall@1, names [95 %]",
        "recall@1, pictures [95 %]",
        "steps or tokens per query",
        "ms per query, batch 1 (ratio)",
        "ms per query, batch 32 (ratio)",
    ]
    return markdown_table(columns, rows)


def draw_all(out: Path, curves: dict, num_hops: int) -> None:
    """Recall over training, the inside of the latent model, one search."""
    args = settings("", out, 0, num_hops)
    curriculum = args.build_curriculum()
    first = settings("explicit", out, 0, num_hops).max_steps
    marks, seen = [(0, "explicit")], set()
    for step in range(args.max_steps):
        stage = curriculum.stage_at(step, args.max_steps)
        if stage not in seen:
            seen.add(stage)
            marks.append((first + step, f"K = {curriculum.num_latent_steps(curriculum.stages[stage])}"))
    task = HopsTask(out / "data")
    draw_training(out / "training.png", curves, marks, 1 / len(task.symbols))

    model = PlumeModel.from_pretrained(out / "latent").eval()
    inside = look_inside(model, task)
    draw_inside(out / "inside.png", inside)

    place = int(task.num_hops.argmax())  # the first question of the most hops
    query, candidates = task.queries()[place], task.candidates("picture")
    scores = embed(model, [query], "latent").embedding @ embed(model, candidates, "latent").embedding.T
    order = scores[0].argsort(descending=True).tolist()
    ranking = [(task.symbols[i], scores[0, i].item(), candidates[i].images[0]) for i in order]
    answer = task.symbols[task.answers[place]]
    draw_search(out / "search.png", query.images[0], query.text, ranking, answer)

    (steps,) = trace(model, [query], candidates=[task.symbols[symbol] for symbol in task.paths[place]])
    draw_trace(steps, out / "trace.png")


def prepare(out: Path, seed: int, sizes: dict[str, Any]) -> None:
    """An empty folder with data and a backbone; what a demo that was stopped has left there is removed."""
    if (out / "results.json").exists():
        sys.exit(f"{out} holds a finished demo; remove it, or name another folder: --out, or `make demo RUN=...`")
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            sys.exit(f"{out} is not empty and holds no earlier demo; choose another --out")
        for name in ("data", "files", "backbone", *OUTPUTS):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(json.dumps({"seed": seed, **sizes}) + "\n", encoding="utf-8")
    make_task(out / "data", "page", Sizes(**sizes), seed=seed, show_progress=is_watched())
    write_examples(out / "files", out / "data")
    words = json.loads((out / "data" / "task.json").read_text(encoding="utf-8"))["words"]
    save_tiny_backbone(
        out / "backbone",
        words,
        hidden_size=96,
        num_key_value_heads=4,
        vision_width=96,
        temporal_patch_size=1,
        seed=seed,
    )


def main() -> None:
    """Parse, run, report."""
    parser = Parser(prog="plume-demo", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and training")
    parser.add_argument("--ablations", action="store_true", help="also train three ablations")
    parser.add_argument("--num-symbols", type=int, default=9, help="keys on a page")
    parser.add_argument("--num-hops", type=int, default=4, help="how often the table is followed at most")
    options = parser.parse_args()
    out, started = options.out, time.perf_counter()
    fields = header(" ".join(["plume-demo", *sys.argv[1:]]))

    sizes = {
        "num_symbols": options.num_symbols,
        "min_hops": 1,
        "max_hops": options.num_hops,
        "forms": ("tiles",),
        "composed_share": 0.0,
    }
    prepare(out, options.seed, sizes)
    curves = train_all(out, options.seed, options.num_hops, options.ablations)
    results = compare(out, SYSTEMS + (ABLATIONS if options.ablations else []))
    draw_all(out, curves, options.num_hops)

    fields |= {
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "task": f"1 to {options.num_hops} hops, {options.num_symbols} symbols, seed {options.seed}",
        "model": f"{sum(p.numel() for p in PlumeModel.from_pretrained(out / 'latent').parameters()):,} parameters",
    }
    report = {"header": fields, "results": results, "curves": curves}
    (out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    written = f"# Demo\n\n{markdown_header(fields)}\n\n{table(results)}\n"
    (out / "results.md").write_text(written, encoding="utf-8")
    print(f"\n{table(results)}\n")  # noqa: T201
    print(f"Results are in {out}/results.md. Pictures beside it:")  # noqa: T201
    for name, what in PICTURES.items():
        print(f"  {name:13} {what}")  # noqa: T201
    task = HopsTask(out / "data")
    place = int(task.num_hops.argmax())
    page, asked = task.rows[place]["query"]["image"][0], task.rows[place]["query"]["text"]
    beside = Path(sys.executable).parent / "plume"
    plume = beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else "plume"
    command = f'{plume} trace {out}/data/{page} --instruction "{asked}" --model {out}/latent --out {out}/trace'
    print(f"Try next, and open {out}/trace/000.png:\n  {command}")  # noqa: T201


def start() -> None:
    """The command `plume-demo`."""
    run_script("plume-demo", main)


if __name__ == "__main__":
    start()
