"""A drain process over plain files, for the archive's tests: run as a script, it is the process that tests kill.

Bodies of versions are the files ``<node>/bodies/<object id>``; recalled bytes become such a file again. Catalogue and
archive are the real ones. ``python drain_node.py NODE ARCHIVE LIMITS_JSON [used capacity]`` drains until SIGTERM.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from archive.pace import DrainLimits
from archive.process import serve
from archive.targets.files import aligned_buffer
from archive.targets.posix import PosixTarget
from archive.threads import IoThreads
from ingest.catalog.client import CatalogClient
from ingest.cluster.members import Members
from ingest.counters import DRAIN, Counters
from ingest.errors import DataLost
from ingest.paths import NodePaths
from ingest.records import Extent, ObjectRecord

DRAIN_SLOT = 31


@dataclasses.dataclass
class FileReader:
    path: Path
    pieces: Sequence[object] = ()

    async def __aenter__(self) -> FileReader:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def chunks(self, size_bytes: int) -> AsyncIterator[memoryview]:
        buffer = aligned_buffer(size_bytes)
        with open(self.path, "rb", buffering=0) as file:  # noqa: ASYNC230
            while count := file.readinto(buffer):
                yield buffer[:count]


class FileBuffer:
    """Bodies by object id: what the segments are on a real node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segment = itertools.count(1)
        folder.mkdir(exist_ok=True)

    def path(self, object_id: bytes) -> Path:
        return self._folder / object_id.hex()

    async def open_reader(self, record: ObjectRecord) -> FileReader:
        path = self.path(record.object_id)
        if not path.exists():
            raise DataLost(f"{path.name} is not in the buffer")
        return FileReader(path)

    async def land(self, record: ObjectRecord, chunks: AsyncIterator[memoryview]) -> tuple[Extent, ...]:
        part = self.path(record.object_id).with_suffix(".part")
        try:
            with open(part, "wb") as file:  # noqa: ASYNC230
                async for view in chunks:
                    file.write(view)
        except BaseException:
            part.unlink()
            raise
        part.rename(self.path(record.object_id))
        return (Extent(0, DRAIN_SLOT, next(self._segment), 1, 0, record.length),)

    async def keep(self, extents: Sequence[Extent]) -> None:
        return None

    async def abandon(self, extents: Sequence[Extent]) -> None:
        return None


async def main(node: Path, archive: Path, limits: DrainLimits, usage: tuple[int, int]) -> None:
    paths = NodePaths(node)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    buffer = FileBuffer(node / "bodies")
    threads = IoThreads(4)
    async with CatalogClient(paths, slot=DRAIN_SLOT) as catalog:
        await serve(
            catalog=catalog,
            target=PosixTarget(archive, threads),
            open_reader=buffer.open_reader,
            landing=buffer,
            usage=lambda: usage,
            snapshots_dir=paths.snapshots,
            counters=Counters(None, DRAIN),
            limits=limits,
            members=Members(paths),
            stop=stop,
        )
    threads.close()


if __name__ == "__main__":
    asyncio.run(
        main(
            Path(sys.argv[1]),
            Path(sys.argv[2]),
            DrainLimits(**json.loads(sys.argv[3])),
            (int(sys.argv[4]), int(sys.argv[5])) if len(sys.argv) > 4 else (0, 1),
        )
    )
