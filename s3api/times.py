"""The two ways S3 writes a time, and the one way clients write one in a condition."""

from __future__ import annotations

import calendar
import datetime
import functools
import time
from email.utils import parsedate_tz

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def http_date(time_ns: int) -> str:
    """``Sun, 06 Nov 1994 08:49:37 GMT`` (RFC 9110 section 5.6.7), whatever the locale."""
    return _http_date(time_ns // 1_000_000_000)


@functools.lru_cache(maxsize=1024)
def _http_date(time_s: int) -> str:
    at = time.gmtime(time_s)
    return (
        f"{_DAYS[at.tm_wday]}, {at.tm_mday:02d} {_MONTHS[at.tm_mon - 1]} {at.tm_year:04d}"
        f" {at.tm_hour:02d}:{at.tm_min:02d}:{at.tm_sec:02d} GMT"
    )


def iso(time_ns: int) -> str:
    """``1994-11-06T08:49:37.000Z``, as in S3's documents."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1_000_000:03d}Z"


def parse_http_date(text: str) -> int | None:
    """Seconds since the epoch; None for anything that is no date, which makes a condition void (RFC 9110 13.1.3)."""
    parsed = parsedate_tz(text)
    if parsed is None:
        return None
    try:
        return calendar.timegm((*parsed[:6], 0, 0, 0)) - (parsed[9] or 0)
    except (ValueError, OverflowError):
        return None


def parse_iso_s(text: str) -> float | None:
    """Seconds since the epoch of an ISO 8601 date and time, UTC where it names no zone; None for anything else."""
    try:
        parsed = datetime.datetime.fromisoformat(text.strip())
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
