"""Access to buckets: policy and its status, Block Public Access, ownership controls, access control lists of buckets and objects.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketPolicy.html and its neighbours. Lists mean something only in buckets
that are not BucketOwnerEnforced, as on AWS since 2023; there a list that anybody but the owner is in is refused.
"""

from __future__ import annotations

import msgspec

from ingest.bucket_documents import LIMITS
from ingest.errors import StaleVersion
from ingest.records import BucketRecord, ObjectRecord
from s3api import acls, xml
from s3api.auth.acl import ALL_BLOCKED, OWNERSHIPS, Acl, PublicAccessBlock, is_public, private
from s3api.auth.engine import BucketRules
from s3api.auth.policy.language import POLICY_BYTES_MAX, MalformedPolicy, check_principals, parse
from s3api.auth.public import is_public as policy_is_public
from s3api.auth.rules import decode_block
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import has_body, needs_checksum, read_document
from s3api.operations.buckets import XML_TYPE
from s3api.operations.ownership import ENFORCED_SAYS, list_of, owner_of, public_refused
from s3api.operations.reading import version

_TRIES = 3

# -- policy


async def put_bucket_policy(call: Call) -> Response:
    await call.bucket()
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    if len(body) > min(POLICY_BYTES_MAX, LIMITS["policy"]):
        raise S3Error("MalformedPolicy", f"Policies must be at most {POLICY_BYTES_MAX} bytes")
    try:
        policy = parse(body, bucket=call.bucket_name)
        names = {name for statement in policy.statements if statement.principals for name in statement.principals.local}
        known = {name for name in names if await _is_known(call, name)}
        check_principals(policy, known.__contains__)
    except MalformedPolicy as error:
        raise S3Error("MalformedPolicy", str(error)) from None
    rules = await call.node.gate.rules(call.bucket_name)
    if rules.block.BlockPublicPolicy and policy_is_public(policy):
        raise S3Error("AccessDenied", "Public policies are prevented by the BlockPublicPolicy setting of the bucket")
    await call.catalog.configure_bucket(call.bucket_name, {"policy": body})
    return Response(204)


async def _is_known(call: Call, name: str) -> bool:
    kind, _, value = name.partition(":")
    users = call.node.users
    if kind == "user" and await users.by_id(value) is not None:
        return True
    return await users.by_canonical_id(value) is not None


async def get_bucket_policy(call: Call) -> Response:
    bucket, _ = await call.bucket()
    policy = bucket.documents.get("policy")
    if policy is None:
        raise S3Error("NoSuchBucketPolicy", fields=[("BucketName", call.bucket_name)])
    return Response(200, [("content-type", "application/json")], policy)


async def delete_bucket_policy(call: Call) -> Response:
    await call.bucket()
    await call.catalog.configure_bucket(call.bucket_name, {"policy": None})
    return Response(204)


async def get_bucket_policy_status(call: Call) -> Response:
    await call.bucket()
    rules = await call.node.gate.rules(call.bucket_name)
    if rules.policy is None:
        raise S3Error("NoSuchBucketPolicy", fields=[("BucketName", call.bucket_name)])
    return Response(200, [XML_TYPE], xml.document("PolicyStatus", [("IsPublic", rules.policy_public)]))


# -- Block Public Access


async def put_public_access_block(call: Call) -> Response:
    await call.bucket()
    needs_checksum(call.request)
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    tree = xml.parse(body, "PublicAccessBlockConfiguration")
    said: dict[str, bool] = {}
    for name in PublicAccessBlock.__struct_fields__:
        text = xml.text(tree, name, "false").lower()
        if text not in ("true", "false"):
            raise xml.BadXml(f"<{name}> is true or false")
        said[name] = text == "true"
    block = PublicAccessBlock(**said)
    await call.catalog.configure_bucket(call.bucket_name, {"publicAccessBlock": msgspec.json.encode(block)})
    return Response(200)


async def get_public_access_block(call: Call) -> Response:
    bucket, _ = await call.bucket()
    document = bucket.documents.get("publicAccessBlock")
    if document is not None:
        block = decode_block(document)
    elif call.node.gate.defaults.block_public:
        block = ALL_BLOCKED
    else:
        raise S3Error("NoSuchPublicAccessBlockConfiguration", fields=[("BucketName", call.bucket_name)])
    rows: list[tuple[str, xml.Value]] = [(name, getattr(block, name)) for name in block.__struct_fields__]
    return Response(200, [XML_TYPE], xml.document("PublicAccessBlockConfiguration", rows))


async def delete_public_access_block(call: Call) -> Response:
    await call.bucket()
    await call.catalog.configure_bucket(call.bucket_name, {"publicAccessBlock": None})
    return Response(204)


# -- ownership


