"""What the rooms say to each other about objects: plain values, no behaviour, no I/O.

Everything here is a msgspec struct, so it travels over the catalogue socket, into the journal and into the index
unchanged. Keys are bytes (UTF-8 as sent; order is bytewise), times are integer nanoseconds since the epoch (UTC),
sizes are bytes. Adding a field needs a default, so that old journals stay readable.
"""

from __future__ import annotations

import enum
import hashlib

import msgspec

NULL_VERSION = "null"
PRODUCTS_PREFIX = b"_products/"
LABEL_BYTES = 4096
"""Every extent starts with a label of this size; its payload follows at ``offset + LABEL_BYTES``."""
BLOCK_BYTES = 4096
"""Unit of O_DIRECT: memory address, file offset and length of a write are congruent modulo this."""


class ObjectState(enum.StrEnum):
    """Where the bytes of a committed version live; see ingest/states.py for the transitions."""

    RECEIVING = "receiving"
    BUFFERED = "buffered"
    DRAINING = "draining"
    ARCHIVED = "archived"
    EVICTED = "evicted"
    RECALLING = "recalling"
    MARKER = "marker"
    """A delete marker: a version without bytes, which never moves."""
    DELETED = "deleted"


class Durability(enum.StrEnum):
    """What a 200 means for a bucket (DESIGN "Durability")."""

    MEMORY = "memory"
    DISK = "disk"
    MIRROR = "mirror"
    """On disk here and on a second node."""


class Versioning(enum.StrEnum):
    """What a write to a key does to the version that was current
    (https://docs.aws.amazon.com/AmazonS3/latest/userguide/Versioning.html)."""

    OFF = ""
    """It is replaced: every key has the one version ``null``."""
    ENABLED = "Enabled"
    """It stays, as a noncurrent version."""
    SUSPENDED = "Suspended"
    """It stays, unless it is the version ``null``, which is replaced."""


class LockMode(enum.StrEnum):
    """Who may shorten a retention period: with the permission to bypass it, or nobody at all."""

    GOVERNANCE = "GOVERNANCE"
    COMPLIANCE = "COMPLIANCE"


