"""The second copy of a body, made while the body arrives (durability ``mirror``).

In: a body on its way (``MirrorSource``), the neighbours, what its bucket wants where a node is lost. Out: the copy, durable on
another node and held by the catalogue before the body is committed; or the word that there is none (``degraded``), where the
bucket allows that; or ``MirrorUnavailable``, which the body fails with.
Always holds: memory of the body is kept until the node that has the copy now has taken it; a node that is lost is replaced by
one that is sent everything again from its first byte, from memory or from this node's disk.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from ingest.cluster.choice import FAILURES_MAX, candidates
from ingest.cluster.members import HEARTBEAT_S
from ingest.cluster.neighbours import Address, Neighbours
from ingest.cluster.peer import MirrorAnswer, MirrorOf, MirrorStream
from ingest.counters import Counters
from ingest.errors import BufferFull, IngestError, MirrorUnavailable, NodeAway, StorageFailed, StreamAborted

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """Memory of a body that stays as it is until ``give`` is called, once."""

    view: memoryview
    give: Callable[[], None]


class MirrorSource(Protocol):
    """The body, as its copy sees it."""

    def lend(self, position: int) -> Lease | None:
        """Bytes from ``position`` on that are in memory; None where the next are not, or have not come."""
        ...

    def stored_until(self, position: int) -> int:
        """Bytes [position, here) are not in memory any more: they are on this node's disk."""
        ...

    def read_back(self, start: int, stop: int) -> AsyncGenerator[memoryview, None]: ...

    def mirrored(self) -> None:
        """More of the body has been taken (``Mirroring.taken``), or need not be."""
        ...

    def fail(self, error: IngestError) -> None: ...


class MirrorMeter:
    def __init__(self, counters: Counters) -> None:
        self.sent_bytes = counters.cell("hiss_mirror_sent_bytes_total")
        self.lost = counters.cell("hiss_mirror_lost_total")
        self.degraded = counters.cell("hiss_mirror_degraded_total")
        self.refused = counters.cell("hiss_mirror_refused_total")


