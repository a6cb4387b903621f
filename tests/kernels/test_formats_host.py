"""Every format through the kernel host with real sandboxes: the product is what numpy says of the same frames."""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import tifffile

from ingest.counters import Counters
from ingest.ports import FrameScanner, StreamInfo
from ingest.records import CommitObject, ObjectRecord
from kernels.clearance import Clearance
from kernels.host import HostLimits, KernelHost
from kernels.sandbox import SandboxLimits
from kernels.standing import Standing, Verdict
from tests.kernels import dectris

BUCKET = "scan42"
SUM = """
STATE = {"total": ("int64", (4, 6), "sum"), "sums": ("int64", (64,), "sum"), "most": ("int64", (1,), "max")}

def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = np.int64(frame[y, x])
            n += value
            state.total[y % 4, x % 6] += value
            state.most[0] = max(state.most[0], value)
    state.sums[index % 64] += n
    emit(feedback, 1, n)
    return KEEP if n % 2 else DROP
"""
FRAMES = np.random.default_rng(1).poisson(3, (9, 40, 52)).astype("<u2")
Until = Callable[..., Any]


@pytest.fixture
async def host(store: Any, feedback: Any, zygote_socket: str) -> AsyncIterator[KernelHost]:
    sandbox = SandboxLimits(batch_timeout_s=2.0, frame_timeout_s=0.2, populate=False)
    limits = HostLimits(sweep_s=0.2, grace_s=0.0, sandbox=sandbox)
    clearance = Clearance(zygote_socket, standing=Standing(Verdict.CONFINED))
    host = KernelHost(store, store, zygote_socket, feedback, Counters(None, 0), 0, limits, clearance)
    store.put(BUCKET, b"_kernels/sum.py", SUM.encode())
    await host.start()
    try:
        yield host
    finally:
        await asyncio.wait_for(host.close(), 60)


class Room:
    """Puts bodies and looks at what comes of them."""

    def __init__(self, host: KernelHost, store: Any, feedback: Any, until: Until) -> None:
        self.host, self.store, self.feedback, self.until = host, store, feedback, until

    async def put(self, key: bytes, body: bytes, **metadata: str) -> ObjectRecord:
        """As a small body: reduced once it is stored."""
        await self.host.prepare(BUCKET)
        record = self.store.put(BUCKET, key, body, **metadata)
        self.store.owed[record.object_id, "sum"] = 0
        self.host.catch_up(record, ("sum",))
        return record

    async def stream(self, key: bytes, body: bytes, step: int, room: int, **metadata: str) -> ObjectRecord:
        """As a body that arrives ``step`` bytes at a time in spans of ``room`` bytes, cut where the frames say."""
        await self.host.prepare(BUCKET)
        names = {name.replace("_", "-"): value for name, value in metadata.items()}
        info = StreamInfo(BUCKET, key, secrets.token_bytes(16), len(body), "", names)
        reduction = self.host.open(info)
        assert reduction is not None
        answer = reduction.sniff(memoryview(body[:64]), complete=False)
        frames = trailing = 0
        if not isinstance(answer, int | None):
            scan: FrameScanner = answer
            low, told, at = 0, 0, 0
            while at < len(body):
                high = min(at + step, len(body))
                scan.feed(memoryview(body)[at:high])
                at = high
                first = max(told, scan.first_from(low))
                if first > told:
                    reduction.lagging(told, first - told)
                if scan.frames > first:
                    region, offset = reduction.domain.place(body[low:at])
                    batch = self.store.batch_type(
                        reduction.domain, region, offset, first, scan.frames - first, position=low
                    )
                    reduction.offer(batch)
                told = scan.frames
                if at - low > room:
                    low = at
            frames, trailing = scan.frames, len(body) - scan.settled
        request = CommitObject(
            bucket=BUCKET, key=key, object_id=info.object_id, length=len(body), etag="", crc64nvme=0, owner="tester",
            extents=(), metadata=names, ledger=reduction.ledger(frames, trailing), reductions=reduction.kernels,
        )  # fmt: skip
        record = self.store.commit_now(request, body)
        reduction.committed(record)
        return record

    async def product(self, key: bytes, timeout_s: float = 60.0) -> h5py.File:
        name = (BUCKET, b"_products/sum/" + key + b".nxs")
        await self.until(lambda: name in self.store.objects, timeout_s)
        return h5py.File(io.BytesIO(self.store.bodies[self.store.objects[name].object_id]))

    async def check(self, key: bytes, frames: np.ndarray, *, total: int | None = None) -> None:
        with await self.product(key) as file:
            assert "error" not in file["entry"], file["entry/error"].asstr()[()]
            sums = frames.astype(np.int64).sum(axis=(1, 2))
            np.testing.assert_array_equal(file["entry/verdicts"], sums % 2)
            expected = np.zeros(64, np.int64)
            np.add.at(expected, np.arange(len(sums)) % 64, sums)
            np.testing.assert_array_equal(file["entry/state/sums"], expected)
            assert file["entry/state/most"][0] == frames.max()
            assert file["entry/frames/received"][()] == len(frames)
            assert file["entry/frames/unreduced"][()] == 0

    async def error(self, key: bytes) -> str:
        with await self.product(key) as file:
            return str(file["entry/error"].asstr()[()])


