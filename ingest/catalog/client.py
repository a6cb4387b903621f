"""The catalogue as every process sees it: implements ``ingest.ports.Catalog``.

Mutations go over the socket to the catalogue process; reads go straight to SQLite, point look-ups in the calling thread
(about 50 µs), lists and scans in a thread of their own.

What always holds: a call that returned is durable and visible to every process; a call without an answer is sent again on
the next connection, which is safe (see wire.py), until its time is up, and then raises CatalogUnavailable: outcome unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import msgspec

from ingest import clock
from ingest.catalog import rows, wire
from ingest.catalog.generation import GenerationFile
from ingest.catalog.reader import Reader
from ingest.cluster import identity
from ingest.cluster.members import Members
from ingest.errors import (
    CatalogUnavailable,
    LeaseLost,
    NoSuchBucket,
    NoSuchKey,
    NoSuchReservation,
    NoSuchUpload,
    NoSuchVersion,
    StaleEpoch,
    StorageFailed,
)
from ingest.origin import ORIGIN
from ingest.paths import NodePaths, socket_address
from ingest.records import (
    ArchiveCopy,
    BucketRecord,
    CommitObject,
    CommitPart,
    CompleteUpload,
    Deleted,
    DeleteObject,
    DrainCounts,
    Extent,
    FilterJob,
    FrameLedger,
    FreedExtents,
    HeldByNode,
    ListedObject,
    NodeCounts,
    NodeRecord,
    NodeState,
    ObjectRecord,
    Offer,
    OwedInRun,
    OwedProduct,
    PartialRecord,
    PartRecord,
    ReductionCount,
    ReductionJob,
    Reservation,
    ReservationUse,
    Retention,
    RunProductRecord,
    RunRecord,
    SegmentUse,
    SettleRequest,
    UploadRecord,
    UserRecord,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
PushHandler = Callable[[FreedExtents | SettleRequest], Awaitable[None]]

CALL_TIMEOUT_S = 30.0
"""How long an unanswered call is sent again before the outcome is given up as unknown."""
FRESH_TIMEOUT_S = 2.0
"""How long a look-up on a node of a cluster waits to be told that it sees everything."""
ENGINE_CLOCK_NS = 1_000_000_000
"""By so much the engine's clock may be ahead of what this node thinks it says."""
RECONNECT_FIRST_S, RECONNECT_LAST_S = 0.01, 1.0
SETTLE_GRACE_S = 5.0
SAY_AGAIN_S = 60.0
"""Reads that fail are told so often."""

_NOT_THERE = (NoSuchBucket, NoSuchKey, NoSuchVersion, NoSuchUpload, NoSuchReservation)
_NOT_KNOWN = "the cluster's engine is away, and this node has not heard of what was asked for: it may be there"

_record = msgspec.msgpack.Decoder(ObjectRecord).decode
_records = msgspec.msgpack.Decoder(list[ObjectRecord]).decode
_part = msgspec.msgpack.Decoder(PartRecord).decode
_bucket = msgspec.msgpack.Decoder(BucketRecord).decode
_reservation = msgspec.msgpack.Decoder(Reservation).decode
_deleted = msgspec.msgpack.Decoder(Deleted).decode
_text = msgspec.msgpack.Decoder(str).decode
_nothing = msgspec.msgpack.Decoder(None).decode
_flag = msgspec.msgpack.Decoder(bool).decode
_node = msgspec.msgpack.Decoder(NodeRecord).decode


@dataclasses.dataclass(slots=True, eq=False)
class _Pending:
    frame: bytes
    answer: asyncio.Future[msgspec.Raw]
    sent_again: bool = False


