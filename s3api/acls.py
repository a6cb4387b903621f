"""Access control lists as requests say them and answers show them: headers and XML, with grantees looked up among the users.

In: ``x-amz-acl``, ``x-amz-grant-*``, an ``AccessControlPolicy`` document. Out: ``Acl`` (s3api/auth/acl.py), or S3Error; and
the other way round. https://docs.aws.amazon.com/AmazonS3/latest/userguide/acl-overview.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol
from xml.etree.ElementTree import Element

from ingest.records import UserRecord
from s3api import xml
from s3api.auth.acl import (
    GRANTS_MAX,
    GROUP_URIS,
    GROUPS,
    LOG_DELIVERY,
    PERMISSIONS,
    Acl,
    AclGrant,
    canned,
)
from s3api.auth.users import ANONYMOUS, ANONYMOUS_ID, UserDirectory
from s3api.errors import S3Error

XSI = "http://www.w3.org/2001/XMLSchema-instance"
_HEADERS = {
    "x-amz-grant-full-control": "FULL_CONTROL",
    "x-amz-grant-read": "READ",
    "x-amz-grant-write": "WRITE",
    "x-amz-grant-read-acp": "READ_ACP",
    "x-amz-grant-write-acp": "WRITE_ACP",
}
_GRANTEE = re.compile(r"\s*(id|uri|emailaddress)\s*=\s*(?:\"([^\"]*)\"|([^,\"]*))\s*(,|\Z)", re.IGNORECASE)


class Fields(Protocol):
    """Header fields, or the fields of a form that stand in for them."""

    def get(self, name: str, default: str = "") -> str: ...


async def from_headers(headers: Fields, users: UserDirectory, owner: str, bucket_owner: str) -> Acl | None:
    """None where the request says nothing of access. Raises InvalidArgument, InvalidRequest, UnresolvableGrant…"""
    name = headers.get("x-amz-acl")
    said = {header: value for header in _HEADERS if (value := headers.get(header))}
    if name and said:
        raise S3Error("InvalidRequest", "Specifying both Canned ACLs and Header Grants is not allowed")
    if name:
        found = canned(name, owner, bucket_owner)
        if found is None:
            fields = [("ArgumentName", "x-amz-acl"), ("ArgumentValue", name[:64])]
            raise S3Error("InvalidArgument", "The canned ACL is not one that is known", fields=fields)
        return found
    if not said:
        return None
    grants = [
        AclGrant(grantee, _HEADERS[header])
        for header, value in said.items()
        for grantee in await _grantees(value, users)
    ]
    return _checked(grants)


async def _grantees(text: str, users: UserDirectory) -> list[str]:
    found = []
    at = 0
    while at < len(text):
        match = _GRANTEE.match(text, at)
        if match is None:
            raise S3Error("InvalidArgument", "Argument format not recognized")
        value = match[2] if match[2] is not None else match[3].strip()
        found.append(await _grantee(match[1].lower(), value, users))
        at = match.end()
    return found


async def _grantee(kind: str, value: str, users: UserDirectory) -> str:
    if kind == "uri":
        if value == LOG_DELIVERY:
            raise S3Error("NotImplemented", "Nothing delivers logs here, so the LogDelivery group cannot get grants")
        if value not in GROUPS:
            raise S3Error("InvalidArgument", "Invalid group uri", fields=[("ArgumentValue", value[:128])])
        return GROUPS[value]
    if kind == "emailaddress":
        user = await users.by_email(value)
        if user is None:
            raise S3Error("UnresolvableGrantByEmailAddress")
        return f"user:{user.user_id}"
    user = await users.by_canonical_id(value) or await users.by_id(value)
    if user is None:
        fields = [("ArgumentName", "CanonicalUser/ID"), ("ArgumentValue", value[:128])]
        raise S3Error("InvalidArgument", "Invalid id", fields=fields)
    return f"user:{user.user_id}"


def _checked(grants: list[AclGrant]) -> Acl:
    if len(grants) > GRANTS_MAX:
        raise S3Error("MalformedACLError", f"A list has at most {GRANTS_MAX} grants")
    return tuple(dict.fromkeys(grants))


async def from_document(body: bytes, users: UserDirectory, owner: str) -> Acl:
    """The list of an ``AccessControlPolicy``, whose Owner must stay who it is. Raises MalformedACLError, AccessDenied."""
    try:
        tree = xml.parse(body, "AccessControlPolicy")
        listed = tree.find("AccessControlList")
        owner_element = tree.find("Owner")
        if listed is None or owner_element is None:
            raise xml.BadXml("Owner and AccessControlList are required")
        said = xml.text(owner_element, "ID")
        elements = listed.findall("Grant")
        pairs = [(_grantee_of(element), xml.text(element, "Permission")) for element in elements]
    except xml.BadXml as error:
        raise S3Error("MalformedACLError", f"The XML you provided was not well-formed: {error}") from None
    user = await users.by_canonical_id(said) or await users.by_id(said)
    if user is None or user.user_id != owner:
        raise S3Error("AccessDenied", "The owner of a bucket or an object cannot be changed")
    grants = []
    for (kind, value), permission in pairs:
        if permission not in PERMISSIONS:
            raise S3Error("MalformedACLError", f"Unknown permission {permission[:32]!r}")
        grants.append(AclGrant(await _grantee(kind, value, users), permission))
    return _checked(grants)


def _grantee_of(grant: Element) -> tuple[str, str]:
    grantee = grant.find("Grantee")
    if grantee is None:
        raise xml.BadXml("a Grant lacks its Grantee")
    for kind, name in (("id", "ID"), ("uri", "URI"), ("emailaddress", "EmailAddress")):
        value = xml.text(grantee, name, "")
        if value:
            return kind, value
    raise xml.BadXml("a Grantee lacks ID, URI and EmailAddress")


async def person(users: UserDirectory, user_id: str) -> tuple[str, str]:
    """(canonical id, display name) of a user, for Owner, Initiator and Grantee elements."""
    user: UserRecord | None = ANONYMOUS if user_id == ANONYMOUS_ID else await users.by_id(user_id)
    return (user.canonical_id, user.display_name) if user is not None else (user_id, user_id)


async def people(users: UserDirectory, user_ids: set[str]) -> Mapping[str, list[tuple[str, xml.Value]]]:
    """``ID`` and ``DisplayName`` of each, to be put into an Owner element."""
    found: dict[str, list[tuple[str, xml.Value]]] = {}
    for user_id in user_ids:
        canonical_id, name = await person(users, user_id)
        found[user_id] = [("ID", canonical_id), ("DisplayName", name)]
    return found


async def rendered(acl: Acl, owner: str, users: UserDirectory) -> bytes:
    """An ``AccessControlPolicy`` document."""
    owner_id, owner_name = await person(users, owner)
    grants = []
    for grant in acl:
        if grant.grantee in GROUP_URIS:
            who = f'xsi:type="Group"><URI>{GROUP_URIS[grant.grantee]}</URI>'
        else:
            canonical_id, name = await person(users, grant.grantee.removeprefix("user:"))
            who = (
                f'xsi:type="CanonicalUser"><ID>{xml.escape(canonical_id)}</ID>'
                f"<DisplayName>{xml.escape(name)}</DisplayName>"
            )
        grants.append(
            f'<Grant><Grantee xmlns:xsi="{XSI}" {who}</Grantee><Permission>{grant.permission}</Permission></Grant>'
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<AccessControlPolicy xmlns="{xml.NAMESPACE}"><Owner><ID>{xml.escape(owner_id)}</ID>'
        f"<DisplayName>{xml.escape(owner_name)}</DisplayName></Owner>"
        f"<AccessControlList>{''.join(grants)}</AccessControlList></AccessControlPolicy>"
    ).encode()
