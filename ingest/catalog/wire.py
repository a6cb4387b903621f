"""What the catalogue process and its clients say to each other: frames of a 4-byte little-endian length and msgpack.

Client to server: ``Register`` once for each connection, then ``Call``s. Server to client: one ``Answer`` for each call,
in any order, and ``Push``es. A call may be sent again on a new connection: every request here is safe to repeat, and
where the answer of the first time would differ (an id already known, a bucket just made) it says how it recognises itself.
"""

from __future__ import annotations

import struct

import msgspec

from ingest import errors
from ingest.origin import Origin
from ingest.records import (
    ArchiveCopy,
    BucketRecord,
    CommitObject,
    CommitPart,
    CompleteUpload,
    DeleteObject,
    Extent,
    FrameLedger,
    FreedExtents,
    NodeRecord,
    NodeState,
    Offer,
    Reservation,
    Retention,
    SettleRequest,
    UploadRecord,
    UserRecord,
)

FRAME_BYTES_MAX = 64 * 1024 * 1024
LENGTH = struct.Struct("<I")


class Register(msgspec.Struct, frozen=True, array_like=True, tag="register"):
    """First frame of a connection. Of two clients of one slot the one with the greater epoch lives."""

    slot: int | None
    epoch: int


class Commit(msgspec.Struct, frozen=True, array_like=True, tag="commit"):
    request: CommitObject
    only_if_known: bool = False
    """Ask what became of an earlier call and change nothing: refused with StaleVersion when it was never decided."""


class Delete(msgspec.Struct, frozen=True, array_like=True, tag="delete"):
    request: DeleteObject


class CreateBucket(msgspec.Struct, frozen=True, array_like=True, tag="create-bucket"):
    record: BucketRecord
    """``created_ns`` is the asker's: the same owner and time mean this very request was sent before."""


class DeleteBucket(msgspec.Struct, frozen=True, array_like=True, tag="delete-bucket"):
    name: str


class TagBucket(msgspec.Struct, frozen=True, array_like=True, tag="tag-bucket"):
    name: str
    tags: dict[str, str]


class ConfigureBucket(msgspec.Struct, frozen=True, array_like=True, tag="configure-bucket"):
    name: str
    documents: dict[str, bytes | None]
    """Configuration documents to put, or with None to delete; all at once or none."""


class PutUser(msgspec.Struct, frozen=True, array_like=True, tag="put-user"):
    user: UserRecord


class Reserve(msgspec.Struct, frozen=True, array_like=True, tag="reserve"):
    reservation: Reservation
    """Its shares are decided; ``from_ns`` in the past is now."""
    offers: tuple[Offer, ...]
    """What every node of the cluster has in all."""


class ExtendReservation(msgspec.Struct, frozen=True, array_like=True, tag="extend-reservation"):
    reservation_id: str
    until_ns: int
    offers: tuple[Offer, ...]


class ReleaseReservation(msgspec.Struct, frozen=True, array_like=True, tag="release-reservation"):
    reservation_id: str


class AmendObject(msgspec.Struct, frozen=True, array_like=True, tag="amend-object"):
    """None leaves as it is."""

    object_id: bytes
    tags: dict[str, str] | None = None
    storage_class: str | None = None
    acl: tuple[tuple[str, str], ...] | None = None


class RestoreObject(msgspec.Struct, frozen=True, array_like=True, tag="restore-object"):
    object_id: bytes
    days: int
    day_s: int


class MarkNoticed(msgspec.Struct, frozen=True, array_like=True, tag="mark-noticed"):
    sequences: tuple[int, ...]


class SetLock(msgspec.Struct, frozen=True, array_like=True, tag="set-lock"):
    """Change one part of a version's lock. ``version_id`` None: the current version."""

    bucket: str
    key: bytes
    version_id: str | None
    retention: tuple[Retention | None] | None = None
    """The new retention, or none; None: as it is."""
    legal_hold: bool | None = None
    bypass_governance: bool = False


