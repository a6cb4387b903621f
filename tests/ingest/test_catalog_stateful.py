"""The catalogue against a dictionary: any order of puts, deletes, uploads, drains, restarts and crashes."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ingest.catalog import fsck, server
from ingest.catalog.batching import Limits
from ingest.catalog.client import CatalogClient
from ingest.counters import CATALOGUE, Counters
from ingest.errors import NoSuchKey
from ingest.paths import NodePaths
from ingest.records import (
    ArchiveCopy,
    CommitObject,
    CommitPart,
    CompletedPart,
    CompleteUpload,
    DeleteObject,
    Durability,
    Extent,
    ObjectRecord,
    ObjectState,
    PartRecord,
    UploadRecord,
)

T = TypeVar("T")
KEYS = st.sampled_from([b"a", b"a/1", b"a/2", b"b", b"\xff"])


class Node:
    """Server and client in one loop, on a folder that can be copied under their feet like by a power switch."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.generation = 0
        self.runner = asyncio.Runner()
        self.start()

    @property
    def paths(self) -> NodePaths:
        return NodePaths(self.home / str(self.generation))

    def run(self, work: Coroutine[None, None, T]) -> T:
        return self.runner.run(work)

    def start(self) -> None:
        self.run(self._start())

    async def _start(self) -> None:
        self._stop, ready = asyncio.Event(), asyncio.Event()
        limits = Limits(journal_bytes=1 << 19, part_bytes_min=1)
        self._task = asyncio.create_task(
            server.serve(self.paths, Counters(None, CATALOGUE), node=0, ready=ready.set, stop=self._stop, limits=limits)
        )
        await ready.wait()
        self.client = CatalogClient(self.paths, slot=0)
        await self.client.connect()

    def stop(self) -> None:
        self.run(self._end())

    async def _end(self) -> None:
        await self.client.close()
        self._stop.set()
        await self._task

    def crash(self) -> None:
        """Go on from the files as they are now, which nobody has closed or written back."""
        before = self.paths.root
        self.generation += 1
        shutil.copytree(before, self.paths.root, ignore=shutil.ignore_patterns("*.sock", "spare.*"))
        self.run(self._end())  # the old folder
        shutil.rmtree(before)
        self.start()

    def close(self) -> None:
        self.runner.close()
        shutil.rmtree(self.home)


class Catalogue(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.node = Node()
        self.run = self.node.run
        self.model: dict[bytes, ObjectRecord] = {}
        self.upload: UploadRecord | None = None
        self.parts: dict[int, PartRecord] = {}
        self.places = iter(range(1, 1 << 20))
        self.run(self.node.client.create_bucket("b", "root"))

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        self.node.stop()
        report = fsck.fsck(self.node.paths.root)
        kinds = {"journal", "index", "reference", "overlap", "accounting"}  # there are no segment files here
        assert [problem for problem in report.problems if problem.kind in kinds] == []
        assert report.objects == len(self.model)
        self.node.close()

    def extent(self, length: int) -> Extent:
        place = next(self.places)
        return Extent(0, place % 2, place >> 6, 1, (place & 63) << 20, length)

    @rule(key=KEYS, length=st.integers(1, 9000), memory=st.booleans())
    def put(self, key: bytes, length: int, memory: bool) -> None:
        request = CommitObject(
            "b", key, secrets.token_bytes(16), length, secrets.token_hex(16), 1, "root", (self.extent(length),),
            durability=Durability.MEMORY if memory else Durability.DISK,
        )  # fmt: skip
        self.model[key] = self.run(self.node.client.commit(request))

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        (deleted,) = self.run(self.node.client.delete([DeleteObject("b", key)]))
        assert deleted.existed == (self.model.pop(key, None) is not None)  # type: ignore[union-attr]

    @precondition(lambda self: self.upload is None)
    @rule(key=KEYS)
    def create_upload(self, key: bytes) -> None:
        self.upload, self.parts = UploadRecord("b", key, secrets.token_hex(8), "root", 1), {}
        self.run(self.node.client.create_upload(self.upload))

    @precondition(lambda self: self.upload is not None)
    @rule(number=st.integers(1, 4), length=st.integers(1, 9000))
    def put_part(self, number: int, length: int) -> None:
        assert self.upload is not None
        part = PartRecord(number, length, secrets.token_hex(16), 1, extents=(self.extent(length),))
        request = CommitPart("b", self.upload.key, self.upload.upload_id, part, secrets.token_bytes(16))
        self.parts[number] = self.run(self.node.client.commit_part(request))

    @precondition(lambda self: self.upload is not None and self.parts)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        assert self.upload is not None
        numbers = sorted(data.draw(st.sets(st.sampled_from(sorted(self.parts)), min_size=1)))
        linked = [self.parts[number] for number in numbers]
        request = CompleteUpload(
            "b", self.upload.key, self.upload.upload_id, secrets.token_bytes(16),
            tuple(CompletedPart(part.number, part.etag) for part in linked),
            secrets.token_hex(16), 1, sum(part.length for part in linked),
        )  # fmt: skip
        record = self.run(self.node.client.complete_upload(request))
        assert record.extents == tuple(extent for part in linked for extent in part.extents)
        self.model[record.key] = record
        self.upload = None

    @precondition(lambda self: self.upload is not None)
    @rule()
    def abort(self) -> None:
        assert self.upload is not None
        self.run(self.node.client.abort_upload("b", self.upload.key, self.upload.upload_id))
        self.upload = None

    @rule(fail=st.booleans())
    def drain(self, fail: bool) -> None:
        for record in self.run(self.node.client.claim_drain(10, 60)):
            assert self.model[record.key].object_id == record.object_id
            if fail:
                self.run(self.node.client.drain_failed(record.object_id, "no", 0))
            else:
                copy = ArchiveCopy("posix", record.key.hex(), 1, 1)
                self.run(self.node.client.drained(record.object_id, copy))
            self.model[record.key] = self.run(self.node.client.by_id(record.object_id))

    @rule(recall=st.booleans())
    def evict(self, recall: bool) -> None:
        for record in self.run(self.node.client.evictable(10)):
            self.run(self.node.client.evicted(record.object_id))
            if recall:
                self.run(self.node.client.request_recall(record.object_id))
                extents = (self.extent(record.length),)
                self.run(self.node.client.recalled(record.object_id, extents))
            self.model[record.key] = self.run(self.node.client.by_id(record.object_id))
            assert (self.model[record.key].state is ObjectState.ARCHIVED) == recall

    @rule()
    def snapshot(self) -> None:
        self.run(self.node.client.snapshot())

    @rule()
    def restart(self) -> None:
        self.node.stop()
        self.node.start()

    @rule()
    def crash(self) -> None:
        self.node.crash()

    @invariant()
    def the_catalogue_shows_what_the_model_holds(self) -> None:
        if not hasattr(self, "node"):
            return
        found, truncated = self.run(self.node.client.list_objects("b"))
        assert not truncated
        assert [row.key for row in found] == sorted(self.model)
        for key, record in self.model.items():
            assert self.run(self.node.client.head("b", key)) == record
        if b"a" not in self.model:
            with pytest.raises(NoSuchKey):
                self.run(self.node.client.head("b", b"a"))


TestCatalogue = Catalogue.TestCase
TestCatalogue.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
