"""Single images, CBF and TIFF: what fabio, tifffile and libtiff read, and reasons for everything else."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import fabio
import numpy as np
import pytest
import tifffile
from fabio.cbfimage import CbfImage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kernels.decode import table
from kernels.decode.frames import FrameDecoder
from kernels.layout.cbf import read_cbf
from kernels.layout.index import FrameIndex
from kernels.layout.scanner import Broken
from kernels.layout.tiff import read_tiff

FRAME = np.random.default_rng(1).poisson(20, (61, 47)).astype("<i4")


def indexed(reader: Any, body: bytes) -> FrameIndex:
    """Every range asked for lies inside the body; there are not many."""
    steps = reader(len(body))
    wanted = next(steps)
    for _ in range(100_000):
        offset, length = wanted
        assert 0 <= offset <= offset + length <= len(body)
        try:
            wanted = steps.send(body[offset : offset + length])
        except StopIteration as end:
            found: FrameIndex = end.value
            return found
    raise AssertionError("it never ends")


def decoded(index: FrameIndex, body: bytes) -> np.ndarray:
    decoder = FrameDecoder([body], np.dtype(index.dtype), index.shape)
    message = table.pack(0, index.encoding, index.entries(0, index.count))
    runs = [frames for _, _, frames in decoder.runs(0, index.count, message)]
    assert all(frames is not None for frames in runs)
    return np.concatenate(runs)  # type: ignore[arg-type]


def cbf(frame: np.ndarray, folder: Path) -> bytes:
    CbfImage(data=frame).write(str(folder / "x.cbf"))
    return (folder / "x.cbf").read_bytes()


def test_the_real_cbf(data_folder: Path) -> None:
    body = (data_folder / "phi_scan_001.cbf").read_bytes()
    index = indexed(read_cbf, body)
    assert (index.shape, index.dtype, index.count) == ((619, 487), "<i4", 1)
    np.testing.assert_array_equal(decoded(index, body)[0], fabio.open(str(data_folder / "phi_scan_001.cbf")).data)


def test_cbf_as_fabio_writes_it(tmp_path: Path) -> None:
    extreme = FRAME.copy()
    extreme[0, :4] = (-(10**9), 10**9, -32768, 40000)
    for frame in (FRAME, extreme):
        body = cbf(frame, tmp_path)
        np.testing.assert_array_equal(decoded(indexed(read_cbf, body), body)[0], frame)


def test_broken_cbf(tmp_path: Path) -> None:
    body = cbf(FRAME, tmp_path)
    for broken, reason in (
        (b"", "no binary section"),
        (body[:200], "no binary section"),
        (body[:-2000], "cut short"),
        (body.replace(b"x-CBF_BYTE_OFFSET", b"x-CBF_PACKED"), "X-CBF_PACKED"),
        (body.replace(b"x-CBF_BYTE_OFFSET", b"x-CBF_NONE"), "bytes for an image"),
        (body.replace(b"LITTLE_ENDIAN", b"BIG_ENDIAN"), "big-endian"),
        (body.replace(b"signed 32-bit integer", b"complex"), "not supported"),
        (
            body.replace(b"X-Binary-Size-Fastest-Dimension: 47", b"X-Binary-Size-Fastest-Dimension: 9999999999"),
            "decoded at once",
        ),
        (body.replace(b"X-Binary-Size-Fastest-Dimension", b"X-Nothing"), "fastest-dimension"),
    ):
        with pytest.raises(Broken, match=reason):
            indexed(read_cbf, broken.ljust(len(body) if b"9999999999" in broken else 0, b"\0"))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"rowsperstrip": 7}, {"compression": "zlib"}, {"compression": "zlib", "predictor": True}, {"tile": (16, 32)}],
)
def test_tiff_as_tifffile_writes_it(byteorder: Any, bigtiff: bool, options: dict[str, Any]) -> None:
    for dtype in ("u1", "i2", "u4", "f4"):
        if dtype == "f4" and options.get("predictor"):
            continue
        frames = np.stack([FRAME, FRAME[::-1]]).astype(byteorder + dtype)
        target = io.BytesIO()
        with tifffile.TiffWriter(target, byteorder=byteorder, bigtiff=bigtiff) as writer:
            for frame in frames:
                writer.write(frame, contiguous=False, metadata=None, photometric="minisblack", **options)
        index = indexed(read_tiff, target.getvalue())
        np.testing.assert_array_equal(decoded(index, target.getvalue()), frames)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_tiff_as_libtiff_writes_it(compression: str | None) -> None:
    for dtype in ("u1", "<u2", "<i4", "<f4"):
        target = io.BytesIO()
        Image.fromarray(FRAME.astype(dtype)).save(target, "TIFF", compression=compression)
        index = indexed(read_tiff, target.getvalue())
        np.testing.assert_array_equal(decoded(index, target.getvalue())[0], FRAME.astype(dtype))


def plain_tiff(**options: Any) -> bytes:
    target = io.BytesIO()
    tifffile.imwrite(target, FRAME.astype("<u2"), photometric="minisblack", metadata=None, **options)
    return target.getvalue()


def test_broken_tiff() -> None:
    body = plain_tiff()
    colours = io.BytesIO()
    tifffile.imwrite(colours, np.zeros((5, 6, 3), np.uint8), photometric="rgb")
    first = struct.unpack("<I", body[4:8])[0]
    entries = struct.unpack("<H", body[first : first + 2])[0]
    place = first + 2 + 12 * entries
    for broken, reason in (
        (b"II", "not a TIFF"),
        (body[:8], "points to byte"),
        (body[: first + 20], "entries"),
        (body[:-100], "cut short"),
        (colours.getvalue(), "several samples"),
        (body[:place] + struct.pack("<I", first) + body[place + 4 :], "circle"),
    ):
        with pytest.raises(Broken, match=reason):
            indexed(read_tiff, broken)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(plain_tiff(rowsperstrip=7)[:2000])
    for _ in range(data.draw(st.integers(0, 6))):
        body[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    for reader in (read_tiff, read_cbf):
        try:
            indexed(reader, bytes(body))
        except Broken:
            continue
