"""Storage classes: which there are, and which of them have to be restored before they can be read. Pure.

The buffer keeps no data in tiers: a class is a wish. Those of ``ARCHIVE_ONLY`` mean "only in the archive": the buffered copy goes
as soon as the archive has confirmed its own, and nobody reads the version until RestoreObject has brought it back for a number of
days. The others are kept with the version and told again; what is evicted of them is recalled as its bucket says.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-class-intro.html
"""

from __future__ import annotations

from ingest.records import ObjectRecord, ObjectState

STANDARD = "STANDARD"
CLASSES = (
    STANDARD,
    "REDUCED_REDUNDANCY",
    "STANDARD_IA",
    "ONEZONE_IA",
    "INTELLIGENT_TIERING",
    "GLACIER_IR",
    "GLACIER",
    "DEEP_ARCHIVE",
)
"""From warm to cold: a lifecycle rule moves a version only to the right."""
ARCHIVE_ONLY = frozenset({"GLACIER", "DEEP_ARCHIVE"})
GONE = 1
"""``evict_ns`` of a version whose buffered copy should not be there at all."""


def restored(record: ObjectRecord, now_ns: int) -> bool:
    return record.attributes.restored_until_ns > now_ns


def needs_restore(record: ObjectRecord, now_ns: int) -> bool:
    """Whether a version must be restored before it can be read."""
    return record.attributes.storage_class in ARCHIVE_ONLY and not restored(record, now_ns)


def restoring(record: ObjectRecord) -> bool:
    """A restore was asked for and has not ended."""
    return record.attributes.restore_days > 0 and record.state is ObjectState.RECALLING


def days_from(now_ns: int, days: int, day_s: int) -> int:
    """``days`` later, rounded up to the next midnight UTC, as S3 counts the days of restores and lifecycle rules.

    ``day_s``: seconds of a day; shorter ones are for tests.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/intro-lifecycle-rules.html#intro-lifecycle-rules-number-of-days
    """
    day_ns = day_s * 1_000_000_000
    return -(-(now_ns + days * day_ns) // day_ns) * day_ns
