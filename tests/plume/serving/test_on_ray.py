"""The recipe for Ray Serve of docs/serving.md, as it stands there but for the model and the GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from plume import Plume
from tests.processes import free_port, started

_AROUND = """
import os, sys, time
import ray
ray.init(num_cpus=2, object_store_memory=80_000_000, _temp_dir=sys.argv[2], include_dashboard=False)
from ray import serve
serve.start(http_options={{"host": "127.0.0.1", "port": int(sys.argv[1])}})
{recipe}
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.launching
def test_the_recipe_for_ray_serve_gives_the_vectors_of_encode(plume_folder):
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    (recipe,) = re.findall(r"```\n(from ray import serve.*?)```", page, re.DOTALL)
    recipe = recipe.replace("/models/kite", str(plume_folder)).replace('ray_actor_options={"num_gpus": 1}, ', "")
    assert str(plume_folder) in recipe
    assert "num_gpus" not in recipe
    port = free_port()
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="r") as place:
        command = [sys.executable, "-c", _AROUND.format(recipe=recipe), str(port), place]
        with started(command, env={**os.environ, **quiet}, stderr=subprocess.DEVNULL) as driver:
            assert driver.stdout is not None
            assert any(line.strip() == "up" for line in driver.stdout)
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/embeddings",
                json.dumps({"input": ["a red kite", "blue"]}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=60) as answer:
                found = [one["embedding"] for one in json.loads(answer.read())["data"]]
    expected = Plume(plume_folder, device="cpu").encode(["a red kite", "blue"])
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
