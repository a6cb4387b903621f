"""Streams of messages and of arrays: frames are found wherever the pieces of the body are cut."""

from __future__ import annotations

import io
import struct

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.decode import table
from kernels.decode.frames import FrameDecoder
from kernels.formats import declared_geometry
from kernels.layout.cbor import CborStream, may_begin
from kernels.layout.index import FrameIndex
from kernels.layout.npy_stream import NpyStream
from kernels.layout.scanner import Broken, Scanner
from kernels.layout.series import Series
from tests.kernels import dectris

FRAMES = np.random.default_rng(1).poisson(2, (7, 30, 41)).astype("<u2")


def decoded(index: FrameIndex, body: bytes) -> np.ndarray:
    entries = index.entries(0, index.count)
    message = table.pack(0, index.encoding, entries)
    decoder = FrameDecoder([body], np.dtype(index.dtype), index.shape)
    runs = [frames for _, _, frames in decoder.runs(0, index.count, message)]
    assert all(frames is not None for frames in runs)
    return np.concatenate(runs)  # type: ignore[arg-type]


def scanned(scanner: Scanner, body: bytes, cuts: list[int]) -> Scanner:
    last = 0
    for cut in [*sorted(cuts), len(body)]:
        scanner.feed(memoryview(body)[last:cut])
        last = cut
        assert scanner.position == cut
        assert scanner.settled <= scanner.position <= scanner.horizon
    return scanner


def jumped(scanner: Scanner, body: bytes) -> Scanner:
    """As a stored body is read: what is stepped over is never looked at."""
    while scanner.position < len(body):
        scanner.feed(memoryview(body)[scanner.position : scanner.position + 100])
        scanner.jump(len(body))
    return scanner


def npy(*arrays: np.ndarray) -> bytes:
    target = io.BytesIO()
    for array in arrays:
        np.save(target, array)
    return target.getvalue()


@pytest.mark.parametrize("algorithm", ["bslz4", "lz4", "none"])
@pytest.mark.parametrize("dtype", ["<u2", ">u4", "|u1", "<f4"])
def test_a_series_of_messages(algorithm: str, dtype: str) -> None:
    frames = FRAMES.astype(dtype)
    body = dectris.stream(frames, algorithm)
    found: list[FrameIndex] = []
    scanner = scanned(CborStream(found.append), body, [])
    assert found == [scanner.index]
    assert scanner.settled == len(body)
    assert scanner.gaps() == ()
    np.testing.assert_array_equal(decoded(found[0], body), frames)
    assert found[0].dtype == np.dtype(dtype).newbyteorder("<").str


BODY = dectris.stream(FRAMES, lost=(2, 5, 6))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(BODY)), max_size=12))
def test_messages_cut_anywhere(cuts: list[int]) -> None:
    scanner = scanned(CborStream(lambda _: None), BODY, cuts)
    assert scanner.index is not None
    np.testing.assert_array_equal(decoded(scanner.index, BODY), FRAMES[[0, 1, 3, 4]])
    assert scanner.gaps() == ((2, 1), (5, 2))


def test_messages_byte_by_byte_and_by_jumps() -> None:
    scanner = scanned(CborStream(lambda _: None), BODY, list(range(len(BODY))))
    assert scanner.frames == 4
    leaping = jumped(CborStream(lambda _: None), BODY)
    assert leaping.frames == 4
    assert leaping.index is not None
    np.testing.assert_array_equal(decoded(leaping.index, BODY), FRAMES[[0, 1, 3, 4]])


def test_channels() -> None:
    low, high = FRAMES[0], FRAMES[1]
    body = dectris.image({"threshold_1": low, "threshold_2": high}, 4)
    for channel, want in (("", low), ("threshold_1", low), ("threshold_2", high)):
        scanner = scanned(CborStream(lambda _: None, channel), body, [])
        assert scanner.index is not None
        np.testing.assert_array_equal(decoded(scanner.index, body), want[None])
        assert scanner.gaps() == ()
    with pytest.raises(Broken, match="threshold_3"):
        scanned(CborStream(lambda _: None, "threshold_3"), body, [])


