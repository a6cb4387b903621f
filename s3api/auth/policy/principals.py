"""Who a statement speaks of, and the names a user has in policies.

Every user of the node is in its one account. ``arn:aws:iam::ACCOUNT:user/ID`` and, as other servers write it,
``arn:aws:iam:::user/ID`` name a user, and so do a canonical id (as CanonicalUser or as AWS) and ``arn:aws:iam::ID:root``. Other
accounts may be named and are never anybody.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_principal.html
"""

from __future__ import annotations

import dataclasses
import re

ACCOUNT_ID = "000000000000"
"""The account that all users of a node are in, as ARNs name it."""
PRINCIPALS_MAX = 1024
_CANONICAL = re.compile(r"[0-9a-f]{64}|65a011a29cdf8ec533ec3d1ccaae921c", re.IGNORECASE)
_USER = re.compile(r"arn:aws[a-z-]*:iam::([^:]*):user/(?:[^:]*/)?([^:/]+)")
_ROOT = re.compile(r"arn:aws[a-z-]*:iam::([^:]*):root")
_ANYBODY = ("AWS", "*")
_OTHER = re.compile(r"arn:aws[a-z-]*:(iam|sts)::[^:]*:(role|assumed-role|federated-user|group)/.+")


@dataclasses.dataclass(frozen=True, slots=True)
class Principals:
    everybody: bool
    names: frozenset[str]
    local: frozenset[str] = frozenset()
    """Names of users that should exist on this node."""

    def match(self, names: frozenset[str]) -> bool:
        return self.everybody or not self.names.isdisjoint(names)


def names_of(user_id: str, canonical_id: str) -> frozenset[str]:
    """All that a user is called in a policy's normal form."""
    return frozenset({f"user:{user_id}", f"canonical:{canonical_id.lower()}", f"user:{canonical_id.lower()}"})


def user_arn(user_id: str) -> str:
    return f"arn:aws:iam::{ACCOUNT_ID}:user/{user_id}"


def parse_principals(element: object) -> Principals:
    """The value of Principal or NotPrincipal. Raises ValueError."""
    if element == "*":
        return Principals(True, frozenset())
    if not isinstance(element, dict) or not element:
        raise ValueError("neither * nor an object")
    listed: list[tuple[str, object]] = []
    for kind, value in element.items():
        if kind not in ("AWS", "CanonicalUser", "Service", "Federated") or value == []:
            raise ValueError(kind)
        listed += [(kind, one) for one in (value if isinstance(value, list) else [value])]
    if len(listed) > PRINCIPALS_MAX or not all(isinstance(one, str) and one for _, one in listed):
        raise ValueError("too many, or not text")
    named = [
        _name(kind, str(one)) for kind, one in listed if kind in ("AWS", "CanonicalUser") and (kind, one) != _ANYBODY
    ]
    return Principals(
        _ANYBODY in listed, frozenset(name for name, _ in named), frozenset(name for name, here in named if here)
    )


def _name(kind: str, text: str) -> tuple[str, bool]:
    """(normal form, is it somebody of this node?)."""
    if _CANONICAL.fullmatch(text):
        return f"canonical:{text.lower()}", True
    if kind == "CanonicalUser":
        raise ValueError("not a canonical id")
    if found := _USER.fullmatch(text):
        return (f"user:{found[2]}", True) if found[1] in ("", ACCOUNT_ID) else (f"foreign:{text}", False)
    if found := _ROOT.fullmatch(text):
        return _account(found[1])
    if re.fullmatch(r"[0-9]{12}", text):
        return _account(text)
    if _OTHER.fullmatch(text):
        return f"foreign:{text}", False
    raise ValueError("not a principal")


def _account(text: str) -> tuple[str, bool]:
    """An account: ours stands for its root user; a user's own id, as other servers have it, for that user."""
    return ("user:root", False) if text in ("", ACCOUNT_ID) else (f"user:{text}", False)
