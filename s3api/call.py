"""One S3 request on its way through an operation: who asks, for which bucket and key, and what the operation may use.

Upstream: s3api.service makes a ``Call`` for each routed request. Downstream: every function in s3api/operations takes
one and returns a ``Response`` or raises an ``S3Error`` or ``IngestError``. Authorisation of the request's own bucket and
key has happened before the operation runs; operations that touch others (copy, multi-delete) ask ``authorise``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

from ingest import bucket_settings
from ingest.bucket_settings import BucketSettings
from ingest.ports import Catalog, FrameHost
from ingest.records import BucketRecord, UserRecord
from ingest.stream_types import DataPlane
from s3api.auth.actions import Over
from s3api.auth.authenticate import Authenticator
from s3api.auth.context import RequestContext
from s3api.auth.engine import MISSING, NO_RULES, Question, Verdict
from s3api.auth.policy.principals import ACCOUNT_ID
from s3api.auth.rules import AccessDefaults, Gate
from s3api.auth.signed import Signed
from s3api.auth.users import UserDirectory
from s3api.errors import S3Error
from s3api.http.message import Request

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

KERNELS_PREFIX = b"_kernels/"
PRODUCTS_PREFIX = b"_products/"

READS = frozenset({"s3:GetObject", "s3:GetObjectAttributes"})
READS_OF_VERSIONS = frozenset({"s3:GetObjectVersion", "s3:GetObjectVersionAttributes"})


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what one request may ask for. Sizes in bytes."""

    object_bytes: int = 5 * TIB
    """One PutObject or UploadPart. AWS stops a single PUT at 5 GiB; instruments stream longer ones."""
    key_bytes: int = 1024
    metadata_bytes: int = 2 * KIB
    kernel_source_bytes: int = 64 * KIB
    kernel_array_bytes: int = 257 * MIB
    """A parameter array's file; its values are bounded by the kernel room."""
    small_object_bytes: int = 256 * KIB
    """Bodies up to this long share segments with other small ones."""
    parts: int = 10_000
    keys_per_delete: int = 1000
    keys_per_page: int = 1000
    document_bytes: int = 8 * MIB
    """A Complete or Delete document: 10,000 parts with checksums, or 1,000 keys of 1,024 escaped bytes."""
    configuration_bytes: int = 64 * KIB
    lifecycle_bytes: int = MIB
    """A lifecycle configuration: 1,000 rules."""
    tags_per_bucket: int = 50
    copy_chunk_bytes: int = 4 * MIB

    def __post_init__(self) -> None:
        if self.small_object_bytes < self.kernel_source_bytes:
            raise ValueError("small_object_bytes must be at least kernel_source_bytes")


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What the node's settings say about S3."""

    region: str = "us-east-1"
    domains: tuple[str, ...] = ()
    """Buckets are also served as BUCKET.domain (virtual-host style)."""
    etag: str = "checksum"
    """``md5``: every ETag is an MD5; else the bucket decides."""
    host_id: str = ""
    """``x-amz-id-2``: names this node in a support conversation, says nothing else."""
    limits: Limits = Limits()
    notification_endpoints: frozenset[str] = frozenset()
    """Names that the ARNs of bucket notifications may end in."""
    day_s: int = 86400
    """Seconds of a day of lifecycle rules and restores; shorter ones are for tests."""
    access: AccessDefaults = dataclasses.field(default_factory=AccessDefaults)
    allow_sigv2: bool = True
    any_region: bool = False
    """Signatures may name any region, not only ``region``."""


