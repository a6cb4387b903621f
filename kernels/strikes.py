"""Which kernels fail: three failures in a row, without a product in between, disable a kernel until another source is put.

In: failures and successes of sandboxes; the files of the node's other workers. Out: whether a kernel is disabled; and a
small JSON file of this worker, replaced as a whole in a thread whenever something changed, which its successor begins with,
the other workers read, and whoever shows the state of kernels. What always holds: what one worker disabled is disabled in
all of them a moment later, also after a restart; a disk that refuses the file costs that, and no decision of this worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from kernels import published

STRIKES_KEPT_MAX = 4096
"""Failing kernels remembered; the least recently failed is forgotten first."""
FILE_PATTERN = "kernels-*.json"


class Strike(msgspec.Struct, frozen=True):
    """A kernel that failed lately. ``count``: failures in a row."""

    bucket: str
    kernel: str
    sha256: str
    count: int
    disabled: bool
    error: str
    time_ns: int


class Strikes:
    """Of one worker. ``file`` None: nobody looks."""

    def __init__(self, strikes_max: int, file: Path | None) -> None:
        self._strikes_max = strikes_max
        self._known: dict[tuple[str, str], Strike] = {}
        self._elsewhere: frozenset[tuple[str, str]] = frozenset()
        """Disabled by the node's other workers."""
        self._others = published.Elsewhere(file, FILE_PATTERN, Strike)
        self._published = published.Published(file)
        if file is not None:
            for strike in read_all([file]):
                self._known[strike.bucket, strike.sha256] = strike

    def failed(self, bucket: str, kernel: str, sha256: str, error: str) -> Strike:
        before = self._known.pop((bucket, sha256), None)
        count = (before.count if before else 0) + 1
        strike = Strike(bucket, kernel, sha256, count, count >= self._strikes_max, error[:1000], time.time_ns())
        self._known[bucket, sha256] = strike
        while len(self._known) > STRIKES_KEPT_MAX:
            del self._known[next(iter(self._known))]
        self._publish()
        return strike

    def succeeded(self, bucket: str, sha256: str) -> None:
        if self._known.pop((bucket, sha256), None) is not None:
            self._publish()

    def disabled(self, bucket: str, sha256: str) -> bool:
        strike = self._known.get((bucket, sha256))
        return (strike is not None and strike.disabled) or (bucket, sha256) in self._elsewhere

    @property
    def disabled_count(self) -> int:
        """Kernels that are disabled on this node."""
        here = {key for key, strike in self._known.items() if strike.disabled}
        return len(here | self._elsewhere)

    async def look_around(self) -> None:
        """Learn what the other workers disabled; costs a look at the folder while nothing changed."""
        if await self._others.look_around():
            self._elsewhere = frozenset((one.bucket, one.sha256) for one in self._others.items if one.disabled)

    def _publish(self) -> None:
        self._published.put(list(self._known.values()))


def read_all(files: Iterable[Path]) -> list[Strike]:
    """What the workers' files say; one that cannot be read is passed over."""
    return published.read_all(files, Strike)