class Mirroring:
    """One body's copy. Made when the body is admitted; it runs by itself until ``done`` or ``abort``."""

    def __init__(
        self,
        neighbours: Neighbours,
        source: MirrorSource,
        body: MirrorOf,
        *,
        me: int,
        loss: str,
        meter: MirrorMeter,
        ask: bool,
    ) -> None:
        """``loss``: what to do where a node is lost, as of ``hiss.mirror-loss``. ``ask``: have the node say that it has room
        before the body comes. Raises MirrorUnavailable where no node can be asked and the bucket does not do without."""
        self.taken = 0
        """Bytes that the node of the moment has taken."""
        self.degraded = False
        self.may_be_held = False
        """A node has been sent it all, and may have had the catalogue hold it."""
        self._neighbours = neighbours
        self._source = source
        self._body = body
        self._me = me
        self._loss = loss
        self._meter = meter
        self._ask = ask
        self._failures: collections.Counter[int] = collections.Counter()
        self._reason = ""
        self._total: int | None = None
        self._crc: int | None = None
        self._more = asyncio.Event()
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        try:
            self._choose()
        except MirrorUnavailable as error:
            self._do_without(error)

    # -- for the body

    def start(self) -> None:
        if not self.degraded:
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(self._ended)

    async def ready(self) -> None:
        """A node has said that it takes the body (or it has none, and need not). Raises MirrorUnavailable."""
        if self._task is None or self.degraded:
            return
        ready = asyncio.ensure_future(self._ready.wait())
        try:
            await asyncio.wait((ready, self._task), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._task.done():
            await self._task

    def more(self) -> None:
        """Bytes have come."""
        self._more.set()

    def end(self, total: int, crc64nvme: int | None) -> None:
        """The body is ``total`` bytes long, with this checksum where it is known."""
        self._total, self._crc = total, crc64nvme
        self._more.set()

    async def done(self) -> None:
        """The copy is durable and held, or the body does without. Raises MirrorUnavailable."""
        if self._task is not None:
            await asyncio.shield(self._task)

    def keeps(self, stop: int) -> bool:
        """Must memory of the body up to ``stop`` stay?"""
        return not self.degraded and self.taken < stop

    async def begin_anew(self) -> None:
        """What was sent is not what will be stored: forget it. ``start`` and ``end`` begin again."""
        self.abort()
        if self._task is not None:
            await asyncio.wait((self._task,))
        self.taken = 0
        self._total = None

    def abort(self) -> None:
        """No copy is wanted; idempotent."""
        if self._task is not None and not self._task.done():
            self._task.cancel()

    # -- the copy

    async def _run(self) -> None:
        """Until a node has it all. Raises MirrorUnavailable."""
        while not self.degraded:
            try:
                address = self._choose()
            except MirrorUnavailable as error:
                self._do_without(error)
                return
            stream: MirrorStream | None = None
            watching: asyncio.Task[None] | None = None
            self._neighbours.sending[address.node] += 1
            try:
                stream = await self._neighbours.client.mirror(address, self._described(), ask=self._ask)
                watching = asyncio.create_task(self._watch(address, stream))
                self._ready.set()
                await self._feed(stream)
                self.may_be_held = True
                self._check(address, await stream.finish())
                return
            except (NodeAway, BufferFull) as error:
                self._lost(address, error)
            finally:
                self._neighbours.sending[address.node] -= 1
                if watching is not None:
                    watching.cancel()
                if stream is not None:
                    stream.abort()

    def _choose(self) -> Address:
        members = self._neighbours.members.all()
        found = candidates(
            members,
            self._me,
            self._body.length,
            sending=self._neighbours.sending,
            failures=self._failures,
            doubtful=self._neighbours.doubtful,
        )
        if found:
            return Address.of(found[0])
        if self._reason:
            raise MirrorUnavailable(f"no node can take the second copy that the bucket asks for: {self._reason}")
        others = [member for member in members if member.node != self._me]
        reason = "none of the others is up, reachable and has room" if others else "this node is alone"
        raise MirrorUnavailable(f"no node can take the second copy that the bucket asks for: {reason}")

    def _described(self) -> MirrorOf:
        """The length that will be true, once that is known."""
        if self._total is None or self._body.length in (None, self._total):
            return self._body
        return dataclasses.replace(self._body, length=self._total)

    async def _feed(self, stream: MirrorStream) -> None:
        while True:
            self._more.clear()
            lease = self._source.lend(self.taken)
            if lease is not None:
                try:
                    count = await stream.send(lease.view)
                finally:
                    lease.give()
                self._took(count)
            elif (stop := self._source.stored_until(self.taken)) > self.taken:
                async with contextlib.aclosing(self._source.read_back(self.taken, stop)) as views:
                    async for view in views:
                        left = view
                        while left:
                            count = await stream.send(left)
                            left = left[count:]
                            self._took(count)
            elif self._total is not None and self.taken >= self._total:
                return
            else:
                await self._more.wait()

    async def _watch(self, address: Address, stream: MirrorStream) -> None:
        """A node may fall silent where no byte shows it: while we wait for its answer, or for our own sender."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                self._neighbours.living(address.node)
            except NodeAway as error:
                stream.lost(error.reason)
                return

    def _took(self, count: int) -> None:
        self.taken += count
        self._meter.sent_bytes.add(count)
        self._source.mirrored()

    def _check(self, address: Address, answer: MirrorAnswer) -> None:
        wrong_crc = self._crc is not None and int(answer.crc64nvme, 16) != self._crc
        if answer.node != address.node or answer.length != self._total or wrong_crc:
            raise NodeAway(address.name, "stored other bytes than it was sent")

    def _lost(self, address: Address, error: NodeAway | BufferFull) -> None:
        """Raises MirrorUnavailable where the bucket refuses a body that has lost its copy."""
        begun, self.taken = self.taken > 0, 0
        self._failures[address.node] += FAILURES_MAX if isinstance(error, BufferFull) else 1
        self._reason = str(error)
        if isinstance(error, NodeAway):
            self._neighbours.doubt(address.node)
        logger.warning("the copy of %s/%r is lost: %s", self._body.bucket, self._body.key, error)
        if begun:
            self._meter.lost.add()
            if self._loss == "refuse":
                self._meter.refused.add()
                raise MirrorUnavailable(f"the second copy that the bucket asks for was lost: {error}")

    def _do_without(self, error: MirrorUnavailable) -> None:
        if self._loss != "degrade":
            self._meter.refused.add()
            raise error
        logger.warning("%s/%r is stored on this node only: %s", self._body.bucket, self._body.key, error)
        self._meter.degraded.add()
        self.degraded = True
        self._ready.set()
        self._source.mirrored()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, IngestError):
            self._source.fail(error if isinstance(error, MirrorUnavailable) else StorageFailed(str(error)))
        elif error is not None:
            logger.error("the copy of %s/%r broke", self._body.bucket, self._body.key, exc_info=error)
            self._source.fail(StreamAborted("the second copy broke"))
