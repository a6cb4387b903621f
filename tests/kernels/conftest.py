"""Peers for the kernel host: memory regions as the arena makes them, and a store that behaves like buffer and catalogue.

The sandboxes, the zygote, numba and HDF5 are the real ones. ``Store`` keeps bodies in a dict and speaks the same contracts
(``LandingPad`` and the part of ``Catalog`` that the kernel room uses), so that a test can hold, lose or overwrite a
version at the very moment it wants to.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import itertools
import mmap
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from ingest.counters import Counters
from ingest.errors import IngestError, MembersGone, StaleVersion
from ingest.ports import Domain, FeedbackEvent
from ingest.records import (
    BucketRecord,
    CommitObject,
    FrameLedger,
    ListedObject,
    ObjectRecord,
    ObjectState,
    PartialOf,
    ReductionJob,
    Reservation,
    RunProductRecord,
)
from kernels.clearance import Clearance
from kernels.host import KernelHost
from kernels.standing import Standing, Verdict
from tests.kernels.hostile import Launch, launching
from tests.kernels.hosting import Node, limits
from tests.kernels.sandboxes import Start, starting

REGION_BYTES = 8 << 20
F_SEAL_FUTURE_WRITE = 0x0010
CLEARED = Standing(Verdict.CONFINED)


class Regions:
    """Domain of one bucket: two sealed memfds, mapped writable only here; a bump allocator that starts anew when empty."""

    def __init__(self, bucket: str, count: int = 2) -> None:
        self.bucket = bucket
        self.region_bytes = REGION_BYTES
        self.region_fds: list[int] = []
        self.maps: list[mmap.mmap] = []
        self.holds = 0
        self._used = [0] * count
        self._live = [0] * count
        for index in range(count):
            fd = os.memfd_create(f"region-{index}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, REGION_BYTES)
            self.maps.append(mmap.mmap(fd, REGION_BYTES))
            seals = F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            self.region_fds.append(fd)

    def hold(self) -> None:
        self.holds += 1

    def drop(self) -> None:
        self.holds -= 1
        assert self.holds >= 0

    def place(self, data: bytes | memoryview) -> tuple[int, int]:
        """Copy ``data`` into some region: (region, offset). IngestError when full."""
        for index, used in enumerate(self._used):
            start = -(-used // 4096) * 4096
            if start + len(data) <= REGION_BYTES:
                self.maps[index][start : start + len(data)] = bytes(data)
                self._used[index] = start + len(data)
                self._live[index] += 1
                return index, start
        raise IngestError("no span is free")

    def free(self, region: int) -> None:
        self._live[region] -= 1
        assert self._live[region] >= 0
        if self._live[region] == 0:
            self._used[region] = 0

    @property
    def live(self) -> int:
        return sum(self._live)

    def close(self) -> None:
        for fd, memory in zip(self.region_fds, self.maps, strict=True):
            memory.close()
            os.close(fd)


@dataclasses.dataclass
class Loaded:
    regions: Regions
    region: int
    offset: int
    length: int
    releases: int = 0

    def release(self) -> None:
        self.releases += 1
        assert self.releases == 1
        self.regions.free(self.region)


@dataclasses.dataclass
class Batch:
    """Live frames in a region."""

    regions: Regions
    region: int
    offset: int
    first_frame: int
    count: int
    position: int = 0
    revoked: bool = False
    sent: bool = False
    releases: int = 0

    def dispatched(self) -> bool:
        self.sent = not self.revoked
        return self.sent

    def release(self) -> None:
        self.releases += 1
        assert self.releases == 1
        self.regions.free(self.region)


class Store:
    """LandingPad and Catalog over dicts; ``before_*`` hooks run inside the calls."""

    batch_type = Batch

    def __init__(self) -> None:
        self.objects: dict[tuple[str, bytes], ObjectRecord] = {}
        self.bodies: dict[bytes, bytes] = {}
        self.owed: dict[tuple[bytes, str], int] = {}
        self.failures: list[tuple[bytes, str, str, bool]] = []
        self.waits: dict[tuple[bytes, str], str] = {}
        """What an owed reduction waits for."""
        self.ledgers: dict[bytes, FrameLedger] = {}
        self.domains: dict[str, Regions] = {}
        self.domains_max = 4
        self.loads = 0
        self.recalled: set[bytes] = set()
        self.before_load: Callable[[ObjectRecord], None] = lambda record: None
        self.before_store: Callable[[CommitObject], None] = lambda request: None
        self._generation = 1
        self._sequence = itertools.count(1)

    # -- LandingPad

    def domain(self, bucket: str) -> Domain | None:
        found = self.domains.get(bucket)
        if found is None:
            if len(self.domains) >= self.domains_max:
                idle = next((name for name, regions in self.domains.items() if regions.holds == 0), None)
                if idle is None:
                    return None
                self.domains.pop(idle).close()
            found = self.domains[bucket] = Regions(bucket)
        return found

    async def load(self, record: ObjectRecord, start: int, length: int, domain: Domain) -> Loaded:
        await asyncio.sleep(0)
        self.before_load(record)
        self._live(record.object_id)
        self.loads += 1
        assert isinstance(domain, Regions)
        region, offset = domain.place(self.bodies[record.object_id][start : start + length])
        return Loaded(domain, region, offset, length)

    async def store(self, request: CommitObject, body: memoryview | bytes, lifetime: str = "product") -> ObjectRecord:
        self.before_store(request)
        if request.reduces is not None:
            self._live(request.reduces[0])
            self.owed.pop(request.reduces, None)
        if request.partial is not None:
            self._pay(request.partial)
        return self.commit_now(request, bytes(body))

    def _pay(self, partial: PartialOf) -> None:
        identities = [(member.object_id, partial.kernel) for member in partial.members]
        if partial.batch and (gone := [one.hex() for one, kernel in identities if (one, kernel) not in self.owed]):
            raise MembersGone(" ".join(gone))
        for identity in identities:
            self.owed.pop(identity, None)
        self.ledgers.update({m.object_id: m.ledger for m in partial.members if m.ledger is not None})

    async def released_reductions(self, slot: int) -> bool:
        return False

    async def run_products_due(self, limit: int) -> Sequence[RunProductRecord]:
        return []

    async def buckets(self) -> Sequence[BucketRecord]:
        return []

    # -- Catalog

    def commit_now(self, request: CommitObject, body: bytes) -> ObjectRecord:
        record = ObjectRecord(
            bucket=request.bucket,
            key=request.key,
            version_id="null",
            object_id=request.object_id,
            sequence=next(self._sequence),
            state=ObjectState.BUFFERED,
            length=len(body),
            stored_length=len(body),
            etag="0123456789abcdef0123456789abcdef-1",
            crc64nvme=0x1234,
            modified_ns=time.time_ns(),
            owner=request.owner,
            headers=request.headers,
            metadata=request.metadata,
            ledger=request.ledger,
            geometry=request.geometry,
            epochs=request.epochs,
        )
        self.objects[request.bucket, request.key] = record
        self.bodies[request.object_id] = body
        self.owed.update({(request.object_id, name): 0 for name in request.reductions})
        if request.key.startswith(b"_kernels/"):
            self._generation += 1
        return record

    def put(self, bucket: str, key: bytes, body: bytes, **metadata: str) -> ObjectRecord:
        request = CommitObject(
            bucket=bucket,
            key=key,
            object_id=secrets.token_bytes(16),
            length=len(body),
            etag="",
            crc64nvme=0,
            owner="tester",
            extents=(),
            metadata={name.replace("_", "-"): value for name, value in metadata.items()},
        )
        return self.commit_now(request, body)

    def delete(self, bucket: str, key: bytes) -> None:
        del self.objects[bucket, key]

    def _live(self, object_id: bytes) -> ObjectRecord:
        for record in self.objects.values():
            if record.object_id == object_id:
                return record
        raise StaleVersion(object_id.hex())

    def generation(self) -> int:
        return self._generation

    def reserved(self) -> Sequence[Reservation]:
        return ()

    def now_ns(self) -> int:
        return time.time_ns()

    async def list_objects(
        self, bucket: str, *, prefix: bytes = b"", after: bytes = b"", delimiter: bytes = b"", limit: int = 1000
    ) -> tuple[Sequence[ListedObject], bool]:
        rows = [
            ListedObject(key, record)
            for (name, key), record in sorted(self.objects.items())
            if name == bucket and key.startswith(prefix)
        ]
        return rows[:limit], len(rows) > limit

    async def amend_ledger(self, object_id: bytes, ledger: FrameLedger) -> None:
        self._live(object_id)
        self.ledgers[object_id] = ledger

    async def reduction_failed(
        self, object_id: bytes, kernel: str, error: str, *, give_up: bool, counted: bool = True
    ) -> None:
        self._live(object_id)
        if not counted:
            self.waits[object_id, kernel] = error
            return
        self.failures.append((object_id, kernel, error, give_up))
        if give_up:
            self.owed.pop((object_id, kernel), None)
        elif (object_id, kernel) in self.owed:
            self.owed[object_id, kernel] += 1

    async def filters_due(self, slot: int, limit: int, gone: Sequence[int] = ()) -> tuple[()]:
        return ()

    async def pending_reductions(
        self, slot: int | None, limit: int, gone: Sequence[int] = ()
    ) -> Sequence[ReductionJob]:
        return [
            ReductionJob(kernel, attempts, self._live(object_id))
            for (object_id, kernel), attempts in list(self.owed.items())[:limit]
        ]

    async def request_recall(self, object_id: bytes) -> ObjectRecord:
        self.recalled.add(object_id)
        return self._live(object_id)


@dataclasses.dataclass
class Feedback:
    """A ``FeedbackSink`` that remembers."""

    events: list[FeedbackEvent] = dataclasses.field(default_factory=list)
    streams: list[tuple[str, str, tuple[str, ...]]] = dataclasses.field(default_factory=list)
    """(opened or closed, bucket, kernels), in order."""

    def publish(self, events: Sequence[FeedbackEvent]) -> None:
        self.events.extend(events)

    def stream_opened(self, bucket: str, kernels: Sequence[str]) -> None:
        self.streams.append(("opened", bucket, tuple(kernels)))

    def stream_closed(self, bucket: str, kernels: Sequence[str]) -> None:
        self.streams.append(("closed", bucket, tuple(kernels)))


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    for regions in store.domains.values():
        assert regions.live == 0, "a batch was never released"
        assert regions.holds == 0, "a hold on a domain was never dropped"
        regions.close()


@pytest.fixture
def feedback() -> Feedback:
    return Feedback()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Files of real detectors; skips where they are not there."""
    here = Path(os.environ.get("HISS_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not here.exists():
        pytest.skip("real detector data is not here")
    return here


@pytest.fixture(scope="session")
def aps_frames(data_folder: Path) -> np.ndarray:
    """Ten real Pilatus frames, (10, 195, 487) int32."""
    import h5py

    with h5py.File(data_folder / "aps_nxsas.h5") as file:
        return np.ascontiguousarray(file["entry/data/frames"][:])


async def until(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    """Poll until ``condition()`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.002)


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., object]:
    return until


@contextlib.contextmanager
def running_zygote(folder: Path, *launcher: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """A real fork server that answers, started as ``python *launcher``; its socket."""
    path = folder / "zygote.sock"
    ready, said = os.pipe()
    options = ["--socket", str(path), "--parent", str(os.getpid()), "--ready-fd", str(said)]
    with (folder / "zygote.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *launcher, *options],
            cwd=Path(__file__).parents[2],
            env=environment,
            stderr=log,
            pass_fds=[said],
        )
    os.close(said)
    try:
        with os.fdopen(ready, "rb") as pipe:
            assert pipe.read(1), f"the zygote did not start: {(folder / 'zygote.log').read_text()}"
        yield str(path)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def zygote_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The fork server of all tests of the room."""
    with running_zygote(tmp_path_factory.mktemp("run"), "-m", "kernels.zygote") as path:
        yield path


_AS_NOBODY = """
import ctypes, os, sys
from kernels import forkserver, warmup, zygote
warmup.warm()  # the interpreter's own folder may be closed to nobody
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as after an exec
zygote.main(sys.argv[1:])
"""


@pytest.fixture(scope="session")
def unprivileged_zygote_socket() -> Iterator[str]:
    """A fork server without any privilege: run as nobody where the tests run as root."""
    if os.geteuid() != 0:
        pytest.skip("the other zygote is unprivileged already")
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="hiss-test-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        with running_zygote(folder, "-c", _AS_NOBODY, environment=environment) as path:
            yield path


@pytest.fixture
def region() -> Iterator[Regions]:
    """One sealed region on its own."""
    regions = Regions("bucket", count=1)
    yield regions
    regions.close()


@pytest.fixture
async def start(zygote_socket: str, region: Regions, until: Callable[..., object]) -> AsyncIterator[Start]:
    async with starting(zygote_socket, region, until) as begin:
        yield begin


@pytest.fixture
async def launch(zygote_socket: str, region: Regions, until: Callable[..., object]) -> AsyncIterator[Launch]:
    async with launching(zygote_socket, region, until) as begin:
        yield begin


# -- a kernel host over them


@pytest.fixture
def make_node(
    store: object, feedback: object, zygote_socket: str
) -> Callable[..., contextlib.AbstractAsyncContextManager[Node]]:
    @contextlib.asynccontextmanager
    async def make(strikes_file: Path | None = None, **changes: object) -> AsyncIterator[Node]:
        counters = Counters(None, 0)
        host = KernelHost(
            store,
            store,
            zygote_socket,
            feedback,
            counters,
            0,
            limits(**changes),
            Clearance(zygote_socket, standing=CLEARED),
            strikes_file,
        )
        await host.start()
        try:
            yield Node(host, store, feedback, counters)
        finally:
            await asyncio.wait_for(host.close(), 60)

    return make


@pytest.fixture(name="node")
async def node_fixture(make_node: Callable[..., contextlib.AbstractAsyncContextManager[Node]]) -> AsyncIterator[Node]:
    async with make_node() as node:
        yield node


@pytest.fixture(name="frames")
def frames_fixture() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 10, (40, 8, 12), dtype=np.uint16)
