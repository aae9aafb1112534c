"""Trainings in tests draw no pictures, which takes longer than they do, unless a test asks for them."""

from __future__ import annotations

import pytest


@pytest.fixture
def with_pictures():
    """Draws what a training draws."""


@pytest.fixture(autouse=True)
def _without_pictures(request, monkeypatch):
    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr("plume_train.run.draw_run", lambda log, stages, out: True)
