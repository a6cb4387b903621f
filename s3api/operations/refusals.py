"""Headers that ask for what the gateway does not do. Ignoring them would pretend, so they are refused, and say why."""

from __future__ import annotations

from ingest.storage_class import CLASSES
from s3api.errors import S3Error
from s3api.http.message import Headers

_SSE = "Server-side encryption is not implemented; encrypt the gateway's disks and its archive instead"
_NOT_IMPLEMENTED = {
    "x-amz-website-redirect-location": "Website redirects are not implemented",
    "x-amz-mfa": "MFA delete is not implemented",
}  # fmt: skip


def refuse_encryption_of_reads(headers: Headers) -> None:
    """Nothing here is encrypted with a client's key, so a reader that brings one reads the wrong object."""
    if any(name.startswith("x-amz-server-side-encryption-customer-") for name, _ in headers.fields):
        raise S3Error("InvalidRequest", "The encryption parameters are not applicable to this object.")


def refuse_unsupported(headers: Headers) -> None:
    """Raises NotImplemented or InvalidStorageClass; for every write."""
    for name, value in headers.fields:
        if not name.startswith("x-amz-"):
            continue
        if name.startswith(("x-amz-server-side-encryption", "x-amz-copy-source-server-side-encryption")):
            raise S3Error("NotImplemented", _SSE, fields=[("Header", name)])
        if name in _NOT_IMPLEMENTED:
            raise S3Error("NotImplemented", _NOT_IMPLEMENTED[name], fields=[("Header", name)])
        if name == "x-amz-storage-class" and value not in CLASSES:
            raise S3Error("InvalidStorageClass")
