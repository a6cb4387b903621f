"""Fixtures of the buffer's tests: a node's folder and a real catalogue process."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ingest.catalog import server
from ingest.catalog.client import CatalogClient
from ingest.catalog.committer import Limits
from ingest.counters import CATALOGUE, Counters
from ingest.paths import NodePaths

START_TIMEOUT_S = 20.0


def _catalogue_process(root: Path, limits: Limits, ready: object) -> None:
    server.run(NodePaths(root), Counters(None, CATALOGUE), node=0, ready=ready.set, limits=limits)  # type: ignore[attr-defined]


class CatalogueProcess:
    """A real catalogue process that a test may stop, kill and start again."""

    def __init__(self, paths: NodePaths, limits: Limits) -> None:
        self.paths = paths
        self._limits = limits
        self._process: BaseProcess | None = None

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        ready = context.Event()
        self._process = context.Process(target=_catalogue_process, args=(self.paths.root, self._limits, ready))
        self._process.start()
        assert ready.wait(START_TIMEOUT_S), "the catalogue process did not start"

    def _end(self, number: signal.Signals) -> int | None:
        if self._process is None:
            return None
        process, self._process = self._process, None
        if process.pid is not None and process.is_alive():
            process.kill() if number is signal.SIGKILL else process.terminate()
        process.join(START_TIMEOUT_S)
        code = process.exitcode
        process.close()
        return code

    def stop(self) -> int | None:
        return self._end(signal.SIGTERM)

    def kill(self) -> int | None:
        return self._end(signal.SIGKILL)


@pytest.fixture
def paths(tmp_path: Path) -> NodePaths:
    paths = NodePaths(tmp_path / "node")
    paths.create()
    return paths


@pytest.fixture
def make_catalogue() -> Iterator[Callable[..., CatalogueProcess]]:
    made: list[CatalogueProcess] = []

    def make(paths: NodePaths, **limits: int | float) -> CatalogueProcess:
        process = CatalogueProcess(paths, Limits(**limits))  # type: ignore[arg-type]
        made.append(process)
        process.start()
        return process

    yield make
    for process in made:
        process.kill()


@pytest.fixture
def catalogue(paths: NodePaths, make_catalogue: Callable[..., CatalogueProcess]) -> CatalogueProcess:
    return make_catalogue(paths, part_bytes_min=100, journal_bytes=1 << 20)


@pytest.fixture
async def client(paths: NodePaths, catalogue: CatalogueProcess) -> AsyncIterator[CatalogClient]:
    async with CatalogClient(paths, slot=0) as client:
        yield client
