"""Policy documents: JSON text in, ``Policy`` out, or a ``MalformedPolicy`` that says why not; and matching a statement.

A resource policy (of a bucket) names principals and its own bucket; an identity policy names neither; a session policy is an
identity policy. Elements: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements.html
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable

from s3api.auth.actions import ACTIONS, OTHER_ACTIONS
from s3api.auth.policy.conditions import BadCondition, Condition, Context
from s3api.auth.policy.conditions import parse as parse_conditions
from s3api.auth.policy.principals import Principals, parse_principals
from s3api.auth.policy.wildcards import Glob, glob, literally

POLICY_BYTES_MAX = 20 * 1024
STATEMENTS_MAX = 512
VERSIONS = ("2012-10-17", "2008-10-17")
_STATEMENT_FIELDS = frozenset(
    {"Sid", "Effect", "Principal", "NotPrincipal", "Action", "NotAction", "Resource", "NotResource", "Condition"}
)
_VARIABLE = re.compile(r"\$\{([^{}]{1,256})\}")
_NAMES = tuple(name.lower() for name in (*ACTIONS, *OTHER_ACTIONS))


class MalformedPolicy(ValueError):
    """``str()`` is the reason, as S3 words it where it has words for it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Statement:
    sid: str
    allow: bool
    principals: Principals | None
    """None in identity policies."""
    not_principal: bool
    actions: tuple[Glob, ...]
    not_action: bool
    resources: tuple[str, ...]
    not_resource: bool
    conditions: tuple[Condition, ...]
    variables: bool
    """Version 2012-10-17: ``${…}`` is replaced."""

    def about(self, names: frozenset[str], action: str, resource: str, context: Context) -> bool:
        """Does the statement speak of this principal (its names), action (lower-case) and resource (ARN) under these
        conditions? Conditions come last: they may need what is costly to find out."""
        if self.principals is not None and self.principals.match(names) == self.not_principal:
            return False
        if any(pattern.matches(action) for pattern in self.actions) == self.not_action:
            return False

        def expand(text: str, pattern: bool) -> str | None:
            return expanded(text, context, pattern=pattern) if self.variables and "${" in text else text

        found = any(
            text is not None and _resource_matches(text, resource)
            for text in (expand(one, True) for one in self.resources)
        )
        return found != self.not_resource and all(condition.holds(context, expand) for condition in self.conditions)


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    statements: tuple[Statement, ...]


def _resource_matches(pattern: str, resource: str) -> bool:
    # ``arn:aws:s3:::NAME`` and, as other servers write it, ``arn:aws:s3::TENANT:NAME``.
    return glob(pattern).matches(resource)


def expanded(text: str, context: Context, *, pattern: bool) -> str | None:
    """``text`` with its variables replaced; None when one of them has no value here and no default."""
    missing = False

    def replace(found: re.Match[str]) -> str:
        nonlocal missing
        name, comma, default = found[1].partition(",")
        if name in ("*", "?", "$"):
            return literally(name) if pattern else name
        values = context.get(_normal(name.strip()))
        if values and len(values) == 1:
            value = values[0]
        elif comma and not values:
            value = default.strip().strip("'")
        else:
            missing = True
            return ""
        return literally(value) if pattern else value

    result = _VARIABLE.sub(replace, text)
    return None if missing else result


def _normal(name: str) -> str:
    head, slash, rest = name.partition("/")
    return head.lower() + slash + rest


def parse(text: bytes | str, *, bucket: str | None = None) -> Policy:
    """``bucket``: a resource policy of that bucket; None: an identity policy. Raises MalformedPolicy."""
    size = len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    if size > POLICY_BYTES_MAX:
        raise MalformedPolicy(f"Policies must be at most {POLICY_BYTES_MAX} bytes; this one has {size}")
    document = _json(text)
    unknown = set(document) - {"Version", "Id", "Statement"}
    if unknown:
        raise MalformedPolicy(f"Unknown field {min(unknown)}")
    version = document.get("Version", VERSIONS[1])
    if version not in VERSIONS:
        raise MalformedPolicy("The policy must contain a valid version string")
    if not isinstance(document.get("Id", ""), str):
        raise MalformedPolicy("Id must be text")
    statements = document.get("Statement")
    if statements is None:
        raise MalformedPolicy("Missing required field Statement")
    if isinstance(statements, dict):
        statements = [statements]
    if not isinstance(statements, list) or not 0 < len(statements) <= STATEMENTS_MAX:
        raise MalformedPolicy(f"Statement must hold from 1 to {STATEMENTS_MAX} statements")
    parsed = tuple(_statement(one, bucket, variables=version == VERSIONS[0]) for one in statements)
    sids = [statement.sid for statement in parsed if statement.sid]
    if len(set(sids)) < len(sids):
        raise MalformedPolicy("Statement IDs (SID) in a single policy must be unique")
    return Policy(parsed)


def _json(text: bytes | str) -> dict[str, object]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in pairs:
            if name in found:
                raise MalformedPolicy(f"Duplicate key {name[:64]!r}")
            found[name] = value
        return found

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        document = json.loads(decoded, object_pairs_hook=once, parse_constant=_no_constant)
    except MalformedPolicy:
        raise
    except (ValueError, RecursionError):
        raise MalformedPolicy("Policies must be valid JSON and the first byte must be '{'") from None
    if not isinstance(document, dict) or not decoded.startswith("{"):
        raise MalformedPolicy("Policies must be valid JSON and the first byte must be '{'")
    if any(f"\\u000{digit}" in decoded for digit in "012"):
        raise MalformedPolicy("Policies must not hold control characters")
    return document


