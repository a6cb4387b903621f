"""The contracts between rooms. ``ingest`` owns them; kernels, s3api, archive and gateway meet only here.

- ``Catalog``: the index of what is stored and the one way to change it (one engine embedded, one clustered).
- ``BodySink``: where body bytes land; the HTTP room asks it for memory and tells it how much arrived.
- ``FrameHost`` / ``FrameReduction``: what the kernel room does with frames while a stream arrives.
- ``LandingPad``: how another room stores a small object or loads stored bytes into shared memory.

Implementations: ingest.catalog (client of the catalogue process), ingest.stream, kernels.host, ingest.buffer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol

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
    FrameGeometry,
    FrameLedger,
    FreedExtents,
    HeldByNode,
    KernelEpoch,
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


class Catalog(Protocol):
    """Every method either returns what the docstring says or raises an ``ingest.errors.CatalogError``, or StorageFailed where
    the catalogue's disk fails.

    Writes return once durable in the journal (``memory`` commits: once in the journal's page cache) *and* visible to
    every reader on the node. Reads see every write that has returned, in any process (strong consistency).
    """

    # -- buckets and users
    async def create_bucket(
        self, name: str, owner: str, region: str = "", documents: Mapping[str, bytes] | None = None
    ) -> BucketRecord: ...
    async def delete_bucket(self, name: str) -> None: ...
    async def set_bucket_tags(self, name: str, tags: Mapping[str, str]) -> BucketRecord:
        """Replace the user's tags and change the settings that are named (``bucket_settings.edited``), decided on what is there:
        edits at the same time are all kept. Raises NoSuchBucket, BadDocument."""
        ...

    async def configure_bucket(self, name: str, documents: Mapping[str, bytes | None]) -> BucketRecord:
        """Put (or, with None, delete) configuration documents (ingest/bucket_documents.py), all at once or none. Raises
        BadDocument for a name nobody knows, a document over its limit or one that the catalogue must read and cannot."""
        ...

    # Look-ups of a client's requests (bucket, head, newest, upload, parts, lists, …) raise CatalogUnavailable instead of
    # "there is none" where a node of a cluster does not know everything: its engine is away.
    async def fresh(self) -> None:
        """Return once reads see everything that any node was answered before. Raises CatalogUnavailable where that cannot be."""
        ...

    async def bucket(self, name: str) -> BucketRecord: ...
    async def buckets(self) -> Sequence[BucketRecord]: ...
    async def put_user(self, user: UserRecord) -> None: ...
    async def users(self) -> Sequence[UserRecord]: ...

    # -- reservations
    async def reserve(self, reservation: Reservation, offers: Sequence[Offer]) -> Reservation:
        """With its shares, decided against everything reserved so far. Idempotent in ``reservation_id``. Raises NoSuchBucket,
        BadReservation, DoesNotFit."""
        ...

    async def extend_reservation(self, reservation_id: str, until_ns: int, offers: Sequence[Offer]) -> Reservation:
        """Raises NoSuchReservation, ReservationEnded, BadReservation, DoesNotFit."""
        ...

    async def release_reservation(self, reservation_id: str) -> Reservation:
        """It ends now. Raises NoSuchReservation, ReservationEnded."""
        ...

    async def reservation(self, reservation_id: str) -> ReservationUse:
        """Raises NoSuchReservation."""
        ...

    async def reservations(self, ends_after_ns: int) -> Sequence[ReservationUse]:
        """Those of all buckets and nodes that end later than that, grace included, in the order they begin. While a
        cluster's engine is away: those that are known here."""
        ...

    def reserved(self) -> Sequence[Reservation]:
        """Those that have not ended, as this process can read them at once: no message, no waiting."""
        ...

    def used_bytes(self, reservation_id: str, node: int) -> int:
        """What is used of a reservation on a node, as ``reserved``; 0 for one that nobody knows."""
        ...

    # -- objects
    async def commit(self, request: CommitObject, *, only_if_known: bool = False) -> ObjectRecord:
        """Idempotent in ``object_id``. ``memory`` + unsettled objects live until settled in shared memory of a slot.

        ``only_if_known``: learn the outcome of an earlier call and change nothing; StaleVersion: it never happened, and
        never will.
        """
        ...

    async def delete(self, requests: Sequence[DeleteObject]) -> Sequence[Deleted | Exception]: ...

    async def head(self, bucket: str, key: bytes, version_id: str | None = None) -> ObjectRecord:
        """The current version; raises NoSuchKey, NoSuchBucket. A delete marker is NoSuchKey. Or the version that
        ``version_id`` names, which may be a delete marker; raises NoSuchVersion, NoSuchBucket."""
        ...

    async def newest(self, bucket: str, key: bytes) -> ObjectRecord | None:
        """The current version of a key, or the delete marker in its place."""
        ...

    async def by_id(self, object_id: bytes) -> ObjectRecord:
        """The version with this id, if it is still live; raises NoSuchKey."""
        ...

    async def list_objects(
        self, bucket: str, *, prefix: bytes = b"", after: bytes = b"", delimiter: bytes = b"", limit: int = 1000
    ) -> tuple[Sequence[ListedObject], bool]:
        """Keyset scan in bytewise key order; (rows, truncated). Resume with ``after`` = the last row's key
        (for a common prefix: the prefix itself; every key under it is then skipped)."""
        ...

    async def notices(self, target: str, limit: int) -> Sequence[tuple[int, bytes]]:
        """(number, JSON document) of the oldest events that wait for an endpoint."""
        ...

    async def notice_counts(self) -> Mapping[str, int]:
        """How many events wait, for each endpoint that some wait for."""
        ...

    async def noticed(self, sequences: Sequence[int]) -> None:
        """These events were delivered, or given up."""
        ...

    async def scan_versions(self, bucket: str, key: bytes, sequence: int, limit: int) -> Sequence[ObjectRecord]:
        """All versions, delete markers too, behind the one named: by key, and newest first within a key. Without ``parts``."""
        ...

    async def amend_object(
        self,
        object_id: bytes,
        *,
        tags: Mapping[str, str] | None = None,
        storage_class: str | None = None,
        acl: tuple[tuple[str, str], ...] | None = None,
    ) -> ObjectRecord:
        """Change attributes of one version; None leaves as it is. Raises StaleVersion where it has gone."""
        ...

    async def restore_object(self, object_id: bytes, days: int, day_s: int = 86400) -> ObjectRecord:
        """Recall a version and keep it in the buffer for days. Raises RestoreInProgress, StaleVersion."""
        ...

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
        """The same over all versions and delete markers, newest first within a key. Resume with the last row's key and
        version id; with the key alone, every version of it is skipped."""
        ...

    # -- object lock (ingest/versioning.py; VersionLocked, InvalidLock, NoSuchKey, NoSuchVersion)
    async def set_retention(
        self, bucket: str, key: bytes, version_id: str | None, retention: Retention | None, *, bypass: bool = False
    ) -> None: ...
    async def set_legal_hold(self, bucket: str, key: bytes, version_id: str | None, hold: bool) -> None: ...

    # -- multipart
    async def create_upload(self, upload: UploadRecord) -> None: ...
    async def upload(self, bucket: str, key: bytes, upload_id: str) -> UploadRecord: ...
    async def uploads(
        self, bucket: str, *, prefix: bytes = b"", after: tuple[bytes, str] = (b"", ""), limit: int = 1000
    ) -> tuple[Sequence[UploadRecord], bool]: ...
    async def commit_part(self, request: CommitPart, *, only_if_known: bool = False) -> PartRecord: ...
    async def parts(
        self, bucket: str, key: bytes, upload_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[Sequence[PartRecord], bool]: ...
    async def complete_upload(self, request: CompleteUpload) -> ObjectRecord: ...
    async def abort_upload(self, bucket: str, key: bytes, upload_id: str) -> None: ...

    # -- life of the bytes (internal; StaleVersion when the version has gone meanwhile)
    async def settled(self, object_ids: Sequence[bytes]) -> None:
        """The owner of these ``memory`` objects has written and flushed their bytes."""
        ...

    async def settle(self, object_id: bytes, timeout_s: float) -> ObjectRecord:
        """Have the owning slot write an unsettled object out, wait for it, return the record."""
        ...

    async def unsettled(self, slot: int, limit: int) -> Sequence[ObjectRecord]:
        """``memory`` versions of a slot whose bytes are not known to be on disk."""
        ...

    async def amend_ledger(self, object_id: bytes, ledger: FrameLedger) -> None: ...
    async def claim_drain(self, limit: int, lease_s: float) -> Sequence[ObjectRecord]:
        """Lease up to ``limit`` buffered versions whose drain is due, oldest deadline first; they become draining.
        An expired lease is claimed again."""
        ...

    async def confirm_drain(self, object_id: bytes) -> None:
        """Whether what ``claim_drain`` gave to this client is still its, and was claimed by nobody since: to be asked before
        anything is published. Raises LeaseLost, and CatalogUnavailable while that cannot be known."""
        ...

    async def drained(self, object_id: bytes, copy: ArchiveCopy) -> ObjectRecord: ...
    async def drain_failed(self, object_id: bytes, error: str, retry_after_s: float) -> None: ...
    async def evictable(self, limit: int) -> Sequence[ObjectRecord]:
        """Archived and verified versions still buffered, least recently stored first."""
        ...

    async def evictions_due(self, limit: int) -> Sequence[ObjectRecord]:
        """Archived and verified versions whose buffered copy should have gone by now, whatever the watermarks say."""
        ...

    async def evicted(self, object_id: bytes) -> None:
        """Drop the buffered copy; refused (StaleVersion) unless the archive copy is verified."""
        ...

    async def request_recall(self, object_id: bytes) -> ObjectRecord: ...
    async def recalls(self, limit: int) -> Sequence[ObjectRecord]: ...
    async def recalled(self, object_id: bytes, extents: Sequence[Extent]) -> ObjectRecord: ...
    async def recall_failed(self, object_id: bytes, error: str) -> None: ...
    async def relocate(self, object_id: bytes, old: Extent, new: Sequence[Extent]) -> None:
        """Compaction moved one extent; StaleVersion if the version no longer has it."""
        ...

    # -- second copies (durability ``mirror``)
    async def hold_mirror(self, object_id: bytes, extents: Sequence[Extent]) -> None:
        """These extents of ours are the second copy of a body that another node is about to commit, or has committed without
        one. They take the place of a copy that was held before. Raises StaleVersion where the version has gone, or has one."""
        ...

    async def drop_mirror(self, object_ids: Sequence[bytes]) -> None:
        """These bodies will not be committed: what is held for them is free. Changes nothing for versions that exist."""
        ...

    async def held_mirrors(self, limit: int) -> Sequence[tuple[bytes, int]]:
        """What this node holds for commits that are still to come: (object id, since when), oldest first."""
        ...

    async def unmirrored(self, after: int, limit: int) -> Sequence[ObjectRecord]:
        """Versions of this node that are not archived, are to have a second copy, and have none: by sequence, after ``after``."""
        ...

    async def mirrored_by(self, mirror: int, limit: int) -> Sequence[ObjectRecord]:
        """Versions of this node that have their second copy on that one."""
        ...

    async def archived_versions(self, bucket: str, key: bytes) -> Sequence[ObjectRecord]:
        """Versions of a key with a copy in the archive."""
        ...

    async def archived_versions_now(self, bucket: str, key: bytes) -> Sequence[ObjectRecord]:
        """As ``archived_versions``, with everything that any node of a cluster was answered before; raises CatalogUnavailable
        while that cannot be known: for who is about to remove something outside the catalogue."""
        ...

    async def archive_moved(self, object_id: bytes, old: str, new: str) -> None:
        """A version's copy lies at another path; StaleVersion if it was not at ``old``."""
        ...

    async def pending_archive_deletes(self, limit: int) -> Sequence[tuple[int, str, str, bytes, bytes | None]]:
        """Copies whose version was deleted, replaced or hidden by a delete marker: (tombstone id, path, bucket, key,
        object id)."""
        ...

    async def archive_deleted(self, tombstone: int) -> None: ...
    async def pending_reductions(
        self, slot: int | None, limit: int, gone: Collection[int] = ()
    ) -> Sequence[ReductionJob]:
        """Of a slot of this node; ``gone``: also what these nodes owe of versions whose second copy is in that slot."""
        ...

    async def owed_at_node(self, node: int, bucket: str, prefix: bytes) -> Mapping[str, int]:
        """By kernel: products that a node owes of versions which nobody else has."""
        ...

    async def reduction_counts(self, bucket: str) -> Sequence[ReductionCount]:
        """Of every kernel of the bucket that owes a product, or has given one up whose version still exists."""
        ...

    async def reduction_failed(
        self, object_id: bytes, kernel: str, error: str, *, give_up: bool, counted: bool = True
    ) -> None:
        """``counted`` False: nothing was tried; ``error`` says what the reduction waits for."""
        ...

    # -- raw filters
    async def filters_due(self, slot: int, limit: int, gone: Collection[int] = ()) -> Sequence[FilterJob]:
        """Versions of a slot that are to be filtered and owe no reduction any more; ``gone``: as above."""
        ...

    async def filters_failed(self, bucket: str, prefix: bytes, limit: int) -> Sequence[tuple[bytes, str]]:
        """(key, reason) of versions whose raw data stay although kernels were to filter them."""
        ...

    async def filter_ended(self, object_id: bytes, error: str = "", *, again: bool = False) -> None:
        """The raw data stay as they are: nothing was to be filtered, or ``error`` says why it cannot be (``again``: yet)."""
        ...

    # -- runs (ingest/runs.py says what a run is)
    async def released_reductions(self, slot: int) -> bool:
        """Whether a slot has versions that were reduced once, in a partial that is gone."""
        ...

    async def runs(
        self, bucket: str, *, prefix: bytes = b"", after: bytes = b"", limit: int = 1000
    ) -> tuple[Sequence[RunRecord], bool]:
        """Runs in bytewise order of their prefix; (rows, truncated)."""
        ...

    async def run(self, bucket: str, run: bytes) -> RunRecord:
        """Raises NoSuchKey for a prefix that never had a member with a kernel."""
        ...

    async def idle_runs(self, bucket: str, before_ns: int, limit: int) -> Sequence[bytes]:
        """Open runs whose last member arrived before ``before_ns``."""
        ...

    async def close_run(self, bucket: str, run: bytes, closed_by: str, before_ns: int = 0) -> None:
        """Changes nothing when it is closed already, or (``before_ns``) has a member that arrived since."""
        ...

    async def run_products(self, run: RunRecord) -> Sequence[RunProductRecord]: ...
    async def run_products_due(self, limit: int) -> Sequence[RunProductRecord]:
        """Products of runs that do not reflect what is stored now."""
        ...

    async def run_stored(self, bucket: str, run: bytes, kernel: str, reflects: int, *, keep: bool = False) -> None:
        """The run had no partials of this kernel, and its product was deleted; ``keep``: members wait for its end."""
        ...

    async def defer_reductions(self, bucket: str, run: bytes, kernel: str, object_ids: Sequence[bytes]) -> None:
        """These members of a run are reduced when it closes: ``pending_reductions`` no longer names them."""
        ...

    async def partials(self, bucket: str, run: bytes, kernel: str) -> Sequence[PartialRecord]: ...
    async def member_keys(self, partial: bytes) -> frozenset[bytes]:
        """Keys of those members of a partial that are still there."""
        ...

    async def owed_in_run(self, bucket: str, run: bytes, kernel: str, limit: int) -> OwedInRun: ...
    async def kernels_owed_in_run(self, bucket: str, run: bytes) -> Sequence[str]:
        """Kernels that still owe products of members of a run."""
        ...

    async def owed_with_reason(self, bucket: str, prefix: bytes, limit: int) -> Sequence[OwedProduct]:
        """Products that are not there and of which it is known why, by key."""
        ...

    async def kernel_objects(self, limit: int) -> Sequence[ObjectRecord]:
        """Everything current under ``_kernels/`` in all buckets, as known here; ``limit``: of each bucket."""
        ...

    # -- nodes of a cluster
    async def nodes(self) -> Sequence[NodeRecord]: ...
    async def put_node(self, record: NodeRecord) -> NodeRecord: ...
    async def set_node_state(self, node: int, state: NodeState, *, force: bool = False) -> NodeRecord:
        """What a member is for from now on. A node leaves (REMOVED) only if it is empty of what exists nowhere else, or with
        ``force``. Raises NoSuchNode, NodeNeeded."""
        ...

    async def node_counts(self) -> Sequence[NodeCounts]:
        """What nodes still have to drain; without those that have nothing."""
        ...

    async def held_by(self, node: int, away: frozenset[int] = frozenset()) -> HeldByNode:
        """What would be lost with a node. ``away``: nodes that do not count as holders of a copy."""
        ...

    async def stranded(
        self, away: frozenset[int], limit: int, of: int | None = None
    ) -> tuple[int, Sequence[tuple[str, bytes]]]:
        """Undrained versions of which only nodes that are away have the bytes (``of``: this one some of them): how many, and the
        first by bucket and key."""
        ...

    async def unmirrored_count(self) -> int:
        """Undrained versions, of any node, that are to have a second copy and have none."""
        ...

    async def copies_on(self, node: int, limit: int) -> Sequence[bytes]:
        """Archived versions whose buffered copy lies on a node."""
        ...

    @property
    def engine_away_s(self) -> float:
        """How long the engine of the cluster has not answered; 0 while it does, and on a node alone."""
        ...

    @property
    def commits_stuck_s(self) -> float:
        """How long the engine of the cluster has answered and taken no commit; 0 while it takes them, and on a node alone."""
        ...

    async def drain_counts(self) -> DrainCounts: ...
    async def segment_use(self, slot: int) -> Sequence[SegmentUse]: ...
    async def barrier(self) -> None:
        """Return once everything visible now survives a power cut, and on a cluster a failover of its engine."""
        ...

    async def segment_extents(self, slot: int, segment: int) -> Sequence[tuple[ObjectRecord | None, Extent]]:
        """Live extents of one segment with the version that owns each (None: an unfinished upload's part)."""
        ...

    async def snapshot(self) -> str:
        """Write a catalogue snapshot now; returns its path."""
        ...

    def now_ns(self) -> int:
        """The node's time (ingest/clock.py): what commits, lifecycle rules and retention periods go by."""
        ...

    def generation(self) -> int:
        """Shared-memory counter bumped by every commit that changes buckets, users or kernels: the key of caches."""
        ...

    def subscribe(self, handler: Callable[[FreedExtents | SettleRequest], Awaitable[None]]) -> None:
        """Receive pushes for the slot this client registered as."""
        ...


class BodySink(Protocol):
    """Where a body lands. The caller asks for memory, has the operating system fill it, and reports the count."""

    def get_buffer(self) -> memoryview | None:
        """Writable, non-empty memory for the next bytes; None while no span is free (then await ``writable``)."""
        ...

    def received(self, count: int) -> None:
        """``count`` bytes of the last buffer are filled. Raises IngestError when the body grows past its limit."""
        ...

    async def writable(self) -> None:
        """Returns once ``get_buffer`` will give memory again; raises IngestError if that will not happen."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class StreamInfo:
    """What the kernel room may know of a stream when it opens."""

    bucket: str
    key: bytes
    object_id: bytes
    length: int | None
    content_type: str
    metadata: Mapping[str, str]


class FrameBatch(Protocol):
    """Whole frames that lie contiguous in one arena region. The holder calls ``release`` exactly once."""

    region: int
    """Index into the ``Domain.regions`` the stream was opened with."""
    offset: int
    """Byte offset of the first frame in the region."""
    first_frame: int
    count: int
    position: int
    """Body offset of the byte at ``offset``: where the frames do not lie back to back, an index says where in the body
    each is stored, and this where that is in memory."""

    @property
    def revoked(self) -> bool:
        """The arena took the span back: the frames must not be dispatched; reduce them from disk later."""
        ...

    def dispatched(self) -> bool:
        """The frames go to a sandbox now and may no longer be revoked; False if they already were."""
        ...

    def release(self) -> None: ...


class Domain(Protocol):
    """The arena regions reserved for one bucket's kernels: the isolation domain. Mapped read-only in its sandboxes."""

    bucket: str
    region_fds: Sequence[int]
    region_bytes: int

    def hold(self) -> None:
        """A process that maps these regions is alive; the regions cannot change bucket."""
        ...

    def drop(self) -> None:
        """One such process was reaped."""
        ...


class LoadedBytes(Protocol):
    """Stored bytes brought back into a domain's memory for catch-up; ``release`` exactly once."""

    region: int
    offset: int
    length: int

    def release(self) -> None: ...


class Room(Protocol):
    """Memory of a domain to copy into; ``release`` exactly once."""

    region: int
    offset: int
    view: memoryview

    def release(self) -> None: ...


class LandingPad(Protocol):
    """What the buffer offers to other rooms of the same worker process."""

    async def store(self, request: CommitObject, body: memoryview | bytes, lifetime: str = "product") -> ObjectRecord:
        """Store ``body`` and commit it: ``extents``, ``length``, ``etag`` and ``crc64nvme`` of the request are filled
        in by the buffer. Raises IngestError, e.g. StaleVersion when ``reduces`` names a deleted version."""
        ...

    async def compose(self, request: CommitObject, pieces: AsyncIterator[memoryview], length: int) -> ObjectRecord:
        """Store a large object of our own from ``pieces`` (each valid until the next is asked for), ``length`` bytes in
        all, as stream data. As ``store`` otherwise."""
        ...

    def read_range(self, record: ObjectRecord, start: int, stop: int) -> AsyncIterator[memoryview]:
        """Body bytes [start, stop) in pieces, each valid until the next."""
        ...

    async def read(self, record: ObjectRecord) -> bytearray:
        """All bytes of a small object of our own. Raises ObjectOffline, NoSuchKey, DataLost, CatalogUnavailable."""
        ...

    async def load(self, record: ObjectRecord, start: int, length: int, domain: Domain) -> LoadedBytes:
        """Read body bytes [start, start+length) past the page cache into one contiguous piece of the domain."""
        ...

    def room(self, length: int, domain: Domain) -> Room | None:
        """``length`` bytes of the domain's memory, if that takes nothing from what streams are owed."""
        ...

    def domain(self, bucket: str) -> Domain | None:
        """The bucket's isolation domain, made if regions are free; None when there are none."""
        ...


class FrameScanner(Protocol):
    """Finds frames that only the body itself tells of (messages, arrays one behind the other), as the body arrives."""

    def feed(self, data: memoryview) -> None:
        """The next bytes of the body, in order. Never raises."""
        ...

    @property
    def frames(self) -> int:
        """Whole frames found so far."""
        ...

    @property
    def settled(self) -> int:
        """Body bytes up to the end of the last whole frame or message."""
        ...

    @property
    def horizon(self) -> int | None:
        """Body offset up to which it is known where frames begin and end; None: no more will be found."""
        ...

    @property
    def unit_bytes(self) -> int:
        """Stored bytes of the frame under way."""
        ...

    def boundary(self, limit: int) -> int:
        """The largest body offset up to ``limit`` that does not lie inside a known frame's stored bytes."""
        ...

    def first_from(self, offset: int) -> int:
        """Number of the first frame whose stored bytes begin at or behind a body offset."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class BodyChange:
    """Bytes of a body from ``offset`` on, and those of the same number that take their place."""

    offset: int
    before: bytes
    after: bytes


class FrameReduction(Protocol):
    """All kernels of one stream. Calls come from the worker's event loop and must return at once."""

    domain: Domain

    def sniff(self, head: memoryview, *, complete: bool) -> FrameGeometry | FrameScanner | int | None:
        """Find the geometry from the body's first bytes: a geometry; or a scanner, to be fed the whole body from its
        first byte; or the number of bytes needed to say (more than ``len(head)``); or None: no frames can be offered
        while the body arrives, it is stored as it is."""
        ...

    def offer(self, batch: FrameBatch) -> None: ...

    def lagging(self, first_frame: int, count: int) -> None:
        """These frames never lay whole in the arena (too large, revoked, split): they will be read from disk."""
        ...

    def when_stopped(self, stopped: Callable[[int], None]) -> None:
        """Have ``stopped(frame)`` called from the event loop, at most once, when a kernel says that nothing behind
        ``frame`` is of use."""
        ...

    def cut_short(self, length: int) -> BodyChange | None:
        """A STOP ends the body at ``length`` bytes: what must be changed in them so that they are an object of their format
        (a header that counts the frames); None: nothing, or it cannot be helped."""
        ...

    def ledger(self, received: int, trailing_bytes: int, discarded_bytes: int | None = None) -> FrameLedger:
        """The counts known at commit time. ``discarded_bytes``: how much of the body was not stored, behind a STOP."""
        ...

    @property
    def kernels(self) -> tuple[str, ...]: ...

    @property
    def filters(self) -> dict[str, str]:
        """Kernels that filter the raw data, as of CommitObject."""
        ...

    @property
    def epochs(self) -> tuple[KernelEpoch, ...]:
        """With which settings which frames were judged, or will be."""
        ...

    def committed(self, record: ObjectRecord) -> None:
        """The version exists: finish (catch up from disk if frames lag) and store the products."""
        ...

    def aborted(self) -> None: ...


class FrameHost(Protocol):
    """The kernel room inside a worker."""

    async def prepare(self, bucket: str) -> None:
        """Know the bucket's kernels as of now: to be awaited before ``open`` or ``kernels_for``. Never raises; costs a
        comparison while ``Catalog.generation()`` stands still."""
        ...

    def open(self, info: StreamInfo) -> FrameReduction | None:
        """None when no kernel of the bucket matches: the stream then shares ordinary regions."""
        ...

    def filters(self, bucket: str, key: bytes) -> dict[str, str]:
        """Kernels of this key that filter the raw data, as of CommitObject."""
        ...

    def kernels_for(self, bucket: str, key: bytes) -> tuple[str, ...]:
        """Kernels that would reduce this key (for bodies that are reduced after they landed)."""
        ...

    def catch_up(self, record: ObjectRecord, kernels: tuple[str, ...]) -> None:
        """Reduce a stored version from disk in the background."""
        ...

    def landed(self, record: ObjectRecord, kernels: tuple[str, ...], payload: memoryview | None) -> None:
        """The same for a version that was just committed; ``payload`` (its whole body, where it is still in memory) is
        valid during the call only."""
        ...

    async def check(self, bucket: str, name: str, source: bytes, metadata: Mapping[str, str]) -> None:
        """Gate and compile a submitted kernel. Raises ``KernelRefused`` with file, line and reason, or KernelsUnavailable where
        it could not be tried."""
        ...

    async def check_array(self, bucket: str, kernel: str, name: str, head: bytes, length: int) -> None:
        """Judge a parameter array for ``_kernels/<kernel>/<name>.npy`` by its first bytes (ARRAY_HEAD_BYTES, or all) and
        its length. Raises as ``check``."""
        ...


class KernelRefused(Exception):
    """A submitted kernel does not pass; ``str()`` is ``file:line: reason``, fit for the scientist."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}")
        self.file = file
        self.line = line
        self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class FeedbackEvent:
    """One ``emit`` of a kernel. ``time_ns``: when the gateway read it. ``live``: the frame was judged as it arrived; False
    for one read back from disk, which is old news that must not move anything."""

    bucket: str
    key: bytes
    kernel: str
    frame: int
    code: int
    value: float
    time_ns: int
    live: bool = True


class FeedbackSink(Protocol):
    """Takes what kernels emit. Calls come from the event loop and return at once."""

    def publish(self, events: Sequence[FeedbackEvent]) -> None: ...

    def stream_opened(self, bucket: str, kernels: Sequence[str]) -> None:
        """A body with frames for these kernels begins to arrive: from now on silence means something."""
        ...

    def stream_closed(self, bucket: str, kernels: Sequence[str]) -> None:
        """It has arrived, or was aborted."""
        ...


class FilePiece(Protocol):
    """A run of an object's bytes in an open file, locked against recycling until the reader closes."""

    @property
    def fd(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


class ObjectReader(Protocol):
    """An opened version: bytes [start, stop) as file pieces in order. Async context manager; closing unlocks."""

    @property
    def pieces(self) -> Sequence[FilePiece]: ...
    async def __aenter__(self) -> ObjectReader: ...
    async def __aexit__(self, *exc: object) -> None: ...
    def chunks(self, size_bytes: int) -> AsyncIterator[memoryview]:
        """The same bytes read past the page cache, for drain, copies and TLS; each view is valid until the next."""
        ...