@pytest.fixture
def room(host: KernelHost, store: Any, feedback: Any, until: Until) -> Room:
    return Room(host, store, feedback, until)


def hdf5(frames: np.ndarray, path: str = "entry/data/data", **options: Any) -> bytes:
    target = io.BytesIO()
    with h5py.File(target, "w") as file:
        file.create_dataset(path, data=frames, **options)
    return target.getvalue()


def npy(*arrays: np.ndarray) -> bytes:
    target = io.BytesIO()
    for array in arrays:
        np.save(target, array)
    return target.getvalue()


async def test_real_hdf5_files(room: Room, data_folder: Path) -> None:
    for name, dataset in (("eiger1_bslz4_data_000001.h5", "entry/data/data"), ("aps_nxsas.h5", "entry/data/frames")):
        key = f"real/{name}".encode()
        await room.put(key, (data_folder / name).read_bytes())
        with h5py.File(data_folder / name) as file:
            await room.check(key, file[dataset][:])
        with await room.product(key) as product:
            assert product["entry/state/total"][:].sum() in (5_022_958_546, 4_809_206_181)


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (1, 40, 52), **hdf5plugin.Bitshuffle()},
        {"chunks": (4, 13, 52), **hdf5plugin.LZ4()},
        {"chunks": (2, 40, 20), "compression": "gzip", "shuffle": True},
        {},
    ],
)
async def test_hdf5(room: Room, options: dict[str, Any]) -> None:
    for dtype in ("<u2", ">u4"):
        await room.put(b"a/" + dtype.encode(), hdf5(FRAMES.astype(dtype), **options))
        await room.check(b"a/" + dtype.encode(), FRAMES)


@pytest.mark.parametrize(("step", "span"), [(100_000_000, 100_000_000), (700, 100_000), (5000, 20_000)])
@pytest.mark.parametrize("algorithm", ["bslz4", "lz4", "none"])
async def test_cbor_while_it_arrives(room: Room, step: int, span: int, algorithm: str) -> None:
    body = dectris.stream(FRAMES, algorithm)
    record = await room.stream(b"a/series", body, step, span)
    await room.check(b"a/series", FRAMES)
    # Frames that had to be read back come later; each is told once.
    assert sorted(event.frame for event in room.feedback.events) == list(range(9))
    ledger = room.store.ledgers.get(record.object_id, record.ledger)
    assert (ledger.received, ledger.gaps, ledger.trailing_bytes) == (9, (), 0)


async def test_cbor_names_what_is_missing(room: Room) -> None:
    body = dectris.stream(FRAMES, lost=(2, 7, 8))
    await room.put(b"a/stored", body)
    record = await room.stream(b"a/live", body, 3000, 10_000)
    for key in (b"a/stored", b"a/live"):
        await room.check(key, FRAMES[[0, 1, 3, 4, 5, 6]])
        with await room.product(key) as file:
            assert file["entry/frames/gaps"][:].tolist() == [[2, 1], [7, 2]]
    assert record.ledger.gaps == ((2, 1), (7, 2))


