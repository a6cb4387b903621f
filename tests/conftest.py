"""What the tests of all rooms share."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine import database, own_postgres, postgres, postgres_programs

__all__ = ["database", "own_postgres", "postgres", "postgres_programs"]


@pytest.fixture(scope="session")
def peer() -> Callable[[str], str]:
    """Path of a program that must be there in CI and may be missing elsewhere (see .ci/peers)."""
    beside = (Path(sys.executable).parent, Path(__file__).parents[1] / ".cache" / "bin")
    path = os.pathsep.join((*map(str, beside), os.environ["PATH"]))

    def find(name: str) -> str:
        found = shutil.which(name, path=path)
        if found is None and os.environ.get("CI") != "true":
            pytest.skip(f"{name} is not installed; `make apt` installs it or says how")
        assert found is not None, f"{name} is not installed"
        return found

    return find


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would every program that it starts; tests send it to some."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the golden files of emitted VHDL anew")
