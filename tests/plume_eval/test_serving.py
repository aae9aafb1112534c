"""`plume-eval serving`: a server is started, asked in every way that is measured, and ended."""

from __future__ import annotations

import socket

import pytest

from plume_eval.serving import measure_serving, summary, write_serving


@pytest.mark.launching
def test_a_server_is_measured_and_ended(plume_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    found = measure_serving(str(plume_folder), port, num_texts=32, num_single=4, num_requests=40, seconds=0.4)
    assert found["throughput_ratio"] > 0
    for name in ("at_70_percent", "at_10_times"):
        one = found[name]
        assert one["answered"] + one["refused"] == one["requests"] > 0
        assert one["others"] == 0
    assert found["drain_status"] == 200
    table = write_serving("runs/demo/latent", tmp_path, found)
    assert len(summary(found)) == 6
    assert "10 times capacity, by 256 clients" in table
    assert list(tmp_path.glob("serving_*.json"))
    with socket.socket() as again:  # nobody listens any more
        assert again.connect_ex(("127.0.0.1", port)) != 0
