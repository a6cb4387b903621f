"""Bytes behind an object's: what the new version is, or why it cannot be. Pure.

In: the request, whose digests of the whole the asker combined from the version it names; that version, if it is still the
current one. Out: the new record, with the extents of the new bytes only. Always holds: of several who append at the same place
one succeeds, and the others learn how long the object is now.
"""

from __future__ import annotations

import msgspec

from ingest import versioning
from ingest.errors import CannotAppend, StaleVersion, TooManyAppends, WrongOffset
from ingest.records import BucketRecord, CommitObject, ObjectRecord, ObjectState, Versioning
from ingest.states import Event, transition

PIECES_MAX = 10_000
"""Extents of an object that is appended to; AWS allows as many parts."""


def appended(
    request: CommitObject, bucket: BucketRecord, old: ObjectRecord | None, sequence: int, now_ns: int
) -> ObjectRecord:
    """Raises CannotAppend, WrongOffset, TooManyAppends, StaleVersion."""
    if versioning.versioning_of_key(bucket, request.key) is not Versioning.OFF:
        raise CannotAppend("the bucket keeps versions of its objects; what is appended to would be a new one each time")
    if old is None:
        raise WrongOffset("0")
    if old.length != request.append_at:
        raise WrongOffset(str(old.length))
    if old.object_id != request.source or not old.settled or (old.length and not old.extents):
        raise StaleVersion("the object was replaced, or its bytes are not all on disk here")
    if len(old.extents) + len(request.extents) > PIECES_MAX:
        raise TooManyAppends(f"an object has at most {PIECES_MAX} pieces; copy it to make it one again")
    return msgspec.structs.replace(
        old,
        object_id=request.object_id,
        sequence=sequence,
        state=transition(ObjectState.RECEIVING, Event.COMMIT),
        length=request.length,
        stored_length=old.stored_length + sum(extent.length for extent in request.extents),
        etag=request.etag,
        crc64nvme=request.crc64nvme,
        modified_ns=now_ns,
        durability=request.durability,
        settled=True,
        checksums=request.checksums,
        checksum_type=request.checksum_type,
        extents=request.extents,
        parts=(),
        ledger=None,
        geometry=None,
        archive=None,
        drain_attempts=0,
        drain_error="",
        epochs=(),
        raw=None,
        appends=old.appends + 1,
        mirror=(),
    )
