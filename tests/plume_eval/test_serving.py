"""`plume-eval serving`: a server is started, asked in every way that is measured, and ended."""

from __future__ import annotations

import socket

import pytest

from plume_eval.serving import measure_serving, summary, write_serving
from tests.processes import free_port


@pytest.mark.launching
def test_a_server_is_measured_and_ended(plume_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    port = free_port()
    found = measure_serving(
        str(plume_folder), port, num_texts=32, num_single=4, num_requests=40, num_burst=60, seconds=0.4
    )
    assert all(ratio > 0 for ratio in found["throughput"].values())
    for name in ("at_70_percent", "burst"):
        one = found[name]
        assert one["answered"] + one["refused"] == one["requests"] > 0
        assert one["others"] == 0
    table = write_serving("serving", "plume-eval serving --model tiny", tmp_path, found)
    assert len(summary(found)) == 9
    assert "60 requests of four texts at once" in table
    assert list(tmp_path.glob("serving_*.json"))
    with socket.socket() as again:  # nobody listens any more
        assert again.connect_ex(("127.0.0.1", port)) != 0
