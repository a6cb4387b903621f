"""Bucket notifications: configurations, and the events that requests leave for the deliverer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from ingest.records import ArchiveCopy
from s3api.call import ServiceSettings
from tests.s3api.conftest import CheckingHost, NodeThread, s3_client, write_certificate

ARN = "arn:hiss:sqs:::beamline"


@pytest.fixture(scope="module")
def reporting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeThread]:
    settings = ServiceSettings(notification_endpoints=frozenset({"beamline", "other"}), host_id="bm9kZQ==")
    node = NodeThread(tmp_path_factory.mktemp("reporting") / "node", settings, CheckingHost())  # type: ignore[arg-type]
    write_certificate(node.certificate)
    node.start()
    yield node
    node.stop()


class Bucket:
    def __init__(self, node: NodeThread, s3: Any, name: str) -> None:
        self.node, self.s3, self.name = node, s3, name

    def configure(self, *events: str, **filters: str) -> None:
        rules = [{"Name": name, "Value": value} for name, value in filters.items()]
        queue = {"Id": "q", "QueueArn": ARN, "Events": list(events), "Filter": {"Key": {"FilterRules": rules}}}
        self.put(QueueConfigurations=[queue])
        assert [event["Event"] for event in self.taken()] == ["s3:TestEvent"]

    def put(self, **configuration: Any) -> None:
        self.s3.put_bucket_notification_configuration(Bucket=self.name, NotificationConfiguration=configuration)

    def taken(self) -> list[dict[str, Any]]:
        """Events that wait, as a deliverer takes them."""
        catalog = self.node.catalog
        page = self.node.run(catalog.notices("beamline", 1000))
        self.node.run(catalog.noticed([sequence for sequence, _ in page]))
        return [json.loads(event) for _, event in page]

    def records(self) -> list[dict[str, Any]]:
        return [record for event in self.taken() for record in event["Records"]]

    def happened(self) -> list[tuple[str, str]]:
        return [(record["eventName"], record["s3"]["object"]["key"]) for record in self.records()]


@pytest.fixture
def bucket(reporting: NodeThread) -> Iterator[Bucket]:
    client = s3_client(reporting, reporting.add_user(f"u{secrets.token_hex(4)}", root=True))
    name = f"events-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=name)
    yield Bucket(reporting, client, name)
    client.close()


def test_a_configuration_comes_back(bucket: Bucket) -> None:
    def stored() -> dict[str, Any]:
        found = bucket.s3.get_bucket_notification_configuration(Bucket=bucket.name)
        del found["ResponseMetadata"]
        return dict(found)

    assert stored() == {}
    rules = [{"Name": "prefix", "Value": "raw/"}, {"Name": "suffix", "Value": ".h5"}]
    given: dict[str, Any] = {
        "TopicConfigurations": [{"Id": "t", "TopicArn": "arn:aws:sns:us-east-1:1:beamline",
                                 "Events": ["s3:ObjectCreated:*"], "Filter": {"Key": {"FilterRules": rules}}}],
        "QueueConfigurations": [{"Id": "q", "QueueArn": ARN, "Events": ["s3:ObjectRemoved:Delete", "s3:ObjectTagging:*"]}],
        "LambdaFunctionConfigurations": [{"Id": "l", "LambdaFunctionArn": "arn:aws:lambda:us-east-1:1:function:other",
                                          "Events": ["s3:ObjectRestore:Completed"]}],
    }  # fmt: skip
    bucket.put(**given)
    assert stored() == given
    assert len(bucket.taken()) == 2
    bucket.put()
    assert stored() == {}


@pytest.mark.parametrize(
    "queue",
    [
        {"QueueArn": "arn:hiss:sqs:::nobody"},
        {"QueueArn": "arn:hiss:sns:::beamline"},
        {"QueueArn": "beamline"},
        {"Events": ["s3:ObjectCreated:Fetch"]},
        {"Filter": {"Key": {"FilterRules": [{"Name": "infix", "Value": "a"}]}}},
        {"Filter": {"Key": {"FilterRules": [{"Name": "prefix", "Value": "a"}, {"Name": "prefix", "Value": "b"}]}}},
    ],
)
def test_wrong_configurations_are_refused(bucket: Bucket, queue: dict[str, Any]) -> None:
    fine = {"QueueArn": ARN, "Events": ["s3:ObjectCreated:Put"]}
    with pytest.raises(ClientError, match="InvalidArgument"):
        bucket.put(QueueConfigurations=[fine | queue])
    overlapping = fine | {"Events": ["s3:ObjectCreated:*"]}
    with pytest.raises(ClientError, match="overlap"):
        bucket.put(QueueConfigurations=[fine, overlapping])
    assert bucket.taken() == []


def test_the_event_of_a_put(bucket: Bucket) -> None:
    bucket.configure("s3:ObjectCreated:*")
    put = bucket.s3.put_object(Bucket=bucket.name, Key="raw/a b+ü", Body=b"frames")
    (record,) = bucket.records()
    assert record["eventName"] == "ObjectCreated:Put"
    assert (record["eventVersion"], record["eventSource"], record["awsRegion"]) == ("2.1", "aws:s3", "us-east-1")
    assert record["requestParameters"]["sourceIPAddress"] == "127.0.0.1"
    assert record["responseElements"]["x-amz-request-id"] == put["ResponseMetadata"]["RequestId"]
    assert record["userIdentity"]["principalId"] == record["s3"]["bucket"]["ownerIdentity"]["principalId"]
    assert record["s3"]["configurationId"] == "q"
    assert record["s3"]["bucket"]["arn"] == f"arn:aws:s3:::{bucket.name}"
    item = record["s3"]["object"]
    assert (item["key"], item["size"], item["eTag"]) == ("raw/a+b%2B%C3%BC", 6, put["ETag"].strip('"'))
    bucket.s3.put_object(Bucket=bucket.name, Key="later", Body=b"")
    assert bucket.records()[0]["s3"]["object"]["sequencer"] > item["sequencer"]


def test_each_kind_of_event(bucket: Bucket) -> None:
    s3, of = bucket.s3, {"Bucket": bucket.name, "Key": "k"}
    bucket.configure("s3:ObjectCreated:*", "s3:ObjectRemoved:*", "s3:ObjectTagging:*", "s3:ObjectRestore:*")
    s3.put_object(**of, Body=b"x", StorageClass="GLACIER")
    assert bucket.happened() == [("ObjectCreated:Put", "k")]
    s3.put_object_tagging(**of, Tagging={"TagSet": [{"Key": "a", "Value": "b"}]})
    s3.delete_object_tagging(**of)
    assert bucket.happened() == [("ObjectTagging:Put", "k"), ("ObjectTagging:Delete", "k")]
    s3.put_object(Bucket=bucket.name, Key="warm", Body=b"x")
    s3.copy_object(Bucket=bucket.name, Key="copy", CopySource={"Bucket": bucket.name, "Key": "warm"})
    upload = s3.create_multipart_upload(Bucket=bucket.name, Key="m")["UploadId"]
    named = {"Bucket": bucket.name, "Key": "m", "UploadId": upload}
    part = s3.upload_part(**named, PartNumber=1, Body=b"p")
    s3.complete_multipart_upload(**named, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    created = [("Put", "warm"), ("Copy", "copy"), ("CompleteMultipartUpload", "m")]
    assert bucket.happened() == [(f"ObjectCreated:{name}", key) for name, key in created]
    s3.delete_object(Bucket=bucket.name, Key="copy")
    s3.delete_objects(Bucket=bucket.name, Delete={"Objects": [{"Key": "m"}, {"Key": "never-there"}]})
    s3.delete_object(Bucket=bucket.name, Key="copy")
    assert bucket.happened() == [("ObjectRemoved:Delete", "copy"), ("ObjectRemoved:Delete", "m")]


def test_restores_are_told(bucket: Bucket) -> None:
    catalog, of = bucket.node.catalog, {"Bucket": bucket.name, "Key": "k"}
    bucket.configure("s3:ObjectRestore:*")
    bucket.s3.put_object(**of, Body=b"x", StorageClass="GLACIER")

    async def archive() -> Any:
        await catalog.claim_drain(1000, 60)
        record = await catalog.head(bucket.name, b"k")
        await catalog.drained(record.object_id, ArchiveCopy("posix", "k", record.crc64nvme, 1))
        await catalog.evicted(record.object_id)
        return record

    record = bucket.node.run(archive())
    bucket.s3.restore_object(**of, RestoreRequest={"Days": 1})
    assert bucket.happened() == [("ObjectRestore:Post", "k")]
    bucket.node.run(catalog.recalled(record.object_id, record.extents))
    (event,) = bucket.records()
    assert event["eventName"] == "ObjectRestore:Completed"
    assert event["glacierEventData"]["restoreEventData"]["lifecycleRestoreStorageClass"] == "GLACIER"


def test_filters(bucket: Bucket) -> None:
    bucket.configure("s3:ObjectCreated:Put", prefix="raw/", suffix=".h5")
    for key in ("raw/a.h5", "raw/a.txt", "a.h5", "raw/b.h5"):
        bucket.s3.put_object(Bucket=bucket.name, Key=key, Body=b"")
    bucket.s3.delete_object(Bucket=bucket.name, Key="raw/a.h5")
    assert bucket.happened() == [("ObjectCreated:Put", "raw/a.h5"), ("ObjectCreated:Put", "raw/b.h5")]
    bucket.put()
    bucket.s3.put_object(Bucket=bucket.name, Key="raw/c.h5", Body=b"")
    assert bucket.taken() == []