class _Wire(asyncio.Protocol):
    """The socket: frames in to the client, frames out gathered to one write for each turn of the loop."""

    def __init__(self, client: CatalogClient) -> None:
        self._client = client
        self._frames = wire.Frames()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self.answered = False
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit

    def data_received(self, data: bytes) -> None:
        self.answered = True
        for payload in self._frames.feed(data):
            self._client.received(wire.decode_from_server(payload))

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self.lost.set()

    def send(self, frame: bytes) -> None:
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(frame)

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _Readers:
    """One read-only connection for each thread, opened anew when the database file was replaced."""

    def __init__(self, paths: NodePaths, node: int) -> None:
        self._paths = paths
        self._node = node
        self._local = threading.local()
        self._generation: GenerationFile | None = None
        self._open: list[Reader] = []
        self._said_at = -SAY_AGAIN_S

    def generation(self) -> GenerationFile:
        if self._generation is None:
            try:
                self._generation = GenerationFile(self._paths.run / "generation")
            except OSError as error:
                raise CatalogUnavailable("the catalogue process has not started here yet") from error
        return self._generation

    def read(self, look: Callable[[Reader], T]) -> T:
        """Raises what ``look`` raises; SQLite's own troubles become StorageFailed or CatalogUnavailable."""
        try:
            return look(self._reader())
        except sqlite3.Error as error:
            self._forget()
            now = time.monotonic()
            if now - self._said_at >= SAY_AGAIN_S:  # some ask twenty times a second
                self._said_at = now
                logger.warning("a catalogue read failed and is tried again: %s", error)
        try:
            return look(self._reader())
        except sqlite3.Error as error:
            self._forget()
            raise StorageFailed(f"catalogue: {error}") from error

    def _reader(self) -> Reader:
        incarnation = self.generation().incarnation()
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is not None and self._local.incarnation == incarnation:
            return reader
        self._forget()
        reader = Reader(rows.connect(self._paths.catalogue, read_only=True), self._node)
        self._local.reader, self._local.incarnation = reader, incarnation
        self._open.append(reader)
        return reader

    def _forget(self) -> None:
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is not None:
            self._open.remove(reader)
            self._local.reader = None
            reader.close()

    def close(self) -> None:
        for reader in self._open:
            reader.close()
        self._open.clear()
        if self._generation is not None:
            self._generation.close()
            self._generation = None


