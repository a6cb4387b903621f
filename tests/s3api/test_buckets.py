"""Buckets, their tags and settings, and who may do what to them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from botocore.exceptions import ClientError

from ingest.records import Grant
from s3api.operations.buckets import valid_name

Raw = Callable[..., httpx.Response]
Code = Callable[[httpx.Response], str]


def refused(call: Callable[..., object], **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def test_life_of_a_bucket(s3: Any) -> None:
    name = f"life-{secrets.token_hex(4)}"
    assert s3.create_bucket(Bucket=name)["Location"] == f"/{name}"
    assert refused(s3.create_bucket, Bucket=name) == (409, "BucketAlreadyOwnedByYou")
    assert s3.head_bucket(Bucket=name)["BucketRegion"] == "us-east-1"
    assert name in [row["Name"] for row in s3.list_buckets()["Buckets"]]
    s3.put_object(Bucket=name, Key="k", Body=b"")
    assert refused(s3.delete_bucket, Bucket=name) == (409, "BucketNotEmpty")
    s3.delete_object(Bucket=name, Key="k")
    s3.delete_bucket(Bucket=name)
    assert refused(s3.head_bucket, Bucket=name) == (404, "404")
    assert refused(s3.delete_bucket, Bucket=name) == (404, "NoSuchBucket")


def test_bucket_of_another_region(s3: Any) -> None:
    name = f"region-{secrets.token_hex(4)}"
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    assert s3.get_bucket_location(Bucket=name)["LocationConstraint"] is None


@pytest.mark.parametrize(
    ("name", "valid"),
    [("abc", True), ("a.b-c1", True), ("a" * 63, True), ("ab", False), ("a" * 64, False), ("Abc", False),
     ("a_b", False), ("-ab", False), ("ab-", False), ("a..b", False), ("1.2.3.4", False), ("xn--abc", False),
     ("abc-s3alias", False), ("abc\n", False), ("a.-b", False), ("a-.b", False)],
)  # fmt: skip
def test_names(name: str, valid: bool) -> None:
    assert valid_name(name) is valid


def test_a_bad_name_is_refused(raw: Raw, code_of: Code) -> None:
    assert code_of(raw("PUT", "/No_Bucket")) == "InvalidBucketName"


def test_pages_of_buckets(s3: Any) -> None:
    prefix = f"page-{secrets.token_hex(4)}-"
    names = [f"{prefix}{number}" for number in range(3)]
    for name in names:
        s3.create_bucket(Bucket=name)
    pages = s3.get_paginator("list_buckets").paginate(Prefix=prefix, PaginationConfig={"PageSize": 2})
    assert [row["Name"] for page in pages for row in page["Buckets"]] == names


def test_unversioned(s3: Any, bucket: str) -> None:
    assert "Status" not in s3.get_bucket_versioning(Bucket=bucket)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "?website"), ("PUT", "?whatever-comes-next"),
        ("GET", "/k?torrent"), ("POST", "/k?select&select-type=2"),
        ("PUT", "/k?uploadId=1"), ("PUT", "/k?new-thing"),
    ],
)  # fmt: skip
def test_subresources_that_are_not_there(raw: Raw, code_of: Code, s3: Any, bucket: str, method: str, path: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"kept")
    answer = raw(method, f"/{bucket}{path}", b"x" if method in ("PUT", "POST") else b"")
    assert (answer.status_code, code_of(answer)) == (501, "NotImplemented")
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"kept"


@pytest.mark.parametrize(("method", "path"), [("PATCH", "/k"), ("POST", "/k"), ("DELETE", "")])
def test_methods_that_are_not_there(raw: Raw, code_of: Code, bucket: str, method: str, path: str) -> None:
    target = f"/{bucket}{path}" if path else "/"
    answer = raw(method, target)
    assert (answer.status_code, code_of(answer)) == (405, "MethodNotAllowed")
    assert answer.headers["allow"] == ("DELETE, GET, HEAD, PUT" if path else "GET, POST")


# -- tags and settings


def tag_set(**tags: str) -> dict[str, Any]:
    return {"TagSet": [{"Key": name.replace("_", "."), "Value": value} for name, value in tags.items()]}


def tags_of(s3: Any, bucket: str) -> dict[str, str]:
    return {row["Key"]: row["Value"] for row in s3.get_bucket_tagging(Bucket=bucket)["TagSet"]}


def test_settings_are_tags_that_stay(s3: Any, bucket: str) -> None:
    assert refused(s3.get_bucket_tagging, Bucket=bucket) == (404, "NoSuchTagSet")
    s3.put_bucket_tagging(Bucket=bucket, Tagging=tag_set(proposal="4711", hiss_durability="memory"))
    s3.put_bucket_tagging(Bucket=bucket, Tagging=tag_set(sample="lysozyme"))
    assert tags_of(s3, bucket) == {"sample": "lysozyme", "hiss.durability": "memory"}
    s3.delete_bucket_tagging(Bucket=bucket)
    assert tags_of(s3, bucket) == {"hiss.durability": "memory"}
    s3.put_bucket_tagging(Bucket=bucket, Tagging=tag_set(hiss_durability="default"))
    assert refused(s3.get_bucket_tagging, Bucket=bucket) == (404, "NoSuchTagSet")


@pytest.mark.parametrize(
    ("tagging", "hint"),
    [
        (tag_set(hiss_durabilty="memory"), "hiss.durability"),
        (tag_set(hiss_durability="paper"), "memory or disk"),
        ({"TagSet": [{"Key": "a", "Value": "1"}, {"Key": "a", "Value": "2"}]}, "more than one"),
        ({"TagSet": [{"Key": f"t{number}", "Value": ""} for number in range(51)]}, "50"),
        ({"TagSet": [{"Key": "aws:x", "Value": ""}]}, "System"),
    ],
)
def test_bad_tags_say_why(s3: Any, bucket: str, tagging: dict[str, Any], hint: str) -> None:
    with pytest.raises(ClientError) as caught:
        s3.put_bucket_tagging(Bucket=bucket, Tagging=tagging)
    error = caught.value.response["Error"]
    assert error["Code"] == "InvalidTag"
    assert hint in error["Message"]


def test_memory_objects_read_back(s3: Any, bucket: str) -> None:
    s3.put_bucket_tagging(Bucket=bucket, Tagging=tag_set(hiss_durability="memory"))
    for size in (10, 1_000_000):
        s3.put_object(Bucket=bucket, Key=f"{size}", Body=b"m" * size)
        assert s3.get_object(Bucket=bucket, Key=f"{size}")["Body"].read() == b"m" * size


# -- grants


@pytest.fixture
def as_user(node: Any, make_client: Callable[..., Any]) -> Callable[..., Any]:
    def make(*grants: Grant) -> Any:
        return make_client(node.add_user(f"user-{secrets.token_hex(4)}", *grants))

    return make


def test_reader(s3: Any, bucket: str, as_user: Callable[..., Any]) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x")
    user = as_user(Grant(bucket, "", "read"))
    assert user.get_object(Bucket=bucket, Key="k")["Body"].read() == b"x"
    assert user.list_objects_v2(Bucket=bucket)["KeyCount"] == 1
    assert [row["Name"] for row in user.list_buckets()["Buckets"]] == [bucket]
    for call, extra in (
        (user.put_object, {"Key": "k", "Body": b"y"}),
        (user.delete_object, {"Key": "k"}),
        (user.create_multipart_upload, {"Key": "k"}),
        (user.put_bucket_tagging, {"Tagging": tag_set(a="b")}),
        (user.delete_bucket, {}),
    ):
        assert refused(call, Bucket=bucket, **extra) == (403, "AccessDenied")


def test_writer_of_a_prefix(s3: Any, bucket: str, as_user: Callable[..., Any]) -> None:
    user = as_user(Grant("test-*", "raw/", "write"))
    user.put_object(Bucket=bucket, Key="raw/1", Body=b"x")
    assert user.list_objects_v2(Bucket=bucket, Prefix="raw/")["KeyCount"] == 1
    user.head_bucket(Bucket=bucket)
    s3.put_object(Bucket=bucket, Key="other", Body=b"x")
    assert refused(user.put_object, Bucket=bucket, Key="other", Body=b"y") == (403, "AccessDenied")
    assert refused(user.get_object, Bucket=bucket, Key="other") == (403, "AccessDenied")
    assert refused(user.list_objects_v2, Bucket=bucket) == (403, "AccessDenied")
    assert refused(user.create_bucket, Bucket="test-new") == (403, "AccessDenied")
    source = {"Bucket": bucket, "Key": "other"}
    assert refused(user.copy_object, Bucket=bucket, Key="raw/2", CopySource=source) == (403, "AccessDenied")
    answer = user.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "raw/1"}, {"Key": "other"}]})
    assert [row["Key"] for row in answer["Deleted"]] == ["raw/1"]
    assert [(row["Key"], row["Code"]) for row in answer["Errors"]] == [("other", "AccessDenied")]


def test_administrator_of_a_glob(as_user: Callable[..., Any]) -> None:
    prefix = f"scan-{secrets.token_hex(4)}"
    user = as_user(Grant(f"{prefix}*", "", "admin"))
    user.create_bucket(Bucket=f"{prefix}-1")
    user.put_bucket_tagging(Bucket=f"{prefix}-1", Tagging=tag_set(hiss_etag="md5"))
    user.delete_bucket(Bucket=f"{prefix}-1")
    assert refused(user.create_bucket, Bucket="elsewhere") == (403, "AccessDenied")


def test_buckets_of_others_are_closed(bucket: str, as_user: Callable[..., Any]) -> None:
    user = as_user(Grant("mine-*", "", "admin"))
    assert user.list_buckets()["Buckets"] == []
    assert refused(user.head_bucket, Bucket=bucket) == (403, "403")
    assert refused(user.get_object, Bucket=bucket, Key="k") == (403, "AccessDenied")
    assert refused(user.head_bucket, Bucket="does-not-exist") == (404, "404")
    assert refused(user.get_object, Bucket="does-not-exist", Key="k") == (404, "NoSuchBucket")


def test_a_name_another_user_owns(bucket: str, as_user: Callable[..., Any]) -> None:
    user = as_user(Grant("*", "", "admin"))
    assert refused(user.create_bucket, Bucket=bucket) == (409, "BucketAlreadyExists")


def test_expected_owner(s3: Any, bucket: str) -> None:
    s3.head_bucket(Bucket=bucket, ExpectedBucketOwner="root")
    assert refused(s3.list_objects_v2, Bucket=bucket, ExpectedBucketOwner="other") == (403, "AccessDenied")


def test_a_disabled_user_is_refused_at_once(node: Any, make_client: Callable[..., Any], bucket: str) -> None:
    keys = node.add_user("leaver", Grant("*", "", "read"))
    user = make_client(keys)
    user.head_bucket(Bucket=bucket)
    (record,) = [user for user in node.run(node.catalog.users()) if keys[0] in {key.access_key for key in user.keys}]
    node.run(node.catalog.put_user(msgspec.structs.replace(record, enabled=False)))
    assert refused(user.head_bucket, Bucket=bucket) == (403, "403")
