"""Bucket notifications: which events a bucket reports to which target, and the event as S3 words it. Pure.

In: the document ``notification``, what happened to an object. Out: the targets that want to know, and the JSON they get.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from urllib.parse import quote_plus

import msgspec

from ingest.bucket_documents import Form
from ingest.origin import Origin
from ingest.records import NULL_VERSION, BucketRecord, ObjectRecord

EVENTS = frozenset(
    f"s3:{name}"
    for name in (
        "ReducedRedundancyLostObject ObjectCreated:* ObjectCreated:Put ObjectCreated:Post ObjectCreated:Copy"
        " ObjectCreated:CompleteMultipartUpload ObjectRemoved:* ObjectRemoved:Delete ObjectRemoved:DeleteMarkerCreated"
        " ObjectRestore:* ObjectRestore:Post ObjectRestore:Completed ObjectRestore:Delete Replication:*"
        " Replication:OperationFailedReplication Replication:OperationNotTracked"
        " Replication:OperationMissedThreshold Replication:OperationReplicatedAfterThreshold LifecycleTransition"
        " IntelligentTiering ObjectAcl:Put LifecycleExpiration:* LifecycleExpiration:Delete"
        " LifecycleExpiration:DeleteMarkerCreated ObjectTagging:* ObjectTagging:Put ObjectTagging:Delete"
    ).split()
)
"""What a configuration may name; some of it never happens here."""
_VERSIONS = {"LifecycleExpiration": "2.3", "LifecycleTransition": "2.3", "ObjectTagging": "2.3"}


class Target(msgspec.Struct, frozen=True, omit_defaults=True):
    """One configuration of a bucket."""

    id: str
    kind: str
    """Topic, Queue or CloudFunction: the element that the client used; here they are all the same."""
    arn: str
    events: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""

    @property
    def name(self) -> str:
        """The endpoint of the node's settings that its events go to: the last part of the ARN."""
        return self.arn.rpartition(":")[2]

    def wants(self, event: str, key: bytes) -> bool:
        kind = f"s3:{event}"
        if not (kind in self.events or f"{kind.rpartition(':')[0]}:*" in self.events):
            return False
        return key.startswith(_bytes(self.prefix)) and key.endswith(_bytes(self.suffix))


TARGETS: Form[tuple[Target, ...]] = Form("notification", msgspec.json.Decoder(tuple[Target, ...]).decode)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@dataclasses.dataclass(frozen=True, slots=True)
class Happened:
    """Something that happened to an object. ``record``: the version, where it is still (or now) there."""

    event: str
    """Without ``s3:``, e.g. ``ObjectCreated:Put``."""
    key: bytes
    version_id: str = ""
    record: ObjectRecord | None = None


def notices(
    bucket: BucketRecord, happened: Happened, origin: Origin | None, sequence: int, now_ns: int
) -> Iterator[tuple[str, bytes]]:
    """(endpoint, JSON document) for each target that wants to know."""
    for target in TARGETS.of(bucket) or ():
        if target.wants(happened.event, happened.key):
            yield target.name, _document(bucket, target, happened, origin, sequence, now_ns)


def test_events(bucket: BucketRecord, origin: Origin | None, now_ns: int) -> Iterator[tuple[str, bytes]]:
    """What each target of a new configuration gets first."""
    for target in TARGETS.of(bucket) or ():
        event = {
            "Service": "Amazon S3",
            "Event": "s3:TestEvent",
            "Time": _iso(now_ns),
            "Bucket": bucket.name,
            "RequestId": origin.request_id if origin else "",
            "HostId": origin.host_id if origin else "",
        }
        yield target.name, msgspec.json.encode(event)


def _document(
    bucket: BucketRecord, target: Target, happened: Happened, origin: Origin | None, sequence: int, now_ns: int
) -> bytes:
    record = happened.record
    item: dict[str, object] = {"key": quote_plus(happened.key, safe="/")}
    if record is not None and not record.delete_marker:
        item |= {"size": record.length, "eTag": record.etag}
    if happened.version_id not in ("", NULL_VERSION):
        item["versionId"] = happened.version_id
    item["sequencer"] = f"{sequence:018X}"
    user = origin.user if origin else record.owner if record else bucket.owner
    event: dict[str, object] = {
        "eventVersion": _VERSIONS.get(happened.event.partition(":")[0], "2.1"),
        "eventSource": "aws:s3",
        "awsRegion": bucket.region or "us-east-1",
        "eventTime": _iso(now_ns),
        "eventName": happened.event,
        "userIdentity": {"principalId": user},
        "requestParameters": {"sourceIPAddress": origin.address if origin else ""},
        "responseElements": {
            "x-amz-request-id": origin.request_id if origin else "",
            "x-amz-id-2": origin.host_id if origin else "",
        },
        "s3": {
            "s3SchemaVersion": "1.0",
            "configurationId": target.id,
            "bucket": {
                "name": bucket.name,
                "ownerIdentity": {"principalId": bucket.owner},
                "arn": f"arn:aws:s3:::{bucket.name}",
            },
            "object": item,
        },
    }
    if record is not None and record.attributes.restored_until_ns and happened.event.startswith("ObjectRestore"):
        restore = {
            "lifecycleRestorationExpiryTime": _iso(record.attributes.restored_until_ns),
            "lifecycleRestoreStorageClass": record.attributes.storage_class,
        }
        event["glacierEventData"] = {"restoreEventData": restore}
    return msgspec.json.encode({"Records": [event]})


def _iso(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1_000_000:03d}Z"
