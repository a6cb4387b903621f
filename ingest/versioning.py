"""Versioning and object lock of a bucket: what their documents mean. Pure.

In: a bucket's documents ``versioning`` (``Enabled`` or ``Suspended``) and ``object-lock`` (JSON of ``LockConfiguration``; that
it is there at all says that versions can be locked). Out: values to decide by. Always holds: object lock needs versioning
enabled, and is never taken back, because a promise not to delete must outlive whoever made it.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/Versioning.html and object-lock.html beside it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping

import msgspec

from ingest import bucket_documents
from ingest.errors import BucketState
from ingest.records import PRODUCTS_PREFIX, BucketRecord, LockMode, Retention, Versioning

DAYS_MAX = 36500
YEARS_MAX = 100
_DAY_NS = 86_400_000_000_000


class DefaultRetention(msgspec.Struct, frozen=True):
    """The retention of versions whose writer asks for none. One of ``days`` and ``years`` is 0."""

    mode: LockMode
    days: int = 0
    years: int = 0

    def from_ns(self, now_ns: int) -> Retention:
        if self.days:
            return Retention(self.mode, now_ns + self.days * _DAY_NS)
        start = datetime.datetime.fromtimestamp(now_ns // 1_000_000_000, datetime.UTC)
        try:
            end = start.replace(year=start.year + self.years)
        except ValueError:  # 29 February
            end = start.replace(year=start.year + self.years, month=3, day=1)
        return Retention(self.mode, int(end.timestamp()) * 1_000_000_000 + now_ns % 1_000_000_000)


class LockConfiguration(msgspec.Struct, frozen=True):
    default: DefaultRetention | None = None


def _parse_versioning(document: bytes) -> Versioning:
    try:
        return Versioning(document.decode("ascii"))
    except UnicodeDecodeError:
        raise ValueError("Enabled or Suspended") from None


def _parse_lock(document: bytes) -> LockConfiguration:
    try:
        found = msgspec.json.decode(document, type=LockConfiguration)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    default = found.default
    if default is not None and not (
        (0 < default.days <= DAYS_MAX and not default.years) or (0 < default.years <= YEARS_MAX and not default.days)
    ):
        raise ValueError(f"a default retention is 1 to {DAYS_MAX} days, or 1 to {YEARS_MAX} years")
    return found


_VERSIONING = bucket_documents.Form("versioning", _parse_versioning)
_LOCK = bucket_documents.Form("object-lock", _parse_lock)
bucket_documents.FORMS.update({form.name: form for form in (_VERSIONING, _LOCK)})


def versioning_of(bucket: BucketRecord) -> Versioning:
    return _VERSIONING.of(bucket) or Versioning.OFF


def versioning_of_key(bucket: BucketRecord, key: bytes) -> Versioning:
    """Products can be made again from what is versioned, and some are rewritten with every new member of a run: they have
    the version ``null`` only."""
    return Versioning.OFF if key.startswith(PRODUCTS_PREFIX) else versioning_of(bucket)


def lock_of(bucket: BucketRecord) -> LockConfiguration | None:
    """None: nothing in this bucket can be locked."""
    return _LOCK.of(bucket)


def with_lock() -> dict[str, bytes]:
    """Documents of a new bucket whose versions can be locked."""
    return {"versioning": Versioning.ENABLED.encode(), "object-lock": lock_document(LockConfiguration())}


def lock_document(configuration: LockConfiguration) -> bytes:
    return msgspec.json.encode(configuration)


def check(documents: Mapping[str, bytes], edit: Mapping[str, bytes | None]) -> None:
    """Whether an edit of a bucket's documents may be. Raises BucketState."""
    if not edit.keys() & {"versioning", "object-lock"}:
        return
    after = bucket_documents.changed(documents, edit)
    if "object-lock" in documents and "object-lock" not in after:
        raise BucketState("object lock cannot be taken from a bucket")
    if "versioning" in documents and "versioning" not in after:
        raise BucketState("versioning can be suspended, not taken from a bucket")
    if "object-lock" in after and after.get("versioning") != Versioning.ENABLED.encode():
        raise BucketState("object lock needs versioning to be Enabled")
