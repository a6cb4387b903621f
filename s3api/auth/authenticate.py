"""Who asks: the mechanism that a request uses, and its verifier. No mechanism at all is everybody, whom policies may let in.

Upstream: s3api.service. Downstream: sigv4, sigv2. Browser forms and STS carry their signature elsewhere and verify themselves.
"""

from __future__ import annotations

from s3api.auth import sigv2, sigv4
from s3api.auth.signed import Signed, body_form
from s3api.auth.sigv2 import SigV2
from s3api.auth.sigv4 import SigV4
from s3api.auth.users import NOBODY, UserStore
from s3api.errors import S3Error
from s3api.http.message import Headers, Request

SIGV2_REFUSED = (
    "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256 (boto3: "
    "Config(signature_version='s3v4'); aws cli: aws configure set default.s3.signature_version s3v4)."
)

# What a presigned URL may say in its query instead of in header fields. Not checksums: SDKs that presign compute them
# over the empty body they have at that time.
_HOISTED = (
    "x-amz-acl", "x-amz-grant-", "x-amz-meta-", "x-amz-tagging", "x-amz-storage-class", "x-amz-object-lock-",
    "x-amz-server-side-encryption", "x-amz-website-redirect-location", "x-amz-metadata-directive", "x-amz-expected-bucket-owner",
    "x-amz-request-payer",
)  # fmt: skip


class Authenticator:
    def __init__(self, users: UserStore, *, region: str = "", allow_sigv2: bool = True) -> None:
        """``region``: the only one that signatures may name; empty: any."""
        self.sigv4 = SigV4(users, region)
        self.sigv2 = SigV2(users)
        self.allow_sigv2 = allow_sigv2

    async def verify(self, request: Request, virtual_bucket: str, now_s: float) -> Signed:
        """Raises S3Error with AWS's codes. Of a presigned URL, moves what it says in its query for header fields to them."""
        if sigv4.claims(request):
            signed = await self.sigv4.verify(request, now_s)
        elif sigv2.claims(request):
            if not self.allow_sigv2:
                raise S3Error("InvalidRequest", SIGV2_REFUSED)
            signed = await self.sigv2.verify(request, virtual_bucket, now_s)
        elif request.headers.get("authorization"):
            raise S3Error("InvalidArgument", "Unsupported Authorization Type")
        else:
            payload, sha256 = body_form(request)
            return Signed(NOBODY, payload, sha256, "", "", "", b"")
        if signed.presigned:
            _hoist(request)
        return signed


def _hoist(request: Request) -> None:
    said = [(name.lower(), value) for name, value in request.query if name.lower().startswith(_HOISTED)]
    moved = [(name, value) for name, value in said if name not in request.headers]
    if moved:
        request.headers = Headers((*request.headers.fields, *moved))
