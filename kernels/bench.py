"""The bench of the kernels: nothing is timed unless all of them are right.

python kernels/bench.py --shapes 2b                              on a GPU: the gate, each kernel, the whole step
TRITON_INTERPRET=1 python kernels/bench.py --shapes tiny         without one: the gate alone
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from plume.engine.fused import ops
from plume.terminal import Parser, run_script
from plume_eval.kernels.cases import BY_NAME
from plume_eval.kernels.run import GateError, gate, run, tables, write
from plume_eval.speed.cases import make_model
from plume_eval.speed.config import LatencyConfig


def main() -> None:
    """Check, measure and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=("tiny", "2b", "7b"), default="2b", help="of a model of random weights")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--compiled", action="store_true", help="also torch.compile, which takes a minute or two")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further step is timed")
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    options = parser.parse_args()
    shapes = BY_NAME[options.shapes]
    try:
        if not torch.cuda.is_available():
            if reason := ops.unsupported_reason(torch.device("cpu")):
                sys.exit(f"{reason}; with TRITON_INTERPRET=1 they are checked, not timed")
            checks = gate(shapes, dtype=torch.float32, device="cpu")
            print(f"{len(checks)} results are right; no CUDA device, so nothing is timed")  # noqa: T201
            return
        model = make_model(LatencyConfig(shapes=options.shapes, dtype="bfloat16"), "cuda")
        command = " ".join(["kernels/bench.py", *sys.argv[1:]])
        limits: dict = {"time_limit_s": options.time_limit, "compiles": options.compiled}
        limits["save"] = lambda found: write(found, options.out, options.shapes, command)
        result = run(model, shapes, options.batch_sizes, dtype=torch.bfloat16, device="cuda", **limits)
    except GateError as error:
        sys.exit(str(error))
    print(tables(result))  # noqa: T201


if __name__ == "__main__":
    run_script("bench.py", main)
