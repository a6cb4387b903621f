"""Byte ranges of a GET (RFC 9110 section 14.2). Pure."""

from __future__ import annotations

from s3api.errors import S3Error

_DIGITS_MAX = 18


def parse_range(field: str, length: int) -> tuple[int, int] | None:
    """``Range`` field of a body of ``length`` bytes -> [start, stop).

    None when there is no usable single byte range: the field is then ignored, as S3 does with malformed and with
    multiple ranges. Raises InvalidRange when no byte of it exists.
    """
    unit, equals, spec = field.partition("=")
    if unit.strip().lower() != "bytes" or not equals or "," in spec:
        return None
    first, dash, last = spec.strip().partition("-")
    if not dash or not all(_number(text) or not text for text in (first, last)):
        return None
    if first:
        start = int(first)
        if last and int(last) < start:
            return None
        stop = min(int(last) + 1, length) if last else length
    elif last:
        start, stop = max(0, length - int(last)), length
    else:
        return None
    if start >= stop:
        raise S3Error(
            "InvalidRange",
            fields=[("RangeRequested", field), ("ActualObjectSize", str(length))],
            headers=[("content-range", f"bytes */{length}")],
        )
    return start, stop


def parse_copy_range(field: str, length: int) -> tuple[int, int]:
    """``x-amz-copy-source-range``: exactly ``bytes=first-last``, inside the source."""
    unit, _, spec = field.partition("=")
    first, _, last = spec.partition("-")
    if unit != "bytes" or not _number(first) or not _number(last) or int(last) < int(first):
        raise S3Error("InvalidArgument", "x-amz-copy-source-range must be bytes=first-last")
    if int(last) >= length:
        # Not InvalidRange, which only GET answers.
        raise S3Error(
            "InvalidArgument",
            f"x-amz-copy-source-range ends after the source, which has {length} bytes",
            fields=[("ArgumentName", "x-amz-copy-source-range"), ("ArgumentValue", field)],
        )
    return int(first), int(last) + 1


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX
