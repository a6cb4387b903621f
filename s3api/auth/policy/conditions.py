"""Condition operators of the policy language, and what a block of them says about one request.

In: the ``Condition`` element of a statement; the values of condition keys. Out: does it hold? Operators of one block are joined
by AND, keys of one operator by AND, values of one key by OR (for negated operators: none of them may match).
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_condition_operators.html
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import datetime
import decimal
import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from s3api.auth.policy.wildcards import glob

VALUES_MAX = 1024
"""Of one key."""


class BadCondition(ValueError):
    """``str()`` says what is wrong with a Condition element."""


class Context(Protocol):
    """The values of condition keys for one request; names are lower-case up to a tag's own key."""

    def get(self, key: str) -> tuple[str, ...] | None:
        """None: the request does not have the key. More than one value only for keys that are sets."""
        ...


Test = Callable[[str, str], bool]
"""(value of the request, value of the policy) -> do they match, before negation?"""


@dataclasses.dataclass(frozen=True, slots=True)
class _Operator:
    test: Test
    negated: bool = False
    check: Callable[[str], object] = str
    """Raises ValueError for a policy value that can never be compared."""


def _number(text: str) -> decimal.Decimal:
    # A bound on the exponent too: comparing 1e999999999 with 1 must not allocate its digits.
    if len(text) > 64 or re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d{1,3})?", text.strip()) is None:
        raise ValueError("not a number")
    return decimal.Decimal(text.strip())


def date(text: str) -> float:
    """Seconds since the epoch of an ISO 8601 date or of a number of seconds."""
    if re.fullmatch(r"\d{1,12}", text):
        return float(text)
    parsed = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp()


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)