class Buckets:
    """Bucket records and their parsed settings, cached until the catalogue's generation moves."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._generation = -1
        self._known: dict[str, tuple[BucketRecord, BucketSettings]] = {}

    async def get(self, name: str) -> tuple[BucketRecord, BucketSettings]:
        """Raises NoSuchBucket."""
        generation = self._catalog.generation()
        if generation != self._generation:
            self._known.clear()
            self._generation = generation
        found = self._known.get(name)
        if found is None:
            record = await self._catalog.bucket(name)
            found = (record, bucket_settings.parse(record.tags))
            # Only what was read under the generation still current may stay.
            if self._catalog.generation() == generation == self._generation:
                self._known[name] = found
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """What operations work with; the same for every request of a worker."""

    data: DataPlane
    buckets: Buckets
    settings: ServiceSettings
    users: UserDirectory
    gate: Gate
    authenticator: Authenticator
    wall_s: Callable[[], float]
    """Seconds since the epoch, as clients know them: what signatures are judged by (never a virtual clock)."""
    kernels: FrameHost | None = None


@dataclasses.dataclass(slots=True)
class Call:
    request: Request
    node: Node
    signed: Signed
    bucket_name: str
    key: bytes
    owner: str = ""
    """Of what the request writes."""
    acl: tuple[tuple[str, str], ...] | None = None
    """Its access control list, as VersionAttributes has it."""

    @property
    def user(self) -> UserRecord:
        return self.signed.credentials.user

    @property
    def catalog(self) -> Catalog:
        return self.node.data.catalog

    @property
    def limits(self) -> Limits:
        return self.node.settings.limits

    async def bucket(self) -> tuple[BucketRecord, BucketSettings]:
        """The request's bucket; raises NoSuchBucket, and AccessDenied when it is not the owner's the client expects."""
        record, settings = await self.node.buckets.get(self.bucket_name)
        expected = self.request.headers.get("x-amz-expected-bucket-owner")
        if expected and not await self.is_owner(record, expected):
            raise S3Error("AccessDenied", "The bucket is not owned by x-amz-expected-bucket-owner")
        return record, settings

    async def is_owner(self, bucket: BucketRecord, account: str) -> bool:
        """Is the bucket of ``account``, by the id of its owner, by the owner's canonical id, or by the node's account id?"""
        if account in (bucket.owner, ACCOUNT_ID):
            return True
        owner = await self.node.users.by_id(bucket.owner)
        return owner is not None and account.lower() == owner.canonical_id.lower()

    async def may(self, action: str, bucket: str, name: bytes = b"", over: Over | None = None) -> bool:
        """May the user do ``action`` (of s3api/auth/actions.py) to ``bucket``, or to the key or listed prefix ``name`` in it?"""
        return (await self.verdict(Question(action, bucket, name, over))).allowed

    async def verdict(self, question: Question, version_id: str | None = None, **about: Any) -> Verdict:
        """What the engine says. ``version_id``: of an object that the request names elsewhere than in its head; ``about``: what
        else it says there (see RequestContext)."""
        if version_id is None and (question.bucket, question.name) == (self.bucket_name, self.key):
            version_id = self.request.arg("versionId")
        elif version_id is not None:
            about = {"extra": {"s3:versionid": version_id}, **about}
        principal = self.signed.credentials.principal
        return await self.node.gate.ask(principal, question, self.context(**about), version_id)

    def context(self, **about: Any) -> RequestContext:
        """The request's condition keys; for one question only, since it remembers the object that one was about."""
        signed = self.signed
        return RequestContext(
            self.request,
            signed.credentials.principal,
            self.catalog.now_ns() / 1e9,
            presigned=signed.presigned,
            sigv2=signed.sigv2,
            signed_s=signed.signed_s,
            **about,
        )

    async def authorise(
        self, action: str, bucket: str, name: bytes = b"", over: Over | None = None, version_id: str | None = None
    ) -> None:
        """Raises AccessDenied unless the user ``may``; NoSuchKey or NoSuchVersion where only the list of an object that is not
        there could let the user read it, and the user may list the bucket."""
        verdict = await self.verdict(Question(action, bucket, name, over), version_id)
        if verdict.allowed:
            return
        reads = action in READS or action in READS_OF_VERSIONS
        if verdict is MISSING and reads and await self.may("s3:ListBucket", bucket, name):
            raise S3Error("NoSuchKey" if action in READS else "NoSuchVersion", fields=[("Key", name.decode())])
        await self.refuse(bucket, creates=action == "s3:CreateBucket")

    async def refuse(self, bucket: str, *, creates: bool = False) -> NoReturn:
        """Raises AccessDenied, or NoSuchBucket for a bucket that is not there."""
        if bucket and not creates and await self.node.gate.rules(bucket) is NO_RULES:
            raise S3Error("NoSuchBucket", fields=[("BucketName", bucket)])
        raise S3Error("AccessDenied")

    def number(self, name: str, low: int, high: int, default: int) -> int:
        """A whole number from the query; above ``high`` counts as ``high`` (as AWS does for page sizes)."""
        text = self.request.arg(name)
        if not text:
            return default
        value = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else -1
        if value < low or value > 2**31 - 1:
            raise S3Error(
                "InvalidArgument",
                f"Argument {name} must be a whole number from {low} to {2**31 - 1}",
                fields=[("ArgumentName", name), ("ArgumentValue", text[:64])],
            )
        return min(value, high)
