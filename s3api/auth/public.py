"""Is a bucket policy public? Pure; the rule that Block Public Access and GetBucketPolicyStatus go by.

A statement that allows everybody is public unless a condition pins the request to fixed values of one of the keys below.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/access-control-block-public-access.html#access-control-block-public-access-policy-status
"""

from __future__ import annotations

import ipaddress

from s3api.auth.policy.conditions import Condition
from s3api.auth.policy.language import Policy, Statement

_PINNING = frozenset(
    {
        "aws:sourceip", "aws:sourcearn", "aws:sourcevpc", "aws:sourcevpce", "aws:sourceowner", "aws:sourceaccount",
        "aws:userid", "aws:username", "aws:principalarn", "aws:principalaccount", "aws:principalorgid",
        "aws:principalorgpaths", "s3:x-amz-server-side-encryption-aws-kms-key-id", "s3:dataaccesspointarn",
        "s3:dataaccesspointaccount",
    }
)  # fmt: skip
_POSITIVE = frozenset(
    {"StringEquals", "StringEqualsIgnoreCase", "StringLike", "ArnEquals", "ArnLike", "IpAddress", "NumericEquals"}
)
_WIDEST_V4, _WIDEST_V6 = 8, 32
"""A network wider than these says nothing about who asks."""


def is_public(policy: Policy) -> bool:
    return any(statement.allow and _public(statement) for statement in policy.statements)


def _public(statement: Statement) -> bool:
    principals = statement.principals
    everybody = principals is not None and (principals.everybody or statement.not_principal)
    return everybody and not any(map(_pins, statement.conditions))


def _pins(condition: Condition) -> bool:
    if condition.operator not in _POSITIVE or condition.key not in _PINNING:
        return False
    if condition.if_exists or condition.qualifier == "all":
        return False
    return all(_fixed(condition, value) for value in condition.values)


def _fixed(condition: Condition, value: str) -> bool:
    if "${" in value:
        return False
    if condition.operator == "IpAddress":
        network = ipaddress.ip_network(value, strict=False)
        return network.prefixlen >= (_WIDEST_V4 if network.version == 4 else _WIDEST_V6)
    return not (condition.operator in ("StringLike", "ArnLike", "ArnEquals") and ("*" in value or "?" in value))
