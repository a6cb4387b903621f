"""The policy language and the engine: AWS's examples, refusals with their reasons, and laws that hold for any policy."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.records import Grant, UserRecord
from s3api.auth.acl import AclGrant, Ownership, PublicAccessBlock
from s3api.auth.engine import BucketRules, NeedsObject, ObjectFacts, Question, decide
from s3api.auth.policy.conditions import Context
from s3api.auth.policy.language import MalformedPolicy, parse
from s3api.auth.policy.wildcards import Glob, literally
from s3api.auth.principal import Principal, of_user
from s3api.auth.public import is_public

ADA = of_user(UserRecord("ada", "Ada"))
EVE = of_user(UserRecord("eve", "Eve"))
ROOT = of_user(UserRecord("root", "Root", root=True))
NOBODY = of_user(UserRecord("anonymous", "anonymous"), anonymous=True)
GET = "s3:GetObject"


class Values(Context):
    def __init__(self, values: dict[str, str | tuple[str, ...]] | None = None) -> None:
        self.values = values or {}

    def get(self, key: str) -> tuple[str, ...] | None:
        found = self.values.get(key)
        return (found,) if isinstance(found, str) else found


def document(*statements: dict[str, Any], version: str = "2012-10-17") -> str:
    return json.dumps({"Version": version, "Statement": list(statements)})


def allow(**fields: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Principal": "*", "Action": GET, "Resource": "arn:aws:s3:::b/*"} | fields


def rules_with(*statements: dict[str, Any], **fields: Any) -> BucketRules:
    policy = parse(document(*statements), bucket="b")
    return BucketRules(owner="root", policy=policy, policy_public=is_public(policy), **fields)


def may(
    principal: Principal, rules: BucketRules, key: bytes = b"k", action: str = GET, **values: str | tuple[str, ...]
) -> bool:
    context = Values({name.replace("__", ":").replace("_", "-"): value for name, value in values.items()})
    return decide(principal, rules, Question(action, "b", key), context).allowed


# -- wildcards


@given(st.text("ab*?", max_size=12), st.text("ab", max_size=12))
def test_wildcards_match_what_fnmatch_matches(pattern: str, text: str) -> None:
    assert Glob(pattern).matches(text) == fnmatch.fnmatchcase(text, pattern)


@given(st.text("a*?[", max_size=8), st.text("a*?[", max_size=8))
def test_literal_text_matches_itself_alone(value: str, text: str) -> None:
    assert Glob(literally(value)).matches(text) == (value == text)
    assert Glob(f"x/{literally(value)}/*").matches(f"x/{text}/y") == (value == text)


def test_a_hostile_pattern_takes_linear_time() -> None:
    assert not Glob("*a" * 500 + "*b").matches("a" * 1024)


# -- decisions


def test_a_statement_speaks_of_its_principal_action_and_resource_only() -> None:
    rules = rules_with(allow(Principal={"AWS": "arn:aws:iam:::user/ada"}, Resource="arn:aws:s3:::b/raw/*"))
    assert may(ADA, rules, b"raw/1")
    assert not may(ADA, rules, b"other")
    assert not may(EVE, rules, b"raw/1")
    assert not may(NOBODY, rules, b"raw/1")
    assert not may(ADA, rules, b"raw/1", "s3:PutObject")


def test_a_user_is_named_by_arn_account_and_canonical_id() -> None:
    for principal in (
        {"AWS": "arn:aws:iam::000000000000:user/ada"},
        {"AWS": ["arn:aws:iam:::user/ada"]},
        {"AWS": "arn:aws:iam::ada:root"},
        {"CanonicalUser": ADA.canonical_id},
        {"AWS": ADA.canonical_id},
    ):
        assert may(ADA, rules_with(allow(Principal=principal)))
        assert not may(EVE, rules_with(allow(Principal=principal)))
    assert not may(ADA, rules_with(allow(Principal={"AWS": "arn:aws:iam::123456789012:user/ada"})))


def test_not_principal_not_action_and_not_resource() -> None:
    deny = {
        "Effect": "Deny",
        "NotPrincipal": {"AWS": "arn:aws:iam:::user/ada"},
        "Action": "s3:*",
        "Resource": "arn:aws:s3:::b/*",
    }
    rules = rules_with(allow(), deny)
    assert may(ADA, rules)
    assert not may(EVE, rules)
    assert not may(ROOT, rules), "an explicit deny is for root too"
    rules = rules_with(
        {"Effect": "Allow", "Principal": "*", "NotAction": "s3:Put*", "NotResource": "arn:aws:s3:::b/secret/*"}
    )
    assert may(NOBODY, rules, b"open")
    assert not may(NOBODY, rules, b"secret/x")
    assert not may(NOBODY, rules, b"open", "s3:PutObject")


def test_nobody_is_locked_out_of_the_policy_itself() -> None:
    rules = rules_with(
        {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::b", "arn:aws:s3:::b/*"]}
    )
    assert not may(ROOT, rules, action="s3:GetObject")
    assert may(ROOT, rules, action="s3:DeleteBucketPolicy")
    assert not may(ADA, rules, action="s3:DeleteBucketPolicy")


@pytest.mark.parametrize(
    ("condition", "values", "expected"),
    [
        ({"IpAddress": {"aws:SourceIp": "10.1.0.0/16"}}, {"aws__sourceip": "10.1.2.3"}, True),
        ({"IpAddress": {"aws:SourceIp": ["10.1.0.0/16", "::1"]}}, {"aws__sourceip": "::ffff:10.1.2.3"}, True),
        ({"IpAddress": {"aws:SourceIp": "10.1.0.0/16"}}, {"aws__sourceip": "10.2.2.3"}, False),
        ({"NotIpAddress": {"aws:SourceIp": "10.1.0.0/16"}}, {"aws__sourceip": "10.2.2.3"}, True),
        ({"Bool": {"aws:SecureTransport": True}}, {"aws__securetransport": "true"}, True),
        ({"Bool": {"aws:SecureTransport": "true"}}, {"aws__securetransport": "false"}, False),
        ({"StringEquals": {"s3:prefix": ["a/", "b/"]}}, {"s3__prefix": "b/"}, True),
        ({"StringEquals": {"s3:prefix": "a/"}}, {}, False),
        ({"StringEqualsIfExists": {"s3:prefix": "a/"}}, {}, True),
        ({"StringNotEquals": {"s3:prefix": "a/"}}, {}, True),
        ({"StringNotEquals": {"s3:prefix": ["a/", "b/"]}}, {"s3__prefix": "b/"}, False),
        ({"StringEqualsIgnoreCase": {"S3:Prefix": "A/"}}, {"s3__prefix": "a/"}, True),
        ({"StringLike": {"s3:prefix": "run?/*"}}, {"s3__prefix": "run7/x"}, True),
        ({"StringNotLike": {"s3:prefix": "run?/*"}}, {"s3__prefix": "run7/x"}, False),
        ({"NumericLessThanEquals": {"s3:max-keys": 10}}, {"s3__max_keys": "10"}, True),
        ({"NumericGreaterThan": {"s3:max-keys": "10"}}, {"s3__max_keys": "10"}, False),
        ({"NumericEquals": {"s3:max-keys": "1e1"}}, {"s3__max_keys": "ten"}, False),
        ({"DateLessThan": {"aws:CurrentTime": "2026-01-01T00:00:00Z"}}, {"aws__currenttime": "2025-12-31T23:59:59.000Z"}, True),
        ({"DateGreaterThan": {"aws:CurrentTime": "2026-01-01"}}, {"aws__currenttime": "2025-12-31T23:59:59Z"}, False),
        ({"Null": {"aws:Referer": "true"}}, {}, True),
        ({"Null": {"aws:Referer": "false"}}, {"aws__referer": "x"}, True),
        ({"ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:user/a*"}}, {"aws__principalarn": "arn:aws:iam::0:user/ada"}, True),
        ({"ForAllValues:StringEquals": {"s3:RequestObjectTagKeys": ["a", "b"]}}, {"s3__requestobjecttagkeys": ("a",)}, True),
        ({"ForAllValues:StringEquals": {"s3:RequestObjectTagKeys": ["a", "b"]}}, {"s3__requestobjecttagkeys": ("a", "c")}, False),
        ({"ForAllValues:StringEquals": {"s3:RequestObjectTagKeys": ["a"]}}, {}, True),
        ({"ForAnyValue:StringEquals": {"s3:RequestObjectTagKeys": ["a"]}}, {"s3__requestobjecttagkeys": ("a", "c")}, True),
        ({"ForAnyValue:StringEquals": {"s3:RequestObjectTagKeys": ["a"]}}, {}, False),
        ({"StringEquals": {"s3:prefix": "a/"}, "Bool": {"aws:SecureTransport": True}}, {"s3__prefix": "a/"}, False),
    ],
)  # fmt: skip
def test_conditions(condition: dict[str, Any], values: dict[str, str | tuple[str, ...]], expected: bool) -> None:
    assert may(NOBODY, rules_with(allow(Condition=condition)), **values) is expected


def test_variables_are_replaced_and_never_become_patterns() -> None:
    rules = rules_with(allow(Resource="arn:aws:s3:::b/home/${aws:username}/*"))
    assert may(ADA, rules, b"home/ada/x", aws__username="ada")
    assert not may(ADA, rules, b"home/eve/x", aws__username="ada")
    assert not may(ADA, rules, b"home/eve/x", aws__username="*")
    assert not may(NOBODY, rules, b"home/eve/x")
    assert may(NOBODY, rules_with(allow(Resource="arn:aws:s3:::b/${aws:username, 'all'}/*")), b"all/x")
    assert may(NOBODY, rules_with(allow(Resource="arn:aws:s3:::b/a${*}b")), b"a*b")
    assert not may(NOBODY, rules_with(allow(Resource="arn:aws:s3:::b/a${*}b")), b"axb")


def test_tags_are_asked_for_only_where_they_matter() -> None:
    condition = {"StringEquals": {"s3:ExistingObjectTag/Class": "open"}}
    policy = parse(document(allow(Condition=condition)), bucket="b")

    class Lazy(Values):
        def get(self, key: str) -> tuple[str, ...] | None:
            if key == "s3:existingobjecttag/Class":
                raise NeedsObject
            return None

    with pytest.raises(NeedsObject):
        decide(NOBODY, BucketRules(policy=policy), Question(GET, "b", b"k"), Lazy())
    assert not decide(NOBODY, BucketRules(policy=policy), Question("s3:PutObject", "b", b"k"), Lazy()).allowed
    assert may(NOBODY, BucketRules(policy=policy), **{"s3__existingobjecttag/Class": "open"})


def test_lists_grants_and_blocks() -> None:
    acl = (AclGrant("all", "READ"), AclGrant("user:ada", "WRITE"))
    rules = BucketRules(owner="root", ownership=Ownership("ObjectWriter"), acl=acl)
    assert may(NOBODY, rules, b"", "s3:ListBucket")
    assert may(ADA, rules, b"k", "s3:PutObject")
    assert not may(EVE, rules, b"k", "s3:PutObject")
    with pytest.raises(NeedsObject):
        may(EVE, rules)
    facts = ObjectFacts(owner="ada", acl=(AclGrant("signed", "READ"),))
    question = Question(GET, "b", b"k")
    assert decide(EVE, rules, question, Values(), facts).allowed
    assert not decide(NOBODY, rules, question, Values(), facts).allowed
    ignored = BucketRules(
        "root", ownership=Ownership("ObjectWriter"), acl=acl, block=PublicAccessBlock(IgnorePublicAcls=True)
    )
    assert not may(NOBODY, ignored, b"", "s3:ListBucket")
    enforced = BucketRules(owner="root", acl=acl)
    assert not may(NOBODY, enforced, b"", "s3:ListBucket")
    public = rules_with(allow(), block=PublicAccessBlock(RestrictPublicBuckets=True))
    assert not may(NOBODY, public)
    assert may(ADA, public)


def test_identity_and_session_policies() -> None:
    statement = {"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::b/raw/*"}
    user = UserRecord("ida", "Ida", policies={"raw": document(statement)})
    assert may(of_user(user), BucketRules(owner="root"), b"raw/1")
    assert not may(of_user(user), BucketRules(owner="root"), b"other")
    session = document({"Effect": "Allow", "Action": GET, "Resource": "*"})
    assert may(of_user(user, session_policy=session), BucketRules(), b"raw/1")
    assert not may(of_user(user, session_policy=session), BucketRules(), b"raw/1", "s3:PutObject")
    assert not may(of_user(user, session_policy=session), BucketRules(), b"other")
    broken = UserRecord("x", "X", root=True, policies={"x": "{"})
    assert not may(of_user(broken), BucketRules()), "what cannot be read may have denied"


# -- laws

KEYS = st.sampled_from([b"a", b"a/b", b"raw/1", b""])
ACTIONS = st.sampled_from([GET, "s3:PutObject", "s3:DeleteObject", "s3:GetObjectTagging"])
PRINCIPALS = st.sampled_from([ADA, EVE, ROOT, NOBODY, of_user(UserRecord("g", "G", grants=(Grant("*", "", "admin"),)))])
STATEMENTS = st.fixed_dictionaries(
    {
        "Effect": st.sampled_from(["Allow", "Deny"]),
        "Principal": st.sampled_from(["*", {"AWS": "arn:aws:iam:::user/ada"}, {"AWS": "arn:aws:iam:::user/g"}]),
        "Action": st.lists(st.sampled_from([GET, "s3:*", "s3:Put*", "s3:?etObject", "s3:DeleteObject"]), min_size=1),
        "Resource": st.lists(
            st.sampled_from(["arn:aws:s3:::b/*", "arn:aws:s3:::b/raw/*", "arn:aws:s3:::b/?"]), min_size=1
        ),
    }
)


@given(st.lists(STATEMENTS, min_size=1, max_size=4), PRINCIPALS, ACTIONS, KEYS)
def test_an_explicit_deny_wins_and_order_does_not_matter(
    statements: list[dict[str, Any]], principal: Principal, action: str, key: bytes
) -> None:
    allowed = may(principal, rules_with(*statements), key, action)
    assert may(principal, rules_with(*reversed(statements)), key, action) == allowed
    denied = {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": "arn:aws:s3:::b/*"}
    assert not may(principal, rules_with(*statements, denied), key, action)
    more = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "arn:aws:s3:::b/*"}
    if allowed:
        assert may(principal, rules_with(*statements, more), key, action), "allowing more never takes away"


NAMES = ["Version", "Statement", "Effect", "Action", "Resource", "Principal", "Condition", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_parsed_or_refused(value: Any) -> None:
    with contextlib.suppress(MalformedPolicy):
        assert parse(json.dumps(value), bucket="b").statements


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be valid JSON"),
        ("[]", "first byte must be"),
        ("[" * 10_000, "must be valid JSON"),
        ('{"Statement": [], "Statement": []}', "Duplicate key"),
        (document(allow(), version="2020-01-01"), "valid version string"),
        (document(), "from 1 to"),
        (document(allow(Effect="Permit")), "Invalid effect : Permit"),
        (document({k: v for k, v in allow().items() if k != "Principal"}), "Missing required field Principal"),
        (document({k: v for k, v in allow().items() if k != "Action"}), "Missing required field Action"),
        (document({k: v for k, v in allow().items() if k != "Resource"}), "Missing required field Resource"),
        (document(allow(Principal={"AWS": "ada"})), "Invalid principal in policy"),
        (document(allow(Principal={"User": "ada"})), "Invalid principal in policy"),
        (document(allow(Action="s3:ReadObject")), "Policy has invalid action"),
        (document(allow(Action="ec2:*")), "Policy has invalid action"),
        (document(allow(Resource="arn:aws:s3:::other/*")), "Policy has invalid resource"),
        (document(allow(Resource="b/*")), "Policy has invalid resource"),
        (document(allow(Resource="arn:aws:s3:::b")), "Action does not apply to any resource"),
        (document(allow(Action="s3:ListBucket")), "Action does not apply to any resource"),
        (document(allow(Condition={"StringIs": {"aws:x": "y"}})), "Invalid Condition type : StringIs"),
        (document(allow(Condition={"IpAddress": {"aws:SourceIp": "300.1.1.1"}})), "does not suit IpAddress"),
        (document(allow(Condition={"StringEquals": {"prefix": "y"}})), "invalid condition key"),
        (document(allow(Extra=1)), "Unknown field Extra"),
        (document(allow(Sid="a"), allow(Sid="a")), "must be unique"),
        ("{" + " " * 20_480 + "}", "at most 20480 bytes"),
    ],
)
def test_a_malformed_policy_says_why(text: str, reason: str) -> None:
    with pytest.raises(MalformedPolicy, match=reason):
        parse(text, bucket="b")


@pytest.mark.parametrize(
    ("statement", "public"),
    [
        (allow(), True),
        (allow(Principal={"AWS": "*"}), True),
        (allow(Effect="Deny"), False),
        (allow(Principal={"AWS": "arn:aws:iam:::user/ada"}), False),
        (allow(Condition={"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}), False),
        (allow(Condition={"IpAddress": {"aws:SourceIp": "0.0.0.0/0"}}), True),
        (allow(Condition={"StringLike": {"aws:userid": "a*"}}), True),
        (allow(Condition={"StringEquals": {"aws:userid": "ada"}}), False),
        (allow(Condition={"StringNotEquals": {"aws:userid": "ada"}}), True),
        (allow(Condition={"StringEquals": {"s3:prefix": "x"}}), True),
    ],
)
def test_public_policies(statement: dict[str, Any], public: bool) -> None:
    assert is_public(parse(document(statement), bucket="b")) is public
