"""How fast kernels are: bytes of a stream that one core reduces in a second. Measured, never declared.

In: what sandboxes judged and the CPU time they took for it (``Meter``); dry runs of kernels that have judged nothing yet. Out:
``Paces``, which tells a kernel's pace, and a small JSON file of this worker that its successor, the node's other workers and the
control process read. What always holds: what real frames showed replaces a dry run, never the other way round; a pace is of the
sources it was measured with: another source begins anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from ingest.records import FrameGeometry
from kernels.attach import Attachment
from kernels.published import Elsewhere, Published, read_all

FILE_PATTERN = "paces-*.json"
PACES_MAX = 4096
"""Remembered; the one that was measured longest ago is forgotten first."""
METER_CPU_S = 0.25
"""CPU time that a measurement takes at least: compiled code settles within milliseconds, clocks count in less."""
METER_BYTES = 16 << 20
"""Or so many bytes, for kernels that are faster than any stream."""
SETTLE = 0.5
"""Weight of the newest measurement."""
TOLD_CHANGE = 0.1
"""A pace that moves by less than this share is not written down again."""


Key = tuple[str, str, str]
"""(bucket, kernel, sources)."""


class Pace(msgspec.Struct, frozen=True):
    """``bytes_per_s``: of one core, counted as they come over the network (compressed frames: before they are decoded)."""

    bucket: str
    kernel: str
    sources: str
    """SHA-256 of each source of its chain."""
    frames: str
    """What it was measured on, e.g. ``uint16 512×1024``."""
    bytes_per_s: float
    live: bool
    """On frames that came; else in a dry run, on noise."""
    time_ns: int
    submitted_ns: int = 0
    """When the kernel's object was put; 0: it is being put."""

    @property
    def on(self) -> str:
        return f"{'its streams' if self.live else 'a dry run on noise'}, frames of {self.frames}"

    @property
    def said(self) -> str:
        return f"{self.bytes_per_s / 1e9:.3g} GB/s a core ({self.on})"


def sources_of(attachment: Attachment) -> str:
    return " ".join(attachment.sources)


def frames_text(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{np.dtype(dtype).name} {'×'.join(map(str, shape))}"


def read(files: Iterable[Path]) -> list[Pace]:
    """What the workers' files say; one that cannot be read is passed over."""
    return read_all(files, Pace)


class Meter:
    """Of one sandbox: adds batches up until they say something."""

    def __init__(self) -> None:
        self._bytes = 0
        self._cpu_s = 0.0

    def add(self, size_bytes: int, cpu_s: float) -> float | None:
        """Bytes a second of a core over the batches since the last answer; None: not enough yet."""
        self._bytes += size_bytes
        self._cpu_s += cpu_s
        if self._cpu_s <= 0.0 or (self._cpu_s < METER_CPU_S and self._bytes < METER_BYTES):
            return None
        found = self._bytes / self._cpu_s
        self._bytes, self._cpu_s = 0, 0.0
        return found


class Paces:
    """Of one worker. ``file`` None: nobody looks."""

    def __init__(self, file: Path | None) -> None:
        self._published = Published(file)
        self._others = Elsewhere(file, FILE_PATTERN, Pace)
        self._known: dict[Key, Pace] = {_key(pace): pace for pace in (read([file]) if file is not None else ())}
        self._told: dict[Key, float] = {}
        self._elsewhere: dict[Key, Pace] = {}

    def of(self, bucket: str, attachment: Attachment) -> Pace | None:
        """What was found last, here or by the node's other workers."""
        key = (bucket, attachment.name, sources_of(attachment))
        return _better(self._known.get(key), self._elsewhere.get(key))

    def live(self, bucket: str, attachment: Attachment, geometry: FrameGeometry, bytes_per_s: float) -> None:
        """A sandbox measured it on frames that came."""
        key = (bucket, attachment.name, sources_of(attachment))
        before = self._known.get(key)
        first = before is None or not before.live
        if before is not None and before.live:
            bytes_per_s = SETTLE * bytes_per_s + (1 - SETTLE) * before.bytes_per_s
        frames = frames_text(geometry.dtype, geometry.shape)
        self._put(Pace(*key, frames, bytes_per_s, True, time.time_ns(), attachment.submitted_ns), tell=first)

    def tried(self, bucket: str, attachment: Attachment, frames: str, bytes_per_s: float) -> None:
        """A dry run measured it."""
        known = self.of(bucket, attachment)
        if known is None or not known.live:
            key = (bucket, attachment.name, sources_of(attachment))
            self._put(Pace(*key, frames, bytes_per_s, False, time.time_ns(), attachment.submitted_ns), tell=True)

    def attached(self, bucket: str, attachment: Attachment) -> bool:
        """Whether the kernel's pace is known; from here on it is that of the object that was put last."""
        pace = self.of(bucket, attachment)
        if pace is not None and pace.submitted_ns != attachment.submitted_ns:
            self._put(msgspec.structs.replace(pace, submitted_ns=attachment.submitted_ns), tell=True)
        return pace is not None

    async def look_around(self) -> None:
        """Learn what the other workers found; costs a look at the folder while nothing changed."""
        if await self._others.look_around():
            self._elsewhere = latest(self._others.items)

    def _put(self, pace: Pace, *, tell: bool) -> None:
        key = _key(pace)
        self._known.pop(key, None)
        self._known[key] = pace
        while len(self._known) > PACES_MAX:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._told.pop(oldest, None)
        told = self._told.get(key, 0.0)
        if tell or abs(pace.bytes_per_s - told) > TOLD_CHANGE * told:
            self._told[key] = pace.bytes_per_s
            self._published.put(list(self._known.values()))


def latest(paces: Iterable[Pace]) -> dict[Key, Pace]:
    """What counts of what several workers found."""
    found: dict[Key, Pace] = {}
    for pace in paces:
        found[_key(pace)] = _better(found.get(_key(pace)), pace) or pace
    return found


def _key(pace: Pace) -> Key:
    return pace.bucket, pace.kernel, pace.sources


def _better(one: Pace | None, other: Pace | None) -> Pace | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda pace: (pace.live, pace.time_ns))
