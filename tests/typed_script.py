"""A user's script, which `make check` reads with pyright: wrong calls must be errors, right ones none."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from pathlib import Path

import numpy as np
import torch

from plume import Plume

model = Plume("kite", num_latent_steps={"query": 4, "document": 0}, truncate=True)
a: np.ndarray = model.encode(["red", {"text": "blue"}, Path("a.png")], num_latent_steps=4, instruction="Find:")
b: torch.Tensor = model.encode("red", convert_to_tensor=True, truncate_dim=8, precision=None)
c: np.ndarray = model.encode([[{"role": "user", "content": "red"}], np.zeros((8, 8, 3), np.uint8)])
model.encode("red", num_latent_step=4)  # pyright: ignore[reportCallIssue]
model.encode(3)  # pyright: ignore[reportCallIssue, reportArgumentType]
model.encode("red", on_error="ignore")  # pyright: ignore[reportCallIssue, reportArgumentType]
d: int = model.encode("red")  # pyright: ignore[reportAssignmentType]
e: np.ndarray = model.encode("red", convert_to_tensor=True)  # pyright: ignore[reportAssignmentType]
