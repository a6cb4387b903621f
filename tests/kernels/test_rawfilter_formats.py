"""Raw filters over every format: what is left of an object is a valid object of its format with the right frames."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest
import tifffile

from ingest.ports import StreamInfo
from kernels.layout.stored import Found, find_layout
from kernels.rawfilter.bodies import Outs, Range, body_of
from kernels.rawfilter.plan import KEPT, CannotFilter, Plan
from kernels.rawfilter.spool import Spool
from tests.crash.harness import Node, running
from tests.kernels import dectris
from tests.kernels.test_rawfilter import BUCKET, Scene, npy

RNG = np.random.default_rng(7)
SHAPE = (64, 96)
ODD = """
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.n[0] += 1
    return KEEP if index % 2 else DROP
"""
HALVE = """
OUT = ("uint8", (32, 48))

def frame(frame, params, state, index, out, feedback):
    if index % 2 == 0:
        return DROP
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x] = frame[2 * y, 2 * x] & 255
    return REPLACE
"""
MARK = """
OUT = ("same", "same")

def frame(frame, params, state, index, out, feedback):
    if index % 3 == 0:
        return DROP
    if index % 3 == 1:
        return KEEP
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x] = frame[y, x]
    out[0, 0] = 4321
    return REPLACE
"""
NOTHING = """
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    return DROP
"""


def frames(count: int, dtype: str = "<u2", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return RNG.poisson(3, (count, *shape)).astype(dtype)


def hdf5(values: np.ndarray, path: str = "entry/data/data", **options: Any) -> bytes:
    """A file with much beside its frames."""
    target = io.BytesIO()
    with h5py.File(target, "w") as file:
        dataset = file.create_dataset(path, data=values, **options)
        dataset.attrs["units"] = "counts"
        file.attrs["default"] = "entry"
        data = dataset.parent
        data.attrs["NX_class"] = "NXdata"
        data.attrs["axes"] = np.array(["frame", "y", "x"], object)
        file["entry/instrument/detector/same"] = dataset
        file["entry/instrument/detector/mask"] = np.arange(300_000, dtype="<u4")
        file.create_dataset(
            "entry/instrument/detector/flat", data=RNG.random((300, 400)), chunks=(40, 400), **hdf5plugin.Bitshuffle()
        )
        file["entry/title"] = "a title"
        file["entry/names"] = ["x", "longer"]
        file["entry/latest"] = h5py.SoftLink("/entry/title")
        file["entry/elsewhere"] = h5py.ExternalLink("other.h5", "/x")
    return target.getvalue()


def beside(file: h5py.File) -> dict[str, Any]:
    """All that is not the frames, nor about the filter."""
    found: dict[str, Any] = {}

    def note(name: str, thing: Any) -> None:
        if name.endswith(("/data/data", "/same", "frame_index")) or "raw_filter" in name:
            return
        value = np.asarray(thing[()]).tolist() if isinstance(thing, h5py.Dataset) else None
        found[name] = (value, {key: np.asarray(value).tolist() for key, value in thing.attrs.items()})

    file.visititems(note)
    links = {name: file["entry"].get(name, getlink=True) for name in file["entry"]}
    found["links"] = {name: getattr(link, "path", "") for name, link in links.items()}
    return found


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("filterformats"), kernels="on", workers="1") as node:
        yield node


@pytest.fixture
def scene(node: Node) -> Iterator[Scene]:
    scene = Scene(node)
    scene.client.make_buckets()
    assert scene.client.tag(BUCKET, raw_filter="allow", raw_filter_wait_s="3600").ok
    yield scene
    for key in scene.client.listed(BUCKET):
        scene.client.delete(BUCKET, key)
    scene.client.close()


def opened(scene: Scene, key: str) -> h5py.File:
    record, body = scene.filtered(key)
    assert record.length == len(body)
    assert "hiss-raw-filter" in record.metadata
    return h5py.File(io.BytesIO(body))


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (1, *SHAPE), **hdf5plugin.Bitshuffle()},
        {"chunks": (1, 20, 96), "compression": "gzip", "shuffle": True, "fletcher32": True},
        {"chunks": (3, *SHAPE), **hdf5plugin.LZ4()},
        {},
    ],
    ids=["a frame a chunk", "many chunks", "frames share chunks", "contiguous"],
)
def test_hdf5_keeps_its_frames(scene: Scene, options: dict[str, Any]) -> None:
    assert scene.kernel("odd", ODD, raw="kept").ok
    values = frames(31, ">i4")
    body = hdf5(values, **options)
    scene.put("run/a.h5", body)
    file = opened(scene, "run/a.h5")
    data = file["entry/data"]
    np.testing.assert_array_equal(data["data"][:], values[1::2])
    assert data["frame_index"][:].tolist() == list(range(1, 31, 2))
    assert data["data"].attrs["units"] == "counts"
    assert file["entry/instrument/detector/same"] == data["data"]
    assert "15 of 31 frames" in data["raw_filter/data"].asstr()[()]
    with h5py.File(io.BytesIO(body)) as before:
        assert beside(file) == beside(before)
        if options.get("chunks", (0,))[0] == 1:
            old, new = before["entry/data/data"].id, data["data"].id
            for number, frame in enumerate(range(1, 31, 2)):
                assert new.read_direct_chunk((number, 0, 0)) == old.read_direct_chunk((frame, 0, 0))
    record = scene.record("run/a.h5")
    assert record.ledger is not None
    assert (record.ledger.received, record.ledger.dropped, record.ledger.stored) == (31, 16, 15)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("eiger1_bslz4_data_000001.h5", "entry/data/data"), ("aps_nxsas.h5", "entry/data/frames")],
)
def test_real_files(scene: Scene, data_folder: Path, name: str, dataset: str) -> None:
    assert scene.kernel("odd", ODD, raw="kept").ok
    scene.put(f"run/{name}", (data_folder / name).read_bytes())
    file = opened(scene, f"run/{name}")
    with h5py.File(data_folder / name) as before:
        np.testing.assert_array_equal(file[dataset][:], before[dataset][1::2])
        assert file[dataset].dtype == before[dataset].dtype
        names: list[str] = []
        before.visit(names.append)
        assert all(name in file for name in names)
        if name.startswith("aps"):
            np.testing.assert_array_equal(file["entry/data/blank"][:], before["entry/data/blank"][:])
            # The file's dataset of frames is still the one that is found.
            assert scene.record(f"run/{name}").metadata["frame-dataset"] == "/entry/data/frames"


def test_hdf5_of_which_nothing_remains(scene: Scene) -> None:
    assert scene.kernel("nothing", NOTHING, raw="kept").ok
    scene.put("run/a.h5", hdf5(frames(5), chunks=(1, *SHAPE), **hdf5plugin.Bitshuffle()))
    assert opened(scene, "run/a.h5")["entry/data/data"].shape == (0, *SHAPE)


def test_hdf5_with_replaced_frames(scene: Scene) -> None:
    assert scene.kernel("halve", HALVE, raw="kept").ok
    values = frames(30)
    scene.put("run/a.h5", hdf5(values, chunks=(1, *SHAPE), **hdf5plugin.Bitshuffle()))
    data = opened(scene, "run/a.h5")["entry/data"]
    assert data["data"].dtype == np.uint8
    np.testing.assert_array_equal(data["data"][:], values[1::2, ::2, ::2])
    assert data["frame_index"][:].tolist() == list(range(1, 30, 2))


def test_hdf5_of_kept_and_replaced_frames(scene: Scene) -> None:
    assert scene.kernel("mark", MARK, raw="kept").ok
    values = frames(30, "<u2")
    scene.put("run/a.h5", hdf5(values, chunks=(4, *SHAPE), compression="gzip"))
    want = values.copy()
    want[2::3, 0, 0] = 4321
    np.testing.assert_array_equal(opened(scene, "run/a.h5")["entry/data/data"][:], want[np.arange(30) % 3 != 0])


def messages(body: bytes) -> list[Any]:
    stream = io.BytesIO(body)
    decoder = cbor2.CBORDecoder(stream)
    found = []
    while stream.tell() < len(body) and len(found) < 1000:
        found.append(decoder.decode())
    return found


def test_streams_keep_their_messages(scene: Scene) -> None:
    """Stream V2 messages, several .npy: whole messages and arrays go, what stays is what came."""
    assert scene.kernel("odd", ODD, raw="kept").ok
    values = frames(9)
    images = [dectris.image(frame, 100 + number) for number, frame in enumerate(values)]
    begin, end = dectris.start(200, SHAPE), dectris.end()
    scene.put("run/a.cbor", begin + b"".join(images) + end)
    target = b"".join(npy(part) for part in (values[:1], values[1], values[2:6], values[6], values[7:]))
    scene.put("run/b.npy", target)
    record, body = scene.filtered("run/a.cbor")
    assert body == begin + b"".join(images[1::2]) + end
    assert record.ledger is not None
    assert (record.ledger.received, record.ledger.stored) == (9, 4)
    stream = io.BytesIO(scene.filtered("run/b.npy")[1])
    np.testing.assert_array_equal(np.load(stream), values[1])
    np.testing.assert_array_equal(np.load(stream), values[[3, 5]])
    np.testing.assert_array_equal(np.load(stream), values[[7]])
    assert not stream.read()


def test_replaced_frames_of_streams(scene: Scene) -> None:
    assert scene.kernel("halve", HALVE, raw="kept").ok
    values = frames(6)
    scene.put("run/b.npy", npy(values[:3]) + npy(values[3]) + npy(values[4:]))
    cbor = dectris.stream(values)
    scene.put("run/a.cbor", cbor)
    stream = io.BytesIO(scene.filtered("run/b.npy")[1])
    want = values[1::2, ::2, ::2].astype(np.uint8)
    for part in (want[:1], want[1], want[2:]):
        np.testing.assert_array_equal(np.load(stream), part)
    scene.stays("run/a.cbor", cbor)
    assert any("Stream V2" in error for error in scene.errors())


def test_objects_of_one_frame(scene: Scene, data_folder: Path) -> None:
    """All in one run, of one kind of frames, each stored in its own way: none waits for another's batch."""
    assert scene.kernel("nothing", NOTHING, raw="kept").ok
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, frames(1)[0], photometric="minisblack")
    scene.put("run/c.cbor", dectris.image(frames(1)[0], 3))
    scene.put("run/a.tif", tiff.getvalue())
    scene.put("run/b.cbf", (data_folder / "phi_scan_001.cbf").read_bytes())
    scene.put("run/d.h5", hdf5(frames(1)[0]))
    for key in ("run/a.tif", "run/b.cbf", "run/c.cbor"):
        record, body = scene.filtered(key)
        assert body == b""
        assert record.metadata["hiss-raw-frames"] == "0 of 1"
        assert record.raw is not None
    assert opened(scene, "run/d.h5")["entry/data/data"].shape == (0, *SHAPE)


