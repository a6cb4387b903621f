"""What the archive's tests share: versions with real bytes, archives of every kind, and a catalogue held in memory."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest

from archive.checksum import Crc64
from archive.pace import DrainLimits
from archive.process import serve
from archive.targets.base import Target
from archive.targets.files import aligned_buffer
from archive.targets.posix import PosixTarget
from archive.threads import IoThreads
from ingest.catalog import server
from ingest.catalog.client import CatalogClient
from ingest.cluster.members import Members
from ingest.counters import CATALOGUE, DRAIN, Counters
from ingest.paths import NodePaths
from ingest.records import CommitObject, Extent, ObjectRecord, ObjectState


@pytest.fixture
def threads() -> Iterator[IoThreads]:
    pool = IoThreads(4)
    yield pool
    pool.close()


def walk(root: Path) -> list[Path]:
    """Files below ``root``. A drain may be at work: what it removes while we look is not there."""
    return [Path(folder, name) for folder, _, names in os.walk(root) for name in names]


def contents(root: Path, files: list[Path]) -> dict[str, bytes]:
    """Published path -> bytes."""
    found = {}
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            if not (name := path.relative_to(root).as_posix()).startswith(".hiss"):
                found[name] = path.read_bytes()
    return found


@dataclasses.dataclass
class Archive:
    """A target and a way to look at what it stored that does not go through it."""

    target: Target
    again: Callable[[], Target]
    """Another target over the same storage, as a restarted drain would make it."""
    stored: Callable[[], dict[str, bytes]]
    """Published path -> bytes."""
    unfinished: Callable[[], list[str]]
    """Names of staged copies."""
    dead_copy: Callable[[bytes], str]
    """Leave a staged copy as a killed drain does; returns its name."""
    plant: Callable[[str, bytes], None]
    """Put somebody else's file there."""


@pytest.fixture(params=["posix"])
async def archive(request: pytest.FixtureRequest, tmp_path: Path, threads: IoThreads) -> AsyncIterator[Archive]:
    root = tmp_path / "archive"

    def make() -> PosixTarget:
        return PosixTarget(root, threads)

    def stored() -> dict[str, bytes]:
        return contents(root, [path for path in walk(root) if not path.is_symlink()])

    def unfinished() -> list[str]:
        return [path.name for path in walk(root / ".hiss-tmp") if path.suffix == ".part"]

    def plant(path: str, body: bytes) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(body)

    def dead_copy(body: bytes) -> str:
        folder = root / ".hiss-tmp/dead"
        folder.mkdir(parents=True)
        (folder / "lock").touch()
        (folder / "00ff.part").write_bytes(body)
        return "00ff.part"

    target = make()
    await target.open()
    yield Archive(target, make, stored, unfinished, dead_copy, plant)
    await target.close()


@dataclasses.dataclass
class Version:
    record: ObjectRecord
    body: bytes

    async def chunks(self, size_bytes: int = 1 << 20) -> AsyncIterator[memoryview]:
        """As a reader gives them: one buffer, reused, aligned."""
        buffer = aligned_buffer(size_bytes)
        for at in range(0, len(self.body), size_bytes):
            piece = self.body[at : at + size_bytes]
            buffer[: len(piece)] = piece
            yield buffer[: len(piece)]
            buffer[: len(piece)] = bytes(len(piece))


class MakeVersion(Protocol):
    def __call__(self, key: bytes, body: bytes | int = ..., **fields: Any) -> Version: ...


@pytest.fixture
def version() -> MakeVersion:
    """Make a version; a number as the body means that many bytes of noise."""

    def make(key: bytes, body: bytes | int = 100_000, **fields: Any) -> Version:
        data = os.urandom(body) if isinstance(body, int) else body
        crc = Crc64()
        crc.update(memoryview(data))
        record = ObjectRecord(
            **{
                "bucket": "mx-2026",
                "key": key,
                "version_id": "null",
                "object_id": secrets.token_bytes(16),
                "sequence": 1,
                "state": ObjectState.BUFFERED,
                "length": len(data),
                "stored_length": len(data),
                "etag": hashlib.md5(data).hexdigest(),
                "crc64nvme": crc.value,
                "modified_ns": 1_700_000_000_123_456_789,
                "owner": "root",
                "extents": (Extent(0, 0, 1, 1, 0, len(data)),),
            }
            | fields
        )
        return Version(record, data)

    return make


def _load_drain_node() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drain_node", Path(__file__).with_name("drain_node.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["drain_node"] = module
    spec.loader.exec_module(module)
    return module


drain_node = _load_drain_node()
FAST = {
    "poll_s": 0.02,
    "lease_s": 0.5,
    "retry_first_s": 0.05,
    "chunk_bytes": 1 << 20,
    "recall_room_s": 0.1,
    "stop_grace_s": 2.0,
}


class Node:
    """A node without workers: the real catalogue, bodies in files, an archive, and drains that start and stop."""

    def __init__(self, root: Path, catalog: CatalogClient, threads: IoThreads) -> None:
        self.root = root
        self.paths = NodePaths(root)
        self.catalog = catalog
        self.archive = root / "archive"
        self.target = PosixTarget(self.archive, threads)
        self.buffer = drain_node.FileBuffer(root / "bodies")
        self.counters = Counters(None, DRAIN)
        self.usage = (0, 1)
        self._segment = itertools.count(1)
        self._stop = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None

    async def put(self, key: bytes, body: bytes | int = 100_000, bucket: str = "mx-2026") -> ObjectRecord:
        """Commit a version whose body is in the buffer."""
        data = os.urandom(body) if isinstance(body, int) else body
        object_id = secrets.token_bytes(16)
        self.buffer.path(object_id).write_bytes(data)
        crc = Crc64()
        crc.update(memoryview(data))
        extent = Extent(0, 0, next(self._segment), 1, 0, len(data))
        return await self.catalog.commit(
            CommitObject(bucket, key, object_id, len(data), "etag", crc.value, "root", (extent,) if data else ())
        )

    def body(self, record: ObjectRecord) -> bytes:
        return self.buffer.path(record.object_id).read_bytes()

    def archived(self) -> dict[str, bytes]:
        return contents(self.archive, walk(self.archive))

    def count(self, metric: str, *labels: str) -> float:
        return self.counters.cell(metric, *labels).value()

    def start(self, **limits: Any) -> None:
        self._stop.clear()
        self._drain = asyncio.create_task(
            serve(
                catalog=self.catalog,
                target=self.target,
                open_reader=self.buffer.open_reader,
                landing=self.buffer,
                usage=lambda: self.usage,
                snapshots_dir=self.paths.snapshots,
                counters=self.counters,
                limits=DrainLimits(**(FAST | limits)),
                members=Members(self.paths),
                stop=self._stop,
            )
        )

    async def stop(self) -> None:
        drain, self._drain = self._drain, None
        self._stop.set()
        if drain is not None:
            await drain

    async def no_tombstones(self, deadline_s: float = 60.0) -> None:
        """Wait until every delete has been carried out on the archive."""
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while pending := await self.catalog.pending_archive_deletes(10):
            assert loop.time() < end, f"still to remove: {pending}"
            await asyncio.sleep(0.01)

    async def ended(self, deadline_s: float = 60.0) -> None:
        """Wait for the drain to end by itself; raises what ended it."""
        drain, self._drain = self._drain, None
        assert drain is not None
        async with asyncio.timeout(deadline_s):
            await drain

    async def state(self, record: ObjectRecord, wanted: ObjectState, deadline_s: float = 60.0) -> ObjectRecord:
        """Wait until a version is in this state."""
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while (now := await self.catalog.by_id(record.object_id)).state is not wanted:
            assert self._drain is None or not self._drain.done(), await self._drain
            assert loop.time() < end, f"still {now.state}, {now.drain_error!r}"
            await asyncio.sleep(0.005)
        return now


@pytest.fixture
async def node(tmp_path: Path, threads: IoThreads) -> AsyncIterator[Node]:
    """The catalogue serves in this process, so that drains killed in others leave it alone."""
    paths = NodePaths(tmp_path / "node")
    stop, ready = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(server.serve(paths, Counters(None, CATALOGUE), node=0, ready=ready.set, stop=stop))
    await ready.wait()
    async with CatalogClient(paths) as catalog:
        await catalog.create_bucket("mx-2026", "root")
        node = Node(paths.root, catalog, threads)
        yield node
        await node.stop()
    stop.set()
    await serving


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait for a condition, with a deadline instead of a sleep."""

    async def wait(condition: Callable[[], bool], what: str, deadline_s: float = 60.0) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while not condition():
            assert loop.time() < end, f"{what} did not happen in {deadline_s} s"
            await asyncio.sleep(0.005)

    return wait
