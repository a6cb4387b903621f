"""Second copies that are missing, made afterwards: of versions that were stored without one, or whose node has gone for good.

In: the catalogue's list of such versions of this node, the neighbours. Out: copies on other nodes, which those have the catalogue
link; gauges of what is under-mirrored. One worker of a node runs it, beside ingest.
Always holds: a version that is archived needs no second copy; a node that is only restarting keeps its copies (GONE_S); what is
held for a commit that never came is dropped (HELD_S); one copy at a time, at a bounded rate while bodies arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence

from ingest.buffer import Buffer
from ingest.cluster.choice import candidates
from ingest.cluster.members import Member
from ingest.cluster.neighbours import Address, Neighbours
from ingest.cluster.peer import MirrorOf, NotThere
from ingest.counters import Counters
from ingest.errors import BufferFull, IngestError, NodeAway, NoSuchKey
from ingest.records import LifetimeClass, NodeState, ObjectRecord

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
HELD_PER_PASS = 1000
NS = 1_000_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class RemirrorLimits:
    interval_s: float = 5.0
    gone_s: float = 300.0
    """A node that is silent for so long has taken its copies with it. (It is drained for much earlier.)"""
    held_s: float = 86400.0
    """A copy whose commit has not come for so long is dropped."""
    page: int = 200
    busy_bytes_per_s: float = 200e6
    """While bodies arrive."""


class Remirror:
    def __init__(
        self, buffer: Buffer, neighbours: Neighbours, counters: Counters, limits: RemirrorLimits | None = None
    ) -> None:
        self._buffer = buffer
        self._neighbours = neighbours
        self._limits = limits or RemirrorLimits()
        self._me = buffer.segments.node
        self._objects = counters.cell("hiss_under_mirrored_objects")
        self._bytes = counters.cell("hiss_under_mirrored_bytes")
        self._made = counters.cell("hiss_remirrored_objects_total")
        self._made_bytes = counters.cell("hiss_remirrored_bytes_total")
        self._objects.set(0)
        self._bytes.set(0)

    async def run(self, stop: asyncio.Event) -> None:
        """For the life of the worker."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._limits.interval_s)
            if stop.is_set():
                return
            try:
                await self.once()
            except (IngestError, OSError) as error:
                logger.warning("second copies are not looked after for now: %s", error)

    async def once(self) -> None:
        """One pass over everything that has no second copy. Raises CatalogError."""
        await self._drop_forgotten()
        objects = length = 0
        able = True
        async for record in self._missing():
            if able:
                try:
                    if await self._copy(record):
                        continue
                except NoSuchKey:
                    continue  # deleted meanwhile
                except (NodeAway, BufferFull, OSError) as error:
                    # The rest of this pass counts only: whoever fails with one is not sent all the others as well.
                    able = False
                    logger.warning("no second copy of %s/%r for now: %s", record.bucket, record.key, error)
            objects += 1
            length += record.length
        self._objects.set(objects)
        self._bytes.set(length)

    async def _missing(self) -> AsyncIterator[ObjectRecord]:
        catalog, page = self._buffer.catalog, self._limits.page
        after = 0
        while found := await catalog.unmirrored(after, page):
            for record in found:
                yield record
            after = found[-1].sequence
        for member in self._neighbours.members.look().members:
            if member.node != self._me and self._has_gone(member):
                for record in await catalog.mirrored_by(member.node, page):
                    yield record

    def _has_gone(self, member: Member) -> bool:
        return member.record.state is NodeState.REMOVED or member.silent_s > self._limits.gone_s

    async def _copy(self, record: ObjectRecord) -> bool:
        """Make the second copy. False where there is nobody to make it. Raises NodeAway, BufferFull, IngestError."""
        members: Sequence[Member] = self._neighbours.members.all()
        found = candidates(members, self._me, record.stored_length, sending=self._neighbours.sending)
        if not found:
            return False
        address = Address.of(found[0])
        body = MirrorOf(record.object_id, record.bucket, record.key, record.stored_length, LifetimeClass.STREAM)
        self._neighbours.sending[address.node] += 1
        try:
            async with await self._buffer.open_reader(record, 0, record.stored_length) as reader:
                stream = await self._neighbours.client.mirror(address, body)
                try:
                    async for view in reader.chunks(READ_BYTES):
                        left = view
                        while left:
                            left = left[await stream.send(left) :]
                        await self._give_way(len(view))
                    await stream.finish()
                finally:
                    stream.abort()
        except NotThere as error:
            # It was deleted, or has a copy by now: the node that was to hold it says so.
            logger.info("%s/%r needs no second copy any more: %s", record.bucket, record.key, error)
            return True
        finally:
            self._neighbours.sending[address.node] -= 1
        self._made.add()
        self._made_bytes.add(record.stored_length)
        return True

    async def _give_way(self, count: int) -> None:
        if self._buffer.busy():
            await asyncio.sleep(count / self._limits.busy_bytes_per_s)

    async def _drop_forgotten(self) -> None:
        catalog = self._buffer.catalog
        before_ns = catalog.now_ns() - int(self._limits.held_s * NS)
        held = await catalog.held_mirrors(HELD_PER_PASS)
        forgotten = [object_id for object_id, since_ns in held if since_ns < before_ns]
        if forgotten:
            logger.warning("%d second copies are dropped: their commits never came", len(forgotten))
            await catalog.drop_mirror(forgotten)