def test_a_file_that_cannot_be_copied_whole_stays(scene: Scene) -> None:
    assert scene.kernel("odd", ODD, raw="kept").ok
    target = io.BytesIO()
    with h5py.File(target, "w", userblock_size=512) as file:
        file["entry/data/data"] = frames(4)
    scene.put("run/a.h5", target.getvalue())
    scene.stays("run/a.h5", target.getvalue())
    assert any("user block" in error for error in scene.errors())


# -- without a node


async def found_in(body: bytes, key: bytes) -> Found:
    async def fetch(offset: int, length: int) -> bytes:
        return body[offset : offset + length]

    async def no_structure() -> Any:
        raise AssertionError

    return await find_layout(StreamInfo("b", key, b"", len(body), "", {}), len(body), fetch, no_structure)


def plan_of(fates: list[int], values: np.ndarray, replaces: str = "") -> Plan:
    return Plan(np.array(fates, np.uint8), replaces, values.dtype.str, values.shape[1:])


@pytest.mark.parametrize("fates", [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 0]])
async def test_pieces_are_as_long_as_they_say(fates: list[int]) -> None:
    values = frames(4, shape=(5, 7))
    left = [frame for frame, fate in zip(values, fates, strict=True) if fate]
    rest = b"\x00half a message"
    for key, body in (
        (b"a.npy", npy(values[:3]) + npy(values[3:]) + rest),
        (b"a.cbor", dectris.stream(values) + b"\xd9"),
    ):
        body_left = body_of(await found_in(body, key), len(body), plan_of(fates, values))
        new = b""
        for piece in body_left.pieces:
            assert not isinstance(piece, Outs)
            new += body[piece.start : piece.stop] if isinstance(piece, Range) else piece
        assert len(new) == body_left.length
        if key == b"a.npy":
            stream = io.BytesIO(new)
            arrays: list[np.ndarray] = []
            while stream.tell() < len(new):
                arrays += list(np.load(stream))
            assert np.array_equal(arrays, left)
        else:
            images = [m for m in messages(new) if m["type"] == "image"]
            assert [m["image_id"] for m in images] == [n for n, fate in enumerate(fates) if fate]
            assert [m["type"] for m in messages(new) if m["type"] != "image"] == ["start", "end"]


