"""The crash tests' own plugin: gives every random test its seed."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """HISS_TEST_SEED, or a fixed one for each test; a failure shows it."""
    value = int(os.environ.get("HISS_TEST_SEED", "20261122"))
    print(f"seed {value}: HISS_TEST_SEED={value} pytest {request.node.nodeid}")
    return value
