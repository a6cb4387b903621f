"""ListObjectsV2 and its predecessor ListObjects: a keyset scan in bytewise key order.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from urllib.parse import quote_from_bytes

from ingest.bucket_settings import BucketSettings
from ingest.records import ListedObject, ObjectRecord
from s3api import times, xml
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Headers, Response
from s3api.operations.buckets import XML_TYPE
from s3api.operations.describe import restore_status, storage_class
from s3api.operations.ownership import Owners, owners_of

_TOKEN_VERSION = b"1"


async def list_objects_v2(call: Call) -> Response:
    request = call.request
    token = request.arg("continuation-token")
    start_after = request.arg("start-after") or ""
    after = decode_token(token) if token is not None else start_after.encode()
    fetch_owner = (request.arg("fetch-owner") or "").lower() == "true"
    page = await _page(call, after, with_owner=fetch_owner)
    document: list[tuple[str, xml.Value]] = [
        ("Name", call.bucket_name),
        ("Prefix", page.name(page.prefix)),
        ("Delimiter", page.name(page.delimiter) if page.delimiter else None),
        ("MaxKeys", page.limit),
        ("KeyCount", len(page.rows)),
        ("EncodingType", "url" if page.encoded else None),
        ("IsTruncated", page.truncated),
        ("ContinuationToken", token),
        ("NextContinuationToken", encode_token(page.rows[-1].key) if page.truncated else None),
        ("StartAfter", page.name(start_after.encode()) if start_after else None),
        *page.entries(),
    ]
    return Response(200, [XML_TYPE], xml.document("ListBucketResult", document))


async def list_objects(call: Call) -> Response:
    marker = (call.request.arg("marker") or "").encode()
    page = await _page(call, marker, with_owner=True)
    document: list[tuple[str, xml.Value]] = [
        ("Name", call.bucket_name),
        ("Prefix", page.name(page.prefix)),
        ("Marker", page.name(marker)),
        ("MaxKeys", page.limit),
        ("Delimiter", page.name(page.delimiter) if page.delimiter else None),
        ("EncodingType", "url" if page.encoded else None),
        ("IsTruncated", page.truncated),
        ("NextMarker", page.name(page.rows[-1].key) if page.truncated and page.delimiter else None),
        *page.entries(),
    ]
    return Response(200, [XML_TYPE], xml.document("ListBucketResult", document))


class Page:
    """One page of a listing, and how to write it."""

    def __init__(self, call: Call, settings: BucketSettings) -> None:
        encoding = call.request.arg("encoding-type")
        if encoding not in (None, "", "url"):
            raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request; url is the only one")
        self.encoded = encoding == "url"
        self.name = namer(self.encoded)
        self.prefix = (call.request.arg("prefix") or "").encode()
        self.delimiter = (call.request.arg("delimiter") or "").encode()
        self.limit = call.number("max-keys", 0, call.limits.keys_per_page, call.limits.keys_per_page)
        self.rows: Sequence[ListedObject] = ()
        self.truncated = False
        self._settings = settings
        self._now_ns = call.catalog.now_ns()
        self._with_restore = _wants_restore_status(call.request.headers)
        self.owners: Owners | None = None
        """How Owner is written, where it is."""

    async def name_owners(self, call: Call) -> None:
        """Entries are written with their Owner."""
        self.owners = await owners_of(call, [row.record for row in self.rows if row.record is not None])

    def entries(self) -> list[tuple[str, xml.Value]]:
        contents: list[tuple[str, xml.Value]] = []
        prefixes: list[tuple[str, xml.Value]] = []
        for row in self.rows:
            if row.record is None:
                prefixes.append(("CommonPrefixes", [("Prefix", self.name(row.key))]))
            else:
                contents.append(("Contents", self.entry(row.key, row.record)))
        return contents + prefixes

    def entry(self, key: bytes, record: ObjectRecord) -> list[tuple[str, xml.Value]]:
        entry: list[tuple[str, xml.Value]] = [
            ("Key", self.name(key)),
            ("LastModified", times.iso(record.modified_ns)),
            ("ETag", f'"{record.etag}"'),
            ("Size", record.length),
        ]
        if record.checksums:
            entry += [("ChecksumAlgorithm", name.upper()) for name in record.checksums]
            entry.append(("ChecksumType", record.checksum_type))
        if self.owners is not None:
            entry.append(("Owner", self.owners(record)))
        entry.append(("StorageClass", storage_class(record, self._settings, self._now_ns)))
        if self._with_restore:
            entry.append(("RestoreStatus", restore_status(record, self._now_ns)))
        return entry


def _wants_restore_status(headers: Headers) -> bool:
    names = {name.strip() for name in headers.get("x-amz-optional-object-attributes").split(",")} - {""}
    if names - {"RestoreStatus"}:
        raise S3Error("InvalidArgument", "Invalid attribute name specified.")
    return bool(names)


async def _page(call: Call, after: bytes, *, with_owner: bool) -> Page:
    _, settings = await call.bucket()
    page = Page(call, settings)
    if page.limit:
        page.rows, page.truncated = await call.catalog.list_objects(
            call.bucket_name, prefix=page.prefix, after=after, delimiter=page.delimiter, limit=page.limit
        )
    if with_owner:
        await page.name_owners(call)
    return page


def namer(encoded: bool) -> Callable[[bytes], str]:
    """How keys are written into a listing: percent-encoded where the client asked for encoding-type=url."""
    if encoded:
        return lambda key: quote_from_bytes(key, safe="/-_.~*")
    return lambda key: key.decode("utf-8", "replace")


def encode_token(key: bytes) -> str:
    """A continuation token: opaque to clients, the last key of the page to us."""
    return base64.urlsafe_b64encode(_TOKEN_VERSION + key).decode("ascii")


def decode_token(token: str) -> bytes:
    try:
        raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw.startswith(_TOKEN_VERSION):
        raise S3Error("InvalidArgument", "The continuation token provided is incorrect")
    return raw[len(_TOKEN_VERSION) :]
