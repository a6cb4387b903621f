"""Access control lists: canned, by header, by XML; what a grant allows. Pure.

In: ``x-amz-acl``, ``x-amz-grant-*`` or an ``AccessControlPolicy`` document, with grantees already looked up. Out: ``Acl``, and
its XML. A grantee is stored by the id of a user, or is one of two groups. No list at all means: the owner has full control.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/acl-overview.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import msgspec

from s3api.auth.principal import Principal

ALL, SIGNED = "all", "signed"
"""The groups AllUsers and AuthenticatedUsers."""
GROUPS = {
    "http://acs.amazonaws.com/groups/global/AllUsers": ALL,
    "http://acs.amazonaws.com/groups/global/AuthenticatedUsers": SIGNED,
}
GROUP_URIS = {name: uri for uri, name in GROUPS.items()}
LOG_DELIVERY = "http://acs.amazonaws.com/groups/s3/LogDelivery"
PERMISSIONS = ("FULL_CONTROL", "READ", "WRITE", "READ_ACP", "WRITE_ACP")
GRANTS_MAX = 100

_OF_BUCKET = {
    "READ": frozenset({"s3:ListBucket", "s3:ListBucketVersions", "s3:ListBucketMultipartUploads"}),
    "WRITE": frozenset({"s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"}),
    "READ_ACP": frozenset({"s3:GetBucketAcl"}),
    "WRITE_ACP": frozenset({"s3:PutBucketAcl"}),
}
_OF_OBJECT = {
    "READ": frozenset(
        {"s3:GetObject", "s3:GetObjectVersion", "s3:GetObjectAttributes", "s3:GetObjectVersionAttributes", "s3:GetObjectTorrent"}
    ),
    "READ_ACP": frozenset({"s3:GetObjectAcl", "s3:GetObjectVersionAcl"}),
    "WRITE_ACP": frozenset({"s3:PutObjectAcl", "s3:PutObjectVersionAcl"}),
}  # fmt: skip
for _table in (_OF_BUCKET, _OF_OBJECT):
    _table["FULL_CONTROL"] = frozenset[str]().union(*_table.values())
OBJECT_ACTIONS = _OF_OBJECT["FULL_CONTROL"]
"""What the list of an object decides about; everything else about objects is decided by the bucket's."""
BUCKET_ACTIONS = _OF_BUCKET["FULL_CONTROL"]


class AclGrant(msgspec.Struct, frozen=True, array_like=True):
    grantee: str
    """``all``, ``signed`` or ``user:ID``."""
    permission: str


Acl = tuple[AclGrant, ...]


def private(owner: str) -> Acl:
    return (AclGrant(f"user:{owner}", "FULL_CONTROL"),)


CANNED = (
    "private", "public-read", "public-read-write", "authenticated-read", "bucket-owner-read", "bucket-owner-full-control",
)  # fmt: skip


def canned(name: str, owner: str, bucket_owner: str) -> Acl | None:
    """The list of a canned ACL; None for a name that is none."""
    extra: dict[str, tuple[AclGrant, ...]] = {
        "private": (),
        "public-read": (AclGrant(ALL, "READ"),),
        "public-read-write": (AclGrant(ALL, "READ"), AclGrant(ALL, "WRITE")),
        "authenticated-read": (AclGrant(SIGNED, "READ"),),
        "bucket-owner-read": (AclGrant(f"user:{bucket_owner}", "READ"),) if bucket_owner != owner else (),
        "bucket-owner-full-control": (AclGrant(f"user:{bucket_owner}", "FULL_CONTROL"),)
        if bucket_owner != owner
        else (),
    }
    return (*private(owner), *extra[name]) if name in extra else None


def allows(acl: Acl, principal: Principal, action: str, *, on_object: bool, public: bool = True) -> bool:
    """``public`` False: grants to the two groups do not count (IgnorePublicAcls)."""
    table: Mapping[str, frozenset[str]] = _OF_OBJECT if on_object else _OF_BUCKET
    for grant in acl:
        if grant.grantee in (ALL, SIGNED):
            if not public or (grant.grantee == SIGNED and principal.anonymous):
                continue
        elif principal.anonymous or grant.grantee != f"user:{principal.user_id}":
            continue
        if action in table.get(grant.permission, ()):
            return True
    return False


def is_public(acl: Acl) -> bool:
    return any(grant.grantee in (ALL, SIGNED) for grant in acl)


@dataclasses.dataclass(frozen=True, slots=True)
class Ownership:
    """What an OwnershipControls document says."""

    rule: str = "BucketOwnerEnforced"

    @property
    def acls(self) -> bool:
        """Do access control lists mean anything in the bucket?"""
        return self.rule != "BucketOwnerEnforced"


ENFORCED = Ownership()
OWNERSHIPS = ("BucketOwnerEnforced", "BucketOwnerPreferred", "ObjectWriter")


class PublicAccessBlock(msgspec.Struct, frozen=True):
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/access-control-block-public-access.html"""

    BlockPublicAcls: bool = False
    IgnorePublicAcls: bool = False
    BlockPublicPolicy: bool = False
    RestrictPublicBuckets: bool = False

    def joined(self, other: PublicAccessBlock) -> PublicAccessBlock:
        """The most restrictive of both, field by field: a node's and a bucket's."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return PublicAccessBlock(*[one or two for one, two in pairs])


NOT_BLOCKED = PublicAccessBlock()
ALL_BLOCKED = PublicAccessBlock(True, True, True, True)
