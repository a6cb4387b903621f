"""Decoders against the libraries that wrote the bytes, and against bytes that nobody should have written."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fabio.compression
import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kernels.decode import table
from kernels.decode.chunk import Undecodable, decode
from kernels.decode.encoding import Encoding, Filter
from kernels.decode.frames import FrameDecoder
from kernels.layout.hdf5 import filter_of

WRITERS: dict[str, dict[str, Any]] = {
    "bslz4": dict(hdf5plugin.Bitshuffle()),
    "bslz4, blocks of 64": dict(hdf5plugin.Bitshuffle(nelems=64)),
    "bitshuffle": dict(hdf5plugin.Bitshuffle(cname="none")),
    "lz4": dict(hdf5plugin.LZ4()),
    "lz4, blocks of 1000": dict(hdf5plugin.LZ4(nbytes=1000)),
    "gzip": {"compression": "gzip"},
    "gzip and shuffle": {"compression": "gzip", "shuffle": True},
    "gzip and a checksum": {"compression": "gzip", "fletcher32": True},
    "shuffle": {"shuffle": True},
    "nothing": {},
}


def written(
    frames: np.ndarray, chunks: tuple[int, ...], **options: Any
) -> tuple[Encoding, dict[int, tuple[bytes, int]]]:
    """What HDF5 stores for ``frames``: the encoding, and each chunk with its filter mask by its number."""
    with h5py.File(io.BytesIO(), "w") as file:
        dataset = file.create_dataset("x", data=frames, chunks=chunks, **options)
        creation = dataset.id.get_create_plist()
        filters = tuple(
            filter_of(*creation.get_filter(n)[::2], frames.itemsize) for n in range(creation.get_nfilters())
        )
        grid = [-(-size // part) for size, part in zip(frames.shape, chunks, strict=True)]
        stored = {}
        for number, place in enumerate(itertools.product(*map(range, grid))):
            mask, data = dataset.id.read_direct_chunk(tuple(p * c for p, c in zip(place, chunks, strict=True)))
            stored[number] = (data, mask)
    return Encoding(frames.dtype.str, chunks, filters), stored


def decoded(
    encoding: Encoding, stored: dict[int, tuple[bytes, int]], shape: tuple[int, ...], first: int, count: int
) -> list[np.ndarray | None]:
    """Through the table and the region, as in the sandbox."""
    region, entries = bytearray(3), []
    for number, (data, mask) in sorted(stored.items()):
        entries.append((number, len(region), len(data), 0, mask))
        region += data
    decoder = FrameDecoder([bytes(region)], np.dtype(encoding.dtype).newbyteorder("="), shape)
    message = table.pack(1, encoding, np.array(entries, table.ENTRY))
    found: list[np.ndarray | None] = [None] * count
    seen = 0
    for start, size, frames in decoder.runs(first, count, message):
        assert start == seen
        seen += size
        if frames is not None:
            assert frames.flags.c_contiguous
            assert frames.flags.aligned
            assert not frames.flags.writeable
            assert frames.shape == (size, *shape)
            found[start : start + size] = list(frames)
    assert seen == count
    return found


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", ["<u1", "<u2", ">i4", "<f8"])
@pytest.mark.parametrize("chunks", [(1, 37, 41), (2, 37, 41), (1, 10, 41), (3, 16, 7)])
def test_what_hdf5_wrote(writer: str, dtype: str, chunks: tuple[int, ...]) -> None:
    frames = np.random.default_rng(1).poisson(3, (5, 37, 41)).astype(dtype)
    encoding, stored = written(frames, chunks, **WRITERS[writer])
    assert not encoding.trouble((37, 41))
    for first, count in ((0, 5), (1, 3), (4, 1)):
        for got, want in zip(decoded(encoding, stored, (37, 41), first, count), frames[first:], strict=False):
            np.testing.assert_array_equal(got, want)


def test_spectra_and_missing_chunks() -> None:
    frames = np.random.default_rng(2).integers(0, 1000, (9, 50)).astype("<u2")
    encoding, stored = written(frames, (4, 20), **WRITERS["bslz4"])
    encoding = Encoding(encoding.dtype, encoding.chunk, encoding.filters, fill=np.uint16(777).tobytes())
    del stored[4]  # frames 4 to 7, pixels 20 to 39
    want = frames.copy()
    want[4:8, 20:40] = 777
    np.testing.assert_array_equal(np.array(decoded(encoding, stored, (50,), 0, 9)), want)


def test_a_broken_chunk_costs_its_own_frames() -> None:
    frames = np.random.default_rng(3).integers(0, 1000, (6, 8, 8)).astype("<u2")
    encoding, stored = written(frames, (1, 8, 8), **WRITERS["gzip"])
    stored[2] = (b"\x00" + stored[2][0][1:], 0)
    found = decoded(encoding, stored, (8, 8), 0, 6)
    assert [frame is None for frame in found] == [False, False, True, False, False, False]
    np.testing.assert_array_equal(found[3], frames[3])


def test_the_real_eiger_file(data_folder: Path) -> None:
    with h5py.File(data_folder / "eiger1_bslz4_data_000001.h5") as file:
        frames = file["entry/data/data"][:]
        chunk = np.frombuffer(file["entry/data/data"].id.read_direct_chunk((1, 0, 0))[1], np.uint8)
    encoding = Encoding("<u2", (1, *frames.shape[1:]), (Filter("bslz4", 2),))
    np.testing.assert_array_equal(decode(chunk, encoding, 0).view("<u2").reshape(frames.shape[1:]), frames[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-200, 200), min_size=1, max_size=200))
def test_byte_offsets_as_fabio_writes_them(values: list[int]) -> None:
    pixels = np.array(values, np.int64)
    stored = np.frombuffer(bytes(fabio.compression.compByteOffset(pixels)), np.uint8)
    out = decode(stored, Encoding("<i4", (1, len(values)), (Filter("byte-offset", 4),)), 0)
    assert out.view("<i4").tolist() == values


@pytest.mark.parametrize(("compression", "codec"), [("packbits", "packbits"), ("tiff_lzw", "lzw")])
@pytest.mark.parametrize("high", [2, 40, 65536])
def test_strips_as_libtiff_writes_them(compression: str, codec: str, high: int) -> None:
    frame = np.random.default_rng(4).integers(0, high, (60, 170)).astype("<u2")
    target = io.BytesIO()
    Image.fromarray(frame).save(target, "TIFF", compression=compression)
    image = Image.open(io.BytesIO(target.getvalue()))
    offsets, lengths = image.tag_v2[273], image.tag_v2[279]  # type: ignore[attr-defined]
    rows = image.tag_v2[278]  # type: ignore[attr-defined]
    stored = {
        n: (target.getvalue()[offset : offset + length], 0)
        for n, (offset, length) in enumerate(zip(offsets, lengths, strict=True))
    }
    [got] = decoded(Encoding("<u2", (1, rows, 170), (Filter(codec, 2),)), stored, (60, 170), 0, 1)
    np.testing.assert_array_equal(got, frame)


def test_horizontal_differences() -> None:
    frame = np.random.default_rng(5).integers(0, 65536, (7, 33)).astype(">u2")
    deltas = np.diff(frame.astype("<u2"), axis=1, prepend=np.zeros((7, 1), "<u2")).astype(">u2")
    [got] = decoded(Encoding(">u2", (1, 7, 33), (Filter("predictor", 2),)), {0: (deltas.tobytes(), 0)}, (7, 33), 0, 1)
    np.testing.assert_array_equal(got, frame)


def samples() -> dict[str, tuple[Encoding, bytes]]:
    frames = np.random.default_rng(6).poisson(2, (1, 24, 40)).astype("<u2")
    found = {}
    for name, options in WRITERS.items():
        encoding, stored = written(frames, (1, 24, 40), **options)
        found[name] = (encoding, stored[0][0])
    found["byte offsets"] = (
        Encoding("<i4", (1, 960), (Filter("byte-offset", 4),)),
        bytes(fabio.compression.compByteOffset(frames.ravel().astype(np.int64))),
    )
    for codec in ("lzw", "packbits"):
        found[codec] = (Encoding("<u2", (1, 960), (Filter(codec, 2),)), frames.tobytes())
    return found


SAMPLES = samples()


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_broken_bytes_are_decoded_or_refused_never_more(name: str, data: st.DataObject) -> None:
    encoding, good = SAMPLES[name]
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    stored = np.frombuffer(bytes(broken[: data.draw(st.integers(0, len(broken)))]), np.uint8)
    try:
        assert decode(stored, encoding, 0).size <= encoding.chunk_bytes
    except Undecodable:
        pass


@pytest.mark.parametrize("codec", ["bslz4", "lz4"])
@pytest.mark.parametrize("declared", [0, 2**63, 2**64 - 1, 10**12])
def test_declared_sizes_are_not_believed(codec: str, declared: int) -> None:
    stored = np.frombuffer(declared.to_bytes(8, "big") + (8192).to_bytes(4, "big") + bytes(100), np.uint8)
    with pytest.raises(Undecodable):
        decode(stored, Encoding("<u2", (1, 64), (Filter(codec, 2),)), 0)


def test_a_deflate_bomb_stops_at_the_declared_size() -> None:
    import zlib

    bomb = np.frombuffer(zlib.compress(bytes(50 << 20)), np.uint8)
    with pytest.raises(Undecodable, match="longer"):
        decode(bomb, Encoding("<u2", (1, 64), (Filter("deflate"),)), 0)


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        (Encoding("<u2", (1, 4, 4), (Filter("zstd"),)), "zstd"),
        (Encoding("<u2", (1, 4), ()), "do not fit"),
        (Encoding("<u2", (1, 0, 4), ()), "do not fit"),
        (Encoding("<u2", (1, 1, 1), ()), "chunks"),
        (Encoding("<u8", (10**6, 100, 100), ()), "decoded at once"),
        (Encoding("<u2", (1, 100, 100), (Filter("shuffle", 0),)), "out of range"),
    ],
)
def test_encodings_beyond_their_limits(encoding: Encoding, reason: str) -> None:
    assert reason in encoding.trouble((100, 100))


Start = Callable[..., Any]
