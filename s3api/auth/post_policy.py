"""The policy of a browser's form: what its signer allows the form to upload. Pure.

In: the base64 policy, the form's fields, the time. Out: the bounds of the file's length, or an S3Error. Every field must be
spoken of by a condition, and the bucket too, apart from the signature's own and ``x-ignore-…``.
https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-HTTPPOSTConstructPolicy.html
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping

from s3api import times
from s3api.errors import S3Error

POLICY_CHARS_MAX = 20 * 1024
_FREE = frozenset(
    {
        "awsaccesskeyid",
        "signature",
        "policy",
        "x-amz-signature",
        "file",
        "filename",
        "file-content-type",
        "x-amz-security-token",
    }
)
LENGTH_MAX = 1 << 63
_ESCAPED_DOLLAR = re.compile(r"(?<!\\)((?:\\\\)*)\\\$")
"""AWS's own escape, which JSON does not know; an even number of backslashes before it are those of others."""


def check(encoded: str, fields: Mapping[str, str], now_s: float) -> tuple[int, int]:
    """(least, most) bytes of the file. ``fields`` have lower-case names, with ``bucket`` and the key as it will be.

    Raises InvalidPolicyDocument, AccessDenied."""
    document = _document(encoded)
    _check_expiration(document, now_s)
    conditions = document.get("conditions")
    if not isinstance(conditions, list) or not conditions:
        raise _invalid("Invalid Policy: Invalid 'conditions' value: must be a List.")
    least, most = 0, LENGTH_MAX
    named = set[str]()
    for condition in conditions:
        if isinstance(condition, dict):
            if len(condition) != 1 or not all(isinstance(value, str) for value in condition.values()):
                raise _invalid(
                    "Invalid Policy: Invalid Simple-Condition: Simple-Conditions must have exactly one property"
                )
            ((name, value),) = condition.items()
            named.add(name.lower())
            _hold(fields, "eq", name, value, condition)
            continue
        kind, first, second = _triple(condition)
        if kind == "content-length-range":
            low, high = _number(first), _number(second)
            least, most = max(least, low), min(most, high)
            continue
        if kind not in ("eq", "starts-with") or not isinstance(first, str) or not isinstance(second, str):
            raise _invalid("Invalid Policy: Invalid Condition")
        if not first.startswith("$"):
            raise _invalid("Invalid Policy: a condition's field begins with $")
        named.add(first[1:].lower())
        _hold(fields, kind, first[1:], second, condition)
    extra = [name for name in fields if name not in named and name not in _FREE and not name.startswith("x-ignore-")]
    if extra:
        raise S3Error(
            "AccessDenied", f"Invalid according to Policy: Extra input fields: {', '.join(sorted(extra))[:256]}"
        )
    return least, most


def _document(encoded: str) -> dict[str, object]:
    if len(encoded) > POLICY_CHARS_MAX:
        raise _invalid("Invalid Policy: too long")
    try:
        text = base64.b64decode(encoded.encode("latin-1"), validate=True).decode("utf-8")
        document = json.loads(_ESCAPED_DOLLAR.sub(r"\1$", text))
    except (binascii.Error, ValueError, RecursionError):
        raise _invalid("Invalid Policy: Invalid JSON.") from None
    if not isinstance(document, dict):
        raise _invalid("Invalid Policy: Invalid JSON.")
    return document


def _check_expiration(document: dict[str, object], now_s: float) -> None:
    text = document.get("expiration")
    expires_s = times.parse_iso_s(text) if isinstance(text, str) and text.endswith("Z") else None
    if expires_s is None:
        raise _invalid("Invalid Policy: Invalid 'expiration' value")
    if now_s > expires_s:
        raise S3Error("AccessDenied", "Invalid according to Policy: Policy expired.")


def _triple(condition: object) -> tuple[str, object, object]:
    if not isinstance(condition, list) or len(condition) != 3 or not isinstance(condition[0], str):
        raise _invalid("Invalid Policy: Invalid Condition")
    return condition[0].lower(), condition[1], condition[2]


def _number(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LENGTH_MAX:
        return value
    raise _invalid("Invalid Policy: content-length-range takes two whole numbers")


def _hold(fields: Mapping[str, str], kind: str, name: str, wanted: str, condition: object) -> None:
    found = fields.get(name.lower())
    if found is None and not (kind == "starts-with" and not wanted):
        holds = False
    else:
        holds = (found or "") == wanted if kind == "eq" else (found or "").startswith(wanted)
    if not holds:
        shown = json.dumps(condition)[:256]
        raise S3Error("AccessDenied", f"Invalid according to Policy: Policy Condition failed: {shown}")


def _invalid(message: str) -> S3Error:
    return S3Error("InvalidPolicyDocument", message)
