"""Training throughput: a step on a batch against a loop over its rows, same model, same machine, one run.

python train/bench.py --data runs/demo/data/train.jsonl --model runs/demo/explicit      the demo's model and pages
python train/bench.py --shapes 2b                                                       on a GPU, random weights
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from plume import PlumeModel
from plume.random_models import SHAPES_2B, random_model, save_tiny_backbone
from plume.terminal import Parser, run_script
from plume_eval.report import header, markdown_header, markdown_table
from plume_train.config import PlumeTrainingArguments
from plume_train.data.records import Records
from plume_train.data.rows import Record, Side
from plume_train.throughput import pairs_per_second


def synthetic(count: int) -> list[Record]:
    """Pairs of a picture of 256 visual tokens with a question, and a short text; a rationale of 8 sentences."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 448, 448, 3), dtype=torch.uint8, generator=generator)
    rationale = " ".join(f"the kite is red in part {number} of it." for number in range(8))
    return [
        Record(
            Side(f"which kite? {row}", (Image.fromarray(noise[row].numpy()),), rationale=rationale, answer="red"),
            Side(f"kite {row}", rationale=rationale),
            "synthetic",
            f"row {row}",
        )
        for row in range(count)
    ]


def main() -> None:
    """Measure and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a plume checkpoint")
    parser.add_argument("--data", type=Path, help="rows; synthetic ones if not given")
    parser.add_argument("--shapes", choices=("tiny", "2b"), default="tiny", help="of random weights, without --model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-segments", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model:
        model = PlumeModel.from_pretrained(options.model, dtype=torch.float32).to(device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_backbone(folder, ["red", "kite"])
            model = PlumeModel.from_backbone(folder, dtype="float32")
        model = random_model(model, SHAPES_2B, device) if options.shapes == "2b" else model.to(device)
    records = list(Records(options.data))[: options.batch_size] if options.data else synthetic(options.batch_size)
    args = PlumeTrainingArguments(
        num_segments=options.num_segments, output_dir=str(options.out), use_cpu=device == "cpu", report_to="none"
    )
    fields = header(" ".join(["train/bench.py", *sys.argv[1:]])) | {
        "model": f"{sum(weight.numel() for weight in model.parameters()):,} parameters",
        "batch": f"{len(records)} pairs; step is forward, backward and SGD; vision tower frozen",
        "precision": "bfloat16 autocast, float32 weights" if device == "cuda" else "float32",
    }
    name = options.out / f"train_throughput_{device}_{fields['date'][:4]}{fields['date'][5:7]}"
    bf16 = device == "cuda"
    results = pairs_per_second(
        model, records, args, num_runs=options.runs, bf16=bf16, save=lambda found: write(found, fields, name)
    )
    print(table(results))  # noqa: T201


def table(results: list[dict]) -> str:
    """What was measured, as Markdown."""
    rows = [
        [
            one["num_latent_steps"],
            one["method"],
            "out of memory" if one["seconds"] is None else f"{one['pairs_per_second']:.1f}",
            "" if one["speed_up"] is None else f"{one['speed_up']:.1f}x",
            "" if one["peak_memory_gib"] is None else f"{one['peak_memory_gib']:.1f}",
        ]
        for one in results
    ]
    return markdown_table(["K", "method", "pairs/s", "to the loop over rows", "peak GiB"], rows)


def write(results: list[dict], fields: dict, name: Path) -> None:
    """Write `name`.json and `name`.md."""
    name.parent.mkdir(parents=True, exist_ok=True)
    report = {"header": fields, "results": results}
    name.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    title = "# Training throughput"
    text = f"{title}\n\n{markdown_header(fields)}\n\n{table(results)}\n"
    name.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_script("bench.py", main)
