"""One batch: objects of one frame, judged in one state of one lane, stored as one partial.

In: members while it is open; outcomes from the lane. Out: a stored partial, or members that are left to others: gone, owed,
or given up with a reason. What always holds: the stored state covers exactly the members that the partial names. When the
catalogue refuses some of them (deleted or replaced while the batch was judged), the others are judged again.

Of kernels with floating-point sums each member has a state of its own (a ``Cell`` with one member), because the order
of their merge is known only once the run closes; of kernels that filter raw data, too, because a filtered member cannot be
judged again when another one goes; of all others one state holds the whole batch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ingest.crashpoints import crashpoint
from ingest.errors import IngestError, MembersGone, NoSuchBucket, NoSuchKey, StaleVersion
from ingest.ports import Domain, FrameBatch, LoadedBytes
from ingest.records import CommitObject, PartialMember, PartialOf
from kernels.attach import Attachment
from kernels.contract import DROP, REPLACE
from kernels.lane import TRANSIENT, Lane, StateArrays
from kernels.passes import Gone, Hopeless, LoadedBatch, Postponed, load, load_stored
from kernels.rawfilter.packed import pack
from kernels.runs import partial as partials
from kernels.runs.cell import Cell, Entry
from kernels.runs.names import exact, partial_key
from kernels.runs.stale import drop_stale

if TYPE_CHECKING:
    from kernels.runs.gather import RunHost

log = logging.getLogger("hiss.kernels")

AGE_S = 1.0
"""How long a batch takes members."""
MEMBERS_MAX = 1024
"""Bounds what one overwritten member costs: the others of its partial are judged again."""
EACH_BYTES_MAX = 64 << 20
"""State of a batch whose members have one each (one member always fits)."""
FILTERED_BYTES_MAX = 1 << 20
"""State of a kernel that filters, to be stored once a member; a larger one is the batch's (and where one of its members
goes, those that were filtered meanwhile fail)."""
LOADS_MAX = 2
"""Frames of one batch being read back at once."""
STORE_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)


class Batch:
    """Made open; ``filled``, then ``end``, then ``abandon`` whatever happened."""

    def __init__(
        self,
        host: RunHost,
        run: bytes,
        group: str,
        attachment: Attachment,
        lane: Lane,
        domain: Domain,
        done: Callable[[bytes, str], None],
        replaces: tuple[bytes, ...] = (),
        encoded: int = 0,
    ) -> None:
        """``replaces``: partials that go when this one is stored, members and all. ``encoded``: the members are stored
        encoded, and so many at most are judged at once; 0: they are plain."""
        self.host = host
        self.run = run
        self.group = group
        self.attachment = attachment
        self.kernel = attachment.kernel
        self.lane = lane
        self.domain = domain
        self.encoded = encoded
        self.feedback_events = 0
        self.dropped_rows = 0
        self.changed = asyncio.Event()
        self.over = asyncio.Event()
        self._done = done
        self._replaces = replaces
        # An ordered kernel has one state whatever it sums: its order is decided before it begins.
        size = sum(spec.size_bytes for spec in self.kernel.state)
        apart = not exact(self.kernel) or (attachment.raw != "all" and size <= FILTERED_BYTES_MAX)
        self._apart = apart and not self.kernel.ordered
        self._each = self._apart and size > 0
        self._members_max = MEMBERS_MAX
        if self._each:
            self._members_max = max(1, min(MEMBERS_MAX, EACH_BYTES_MAX // size))
        self._cells: list[Cell] = []
        self._entries: list[Entry] = []
        self._refusal: Hopeless | None = None
        self._closed = False
        self._loading: set[asyncio.Task[None]] = set()
        self._started_ns = time.time_ns()
        self._deadline_s = asyncio.get_running_loop().time() + AGE_S
        domain.hold()

    @property
    def full(self) -> bool:
        return len(self._entries) >= self._members_max

    def add(self, entry: Entry, frame: FrameBatch | None) -> None:
        self._entries.append(entry)
        if self._refusal is not None:
            if frame is not None:
                frame.release()
            return
        if self._each or not self._cells:
            self._cells.append(Cell(self))
        self._cells[-1].add(entry, frame)

    def close(self) -> None:
        """No member comes any more. Idempotent."""
        self._closed = True
        self.changed.set()

    def refuse(self, kind: str, reason: str) -> None:
        if self._refusal is None:
            self._refusal = Hopeless(kind, reason)
            self.changed.set()

    # -- its life

    async def filled(self, busy: Callable[[], bool]) -> None:
        """Read back what lags until no member comes any more: closed, or old enough and not ``busy``."""
        loop = asyncio.get_running_loop()
        while not self._closed and self._refusal is None:
            self.changed.clear()
            self._catch_up()
            wait_s = self._deadline_s - loop.time()
            if wait_s <= 0:
                if not busy():
                    return
                wait_s = AGE_S / 10
            try:
                async with asyncio.timeout(wait_s):
                    await self.changed.wait()
            except TimeoutError:
                continue

    async def end(self) -> list[Entry]:
        """Have every member judged, store the partial; the entries that must be judged again, with others."""
        self._closed = True
        for cell in self._cells:
            if self._refusal is None:
                cell.finish()
        while not all(cell.final for cell in self._cells):
            self.changed.clear()
            if self._refusal is not None:
                await self._refused(self._refusal)
                return []
            self._catch_up()
            if not all(cell.final for cell in self._cells):
                await self.changed.wait()
        return await self._store()

    def abandon(self) -> None:
        """Leave the lane and forget the members; what was not stored stays owed."""
        for task in self._loading:
            task.cancel()
        for cell in self._cells:
            cell.leave()
        for entry in self._entries:
            self._done(entry.record.object_id, self.kernel.name)
        if not self.over.is_set():
            self.domain.drop()
        self.over.set()

    # -- frames read back from disk

    def _catch_up(self) -> None:
        for cell in self._cells:
            while len(self._loading) < LOADS_MAX and self._refusal is None:
                number = cell.take()
                if number is None:
                    break
                task = asyncio.get_running_loop().create_task(self._bring_back(cell, number))
                self._loading.add(task)
                task.add_done_callback(self._brought)

    def _brought(self, task: asyncio.Task[None]) -> None:
        self._loading.discard(task)
        self.changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a frame could not be read back", exc_info=error)
            self.refuse("internal", "internal error of the kernel host")

    async def _bring_back(self, cell: Cell, number: int) -> None:
        entry = cell.entries[number]
        await self.lane.admitted()
        pieces = self.host.context.pieces
        await pieces.acquire()
        try:
            loaded, position = await self._load(entry)
        except BaseException as error:
            pieces.release()
            if self.over.is_set() or not isinstance(error, Gone | Postponed | Hopeless):
                raise
            cell.without(number)
            await self._lost(entry, error)
            return
        batch = LoadedBatch(loaded, number, 1, (pieces,), position)
        if self.over.is_set() or self._refusal is not None:
            batch.release()
        else:
            cell.loaded(batch)

    async def _load(self, entry: Entry) -> tuple[LoadedBytes | None, int]:
        """The member's stored bytes, and which body offset they begin at."""
        if entry.index is not None:
            return await load_stored(self.host.pad, entry.record, entry.index, 0, 1, self.domain)
        origin, size = entry.geometry.origin, entry.geometry.frame_bytes
        return await load(self.host.pad, entry.record, origin, size, self.domain), origin

    async def _lost(self, entry: Entry, why: Exception) -> None:
        """One member's frame cannot be had: the others go on without it."""
        if isinstance(why, Postponed):
            await self.host.postpone(entry.record, self.kernel.name, why)
        elif isinstance(why, Hopeless):
            await self._failed(entry, f"{why.kind}: {why}", give_up=True)

    # -- the end

    async def _refused(self, why: Hopeless) -> None:
        """The lane serves nobody. The kernel's own failures are the answer to each member; ours are tried again."""
        tally = self.host.context.tally
        given_up = why.kind not in TRANSIENT
        log.warning("kernel %s cannot reduce %d objects of %r: %s", self.kernel.name, len(self._entries), self.run, why)
        if given_up:
            tally.given_up(len(self._entries))
        for entry in self._entries:
            if given_up or why.kind == "internal":
                await self._failed(entry, f"{why.kind}: {why}", give_up=given_up)
            if not given_up:
                await self.host.postpone(entry.record, self.kernel.name, Postponed(str(why)))

    async def _failed(self, entry: Entry, reason: str, *, give_up: bool) -> None:
        catalog = self.host.catalog
        try:
            await catalog.reduction_failed(entry.record.object_id, self.kernel.name, reason[:1000], give_up=give_up)
        except (StaleVersion, NoSuchKey, NoSuchBucket):
            return
        except IngestError as error:
            log.warning(
                "kernel %s: the failure over %r was not recorded: %s", self.kernel.name, entry.record.key, error
            )

    async def _store(self) -> list[Entry]:
        entries = [entry for entry in self._entries if not entry.gone]
        if not entries:
            return []
        for entry in entries:
            entry.ledger.record(self.kernel.name, entry.verdict)
        await drop_stale(self.host.catalog, self.kernel.name, self.run, [entry.record for entry in entries])
        partial = await self.host.in_thread(self._partial)
        body = await self.host.in_thread(lambda: memoryview(partials.encode(partial)))
        try:
            await self._commit(partial, body, entries)
        except MembersGone as refusal:
            gone = set(str(refusal).split())
            left = [entry for entry in entries if entry.record.object_id.hex() not in gone]
            for entry in left:
                entry.verdict = entry.rows = None
                entry.ledger.record(self.kernel.name, None)
            return left
        except (StaleVersion, NoSuchKey, NoSuchBucket):
            return []
        except IngestError as error:
            for entry in entries:
                await self.host.postpone(entry.record, self.kernel.name, Postponed(f"{type(error).__name__}: {error}"))
            return []
        self.host.succeeded(entries[0].record.bucket, self.attachment)
        return []

    async def _commit(self, partial: partials.Partial, body: memoryview, entries: list[Entry]) -> None:
        first = entries[0].record
        for wait_s in (*STORE_BACKOFF_S, None):
            object_id = secrets.token_bytes(16)
            request = CommitObject(
                bucket=first.bucket,
                key=partial_key(self.kernel.name, self.run, object_id),
                object_id=object_id,
                length=len(body),
                etag="",
                crc64nvme=0,
                owner=first.owner,
                extents=(),
                headers={"content-type": partials.CONTENT_TYPE},
                partial=PartialOf(
                    kernel=self.kernel.name,
                    run=self.run,
                    group=self.group,
                    members=tuple(self._named(entry) for entry in entries),
                    replaces=self._replaces,
                    batch=True,
                    apart=self._apart,
                ),
            )
            crashpoint("partial-before")
            if self.host.handover.keeps(first.bucket, self.run, self.kernel.name):
                self.host.handover.give(object_id, partial)
            try:
                await self.host.pad.store(request, body)
                return
            except (StaleVersion, NoSuchKey, NoSuchBucket):
                self.host.handover.take(object_id)
                raise
            except IngestError as error:
                # Where the outcome is unknown and it was stored, the next attempt is told that nothing is owed.
                log.warning("a partial was not stored (%s: %s)", type(error).__name__, error)
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)

    def _named(self, entry: Entry) -> PartialMember:
        verdicts = b""
        if self.attachment.raw != "all" and entry.verdict is not None:
            verdicts = pack(np.array([entry.verdict], np.uint8))
        return PartialMember(entry.record.object_id, entry.ledger.ledger(), verdicts)

    def _partial(self) -> partials.Partial:
        """In a thread. Members and their states in key order."""
        cells = [cell for cell in self._cells if any(not entry.gone for entry in cell.entries)]
        entries = [entry for cell in cells for entry in cell.entries if not entry.gone]
        order = sorted(range(len(entries)), key=lambda at: entries[at].record.key)
        state: StateArrays
        if self._each:
            state = {spec.name: np.stack([_state(cells[at])[spec.name] for at in order]) for spec in self.kernel.state}
        else:
            (cell,) = cells
            state = _state(cell)
        return partials.Partial(
            origin=partials.origin_of(self.attachment),
            members=tuple(_member(entries[at]) for at in order),
            rows=b"".join(rows.tobytes() for at in order if (rows := entries[at].rows) is not None),
            rows_left_out=self.dropped_rows,
            state=partials.state_bytes(state),
            each=self._each,
            started_ns=self._started_ns,
            ended_ns=time.time_ns(),
            feedback_events=self.feedback_events,
        )


def _state(cell: Cell) -> StateArrays:
    assert cell.state is not None
    return cell.state


def _member(entry: Entry) -> partials.Member:
    verdict = entry.verdict
    return partials.member_of(
        entry.record,
        entry.geometry,
        frames=1,
        kept=int(verdict not in (None, DROP, REPLACE)),
        dropped=int(verdict == DROP),
        replaced=int(verdict == REPLACE),
        unreduced=int(verdict is None),
        rows=0 if entry.rows is None else len(entry.rows),
    )