class CatalogClient:
    """``slot``: the segment slot this process owns, None for a process without one. Use as an async context manager."""

    def __init__(
        self, paths: NodePaths, *, slot: int | None = None, node: int | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> None:
        """``node``: None: the one that the folder is."""
        known = identity.read(paths)
        self._clustered = known is not None
        self.node = node if node is not None else known.node if known is not None and known.joined else 0
        self._paths = paths
        self._clock = clock.of(paths)
        self._members = Members(paths)
        self._slot = slot
        # A later process of the same slot must win over an earlier one, also across a restart of the catalogue process.
        # The clock does not step back while the machine runs, and no socket outlives the machine.
        self._epoch = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._timeout_s = timeout_s
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._wire: _Wire | None = None
        self._fenced = False
        self._closed = False
        self._connected = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._pusher: asyncio.Task[None] | None = None
        self._pushes: asyncio.Queue[FreedExtents | SettleRequest] = asyncio.Queue()
        self._handlers: list[PushHandler] = []
        self._claims: dict[bytes, int] = {}
        """The claim of each version that is drained here."""
        self._readers = _Readers(paths, self.node)
        self._thread = ThreadPoolExecutor(2, "catalogue-reads")

    async def __aenter__(self) -> CatalogClient:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Start keeping a connection; returns once there is one. Raises CatalogUnavailable after the call timeout."""
        self._keeper = asyncio.create_task(self._keep_connected())
        self._pusher = asyncio.create_task(self._deliver())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._connected.wait()
        except TimeoutError:
            await self.close()
            raise CatalogUnavailable(f"no catalogue process answers at {self._paths.catalogue_socket}") from None

    async def close(self) -> None:
        self._closed = True
        for task in (self._keeper, self._pusher):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._wire is not None:
            self._wire.close()
            await self._wire.lost.wait()
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(CatalogUnavailable("this process is closing its catalogue connection"))
        self._pending.clear()
        self._thread.shutdown()
        self._readers.close()

    def subscribe(self, handler: PushHandler) -> None:
        """Receive pushes for the slot this client registered as, in order."""
        self._handlers.append(handler)

    def now_ns(self) -> int:
        """The node's time (ingest/clock.py), by the engine's clock in a cluster."""
        return self._clock() + self._readers.generation().ahead_ns if self._clustered else self._clock()

    def generation(self) -> int:
        """Changes with every commit that changes buckets, users or kernels."""
        return self._readers.generation().generation()

    # -- connection
    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = RECONNECT_FIRST_S
        while True:
            try:
                address = socket_address(self._paths.catalogue_socket)
                _, self._wire = await loop.create_unix_connection(lambda: _Wire(self), address)
            except OSError:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_LAST_S)
                continue
            self._wire.send(wire.frame(wire.Register(self._slot, self._epoch)))
            for pending in self._pending.values():
                pending.sent_again = True
                self._wire.send(pending.frame)
            self._connected.set()
            await self._wire.lost.wait()
            self._connected.clear()
            pause_s = RECONNECT_FIRST_S if self._wire.answered else min(pause_s * 2, RECONNECT_LAST_S)
            self._wire = None
            logger.warning("the catalogue process is gone; connecting again")
            await asyncio.sleep(pause_s)

    def received(self, message: wire.Answer | wire.Push) -> None:
        if isinstance(message, wire.Push):
            for push in (message.freed, message.settle):
                if push is not None:
                    self._pushes.put_nowait(push)
            return
        pending = self._pending.pop(message.id, None)
        if pending is None or pending.answer.done():
            return
        if message.error is None:
            pending.answer.set_result(message.result)
            return
        error = wire.error_from(message.error)
        self._fenced = self._fenced or isinstance(error, StaleEpoch)
        pending.answer.set_exception(error)

    async def _deliver(self) -> None:
        while True:
            push = await self._pushes.get()
            for handler in self._handlers:
                try:
                    await handler(push)
                except Exception:
                    # The next push is about other bytes: it must arrive all the same.
                    logger.exception("a push from the catalogue could not be handled")

    async def _call(
        self,
        request: wire.Mutation | wire.Settle | wire.Snapshot | wire.Barrier | wire.Fresh,
        decode: Callable[[msgspec.Raw], T],
        **extra: Any,
    ) -> T:
        """``already``: an error that, on a call that was sent again, says the first time had succeeded."""
        if self._closed:
            raise CatalogUnavailable("this process closed its catalogue connection")
        if self._fenced:
            raise StaleEpoch("this slot belongs to a newer process")
        self._last_id += 1
        call = self._last_id
        loop = asyncio.get_running_loop()
        pending = _Pending(wire.frame(wire.Call(call, request, ORIGIN.get())), loop.create_future())
        self._pending[call] = pending
        if self._wire is not None:
            self._wire.send(pending.frame)
        timeout_s = extra.get("timeout_s", self._timeout_s)
        timer = loop.call_later(timeout_s, self._expire, call, timeout_s)
        try:
            return decode(await pending.answer)
        except extra.get("already", ()):
            if pending.sent_again:
                return decode(msgspec.Raw(wire.encode_value(None)))
            raise
        finally:
            timer.cancel()
            self._pending.pop(call, None)

    def _expire(self, call: int, timeout_s: float) -> None:
        pending = self._pending.pop(call, None)
        if pending is not None and not pending.answer.done():
            pending.answer.set_exception(
                CatalogUnavailable(f"no answer from the catalogue process in {timeout_s:g} s: the outcome is unknown")
            )

    # -- a cluster
    @property
    def engine_away_s(self) -> float:
        """How long a cluster's engine has not answered; 0 while it does, and on a node alone."""
        return self._readers.generation().engine_away_s

    @property
    def commits_stuck_s(self) -> float:
        """How long a cluster's engine has answered and taken no commit; 0 while it takes them, and on a node alone."""
        return self._readers.generation().commits_stuck_s

    async def fresh(self) -> None:
        """See everything that any node was answered before. Raises CatalogUnavailable where that is not to be had."""
        if not await self._fresh():
            raise CatalogUnavailable("the cluster's engine is away: what other nodes did is not known")

    async def _fresh(self) -> bool:
        """As ``fresh``; False: what is known here may be old."""
        if not self._clustered:
            return True
        if self.engine_away_s:
            return False
        try:
            return await self._call(wire.Fresh(), _flag, timeout_s=FRESH_TIMEOUT_S)
        except (CatalogUnavailable, StaleEpoch):
            return False

    async def _look(self, look: Callable[[Reader], T]) -> T:
        """A point look-up that a client's request rests on. While the engine is away it finds what is known here; what is not
        known may be there all the same, so that is CatalogUnavailable then."""
        with _certain(await self._fresh()):
            return self._readers.read(look)

    async def _look_known(self, look: Callable[[Reader], T]) -> T:
        """For what changes seldom: what is known here; only what is not known is asked for everywhere."""
        try:
            return self._readers.read(look)
        except _NOT_THERE:
            return await self._look(look)

    async def _scan_fresh(self, look: Callable[[Reader], T]) -> T:
        with _certain(await self._fresh()):
            return await self._scan(look)

    async def _scan(self, look: Callable[[Reader], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._readers.read, look)

    # -- buckets and users
    async def create_bucket(
        self, name: str, owner: str, region: str = "", documents: Mapping[str, bytes] | None = None
    ) -> BucketRecord:
        record = BucketRecord(name, owner, self.now_ns(), region, documents=dict(documents or {}))
        return await self._call(wire.CreateBucket(record), _bucket)

    async def delete_bucket(self, name: str) -> None:
        await self._call(wire.DeleteBucket(name), _nothing, already=NoSuchBucket)

    async def set_bucket_tags(self, name: str, tags: Mapping[str, str]) -> BucketRecord:
        return await self._call(wire.TagBucket(name, dict(tags)), _bucket)

    async def configure_bucket(self, name: str, documents: Mapping[str, bytes | None]) -> BucketRecord:
        return await self._call(wire.ConfigureBucket(name, dict(documents)), _bucket)

    async def bucket(self, name: str) -> BucketRecord:
        return await self._look_known(lambda reader: reader.bucket(name))

    async def buckets(self) -> Sequence[BucketRecord]:
        return await self._scan_fresh(Reader.buckets)

    async def put_user(self, user: UserRecord) -> None:
        await self._call(wire.PutUser(user), _nothing)

    async def users(self) -> Sequence[UserRecord]:
        return await self._scan(Reader.users)

    # -- reservations
    async def reserve(self, reservation: Reservation, offers: Sequence[Offer]) -> Reservation:
        return await self._call(wire.Reserve(reservation, tuple(offers)), _reservation)

    async def extend_reservation(self, reservation_id: str, until_ns: int, offers: Sequence[Offer]) -> Reservation:
        return await self._call(wire.ExtendReservation(reservation_id, until_ns, tuple(offers)), _reservation)

    async def release_reservation(self, reservation_id: str) -> Reservation:
        return await self._call(wire.ReleaseReservation(reservation_id), _reservation)

    async def reservation(self, reservation_id: str) -> ReservationUse:
        return await self._look(lambda reader: reader.reservation(reservation_id))

    async def reservations(self, ends_after_ns: int) -> Sequence[ReservationUse]:
        await self._fresh()
        return self._readers.read(lambda reader: reader.reservations(ends_after_ns))

    def reserved(self) -> Sequence[Reservation]:
        uses = self._readers.read(lambda reader: reader.reservations(self.now_ns()))
        return [use.reservation for use in uses]

    def used_bytes(self, reservation_id: str, node: int) -> int:
        return self._readers.read(lambda reader: reader.used_bytes(reservation_id, node))

    # -- objects
    async def commit(self, request: CommitObject, *, only_if_known: bool = False) -> ObjectRecord:
        return await self._call(wire.Commit(request, only_if_known), _record)

    async def delete(self, requests: Sequence[DeleteObject]) -> Sequence[Deleted | Exception]:
        calls = (self._call(wire.Delete(_with_marker(request)), _deleted) for request in requests)
        results = await asyncio.gather(*calls, return_exceptions=True)
        return [_deleted_or_error(result) for result in results]

    async def head(self, bucket: str, key: bytes, version_id: str | None = None) -> ObjectRecord:
        return await self._look(lambda reader: reader.head(bucket, key, version_id))

    async def by_id(self, object_id: bytes) -> ObjectRecord:
        return self._readers.read(lambda reader: reader.by_id(object_id))

    async def list_objects(
        self, bucket: str, *, prefix: bytes = b"", after: bytes = b"", delimiter: bytes = b"", limit: int = 1000
    ) -> tuple[Sequence[ListedObject], bool]:
        """As the port says; the records of a listing come without ``parts``."""
        return await self._scan_fresh(lambda reader: reader.list_objects(bucket, prefix, after, delimiter, limit))

    async def notices(self, target: str, limit: int) -> Sequence[tuple[int, bytes]]:
        return await self._scan(lambda reader: reader.notices(target, limit))

    async def notice_counts(self) -> Mapping[str, int]:
        return await self._scan(Reader.notice_counts)

    async def noticed(self, sequences: Sequence[int]) -> None:
        await self._call(wire.MarkNoticed(tuple(sequences)), _nothing)

    async def scan_versions(self, bucket: str, key: bytes, sequence: int, limit: int) -> Sequence[ObjectRecord]:
        return await self._scan(lambda reader: reader.scan_versions(bucket, key, sequence, limit))

    async def amend_object(
        self,
        object_id: bytes,
        *,
        tags: Mapping[str, str] | None = None,
        storage_class: str | None = None,
        acl: tuple[tuple[str, str], ...] | None = None,
    ) -> ObjectRecord:
        request = wire.AmendObject(object_id, None if tags is None else dict(tags), storage_class, acl)
        return await self._call(request, _record)

    async def restore_object(self, object_id: bytes, days: int, day_s: int = 86400) -> ObjectRecord:
        return await self._call(wire.RestoreObject(object_id, days, day_s), _record)

    async def newest(self, bucket: str, key: bytes) -> ObjectRecord | None:
        fresh = await self._fresh()
        found = self._readers.read(lambda reader: reader.newest(bucket, key))
        if found is None and not fresh:
            raise CatalogUnavailable(_NOT_KNOWN)
        return found

    async def list_versions(
        self,
        bucket: str,
        *,
        prefix: bytes = b"",
        after: bytes = b"",
        after_version: str = "",
        delimiter: bytes = b"",
        limit: int = 1000,
    ) -> tuple[Sequence[ListedObject], bool]:
        return await self._scan_fresh(
            lambda reader: reader.list_versions(bucket, prefix, after, after_version, delimiter, limit)
        )

    async def set_retention(
        self, bucket: str, key: bytes, version_id: str | None, retention: Retention | None, *, bypass: bool = False
    ) -> None:
        await self._call(wire.SetLock(bucket, key, version_id, (retention,), bypass_governance=bypass), _nothing)

    async def set_legal_hold(self, bucket: str, key: bytes, version_id: str | None, hold: bool) -> None:
        await self._call(wire.SetLock(bucket, key, version_id, legal_hold=hold), _nothing)

    # -- multipart
    async def create_upload(self, upload: UploadRecord) -> None:
        await self._call(wire.CreateUpload(upload), _nothing)

    async def upload(self, bucket: str, key: bytes, upload_id: str) -> UploadRecord:
        return await self._look(lambda reader: reader.upload(bucket, key, upload_id))

    async def uploads(
        self, bucket: str, *, prefix: bytes = b"", after: tuple[bytes, str] = (b"", ""), limit: int = 1000
    ) -> tuple[Sequence[UploadRecord], bool]:
        return await self._scan_fresh(lambda reader: reader.uploads(bucket, prefix, after, limit))

    async def commit_part(self, request: CommitPart, *, only_if_known: bool = False) -> PartRecord:
        return await self._call(wire.PutPart(request, only_if_known), _part)

    async def parts(
        self, bucket: str, key: bytes, upload_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[Sequence[PartRecord], bool]:
        return await self._scan_fresh(lambda reader: reader.parts(bucket, key, upload_id, after, limit))

    async def complete_upload(self, request: CompleteUpload) -> ObjectRecord:
        return await self._call(wire.Complete(request), _record)

    async def abort_upload(self, bucket: str, key: bytes, upload_id: str) -> None:
        await self._call(wire.AbortUpload(bucket, key, upload_id), _nothing, already=NoSuchUpload)

    # -- life of the bytes
    async def settled(self, object_ids: Sequence[bytes]) -> None:
        """Ids of versions and of parts alike; ids that have gone meanwhile are passed over."""
        await self._call(wire.MarkSettled(tuple(object_ids)), _nothing)

    async def settle(self, object_id: bytes, timeout_s: float) -> ObjectRecord:
        request = wire.Settle(object_id, timeout_s)
        return await self._call(request, _record, timeout_s=timeout_s + SETTLE_GRACE_S)

    async def unsettled(self, slot: int, limit: int) -> Sequence[ObjectRecord]:
        return await self._scan(lambda reader: reader.unsettled(slot, limit))

    async def amend_ledger(self, object_id: bytes, ledger: FrameLedger) -> None:
        await self._call(wire.AmendLedger(object_id, ledger), _nothing)

    async def claim_drain(self, limit: int, lease_s: float) -> Sequence[ObjectRecord]:
        if self._clustered and not self._may_drain():
            return []
        claim = int.from_bytes(secrets.token_bytes(8)) >> 1
        records = await self._call(wire.ClaimDrain(limit, int(lease_s * 1e9), claim), _records)
        self._claims.update((record.object_id, claim) for record in records)
        return records

    def _may_drain(self) -> bool:
        """Whether anything is due here by this node's own index. A claim needs the head of the cluster's log; a drain that has
        nothing to do asks four times a second and must not queue for that.

        No barrier is needed. Nothing is claimed by this answer: where it says yes and is wrong, the claim is decided with
        everything that was decided before, as ever. Where it says no, what the index lacks (a copy that this node came to hold
        through another's commit, its own draining state) comes within FOLLOW_S unasked; what this node committed itself is there
        already; and time and leases only move towards yes. So a no is late by a look, never wrong for good."""
        gone, soon_ns = self._members.gone(), self.now_ns() + ENGINE_CLOCK_NS
        return bool(self._readers.read(lambda reader: reader.drains_due(soon_ns, gone, 1)))

    async def confirm_drain(self, object_id: bytes) -> None:
        await self.fresh()
        claim = self._readers.read(lambda reader: reader.drain_claim(object_id))
        if claim is None or claim != self._claims.get(object_id):
            self._claims.pop(object_id, None)
            raise LeaseLost(f"version {object_id.hex()} was claimed by somebody else, or is not to be drained any more")

    async def drained(self, object_id: bytes, copy: ArchiveCopy) -> ObjectRecord:
        record = await self._call(wire.MarkDrained(object_id, copy, self._claims.get(object_id, 0)), _record)
        self._claims.pop(object_id, None)
        return record

    async def drain_failed(self, object_id: bytes, error: str, retry_after_s: float) -> None:
        self._claims.pop(object_id, None)
        await self._call(wire.FailDrain(object_id, error, int(retry_after_s * 1e9)), _nothing)

    async def evictable(self, limit: int) -> Sequence[ObjectRecord]:
        return await self._scan(lambda reader: reader.evictable(self.now_ns(), limit))

    async def evictions_due(self, limit: int) -> Sequence[ObjectRecord]:
        return await self._scan(lambda reader: reader.evictions_due(self.now_ns(), limit))

    async def evicted(self, object_id: bytes) -> None:
        await self._call(wire.MarkEvicted(object_id), _nothing)

    async def request_recall(self, object_id: bytes) -> ObjectRecord:
        return await self._call(wire.RequestRecall(object_id), _record)

    async def recalls(self, limit: int) -> Sequence[ObjectRecord]:
        return await self._scan(lambda reader: reader.recalls(limit))

    async def recalled(self, object_id: bytes, extents: Sequence[Extent]) -> ObjectRecord:
        return await self._call(wire.MarkRecalled(object_id, tuple(extents)), _record)

    async def recall_failed(self, object_id: bytes, error: str) -> None:
        await self._call(wire.FailRecall(object_id, error), _nothing)

    async def relocate(self, object_id: bytes, old: Extent, new: Sequence[Extent]) -> None:
        await self._call(wire.Relocate(object_id, old, tuple(new)), _nothing)

    # -- second copies
    async def hold_mirror(self, object_id: bytes, extents: Sequence[Extent]) -> None:
        await self._call(wire.HoldMirror(object_id, tuple(extents)), _nothing)

    async def drop_mirror(self, object_ids: Sequence[bytes]) -> None:
        await self._call(wire.DropMirrors(tuple(object_ids)), _nothing)

    async def held_mirrors(self, limit: int) -> Sequence[tuple[bytes, int]]:
        return self._readers.read(lambda reader: reader.held_mirrors(limit))

    async def unmirrored(self, after: int, limit: int) -> Sequence[ObjectRecord]:
        return await self._scan(lambda reader: reader.unmirrored(after, limit))

    async def mirrored_by(self, mirror: int, limit: int) -> Sequence[ObjectRecord]:
        return await self._scan(lambda reader: reader.mirrored_by(mirror, limit))

    # -- archive, kernels, segments
    async def archived_versions(self, bucket: str, key: bytes) -> Sequence[ObjectRecord]:
        return self._readers.read(lambda reader: reader.archived_versions(bucket, key))

    async def archived_versions_now(self, bucket: str, key: bytes) -> Sequence[ObjectRecord]:
        await self.fresh()
        return await self.archived_versions(bucket, key)

    async def archive_moved(self, object_id: bytes, old: str, new: str) -> None:
        await self._call(wire.MarkArchiveMoved(object_id, old, new), _nothing)

    async def pending_archive_deletes(self, limit: int) -> Sequence[tuple[int, str, str, bytes, bytes | None]]:
        return await self._scan(lambda reader: reader.pending_archive_deletes(limit))

    async def archive_deleted(self, tombstone: int) -> None:
        await self._call(wire.MarkArchiveDeleted(tombstone), _nothing)

    async def pending_reductions(
        self, slot: int | None, limit: int, gone: Collection[int] = ()
    ) -> Sequence[ReductionJob]:
        return await self._scan(lambda reader: reader.pending_reductions(slot, limit, gone))

    async def owed_at_node(self, node: int, bucket: str, prefix: bytes) -> Mapping[str, int]:
        return await self._scan(lambda reader: reader.owed_at_node(node, bucket, prefix))

    async def reduction_counts(self, bucket: str) -> Sequence[ReductionCount]:
        return await self._scan(lambda reader: reader.reduction_counts(bucket))

    async def reduction_failed(
        self, object_id: bytes, kernel: str, error: str, *, give_up: bool, counted: bool = True
    ) -> None:
        await self._call(wire.FailReduction(object_id, kernel, error, give_up, counted), _nothing)

    async def filters_due(self, slot: int, limit: int, gone: Collection[int] = ()) -> Sequence[FilterJob]:
        return await self._scan(lambda reader: reader.filters_due(slot, limit, gone))

    async def filters_failed(self, bucket: str, prefix: bytes, limit: int) -> Sequence[tuple[bytes, str]]:
        return await self._scan(lambda reader: reader.filters_failed(bucket, prefix, limit))

    async def filter_ended(self, object_id: bytes, error: str = "", *, again: bool = False) -> None:
        await self._call(wire.EndFilter(object_id, error, again), _nothing)

    # -- runs
    async def released_reductions(self, slot: int) -> bool:
        return self._readers.read(lambda reader: reader.released_reductions(slot))

    async def runs(
        self, bucket: str, *, prefix: bytes = b"", after: bytes = b"", limit: int = 1000
    ) -> tuple[Sequence[RunRecord], bool]:
        return await self._scan(lambda reader: reader.runs(bucket, prefix, after, limit))

    async def run(self, bucket: str, run: bytes) -> RunRecord:
        return await self._look_known(lambda reader: reader.run(bucket, run))

    async def idle_runs(self, bucket: str, before_ns: int, limit: int) -> Sequence[bytes]:
        return await self._scan(lambda reader: reader.idle_runs(bucket, before_ns, limit))

    async def close_run(self, bucket: str, run: bytes, closed_by: str, before_ns: int = 0) -> None:
        await self._call(wire.CloseRun(bucket, run, closed_by, before_ns), _nothing)

    async def run_products(self, run: RunRecord) -> Sequence[RunProductRecord]:
        return await self._scan(lambda reader: reader.run_products(run))

    async def run_products_due(self, limit: int) -> Sequence[RunProductRecord]:
        return self._readers.read(lambda reader: reader.run_products_due(limit))

    async def run_stored(self, bucket: str, run: bytes, kernel: str, reflects: int, *, keep: bool = False) -> None:
        await self._call(wire.MarkRunStored(bucket, run, kernel, reflects, keep), _nothing)

    async def defer_reductions(self, bucket: str, run: bytes, kernel: str, object_ids: Sequence[bytes]) -> None:
        await self._call(wire.DeferReductions(bucket, run, kernel, tuple(object_ids)), _nothing)

    async def partials(self, bucket: str, run: bytes, kernel: str) -> Sequence[PartialRecord]:
        return await self._scan(lambda reader: reader.partials(bucket, run, kernel))

    async def member_keys(self, partial: bytes) -> frozenset[bytes]:
        return await self._scan(lambda reader: reader.member_keys(partial))

    async def owed_in_run(self, bucket: str, run: bytes, kernel: str, limit: int) -> OwedInRun:
        return await self._scan(lambda reader: reader.owed_in_run(bucket, run, kernel, limit))

    async def kernels_owed_in_run(self, bucket: str, run: bytes) -> Sequence[str]:
        return await self._scan(lambda reader: reader.kernels_owed_in_run(bucket, run))

    async def owed_with_reason(self, bucket: str, prefix: bytes, limit: int) -> Sequence[OwedProduct]:
        return await self._scan(lambda reader: reader.owed_with_reason(bucket, prefix, limit))

    async def kernel_objects(self, limit: int) -> Sequence[ObjectRecord]:
        return await self._scan(lambda reader: reader.kernel_objects(limit))

    # -- nodes
    async def nodes(self) -> Sequence[NodeRecord]:
        return await self._scan_fresh(Reader.nodes)

    async def put_node(self, record: NodeRecord) -> NodeRecord:
        return await self._call(wire.PutNode(record), _node)

    async def set_node_state(self, node: int, state: NodeState, *, force: bool = False) -> NodeRecord:
        return await self._call(wire.SetNodeState(node, state, force), _node)

    async def node_counts(self) -> Sequence[NodeCounts]:
        return await self._scan_fresh(Reader.node_counts)

    async def held_by(self, node: int, away: frozenset[int] = frozenset()) -> HeldByNode:
        return await self._scan_fresh(lambda reader: reader.held_by(node, away))

    async def stranded(
        self, away: frozenset[int], limit: int, of: int | None = None
    ) -> tuple[int, Sequence[tuple[str, bytes]]]:
        return await self._scan(lambda reader: reader.stranded(away, limit, of))

    async def unmirrored_count(self) -> int:
        return await self._scan(Reader.unmirrored_count)

    async def copies_on(self, node: int, limit: int) -> Sequence[bytes]:
        return await self._scan(lambda reader: reader.copies_on(node, limit))

    async def drain_counts(self) -> DrainCounts:
        return await self._scan(Reader.drain_counts)

    async def segment_use(self, slot: int) -> Sequence[SegmentUse]:
        return await self._scan(lambda reader: reader.segment_use(slot))

    async def segment_extents(self, slot: int, segment: int) -> Sequence[tuple[ObjectRecord | None, Extent]]:
        return await self._scan(lambda reader: reader.segment_extents(slot, segment))

    async def barrier(self) -> None:
        """Return once everything visible now is on disk, ``memory`` commits too, and on a cluster where a failover does not lose
        it. Raises CatalogUnavailable, StorageFailed."""
        await self._call(wire.Barrier(), _nothing)

    async def snapshot(self) -> str:
        return await self._call(wire.Snapshot(), _text, timeout_s=600.0)


@contextlib.contextmanager
def _certain(fresh: bool) -> Iterator[None]:
    """Around a look-up: what is not found where not everything is known is no answer."""
    try:
        yield
    except _NOT_THERE:
        if fresh:
            raise
        raise CatalogUnavailable(_NOT_KNOWN) from None


def _with_marker(request: DeleteObject) -> DeleteObject:
    if request.marker_id or request.version_id is not None:
        return request
    return msgspec.structs.replace(request, marker_id=secrets.token_bytes(16))


def _deleted_or_error(result: Deleted | BaseException) -> Deleted | Exception:
    if isinstance(result, Deleted | Exception):
        return result
    raise result  # a cancellation is nobody's answer
