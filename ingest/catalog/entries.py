"""Journal entries: decided effects, one for each mutation that changed something.

An entry holds everything that was decided (versions, times, deadlines), so applying it needs no clock and no choice:
the same entries in the same order give the same index. Tags and field order are the on-disk format
(``journal.FORMAT``): fields are only ever added at the end, with a default.
"""

from __future__ import annotations

import msgspec

from ingest.records import (
    ArchiveCopy,
    BucketRecord,
    Deleted,
    Extent,
    FrameLedger,
    NodeRecord,
    ObjectRecord,
    PartialOf,
    PartRecord,
    Reservation,
    Retention,
    RunProductOf,
    UploadRecord,
    UserRecord,
    VersionAttributes,
)


class BucketCreated(msgspec.Struct, frozen=True, array_like=True, tag="bucket-created"):
    record: BucketRecord


class BucketDeleted(msgspec.Struct, frozen=True, array_like=True, tag="bucket-deleted"):
    name: str


class BucketTagged(msgspec.Struct, frozen=True, array_like=True, tag="bucket-tagged"):
    name: str
    tags: dict[str, str]
    drain_after_ns: int | None = None
    """The bucket's new drain delay when it changed: waiting versions get new deadlines."""


class BucketConfigured(msgspec.Struct, frozen=True, array_like=True, tag="bucket-configured"):
    name: str
    documents: dict[str, bytes | None]
    """Those that change; None: it goes."""


class UserPut(msgspec.Struct, frozen=True, array_like=True, tag="user-put"):
    user: UserRecord


class ReservationPut(msgspec.Struct, frozen=True, array_like=True, tag="reservation-put"):
    """Made, extended or released."""

    record: Reservation
    decided_ns: int


class ObjectCommitted(msgspec.Struct, frozen=True, array_like=True, tag="object-committed"):
    record: ObjectRecord
    due_ns: int
    replaces: int | None = None
    """Sequence of the version this one takes the place of."""
    reductions: tuple[str, ...] = ()
    reduces: tuple[bytes, str] | None = None
    partial: PartialOf | None = None
    run_product: RunProductOf | None = None
    filters: dict[str, str] = {}
    verdicts: bytes = b""
    supersedes: int | None = None
    """Sequence of the version that stays and is no longer current."""


class ObjectAppended(msgspec.Struct, frozen=True, array_like=True, tag="object-appended"):
    """Bytes behind an object's: a new version with the old one's extents and those of ``record``, which takes its place."""

    record: ObjectRecord
    """``extents`` are of the new bytes only."""
    due_ns: int
    extends: int
    """Sequence of the version that goes."""
    reductions: tuple[str, ...] = ()
    filters: dict[str, str] = {}


class MarkerCommitted(msgspec.Struct, frozen=True, array_like=True, tag="marker-committed"):
    """A key was deleted in a bucket that keeps versions."""

    record: ObjectRecord
    replaces: int | None = None
    """Sequence of the null version (or marker) it takes the place of."""
    supersedes: int | None = None


class VersionLockSet(msgspec.Struct, frozen=True, array_like=True, tag="version-lock-set"):
    version: int
    """Sequence of the version."""
    retention: Retention | None
    legal_hold: bool


class UploadCreated(msgspec.Struct, frozen=True, array_like=True, tag="upload-created"):
    upload: UploadRecord


class PartCommitted(msgspec.Struct, frozen=True, array_like=True, tag="part-committed"):
    upload_id: str
    object_id: bytes
    part: PartRecord
    bucket: str = ""


class UploadCompleted(msgspec.Struct, frozen=True, array_like=True, tag="upload-completed"):
    """``record.parts`` are the parts that were linked; the upload's other parts are dropped."""

    record: ObjectRecord
    due_ns: int
    upload_id: str
    replaces: int | None = None
    reductions: tuple[str, ...] = ()
    filters: dict[str, str] = {}
    supersedes: int | None = None


class UploadAborted(msgspec.Struct, frozen=True, array_like=True, tag="upload-aborted"):
    bucket: str
    key: bytes
    upload_id: str


class ObjectDeleted(msgspec.Struct, frozen=True, array_like=True, tag="object-deleted"):
    version: int
    """Sequence of the deleted version."""
    key: bytes
    answer: Deleted = Deleted(existed=True)
    uncovers: int | None = None
    """Sequence of the version that is current from now on."""


class Settled(msgspec.Struct, frozen=True, array_like=True, tag="settled"):
    object_ids: tuple[bytes, ...]


class LedgerAmended(msgspec.Struct, frozen=True, array_like=True, tag="ledger-amended"):
    object_id: bytes
    ledger: FrameLedger


class DrainClaimed(msgspec.Struct, frozen=True, array_like=True, tag="drain-claimed"):
    object_ids: tuple[bytes, ...]
    lease_until_ns: int
    lease_epoch: int


class Drained(msgspec.Struct, frozen=True, array_like=True, tag="drained"):
    object_id: bytes
    copy: ArchiveCopy


class DrainFailed(msgspec.Struct, frozen=True, array_like=True, tag="drain-failed"):
    object_id: bytes
    error: str
    due_ns: int


class Evicted(msgspec.Struct, frozen=True, array_like=True, tag="evicted"):
    object_id: bytes


class RecallRequested(msgspec.Struct, frozen=True, array_like=True, tag="recall-requested"):
    object_id: bytes
    recall_ns: int
    node: int = 0
    """Who fetches it."""