async def test_a_broken_image_costs_itself(room: Room) -> None:
    images = [bytearray(dectris.image(frame, number)) for number, frame in enumerate(FRAMES)]
    images[4][len(images[4]) // 2 :][:1]
    # Behind the element size, the byte string's head and the framing: the length of the first block.
    block = images[4].find(b"bslz4") + 5 + 1 + 3 + 12
    images[4][block : block + 4] = b"\xff" * 4
    body = dectris.start(9, (40, 52)) + b"".join(bytes(image) for image in images) + dectris.end()
    await room.stream(b"a/series", body, 4000, 100_000)
    with await room.product(b"a/series") as file:
        verdicts = file["entry/verdicts"][:]
        assert verdicts[4] == 255
        good = np.delete(np.arange(9), 4)
        np.testing.assert_array_equal(verdicts[good], FRAMES[good].astype(np.int64).sum(axis=(1, 2)) % 2)
        assert file["entry/frames/unreadable"][:].tolist() == [[4, 1]]
        assert file["entry/frames/unreduced"][()] == 1


async def test_cbor_that_breaks_off_keeps_raw_and_says_why(room: Room) -> None:
    body = dectris.stream(FRAMES)[:-50] + b"\xff" * 100
    await room.stream(b"a/broken", body, 3000, 10_000)
    assert "byte" in await room.error(b"a/broken")
    assert room.host.counters.cell("hiss_kernel_errors_total", "format").value() >= 1


async def test_several_npy(room: Room) -> None:
    body = npy(FRAMES[:4], FRAMES[4:5], FRAMES[5:])
    await room.put(b"a/stored.npy", body)
    await room.stream(b"a/live.npy", body, 1000, 9_000)
    await room.check(b"a/stored.npy", FRAMES)
    await room.check(b"a/live.npy", FRAMES)
    await room.put(b"a/images.npy", npy(*FRAMES))
    await room.check(b"a/images.npy", FRAMES)


async def test_multi_page_tiff(room: Room) -> None:
    for name, options in {
        "plain": {},
        "deflate": {"compression": "zlib", "rowsperstrip": 7},
        "tiles": {"tile": (16, 16), "compression": "zlib", "predictor": 2},
        "big": {"bigtiff": True, "byteorder": ">"},
    }.items():
        target = io.BytesIO()
        with tifffile.TiffWriter(
            target, bigtiff=options.pop("bigtiff", False), byteorder=options.pop("byteorder", "<")
        ) as writer:
            for frame in FRAMES:
                writer.write(frame, contiguous=False, metadata=None, photometric="minisblack", **options)
        key = f"a/{name}.tif".encode()
        await room.put(key, target.getvalue())
        await room.check(key, FRAMES)


@pytest.mark.parametrize(
    ("key", "body", "metadata", "reason"),
    [
        (b"a.bin", b"what is this", {}, "no frame geometry"),
        (b"a.h5", b"what is this", {}, "HDF5 cannot read it"),
        (b"a.cbf", b"###CBF: VERSION 1.5\r\nnothing", {}, "no binary section"),
        (b"a.tif", b"II*\x00\xff\xff\xff\x00", {}, "points to byte"),
        (b"a.cbor", dectris.start(4, (3, 4)) + dectris.end(), {}, "no image"),
        (b"a.bin", FRAMES.tobytes(), {"frame_format": "video"}, "none of raw"),
    ],
)
async def test_what_is_no_frames_says_why(
    room: Room, key: bytes, body: bytes, metadata: dict[str, str], reason: str
) -> None:
    await room.put(key, body, **metadata)
    assert reason in await room.error(key)


async def test_a_format_that_metadata_name(room: Room) -> None:
    await room.put(b"a/x", dectris.stream(FRAMES), frame_format="CBOR")
    await room.check(b"a/x", FRAMES)
    await room.put(b"a/y.h5", hdf5(FRAMES[:3], "one"), frame_dataset="one")
    await room.check(b"a/y.h5", FRAMES[:3])
