"""Errors of the buffer and the catalogue: whose fault, and what the protocol rooms should say.

``IngestError`` is the base; ``CatalogError`` are decisions of the catalogue, the rest the data path. The S3 room maps each
class to its AWS code in one table (s3api/errors.py); nothing here knows HTTP.
"""

from __future__ import annotations


class IngestError(Exception):
    """Base of every error this room raises."""


class BufferFull(IngestError):
    """No room in the arena or in the segments: ask the client to slow down (before its body)."""


class NotAdmitted(BufferFull):
    """What is reserved does not let the body in now; ``str()`` says why, fit for the sender."""

    def __init__(self, why: str, retry_after_s: int = 1) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class NodeDraining(BufferFull):
    """This node is being emptied: other nodes of the cluster take bodies, it does not."""


class KernelsUnavailable(IngestError):
    """A submitted kernel could not be tried at the moment; ``str()`` says why, fit for the scientist."""


class StreamAborted(IngestError):
    """The stream was aborted (peer gone, kernel of the system refused the write, node stopping)."""


class StorageFailed(IngestError):
    """A write or flush failed and could not be redone elsewhere; nothing was acknowledged."""


class Unreadable(IngestError):
    """The disk does not give stored bytes now. They may be there: ask again."""


class DataLost(IngestError):
    """Bytes that were acknowledged cannot be read back (disk fault, or ``memory`` data after a host crash)."""


class ObjectOffline(IngestError):
    """The bytes are on the archive tier only and were not recalled within the time allowed."""


class CatalogError(IngestError):
    """The catalogue refused; the request changed nothing."""


class CatalogUnavailable(CatalogError):
    """No answer from the catalogue: the outcome is unknown until retried with the same object_id."""


class NoSuchBucket(CatalogError):
    pass


class BucketExists(CatalogError):
    """``owner`` says whether the asker already owns it."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


class BucketNotEmpty(CatalogError):
    pass


class RestoreInProgress(CatalogError):
    """The version is being restored already."""


class BadReservation(CatalogError):
    """What is asked for makes no sense; ``str()`` says why."""


class DoesNotFit(CatalogError):
    """A reservation of what is not free; ``str()`` says what would fit."""


class NoSuchReservation(CatalogError):
    pass


class ReservationEnded(CatalogError):
    """It cannot be changed any more."""


class BadDocument(CatalogError):
    """A configuration document of a bucket that nobody knows, that is too large or cannot be read; ``str()`` says which."""


class NoSuchKey(CatalogError):
    pass


class NoSuchVersion(CatalogError):
    """The key has no version with this id."""


class DeleteMarker(CatalogError):
    """The named version is a delete marker, which has nothing to read or to change."""


class VersionLocked(CatalogError):
    """The version is under retention or legal hold, or the change would weaken its lock. ``str()`` says which."""


class InvalidLock(CatalogError):
    """Locks need a bucket with object lock; ``str()`` says what is missing."""


class WrongOffset(CatalogError):
    """An append does not begin where the object ends. ``str()`` is the object's length."""


class CannotAppend(CatalogError):
    """``str()`` says why nothing can be appended to this object."""


class TooManyAppends(CatalogError):
    """The object has as many pieces as it may have."""


class BucketState(CatalogError):
    """The change does not fit the bucket's versioning or object lock; ``str()`` says why."""


class NoSuchUpload(CatalogError):
    pass


class InvalidPart(CatalogError):
    pass


class InvalidPartOrder(CatalogError):
    pass


class EntityTooSmall(CatalogError):
    """A part other than the last is below the 5 MiB minimum."""


class PreconditionFailed(CatalogError):
    """``condition`` names the header that did not hold."""

    def __init__(self, condition: str) -> None:
        super().__init__(condition)
        self.condition = condition


class StaleVersion(CatalogError):
    """The version an internal mutation names was deleted or replaced meanwhile: the mutation changed nothing."""


class MirrorMissing(CatalogError):
    """A commit promises a second copy and no other node holds one."""


class LeaseLost(CatalogError):
    """The lease under which this was done ran out and somebody else has the job now: nothing was changed."""


class MembersGone(StaleVersion):
    """A partial was not stored: some of its members are no longer owed it. ``str()`` is their object ids, in hex."""


class StaleEpoch(CatalogError):
    """This process's slot was taken over by a newer process."""


class NodeAway(IngestError):
    """Another node did not answer, or not as it should. ``str()`` names it and says what happened, fit for a client."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"node {node}: {reason}")
        self.node = node
        self.reason = reason


class MirrorUnavailable(IngestError):
    """The bucket wants a second copy on another node, and none can take it. ``str()`` says why, fit for a client."""


class NoSuchNode(CatalogError):
    """The cluster has no node of this number."""


class NodeNeeded(CatalogError):
    """A node cannot leave the cluster as it is; ``str()`` says why and what to do."""
