"""HDF5 files of every layout, read in a real sandbox: the frames h5py gives, or a reason; never a crash that costs anybody."""

from __future__ import annotations

import io
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.decode import table
from kernels.decode.frames import FrameDecoder
from kernels.formats import NotFrames
from kernels.layout.hdf5 import NotReadable, read_structure
from kernels.layout.index import FrameIndex
from kernels.layout.indexer import read_stored_structure
from kernels.layout.reader import RemoteFile
from kernels.sandbox import SandboxLimits

Read = Callable[..., Awaitable[Any]]
FRAMES = np.random.default_rng(1).poisson(2, (9, 40, 33)).astype("<u2")


@pytest.fixture
def read(store: Any, zygote_socket: str) -> Read:
    """Store a file, have its structure read, see that nothing is left behind."""

    async def begin(body: bytes, **metadata: str) -> Any:
        record = store.put("b", b"x.h5", body, **metadata)
        domain = store.domain("b")
        before = len(os.listdir("/proc/self/fd"))
        found = await read_stored_structure(zygote_socket, store, record, domain, SandboxLimits(populate=False))
        assert domain.live == 0
        assert len(os.listdir("/proc/self/fd")) <= before
        return found

    return begin


def file_of(fill: Callable[[h5py.File], object], **options: Any) -> bytes:
    target = io.BytesIO()
    with h5py.File(target, "w", **options) as file:
        fill(file)
    return target.getvalue()


def with_data(frames: np.ndarray, path: str = "entry/data/data", **options: Any) -> bytes:
    return file_of(lambda file: file.create_dataset(path, data=frames, **options))


def decoded(index: FrameIndex, body: bytes) -> np.ndarray:
    """Every frame, in batches that begin and end inside chunks."""
    decoder = FrameDecoder([body], np.dtype(index.dtype), index.shape)
    found = []
    for first in range(0, index.count, 2):
        count = min(2, index.count - first)
        message = table.pack(0, index.encoding, index.entries(first, count))
        for _, size, frames in decoder.runs(first, count, message):
            assert frames is not None, f"{size} frames from {first} on were not decoded"
            found.append(frames.copy())
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("eiger1_bslz4_data_000001.h5", "entry/data/data"), ("aps_nxsas.h5", "entry/data/frames")],
)
async def test_real_files(read: Read, data_folder: Path, name: str, dataset: str) -> None:
    body = (data_folder / name).read_bytes()
    index = await read(body, frame_dataset=dataset)
    with h5py.File(data_folder / name) as file:
        np.testing.assert_array_equal(decoded(index, body), file[dataset][:])
    assert index.source == f"HDF5 /{dataset}"
    assert (await read(body)).source == index.source


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (1, 40, 33), **hdf5plugin.Bitshuffle()},
        {"chunks": (4, 7, 11), **hdf5plugin.Bitshuffle(nelems=64)},
        {"chunks": (2, 40, 33), **hdf5plugin.LZ4()},
        {"chunks": (3, 16, 33), "compression": "gzip", "shuffle": True},
        {"chunks": (9, 40, 33)},
        {"chunks": (1, 40, 33), "maxshape": (None, 40, 33), "compression": "gzip", "fletcher32": True},
    ],
)
@pytest.mark.parametrize("dtype", ["<u2", ">i4"])
@pytest.mark.parametrize("file_options", [{}, {"libver": "latest"}, {"userblock_size": 512}])
async def test_layouts(read: Read, options: dict[str, Any], dtype: str, file_options: dict[str, Any]) -> None:
    frames = FRAMES.astype(dtype)
    body = file_of(lambda file: file.create_dataset("entry/data/data", data=frames, **options), **file_options)
    index = await read(body)
    assert isinstance(index, FrameIndex), index
    np.testing.assert_array_equal(decoded(index, body), frames)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_chunks_with_holes(data: st.DataObject) -> None:
    """Chunks that do not divide, chunks never written, several frames a chunk, edges. Read in this process: fast."""
    shape = tuple(data.draw(st.integers(1, 12)) for _ in range(data.draw(st.integers(1, 4))))
    chunks = tuple(data.draw(st.integers(1, size + 0)) for size in shape)
    dtype = data.draw(st.sampled_from(["|u1", "<i2", ">u4", "<f4", ">f8"]))
    fill = data.draw(st.sampled_from([0, 7]))
    options = data.draw(
        st.sampled_from(
            [{}, {"compression": "gzip"}, dict(hdf5plugin.Bitshuffle()), dict(hdf5plugin.LZ4()), {"shuffle": True}]
        )
    )
    target = io.BytesIO()
    with h5py.File(target, "w", libver=data.draw(st.sampled_from(["earliest", "latest"]))) as file:
        dataset = file.create_dataset("x", shape, dtype, chunks=chunks, fillvalue=fill, **options)
        for _ in range(data.draw(st.integers(0, 3))):
            corner = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
            dataset[tuple(slice(start, start + data.draw(st.integers(1, 6))) for start in corner)] = data.draw(
                st.integers(0, 200)
            )
        want = dataset[()]
    body = target.getvalue()
    structure, entries = read_structure(io.BytesIO(body), "", None)
    assert structure.origin < 0
    index = FrameIndex(structure.encoding, structure.shape, "", structure.frames)
    index.fill(entries, len(body))
    np.testing.assert_array_equal(decoded(index, body).reshape(want.shape), want)