def test_indefinite_lengths_and_other_orders_of_keys() -> None:
    image = cbor2.dumps(dectris.image_array(FRAMES[0], "bslz4"))
    body = b"\xbf" + b"".join(
        (
            cbor2.dumps("image_id") + cbor2.dumps(3),
            cbor2.dumps("remarks") + b"\x9f\x01\x7f\x61a\x62bc\xff\xff",
            cbor2.dumps("data") + b"\xbf" + cbor2.dumps("c") + image + b"\xff",
            cbor2.dumps("type") + cbor2.dumps("image"),
            b"\xff",
        )
    )
    scanner = scanned(CborStream(lambda _: None), body, [])
    assert (scanner.frames, scanner.settled) == (1, len(body))


def test_a_message_cut_short_is_left_over() -> None:
    body = BODY + dectris.image(FRAMES[0], 6)[:-20]
    scanner = scanned(CborStream(lambda _: None), body, [])
    assert (scanner.frames, scanner.settled) == (4, len(BODY))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\x83\x01\x02\x03", "not a Stream V2 message"),
        (dectris.message({"type": "video"}), "video"),
        (dectris.message({"type": "image", "image_id": 1}), "no data"),
        (dectris.message({"type": "image", "data": [1]}), "no map of channels"),
        (dectris.message({"type": "image", "data": {"a": b"12"}}), "tag 40"),
        (dectris.message({"type": "image", "data": {"a": cbor2.CBORTag(1040, [[1, 1], b""])}}), "column-major"),
        (
            dectris.message({"type": "image", "data": {"a": cbor2.CBORTag(40, [[2, 2], cbor2.CBORTag(84, b"")])}}),
            "tag 84",
        ),
        (
            dectris.message({"type": "image", "data": {"a": cbor2.CBORTag(40, [[2, 2], cbor2.CBORTag(64, b"123")])}}),
            "3 bytes",
        ),
        (
            dectris.message(
                {"type": "image", "data": {"a": cbor2.CBORTag(40, [[2**40, 2], cbor2.CBORTag(64, b"123")])}}
            ),
            "pixels wide",
        ),
        (
            dectris.message(
                {
                    "type": "image",
                    "data": {
                        "a": cbor2.CBORTag(40, [[9, 9], cbor2.CBORTag(64, cbor2.CBORTag(56500, ["zip", 1, b""]))])
                    },
                }
            ),
            "zip",
        ),
        (b"\xa1\x64type\xff", "expected a text"),
        (b"\xa1\x61a" + b"\x81" * 40 + b"\x01", "levels deep"),
        (b"\xa1\x61a\x5c", "not CBOR"),
        (dectris.image(FRAMES[0], 0) + dectris.image(FRAMES[0, :5], 1), "those before"),
        (dectris.image(FRAMES[0], 0) + dectris.image(FRAMES[0], 1, "none"), "those before"),
    ],
)
def test_broken_messages_say_why(body: bytes, reason: str) -> None:
    with pytest.raises(Broken, match=reason):
        scanned(CborStream(lambda _: None), body, [])


