"""What fused kernels of the transition adapter could win in training at most: its share of a training step.

python kernels/adapter.py --shapes mid
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from plume.terminal import Parser, run_script
from plume_eval.kernels.adapter import adapter_shares
from plume_eval.report import markdown_table, write_report
from plume_eval.speed.cases import make_model
from plume_eval.speed.config import InputSize, LatencyConfig

SIZES = {"text": InputSize(tokens=60), "image": InputSize(tokens=140, pixels=(308, 308))}


def main() -> None:
    """Measure and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=("tiny", "mid", "2b"), default="mid", help="of a model of random weights")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    options = parser.parse_args()
    is_gpu = torch.cuda.is_available()
    config = LatencyConfig(shapes=options.shapes, dtype="bfloat16" if is_gpu else "float32")
    model = make_model(config, "cuda" if is_gpu else "cpu").train()
    rows = adapter_shares(model, SIZES, options.batch_sizes)
    columns = ["input", "tokens", "batch size", "forward and backward, ms", "adapter, ms", "share"]
    lines = [
        [
            one["input"],
            one["num_tokens"],
            one["batch_size"],
            f"{one['step_ms']:.1f}",
            f"{one['adapter_ms']:.1f}",
            f"{one['share']:.1%}",
        ]
        for one in rows
    ]
    count = sum(weight.numel() for weight in model.parameters())
    about = f"Random weights, {count:,} parameters, {model.dtype}, 8 latent steps, medians of 7 runs in turns."
    table = about + "\n\n" + markdown_table(columns, lines)
    command = " ".join(["kernels/adapter.py", *sys.argv[1:]])
    path = write_report(options.out, f"adapter_share_{options.shapes}", "The adapter in training", command, table, rows)
    print(f"{table}\n{path}")  # noqa: T201


if __name__ == "__main__":
    run_script("adapter.py", main)
