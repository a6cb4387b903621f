"""Geometry from the first bytes of a body and its metadata."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.records import FrameGeometry
from kernels.formats import HEADER_BYTES_MAX, NotFrames, parse_shape, sniff


def npy(array: np.ndarray, **options: object) -> bytes:
    target = io.BytesIO()
    np.lib.format.write_array(target, array, **options)  # type: ignore[arg-type]
    return target.getvalue()


def found(
    body: bytes, *, complete: bool = True, key: bytes = b"a.npy", **metadata: str
) -> FrameGeometry | NotFrames | int:
    return sniff(memoryview(body), key, {k.replace("_", "-"): v for k, v in metadata.items()}, complete=complete)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_stack(version: tuple[int, int]) -> None:
    array = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4)
    body = npy(array, version=version)
    geometry = found(body)
    assert isinstance(geometry, FrameGeometry)
    assert (geometry.dtype, geometry.shape, geometry.count, geometry.frame_bytes) == ("<u2", (3, 4), 2, 24)
    assert body[geometry.origin :] == array.tobytes()


def test_npy_image_is_one_frame_unless_the_metadata_says_rows() -> None:
    body = npy(np.zeros((5, 7), np.float32))
    one, rows = found(body), found(body, frame_dtype="float32", frame_shape="7")
    assert isinstance(one, FrameGeometry)
    assert isinstance(rows, FrameGeometry)
    assert (one.shape, one.count) == ((5, 7), 1)
    assert (rows.shape, rows.count) == ((7,), 5)


@given(st.integers(0, 200), st.booleans())
def test_a_cut_header_asks_for_more_or_says_so(length: int, complete: bool) -> None:
    body = npy(np.zeros((2, 2, 2), np.int32))
    answer = found(body[:length], complete=complete)
    if isinstance(answer, int):
        assert not complete
        assert length < answer <= len(body)
    elif isinstance(answer, NotFrames):
        assert complete
    else:
        assert length >= answer.origin


def test_asking_again_ends() -> None:
    body, have, asked = npy(np.zeros((2, 2, 2), np.int32)), 1, 0
    while isinstance(answer := found(body[:have], complete=False), int):
        have = answer
        asked += 1
    assert asked <= 3
    assert isinstance(answer, FrameGeometry)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4), np.uint16, order="F"), "Fortran"),
        (np.zeros((2, 3, 4), ">u2"), "big-endian"),
        (np.zeros((2, 3, 4), np.complex64), "not supported"),
        (np.zeros((2, 3, 4), [("a", "<u2")]), "structured"),
        (np.zeros((2, 0, 4), np.uint16), "out of range"),
        (np.zeros((2, 1, 1, 1, 1, 1), np.uint16), "dimensions"),
        (np.zeros((), np.uint16), "dimensions"),
    ],
)
def test_arrays_that_are_not_frames(array: np.ndarray, reason: str) -> None:
    answer = found(npy(array))
    assert isinstance(answer, NotFrames)
    assert reason in answer.reason


def test_object_arrays_are_refused() -> None:
    answer = found(npy(np.array([[[{}]]], dtype=object)))
    assert isinstance(answer, NotFrames)
    assert "object" in answer.reason


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"{'descr': '<u2'}",
        b"[" * 5000,
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (1, -2)}",
        b"\xff",
    ],
)
def test_broken_headers(header: bytes) -> None:
    answer = found(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert isinstance(answer, NotFrames)


def test_a_header_is_never_longer_than_the_limit() -> None:
    answer = found(b"\x93NUMPY\x02\x00" + (HEADER_BYTES_MAX).to_bytes(4, "little"), complete=False)
    assert isinstance(answer, NotFrames)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_get_an_answer(body: bytes, complete: bool) -> None:
    for candidate in (body, b"\x93NUMPY" + body, b"\x93NUMPY\x01\x00\x40\x00" + body):
        answer = found(candidate, complete=complete)
        if isinstance(answer, int):
            assert len(candidate) < answer <= HEADER_BYTES_MAX


@pytest.mark.parametrize("shape", ["195,487", "195x487", "[195, 487]", "(195, 487)", " 195 , 487 "])
def test_raw_frames_by_metadata(shape: str) -> None:
    for key, complete in ((b"a.raw", False), (b"a.npy", True)):
        geometry = found(b"", key=key, complete=complete, frame_dtype="int32", frame_shape=shape)
        assert geometry == FrameGeometry("<i4", (195, 487), 0, 195 * 487 * 4)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "no frame geometry"),
        ({"frame_dtype": "uint16"}, "frame-shape is missing"),
        ({"frame_shape": "2,2"}, "frame-dtype is missing"),
        ({"frame_dtype": "pickle", "frame_shape": "2,2"}, "not a numpy dtype"),
        ({"frame_dtype": "O", "frame_shape": "2,2"}, "object"),
        ({"frame_dtype": "uint16", "frame_shape": "0,2"}, "out of range"),
        ({"frame_dtype": "uint16", "frame_shape": "-1,2"}, "not a frame shape"),
        ({"frame_dtype": "uint16", "frame_shape": "1,2,3,4,5"}, "not a frame shape"),
        ({"frame_dtype": "float64", "frame_shape": "2147483647,2147483647,2147483647"}, "too large"),
    ],
)
def test_broken_metadata_says_why(metadata: dict[str, str], reason: str) -> None:
    answer = found(b"\x00" * 64, **metadata)
    assert isinstance(answer, NotFrames)
    assert reason in answer.reason


def test_metadata_that_contradicts_the_header() -> None:
    body = npy(np.zeros((2, 3, 4), np.uint16))
    for metadata in ({"frame_dtype": "int16", "frame_shape": "3,4"}, {"frame_dtype": "uint16", "frame_shape": "4,3"}):
        assert isinstance(found(body, **metadata), NotFrames)


@given(st.text(max_size=40))
def test_any_shape_text_is_parsed_or_refused(text: str) -> None:
    try:
        shape = parse_shape(text)
    except ValueError:
        return
    assert 1 <= len(shape) <= 4
