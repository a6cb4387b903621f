"""Object lock: a bucket's configuration, a version's retention and legal hold, and the headers that set them on a write.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-lock.html. What a lock forbids is decided by the catalogue at commit
(ingest/catalog/versions.py); here wishes are read, refused in S3's words, and shown.
"""

from __future__ import annotations

import dataclasses
import datetime

from ingest import versioning
from ingest.errors import DeleteMarker
from ingest.records import BucketRecord, LockMode, ObjectRecord, Retention, Versioning
from ingest.versioning import DAYS_MAX, YEARS_MAX, DefaultRetention, LockConfiguration
from s3api import times, xml
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import needs_checksum, read_document
from s3api.operations.buckets import XML_TYPE
from s3api.operations.reading import marker_refusal, wanted_version

MODE = "x-amz-object-lock-mode"
UNTIL = "x-amz-object-lock-retain-until-date"
HOLD = "x-amz-object-lock-legal-hold"
BYPASS = "x-amz-bypass-governance-retention"
_NO_LOCK = "Bucket is missing Object Lock Configuration"


@dataclasses.dataclass(frozen=True, slots=True)
class Lock:
    """What a write asks for; None and False: nothing."""

    retention: Retention | None = None
    legal_hold: bool = False


# -- a bucket


async def put_object_lock_configuration(call: Call) -> Response:
    bucket, _ = await call.bucket()
    needs_checksum(call.request)
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    tree = xml.parse(body, "ObjectLockConfiguration")
    if xml.text(tree, "ObjectLockEnabled", "") != "Enabled":
        raise xml.BadXml("<ObjectLockEnabled> is Enabled")
    if versioning.versioning_of(bucket) is not Versioning.ENABLED:
        raise S3Error(
            "InvalidBucketState", "Versioning must be 'Enabled' on the bucket to apply a Object Lock configuration"
        )
    default = None
    rule = tree.find("Rule")
    if rule is not None:
        found = rule.find("DefaultRetention")
        if found is None:
            raise xml.BadXml("a <Rule> has a <DefaultRetention>")
        default = _default(xml.text(found, "Mode"), xml.text(found, "Days", ""), xml.text(found, "Years", ""))
    document = versioning.lock_document(LockConfiguration(default))
    await call.catalog.configure_bucket(call.bucket_name, {"object-lock": document})
    return Response(200)


def _default(mode: str, days: str, years: str) -> DefaultRetention:
    if bool(days) == bool(years):
        raise xml.BadXml("a default retention has either <Days> or <Years>")
    most = DAYS_MAX if days else YEARS_MAX
    text = days or years
    count = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else 0
    if not 0 < count <= most:
        raise S3Error("InvalidRetentionPeriod", f"Default retention period must be from 1 to {most}")
    return DefaultRetention(_mode(mode), count if days else 0, 0 if days else count)


async def get_object_lock_configuration(call: Call) -> Response:
    bucket, _ = await call.bucket()
    lock = versioning.lock_of(bucket)
    if lock is None:
        raise S3Error("ObjectLockConfigurationNotFoundError")
    document: list[tuple[str, xml.Value]] = [("ObjectLockEnabled", "Enabled")]
    if lock.default is not None:
        period = ("Days", lock.default.days) if lock.default.days else ("Years", lock.default.years)
        document.append(("Rule", [("DefaultRetention", [("Mode", lock.default.mode.value), period])]))
    return Response(200, [XML_TYPE], xml.document("ObjectLockConfiguration", document))


# -- a version


async def put_object_retention(call: Call) -> Response:
    bucket, _ = await call.bucket()
    needs_checksum(call.request)
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    tree = xml.parse(body, "Retention")
    _needs_lock(bucket)
    mode, until = xml.text(tree, "Mode", ""), xml.text(tree, "RetainUntilDate", "")
    retention = None
    if mode or until:
        retention = Retention(_mode(mode), _until(until, malformed=True))
        _check_future(call, retention)
    bypass = await may_bypass(call, call.key)
    try:
        await call.catalog.set_retention(call.bucket_name, call.key, wanted_version(call), retention, bypass=bypass)
    except DeleteMarker:
        raise marker_refusal(call.request.method) from None
    return Response(200)


async def get_object_retention(call: Call) -> Response:
    record = await _version(call)
    if record.retention is None:
        raise S3Error("NoSuchObjectLockConfiguration")
    document = [("Mode", record.retention.mode.value), ("RetainUntilDate", times.iso(record.retention.until_ns))]
    return Response(200, [XML_TYPE], xml.document("Retention", document))


