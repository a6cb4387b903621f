"""What the archive's tests share: versions with real bytes, archives of every kind, and a catalogue held in memory."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from archive.checksum import Crc64
from archive.targets.base import Target
from archive.targets.files import aligned_buffer
from archive.targets.posix import PosixTarget
from archive.threads import IoThreads
from ingest.records import Extent, ObjectRecord, ObjectState


@pytest.fixture
def threads() -> Iterator[IoThreads]:
    pool = IoThreads(4)
    yield pool
    pool.close()


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
        files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        relative = {path.relative_to(root).as_posix(): path for path in files}
        return {name: path.read_bytes() for name, path in relative.items() if not name.startswith(".hiss")}

    def unfinished() -> list[str]:
        return [path.name for path in (root / ".hiss-tmp").rglob("*.part")]

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


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait for a condition, with a deadline instead of a sleep."""

    async def wait(condition: Callable[[], bool], what: str, deadline_s: float = 10.0) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while not condition():
            assert loop.time() < end, f"{what} did not happen in {deadline_s} s"
            await asyncio.sleep(0.005)

    return wait
