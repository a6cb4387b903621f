"""Stream V2 messages as a DECTRIS detector sends them (dectris/documentation, stream_v2), made with cbor2 and bitshuffle."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import bitshuffle
import cbor2
import h5py
import hdf5plugin
import numpy as np

TYPED = {
    "|u1": 64, ">u2": 65, ">u4": 66, ">u8": 67, "<u2": 69, "<u4": 70, "<u8": 71,
    "|i1": 72, ">i2": 73, ">i4": 74, ">i8": 75, "<i2": 77, "<i4": 78, "<i8": 79,
    ">f4": 81, ">f8": 82, "<f4": 85, "<f8": 86,
}  # fmt: skip
SELF_DESCRIBED = 55799


def compressed(array: np.ndarray, algorithm: str) -> Any:
    if algorithm == "none":
        return array.tobytes()
    if algorithm == "bslz4":
        # The HDF5 filter's framing: total length, block length in bytes, blocks.
        blocks = bitshuffle.compress_lz4(np.ascontiguousarray(array).ravel(), 8192 // array.itemsize)
        data = struct.pack(">QI", array.nbytes, 8192) + blocks.tobytes()
        return cbor2.CBORTag(56500, ["bslz4", array.itemsize, data])
    assert algorithm == "lz4"
    with h5py.File("x", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("x", data=array, chunks=array.shape, **hdf5plugin.LZ4())
        return cbor2.CBORTag(56500, ["lz4", 0, dataset.id.read_direct_chunk((0,) * array.ndim)[1]])


def image_array(array: np.ndarray, algorithm: str) -> cbor2.CBORTag:
    return cbor2.CBORTag(40, [list(array.shape), cbor2.CBORTag(TYPED[array.dtype.str], compressed(array, algorithm))])


def message(content: Mapping[str, Any]) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(SELF_DESCRIBED, dict(content)))


def start(images: int, shape: Sequence[int], series: int = 1, **more: Any) -> bytes:
    return message(
        {
            "type": "start",
            "arm_date": cbor2.CBORTag(0, "2026-05-04T10:11:12.123456+02:00"),
            "beam_center_x": 511.5,
            "channels": ["threshold_1"],
            "count_time": 0.0099,
            "detector_translation": [0.0, 0.0, 0.1],
            "flatfield": {"threshold_1": image_array(np.ones((3, 4), "<f4"), "none")},
            "goniometer": {"omega": {"increment": 0.1, "start": 0.0}},
            "image_size_x": shape[1],
            "image_size_y": shape[0],
            "number_of_images": images,
            "pixel_mask_enabled": True,
            "series_id": series,
            "series_unique_id": f"01H{series:023d}",
            "user_data": None,
            **more,
        }
    )


def image(
    channels: Mapping[str, np.ndarray] | np.ndarray, number: int, algorithm: str = "bslz4", series: int = 1
) -> bytes:
    named = {"threshold_1": channels} if isinstance(channels, np.ndarray) else channels
    return message(
        {
            "type": "image",
            "data": {name: image_array(array, algorithm) for name, array in named.items()},
            "image_id": number,
            "real_time": [9900000, 1000000000],
            "series_date": cbor2.CBORTag(0, "2026-05-04T10:11:13+02:00"),
            "series_id": series,
            "series_unique_id": f"01H{series:023d}",
            "start_time": [number * 10000000, 1000000000],
            "stop_time": [number * 10000000 + 9900000, 1000000000],
            "user_data": {"note": "x" * (number % 7)},
        }
    )


def end(series: int = 1) -> bytes:
    return message({"type": "end", "series_id": series, "series_unique_id": f"01H{series:023d}"})


def stream(frames: np.ndarray, algorithm: str = "bslz4", lost: Sequence[int] = ()) -> bytes:
    """A whole series in one body, less the images that were lost on the way."""
    images = [image(frame, number, algorithm) for number, frame in enumerate(frames) if number not in lost]
    return start(len(frames), frames.shape[1:]) + b"".join(images) + end()
