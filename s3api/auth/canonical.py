"""The canonical form of a request that SigV4 signs. Pure: strings in, string out.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html. The URI is taken verbatim from the wire:
S3 signs the path exactly as sent, without normalising ``//`` or ``..`` and without encoding it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote_from_bytes, unquote_to_bytes

from s3api.http.message import Headers

_UNRESERVED = "-_.~"


def canonical_query(raw: str, *, without: str = "") -> str:
    """Query string in canonical form: every name and value percent-encoded, sorted; ``without`` names a parameter to
    leave out (``X-Amz-Signature`` of a presigned URL, which cannot sign itself)."""
    if not raw:
        return ""
    pairs = []
    for piece in raw.split("&"):
        if not piece:
            continue
        name, _, value = piece.partition("=")
        name = _encoded(name)
        if name != without:
            pairs.append((name, _encoded(value)))
    pairs.sort()
    return "&".join([f"{name}={value}" for name, value in pairs])


def _encoded(piece: str) -> str:
    # Most names and values need no encoding at all; a plus sign is a literal one here, as in every SDK.
    if piece.isalnum() and piece.isascii():
        return piece
    return quote_from_bytes(unquote_to_bytes(piece.encode("latin-1")), safe=_UNRESERVED)


def canonical_headers(headers: Headers, signed: Iterable[str]) -> str:
    """The signed headers, one ``name:value`` line each; values trimmed, runs of blanks collapsed. A signed header the
    request lacks counts as empty, which no client signs: the signature then simply does not match."""
    lines = []
    for name in signed:
        value = headers.get(name).strip()
        if "  " in value:
            value = " ".join(part for part in value.split(" ") if part)
        lines.append(f"{name}:{value}\n")
    return "".join(lines)


def canonical_request(
    method: str, raw_path: str, query: str, headers: Headers, signed: tuple[str, ...], payload_hash: str
) -> str:
    """``query`` is already canonical, ``signed`` lower-case and sorted."""
    return "\n".join((method, raw_path, query, canonical_headers(headers, signed), ";".join(signed), payload_hash))
