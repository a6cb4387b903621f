"""Conditional and range requests on a stored object (RFC 9110 sections 13 and 14). Pure: fields in, a decision out.

Validators: the strong ETag of a version, and its modification time in whole seconds. The time is no strong validator
(two versions can share a second), so it never satisfies If-Range. Several ranges are answered with the whole object,
as section 14.2 allows; a range that is not well formed is ignored.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import re

from s3api.http.message import Headers

_TAG = re.compile(r'(W/)?"([^"]*)"')
_RANGE = re.compile(r"\s*bytes\s*=\s*([0-9]{0,19})\s*-\s*([0-9]{0,19})\s*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """Send everything (200)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Send bytes [start, stop) (206)."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """Send nothing of it: 304, 412 or 416."""

    status: int


Decision = Whole | Part | Refused


def decide(method: str, headers: Headers, *, etag: str, modified_s: int, length: int) -> Decision:
    """What to send of an object with this ETag (unquoted), modification time and length in bytes, to GET or HEAD."""
    if status := _precondition(headers, etag, modified_s):
        return Refused(status)
    if method != "GET" or "range" not in headers or not _if_range_holds(headers, etag):
        return Whole()
    return _range(headers["range"], length)


def etag_matches(field: str, etag: str, *, strong: bool) -> bool:
    """Whether an If-Match (strong) or If-None-Match (weak) list names ``etag``; ``*`` names any."""
    if field.strip() == "*":
        return True
    return any(tag == etag and not (strong and weak) for weak, tag in _TAG.findall(field))


def _precondition(headers: Headers, etag: str, modified_s: int) -> int:
    """Status that ends the request, or 0: the order of RFC 9110 section 13.2.2."""
    if "if-match" in headers:
        if not etag_matches(headers["if-match"], etag, strong=True):
            return 412
    elif (since := _date(headers.get("if-unmodified-since"))) is not None and modified_s > since:
        return 412
    if "if-none-match" in headers:
        if etag_matches(headers["if-none-match"], etag, strong=False):
            return 304
    elif (since := _date(headers.get("if-modified-since"))) is not None and modified_s <= since:
        return 304
    return 0


def _if_range_holds(headers: Headers, etag: str) -> bool:
    return "if-range" not in headers or headers["if-range"].strip() == f'"{etag}"'


def _range(field: str, length: int) -> Decision:
    match = _RANGE.fullmatch(field)
    if match is None or not (match[1] or match[2]):
        return Whole()
    if not match[1]:
        suffix = min(int(match[2]), length)
        return Part(length - suffix, length) if suffix else Refused(416)
    start = int(match[1])
    last = int(match[2]) if match[2] else length - 1
    if match[2] and last < start:
        return Whole()
    return Part(start, min(last + 1, length)) if start < length else Refused(416)


def _date(field: str) -> float | None:
    """Seconds since the epoch of an HTTP-date; None when absent or not a date (the condition is then ignored)."""
    try:
        when = email.utils.parsedate_to_datetime(field)
    except ValueError:
        return None
    return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()
