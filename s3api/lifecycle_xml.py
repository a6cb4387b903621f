"""LifecycleConfiguration documents: read with AWS's refusals, written as they were meant. Pure.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketLifecycleConfiguration.html
"""

from __future__ import annotations

import calendar
import secrets
import time
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from ingest.lifecycle import RULES_MAX, Rule, Transition, When
from ingest.storage_class import CLASSES, STANDARD
from s3api import times, xml
from s3api.errors import S3Error
from s3api.operations.tagging import KEY_CHARS_MAX, VALUE_CHARS_MAX

ID_CHARS_MAX = 255
KEEP_MAX = 100
IA_DAYS_MIN = 30
_DAY_NS = 86_400 * 1_000_000_000
_NUMBER_MAX = 2**31 - 1
_BYTES_MAX = 2**50


def parsed(body: bytes) -> tuple[Rule, ...]:
    """Raises BadXml, InvalidArgument, InvalidRequest."""
    elements = xml.parse(body, "LifecycleConfiguration").findall("Rule")
    if not 0 < len(elements) <= RULES_MAX:
        raise xml.BadXml(f"a lifecycle configuration has from 1 to {RULES_MAX} rules")
    rules = tuple(_rule(element) for element in elements)
    if len({rule.id for rule in rules}) != len(rules):
        raise _argument("Rule ID must be unique. Found same ID for more than one rule")
    return rules


def _rule(element: Element) -> Rule:
    status = xml.text(element, "Status")
    if status not in ("Enabled", "Disabled"):
        raise xml.BadXml("<Status> is Enabled or Disabled")
    identity = xml.text(element, "ID", "") or secrets.token_hex(16)
    if len(identity) > ID_CHARS_MAX:
        raise _argument(f"ID length should not exceed allowed limit of {ID_CHARS_MAX}")
    form, prefix, tags, larger, smaller = _filter(element)
    expire, markers = _expiration(element.find("Expiration"))
    noncurrent = element.find("NoncurrentVersionExpiration")
    abort = element.find("AbortIncompleteMultipartUpload")
    rule = Rule(
        id=identity,
        enabled=status == "Enabled",
        prefix=prefix,
        tags=tags,
        larger_than=larger,
        smaller_than=smaller,
        form=form,
        expire=expire,
        expire_markers=markers,
        noncurrent_days=None
        if noncurrent is None
        else _days(noncurrent, "NoncurrentDays", "NoncurrentVersionExpiration"),
        noncurrent_keep=0 if noncurrent is None else _keep(noncurrent),
        transitions=tuple(_transition(child) for child in element.findall("Transition")),
        noncurrent_transitions=tuple(
            Transition(
                When(_days(child, "NoncurrentDays", "NoncurrentVersionTransition", low=0)), _class(child), _keep(child)
            )
            for child in element.findall("NoncurrentVersionTransition")
        ),
        abort_days=None if abort is None else _days(abort, "DaysAfterInitiation", "AbortIncompleteMultipartUpload"),
    )
    _check(rule)
    return rule


def _check(rule: Rule) -> None:
    if not (
        rule.expire
        or rule.expire_markers
        or rule.noncurrent_days
        or rule.transitions
        or rule.noncurrent_transitions
        or rule.abort_days
    ):
        raise S3Error("InvalidRequest", "At least one action needs to be specified in a rule")
    sized = rule.larger_than is not None or rule.smaller_than is not None
    for name, there in (
        ("AbortIncompleteMultipartUpload", rule.abort_days),
        ("ExpiredObjectDeleteMarker", rule.expire_markers),
    ):
        if there and rule.tags:
            raise S3Error("InvalidRequest", f"{name} cannot be specified with Tags.")
        if there and sized:
            raise S3Error("InvalidRequest", f"{name} cannot be specified with Object Size.")
    whens = [step.when for step in rule.transitions] + ([rule.expire] if rule.expire else [])
    if len({when.days is None for when in whens}) > 1:
        raise S3Error(
            "InvalidRequest",
            f"Found mixed 'Date' and 'Days' based Expiration and Transition actions in lifecycle rule for prefix '{rule.prefix}'",
        )
    for step in rule.transitions:
        if rule.expire is not None and _order(rule.expire) <= _order(step.when):
            raise _argument(
                f"'Days' in the Expiration action for prefix '{rule.prefix}' must be greater than 'Days' in the Transition action"
            )
    _check_classes(rule.transitions)
    _check_classes(rule.noncurrent_transitions)


