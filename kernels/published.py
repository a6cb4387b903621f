"""A small list that one worker publishes in a file, for its successor, the node's other workers, and whoever shows it.

In: the list, whenever it changes. Out: a JSON file, replaced as a whole in a thread; lists read from such files. What always
holds: a reader sees one list or the next; a disk that refuses the file costs nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

log = logging.getLogger("hiss.kernels")

FILE_BYTES_MAX = 8 << 20

Item = TypeVar("Item", bound=msgspec.Struct)


class Published:
    """Belongs to one event loop. ``file`` None: nobody looks."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._items: Sequence[msgspec.Struct] = ()
        self._writing: asyncio.Task[None] | None = None
        self._stale = False

    def put(self, items: Sequence[msgspec.Struct]) -> None:
        if self._file is None:
            return
        self._items = items
        self._stale = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(self._file), name=f"write {self._file}")

    async def _write(self, file: Path) -> None:
        while self._stale:
            self._stale = False
            document = msgspec.json.encode(self._items)
            try:
                await asyncio.to_thread(_replace, file, document)
            except OSError as error:
                log.warning("%s was not written: %s", file, error)


class Elsewhere(Generic[Item]):
    """What the node's other workers publish in files beside ``file``; ``file`` None: there are none."""

    def __init__(self, file: Path | None, pattern: str, kind: type[Item]) -> None:
        self.items: list[Item] = []
        self._file = file
        self._pattern = pattern
        self._kind = kind
        self._times: dict[Path, int] = {}

    async def look_around(self) -> bool:
        """Whether ``items`` are others now; costs a look at the folder while nothing changed."""
        return self._file is not None and await asyncio.to_thread(self._look_around, self._file)

    def _look_around(self, own: Path) -> bool:
        times: dict[Path, int] = {}
        for file in own.parent.glob(self._pattern):
            if file != own:
                with contextlib.suppress(OSError):
                    times[file] = file.stat().st_mtime_ns
        if times == self._times:
            return False
        self._times = times
        self.items = read_all(times, self._kind)
        return True


def beside(strikes_file: Path | None, pattern: str) -> Path | None:
    """Of the same worker, by the pattern of such files: ``notices-0.json`` of ``kernels-0.json`` and ``notices-*.json``."""
    if strikes_file is None:
        return None
    return strikes_file.with_name(pattern.replace("*", strikes_file.stem.rpartition("-")[2]))


def _replace(file: Path, document: bytes) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(document)
    os.replace(new, file)


def read_all(files: Iterable[Path], kind: type[Item]) -> list[Item]:
    """What the workers' files say; one that cannot be read is passed over."""
    found: list[Item] = []
    for file in files:
        try:
            with file.open("rb") as opened:
                found += msgspec.json.decode(opened.read(FILE_BYTES_MAX), type=list[kind])  # type: ignore[valid-type]
        except FileNotFoundError:
            continue
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s was passed over: %s", file, error)
    return found
