"""Put/GetBucketNotificationConfiguration. Topics, queues and functions are webhooks here: an ARN ends in the name of an endpoint
that the operator put into the node's settings, and any other ARN is refused.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketNotificationConfiguration.html,
https://docs.aws.amazon.com/AmazonS3/latest/userguide/EventNotifications.html
"""

from __future__ import annotations

import itertools
import re
import secrets
from xml.etree.ElementTree import Element

import msgspec

from ingest.notification import EVENTS, TARGETS, Target
from s3api import xml
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import read_document
from s3api.operations.buckets import XML_TYPE

TARGETS_MAX = 100
_KINDS = {
    "TopicConfiguration": ("Topic", "sns"),
    "QueueConfiguration": ("Queue", "sqs"),
    "CloudFunctionConfiguration": ("CloudFunction", "lambda"),
}
_ARN = re.compile(r"arn:[a-z0-9-]+:(sns|sqs|lambda):[^:]*:[^:]*:(?:function:)?([^:]+)")
_FILTER_CHARS_MAX = 1024


async def put_bucket_notification(call: Call) -> Response:
    await call.bucket()
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    targets = parsed(body, call.node.settings.notification_endpoints)
    document = msgspec.json.encode(targets) if targets else None
    await call.catalog.configure_bucket(call.bucket_name, {"notification": document})
    return Response(200)


async def get_bucket_notification(call: Call) -> Response:
    bucket, _ = await call.bucket()
    return Response(200, [XML_TYPE], rendered(TARGETS.of(bucket) or ()))


def parsed(body: bytes, endpoints: frozenset[str]) -> tuple[Target, ...]:
    """Raises BadXml, InvalidArgument, NotImplemented."""
    tree = xml.parse(body, "NotificationConfiguration")
    if tree.find("EventBridgeConfiguration") is not None:
        raise S3Error("NotImplemented", "There is no EventBridge here; name a webhook as topic or queue")
    targets = tuple(_target(element) for element in tree if element.tag in _KINDS)
    if len(targets) > TARGETS_MAX:
        raise S3Error("InvalidArgument", f"A bucket has at most {TARGETS_MAX} notification configurations")
    if len({target.id for target in targets}) != len(targets):
        raise S3Error("InvalidArgument", "Same ID used for multiple configurations. IDs must be unique")
    unknown = [target for target in targets if target.name not in endpoints]
    if unknown:
        fields = [
            pair
            for number, target in enumerate(unknown, 1)
            for pair in (
                (f"ArgumentName{number}", target.arn),
                (f"ArgumentValue{number}", "not an endpoint of this node"),
            )
        ]
        named = ", ".join(target.arn for target in unknown[:10])
        raise S3Error(
            "InvalidArgument",
            f"Unable to validate the following destination configurations: {named}; "
            "an ARN ends in a name of the node's setting notification_endpoints",
            fields=fields[:20],
        )
    for one, other in itertools.combinations(targets, 2):
        if _overlap(one, other):
            raise S3Error(
                "InvalidArgument",
                "Configurations overlap. Configurations on the same bucket cannot share a common event type.",
            )
    return targets


def _target(element: Element) -> Target:
    kind, service = _KINDS[element.tag]
    arn = xml.text(element, kind)
    matched = _ARN.fullmatch(arn)
    if matched is None or matched[1] != service:
        raise S3Error(
            "InvalidArgument",
            "The ARN could not be parsed",
            fields=[("ArgumentName", kind), ("ArgumentValue", arn[:256])],
        )
    events = tuple((child.text or "").strip() for child in element.findall("Event"))
    if not events:
        raise xml.BadXml(f"<{element.tag}> names no <Event>")
    for event in events:
        if event not in EVENTS:
            raise S3Error("InvalidArgument", f"The event '{event[:64]}' is not supported for notifications")
    prefix, suffix = _filter(element.find("Filter"))
    identity = xml.text(element, "Id", "") or secrets.token_urlsafe(12)
    if len(identity) > 255:
        raise S3Error("InvalidArgument", "The Id of a configuration has at most 255 characters")
    return Target(identity, kind, arn, events, prefix, suffix)


def _filter(element: Element | None) -> tuple[str, str]:
    rules: dict[str, str] = {}
    for rule in element.iterfind("S3Key/FilterRule") if element is not None else ():
        name, value = xml.text(rule, "Name").lower(), xml.raw_text(rule, "Value")
        if name not in ("prefix", "suffix"):
            raise S3Error("InvalidArgument", "filter rule name must be either prefix or suffix")
        if name in rules:
            raise S3Error("InvalidArgument", f"Cannot specify more than one {name} rule in a filter.")
        if len(value) > _FILTER_CHARS_MAX:
            raise S3Error("InvalidArgument", f"Size of filter rule value cannot exceed {_FILTER_CHARS_MAX} characters")
        rules[name] = value
    return rules.get("prefix", ""), rules.get("suffix", "")


def _overlap(one: Target, other: Target) -> bool:
    """Could one object cause the same event for both?"""
    if not any(_same(first, second) for first in one.events for second in other.events):
        return False
    starts = one.prefix.startswith(other.prefix) or other.prefix.startswith(one.prefix)
    ends = one.suffix.endswith(other.suffix) or other.suffix.endswith(one.suffix)
    return starts and ends


def _same(first: str, second: str) -> bool:
    if first == second:
        return True
    group, _, name = first.rpartition(":")
    other_group, _, other_name = second.rpartition(":")
    return group == other_group and "*" in (name, other_name)


def rendered(targets: tuple[Target, ...]) -> bytes:
    rows: list[tuple[str, xml.Value]] = []
    for target in targets:
        rules: list[tuple[str, xml.Value]] = [
            ("FilterRule", [("Name", name), ("Value", value)])
            for name, value in (("prefix", target.prefix), ("suffix", target.suffix))
            if value
        ]
        row: list[tuple[str, xml.Value]] = [
            ("Id", target.id),
            (target.kind, target.arn),
            *(("Event", event) for event in target.events),
            ("Filter", [("S3Key", rules)] if rules else None),
        ]
        rows.append((f"{target.kind}Configuration", row))
    return xml.document("NotificationConfiguration", rows)
