"""How fast kernels are: bytes of a stream that one core reduces in a second. Measured, never declared.

In: what sandboxes judged and the CPU time they took for it (``Meter``); dry runs of kernels that have judged nothing yet. Out:
``Paces``, which tells a kernel's pace, and a small JSON file of this worker that its successor, the node's other workers and the
control process read. What always holds: what real frames showed replaces a dry run, never the other way round; a pace is of the
sources it was measured with: another source begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from ingest.records import FrameGeometry
from kernels.attach import Attachment
from kernels.published import Published, read_all

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


def file_beside(strikes_file: Path | None) -> Path | None:
    """``paces-0.json`` of ``kernels-0.json``."""
    return (
        None if strikes_file is None else strikes_file.with_name(f"paces-{strikes_file.stem.rpartition('-')[2]}.json")
    )


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
        self._file = file
        self._published = Published(file)
        self._known: dict[tuple[str, str, str], Pace] = {}
        """(bucket, kernel, sources)."""
        self._told: dict[tuple[str, str, str], float] = {}
        self._elsewhere: dict[tuple[str, str, str], Pace] = {}
        self._times: dict[Path, int] = {}
        for pace in read([file]) if file is not None else ():
            self._known[_key(pace)] = pace

    def of(self, bucket: str, attachment: Attachment) -> Pace | None:
        """What was found last, here or by the node's other workers."""
        key = (bucket, attachment.name, sources_of(attachment))
        return _better(self._known.get(key), self._elsewhere.get(key))

    def live(self, bucket: str, attachment: Attachment, geometry: FrameGeometry, bytes_per_s: float) -> bool:
        """A sandbox measured it on frames that came. True where others should look at the kernel again."""
        key = (bucket, attachment.name, sources_of(attachment))
        before = self._known.get(key)
        if before is not None and before.live:
            bytes_per_s = SETTLE * bytes_per_s + (1 - SETTLE) * before.bytes_per_s
        frames = frames_text(geometry.dtype, geometry.shape)
        first = before is None or not before.live
        pace = Pace(*key, frames, bytes_per_s, True, time.time_ns(), attachment.submitted_ns)
        return self._put(pace, tell=first)

    def tried(self, bucket: str, attachment: Attachment, frames: str, bytes_per_s: float) -> bool:
        """A dry run measured it. True as of ``live``."""
        known = self.of(bucket, attachment)
        if known is not None and known.live:
            return False
        key = (bucket, attachment.name, sources_of(attachment))
        return self._put(Pace(*key, frames, bytes_per_s, False, time.time_ns(), attachment.submitted_ns))

    def attached(self, bucket: str, attachment: Attachment) -> bool:
        """Whether the kernel's pace is known; from here on it is that of the object that was put last."""
        pace = self.of(bucket, attachment)
        if pace is not None and pace.submitted_ns != attachment.submitted_ns:
            self._put(msgspec.structs.replace(pace, submitted_ns=attachment.submitted_ns), tell=True)
        return pace is not None

    async def look_around(self) -> None:
        """Learn what the other workers found; costs a look at the folder while nothing changed."""
        if self._file is not None:
            await asyncio.to_thread(self._look_around, self._file)

    def _put(self, pace: Pace, *, tell: bool = False) -> bool:
        key = _key(pace)
        self._known.pop(key, None)
        self._known[key] = pace
        while len(self._known) > PACES_MAX:
            self._told.pop(next(iter(self._known)), None)
            del self._known[next(iter(self._known))]
        told = self._told.get(key, 0.0)
        if not tell and abs(pace.bytes_per_s - told) < TOLD_CHANGE * told:
            return False
        self._told[key] = pace.bytes_per_s
        self._published.put(list(self._known.values()))
        return True

    def _look_around(self, own: Path) -> None:
        times: dict[Path, int] = {}
        for file in own.parent.glob(FILE_PATTERN):
            if file != own:
                with contextlib.suppress(OSError):
                    times[file] = file.stat().st_mtime_ns
        if times != self._times:
            self._times = times
            self._elsewhere = latest(read(times))


def latest(paces: Iterable[Pace]) -> dict[tuple[str, str, str], Pace]:
    """(bucket, kernel, sources) -> what counts of what several workers found."""
    found: dict[tuple[str, str, str], Pace] = {}
    for pace in paces:
        found[_key(pace)] = _better(found.get(_key(pace)), pace) or pace
    return found


def _key(pace: Pace) -> tuple[str, str, str]:
    return pace.bucket, pace.kernel, pace.sources


def _better(one: Pace | None, other: Pace | None) -> Pace | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda pace: (pace.live, pace.time_ns))
