"""The decision: may this principal do this action to this resource? One pure function for all ports.

In: a ``Principal``, a ``BucketRules`` (policy, list, ownership, blocks: parsed once for each state of the bucket) and a
``Question``. Out: ``Verdict``. An explicit deny wins over everything; what nothing allows is denied. What allows:

1. root; grants of the user (s3api/auth/grants.py); identity policies of the user;
2. the bucket's policy; owning the bucket; the access control list of bucket or object, where the bucket has lists.

Two things differ from AWS on purpose, because a node is one account: an identity policy alone opens buckets of other users, and
the owner of a bucket may do everything to it without a policy that says so. As on AWS, nobody can lock root or a bucket's owner
out of the bucket's policy itself. Requests that nobody signed never write kernels.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html
"""

from __future__ import annotations

import dataclasses

from ingest.records import BucketRecord
from s3api.auth import acl as acls
from s3api.auth import grants
from s3api.auth.acl import ENFORCED, NOT_BLOCKED, Acl, Ownership, PublicAccessBlock
from s3api.auth.actions import ACTIONS, Access, Over
from s3api.auth.policy.conditions import Context
from s3api.auth.policy.language import Policy
from s3api.auth.principal import Principal

OWNERS_ALWAYS = frozenset({"s3:GetBucketPolicy", "s3:PutBucketPolicy", "s3:DeleteBucketPolicy"})
ARN = "arn:aws:s3:::"
KERNELS_PREFIX = b"_kernels/"


class NeedsObject(Exception):
    """The decision depends on the object (its tags, its list), which the context was not given."""


@dataclasses.dataclass(frozen=True, slots=True)
class BucketRules:
    """What a bucket says about access to it."""

    owner: str = ""
    policy: Policy | None = None
    policy_public: bool = False
    ownership: Ownership = ENFORCED
    acl: Acl | None = None
    block: PublicAccessBlock = NOT_BLOCKED
    broken: bool = False
    """Its policy cannot be read: it may have denied something."""


NO_RULES = BucketRules()
"""Of a bucket that does not exist (yet)."""


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What the decision may need of an existing object."""

    owner: str = ""
    acl: Acl | None = None
    tags: tuple[tuple[str, str], ...] = ()
    exists: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    action: str
    bucket: str
    name: bytes = b""
    """The key; for listings the prefix asked for."""
    over: Over | None = None
    """What a grant must cover, where it is not what the actions table says."""

    @property
    def resource(self) -> str:
        if not ACTIONS[self.action].on_object:
            return ARN + (self.bucket or "*")
        return f"{ARN}{self.bucket}/{self.name.decode('utf-8', 'surrogateescape')}"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    allowed: bool
    why: str
    """What decided it, for the log: never sent to a client."""


_ROOT, _GRANT = Verdict(True, "root"), Verdict(True, "grant")
_OWNER, _ACL = Verdict(True, "owner of the bucket"), Verdict(True, "access control list")
_NOTHING = Verdict(False, "nothing allows it")
MISSING = Verdict(False, "only the list of the object could allow it, and there is no such object")
_SESSION = Verdict(False, "the session's policy does not allow it")
_NO_CODE = Verdict(False, "kernels are put by users, whatever a policy says")
_BROKEN = Verdict(False, "a policy cannot be read")


def decide(
    principal: Principal, rules: BucketRules, question: Question, context: Context, facts: ObjectFacts | None = None
) -> Verdict:
    """Raises NeedsObject where ``facts`` are None and would matter; ask again with them."""
    owner = bool(rules.owner) and not principal.anonymous and principal.user_id == rules.owner
    always = question.action in OWNERS_ALWAYS and (owner or principal.root)
    if principal.broken or (rules.broken and not always):
        return _BROKEN
    if (
        principal.anonymous
        and question.name.startswith(KERNELS_PREFIX)
        and ACTIONS[question.action].access > Access.READ
    ):
        return _NO_CODE
    if not (principal.policies or principal.session or rules.policy):
        return _allowed(principal, rules, question, owner, facts)
    action, resource = question.action.lower(), question.resource
    resource_policy = _evaluate(rules.policy, principal, action, resource, context)
    if resource_policy is False and not always:
        return Verdict(False, "denied by the bucket's policy")
    session = _evaluate(principal.session, principal, action, resource, context)
    if session is False or (principal.session is not None and session is None):
        return _SESSION
    identity = None
    for policy in principal.policies:
        one = _evaluate(policy, principal, action, resource, context)
        if one is False:
            return Verdict(False, "denied by a policy of the user")
        identity = identity or one
    if identity:
        return Verdict(True, "policy of the user")
    if resource_policy and not (rules.block.RestrictPublicBuckets and rules.policy_public and principal.anonymous):
        return Verdict(True, "policy of the bucket")
    return _allowed(principal, rules, question, owner, facts)


def _allowed(
    principal: Principal, rules: BucketRules, question: Question, owner: bool, facts: ObjectFacts | None
) -> Verdict:
    """What allows beside policies."""
    if principal.root:
        return _ROOT
    if owner:
        return _OWNER
    row = ACTIONS[question.action]
    over = question.over or row.over
    if not principal.anonymous:
        if over is Over.NOTHING:
            return _GRANT
        if grants.permits(principal.grants, question.action, question.bucket, question.name, question.over):
            return _GRANT
    if not rules.ownership.acls:
        return _NOTHING
    if _by_list(principal, rules, question, facts):
        return _ACL
    return MISSING if facts is not None and not facts.exists else _NOTHING


def _by_list(principal: Principal, rules: BucketRules, question: Question, facts: ObjectFacts | None) -> bool:
    public = not rules.block.IgnorePublicAcls
    if question.action not in acls.OBJECT_ACTIONS:
        acl = rules.acl if rules.acl is not None else acls.private(rules.owner)
        return acls.allows(acl, principal, question.action, on_object=False, public=public)
    if facts is None:
        raise NeedsObject
    if not facts.exists:
        return False
    if facts.owner == principal.user_id and not principal.anonymous:
        return True
    acl = facts.acl if facts.acl is not None else acls.private(facts.owner)
    return acls.allows(acl, principal, question.action, on_object=True, public=public)


def _evaluate(policy: Policy | None, principal: Principal, action: str, resource: str, context: Context) -> bool | None:
    """False: denied; True: allowed; None: the policy says nothing about it."""
    if policy is None:
        return None
    allowed = None
    for statement in policy.statements:
        if statement.allow and allowed:
            continue
        if statement.about(principal.names, action, resource, context):
            if not statement.allow:
                return False
            allowed = True
    return allowed


def sees(principal: Principal, bucket: BucketRecord, context: Context) -> bool:
    """Is the bucket among those that ListBuckets shows? Root's are all; else those a user owns, has a grant in, or may list by
    a policy of the user's own (a bucket that lets everybody in is not everybody's)."""
    if principal.root or principal.user_id == bucket.owner or grants.prefixes(principal.grants, bucket.name):
        return not principal.anonymous
    resource = ARN + bucket.name
    said = [_evaluate(policy, principal, "s3:listbucket", resource, context) for policy in principal.policies]
    return True in said and False not in said