def _order(when: When) -> int:
    return when.date_ns if when.date_ns is not None else when.days or 0


def _check_classes(steps: Sequence[Transition]) -> None:
    if len({step.storage_class for step in steps}) != len(steps):
        raise S3Error("InvalidRequest", "'StorageClass' must be different for 'Transition' actions in same 'Rule'.")
    for step in steps:
        if step.storage_class.endswith("_IA") and step.when.days is not None and step.when.days < IA_DAYS_MIN:
            raise _argument(
                f"'Days' in Transition action must be greater than or equal to {IA_DAYS_MIN} for storageClass"
                f" '{step.storage_class}'"
            )


Filter = tuple[str, str, dict[str, str], int | None, int | None]


def _filter(rule: Element) -> Filter:
    element, old = rule.find("Filter"), rule.find("Prefix")
    if (element is None) == (old is None):
        raise xml.BadXml("<Rule> has either <Filter> or, in the old form, <Prefix>")
    if element is None:
        return "Prefix", xml.raw_text(rule, "Prefix"), {}, None, None
    both = element.find("And")
    if both is None and len(element) > 1:
        raise xml.BadXml("<Filter> with more than one condition has them in <And>")
    conditions = element if both is None else both
    tags: dict[str, str] = {}
    for tag in conditions.findall("Tag"):
        name, value = xml.raw_text(tag, "Key"), xml.raw_text(tag, "Value")
        if name in tags:
            raise S3Error("InvalidRequest", "Duplicate Tag Keys are not allowed.")
        if not 0 < len(name) <= KEY_CHARS_MAX or len(value) > VALUE_CHARS_MAX:
            raise S3Error("InvalidTag", "The TagKey or TagValue you have provided is invalid")
        tags[name] = value
    larger = _number(conditions, "ObjectSizeGreaterThan", _BYTES_MAX)
    smaller = _number(conditions, "ObjectSizeLessThan", _BYTES_MAX)
    if larger is not None and smaller is not None and smaller <= larger:
        raise S3Error("InvalidRequest", "'ObjectSizeLessThan' has to be a value greater than 'ObjectSizeGreaterThan'")
    return "Filter" if both is None else "And", xml.raw_text(conditions, "Prefix", ""), tags, larger, smaller


def _expiration(element: Element | None) -> tuple[When | None, bool]:
    if element is None:
        return None, False
    marker = xml.text(element, "ExpiredObjectDeleteMarker", "").lower()
    if len(element) != 1 or marker not in ("", "true", "false"):
        raise xml.BadXml("<Expiration> has one of <Days>, <Date> and <ExpiredObjectDeleteMarker>")
    if marker:
        return None, marker == "true"
    return _when(element, "Expiration", low=1), False


def _transition(element: Element) -> Transition:
    return Transition(_when(element, "Transition", low=0), _class(element))


def _when(element: Element, action: str, *, low: int) -> When:
    days, date = element.find("Days"), element.find("Date")
    if (days is None) == (date is None):
        raise xml.BadXml(f"<{action}> has either <Days> or <Date>")
    return (
        When(date_ns=_date(xml.text(element, "Date")))
        if days is None
        else When(_days(element, "Days", action, low=low))
    )


def _days(element: Element, name: str, action: str, *, low: int = 1) -> int:
    number = _number(element, name, _NUMBER_MAX)
    if number is None:
        raise xml.BadXml(f"<{action}> lacks <{name}>")
    if number < low:
        raise _argument(f"'{name}' for {action} action must be {'a positive' if low else 'a nonnegative'} integer")
    return number


