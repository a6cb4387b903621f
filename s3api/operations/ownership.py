"""Who owns what a request makes, and what its headers say of access: for CreateBucket and for every write of an object.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/about-object-ownership.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ingest.records import BucketRecord, ObjectRecord
from s3api import acls, xml
from s3api.auth.acl import OWNERSHIPS, Acl, AclGrant, is_public, private
from s3api.auth.engine import BucketRules
from s3api.call import Call
from s3api.errors import S3Error

Owners = Callable[[ObjectRecord], "Sequence[tuple[str, xml.Value]]"]

ENFORCED_SAYS = "The bucket does not allow ACLs"


async def new_bucket_documents(call: Call) -> dict[str, bytes]:
    """Ownership and list that CreateBucket's headers ask for."""
    headers = call.request.headers
    documents: dict[str, bytes] = {}
    rule = headers.get("x-amz-object-ownership")
    if rule:
        if rule not in OWNERSHIPS:
            raise S3Error("InvalidArgument", f"x-amz-object-ownership is one of {', '.join(OWNERSHIPS)}")
        documents["ownershipControls"] = rule.encode()
    owner = call.user.user_id
    acl = await acls.from_headers(headers, call.node.users, owner, owner)
    if acl is None or acl == private(owner):
        return documents
    if (rule or call.node.gate.defaults.ownership) == "BucketOwnerEnforced":
        raise S3Error("InvalidBucketAclWithObjectOwnership")
    if is_public(acl) and call.node.gate.defaults.block_public:
        raise public_refused()
    documents["acl"] = msgspec.json.encode(acl)
    return documents


def public_refused() -> S3Error:
    return S3Error("AccessDenied", "Public access control lists are prevented by the BlockPublicAcls setting")


def owner_of(record: ObjectRecord, bucket: BucketRecord, rules: BucketRules) -> str:
    return record.owner if rules.ownership.acls else bucket.owner


def list_of(record: ObjectRecord) -> Acl | None:
    found = record.attributes.acl
    return None if found is None else tuple(AclGrant(*pair) for pair in found)


async def prepare_write(call: Call, fields: acls.Fields) -> None:
    """Who will own what the request writes, and its list: ``call.owner`` and ``call.acl``. Raises what forbids the list."""
    call.owner = call.user.user_id
    rules = await call.node.gate.rules(call.bucket_name)
    asked = fields.get("x-amz-acl")
    acl = await acls.from_headers(fields, call.node.users, call.owner, rules.owner)
    if acl is None:
        return
    if not rules.ownership.acls:
        # What clients send by habit, and is the case anyway.
        owners = {AclGrant(f"user:{user}", "FULL_CONTROL") for user in (rules.owner, call.owner)}
        if asked in ("private", "bucket-owner-full-control") or (not asked and set(acl) <= owners):
            return
        raise S3Error("AccessControlListNotSupported", ENFORCED_SAYS)
    if is_public(acl) and rules.block.BlockPublicAcls:
        raise public_refused()
    if rules.ownership.rule == "BucketOwnerPreferred" and asked == "bucket-owner-full-control":
        call.owner, acl = rules.owner, private(rules.owner)
    call.acl = tuple((grant.grantee, grant.permission) for grant in acl)


async def owners_of(call: Call, records: Sequence[ObjectRecord]) -> Owners:
    """How the Owner of each of these is written: canonical id and display name."""
    bucket, _ = await call.bucket()
    rules = await call.node.gate.rules(call.bucket_name)
    known = await acls.people(call.node.users, {owner_of(record, bucket, rules) for record in records})
    return lambda record: known[owner_of(record, bucket, rules)]
