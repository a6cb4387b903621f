"""A real node for other people's clients, and the object that they all carry."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session")
def peer() -> Callable[[str], str]:
    """Path of a program that must be there in CI and may be missing elsewhere (see .ci/peers)."""
    beside = (Path(sys.executable).parent, Path(__file__).parents[2] / ".cache" / "bin")
    path = os.pathsep.join((*map(str, beside), os.environ["PATH"]))

    def find(name: str) -> str:
        found = shutil.which(name, path=path)
        if found is None and os.environ.get("CI") != "true":
            pytest.skip(f"{name} is not installed; `make apt` installs it or says how")
        assert found is not None, f"{name} is not installed"
        return found

    return find