async def put_bucket_ownership_controls(call: Call) -> Response:
    bucket, _ = await call.bucket()
    needs_checksum(call.request)
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    rules = xml.parse(body, "OwnershipControls").findall("Rule")
    if len(rules) != 1:
        raise xml.BadXml("<OwnershipControls> holds one <Rule>")
    rule = xml.text(rules[0], "ObjectOwnership")
    if rule not in OWNERSHIPS:
        raise xml.BadXml(f"<ObjectOwnership> is one of {', '.join(OWNERSHIPS)}")
    acl = (await call.node.gate.rules(call.bucket_name)).acl
    if rule == "BucketOwnerEnforced" and acl is not None and acl != private(bucket.owner):
        raise S3Error("InvalidBucketAclWithObjectOwnership")
    await call.catalog.configure_bucket(call.bucket_name, {"ownershipControls": rule.encode()})
    return Response(200)


async def get_bucket_ownership_controls(call: Call) -> Response:
    bucket, _ = await call.bucket()
    if bucket.documents.get("ownershipControls") == b"":
        raise S3Error("OwnershipControlsNotFoundError", fields=[("BucketName", call.bucket_name)])
    rule = (await call.node.gate.rules(call.bucket_name)).ownership.rule
    return Response(200, [XML_TYPE], xml.document("OwnershipControls", [("Rule", [("ObjectOwnership", rule)])]))


async def delete_bucket_ownership_controls(call: Call) -> Response:
    await call.bucket()
    # Not the node's default again: as on AWS, a bucket without controls has lists.
    await call.catalog.configure_bucket(call.bucket_name, {"ownershipControls": b""})
    return Response(204)


# -- lists


async def put_bucket_acl(call: Call) -> Response:
    bucket, _ = await call.bucket()
    rules = await call.node.gate.rules(call.bucket_name)
    acl = await _asked(call, bucket, bucket.owner, rules)
    await call.catalog.configure_bucket(call.bucket_name, {"acl": msgspec.json.encode(acl)})
    return Response(200)


async def get_bucket_acl(call: Call) -> Response:
    bucket, _ = await call.bucket()
    rules = await call.node.gate.rules(call.bucket_name)
    acl = rules.acl if rules.acl is not None and rules.ownership.acls else private(bucket.owner)
    return Response(200, [XML_TYPE], await acls.rendered(acl, bucket.owner, call.node.users))


async def put_object_acl(call: Call) -> Response:
    bucket, _ = await call.bucket()
    rules = await call.node.gate.rules(call.bucket_name)
    record = await version(call, bucket)
    owner = owner_of(record, bucket, rules)
    acl = await _asked(call, bucket, owner, rules)
    pairs = tuple((grant.grantee, grant.permission) for grant in acl)
    for attempt in range(_TRIES):
        try:
            await call.catalog.amend_object(record.object_id, acl=pairs)
            return Response(200, _version_header(call, record))
        except StaleVersion:
            if attempt == _TRIES - 1:
                raise
            record = await version(call, bucket)
    raise AssertionError("unreachable")


async def get_object_acl(call: Call) -> Response:
    bucket, _ = await call.bucket()
    rules = await call.node.gate.rules(call.bucket_name)
    record = await version(call, bucket)
    owner = owner_of(record, bucket, rules)
    acl = list_of(record) if rules.ownership.acls else None
    body = await acls.rendered(acl if acl is not None else private(owner), owner, call.node.users)
    return Response(200, [XML_TYPE, *_version_header(call, record)], body)


def _version_header(call: Call, record: ObjectRecord) -> list[tuple[str, str]]:
    return [("x-amz-version-id", record.version_id)] if call.request.arg("versionId") is not None else []


async def _asked(call: Call, bucket: BucketRecord, owner: str, rules: BucketRules) -> Acl:
    """The list that a PutBucketAcl or PutObjectAcl asks for, by header or document."""
    body = b""
    if has_body(call.request):
        body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    acl = await acls.from_headers(call.request.headers, call.node.users, owner, bucket.owner)
    if acl is None and not body.strip() and not rules.ownership.acls:
        raise S3Error("AccessControlListNotSupported", ENFORCED_SAYS)
    if acl is None:
        if not body.strip():
            raise S3Error("MissingSecurityHeader", "Your request was missing a required header: x-amz-acl")
        acl = await acls.from_document(body, call.node.users, owner)
    elif body.strip():
        raise S3Error("UnexpectedContent")
    if not rules.ownership.acls and not set(acl) <= set(private(owner)):
        # Full control for the owner is the case anyway, however it is said: s3cmd says it of every copy.
        raise S3Error("AccessControlListNotSupported", ENFORCED_SAYS)
    if is_public(acl) and rules.block.BlockPublicAcls:
        raise public_refused()
    return acl
