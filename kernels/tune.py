"""Find the tiles of the device at hand, and write them to `kernels/plume_kernels/tuned/<device>.json`.

python kernels/tune.py --shapes 2b 7b --time-limit 240
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from plume.engine.fused import reference
from plume.terminal import Parser, run_script
from plume_eval.kernels.cases import BY_NAME
from plume_eval.kernels.tuning import products, tune
from plume_kernels import tiles


def main() -> None:
    """Tune and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", choices=sorted(BY_NAME), nargs="+", default=["2b"], help="of the models to tune for"
    )
    parser.add_argument("--time-limit", type=float, help="seconds; products that come later keep the default")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning times kernels, which needs a CUDA device; without one the default tiles are taken")
    with torch.inference_mode():
        table = tune(
            [BY_NAME[name] for name in options.shapes],
            {name: getattr(reference, name) for name in products(BY_NAME[options.shapes[0]])},
            time_limit_s=options.time_limit,
            report=lambda line: print(line, flush=True),  # noqa: T201
        )
    path = tiles.path(torch.cuda.get_device_name())
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(path)  # noqa: T201


if __name__ == "__main__":
    run_script("tune.py", main)
