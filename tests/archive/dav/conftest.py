"""A WebDAV port on loopback: the real HTTP server and service over a catalogue and a buffer held by the test."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import hashlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from archive.dav.service import DavService
from gateway.access import sight_maker
from ingest.errors import NoSuchBucket, NoSuchKey
from ingest.records import BucketRecord, Grant, ListedObject, ObjectRecord, ObjectState, UserRecord
from s3api.auth.rules import Gate
from s3api.http.limits import HttpLimits
from s3api.http.listener import Server

ROOT = ("root", "root-secret")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], Any]]:
    return {"uvloop": uvloop.new_event_loop}


class HeldCatalog:
    """The reading half of the ``Catalog`` port over sorted dictionaries; counts what would cost a recall."""

    def __init__(self) -> None:
        self.held: dict[str, dict[bytes, ObjectRecord]] = {}
        self.sorted: dict[str, list[bytes]] = {}
        self.recalls = 0
        self.fail_after: int | None = None
        """Listings that still work; later ones raise."""

    def put(self, bucket: str, key: bytes, body: bytes = b"", **fields: Any) -> ObjectRecord:
        values = {
            "object_id": secrets.token_bytes(16), "state": ObjectState.BUFFERED, "length": len(body),
            "stored_length": len(body), "etag": hashlib.sha256(body).hexdigest()[:32] + "-1",
            "modified_ns": time.time_ns(), "version_id": "null", "sequence": 1, "crc64nvme": 0, "owner": "root",
        }  # fmt: skip
        record = ObjectRecord(bucket=bucket, key=key, **{**values, **fields})
        self.held.setdefault(bucket, {})[key] = record
        self.sorted[bucket] = sorted(self.held[bucket])
        return record

    async def fresh(self) -> None:
        """Nobody else writes."""

    async def buckets(self) -> Sequence[BucketRecord]:
        return [await self.bucket(name) for name in sorted(self.held)]

    async def bucket(self, name: str) -> BucketRecord:
        if name not in self.held:
            raise NoSuchBucket(name)
        return BucketRecord(name, "root", 1_700_000_000 * 10**9)

    def generation(self) -> int:
        return len(self.held)

    async def head(self, bucket: str, key: bytes, version_id: str | None = None) -> ObjectRecord:
        if bucket not in self.held:
            raise NoSuchBucket(bucket)
        if key not in self.held[bucket]:
            raise NoSuchKey(key)
        return self.held[bucket][key]

    async def list_objects(
        self, bucket: str, *, prefix: bytes = b"", after: bytes = b"", delimiter: bytes = b"", limit: int = 1000
    ) -> tuple[Sequence[ListedObject], bool]:
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise RuntimeError("the catalogue broke")
        if bucket not in self.held:
            raise NoSuchBucket(bucket)
        keys = self.sorted[bucket]
        position = bisect.bisect_left(keys, prefix)
        if after:
            position = max(position, bisect.bisect_right(keys, after))
            if delimiter and after.endswith(delimiter) and after != prefix:
                position = max(position, bisect.bisect_left(keys, after[:-1] + bytes([after[-1] + 1])))
        rows: list[ListedObject] = []
        while position < len(keys) and keys[position].startswith(prefix):
            if len(rows) == limit:
                return rows, True
            cut = keys[position].find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                rows.append(ListedObject(keys[position], self.held[bucket][keys[position]]))
                position += 1
            else:
                common = keys[position][: cut + 1]
                rows.append(ListedObject(common, None))
                position = bisect.bisect_left(keys, common[:-1] + bytes([common[-1] + 1]))
        return rows, False


@dataclasses.dataclass
class Piece:
    fd: int
    offset: int
    length: int


class Reader:
    def __init__(self, plane: HeldPlane, path: Path, start: int, stop: int) -> None:
        self._plane = plane
        self._fd = os.open(path, os.O_RDONLY)
        # Two pieces, as an object of two extents has.
        middle = (start + stop) // 2
        cuts = [(start, middle), (middle, stop)]
        self.pieces = [Piece(self._fd, first, last - first) for first, last in cuts if last > first]

    async def __aenter__(self) -> Reader:
        self._plane.open_readers += 1
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._plane.open_readers -= 1
        os.close(self._fd)


class HeldPlane:
    """The reading half of the ``DataPlane``: every object is one file."""

    def __init__(self, folder: Path) -> None:
        self.catalog = HeldCatalog()
        self.opened = 0
        self.open_readers = 0
        self.refuse: list[Exception] = []
        """Raised by the next openings, in turn."""
        self.gate: asyncio.Event | None = None
        self._folder = folder

    def put(self, bucket: str, key: bytes, body: bytes = b"", **fields: Any) -> ObjectRecord:
        record = self.catalog.put(bucket, key, body, **fields)
        (self._folder / record.object_id.hex()).write_bytes(body)
        return record

    async def open_reader(self, record: ObjectRecord, start: int, stop: int) -> Reader:
        self.opened += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.refuse:
            raise self.refuse.pop(0)
        return Reader(self, self._folder / record.object_id.hex(), start, stop)


@dataclasses.dataclass
class DavPort:
    url: str
    plane: HeldPlane
    users: dict[str, tuple[str, UserRecord]]
    service: DavService

    def add_user(self, name: str, *grants: tuple[str, str]) -> tuple[str, str]:
        """A user who may read these (bucket glob, prefix); returns the key pair."""
        record = UserRecord(name, name, name, b"", tuple(Grant(*grant) for grant in grants))
        self.users[name] = (f"{name}-secret", record)
        return name, f"{name}-secret"

    def client(self, auth: tuple[str, str] | None = ROOT) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, auth=auth, timeout=60)

    async def run(self, *command: str, timeout_s: float = 60.0) -> tuple[int, bytes, bytes]:
        """Run a peer to its end; (exit code, stdout, stderr)."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            out, error = await asyncio.wait_for(process.communicate(), timeout_s)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out, error


@pytest.fixture
async def dav(tmp_path: Path) -> AsyncIterator[DavPort]:
    plane = HeldPlane(tmp_path)
    root = UserRecord("root", "root", ROOT[0], b"", root=True)
    users = {ROOT[0]: (ROOT[1], root)}

    async def authenticate(access_key: str, secret_key: str) -> UserRecord | None:
        secret, user = users.get(access_key, ("", None))
        return user if secret == secret_key else None

    service = DavService(plane, authenticate, sight_maker(Gate(plane.catalog), time.time))  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server([listener], service, HttpLimits())
    server.start()
    yield DavPort(f"http://127.0.0.1:{listener.getsockname()[1]}", plane, users, service)
    await server.close(2.0)
    service.close()
    listener.close()
    assert plane.open_readers == 0
