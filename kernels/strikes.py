"""Which kernels fail: three failures in a row, without a product in between, disable a kernel until another source is put.

In: failures and successes of sandboxes. Out: whether a kernel is disabled; and, for whoever shows the state of kernels, a
small JSON file of this worker, replaced as a whole in a thread whenever something changed. What always holds: the file's
absence, or a disk that refuses it, changes no decision.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

log = logging.getLogger("hiss.kernels")

STRIKES_KEPT_MAX = 4096
"""Failing kernels remembered; the least recently failed is forgotten first."""
FILE_PATTERN = "kernels-*.json"
_FILE_BYTES_MAX = 8 << 20


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
        self._file = file
        self._known: dict[tuple[str, str], Strike] = {}
        self._writing: asyncio.Task[None] | None = None
        self._stale = False

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
        return strike is not None and strike.disabled

    def clear_file(self) -> None:
        """A slot's last process may have left one; this one has nothing to say yet."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _publish(self) -> None:
        if self._file is None:
            return
        self._stale = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="write strikes")

    async def _write(self) -> None:
        while self._stale:
            self._stale = False
            document = msgspec.json.encode(list(self._known.values()))
            try:
                await asyncio.to_thread(_replace, self._file, document)
            except OSError as error:
                log.warning("%s was not written: %s", self._file, error)


def _replace(file: Path | None, document: bytes) -> None:
    assert file is not None
    new = file.with_suffix(".new")
    new.write_bytes(document)
    os.replace(new, file)


def read_all(files: Iterable[Path]) -> list[Strike]:
    """What the workers' files say; one that cannot be read is passed over."""
    found: list[Strike] = []
    for file in files:
        try:
            with file.open("rb") as opened:
                found += msgspec.json.decode(opened.read(_FILE_BYTES_MAX), type=list[Strike])
        except (OSError, msgspec.MsgspecError) as error:
            log.debug("%s was passed over: %s", file, error)
    return found