class Recalled(msgspec.Struct, frozen=True, array_like=True, tag="recalled"):
    object_id: bytes
    extents: tuple[Extent, ...]
    stored_ns: int
    attributes: VersionAttributes | None = None
    """Where it was restored: until when."""


class RecallFailed(msgspec.Struct, frozen=True, array_like=True, tag="recall-failed"):
    object_id: bytes
    error: str


class Relocated(msgspec.Struct, frozen=True, array_like=True, tag="relocated"):
    object_id: bytes
    old: Extent
    new: tuple[Extent, ...]


class ObjectAmended(msgspec.Struct, frozen=True, array_like=True, tag="object-amended"):
    object_id: bytes
    attributes: VersionAttributes
    evict_ns: int | None = None
    """When its buffered copy goes; None: when the watermarks say so."""
    recall_ns: int = 0
    """Its recall is asked for, then; 0: it is not."""
    drain_ns: int = 0
    """It is due in the archive by then; 0: when it was."""
    recall_node: int = 0


class Noticed(msgspec.Struct, frozen=True, array_like=True, tag="noticed"):
    """An event of a bucket that is to be delivered: JSON, as the endpoint gets it."""

    target: str
    event: bytes


class NoticesDone(msgspec.Struct, frozen=True, array_like=True, tag="notices-done"):
    """Delivered, or given up."""

    sequences: tuple[int, ...]


class NodePut(msgspec.Struct, frozen=True, array_like=True, tag="node-put"):
    """A member of the cluster joined, started anew or changed what it is for."""

    record: NodeRecord


class MirrorHeld(msgspec.Struct, frozen=True, array_like=True, tag="mirror-held"):
    """A node has the second copy of a body whose commit is still to come; it takes the place of an earlier one."""

    object_id: bytes
    extents: tuple[Extent, ...]
    held_ns: int


class MirrorsDropped(msgspec.Struct, frozen=True, array_like=True, tag="mirrors-dropped"):
    """Their commit will not come."""

    object_ids: tuple[bytes, ...]


class Mirrored(msgspec.Struct, frozen=True, array_like=True, tag="mirrored"):
    """A version has another second copy."""

    object_id: bytes
    extents: tuple[Extent, ...]


class ArchiveMoved(msgspec.Struct, frozen=True, array_like=True, tag="archive-moved"):
    """A version's copy has another name in the archive: a newer version gets its own."""

    object_id: bytes
    path: str


class ArchiveDeleted(msgspec.Struct, frozen=True, array_like=True, tag="archive-deleted"):
    tombstone: int


class ReductionFailed(msgspec.Struct, frozen=True, array_like=True, tag="reduction-failed"):
    object_id: bytes
    kernel: str
    error: str
    give_up: bool
    counted: bool = True
    """False: nothing was tried; the error says what the reduction waits for."""


class ReductionsDeferred(msgspec.Struct, frozen=True, array_like=True, tag="reductions-deferred"):
    """They wait for their run to close."""

    bucket: str
    run: bytes
    kernel: str
    object_ids: tuple[bytes, ...]


class FilterEnded(msgspec.Struct, frozen=True, array_like=True, tag="filter-ended"):
    """The raw data stay as they are (``error`` says why, if they should not), or the filter is tried again."""

    object_id: bytes
    error: str
    again: bool
    due_ns: int
    """When the raw data are due in the archive, unless it is tried again."""


class RunClosed(msgspec.Struct, frozen=True, array_like=True, tag="run-closed"):
    bucket: str
    run: bytes
    closed_ns: int
    closed_by: str


class RunStored(msgspec.Struct, frozen=True, array_like=True, tag="run-stored"):
    """The run has no partials of this kernel, and no product. ``keep``: it will have."""

    bucket: str
    run: bytes
    kernel: str
    reflects: int
    keep: bool = False


Entry = (
    BucketCreated
    | BucketDeleted
    | BucketTagged
    | BucketConfigured
    | UserPut
    | ReservationPut
    | ObjectCommitted
    | ObjectAppended
    | MarkerCommitted
    | VersionLockSet
    | UploadCreated
    | PartCommitted
    | UploadCompleted
    | UploadAborted
    | ObjectDeleted
    | Settled
    | LedgerAmended
    | DrainClaimed
    | Drained
    | DrainFailed
    | Evicted
    | RecallRequested
    | Recalled
    | RecallFailed
    | Relocated
    | ObjectAmended
    | Noticed
    | NoticesDone
    | NodePut
    | MirrorHeld
    | MirrorsDropped
    | Mirrored
    | ArchiveMoved
    | ArchiveDeleted
    | ReductionFailed
    | ReductionsDeferred
    | FilterEnded
    | RunClosed
    | RunStored
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[Entry]] = msgspec.msgpack.Decoder(list[Entry])


def encode(entry: Entry) -> bytes:
    return _encoder.encode(entry)


def join(encoded: list[bytes]) -> bytes:
    """The payload of a batch: the msgpack array (array 32 of its specification) of entries encoded one by one."""
    return b"".join((b"\xdd", len(encoded).to_bytes(4), *encoded))


def decode(payload: bytes | memoryview) -> list[Entry]:
    """Raises msgspec.DecodeError for entries this program does not know (a journal written by a newer one)."""
    return _decoder.decode(payload)