def nexus(file: h5py.File) -> None:
    """A file whose default plot is neither the largest nor the first dataset."""
    file.attrs["default"] = "run"
    file.create_group("run").attrs["default"] = "plot"
    file.create_group("run/plot").attrs["signal"] = "counts"
    file["run/plot/counts"] = FRAMES[:3]
    file["run/plot/other"] = FRAMES
    file["a/names"] = ["x", "y"]


async def test_which_dataset(read: Read) -> None:
    body = file_of(nexus)
    assert (await read(body)).source == "HDF5 /run/plot/counts"
    assert (await read(body, frame_dataset="/run/plot/other")).count == 9

    def usual(file: h5py.File) -> None:
        file["big"] = np.concatenate([FRAMES, FRAMES])
        file["entry/data/data_000002"] = FRAMES[:2]
        file["entry/data/data_000001"] = FRAMES[:4]

    assert (await read(file_of(usual))).source == "HDF5 /entry/data/data_000001"

    def plain(file: h5py.File) -> None:
        file["z/line"] = np.arange(10**5)
        file["z/stack"] = FRAMES
        file["z/again"] = file["z"]
        file["z/self"] = h5py.SoftLink("/z")
        file["small"] = FRAMES[:1]

    assert (await read(file_of(plain))).source == "HDF5 /z/stack"
    image = await read(file_of(lambda file: file.create_dataset("only", data=FRAMES[0])))
    assert (image.count, image.shape) == (1, (40, 33))
    lines = await read(with_data(FRAMES[0]), frame_shape="33")
    assert (lines.count, lines.shape) == (40, (33,))


def external(file: h5py.File) -> None:
    file["entry/data/data_000001"] = h5py.ExternalLink("/etc/passwd", "/entry/data/data")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(FRAMES.shape, "<u2")
    layout[:] = h5py.VirtualSource("other.h5", "x", FRAMES.shape)
    file.create_virtual_dataset("entry/data/data", layout)


def external_storage(file: h5py.File) -> None:
    file.create_dataset("x", FRAMES.shape, "<u2", external=[("/etc/passwd", 0, FRAMES.nbytes)])


def circle(file: h5py.File) -> None:
    file["a"] = h5py.SoftLink("/b")
    file["b"] = h5py.SoftLink("/a")


def strange(file: h5py.File) -> None:
    file["text"] = "hello"
    file["complex"] = np.zeros((3, 3, 3), np.complex64)
    file["flags"] = np.zeros((3, 3, 3), bool)