def test_a_huge_declared_image_is_refused_before_it_is_believed() -> None:
    claim = dectris.message(
        {
            "type": "image",
            "data": {
                "a": cbor2.CBORTag(40, [[2**20, 2**20], cbor2.CBORTag(64, cbor2.CBORTag(56500, ["lz4", 0, b"1"]))])
            },
        }
    )
    with pytest.raises(Broken, match="decoded at once"):
        scanned(CborStream(lambda _: None), claim, [])
    endless = b"\xa1\x61a\x5b" + struct.pack(">Q", 2**63)
    with pytest.raises(Broken, match="a string of"):
        scanned(CborStream(lambda _: None), endless, [])
    table_of_everything = b"\xa1\x61a\x9b" + struct.pack(">Q", 2**63) + b"\x01" * 1_100_000
    with pytest.raises(Broken, match="items"):
        scanned(CborStream(lambda _: None), table_of_everything, [])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_scanned_or_refused(data: st.DataObject) -> None:
    body = bytearray(BODY)
    for _ in range(data.draw(st.integers(1, 5))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    for scanner in (CborStream(lambda _: None), NpyStream(lambda _: None)):
        try:
            scanned(scanner, bytes(body), [data.draw(st.integers(0, len(body)))])
        except Broken:
            continue


@pytest.mark.parametrize(
    ("head", "answer"),
    [
        (BODY, True),
        (cbor2.dumps({"type": "end"}), True),
        (b"", None),
        (BODY[:2], None),
        (BODY[:6], None),
        (b"\x89HDF\r\n\x1a\n", False),
        (b"\x93NUMPY\x01\x00", False),
        (b"\xa1\x61b\x01", False),
    ],
)
def test_what_may_begin_a_stream(head: bytes, answer: bool | None) -> None:
    assert may_begin(memoryview(head)) is answer


def test_arrays_one_behind_the_other() -> None:
    body = npy(FRAMES[:2], FRAMES[2:3], FRAMES[3:])
    for scanner in (
        scanned(NpyStream(lambda _: None), body, [1, 5, 200, 201, 3000]),
        scanned(NpyStream(lambda _: None), body, list(range(0, len(body), 7))),
        jumped(NpyStream(lambda _: None), body),
    ):
        assert scanner.index is not None
        np.testing.assert_array_equal(decoded(scanner.index, body), FRAMES)
        assert scanner.settled == len(body)


def test_images_one_behind_the_other_and_rubbish_behind_them() -> None:
    declared = declared_geometry({"frame-dtype": "uint16", "frame-shape": "41"})
    lines = npy(*FRAMES[0, :5], FRAMES[1])
    scanner = scanned(NpyStream(lambda _: None, declared), lines, [])
    assert scanner.index is not None
    np.testing.assert_array_equal(decoded(scanner.index, lines), np.concatenate([FRAMES[0, :5], FRAMES[1]]))
    images = npy(*FRAMES)
    scanner = scanned(NpyStream(lambda _: None), images + b"the end", [len(images)])
    assert (scanner.frames, scanner.settled) == (7, len(images))
    assert scanner.boundary(len(images) + 3) == len(images) + 3


def test_arrays_that_do_not_belong_together() -> None:
    with pytest.raises(Broken, match="those before"):
        scanned(NpyStream(lambda _: None), npy(FRAMES, FRAMES.astype("<u4")), [])
    with pytest.raises(Broken, match="Fortran"):
        scanned(NpyStream(lambda _: None), npy(FRAMES, np.asfortranarray(FRAMES)), [])


def test_boundaries_never_lie_inside_a_frame() -> None:
    body = npy(FRAMES)
    scanner = NpyStream(lambda _: None)
    scanner.feed(memoryview(body)[:200])
    origin, size = len(body) - FRAMES.nbytes, FRAMES[0].nbytes
    assert scanner.horizon == len(body)
    assert scanner.boundary(origin + 2 * size + 5) == origin + 2 * size
    assert scanner.boundary(origin + 2 * size) == origin + 2 * size
    assert scanner.boundary(len(body)) == len(body)


def test_series_name_what_is_missing() -> None:
    series = Series()
    series.image(17)
    assert series.gaps() == ()
    series.image(20)
    assert series.gaps() == ((18, 2),)
    series = Series()
    series.start(4)
    for number in (3, 0):
        series.image(number)
    series.start(3)
    series.image(1)
    assert series.gaps() == ((1, 2), (4, 1), (6, 1))
