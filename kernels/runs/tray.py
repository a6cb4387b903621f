"""Small frames side by side in memory that sandboxes can read: one round trip then judges many.

In: the bytes of a frame whose object was just committed (they lie in a slab that many small objects share, which no sandbox
may see). Out: a ``FrameBatch`` over a copy. What always holds: a bucket has at most SLABS_MAX slabs of copies; a slab is
given back with its last frame; where there is no room the frame is read back from disk later.
"""

from __future__ import annotations

from ingest.ports import Domain, LandingPad, Room

FRAME_BYTES_MAX = 256 << 10
"""Copying more on the loop would cost the streams more than a span of their own."""
SLAB_BYTES = 4 << 20
SLABS_MAX = 4


class Placed:
    """A copied frame (``FrameBatch``)."""

    __slots__ = ("_over", "_slab", "count", "first_frame", "offset", "region")
    revoked = False
    position = 0

    def __init__(self, slab: _Slab, region: int, offset: int) -> None:
        self.region = region
        self.offset = offset
        self.first_frame = 0
        self.count = 1
        self._slab = slab
        self._over = False

    def dispatched(self) -> bool:
        return True

    def release(self) -> None:
        if not self._over:
            self._over = True
            self._slab.one_done()


class _Slab:
    def __init__(self, tray: Tray, bucket: str, room: Room) -> None:
        self._tray = tray
        self._bucket = bucket
        self._room = room
        self._used = 0
        self._frames = 0

    def place(self, frame: memoryview) -> Placed | None:
        start = self._used
        if start + len(frame) > len(self._room.view):
            return None
        self._room.view[start : start + len(frame)] = frame
        self._used += len(frame)
        self._frames += 1
        return Placed(self, self._room.region, self._room.offset + start)

    def one_done(self) -> None:
        self._frames -= 1
        if self._frames == 0:
            self._tray.empty(self._bucket, self)
            self._room.release()


class Tray:
    """The slabs of a worker, by bucket; the last one of a bucket is being filled."""

    def __init__(self, pad: LandingPad) -> None:
        self._pad = pad
        self._slabs: dict[str, list[_Slab]] = {}

    def place(self, domain: Domain, frame: memoryview) -> Placed | None:
        """A copy of the frame; None when there is no room now."""
        slabs = self._slabs.setdefault(domain.bucket, [])
        if slabs and (placed := slabs[-1].place(frame)) is not None:
            return placed
        if len(slabs) >= SLABS_MAX:
            return None
        room = self._pad.room(SLAB_BYTES, domain)
        if room is None:
            return None
        slabs.append(_Slab(self, domain.bucket, room))
        return slabs[-1].place(frame)

    def empty(self, bucket: str, slab: _Slab) -> None:
        slabs = self._slabs[bucket]
        slabs.remove(slab)
        if not slabs:
            del self._slabs[bucket]