async def put_object_legal_hold(call: Call) -> Response:
    bucket, _ = await call.bucket()
    needs_checksum(call.request)
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    status = xml.text(xml.parse(body, "LegalHold"), "Status", "")
    _needs_lock(bucket)
    if status not in ("ON", "OFF"):
        raise xml.BadXml("<Status> is ON or OFF")
    try:
        await call.catalog.set_legal_hold(call.bucket_name, call.key, wanted_version(call), status == "ON")
    except DeleteMarker:
        raise marker_refusal(call.request.method) from None
    return Response(200)


async def get_object_legal_hold(call: Call) -> Response:
    record = await _version(call)
    document = [("Status", "ON" if record.legal_hold else "OFF")]
    return Response(200, [XML_TYPE], xml.document("LegalHold", document))


async def _version(call: Call) -> ObjectRecord:
    bucket, _ = await call.bucket()
    _needs_lock(bucket)
    record = await call.catalog.head(call.bucket_name, call.key, wanted_version(call))
    if record.delete_marker:
        raise marker_refusal(call.request.method, record)
    return record


def _needs_lock(bucket: BucketRecord) -> None:
    if versioning.lock_of(bucket) is None:
        raise S3Error("InvalidRequest", _NO_LOCK)


async def may_bypass(call: Call, key: bytes) -> bool:
    """Whether the request asks to end a GOVERNANCE retention; AccessDenied when the user may not."""
    if call.request.headers.get(BYPASS).lower() != "true":
        return False
    await call.authorise("s3:BypassGovernanceRetention", call.bucket_name, key)
    return True


# -- headers


async def lock_of_write(call: Call, bucket: BucketRecord) -> Lock:
    """What the headers of a PUT, Copy or CreateMultipartUpload ask for. Raises InvalidArgument, InvalidRequest."""
    headers = call.request.headers
    mode, until, hold = headers.get(MODE), headers.get(UNTIL), headers.get(HOLD)
    if not mode and not until and not hold:
        return Lock()
    if bool(mode) != bool(until):
        raise S3Error("InvalidArgument", f"{UNTIL} and {MODE} must both be supplied")
    if hold not in ("", "ON", "OFF"):
        raise S3Error("InvalidArgument", "Legal Hold must be either of 'ON' or 'OFF'")
    retention = None
    if mode:
        if mode not in LockMode.__members__:
            raise S3Error("InvalidArgument", "Unknown wormMode directive.")
        retention = Retention(LockMode(mode), _until(until))
        _check_future(call, retention)
        await call.authorise("s3:PutObjectRetention", call.bucket_name, call.key)
    if hold:
        await call.authorise("s3:PutObjectLegalHold", call.bucket_name, call.key)
    if retention is not None or hold == "ON":
        _needs_lock(bucket)
    return Lock(retention, hold == "ON")


def lock_headers(record: ObjectRecord) -> list[tuple[str, str]]:
    """Of a GET or HEAD."""
    headers = []
    if record.retention is not None:
        headers.append((MODE, record.retention.mode.value))
        headers.append((UNTIL, times.iso(record.retention.until_ns)))
    if record.legal_hold:
        headers.append((HOLD, "ON"))
    return headers


def _mode(text: str) -> LockMode:
    if text not in LockMode.__members__:
        raise xml.BadXml("<Mode> is GOVERNANCE or COMPLIANCE")
    return LockMode(text)


def _until(text: str, *, malformed: bool = False) -> int:
    """An ISO 8601 time with its offset from UTC, in nanoseconds."""
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        if malformed:
            raise xml.BadXml("<RetainUntilDate> is a time in ISO 8601, with its offset from UTC")
        raise S3Error("InvalidArgument", "The retain until date must be provided in ISO 8601 format")
    try:
        until_ns = int(at.timestamp() * 1000) * 1_000_000
        if until_ns >= 1 << 63:  # in April 2262: records hold no later time
            raise ValueError
        return until_ns
    except (OverflowError, ValueError):
        raise S3Error("InvalidArgument", "The retain until date is out of range") from None


def _check_future(call: Call, retention: Retention) -> None:
    if retention.until_ns <= call.catalog.now_ns():
        raise S3Error("InvalidArgument", "The retain until date must be in the future!")
