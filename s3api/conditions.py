"""Conditional requests: RFC 9110 section 13, and what S3 makes of it for copies and writes. Pure.

In: the condition headers and what is stored. Out: ``None`` (go on), ``NOT_MODIFIED``, or an S3Error PreconditionFailed.
"""

from __future__ import annotations

import dataclasses

from ingest.records import ObjectRecord
from s3api import times
from s3api.errors import S3Error
from s3api.http.message import Headers


@dataclasses.dataclass(frozen=True, slots=True)
class NotModified:
    """The answer is 304 (412 for a copy)."""

    condition: str


def _matches(field: str, etag: str) -> bool:
    """Does an If-Match / If-None-Match list contain the ETag? S3 compares without regard to quotes and weakness."""
    for candidate in field.split(","):
        bare = candidate.strip()
        if bare == "*" or bare.removeprefix("W/").strip('"') == etag:
            return True
    return False


def check_read(headers: Headers, record: ObjectRecord, *, prefix: str = "") -> NotModified | None:
    """Evaluate in the order of RFC 9110 section 13.2.2. ``prefix`` is ``x-amz-copy-source-`` for a copy's source.

    Raises PreconditionFailed.
    """
    modified_s = record.modified_ns // 1_000_000_000
    if match := headers.get(prefix + "if-match"):
        if not _matches(match, record.etag):
            raise failed("If-Match")
    elif since := headers.get(prefix + "if-unmodified-since"):
        limit_s = times.parse_http_date(since)
        if limit_s is not None and modified_s > limit_s:
            raise failed("If-Unmodified-Since")
    if none_match := headers.get(prefix + "if-none-match"):
        if _matches(none_match, record.etag):
            return NotModified("If-None-Match")
    elif since := headers.get(prefix + "if-modified-since"):
        limit_s = times.parse_http_date(since)
        if limit_s is not None and modified_s <= limit_s:
            return NotModified("If-Modified-Since")
    return None


def range_applies(headers: Headers, record: ObjectRecord) -> bool:
    """If-Range (RFC 9110 section 13.1.5): is the representation still the one the client holds a part of?"""
    condition = headers.get("if-range").strip()
    if not condition:
        return True
    if condition.startswith('"'):
        return condition.strip('"') == record.etag
    return times.parse_http_date(condition) == record.modified_ns // 1_000_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class WriteCondition:
    """What a write demands of the current version; empty strings demand nothing. Decided at commit; checked before the
    body too, so that a write that is bound to fail is refused before it is sent."""

    if_none_match: str = ""
    if_match: str = ""

    def __bool__(self) -> bool:
        return bool(self.if_none_match or self.if_match)

    def check(self, current: ObjectRecord | None) -> None:
        """Raises PreconditionFailed, or NoSuchKey for If-Match on a key that is not there (as AWS does)."""
        if self.if_none_match and current is not None and _matches(self.if_none_match, current.etag):
            raise failed("If-None-Match")
        if self.if_match:
            if current is None:
                raise S3Error("NoSuchKey")
            if not _matches(self.if_match, current.etag):
                raise failed("If-Match")


def write_condition(headers: Headers) -> WriteCondition:
    """The conditions of a PUT, Complete or Delete; values without quotes, as records hold ETags."""
    none_match = headers.get("if-none-match").strip()
    match = headers.get("if-match").strip()
    if none_match and none_match != "*":
        raise S3Error("NotImplemented", "If-None-Match on a write takes * only")
    if none_match and match:
        raise S3Error("InvalidRequest", "If-Match and If-None-Match exclude each other on a write")
    if "," in match:
        raise S3Error("NotImplemented", "If-Match on a write takes one ETag")
    return WriteCondition(none_match, match.removeprefix("W/").strip('"'))


def failed(condition: str) -> S3Error:
    return S3Error("PreconditionFailed", fields=[("Condition", condition)])
