"""Lifecycle configurations through the API: what is taken and given back, what is refused, and what answers say of them."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

MIDNIGHT = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
RULES: list[dict[str, Any]] = [
    {"ID": "old", "Prefix": "logs/", "Status": "Enabled", "Expiration": {"Days": 3}},
    {"ID": "all", "Filter": {"Prefix": ""}, "Status": "Disabled", "Expiration": {"Date": MIDNIGHT}},
    {"ID": "tag", "Filter": {"Tag": {"Key": "a", "Value": "b"}}, "Status": "Enabled", "Expiration": {"Days": 1}},
    {
        "ID": "and",
        "Filter": {"And": {"Prefix": "raw/", "Tags": [{"Key": "a", "Value": "b"}, {"Key": "c", "Value": ""}],
                           "ObjectSizeGreaterThan": 0, "ObjectSizeLessThan": 1000}},
        "Status": "Enabled",
        "Expiration": {"Days": 60},
        "Transitions": [{"Days": 30, "StorageClass": "STANDARD_IA"}, {"Days": 31, "StorageClass": "GLACIER"}],
    },
    {
        "ID": "versions",
        "Filter": {},
        "Status": "Enabled",
        "Expiration": {"ExpiredObjectDeleteMarker": True},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 2, "NewerNoncurrentVersions": 3},
        "NoncurrentVersionTransitions": [{"NoncurrentDays": 1, "StorageClass": "DEEP_ARCHIVE"}],
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
    },
]  # fmt: skip


def put(s3: Any, bucket: str, *rules: dict[str, Any]) -> Any:
    return s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": list(rules)})


def test_rules_come_back_as_they_were_put(s3: Any, bucket: str) -> None:
    put(s3, bucket, *RULES)
    found = s3.get_bucket_lifecycle_configuration(Bucket=bucket)
    expected = [*RULES[:4], RULES[4] | {"Filter": {"Prefix": ""}}]
    assert found["Rules"] == expected
    assert found["TransitionDefaultMinimumObjectSize"] == "all_storage_classes_128K"
    s3.delete_bucket_lifecycle(Bucket=bucket)
    with pytest.raises(ClientError, match="NoSuchLifecycleConfiguration"):
        s3.get_bucket_lifecycle_configuration(Bucket=bucket)


def test_a_rule_without_a_name_gets_one(s3: Any, bucket: str) -> None:
    put(s3, bucket, {"Prefix": "a", "Status": "Enabled", "Expiration": {"Days": 1}})
    assert s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"][0]["ID"]


DAY = {"Expiration": {"Days": 1}}
FINE = {"ID": "x", "Filter": {}, "Status": "Enabled"}


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ([FINE], "InvalidRequest"),
        ([FINE | {"Expiration": {"Days": 0}}], "InvalidArgument"),
        ([FINE | {"Expiration": {"Days": -1}}], "InvalidArgument"),
        ([FINE | {"Expiration": {"Date": MIDNIGHT + datetime.timedelta(hours=1)}}], "InvalidArgument"),
        ([FINE | {"Expiration": {"Date": MIDNIGHT, "Days": 3}}], "MalformedXML"),
        ([FINE | DAY, FINE | DAY], "InvalidArgument"),
        ([FINE | DAY | {"ID": "i" * 256}], "InvalidArgument"),
        ([FINE | DAY | {"Status": "enabled"}], "MalformedXML"),
        ([{"ID": "x", "Status": "Enabled"} | DAY], "MalformedXML"),
        ([FINE | DAY | {"Prefix": "both"}], "MalformedXML"),
        ([], "MalformedXML"),
        ([FINE | DAY | {"ID": f"{number}"} for number in range(1001)], "MalformedXML"),
        ([FINE | DAY | {"Transitions": [{"Days": 1, "StorageClass": "GLACIER"}]}], "InvalidArgument"),
        ([FINE | {"Transitions": [{"Days": 1, "StorageClass": "STANDARD"}]}], "MalformedXML"),
        ([FINE | {"Transitions": [{"Days": 29, "StorageClass": "ONEZONE_IA"}]}], "InvalidArgument"),
        ([FINE | {"Transitions": [{"Days": -1, "StorageClass": "GLACIER"}]}], "InvalidArgument"),
        ([FINE | DAY | {"Transitions": [{"Date": MIDNIGHT, "StorageClass": "GLACIER"}]}], "InvalidRequest"),
        ([FINE | {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 0}}], "InvalidArgument"),
        ([FINE | {"Filter": {"Tag": {"Key": "a", "Value": "b"}},
                  "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}}], "InvalidRequest"),
        ([FINE | {"Filter": {"And": {"Tags": [{"Key": "a", "Value": "b"}, {"Key": "a", "Value": "c"}]}}} | DAY],
         "InvalidRequest"),
        ([FINE | {"Filter": {"And": {"ObjectSizeGreaterThan": 5, "ObjectSizeLessThan": 5}}} | DAY], "InvalidRequest"),
        ([FINE | {"NoncurrentVersionExpiration": {"NoncurrentDays": 1, "NewerNoncurrentVersions": 101}}], "InvalidArgument"),
    ],
)  # fmt: skip
def test_wrong_rules_are_refused(s3: Any, bucket: str, rules: list[dict[str, Any]], code: str) -> None:
    with pytest.raises(ClientError) as refusal:
        put(s3, bucket, *rules)
    assert refusal.value.response["Error"]["Code"] == code
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_answers_say_when_an_object_expires(s3: Any, bucket: str, raw: Callable[..., httpx.Response]) -> None:
    put(s3, bucket, {"ID": "öld & cold", "Filter": {"Prefix": "k"}, "Status": "Enabled", "Expiration": {"Days": 2}},
        {"ID": "later", "Filter": {}, "Status": "Enabled", "Expiration": {"Days": 9}})  # fmt: skip
    day = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=3)
    expected = f'expiry-date="{day:%a, %d %b %Y} 00:00:00 GMT", rule-id="%C3%B6ld%20%26%20cold"'
    of = {"Bucket": bucket, "Key": "k"}
    assert s3.put_object(**of, Body=b"x")["Expiration"] == expected
    assert s3.head_object(**of)["Expiration"] == expected
    assert raw("GET", f"/{bucket}/k").headers["x-amz-expiration"] == expected
    copied = s3.copy_object(Bucket=bucket, Key="other", CopySource=of)
    assert 'rule-id="later"' in copied["Expiration"]


def test_answers_say_when_an_upload_is_aborted(s3: Any, bucket: str) -> None:
    put(s3, bucket, RULES[4])
    upload = s3.create_multipart_upload(Bucket=bucket, Key="k")
    assert upload["AbortRuleId"] == "versions"
    parts = s3.list_parts(Bucket=bucket, Key="k", UploadId=upload["UploadId"])
    assert parts["AbortDate"] == upload["AbortDate"] > datetime.datetime.now(datetime.UTC)