def _keep(element: Element) -> int:
    number = _number(element, "NewerNoncurrentVersions", _NUMBER_MAX)
    if number is not None and not 0 < number <= KEEP_MAX:
        raise _argument(f"'NewerNoncurrentVersions' must be from 1 to {KEEP_MAX}")
    return number or 0


def _number(element: Element, name: str, most: int) -> int | None:
    text = xml.text(element, name, "")
    if element.find(name) is None:
        return None
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise xml.BadXml(f"<{name}> is not a whole number")
    number = int(text)
    if number > most:
        raise _argument(f"'{name}' must be at most {most}")
    return number


def _date(text: str) -> int:
    for form in ("%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.000Z", "%Y-%m-%dT%H:%M:%S+00:00", "%Y-%m-%d"):
        try:
            date_ns = calendar.timegm(time.strptime(text, form)) * 1_000_000_000
        except ValueError:
            continue
        if date_ns % _DAY_NS:
            raise _argument("'Date' must be at midnight GMT")
        return date_ns
    raise xml.BadXml("<Date> is not of the form 2026-01-31T00:00:00Z")


def _class(element: Element) -> str:
    name = xml.text(element, "StorageClass")
    if name not in CLASSES or name in (STANDARD, "REDUCED_REDUNDANCY"):
        raise xml.BadXml(f"<StorageClass> {name[:64]} is not one that objects are moved to")
    return name


def _argument(message: str) -> S3Error:
    return S3Error("InvalidArgument", message)


# -- writing


def rendered(rules: Sequence[Rule]) -> bytes:
    rows: list[tuple[str, xml.Value]] = [("Rule", _row(rule)) for rule in rules]
    return xml.document("LifecycleConfiguration", rows)


def _row(rule: Rule) -> list[tuple[str, xml.Value]]:
    row: list[tuple[str, xml.Value]] = [("ID", rule.id)]
    row.append(("Prefix", rule.prefix) if rule.form == "Prefix" else ("Filter", _filter_row(rule)))
    row.append(("Status", "Enabled" if rule.enabled else "Disabled"))
    if rule.expire is not None:
        row.append(("Expiration", _when_row(rule.expire)))
    elif rule.expire_markers:
        row.append(("Expiration", [("ExpiredObjectDeleteMarker", True)]))
    row += [("Transition", [*_when_row(step.when), ("StorageClass", step.storage_class)]) for step in rule.transitions]
    row += [
        (
            "NoncurrentVersionTransition",
            [
                ("NoncurrentDays", step.when.days),
                ("NewerNoncurrentVersions", step.keep or None),
                ("StorageClass", step.storage_class),
            ],
        )
        for step in rule.noncurrent_transitions
    ]
    if rule.noncurrent_days is not None:
        keep = ("NewerNoncurrentVersions", rule.noncurrent_keep or None)
        row.append(("NoncurrentVersionExpiration", [("NoncurrentDays", rule.noncurrent_days), keep]))
    if rule.abort_days is not None:
        row.append(("AbortIncompleteMultipartUpload", [("DaysAfterInitiation", rule.abort_days)]))
    return row


def _filter_row(rule: Rule) -> list[tuple[str, xml.Value]]:
    conditions: list[tuple[str, xml.Value]] = []
    if rule.prefix or (rule.form == "Filter" and not (rule.tags or rule.larger_than or rule.smaller_than)):
        conditions.append(("Prefix", rule.prefix))
    conditions += [("Tag", [("Key", name), ("Value", value)]) for name, value in rule.tags.items()]
    conditions.append(("ObjectSizeGreaterThan", rule.larger_than))
    conditions.append(("ObjectSizeLessThan", rule.smaller_than))
    return [("And", conditions)] if rule.form == "And" else conditions


def _when_row(when: When) -> list[tuple[str, xml.Value]]:
    return [("Date", None if when.date_ns is None else times.iso(when.date_ns)), ("Days", when.days)]
