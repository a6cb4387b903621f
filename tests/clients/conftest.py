"""A real node for other people's clients, and the object that they all carry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.demo.node import DemoNode, running

OBJECT_BYTES = 100_000_000


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoNode]:
    """``hiss serve`` with default settings on free ports, with the bucket ``clients``."""
    with running(tmp_path_factory.mktemp("clients-node")) as started:
        started.put("clients")
        yield started


@pytest.fixture(scope="session")
def hundred_mb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("object") / "frames.raw"
    file.write_bytes(os.urandom(OBJECT_BYTES))
    return file
