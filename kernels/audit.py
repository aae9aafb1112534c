"""Bounds of the kernels, read from what they are compiled to for compute capability 9.0, on any machine: no times.

python kernels/audit.py --shapes 2b --batch-sizes 1 8
"""

from __future__ import annotations

import argparse

import triton

from plume.terminal import Parser, run_script
from plume_eval.kernels.audit import audit, table
from plume_eval.kernels.cases import BY_NAME


def main() -> None:
    """Compile, read and print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=sorted(BY_NAME), default="2b", help="of a model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    print(table(audit(BY_NAME[options.shapes], options.batch_sizes)))  # noqa: T201
    print(f"\nTriton {triton.__version__}; bounds of the compiled code, not times.")  # noqa: T201


if __name__ == "__main__":
    run_script("audit.py", main)
