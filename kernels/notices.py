"""What is not as its submitter wanted it, and disables nothing: an array that does not fit a running stream, a wrong core.

In: what streams and lanes say. Out: a small JSON file of this worker, replaced as a whole, which whoever shows the state of
kernels reads; and the cores that were found wrong, also by this node's workers before a restart: a kernel whose core
was wrong stays on the cpu until it is submitted again. A disk that refuses the file costs what others see, and no decision here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from kernels.published import Published, read_all

log = logging.getLogger("hiss.kernels")

NOTICES_MAX = 4096
"""Remembered; the oldest is forgotten first."""
FILE_PATTERN = "notices-*.json"
MISFIT = "misfit"
"""What was put does not fit the frames that come: the stream goes on with what was there before."""
OFFLOAD = "offload"
"""The core was not what the kernel is."""


class Notice(msgspec.Struct, frozen=True):
    """``key``: the object it happened to, where there is one."""

    bucket: str
    kernel: str
    kind: str
    sha256: str
    error: str
    time_ns: int
    key: str = ""


def read(files: Iterable[Path]) -> list[Notice]:
    """What the workers' files say; one that cannot be read is passed over."""
    return read_all(files, Notice)


class Notices:
    """Of one worker. ``file`` None: nobody looks."""

    def __init__(self, file: Path | None) -> None:
        self._published = Published(file)
        self._known: dict[tuple[str, str, str], tuple[Notice, int]] = {}
        """(bucket, kernel, kind) -> what was said, at which revision of the bucket's kernels."""
        self._cores: dict[tuple[str, str], Notice] = {}
        """(bucket, SHA-256) -> why the core is not used."""
        for notice in read(sorted(file.parent.glob(FILE_PATTERN))) if file is not None else ():
            if notice.kind == OFFLOAD:
                self._cores[notice.bucket, notice.sha256] = notice
                self._known[notice.bucket, notice.kernel, OFFLOAD] = (notice, 0)
                log.error("kernel %s in bucket %s stays on the cpu: %s", notice.kernel, notice.bucket, notice.error)

    def misfit(self, bucket: str, kernel: str, sha256: str, error: str, key: bytes, revision: int) -> None:
        shown = key.decode("utf-8", "backslashreplace")
        self._say(Notice(bucket, kernel, MISFIT, sha256, error[:1000], time.time_ns(), shown), revision)

    def changed(self, bucket: str, revision: int) -> None:
        """The bucket's kernels or arrays are others now: what was said of earlier ones is over."""
        over = [
            known
            for known, (notice, said_at) in self._known.items()
            if notice.bucket == bucket and notice.kind == MISFIT and said_at != revision
        ]
        self._withdraw(over)

    def core_failed(self, bucket: str, kernel: str, sha256: str, error: str) -> None:
        notice = Notice(bucket, kernel, OFFLOAD, sha256, error[:1000], time.time_ns())
        self._cores[bucket, sha256] = notice
        while len(self._cores) > NOTICES_MAX:
            del self._cores[next(iter(self._cores))]
        self._say(notice, 0)

    def core_failure(self, bucket: str, sha256: str, submitted_ns: int) -> str:
        """Why the kernel's core is not used; empty where nothing was found, or the kernel was submitted again since."""
        notice = self._cores.get((bucket, sha256))
        if notice is None:
            return ""
        if submitted_ns > notice.time_ns:
            del self._cores[bucket, sha256]
            self._withdraw([(bucket, notice.kernel, OFFLOAD)])
            return ""
        return notice.error

    @property
    def cores_failed(self) -> int:
        return len(self._cores)

    def _say(self, notice: Notice, revision: int) -> None:
        self._known.pop((notice.bucket, notice.kernel, notice.kind), None)
        self._known[notice.bucket, notice.kernel, notice.kind] = (notice, revision)
        while len(self._known) > NOTICES_MAX:
            del self._known[next(iter(self._known))]
        self._publish()

    def _withdraw(self, over: list[tuple[str, str, str]]) -> None:
        if [self._known.pop(one) for one in over if one in self._known]:
            self._publish()

    def _publish(self) -> None:
        self._published.put([notice for notice, _ in self._known.values()])
