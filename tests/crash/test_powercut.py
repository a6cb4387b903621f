"""A power cut at any moment of a node's work: whatever legal state the disk is in, nothing acknowledged is lost.

A real node works under a shim that records every write, flush and change of names in one order with what the client was
told. Then, for many moments, a state that the disk may be in is built in a folder, the catalogue recovers on it, and
every object whose 200 lies before the moment is read back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from awscrt import checksums

from ingest.catalog import fsck, server
from ingest.catalog.batching import Limits
from ingest.catalog.client import CatalogClient
from ingest.counters import CATALOGUE, Counters
from ingest.errors import IngestError, NoSuchBucket, NoSuchKey
from ingest.paths import NodePaths
from ingest.reader import SegmentReader, StaleExtent
from ingest.records import ObjectRecord, ObjectState
from tests.crash.harness import MIB, S3, Answer, Body, Node, running, until
from tests.crash.powercut import Log, Marks, build_shim, may_be


class Work:
    """A short life of a node, with a mark for every request before it is sent and after it was answered."""

    def __init__(self, node: Node, marks: Marks) -> None:
        self._node = node
        self._client = S3(node)
        self._marks = marks

    def all(self) -> None:
        for number in range(8):
            self.put("disk", f"small{number}", Body(number, 3000 + number))
        self.put("disk", "large", Body(7, 5 * MIB + 13))
        self.put("memory", "large", Body(8, 3 * MIB))
        self.put("disk", "large", Body(9, 2 * MIB))
        self.put("disk", "small1", Body(10, 300_000))
        self.delete("disk", "small2")
        self.put("disk", "small2", Body(11, 77))
        self.delete("disk", "small3")
        self.multipart("disk", "parts", (Body(1000, 5 * MIB), Body(1000 + 5 * MIB, MIB + 5)))
        self.put("memory", "small", Body(12, 4000))
        until(lambda: all(record.archive for record in self._node.records()), "everything is drained", 90)
        self.rotate()
        for number in range(4):
            self.put("disk", f"late{number}", Body(20 + number, 40_000 + number))
        # Segments die, are recycled and written anew.
        for number in range(4):
            self.put("disk", f"dying{number}", Body(30 + number, 7 * MIB))
        for number in range(4):
            self.delete("disk", f"dying{number}")
        time.sleep(0.3)
        for number in range(4):
            self.put("disk", f"again{number}", Body(40 + number, 4 * MIB))
        self._client.close()

    def put(self, bucket: str, key: str, body: Body) -> None:
        self._told(bucket, key, (body.length, body.crc), lambda: self._client.put(bucket, key, body.view))

    def delete(self, bucket: str, key: str) -> None:
        self._told(bucket, key, None, lambda: self._client.delete(bucket, key))

    def multipart(self, bucket: str, key: str, parts: tuple[Body, ...]) -> None:
        path = f"/{bucket}/{quote(key)}"
        found = re.search(rb"<UploadId>([^<]+)<", self._client.request("POST", path, "uploads=").body)
        assert found is not None
        upload = quote(found[1].decode(), safe="")
        listed = ""
        for number, part in enumerate(parts, 1):
            answer = self._client.request("PUT", path, f"partNumber={number}&uploadId={upload}", part.view)
            assert answer.ok, answer
            listed += f"<Part><PartNumber>{number}</PartNumber><ETag>{answer.headers['etag']}</ETag></Part>"
        document = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        whole = Body(parts[0].offset, sum(part.length for part in parts))

        def complete() -> Answer:
            return self._client.request("POST", path, f"uploadId={upload}", document)

        self._told(bucket, key, (whole.length, whole.crc), complete)

    def rotate(self) -> None:
        """Fill the journal: it goes on in a new file, and a snapshot is taken. Tags are the largest entries."""
        journals = {path.name for path in self._node.paths.journal.glob("*.jrnl")}
        for count in range(1000):
            tags = "".join(f"<Tag><Key>t{n}</Key><Value>{'€' * 250}{count:05}</Value></Tag>" for n in range(49))
            document = f"<Tagging><TagSet>{tags}</TagSet></Tagging>".encode()
            assert self._client.request("PUT", "/disk", "tagging=", document).ok
            if count % 20 == 0 and {path.name for path in self._node.paths.journal.glob("*.jrnl")} != journals:
                break
        until(lambda: list(self._node.paths.snapshots.glob("0*.sqlite")), "a snapshot is published")

    def _told(self, bucket: str, key: str, content: tuple[int, int] | None, ask: Callable[[], Answer]) -> None:
        self._marks.write(what="asked", bucket=bucket, key=key, content=content)
        answer = ask()
        assert answer.ok, answer
        self._marks.write(what="told", bucket=bucket, key=key, content=content)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def record(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Log]:
    """The recorded life of a node: ``record(deaf_to=…)`` reads its log."""
    folder = tmp_path_factory.mktemp("recorded")
    log = folder / "shim.log"
    environ = {
        "LD_PRELOAD": str(shim),
        "HISS_TEST_SHIM_ROOT": str(folder / "data"),
        "HISS_TEST_SHIM_LOG": str(log),
    }
    with running(folder, environ, workers="1") as node:
        marks = Marks(log)
        Work(node, marks).all()
        marks.close()
        node.stop()
    return functools.partial(Log, log, folder / "data")


@pytest.fixture(scope="module")
def recorded(record: Callable[..., Log]) -> Log:
    return record()


class Survivor:
    """A state of the disk, recovered by the catalogue and judged against what was told."""

    def __init__(self, root: Path) -> None:
        self.paths = NodePaths(root)

    async def complaints(self, allowed: dict[tuple[str, str], list[tuple[int, int] | None]]) -> list[str]:
        found: list[str] = []
        stop, ready = asyncio.Event(), asyncio.Event()
        counters = Counters(None, CATALOGUE)
        limits = Limits(journal_bytes=1 << 20)
        serving = asyncio.create_task(
            server.serve(self.paths, counters, node=0, ready=ready.set, stop=stop, limits=limits)
        )
        started = asyncio.create_task(ready.wait())
        await asyncio.wait((serving, started), return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        try:
            if serving.done():
                return [f"the catalogue does not start: {serving.exception()!r}"]
            with ThreadPoolExecutor(2) as executor:
                async with CatalogClient(self.paths) as client:
                    for (bucket, key), contents in allowed.items():
                        seen = await self._look(client, executor, bucket, key)
                        if seen not in contents:
                            found.append(f"{bucket}/{key} is {seen}, it may be {contents}")
        finally:
            stop.set()
            with contextlib.suppress(Exception):
                await serving
        report = fsck.fsck(self.paths.root, payload=True)
        return [*found, *(str(problem) for problem in report.problems)]

    async def _look(self, client: CatalogClient, executor: ThreadPoolExecutor, bucket: str, key: str) -> object:
        try:
            record = await client.head(bucket, key.encode())
        except (NoSuchKey, NoSuchBucket):
            return None
        if record.archive is not None:
            self._look_at_copy(record)
        if record.state is ObjectState.EVICTED:
            return record.length, record.crc64nvme
        try:
            crc = 0
            opened = await SegmentReader.open(self.paths, executor, record.extents, 0, record.length)
            async with opened as reader:
                async for chunk in reader.chunks(1 << 20):
                    crc = checksums.crc64nvme(chunk, crc)
        except (IngestError, StaleExtent, OSError) as error:
            return f"unreadable: {error!r}"
        return record.length, crc

    def _look_at_copy(self, record: ObjectRecord) -> None:
        assert record.archive is not None
        content = (self.paths.archive / record.archive.path).read_bytes()
        assert checksums.crc64nvme(content) == record.crc64nvme, f"the archive copy of {record.key!r} is damaged"


def judge(log: Log, folder: Path, cut: int, rng: random.Random, keep: float) -> list[str]:
    """Complaints about one state."""
    log.materialise(folder, cut, rng, keep=keep)
    try:
        return asyncio.run(Survivor(folder).complaints(may_be(log, cut, {"disk"})))
    except (AssertionError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]


def moments(log: Log, rng: random.Random, count: int) -> list[tuple[int, float]]:
    """(cut, how much unflushed work survives): right after every acknowledgement with nothing, then anywhere."""
    told = [(at + 1, 0.0) for at, mark in log.marks if mark["what"] == "told"]
    anywhere = [(rng.choice(log.moments), rng.choice((0.0, 0.3, 0.7, 1.0))) for _ in range(count)]
    return [*told, *anywhere]


STATES_MIN = 20


def run(log: Log, folder: Path, seed: int, count: int, budget_s: float) -> int:
    """As many states as the time allows, STATES_MIN in any case; how many."""
    rng = random.Random(seed)
    end, judged = time.monotonic() + budget_s, 0
    states = moments(log, rng, count)
    rng.shuffle(states)
    for cut, keep in states:
        if time.monotonic() > end and judged >= STATES_MIN:
            break
        state = random.Random(f"{seed}.{cut}.{keep}")
        complaints = judge(log, folder / "state", cut, state, keep)
        assert not complaints, f"seed {seed}, cut before record {cut} of {log.records}, keep {keep}:\n" + "\n".join(
            complaints
        )
        judged += 1
    return judged


def test_the_power_may_go_at_any_moment(recorded: Log, tmp_path: Path, seed: int) -> None:
    judged = run(recorded, tmp_path, seed, 400, 20.0)
    print(f"{judged} states of {len(recorded.moments)} moments")
    assert judged >= STATES_MIN


@pytest.mark.parametrize("deaf_to", [".seg", ".jrnl", "/journal", "/segments/00"])
def test_a_missing_flush_would_be_found(record: Callable[..., Log], tmp_path: Path, seed: int, deaf_to: str) -> None:
    """The judge judged: without the flushes of these files and folders something acknowledged is lost."""
    log = record(deaf_to=deaf_to)
    told = [at + 1 for at, mark in log.marks if mark["what"] == "told" and mark["content"] is not None]
    rng = random.Random(seed)
    assert any(judge(log, tmp_path / "state", cut, rng, 0.0) for cut in told[: -len(told) : -4])


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_more_moments(recorded: Log, tmp_path: Path, seed: int) -> None:
    budget_s = float(os.environ.get("HISS_TEST_SOAK_S", "600"))
    judged = run(recorded, tmp_path, seed + int(time.time()), 100_000, budget_s)
    print(f"{judged} states of {len(recorded.moments)} moments")
