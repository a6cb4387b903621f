"""Tags and storage classes of objects, and restoring what is only in the archive."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from ingest import clock
from ingest.records import ArchiveCopy
from s3api.call import ServiceSettings
from tests.s3api.conftest import CheckingHost, NodeThread, s3_client, write_certificate

DAY_S = 86400


def refused(call: Any, **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def read(s3: Any, **of: str) -> Any:
    """The answer to a GET, its body read."""
    answer = s3.get_object(**of)
    answer["Body"].read()
    return answer


def tag_set(**tags: str) -> dict[str, Any]:
    return {"TagSet": [{"Key": name, "Value": value} for name, value in tags.items()]}


def tags_of(s3: Any, bucket: str, key: str) -> dict[str, str]:
    return {row["Key"]: row["Value"] for row in s3.get_object_tagging(Bucket=bucket, Key=key)["TagSet"]}


def test_tags_of_an_object(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x", Tagging="sample=lysozyme%20A&run=1")
    assert tags_of(s3, bucket, "k") == {"sample": "lysozyme A", "run": "1"}
    assert s3.head_object(Bucket=bucket, Key="k")["ResponseMetadata"]["HTTPHeaders"]["x-amz-tagging-count"] == "2"
    assert read(s3, Bucket=bucket, Key="k")["TagCount"] == 2
    s3.put_object_tagging(Bucket=bucket, Key="k", Tagging=tag_set(sample="ß"))
    assert tags_of(s3, bucket, "k") == {"sample": "ß"}
    s3.put_object_tagging(Bucket=bucket, Key="k", VersionId="null", Tagging=tag_set(sample="b"))
    s3.delete_object_tagging(Bucket=bucket, Key="k")
    assert tags_of(s3, bucket, "k") == {}
    assert "TagCount" not in read(s3, Bucket=bucket, Key="k")
    s3.put_object(Bucket=bucket, Key="k", Body=b"x", Tagging="a=b")
    s3.put_object(Bucket=bucket, Key="k", Body=b"y")
    assert tags_of(s3, bucket, "k") == {}
    assert refused(s3.get_object_tagging, Bucket=bucket, Key="gone") == (404, "NoSuchKey")
    assert refused(s3.put_object_tagging, Bucket=bucket, Key="gone", Tagging=tag_set(a="b")) == (404, "NoSuchKey")


def test_copies_and_uploads_have_tags(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x", Tagging="a=1")
    source = {"Bucket": bucket, "Key": "k"}
    s3.copy_object(Bucket=bucket, Key="kept", CopySource=source, Tagging="b=2")
    s3.copy_object(Bucket=bucket, Key="new", CopySource=source, Tagging="b=2", TaggingDirective="REPLACE")
    assert (tags_of(s3, bucket, "kept"), tags_of(s3, bucket, "new")) == ({"a": "1"}, {"b": "2"})
    upload = s3.create_multipart_upload(Bucket=bucket, Key="m", Tagging="c=3", StorageClass="STANDARD_IA")["UploadId"]
    of = {"Bucket": bucket, "Key": "m", "UploadId": upload}
    part = s3.upload_part(**of, PartNumber=1, Body=b"p")
    assert s3.list_parts(**of)["StorageClass"] == "STANDARD_IA"
    s3.complete_multipart_upload(**of, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    assert tags_of(s3, bucket, "m") == {"c": "3"}
    assert s3.head_object(Bucket=bucket, Key="m")["StorageClass"] == "STANDARD_IA"


MANY = {f"k{number}": "v" for number in range(10)}


@pytest.mark.parametrize(
    ("tags", "fine"),
    [
        (MANY, True),
        (MANY | {"one": "more"}, False),
        ({"k" * 128: "v" * 256}, True),
        ({"k" * 129: "v"}, False),
        ({"k": "v" * 257}, False),
        ({"a b+-=._:/@ü": ""}, True),
        ({"k<": "v"}, False),
        ({"k": "v{"}, False),
        ({"aws:x": "v"}, False),
    ],
)
def test_limits_of_tags(s3: Any, bucket: str, tags: dict[str, str], fine: bool) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"")
    if fine:
        s3.put_object_tagging(Bucket=bucket, Key="k", Tagging=tag_set(**tags))
        assert tags_of(s3, bucket, "k") == tags
    else:
        given = {"Bucket": bucket, "Key": "k", "Tagging": tag_set(**tags)}
        assert refused(s3.put_object_tagging, **given) == (400, "InvalidTag")


def test_storage_classes_are_kept_and_told(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="ia", Body=b"x", StorageClass="ONEZONE_IA")
    assert read(s3, Bucket=bucket, Key="ia")["StorageClass"] == "ONEZONE_IA"
    assert s3.list_objects_v2(Bucket=bucket)["Contents"][0]["StorageClass"] == "ONEZONE_IA"
    s3.copy_object(Bucket=bucket, Key="ia", CopySource={"Bucket": bucket, "Key": "ia"}, StorageClass="STANDARD")
    assert "StorageClass" not in s3.head_object(Bucket=bucket, Key="ia")
    assert refused(s3.put_object, Bucket=bucket, Key="k", Body=b"", StorageClass="COLDER") == (
        400,
        "InvalidStorageClass",
    )


# -- restore: with a clock of its own, so that days pass for nobody else


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeThread]:
    node = NodeThread(tmp_path_factory.mktemp("timed") / "node", ServiceSettings(), CheckingHost())  # type: ignore[arg-type]
    write_certificate(node.certificate)
    node.paths.create()
    clock.create(node.paths)
    node.start()
    yield node
    node.stop()


@pytest.fixture
def cold(timed: NodeThread) -> Iterator[tuple[NodeThread, Any, str]]:
    client = s3_client(timed, timed.add_user(f"u{secrets.token_hex(4)}", root=True))
    bucket = f"cold-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=bucket)
    yield timed, client, bucket
    client.close()


def archived(node: NodeThread, bucket: str, key: bytes) -> bytes:
    """What the drain does, up to the archive's confirmation; the version's object id."""

    async def work() -> bytes:
        await node.catalog.claim_drain(1000, 60)
        record = await node.catalog.head(bucket, key)
        copy = ArchiveCopy("posix", key.decode(), record.crc64nvme, node.catalog.now_ns())
        await node.catalog.drained(record.object_id, copy)
        return record.object_id

    return bytes(node.run(work()))


def due(node: NodeThread) -> set[bytes]:
    return {record.object_id for record in node.run(node.catalog.evictions_due(100))}


def test_life_of_an_object_of_the_archive(cold: tuple[NodeThread, Any, str]) -> None:
    node, s3, bucket = cold
    of = {"Bucket": bucket, "Key": "k"}
    s3.put_object(**of, Body=b"frames", StorageClass="GLACIER")
    assert refused(s3.get_object, **of) == (403, "InvalidObjectState")
    assert refused(s3.copy_object, Bucket=bucket, Key="c", CopySource=of) == (403, "InvalidObjectState")
    object_id = archived(node, bucket, b"k")
    extents = node.run(node.catalog.by_id(object_id)).extents
    assert object_id in due(node)
    node.run(node.catalog.evicted(object_id))
    assert object_id not in due(node)
    head = s3.head_object(**of)
    assert (head["StorageClass"], "Restore" in head) == ("GLACIER", False)

    assert refused(s3.restore_object, **of, RestoreRequest={"Days": 0}) == (400, "InvalidArgument")
    request = {"Days": 2, "GlacierJobParameters": {"Tier": "Bulk"}}
    assert s3.restore_object(**of, RestoreRequest=request)["ResponseMetadata"]["HTTPStatusCode"] == 202
    assert s3.head_object(**of)["Restore"] == 'ongoing-request="true"'
    asked = {"Bucket": bucket, "OptionalObjectAttributes": ["RestoreStatus"]}
    assert s3.list_objects_v2(**asked)["Contents"][0]["RestoreStatus"] == {"IsRestoreInProgress": True}
    assert "RestoreStatus" not in s3.list_objects_v2(Bucket=bucket)["Contents"][0]
    assert refused(s3.get_object, **of) == (403, "InvalidObjectState")
    assert refused(s3.restore_object, **of, RestoreRequest=request) == (409, "RestoreAlreadyInProgress")
    assert [record.object_id for record in node.run(node.catalog.recalls(10))] == [object_id]
    node.run(node.catalog.recalled(object_id, extents))
    assert s3.list_objects_v2(**asked)["Contents"][0]["RestoreStatus"]["RestoreExpiryDate"]
    restored = read(s3, **of)
    assert restored["StorageClass"] == "GLACIER"
    today = datetime.datetime.fromtimestamp(node.catalog.now_ns() / 1e9, datetime.UTC).date()
    until = today + datetime.timedelta(days=3)
    assert restored["Restore"] == f'ongoing-request="false", expiry-date="{until:%a, %d %b %Y} 00:00:00 GMT"'
    assert object_id not in due(node)
    assert object_id not in {record.object_id for record in node.run(node.catalog.evictable(1000))}

    assert s3.restore_object(**of, RestoreRequest={"Days": 5})["ResponseMetadata"]["HTTPStatusCode"] == 200
    clock.advance(node.paths, 4 * DAY_S)
    assert read(s3, **of)["Restore"].startswith('ongoing-request="false"')
    clock.advance(node.paths, 2 * DAY_S)
    assert refused(s3.get_object, **of) == (403, "InvalidObjectState")
    assert "Restore" not in s3.head_object(**of)
    assert object_id in due(node)


def test_what_is_not_archived_cannot_be_restored(cold: tuple[NodeThread, Any, str]) -> None:
    _, s3, bucket = cold
    s3.put_object(Bucket=bucket, Key="warm", Body=b"x")
    given = {"Bucket": bucket, "RestoreRequest": {"Days": 1}}
    assert refused(s3.restore_object, Key="warm", **given) == (403, "InvalidObjectState")
    assert refused(s3.restore_object, Key="gone", **given) == (404, "NoSuchKey")


def test_a_restore_that_failed_can_be_asked_for_again(cold: tuple[NodeThread, Any, str]) -> None:
    node, s3, bucket = cold
    of = {"Bucket": bucket, "Key": "k"}
    s3.put_object(**of, Body=b"frames", StorageClass="DEEP_ARCHIVE")
    object_id = archived(node, bucket, b"k")
    node.run(node.catalog.evicted(object_id))
    for _ in range(2):
        s3.restore_object(**of, RestoreRequest={"Days": 1})
        assert s3.head_object(**of)["Restore"] == 'ongoing-request="true"'
        node.run(node.catalog.recall_failed(object_id, "tape is stuck"))
        assert "Restore" not in s3.head_object(**of)


def test_a_bucket_that_does_not_recall_on_reading(cold: tuple[NodeThread, Any, str]) -> None:
    node, s3, bucket = cold
    s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": "hiss.recall", "Value": "never"}]})
    of = {"Bucket": bucket, "Key": "k"}
    s3.put_object(**of, Body=b"frames")
    object_id = archived(node, bucket, b"k")
    extents = node.run(node.catalog.by_id(object_id)).extents
    node.run(node.catalog.evicted(object_id))
    assert s3.head_object(**of)["StorageClass"] == "GLACIER"
    assert refused(s3.get_object, **of) == (403, "InvalidObjectState")
    s3.restore_object(**of, RestoreRequest={"Days": 1})
    node.run(node.catalog.recalled(object_id, extents))
    head = s3.head_object(**of)
    assert ("StorageClass" in head, head["Restore"][:23]) == (False, 'ongoing-request="false"')
    clock.advance(node.paths, 3 * DAY_S)
    assert object_id in due(node)