class CreateUpload(msgspec.Struct, frozen=True, array_like=True, tag="create-upload"):
    upload: UploadRecord


class PutPart(msgspec.Struct, frozen=True, array_like=True, tag="put-part"):
    request: CommitPart
    only_if_known: bool = False


class Complete(msgspec.Struct, frozen=True, array_like=True, tag="complete"):
    request: CompleteUpload


class AbortUpload(msgspec.Struct, frozen=True, array_like=True, tag="abort-upload"):
    bucket: str
    key: bytes
    upload_id: str


class MarkSettled(msgspec.Struct, frozen=True, array_like=True, tag="mark-settled"):
    object_ids: tuple[bytes, ...]


class AmendLedger(msgspec.Struct, frozen=True, array_like=True, tag="amend-ledger"):
    object_id: bytes
    ledger: FrameLedger


class ClaimDrain(msgspec.Struct, frozen=True, array_like=True, tag="claim-drain"):
    limit: int
    lease_ns: int
    claim: int
    """Random: the lease epoch, and how the same claim is recognised when it is sent again."""


class MarkDrained(msgspec.Struct, frozen=True, array_like=True, tag="mark-drained"):
    object_id: bytes
    copy: ArchiveCopy
    claim: int = 0
    """The claim it was drained under; refused with LeaseLost when another one has followed."""


class FailDrain(msgspec.Struct, frozen=True, array_like=True, tag="fail-drain"):
    object_id: bytes
    error: str
    retry_after_ns: int


class MarkEvicted(msgspec.Struct, frozen=True, array_like=True, tag="mark-evicted"):
    object_id: bytes


class RequestRecall(msgspec.Struct, frozen=True, array_like=True, tag="request-recall"):
    object_id: bytes


class MarkRecalled(msgspec.Struct, frozen=True, array_like=True, tag="mark-recalled"):
    object_id: bytes
    extents: tuple[Extent, ...]


class FailRecall(msgspec.Struct, frozen=True, array_like=True, tag="fail-recall"):
    object_id: bytes
    error: str


class Relocate(msgspec.Struct, frozen=True, array_like=True, tag="relocate"):
    object_id: bytes
    old: Extent
    new: tuple[Extent, ...]


class MarkArchiveMoved(msgspec.Struct, frozen=True, array_like=True, tag="mark-archive-moved"):
    object_id: bytes
    old: str
    new: str


class MarkArchiveDeleted(msgspec.Struct, frozen=True, array_like=True, tag="mark-archive-deleted"):
    tombstone: int


class FailReduction(msgspec.Struct, frozen=True, array_like=True, tag="fail-reduction"):
    object_id: bytes
    kernel: str
    error: str
    give_up: bool
    counted: bool = True


class DeferReductions(msgspec.Struct, frozen=True, array_like=True, tag="defer-reductions"):
    """These reductions wait for their run to close; all members of one run."""

    bucket: str
    run: bytes
    kernel: str
    object_ids: tuple[bytes, ...]


class EndFilter(msgspec.Struct, frozen=True, array_like=True, tag="end-filter"):
    object_id: bytes
    error: str
    again: bool


class CloseRun(msgspec.Struct, frozen=True, array_like=True, tag="close-run"):
    """``before_ns``: only if no member arrived since then (0: in any case)."""

    bucket: str
    run: bytes
    closed_by: str
    before_ns: int = 0


class MarkRunStored(msgspec.Struct, frozen=True, array_like=True, tag="mark-run-stored"):
    bucket: str
    run: bytes
    kernel: str
    reflects: int
    keep: bool = False
    """It has members that wait for its end."""


class PutNode(msgspec.Struct, frozen=True, array_like=True, tag="put-node"):
    """A member joins, starts anew, or changes what it is for. ``name`` and addresses come with it."""

    record: NodeRecord


