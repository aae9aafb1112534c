"""The bench of the Triton kernels: first whether they are right, then how long they take (`kernels/bench.py`)."""
