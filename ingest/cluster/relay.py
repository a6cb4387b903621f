"""Reading a version whose bytes lie on other nodes, wholly or in part.

In: a version's copies (``extents``, ``mirror``), a byte range, the neighbours. Out: an ``ObjectReader`` without file pieces,
whose ``chunks`` come from local segments and from other nodes, in order.
Always holds: what lies here is read here, and locked from the opening on; a node that fails is left out for the rest of the
read, which goes on with the other copy from the byte it had come to; where there is none the read fails with the node's name.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Executor

import msgspec

from ingest.cluster.neighbours import Address, Neighbours
from ingest.cluster.peer import EXTENTS_PER_FETCH, Fetched, NotThere
from ingest.errors import DataLost, NodeAway, Unreadable
from ingest.paths import NodePaths
from ingest.ports import FilePiece
from ingest.reader import SegmentReader, StaleExtent, lies_on
from ingest.records import Extent, ObjectRecord

Copy = Sequence[Extent]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Body bytes [start, stop) from one node: they lie in ``extents``, the first of which begins at body offset ``base``."""

    node: int
    start: int
    stop: int
    base: int
    extents: tuple[Extent, ...]


def plan(
    copies: Sequence[Copy],
    me: int,
    start: int,
    stop: int,
    usable: Callable[[int], bool],
    doubtful: Callable[[int], bool] = lambda _: False,
) -> list[Run]:
    """How to read [start, stop): from here where a copy is here, else from the first copy whose node is ``usable``, and not
    ``doubtful`` if that can be had.

    Pure. Raises DataLost where no copy covers the range, NodeAway (with the node's number) where none that does is usable.
    """
    starts = [_starts(copy) for copy in copies]
    runs: list[Run] = []
    position, covered = start, 0
    while position < stop:
        found = [_at(copy, begins, position) for copy, begins in zip(copies, starts, strict=True)]
        there = [one for one in found if one is not None]
        if not there:
            raise DataLost(f"the catalogue knows no place for byte {position}")
        here = [one for one in there if one[0].node == me]
        away = sorted((one for one in there if usable(one[0].node)), key=lambda one: doubtful(one[0].node))
        chosen = next(iter([*here, *away]), None)
        if chosen is None:
            raise NodeAway(str(there[0][0].node), "holds these bytes and cannot be asked")
        extent, base = chosen
        # A copy that is here may begin where an extent of another copy ends, or in the middle of this one.
        end = min(stop, base + extent.length)
        if not here:
            end = min([end, *(begin for copy, begins in zip(copies, starts, strict=True)
                              for begin in _local_after(copy, begins, position, end, me))])  # fmt: skip
        last = runs[-1] if runs else None
        if last is not None and last.node == extent.node and base in (covered, covered - last.extents[-1].length):
            # Right behind the run's extents, or the last of them still.
            extents = last.extents if base < covered else (*last.extents, extent)
            if len(extents) <= EXTENTS_PER_FETCH:
                runs[-1] = dataclasses.replace(last, stop=end, extents=extents)
                position, covered = end, base + extent.length
                continue
        runs.append(Run(extent.node, position, end, base, (extent,)))
        position, covered = end, base + extent.length
    return runs


def _starts(copy: Copy) -> list[int]:
    begins = [0]
    for extent in copy:
        begins.append(begins[-1] + extent.length)
    return begins


def _at(copy: Copy, begins: list[int], position: int) -> tuple[Extent, int] | None:
    """The extent of a copy that has the byte at ``position``, and where it begins in the body."""
    index = bisect.bisect_right(begins, position) - 1
    return (copy[index], begins[index]) if index < len(copy) else None


def _local_after(copy: Copy, begins: list[int], position: int, end: int, me: int) -> Iterable[int]:
    """Where in (position, end) extents begin that are here."""
    for index in range(bisect.bisect_right(begins, position), bisect.bisect_left(begins, end)):
        if index < len(copy) and copy[index].node == me:
            yield begins[index]
            return