class SetNodeState(msgspec.Struct, frozen=True, array_like=True, tag="set-node-state"):
    """What a member is for from now on. ``force``: it leaves although it holds what exists nowhere else."""

    node: int
    state: NodeState
    force: bool = False


class HoldMirror(msgspec.Struct, frozen=True, array_like=True, tag="hold-mirror"):
    """This node has a second copy of a body: of a version that is still to be committed, or of one that has none."""

    object_id: bytes
    extents: tuple[Extent, ...]


class DropMirrors(msgspec.Struct, frozen=True, array_like=True, tag="drop-mirrors"):
    """The commits of these will not come."""

    object_ids: tuple[bytes, ...]


class Settle(msgspec.Struct, frozen=True, array_like=True, tag="settle"):
    """Not a mutation: answered when the version's ``settled`` has been committed."""

    object_id: bytes
    timeout_s: float


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag="snapshot"):
    """Not a mutation: write a snapshot, answer its path."""


class Barrier(msgspec.Struct, frozen=True, array_like=True, tag="barrier"):
    """Not a mutation: answered when everything visible before it is on disk."""


class Fresh(msgspec.Struct, frozen=True, array_like=True, tag="fresh"):
    """Not a mutation: answered when this node's index has everything that any node of the cluster was answered before; with
    False where the engine cannot be asked."""


Mutation = (
    Commit
    | Delete
    | CreateBucket
    | DeleteBucket
    | TagBucket
    | ConfigureBucket
    | PutUser
    | Reserve
    | ExtendReservation
    | ReleaseReservation
    | AmendObject
    | RestoreObject
    | MarkNoticed
    | SetLock
    | CreateUpload
    | PutPart
    | Complete
    | AbortUpload
    | MarkSettled
    | AmendLedger
    | ClaimDrain
    | MarkDrained
    | FailDrain
    | MarkEvicted
    | RequestRecall
    | MarkRecalled
    | FailRecall
    | Relocate
    | MarkArchiveMoved
    | MarkArchiveDeleted
    | FailReduction
    | EndFilter
    | CloseRun
    | DeferReductions
    | MarkRunStored
    | PutNode
    | SetNodeState
    | HoldMirror
    | DropMirrors
)


class Call(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    id: int
    request: Mutation | Settle | Snapshot | Barrier | Fresh
    origin: Origin | None = None


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """``error`` is the name of a class of ingest.errors and its argument; then ``result`` is nil."""

    id: int
    result: msgspec.Raw
    error: tuple[str, str] | None = None


class Push(msgspec.Struct, frozen=True, array_like=True, tag="push"):
    freed: FreedExtents | None = None
    settle: SettleRequest | None = None


_encode = msgspec.msgpack.Encoder().encode
encode_value = _encode
decode_from_client = msgspec.msgpack.Decoder(Register | Call).decode
decode_from_server = msgspec.msgpack.Decoder(Answer | Push).decode

_ERRORS: dict[str, type[errors.IngestError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.IngestError)
}


def frame(message: Register | Call | Answer | Push) -> bytes:
    payload = _encode(message)
    return LENGTH.pack(len(payload)) + payload


def error_fields(error: errors.IngestError) -> tuple[str, str]:
    return type(error).__name__, str(error)


def error_from(fields: tuple[str, str]) -> errors.IngestError:
    name, argument = fields
    return _ERRORS.get(name, errors.CatalogError)(argument)


class Frames:
    """Cuts a byte stream into frames. Pure: bytes in, payloads out; ValueError for a frame over the limit."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        buffer = self._buffer
        buffer += data
        found, start = [], 0
        while len(buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, start)
            if length > FRAME_BYTES_MAX:
                raise ValueError(f"a frame of {length} bytes; at most {FRAME_BYTES_MAX}")
            end = start + LENGTH.size + length
            if end > len(buffer):
                break
            found.append(bytes(buffer[start + LENGTH.size : end]))
            start = end
        if start:
            del buffer[:start]
        return found