@pytest.mark.parametrize(
    ("body", "metadata", "reason"),
    [
        (file_of(external), {}, "external link"),
        (file_of(virtual), {}, "virtual dataset"),
        (file_of(external_storage), {}, "external files"),
        (file_of(circle), {"frame_dataset": "a"}, "more than 16 links"),
        (file_of(strange), {}, "no numeric dataset"),
        (file_of(strange), {"frame_dataset": "text"}, "not a plain number"),
        (file_of(strange), {"frame_dataset": "nowhere/else"}, "not in the file"),
        (with_data(FRAMES), {"frame_dataset": "entry/data"}, "not a dataset"),
        (with_data(FRAMES), {"frame_shape": "5,5"}, "frame-shape"),
        (with_data(FRAMES, chunks=(1, 40, 33), **hdf5plugin.Zstd()), {}, "filter 32015"),
        (with_data(FRAMES, chunks=(1, 40, 33), **hdf5plugin.Bitshuffle(cname="zstd")), {}, "bitshuffle"),
        (with_data(FRAMES[:0]), {}, "empty"),
        (with_data(FRAMES)[:-5000], {}, ""),
        (b"\x89HDF\r\n\x1a\n" + bytes(5000), {}, "HDF5 cannot read it"),
        (b"", {}, "HDF5 cannot read it"),
    ],
)
async def test_what_is_not_read_says_why(read: Read, body: bytes, metadata: dict[str, str], reason: str) -> None:
    found = await read(body, **metadata)
    assert isinstance(found, NotFrames)
    assert reason in found.reason


async def test_huge_claims(read: Read) -> None:
    def claims(file: h5py.File) -> None:
        file.create_dataset("frames", (10**12, 1000, 1000), "<u2", chunks=(1, 1000, 1000))

    found = await read(file_of(claims))
    assert isinstance(found, NotFrames)
    assert "chunks, more than" in found.reason

    def wide(file: h5py.File) -> None:
        file.create_dataset("frames", (2, 16384, 65536), "<u2", chunks=(1, 16384, 65536))

    found = await read(file_of(wide))
    assert isinstance(found, NotFrames)
    assert "decoded at once" in found.reason


SEEDS = [
    with_data(FRAMES, chunks=(2, 20, 33), compression="gzip"),
    file_of(
        lambda file: file.create_dataset("x", data=FRAMES, chunks=(1, 40, 33), maxshape=(None, 40, 33)), libver="latest"
    ),
    file_of(nexus),
]


async def test_flipped_bytes(read: Read) -> None:
    """Structure flipped at random: an index, or a reason. A crash is the child's, and is a reason, too."""
    draw = np.random.default_rng(7)
    for turn in range(40):
        body = bytearray(SEEDS[turn % len(SEEDS)])
        places = draw.integers(0, min(len(body), 6000), draw.integers(1, 12))
        for place in places:
            body[place] = draw.integers(0, 256)
        found = await read(bytes(body))
        assert isinstance(found, FrameIndex | NotFrames)
        if isinstance(found, FrameIndex):
            decoder = FrameDecoder([bytes(body)], np.dtype(found.dtype), found.shape)
            count = min(found.count, 4)
            message = table.pack(0, found.encoding, found.entries(0, count)[: table.ENTRIES_MAX])
            assert sum(size for _, size, _ in decoder.runs(0, count, message)) == count


async def test_the_index_of_many_chunks(read: Read) -> None:
    frames = np.arange(20000 * 4, dtype="<u2").reshape(20000, 2, 2)
    body = with_data(frames, chunks=(1, 2, 2))
    index = await read(body)
    assert index.count == 20000
    np.testing.assert_array_equal(decoded(index, body), frames)


def test_a_remote_file_is_a_file() -> None:
    body = os.urandom(1_000_000)
    file = RemoteFile(len(body), lambda start, length: body[start : start + length])
    copy = io.BytesIO(body)
    draw = np.random.default_rng(3)
    for _ in range(200):
        offset, count = int(draw.integers(0, len(body))), int(draw.integers(1, 300_000))
        file.seek(offset)
        copy.seek(offset)
        buffer = bytearray(count)
        done = file.readinto(buffer)
        assert buffer[:done] == copy.read(count)
        assert file.tell() == copy.tell()


def test_reading_a_structure_raises_what_it_says() -> None:
    with pytest.raises(NotReadable):
        read_structure(io.BytesIO(file_of(strange)), "", None)