async def test_pages_of_a_tiff_stay_together() -> None:
    target = io.BytesIO()
    values = frames(3)
    tifffile.imwrite(target, values, photometric="minisblack")
    found = await found_in(target.getvalue(), b"a.tif")
    with pytest.raises(CannotFilter, match="TIFF"):
        body_of(found, len(target.getvalue()), plan_of([KEPT, 0, KEPT], values))


async def test_a_spool_is_bounded_and_leaves_nothing(tmp_path: Path) -> None:
    values = frames(3)
    with Spool(tmp_path, 1 << 20) as spool:
        places = await spool.add(values.data.cast("B"), values[0].nbytes, 2)
        assert not os.listdir(tmp_path)
        assert [offset for offset, _ in places] == [0, places[0][1], places[0][1] + places[1][1]]
        read = b"".join([bytes(piece) async for piece in spool.read(0, spool.length)])
        assert len(read) == spool.length
    with Spool(tmp_path, 1000) as spool, pytest.raises(CannotFilter, match="1000 bytes"):
        await spool.add(values.data.cast("B"), values[0].nbytes, 2)


def test_the_rewriter_needs_no_filter() -> None:
    """In a process that has never heard of bitshuffle, as a sandbox is: filter parameters come over unchanged."""
    values = frames(3)
    body = hdf5(values, chunks=(1, *SHAPE), **hdf5plugin.Bitshuffle(nelems=512))
    script = """
import io, sys
import numpy as np
from kernels.decode.table import ENTRY
from kernels.layout.dialogue import Ask, Rewrite
from kernels.layout.rewriter import rewrite
body = sys.stdin.buffer.read()
entries = np.array([(0, 5, 77, 0, 0)], ENTRY)
task = Rewrite(Ask(len(body)), 3, 1, "", (64, 96), (1, 64, 96), 1, "")
recorder, path = rewrite(io.BytesIO(body), task, np.array([False, True, False]), entries)
assert path == "/entry/data/data"
for piece in recorder.pieces():
    sys.stdout.buffer.write(piece if isinstance(piece, bytes) else bytes(piece[2]))
"""
    done = subprocess.run([sys.executable, "-c", script], input=body, capture_output=True, timeout=60, check=True)
    with h5py.File(io.BytesIO(done.stdout)) as new, h5py.File(io.BytesIO(body)) as old:
        ours, theirs = (file["entry/data/data"].id.get_create_plist() for file in (new, old))
        assert ours.get_filter(0)[2] == theirs.get_filter(0)[2]
        assert new["entry/data/frame_index"][:].tolist() == [1]