def _no_constant(name: str) -> object:
    raise ValueError(name)


def _statement(element: object, bucket: str | None, *, variables: bool) -> Statement:
    if not isinstance(element, dict):
        raise MalformedPolicy("A statement must be an object")
    unknown = set(element) - _STATEMENT_FIELDS
    if unknown:
        raise MalformedPolicy(f"Unknown field {min(unknown)}")
    sid = element.get("Sid", "")
    if not isinstance(sid, str):
        raise MalformedPolicy("Sid must be text")
    effect = element.get("Effect")
    if effect is None:
        raise MalformedPolicy("Missing required field Effect")
    if effect not in ("Allow", "Deny"):
        raise MalformedPolicy(f"Invalid effect : {str(effect)[:64]}")
    principals, not_principal = _principals(element, bucket)
    actions, not_action = _one_of(element, "Action")
    resources, not_resource = _one_of(element, "Resource")
    for action in actions:
        _check_action(action, identity=bucket is None)
    for resource in resources:
        _check_resource(resource, bucket)
    if bucket is not None and not not_resource and not not_action:
        _check_combination(actions, resources)
    try:
        conditions = parse_conditions(element["Condition"]) if "Condition" in element else ()
    except BadCondition as error:
        raise MalformedPolicy(str(error)) from None
    return Statement(
        sid=sid,
        allow=effect == "Allow",
        principals=principals,
        not_principal=not_principal,
        actions=tuple(glob(action.lower()) for action in actions),
        not_action=not_action,
        resources=tuple(map(_without_account, resources)),
        not_resource=not_resource,
        conditions=conditions,
        variables=variables,
    )


def _principals(element: dict[str, object], bucket: str | None) -> tuple[Principals | None, bool]:
    named = [name for name in ("Principal", "NotPrincipal") if name in element]
    if bucket is None:
        if named:
            raise MalformedPolicy(f"Identity policies cannot have {named[0]}: they are of one user")
        return None, False
    if len(named) != 1:
        raise MalformedPolicy("Missing required field Principal" if not named else "Principal excludes NotPrincipal")
    try:
        return parse_principals(element[named[0]]), named[0] == "NotPrincipal"
    except ValueError:
        raise MalformedPolicy("Invalid principal in policy") from None


def _one_of(element: dict[str, object], name: str) -> tuple[tuple[str, ...], bool]:
    """The values of ``name`` or of ``Notname``, and which it was."""
    named = [field for field in (name, f"Not{name}") if field in element]
    if not named:
        raise MalformedPolicy(f"Missing required field {name}")
    if len(named) == 2:
        raise MalformedPolicy(f"{name} excludes Not{name}")
    value = element[named[0]]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str) for one in values):
        raise MalformedPolicy(f"Policy has invalid {name.lower()}")
    return tuple(values), named[0] != name


def _check_action(action: str, *, identity: bool) -> None:
    if action == "*":
        return
    service, colon, name = action.partition(":")
    known = colon and name and ((identity and service.lower() != "s3") or _any_action(action))
    if not known or "${" in action:
        raise MalformedPolicy("Policy has invalid action")


def _any_action(pattern: str) -> bool:
    match = glob(pattern.lower()).matches
    return any(match(name) for name in _NAMES)


def _check_resource(resource: str, bucket: str | None) -> None:
    if resource == "*":
        return
    pieces = resource.split(":", 5)
    right = len(pieces) == 6 and pieces[0] == "arn" and pieces[5] != ""
    if right and bucket is not None:
        right = pieces[2] == "s3" and glob(pieces[5].partition("/")[0]).matches(bucket)
        # ``arn:aws:s3:::*`` covers the bucket's keys too, and ``arn:aws:s3:::b*`` some other buckets' that are not concerned.
    if not right:
        raise MalformedPolicy("Policy has invalid resource")


def _without_account(resource: str) -> str:
    """``arn:aws:s3::ACCOUNT:name`` is the same place as ``arn:aws:s3:::name``: names of buckets are unique."""
    if not resource.startswith("arn:"):
        return resource
    return "arn:aws:s3:::" + resource.split(":", 5)[5] if resource.split(":", 5)[2] == "s3" else resource


def _check_combination(actions: Iterable[str], resources: Iterable[str]) -> None:
    """Each action must apply to at least one of the resources, as S3 demands."""
    kinds: set[bool] = set()
    for resource in resources:
        path = resource if resource == "*" else resource.split(":", 5)[5]
        kinds.add("/" in path)
        if "/" not in path and "*" in path:
            kinds.add(True)
    for pattern in actions:
        if not any(kind in kinds for kind in _kinds_of(pattern)):
            raise MalformedPolicy("Action does not apply to any resource(s) in statement")


def _kinds_of(pattern: str) -> set[bool]:
    """Whether what the pattern names works on objects (True), on buckets (False), or both."""
    match = glob(pattern.lower()).matches
    kinds = {row.on_object for name, row in ACTIONS.items() if pattern == "*" or match(name.lower())}
    return kinds or {True, False}


def check_principals(policy: Policy, known: Callable[[str], bool]) -> None:
    """Raises MalformedPolicy for a principal of this node that ``known`` does not know."""
    for statement in policy.statements:
        if statement.principals is not None and not all(known(name) for name in statement.principals.local):
            raise MalformedPolicy("Invalid principal in policy")
