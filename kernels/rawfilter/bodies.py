"""The body that holds what a plan leaves, in the format that came: as pieces, before any of it is read.

Pure. In: where the frames of the received body lie, a plan. Out: a ``Body``, or ``CannotFilter`` with the reason. What
always holds: the pieces are the new body in order and ``length`` bytes together. What each format becomes:

- raw frames, one .npy: the frames that remain, the .npy with the header that says so;
- several .npy: arrays of which nothing remains go, those of which all remains stay as they are, others get a new header;
- Stream V2 messages: the messages of dropped images go, every other byte stays, so images keep their numbers;
- CBF, TIFF: there is no file without an image; where nothing remains the body is empty.

HDF5 is written anew by a sandbox: see ``hdf5``.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.lib.format

from ingest.records import FrameGeometry
from kernels.layout.detect import Kind
from kernels.layout.index import FrameIndex
from kernels.layout.stored import Found
from kernels.rawfilter.plan import DROPPED, KEPT, REPLACED, CannotFilter, Plan


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, stop) of the received body."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class Outs:
    """The ``out`` of these frames."""

    first: int
    count: int


Piece = bytes | Range | Outs


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """``geometry``: of the new body, where its frames lie back to back; None: its own bytes say how they lie."""

    length: int
    pieces: Sequence[Piece]
    geometry: FrameGeometry | None = None


def body_of(found: Found, length: int, plan: Plan) -> Body:
    """For every format but HDF5. ``length``: of the received body."""
    layout = found.layout
    if isinstance(layout, FrameGeometry):
        return _plain(layout, plan)
    assert isinstance(layout, FrameIndex)
    match found.kind:
        case Kind.NPY:
            return _arrays(found.items, layout, plan)
        case Kind.CBOR:
            return _messages(found.items, length - found.trailing_bytes, plan)
        case _:
            return _image(found.kind, plan)


def _plain(geometry: FrameGeometry, plan: Plan) -> Body:
    count = plan.frames
    header = npy_header(plan.dtype, (count, *plan.shape)) if geometry.origin else b""
    pieces: list[Piece] = [header] if header else []
    pieces += _frames(plan, 0, None, geometry.origin, geometry.frame_bytes)
    new = FrameGeometry(plan.dtype, plan.shape, len(header), plan.frame_bytes, count if header else None)
    return Body(len(header) + count * plan.frame_bytes, pieces, new)


def _frames(plan: Plan, first: int, stop: int | None, origin: int, frame_bytes: int) -> Iterator[Piece]:
    """What remains of frames that lie back to back, frame ``first`` at ``origin``."""
    for begin, count, fate in plan.runs(first, stop):
        if fate == REPLACED:
            yield Outs(begin, count)
        else:
            start = origin + (begin - first) * frame_bytes
            yield Range(start, start + count * frame_bytes)


def _arrays(items: Sequence[int], index: FrameIndex, plan: Plan) -> Body:
    pieces: list[Piece] = []
    length = first = 0
    for start, end in zip(items[::2], items[1::2], strict=True):
        stop = first
        while stop < index.count and index.offsets[stop] < end:
            stop += 1
        fates = plan.fates[first:stop]
        left = int(np.count_nonzero(fates))
        if np.all(fates == KEPT):
            pieces.append(Range(start, end))
            length += end - start
        elif left:
            shape = (left, *plan.shape) if len(fates) > 1 else plan.shape
            header = npy_header(plan.dtype, shape)
            pieces += [header, *_frames(plan, first, stop, index.offsets[first], index.frame_bytes)]
            length += len(header) + left * plan.frame_bytes
        first = stop
    return Body(length, pieces)


def _messages(items: Sequence[int], end: int, plan: Plan) -> Body:
    if plan.replaces:
        raise CannotFilter(
            f"{plan.replaces} replaces frames, and a Stream V2 image message holds what the detector sent: raw data stay"
        )
    pieces: list[Piece] = []
    length = at = 0
    dropped = np.flatnonzero(plan.fates == DROPPED).tolist()
    for start, stop in [*((items[2 * frame], items[2 * frame + 1]) for frame in dropped), (end, end)]:
        if start > at:
            pieces.append(Range(at, start))
            length += start - at
        at = stop
    return Body(length, pieces)


def _image(kind: Kind, plan: Plan) -> Body:
    if plan.replaces:
        raise CannotFilter(
            f"{plan.replaces} replaces frames, which is not done in a {kind.upper()} file: raw data stay"
        )
    if plan.frames:
        raise CannotFilter(f"single images cannot be taken out of a {kind.upper()} file: raw data stay")
    return Body(0, ())


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    target = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    numpy.lib.format.write_array_header_1_0(target, described)
    assert math.prod(shape) >= 0
    return target.getvalue()
