"""PostgreSQL for tests: the fixtures.

In: Debian's package (see .ci/peers); 15 or newer. Out: ``postgres`` (one server for the session, to be left running),
``own_postgres`` (one for each file, to be mistreated) and ``database`` (the DSN of a fresh database of ``postgres``). Always
holds: what ``bench.engine`` says; every server is gone when its fixture ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.engine import VERSION_MIN, Engine, programs, serving

__all__ = ["Engine", "database", "own_postgres", "postgres", "postgres_programs", "programs", "serving"]


@pytest.fixture(scope="session")
def postgres_programs(peer: Callable[[str], str]) -> Path:
    """Folder of PostgreSQL's programs; the test skips without them, or fails in CI."""
    found = programs()
    if found is None and os.environ.get("CI") != "true":
        pytest.skip(f"PostgreSQL {VERSION_MIN} or newer is not installed; `make apt` installs it or says how")
    assert found is not None, f"PostgreSQL {VERSION_MIN} or newer is not installed"
    peer("setpriv")
    return found


@pytest.fixture(scope="session")
def postgres(postgres_programs: Path) -> Iterator[Engine]:
    """One running server for all tests of a session that leave it running."""
    with serving(Engine(bin_folder=postgres_programs)) as engine:
        yield engine


@pytest.fixture(scope="module")
def own_postgres(postgres_programs: Path) -> Iterator[Engine]:
    """A running server for one file, which may stop, freeze and kill it (and starts it again)."""
    with serving(Engine(bin_folder=postgres_programs)) as engine:
        yield engine


@pytest.fixture
def database(postgres: Engine) -> str:
    """DSN of a fresh database of the session's server."""
    return postgres.fresh()
