"""The condition keys of one request: who, from where, when, and what the request asks.

In: the request's head, the user, the time, and (where they were read) facts about the object. Out: values by condition key, as
s3api/auth/policy/conditions.py asks for them. Nothing is computed before it is asked for.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/amazon-s3-policy-keys.html
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_condition-keys.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar
from urllib.parse import parse_qsl

from s3api import times
from s3api.auth.engine import NeedsObject, ObjectFacts
from s3api.auth.policy.principals import ACCOUNT_ID, user_arn
from s3api.auth.principal import Principal
from s3api.http.message import Request

Values = tuple[str, ...] | None

_HEADERS = frozenset(
    {
        "x-amz-acl", "x-amz-content-sha256", "x-amz-copy-source", "x-amz-metadata-directive", "x-amz-storage-class",
        "x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id",
        "x-amz-server-side-encryption-customer-algorithm", "x-amz-website-redirect-location", "x-amz-grant-read",
        "x-amz-grant-write", "x-amz-grant-read-acp", "x-amz-grant-write-acp", "x-amz-grant-full-control",
        "x-amz-object-ownership",
    }
)  # fmt: skip
_LOCKS = {
    "object-lock-mode": "x-amz-object-lock-mode",
    "object-lock-retain-until-date": "x-amz-object-lock-retain-until-date",
    "object-lock-legal-hold": "x-amz-object-lock-legal-hold",
}
_ARGUMENTS = {"prefix": "prefix", "delimiter": "delimiter", "max-keys": "max-keys", "versionid": "versionId"}


class RequestContext:
    """Implements ``policy.conditions.Context``. ``form``: fields of a browser's form, which stand in for headers;
    ``request_tags``: those of a tagging document, where the body holds them."""

    def __init__(
        self,
        request: Request,
        principal: Principal,
        now_s: float,
        *,
        presigned: bool = False,
        sigv2: bool = False,
        signed_s: int | None = None,
        form: Mapping[str, str] | None = None,
        request_tags: Mapping[str, str] | None = None,
        extra: Mapping[str, str] | None = None,
        facts: ObjectFacts | None = None,
    ) -> None:
        self._request = request
        self._principal = principal
        self._now_s = now_s
        self._presigned = presigned
        self._sigv2 = sigv2
        self._signed_s = signed_s
        self._form = form
        self._tags = request_tags
        self._extra = extra or {}
        self.facts = facts

    def get(self, key: str) -> Values:
        """Raises NeedsObject for a key that the object decides, as long as there are no facts."""
        if key in self._extra:
            return (self._extra[key],)
        name, _, rest = key.partition("/")
        found = self._keys.get(name)
        if found is not None:
            return found(self, rest)
        if name.startswith("s3:"):
            return self._s3(name[3:])
        return None

    def _s3(self, name: str) -> Values:
        if name in _HEADERS:
            return self._header(name)
        if name in _LOCKS:
            return self._header(_LOCKS[name])
        if name in _ARGUMENTS:
            return _one(self._request.arg(_ARGUMENTS[name]))
        return None

    def _header(self, name: str) -> Values:
        source = self._form if self._form is not None else self._request.headers
        return _one(source.get(name) or None)

    def _source_ip(self, _: str) -> Values:
        return _one(self._request.peer_address or None)

    def _userid(self, _: str) -> Values:
        return None if self._principal.anonymous else (self._principal.user_id,)

    def _username(self, _: str) -> Values:
        return None if self._principal.anonymous or self._principal.root else (self._principal.user_id,)

    def _principal_arn(self, _: str) -> Values:
        return None if self._principal.anonymous else (user_arn(self._principal.user_id),)

    def _principal_type(self, _: str) -> Values:
        return ("Anonymous" if self._principal.anonymous else "Account" if self._principal.root else "User",)

    def _auth_type(self, _: str) -> Values:
        if self._principal.anonymous:
            return None
        return ("POST" if self._form is not None else "REST-QUERY-STRING" if self._presigned else "REST-HEADER",)

    def _signature_version(self, _: str) -> Values:
        return None if self._principal.anonymous else ("AWS" if self._sigv2 else "AWS4-HMAC-SHA256",)

    def _signature_age(self, _: str) -> Values:
        return None if self._signed_s is None else (str(max(0, int((self._now_s - self._signed_s) * 1000))),)

    def _request_tags(self) -> dict[str, str]:
        if self._tags is not None:
            return dict(self._tags)
        found = self._header("x-amz-tagging")
        return dict(parse_qsl(found[0], keep_blank_values=True)) if found else {}

    def _request_tag(self, name: str) -> Values:
        return _one(self._request_tags().get(name))

    def _request_tag_keys(self, _: str) -> Values:
        return tuple(self._request_tags()) or None

    def _existing_tag(self, name: str) -> Values:
        if self.facts is None:
            raise NeedsObject
        return _one(dict(self.facts.tags).get(name))

    def _retention_days(self, _: str) -> Values:
        found = self._header("x-amz-object-lock-retain-until-date")
        until_s = times.parse_iso_s(found[0]) if found else None
        return None if until_s is None else (str(max(0, int((until_s - self._now_s) // 86400))),)

    _keys: ClassVar[dict[str, Callable[[RequestContext, str], Values]]] = {
        "aws:sourceip": _source_ip,
        "aws:securetransport": lambda self, _: ("true" if self._request.secure else "false",),
        "aws:username": _username,
        "aws:userid": _userid,
        "aws:principalarn": _principal_arn,
        "aws:principalaccount": lambda self, _: None if self._principal.anonymous else (ACCOUNT_ID,),
        "aws:principaltype": _principal_type,
        "aws:currenttime": lambda self, _: (times.iso(int(self._now_s * 1e9)),),
        "aws:epochtime": lambda self, _: (str(int(self._now_s)),),
        "aws:referer": lambda self, _: _one(self._request.headers.get("referer") or None),
        "aws:useragent": lambda self, _: _one(self._request.headers.get("user-agent") or None),
        "s3:authtype": _auth_type,
        "s3:signatureversion": _signature_version,
        "s3:signatureage": _signature_age,
        "s3:requestobjecttag": _request_tag,
        "s3:requestobjecttagkeys": _request_tag_keys,
        "s3:existingobjecttag": _existing_tag,
        "s3:object-lock-remaining-retention-days": _retention_days,
    }


def _one(value: str | None) -> Values:
    return None if value is None else (value,)