class RelayReader:
    """An opened range (implements ``ingest.ports.ObjectReader``); it is read once."""

    pieces: Sequence[FilePiece] = ()

    def __init__(
        self,
        paths: NodePaths,
        executor: Executor,
        neighbours: Neighbours,
        me: int,
        record: ObjectRecord,
        start: int,
        stop: int,
    ) -> None:
        self._paths = paths
        self._executor = executor
        self._neighbours = neighbours
        self._me = me
        self._object_id = record.object_id
        self._settle = not record.settled
        self._copies = [copy for copy in (record.extents, record.mirror) if copy]
        self._position = start
        self._stop = stop
        self._failed: dict[int, NodeAway] = {}
        self._runs: list[Run] = []
        self._locked: SegmentReader | None = None
        self._source: Fetched | SegmentReader | None = None

    async def open(self) -> RelayReader:
        """Know that the range can be read: lock what is here, have the first node's answer. Raises NodeAway, StaleExtent,
        DataLost."""
        try:
            self._plan()
            await self._lock()
            if self._runs:
                self._source = await self._opened(self._runs[0])
        except BaseException:
            await self.close()
            raise
        return self

    async def __aenter__(self) -> RelayReader:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Unlock; idempotent."""
        await self._leave()
        if self._locked is not None:
            self._locked.close()

    async def chunks(self, size_bytes: int) -> AsyncGenerator[memoryview, None]:
        """The bytes in order, in views of at most ``size_bytes`` or BUFFER_BYTES; each is valid until the next is asked for."""
        while self._runs:
            if self._source is None:
                self._source = await self._opened(self._runs[0])
            run = self._runs[0]
            try:
                async with contextlib.aclosing(self._source.chunks(size_bytes)) as views:
                    async for view in views:
                        self._position += len(view)
                        yield view
                self._runs.pop(0)
            except NodeAway as error:
                self._fail(run, error)
            finally:
                await self._leave()

    async def _leave(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            await source.__aexit__(None, None, None)

    # -- inside

    def _plan(self) -> None:
        """Raises NodeAway: of several nodes that have failed, what the first did."""
        try:
            doubtful = self._neighbours.doubtful
            self._runs = plan(self._copies, self._me, self._position, self._stop, self._usable, doubtful)
        except NodeAway as error:
            raise self._failed.get(int(error.node), error) from None

    def _usable(self, node: int) -> bool:
        if node not in self._failed:
            try:
                self._neighbours.living(node)
            except NodeAway as error:
                self._failed[node] = error
        return node not in self._failed

    def _fail(self, run: Run, error: NodeAway) -> None:
        """Plan the rest without that node. Raises ``error``'s kind where nobody else has the bytes."""
        self._failed[run.node] = error
        if not isinstance(error, NotThere):
            self._neighbours.doubt(run.node)
        self._plan()

    async def _opened(self, run: Run) -> Fetched | SegmentReader:
        """The run's bytes from where the read has come to; it is ``self._runs[0]`` afterwards, even if the plan changed."""
        while True:
            if run.node == self._me:
                return await self._open_local(run)
            try:
                address: Address = self._neighbours.living(run.node)
                return await self._neighbours.client.fetch(
                    address,
                    self._object_id,
                    run.start,
                    run.stop,
                    base=run.base,
                    extents=run.extents,
                    settle=self._settle,
                )
            except NodeAway as error:
                self._fail(run, error)
            run = self._runs[0]

    async def _lock(self) -> None:
        """Nobody recycles a segment of ours that the read will come to."""
        local = {
            (extent.slot, extent.segment): extent
            for run in self._runs
            for extent in run.extents
            if run.node == self._me
        }
        length = sum(extent.length for extent in local.values())
        self._locked = await SegmentReader.open(self._paths, self._executor, tuple(local.values()), 0, length)

    async def _open_local(self, run: Run) -> SegmentReader:
        return await SegmentReader.open(
            self._paths, self._executor, run.extents, run.start - run.base, run.stop - run.base
        )


async def open_copies(
    paths: NodePaths,
    executor: Executor,
    neighbours: Neighbours | None,
    me: int,
    record: ObjectRecord,
    start: int,
    stop: int,
) -> SegmentReader | RelayReader:
    """Open body bytes [start, stop) of a version from whichever copy is nearest. Raises StaleExtent where the catalogue may
    know better by now, DataLost, NodeAway, Unreadable."""
    if neighbours is None:
        return await SegmentReader.open(paths, executor, record.extents, start, stop)
    stale: StaleExtent | None = None
    unreadable: Unreadable | None = None
    for copy in (record.extents, record.mirror):
        if copy and lies_on(me, copy, start, stop):
            try:
                return await SegmentReader.open(paths, executor, copy, start, stop)
            except StaleExtent as error:
                stale = error
            except Unreadable as error:
                unreadable = error
    if stale is not None:
        raise stale
    if unreadable is not None:
        record = _elsewhere(record, me, unreadable)
    try:
        return await RelayReader(paths, executor, neighbours, me, record, start, stop).open()
    except NotThere as error:
        if unreadable is not None:
            raise unreadable from None
        raise StaleExtent(str(error)) from None


def _elsewhere(record: ObjectRecord, me: int, unreadable: Unreadable) -> ObjectRecord:
    """With the copies of which nothing is here; raises ``unreadable`` where there is none."""
    copies = [copy for copy in (record.extents, record.mirror) if copy and all(one.node != me for one in copy)]
    if not copies:
        raise unreadable
    return msgspec.structs.replace(record, extents=copies[0], mirror=())