def _in_network(value: str, network: str) -> bool:
    address = ipaddress.ip_address(value.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address in _network(network)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("neither true nor false")
    return text.lower() == "true"


def arn_matches(value: str, pattern: str) -> bool:
    """Six parts, each compared for itself: a star does not cross a colon of the first five."""
    values, patterns = value.split(":", 5), pattern.split(":", 5)
    return len(values) == len(patterns) == 6 and all(
        glob(part).matches(found) for part, found in zip(patterns, values, strict=True)
    )


def _arn(text: str) -> None:
    if text.count(":") < 5 and text != "*":
        raise ValueError("not an ARN")


def _guarded(test: Test) -> Test:
    """A request value of the wrong type matches nothing."""

    def guarded(value: str, wanted: str) -> bool:
        try:
            return test(value, wanted)
        except (ValueError, OverflowError, decimal.DecimalException):
            return False

    return guarded


def _binary(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None


def _pair(name: str, negation: str, test: Test, check: Callable[[str], object] = str) -> dict[str, _Operator]:
    guarded = _guarded(test)
    return {name: _Operator(guarded, False, check), negation: _Operator(guarded, True, check)}


OPERATORS: dict[str, _Operator] = {
    **_pair("StringEquals", "StringNotEquals", lambda value, wanted: value == wanted),
    **_pair(
        "StringEqualsIgnoreCase",
        "StringNotEqualsIgnoreCase",
        lambda value, wanted: value.casefold() == wanted.casefold(),
    ),
    **_pair("StringLike", "StringNotLike", lambda value, wanted: glob(wanted).matches(value)),
    **_pair("NumericEquals", "NumericNotEquals", lambda value, wanted: _number(value) == _number(wanted), _number),
    "NumericLessThan": _Operator(_guarded(lambda value, wanted: _number(value) < _number(wanted)), check=_number),
    "NumericLessThanEquals": _Operator(_guarded(lambda value, wanted: _number(value) <= _number(wanted)), check=_number),
    "NumericGreaterThan": _Operator(_guarded(lambda value, wanted: _number(value) > _number(wanted)), check=_number),
    "NumericGreaterThanEquals": _Operator(
        _guarded(lambda value, wanted: _number(value) >= _number(wanted)), check=_number
    ),
    **_pair("DateEquals", "DateNotEquals", lambda value, wanted: date(value) == date(wanted), date),
    "DateLessThan": _Operator(_guarded(lambda value, wanted: date(value) < date(wanted)), check=date),
    "DateLessThanEquals": _Operator(_guarded(lambda value, wanted: date(value) <= date(wanted)), check=date),
    "DateGreaterThan": _Operator(_guarded(lambda value, wanted: date(value) > date(wanted)), check=date),
    "DateGreaterThanEquals": _Operator(_guarded(lambda value, wanted: date(value) >= date(wanted)), check=date),
    "Bool": _Operator(_guarded(lambda value, wanted: _boolean(value) == _boolean(wanted)), check=_boolean),
    "BinaryEquals": _Operator(_guarded(lambda value, wanted: _binary(value) == _binary(wanted)), check=_binary),
    **_pair("IpAddress", "NotIpAddress", _in_network, _network),
    **_pair("ArnEquals", "ArnNotEquals", arn_matches, _arn),
    **_pair("ArnLike", "ArnNotLike", arn_matches, _arn),
    "Null": _Operator(lambda value, wanted: False, check=_boolean),  # looks at the key, not at its values
}  # fmt: skip
_PATTERNS = frozenset({"StringLike", "StringNotLike", "ArnEquals", "ArnNotEquals", "ArnLike", "ArnNotLike"})
_BY_NAME = {name.lower(): (name, operator) for name, operator in OPERATORS.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """One operator over one key."""

    operator: str
    key: str
    values: tuple[str, ...]
    if_exists: bool = False
    qualifier: str = ""
    """``all``, ``any`` or empty."""

    def holds(self, context: Context, expand: Callable[[str, bool], str | None]) -> bool:
        """``expand`` replaces policy variables, as text that matches itself alone in a pattern; None where one has no value, and
        then nothing matches."""
        found = context.get(self.key)
        if self.operator == "Null":
            return any(_boolean(value) == (found is None) for value in self.values)
        operator = OPERATORS[self.operator]
        if found is None or (not found and self.qualifier == "any"):
            if self.if_exists or self.qualifier == "all":
                return True
            # A key that is not there matches nothing, which is what a negated operator asks for.
            return operator.negated and self.qualifier != "any"
        pattern = self.operator in _PATTERNS
        wanted = [text for value in self.values if (text := expand(value, pattern)) is not None]
        results = [any(operator.test(value, one) for one in wanted) != operator.negated for value in found]
        return any(results) if self.qualifier == "any" else all(results)


_KEY = re.compile(r"(aws|s3|sts|iam|jwt|ldap|hiss):[^\s/]+(/.*)?\Z", re.IGNORECASE | re.DOTALL)


def parse(element: object) -> tuple[Condition, ...]:
    """The ``Condition`` element of a statement. Raises BadCondition."""
    if not isinstance(element, dict):
        raise BadCondition("Condition must be an object")
    conditions = []
    for name, keys in element.items():
        operator, if_exists, qualifier = _operator(name)
        if not isinstance(keys, dict) or not keys:
            raise BadCondition(f"Condition {name} must name keys")
        for key, values in keys.items():
            if _KEY.match(key) is None:
                raise BadCondition(f"Policy has an invalid condition key: {key}")
            conditions.append(
                Condition(operator, normal_key(key), _values(operator, key, values), if_exists, qualifier)
            )
    return tuple(conditions)


def normal_key(key: str) -> str:
    """Condition keys are compared without case; a tag's key behind the slash is itself."""
    name, slash, rest = key.partition("/")
    return name.lower() + slash + rest


def _operator(name: str) -> tuple[str, bool, str]:
    text = name
    qualifier = ""
    for prefix, short in (("forallvalues:", "all"), ("foranyvalue:", "any")):
        if text.lower().startswith(prefix):
            text, qualifier = text[len(prefix) :], short
    if_exists = text.lower().endswith("ifexists")
    if if_exists:
        text = text[: -len("IfExists")]
    found = _BY_NAME.get(text.lower())
    if found is None or (found[0] == "Null" and (if_exists or qualifier)):
        raise BadCondition(f"Invalid Condition type : {name}")
    return found[0], if_exists, qualifier


def _values(operator: str, key: str, values: object) -> tuple[str, ...]:
    listed: Sequence[object] = values if isinstance(values, list) else [values]
    if not listed or len(listed) > VALUES_MAX:
        raise BadCondition(f"Condition key {key} must have from 1 to {VALUES_MAX} values")
    texts = []
    for value in listed:
        if isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, str | int | float):
            text = str(value)
        else:
            raise BadCondition(f"A value of condition key {key} is neither text, number nor boolean")
        if "${" not in text:
            try:
                OPERATORS[operator].check(text)
            except (ValueError, OverflowError) as error:
                raise BadCondition(
                    f"Value {text[:64]!r} of condition key {key} does not suit {operator}: {error}"
                ) from None
        texts.append(text)
    return tuple(texts)