class LifetimeClass(enum.StrEnum):
    """Objects that live equally long share segments, so that segments empty together."""

    STREAM = "stream"
    PRODUCT = "product"
    SMALL = "small"


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """A run of payload bytes in one segment file of one slot of one node."""

    node: int
    slot: int
    segment: int
    generation: int
    offset: int
    """File offset of the extent's label; a multiple of BLOCK_BYTES. Payload starts LABEL_BYTES later."""
    length: int
    """Payload bytes (the last block is padded with zeros in the file)."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the segment that the extent occupies: its label, its payload and the padding."""
        return LABEL_BYTES + -(-self.length // BLOCK_BYTES) * BLOCK_BYTES


class FrameLedger(msgspec.Struct, frozen=True):
    """What became of every frame of one object version. Counts are frames unless the name says otherwise."""

    received: int = 0
    kept: int = 0
    dropped: int = 0
    replaced: int = 0
    stored: int = 0
    unreduced: int = 0
    """Frames no kernel has judged (yet): lagging, or the kernel failed."""
    gaps: tuple[tuple[int, int], ...] = ()
    """Named gaps as (first frame index, frames missing)."""
    trailing_bytes: int = 0
    """Bytes after the last whole frame."""
    stopped_at: int | None = None
    """The frame for which a kernel said STOP; it is kept, and counted as kept."""
    after_stop: int = 0
    """Frames stored behind ``stopped_at`` that no kernel judged: they are kept.
    received = kept + dropped + replaced + unreduced + after_stop."""
    truncated: bool = False
    """The rest of the body behind STOP was not stored."""
    discarded_bytes: int = 0
    """Bytes that were read and dropped then (fewer than were sent, where the answer came early)."""


class FrameGeometry(msgspec.Struct, frozen=True):
    """How frames lie in a body: ``origin + i * frame_bytes`` is frame ``i``, C order."""

    dtype: str
    """numpy dtype string, e.g. ``<u2``."""
    shape: tuple[int, ...]
    origin: int
    """Body offset of frame 0 in bytes."""
    frame_bytes: int
    count: int | None = None
    """Frames the header declares; None when the body's length decides."""


class StageUse(msgspec.Struct, frozen=True):
    """One kernel of a chain as it judged frames: its source and what it was given."""

    kernel: str
    sha256: str
    params: dict[str, int | float] = {}
    arrays: dict[str, int] = {}
    """Parameter array -> CRC64NVME of its .npy file."""


class KernelEpoch(msgspec.Struct, frozen=True):
    """From ``first_frame`` on, ``kernel`` judged a version's frames with these settings.

    Kept with the commit: what is reduced later (after a crash, from disk) is reduced with the settings of its time."""

    kernel: str
    first_frame: int
    stages: tuple[StageUse, ...]
    """Of the chain in order; the kernel itself is the last."""


class RawVersion(msgspec.Struct, frozen=True):
    """The version as it was received, of which a raw filter left another one."""

    object_id: bytes
    length: int
    etag: str
    crc64nvme: int
    received_ns: int


class PartRecord(msgspec.Struct, frozen=True):
    """One part of a multipart object, in part-number order in ``ObjectRecord.parts``."""

    number: int
    length: int
    etag: str
    crc64nvme: int
    checksums: dict[str, str] = {}
    extents: tuple[Extent, ...] = ()
    modified_ns: int = 0
    settled: bool = True
    mirror: tuple[Extent, ...] = ()
    """The same bytes on a second node."""


class ArchiveCopy(msgspec.Struct, frozen=True):
    """A published, verified copy on the archive tier."""

    target: str
    path: str
    crc64nvme: int
    verified_ns: int


class VersionAttributes(msgspec.Struct, frozen=True, omit_defaults=True):
    """What may change of a version after its commit (ingest/catalog/amend.py)."""

    tags: dict[str, str] = {}
    storage_class: str = "STANDARD"
    restore_days: int = 0
    """A restore that was asked for and has not come back: for so many days."""
    restore_day_s: int = 86400
    """Seconds of such a day: fewer in tests."""
    restored_until_ns: int = 0
    """Readable until then, though its class is one of the archive's; 0 where it was not restored."""
    acl: tuple[tuple[str, str], ...] | None = None
    """Access control list: (grantee, permission), as s3api/auth/acl.py has them. None: the owner's alone."""


class Retention(msgspec.Struct, frozen=True, array_like=True):
    """A version must not be deleted before ``until_ns``."""

    mode: LockMode
    until_ns: int


class BucketRecord(msgspec.Struct, frozen=True):
    name: str
    owner: str
    created_ns: int
    region: str = ""
    tags: dict[str, str] = {}
    """User tags and ``hiss.*`` settings alike; ingest/bucket_settings.py reads the latter."""
    documents: dict[str, bytes] = {}
    """Configuration documents by name; ingest/bucket_documents.py says which there are and reads them."""


class ObjectRecord(msgspec.Struct, frozen=True):
    """One committed version of an object."""

    bucket: str
    key: bytes
    version_id: str
    object_id: bytes
    """128 bits made by the worker: the idempotence key of the commit."""
    sequence: int
    """Commit order, of all nodes of a cluster together; dense."""
    state: ObjectState
    length: int
    stored_length: int
    etag: str
    """Without quotes."""
    crc64nvme: int
    modified_ns: int
    owner: str
    durability: Durability = Durability.DISK
    settled: bool = True
    """False while a ``memory`` object's bytes are not yet all on disk."""
    codec: str = "raw"
    delete_marker: bool = False
    checksums: dict[str, str] = {}
    """Client-visible checksums: lower-case algorithm name -> base64, e.g. ``{"crc32": "…="}``."""
    checksum_type: str = "FULL_OBJECT"
    headers: dict[str, str] = {}
    """Stored Content-* headers, lower-case: content-type, content-encoding, cache-control, …"""
    metadata: dict[str, str] = {}
    """User metadata without the ``x-amz-meta-`` prefix, lower-case names."""
    extents: tuple[Extent, ...] = ()
    parts: tuple[PartRecord, ...] = ()
    ledger: FrameLedger | None = None
    geometry: FrameGeometry | None = None
    archive: ArchiveCopy | None = None
    drain_attempts: int = 0
    drain_error: str = ""
    epochs: tuple[KernelEpoch, ...] = ()
    """Of all kernels that saw the stream arrive, by kernel and first frame."""
    raw: RawVersion | None = None
    """What was received, if this is what a raw filter left of it."""
    attributes: VersionAttributes = VersionAttributes()
    retention: Retention | None = None
    legal_hold: bool = False
    appends: int = 0
    """How often it was appended to: its extents are labelled with the ids of the pieces."""
    mirror: tuple[Extent, ...] = ()
    """The same bytes once more, in order, on another node than ``extents`` (durability ``mirror``)."""


class UploadRecord(msgspec.Struct, frozen=True):
    """A multipart upload between Create and Complete."""

    bucket: str
    key: bytes
    upload_id: str
    owner: str
    started_ns: int
    headers: dict[str, str] = {}
    metadata: dict[str, str] = {}
    checksum_algorithm: str = ""
    """Lower-case; empty when the client named none."""
    checksum_type: str = ""
    attributes: VersionAttributes = VersionAttributes()
    """Of what it becomes."""
    retention: Retention | None = None
    """Of what it becomes; the bucket's default counts from Complete."""
    legal_hold: bool = False


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """What a node has to be reserved."""

    node: int
    buffer_bytes: int
    rate_bytes_per_s: int
    """0: it does not say; any rate is taken."""


class Share(msgspec.Struct, frozen=True, array_like=True, order=True):
    """What a reservation holds on one node."""

    node: int
    capacity_bytes: int
    rate_bytes_per_s: int


class Reservation(msgspec.Struct, frozen=True):
    """Capacity and rate that a bucket has in a slot of time (ingest/reservations.py says what state it is in)."""

    reservation_id: str
    """Made by the asker: the idempotence key."""
    bucket: str
    owner: str
    capacity_bytes: int
    rate_bytes_per_s: int
    from_ns: int
    until_ns: int
    grace_s: int = 300
    """So long after ``until_ns`` bodies that began in the slot go on in what others leave."""
    shares: tuple[Share, ...] = ()
    """On which nodes, by number; they sum to the whole."""
    created_ns: int = 0
    released_ns: int = 0
    """When it was given up early; 0: it was not."""


class ReservationUse(msgspec.Struct, frozen=True):
    """A reservation, and what its bucket has committed in it that still lies in the buffers."""

    reservation: Reservation
    used_bytes: dict[int, int] = {}
    """Node -> bytes of its segments."""


class Grant(msgspec.Struct, frozen=True):
    """``bucket`` is a glob (``*`` for all), ``prefix`` a plain key prefix; ``admin`` implies write implies read."""

    bucket: str = "*"
    prefix: str = ""
    access: str = "read"


class AccessKey(msgspec.Struct, frozen=True):
    """One key pair of a user; several at a time, so that a new one is in use before the old one goes."""

    access_key: str
    secret: bytes
    """The secret key, encrypted with the node key; never logged, never returned."""
    enabled: bool = True
    created_ns: int = 0


class UserRecord(msgspec.Struct, frozen=True):
    user_id: str
    display_name: str
    access_key: str = ""
    """With ``secret``: the only pair, in records of before users had several. It becomes ``keys``, and is empty from then on."""
    secret: bytes = b""
    grants: tuple[Grant, ...] = ()
    enabled: bool = True
    root: bool = False
    keys: tuple[AccessKey, ...] = ()
    email: str = ""
    canonical_id: str = ""
    """64 hex digits, as S3 names owners and grantees; derived from ``user_id`` where none was given."""
    policies: dict[str, str] = {}
    """Identity policies: name -> JSON document."""

    def __post_init__(self) -> None:
        if self.access_key:
            msgspec.structs.force_setattr(self, "keys", (AccessKey(self.access_key, self.secret), *self.keys))
            msgspec.structs.force_setattr(self, "access_key", "")
            msgspec.structs.force_setattr(self, "secret", b"")
        if not self.canonical_id:
            derived = hashlib.sha256(b"hiss-canonical-id\0" + self.user_id.encode()).hexdigest()
            msgspec.structs.force_setattr(self, "canonical_id", derived)


class NodeState(enum.StrEnum):
    """What a member of a cluster is for."""

    UP = "up"
    DRAINING = "draining"
    """It takes no new bodies and gives what it holds to the archive; then it may leave."""
    REMOVED = "removed"
    """It has left. Its number is never given again."""


class NodeRecord(msgspec.Struct, frozen=True):
    """A member of a cluster, as every node knows it."""

    node: int
    """Its number, which its extents name."""
    name: str
    epoch: int
    """Grows with every start of its catalogue process."""
    state: NodeState = NodeState.UP
    domain: str = ""
    """Failure domain: what is likely to fail together (a rack, a power feed)."""
    s3: str = ""
    """Where other nodes and clients reach its S3 port: ``http://10.0.0.2:9000``."""
    control: str = ""
    dav: str = ""
    version: str = ""
    """Of the program it runs."""


class NodeCounts(msgspec.Struct, frozen=True):
    """What a node still has to drain: versions whose first byte lies there."""

    node: int
    undrained_objects: int
    undrained_bytes: int
    failing_objects: int


class HeldByNode(msgspec.Struct, frozen=True):
    """What would be lost with a node."""

    node: int
    undrained_objects: int
    undrained_bytes: int
    only_objects: int
    """Undrained versions of which no other node that is there has a copy."""
    only_bytes: int
    only_parts: int
    """Parts of open uploads, likewise."""


class PartialMember(msgspec.Struct, frozen=True, array_like=True):
    """A version whose frames are in a partial."""

    object_id: bytes
    ledger: FrameLedger | None = None
    """The version's frame ledger from this commit on; None leaves it as it is."""
    verdicts: bytes = b""
    """Of a kernel that filters: as of CommitObject."""


class PartialOf(msgspec.Struct, frozen=True):
    """What makes an object a partial of a run: its state covers the frames of ``members``, and of no other version."""

    kernel: str
    run: bytes
    """Key prefix up to its last ``/``."""
    group: str
    """Kernel source, parameters and epochs, as a hex digest: states of different groups are never merged."""
    members: tuple[PartialMember, ...] = ()
    replaces: tuple[bytes, ...] = ()
    """object_ids of partials whose members this one takes over and which are deleted with the commit."""
    batch: bool = False
    """Stands for many one-frame objects: it is deleted once a member goes, and the other members are owed again."""
    apart: bool = False
    """A batch with one state a member: one that goes is left out from then on, and the others stay."""


class RunProductOf(msgspec.Struct, frozen=True):
    """What makes an object the product of a run, as of a state of the catalogue."""

    kernel: str
    run: bytes
    reflects: int
    """``RunProductRecord.changed`` when the partials were listed. Where a later state is stored, the commit is refused
    (StaleVersion)."""
    final: bool = True
    """False: another product of this state follows; the run's is not up to date yet."""


class CommitObject(msgspec.Struct, frozen=True):
    """Ask the catalogue to make a received body the current version of a key."""

    bucket: str
    key: bytes
    object_id: bytes
    length: int
    etag: str
    crc64nvme: int
    owner: str
    extents: tuple[Extent, ...]
    durability: Durability = Durability.DISK
    settled: bool = True
    checksums: dict[str, str] = {}
    checksum_type: str = "FULL_OBJECT"
    headers: dict[str, str] = {}
    metadata: dict[str, str] = {}
    ledger: FrameLedger | None = None
    geometry: FrameGeometry | None = None
    reductions: tuple[str, ...] = ()
    """Kernels whose product is still to come: they are remembered until ``reduces`` names them."""
    reduces: tuple[bytes, str] | None = None
    """(object_id of the source, kernel name): this object is that product; commits only if the source still exists."""
    if_none_match: str = ""
    """``*`` or an ETag: precondition, decided at commit."""
    if_match: str = ""
    source: bytes = b""
    """object_id of the version whose extents this one shares (a copy without copying); commits only if they are still its."""
    partial: PartialOf | None = None
    run_product: RunProductOf | None = None
    epochs: tuple[KernelEpoch, ...] = ()
    filters: dict[str, str] = {}
    """Kernel -> ``kept`` or ``none``: what it leaves of the raw data. Once all kernels have judged, a new version takes this
    one's place (if the bucket allows it)."""
    verdicts: bytes = b""
    """With ``reduces``, of a kernel that filters: its verdict of each frame, packed (kernels/rawfilter/packed.py)."""
    raw: RawVersion | None = None
    """This is what a raw filter left of that version; commits only if that is the current one."""
    attributes: VersionAttributes = VersionAttributes()
    append_at: int | None = None
    """The body is the end of an object: it goes behind the current version's bytes, which are so many. Of a key that is not
    there, 0 makes it. ``source`` names that version, ``length`` and digests are of the whole, ``extents`` of the new bytes."""
    retention: Retention | None = None
    """None: the bucket's default."""
    legal_hold: bool = False
    mirror_later: bool = False
    """With durability ``mirror``: commit although no other node holds a copy yet; one is made afterwards, and until then the
    version counts as under-mirrored. For objects of our own, whose loss costs a computation."""


class CommitPart(msgspec.Struct, frozen=True):
    bucket: str
    key: bytes
    upload_id: str
    part: PartRecord
    object_id: bytes
    """Idempotence key of this part's body."""
    durability: Durability = Durability.DISK


class CompletedPart(msgspec.Struct, frozen=True):
    """A part as the client's Complete names it."""

    number: int
    etag: str
    checksums: dict[str, str] = {}


class CompleteUpload(msgspec.Struct, frozen=True):
    """Link an upload's parts into one object; copies nothing. Digests were combined by the caller."""

    bucket: str
    key: bytes
    upload_id: str
    object_id: bytes
    parts: tuple[CompletedPart, ...]
    etag: str
    crc64nvme: int
    length: int
    checksums: dict[str, str] = {}
    checksum_type: str = "COMPOSITE"
    durability: Durability = Durability.DISK
    reductions: tuple[str, ...] = ()
    if_none_match: str = ""
    if_match: str = ""
    filters: dict[str, str] = {}
    """As of CommitObject."""


class DeleteObject(msgspec.Struct, frozen=True):
    bucket: str
    key: bytes
    version_id: str | None = None
    """None: the key. Where the bucket keeps versions, that leaves a delete marker."""
    if_match: str = ""
    object_id: bytes = b""
    """Delete this version only: one that replaced it meanwhile stays, even with the same bytes."""
    if_noncurrent: bool = False
    """Not if it is the newest version of its key (again)."""
    marker_id: bytes = b""
    """Of the delete marker, if there is to be one; made by the catalogue's client, so that a delete can be sent again."""
    bypass_governance: bool = False
    """The asker may end a retention in GOVERNANCE mode."""
    lost: bool = False
    """The version's bytes are gone already: no lock can bring them back."""


class Deleted(msgspec.Struct, frozen=True):
    """What a delete did; deleting a missing key succeeds (as on S3)."""

    existed: bool
    version_id: str = ""
    """Of the version that was deleted by its id, or of the delete marker that was made. Empty in buckets without versions."""
    delete_marker: bool = False
    """A marker was made, or (delete by id) taken away."""


class ReductionJob(msgspec.Struct, frozen=True):
    """A product that is owed: ``kernel`` over the version ``record``."""

    kernel: str
    attempts: int
    record: ObjectRecord
    released: bool = False
    """It was paid once, by a partial that is gone: nobody is at it."""


class RunRecord(msgspec.Struct, frozen=True):
    """One run: a key prefix that holds objects with kernels."""

    bucket: str
    run: bytes
    member_ns: int
    """When its last member arrived."""
    closed_ns: int = 0
    """0 while it is open."""
    closed_by: str = ""
    """``marker``, ``timeout`` or ``request``."""


class RunProductRecord(msgspec.Struct, frozen=True):
    """The state of one kernel's product of a run. ``changed > stored``: the product is to be made anew."""

    kernel: str
    changed: int
    stored: int
    run: RunRecord


class PartialRecord(msgspec.Struct, frozen=True):
    """One partial of a run, as the catalogue lists it."""

    object_id: bytes
    group: str
    since: int
    """Sequence of its first commit; the oldest one's where partials were compacted."""
    members: int
    """Those that are still there."""
    batch: bool
    apart: bool
    key: bytes
    length: int


class OwedInRun(msgspec.Struct, frozen=True):
    """Members of a run that are in no partial of a kernel (yet)."""

    pending: int
    failed: int
    failures: tuple[tuple[bytes, str], ...] = ()
    """(key, reason) of members that were given up; the first few."""
    waiting: tuple[bytes, ...] = ()
    """object_ids of the pending ones."""


class ReductionCount(msgspec.Struct, frozen=True):
    """Products of one kernel in one bucket that are not there: ``owed`` (still to come), or ``failed`` (given up)."""

    kernel: str
    owed: int
    failed: int
    error: str
    """What the latest of them that has failed says."""
    key: bytes = b""
    """An object that it says it of."""


class OwedProduct(msgspec.Struct, frozen=True):
    """A product that is not there, and why."""

    key: bytes
    """Of the object it would be of."""
    kernel: str
    error: str
    given_up: bool


class FilterJob(msgspec.Struct, frozen=True):
    """A raw filter that is due: every kernel has judged the version, or never will."""

    record: ObjectRecord
    attempts: int
    filters: dict[str, str]
    """As of CommitObject."""
    verdicts: dict[str, bytes]
    """Of those kernels that have a product with verdicts, as of CommitObject."""
    unjudged: frozenset[str] = frozenset()
    """Kernels whose reduction of the version was given up."""


class ListedObject(msgspec.Struct, frozen=True):
    """One row of a listing: a key, or a common prefix (then ``record`` is None)."""

    key: bytes
    record: ObjectRecord | None
    latest: bool = True
    """In a listing of versions: the newest one of its key, delete markers included."""


class SegmentUse(msgspec.Struct, frozen=True):
    """Live bytes of one segment generation, as the catalogue counts references."""

    slot: int
    segment: int
    generation: int
    live_bytes: int


class FreedExtents(msgspec.Struct, frozen=True):
    """Pushed to a slot's owner when extents lose their last reference."""

    extents: tuple[Extent, ...]


class SettleRequest(msgspec.Struct, frozen=True):
    """Pushed to a slot's owner: somebody wants to read an unsettled object; write its bytes out now."""

    object_id: bytes


class DrainCounts(msgspec.Struct, frozen=True):
    queued_objects: int
    queued_bytes: int
    failing_objects: int
    oldest_undrained_ns: int | None
    """modified_ns of the oldest version without a verified archive copy; None when all are safe."""
    buffered_bytes: int
    evictable_bytes: int
