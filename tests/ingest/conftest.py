"""Fixtures of the buffer's tests: a node's folder, a real catalogue process, or the same server inside the test's loop."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import multiprocessing.synchronize
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ingest import crashpoints
from ingest.catalog import server
from ingest.catalog.batching import Limits
from ingest.catalog.client import CatalogClient
from ingest.cluster import node as cluster_node
from ingest.cluster.join import Joining
from ingest.cluster.members import Load
from ingest.counters import CATALOGUE, Counters
from ingest.journal import FileOps
from ingest.paths import NodePaths
from ingest.records import CommitObject, Extent

START_TIMEOUT_S = 20.0

# Fork from a process that has imported the server once: a start then costs what a start costs, not 0.7 s of imports.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["ingest.catalog.server", "alembic.command", "sqlalchemy.pool"])


def _catalogue_process(
    root: Path, limits: Limits, ready: multiprocessing.synchronize.Event, crashpoint: tuple[str, int]
) -> None:
    # The server of forks was started with another environment, so HISS_CRASHPOINT would not reach this process.
    crashpoints._name, crashpoints._left = crashpoint

    def serving(stop: asyncio.Event) -> Coroutine[None, None, None]:
        counters = Counters(None, CATALOGUE)
        return server.serve(NodePaths(root), counters, node=0, ready=ready.set, stop=stop, limits=limits)

    server.run(serving)


class CatalogueProcess:
    """A real catalogue process that a test may stop, kill and start again."""

    def __init__(self, paths: NodePaths, limits: Limits) -> None:
        self.paths = paths
        self._limits = limits
        self._process: BaseProcess | None = None

    def start(self, *, crashpoint: str = "", passage: int = 1) -> None:
        ready = _context.Event()
        arguments = (self.paths.root, self._limits, ready, (crashpoint, passage))
        self._process = _context.Process(target=_catalogue_process, args=arguments, daemon=True)
        self._process.start()
        assert ready.wait(START_TIMEOUT_S), "the catalogue process did not start"

    def _end(self, number: signal.Signals | None) -> int | None:
        if self._process is None:
            return None
        process, self._process = self._process, None
        if number is not None and process.is_alive():
            process.kill() if number is signal.SIGKILL else process.terminate()
        process.join(START_TIMEOUT_S)
        code = process.exitcode
        process.close()
        return code

    def stop(self) -> int | None:
        return self._end(signal.SIGTERM)

    def kill(self) -> int | None:
        return self._end(signal.SIGKILL)

    def died(self) -> int | None:
        """Wait for the process to end by itself; its exit code."""
        return self._end(None)


Serving = Callable[..., AbstractAsyncContextManager[None]]
CommitOf = Callable[..., CommitObject]


@pytest.fixture
def paths(tmp_path: Path) -> NodePaths:
    paths = NodePaths(tmp_path / "node")
    paths.create()
    return paths


@pytest.fixture
def make_catalogue() -> Iterator[Callable[..., CatalogueProcess]]:
    made: list[CatalogueProcess] = []

    def make(paths: NodePaths, **limits: int | float) -> CatalogueProcess:
        """``limits``: fields of ``committer.Limits``."""
        process = CatalogueProcess(paths, Limits(**limits))  # type: ignore[arg-type]
        made.append(process)
        process.start()
        return process

    yield make
    for process in made:
        process.kill()


BOTH_ENGINES = ("test_catalog", "test_catalog_versions", "test_catalog_multipart")
"""Files whose tests are the contract of ``ingest.ports.Catalog``: they run on a node alone and on a node of a cluster."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine_url" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in BOTH_ENGINES:
        metafunc.parametrize("engine_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def engine_url(request: pytest.FixtureRequest) -> str:
    """Address of a cluster's engine; empty for a node alone."""
    return str(request.getfixturevalue("database")) if getattr(request, "param", "") == "postgresql" else ""


@pytest.fixture
def serving(paths: NodePaths, engine_url: str) -> Serving:
    """``async with serving(ops=…, **limits)``: the same server and socket, inside the test's own loop."""

    @contextlib.asynccontextmanager
    async def serve(
        ops: FileOps | None = None, counters: Counters | None = None, **limits: int | float
    ) -> AsyncIterator[None]:
        stop, ready = asyncio.Event(), asyncio.Event()
        values = Limits(**({"part_bytes_min": 100, "journal_bytes": 1 << 20} | limits))  # type: ignore[arg-type]
        counters = counters or Counters(None, CATALOGUE)
        if engine_url:
            options = cluster_node.NodeOptions(engine_url, Joining("one", "key"))
            work = cluster_node.serve(paths, counters, options, load=Load, ready=ready.set, stop=stop, limits=values)
        else:
            work = server.serve(paths, counters, node=0, ready=ready.set, stop=stop, limits=values, ops=ops)
        task = asyncio.create_task(work)
        started = asyncio.create_task(ready.wait())
        await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        try:
            yield
        finally:
            stop.set()
            await task

    return serve


@pytest.fixture
async def client(paths: NodePaths, serving: Serving) -> AsyncIterator[CatalogClient]:
    async with serving(), CatalogClient(paths, slot=0) as client:
        yield client


@pytest.fixture
def commit_of() -> CommitOf:
    """A commit of ``length`` bytes (default 10) in an extent of its own."""
    places = iter(range(1, 1 << 30))

    def make(bucket: str, key: bytes, **fields: object) -> CommitObject:
        length = fields.get("length", 10)
        place = next(places)
        values: dict[str, object] = {
            "object_id": secrets.token_bytes(16),
            "length": length,
            "etag": f"{place:032x}",
            "crc64nvme": 2**64 - place,
            "owner": "root",
            "extents": (Extent(0, 0, place >> 10, 1, (place & 1023) << 20, length),),  # type: ignore[arg-type]
        }
        return CommitObject(bucket=bucket, key=key, **(values | fields))  # type: ignore[arg-type]

    return make
