"""How frames lie in a body: from its first bytes and its object metadata, never from anything else.

In: the head of a body (untrusted) and the object's user metadata. Out: a ``FrameGeometry``, or how many bytes are
needed to say, or ``NotFrames`` with the reason. Two forms:

- raw: ``x-amz-meta-frame-dtype`` (numpy dtype, e.g. ``uint16`` or ``<u2``) and ``x-amz-meta-frame-shape`` (``195,487``,
  ``195x487`` or ``[195, 487]``); the body is frames back to back from its first byte, unless the key ends in ``.npy``.
- ``.npy`` (NEP 1, numpy.lib.format): one array. Three dimensions or more: frames along the first; one or two: a single
  frame. With ``frame-shape`` in the metadata the trailing dimensions must match it, so (N, pixels) can be frames too.

Only C order and little-endian plain numbers are frames: object arrays would unpickle, Fortran order does not store
frames back to back, and the sandbox's compiler has no foreign byte order. Nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from ingest.records import FrameGeometry

NPY_MAGIC = b"\x93NUMPY"
HEADER_BYTES_MAX = 65_536 + 10
"""The longest header of format version 1.0; longer ones (2.0 allows 4 GiB) describe structured types."""
NDIM_MAX = 4
SHAPE_MAX = 2**31 - 1
FRAME_BYTES_MAX = 2**40
_FIRST_DIMENSION = re.compile(rb"""(["']shape["']\s*:\s*\(\s*)\d+""")
DTYPES = frozenset("u1 u2 u4 u8 i1 i2 i4 i8 f4 f8".split())


@dataclasses.dataclass(frozen=True, slots=True)
class NotFrames:
    """No frames here; ``reason`` is fit for the scientist."""

    reason: str


def sniff(
    head: memoryview, key: bytes, metadata: Mapping[str, str], *, complete: bool
) -> FrameGeometry | NotFrames | int:
    """Geometry, or bytes needed to say (more than ``len(head)``; never when ``complete``), or why not.

    ``metadata`` has lower-case names without ``x-amz-meta-``. At most HEADER_BYTES_MAX bytes of ``head`` are looked at.
    """
    try:
        declared = declared_geometry(metadata)
        if declared is not None and not key.endswith(b".npy"):
            # Known before the first byte: the very first span can be cut to whole frames.
            return declared
        probe = bytes(head[: len(NPY_MAGIC)])
        if probe == NPY_MAGIC:
            found = _npy(head)
            if isinstance(found, int):
                return NotFrames("the .npy header is cut short") if complete else found
            return _refine(found, declared)
        if declared is not None:
            return declared
        if NPY_MAGIC.startswith(probe) and not complete:
            return len(NPY_MAGIC) + 4
    except ValueError as error:
        return NotFrames(str(error))
    return NotFrames("no frame geometry: neither .npy nor x-amz-meta-frame-dtype and x-amz-meta-frame-shape")


def declared_geometry(metadata: Mapping[str, str]) -> FrameGeometry | None:
    """The geometry the metadata declares for a raw body, or None. ValueError with the reason when it is broken."""
    dtype_text, shape_text = metadata.get("frame-dtype"), metadata.get("frame-shape")
    if dtype_text is None and shape_text is None:
        return None
    if dtype_text is None or shape_text is None:
        missing = "frame-dtype" if dtype_text is None else "frame-shape"
        raise ValueError(f"x-amz-meta-{missing} is missing: dtype and shape go together")
    return _geometry(parse_dtype(dtype_text), parse_shape(shape_text), origin=0, count=None)


def parse_dtype(text: str) -> np.dtype[np.generic]:
    """A plain little-endian number type. ValueError with the reason."""
    try:
        dtype = np.dtype(text.strip())
    except (TypeError, ValueError):
        raise ValueError(f"{text!r:.80} is not a numpy dtype") from None
    return _plain(dtype)


def parse_shape(text: str) -> tuple[int, ...]:
    """``195,487``, ``195x487``, ``[195, 487]`` or ``(195, 487)``. ValueError with the reason."""
    inner = text.strip().strip("[]()").replace("x", ",").replace("X", ",")
    parts = [part.strip() for part in inner.split(",") if part.strip()]
    if not parts or len(parts) > NDIM_MAX or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{text!r:.80} is not a frame shape: 1 to {NDIM_MAX} whole numbers, e.g. 195,487")
    return tuple(int(part[:12]) for part in parts)


def _plain(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    if dtype.hasobject:
        raise ValueError("object arrays are not frames")
    if dtype.names is not None or dtype.subdtype is not None:
        raise ValueError("structured arrays are not frames")
    if f"{dtype.kind}{dtype.itemsize}" not in DTYPES:
        raise ValueError(f"dtype {dtype.name} is not supported: {', '.join(sorted(DTYPES))}")
    if not dtype.newbyteorder("<") == dtype:
        raise ValueError(f"dtype {dtype.str} is big-endian; frames must be little-endian")
    return dtype


def _geometry(dtype: np.dtype[np.generic], shape: tuple[int, ...], *, origin: int, count: int | None) -> FrameGeometry:
    if not shape or len(shape) > NDIM_MAX:
        raise ValueError(f"frames have 1 to {NDIM_MAX} dimensions, not {len(shape)}")
    if not all(0 < size <= SHAPE_MAX for size in shape):
        raise ValueError(f"frame shape {shape} is out of range")
    frame_bytes = math.prod(shape) * dtype.itemsize
    if frame_bytes > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {frame_bytes} bytes is too large")
    return FrameGeometry(dtype.str, shape, origin, frame_bytes, count)


def _npy(head: memoryview) -> tuple[np.dtype[np.generic], tuple[int, ...], int] | int:
    """(dtype, array shape, header length), or bytes needed. numpy/lib/format.py describes the layout."""
    if len(head) < 12:
        return 12
    major = head[6]
    if major == 1:
        start, length = 10, int.from_bytes(head[8:10], "little")
    elif major in (2, 3):
        start, length = 12, int.from_bytes(head[8:12], "little")
    else:
        raise ValueError(f".npy format version {major} is not known")
    if start + length > HEADER_BYTES_MAX:
        raise ValueError(f"a .npy header of {length} bytes is too long")
    if len(head) < start + length:
        return start + length
    return (*_npy_header(bytes(head[start : start + length])), start + length)


def npy_geometry(head: memoryview, declared: FrameGeometry | None) -> FrameGeometry | int:
    """The frames of the array that begins here (``origin``: where its first begins), or how many bytes are needed to say.
    ValueError with the reason."""
    found = _npy(head)
    return found if isinstance(found, int) else _refine(found, declared)


def npy_cut(header: bytes, frames: int) -> bytes | None:
    """The header of an array (from its magic on) with ``frames`` as the first dimension, as long as before; None where it
    cannot be said in that room."""
    found = _npy(memoryview(header))
    if isinstance(found, int):
        return None
    dtype, shape, origin = found
    changed = _FIRST_DIMENSION.sub(rb"\g<1>%d" % frames, header, count=1)
    spare = len(header) - len(changed)
    end = len(changed) - 1 if changed.endswith(b"\n") else len(changed)
    changed = changed[:end] + b" " * spare + changed[end:]
    if spare < 0 or _npy(memoryview(changed)) != (dtype, (frames, *shape[1:]), origin):
        return None
    return changed


def _npy_header(raw: bytes) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    broken = ValueError("the .npy header is broken")
    try:
        header = ast.literal_eval(raw.decode("utf-8").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise broken from None
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise broken
    descr, shape = header["descr"], header["shape"]
    if not isinstance(descr, str):
        raise ValueError("structured arrays are not frames")
    if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size <= 2**62 for size in shape):
        raise broken
    if header["fortran_order"] is not False and sum(size > 1 for size in shape) > 1:
        raise ValueError("the .npy array is in Fortran order; save it with numpy.ascontiguousarray")
    return parse_dtype(descr), shape


def _refine(found: tuple[np.dtype[np.generic], tuple[int, ...], int], declared: FrameGeometry | None) -> FrameGeometry:
    dtype, shape, origin = found
    if declared is None:
        frames = len(shape) >= 3
        return _geometry(dtype, shape[1:] if frames else shape, origin=origin, count=shape[0] if frames else 1)
    if declared.dtype != dtype.str:
        raise ValueError(f"x-amz-meta-frame-dtype says {declared.dtype}, the .npy header {dtype.str}")
    if shape == declared.shape:
        return _geometry(dtype, shape, origin=origin, count=1)
    if shape[1:] == declared.shape:
        return _geometry(dtype, shape[1:], origin=origin, count=shape[0])
    raise ValueError(f"x-amz-meta-frame-shape says {declared.shape}, the .npy array is {shape}")
