"""Versioning over S3 with boto3: ids, delete markers, suspended buckets, listings, copies, and every refusal."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from tests.s3api.conftest import RawClient as Raw

Code = Callable[[httpx.Response], str]


def refused(operation: Any, **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        operation(**arguments)
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def switch(s3: Any, bucket: str, status: str) -> None:
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": status})


@pytest.fixture
def versioned(s3: Any, bucket: str) -> str:
    switch(s3, bucket, "Enabled")
    return bucket


def put(s3: Any, bucket: str, key: str, *bodies: bytes) -> list[str]:
    return [s3.put_object(Bucket=bucket, Key=key, Body=body)["VersionId"] for body in bodies]


def listed(s3: Any, bucket: str, **arguments: Any) -> list[tuple[str, str, bool, bool]]:
    """(key, version id, is it the latest, is it a delete marker), keys in order, newest first."""
    answer = s3.list_object_versions(Bucket=bucket, **arguments)
    rows = [(row, False) for row in answer.get("Versions", [])] + [
        (row, True) for row in answer.get("DeleteMarkers", [])
    ]
    rows.sort(key=lambda row: (row[0]["Key"], -row[0]["LastModified"].timestamp()))
    return [(row["Key"], row["VersionId"], row["IsLatest"], marker) for row, marker in rows]


def test_status(s3: Any, raw: Raw, code_of: Code, bucket: str) -> None:
    assert "Status" not in s3.get_bucket_versioning(Bucket=bucket)
    for status in ("Enabled", "Suspended", "Enabled"):
        switch(s3, bucket, status)
        assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == status
    mfa = {"Status": "Enabled", "MFADelete": "Enabled"}
    assert refused(s3.put_bucket_versioning, Bucket=bucket, VersioningConfiguration=mfa) == (501, "NotImplemented")
    for body, code in (
        (b"<VersioningConfiguration/>", "IllegalVersioningConfigurationException"),
        (b"<VersioningConfiguration><Status>On</Status></VersioningConfiguration>", "MalformedXML"),
        (b"<Other/>", "MalformedXML"),
    ):
        answer = raw("PUT", f"/{bucket}?versioning", body)
        assert (answer.status_code, code_of(answer)) == (400, code)


def test_a_put_makes_a_version_and_each_can_be_read(s3: Any, versioned: str) -> None:
    one, two = put(s3, versioned, "k", b"one", b"two!")
    assert len({one, two, "null"}) == 3
    got = s3.get_object(Bucket=versioned, Key="k")
    assert (got["VersionId"], got["Body"].read()) == (two, b"two!")
    got = s3.get_object(Bucket=versioned, Key="k", VersionId=one)
    assert (got["VersionId"], got["Body"].read()) == (one, b"one")
    head = s3.head_object(Bucket=versioned, Key="k", VersionId=one)
    assert (head["VersionId"], head["ContentLength"]) == (one, 3)
    attributes = s3.get_object_attributes(
        Bucket=versioned, Key="k", VersionId=one, ObjectAttributes=["ETag", "ObjectSize", "StorageClass", "Checksum"]
    )
    assert attributes["VersionId"] == one
    assert f'"{attributes["ETag"]}"' == head["ETag"]
    assert (attributes["ObjectSize"], attributes["StorageClass"]) == (3, "STANDARD")
    assert attributes["Checksum"]["ChecksumType"] == "FULL_OBJECT"


def test_unversioned_answers_say_nothing_of_versions(s3: Any, bucket: str) -> None:
    assert "VersionId" not in s3.put_object(Bucket=bucket, Key="k", Body=b"1")
    assert "VersionId" not in s3.get_object(Bucket=bucket, Key="k")
    assert "VersionId" not in s3.delete_object(Bucket=bucket, Key="k")
    s3.put_object(Bucket=bucket, Key="k", Body=b"1")
    assert listed(s3, bucket) == [("k", "null", True, False)]


def test_delete_marker(s3: Any, raw: Raw, code_of: Code, versioned: str) -> None:
    (one,) = put(s3, versioned, "k", b"one")
    gone = s3.delete_object(Bucket=versioned, Key="k")
    assert gone["DeleteMarker"] is True
    marker = gone["VersionId"]
    answer = raw("GET", f"/{versioned}/k")
    assert (answer.status_code, code_of(answer)) == (404, "NoSuchKey")
    assert (answer.headers["x-amz-delete-marker"], answer.headers["x-amz-version-id"]) == ("true", marker)
    for method in ("GET", "HEAD"):
        answer = raw(method, f"/{versioned}/k?versionId={marker}")
        assert answer.status_code == 405
        assert (answer.headers["x-amz-delete-marker"], answer.headers["allow"]) == ("true", "DELETE")
        assert answer.headers["last-modified"]
    assert s3.get_object(Bucket=versioned, Key="k", VersionId=one)["Body"].read() == b"one"
    assert s3.list_objects_v2(Bucket=versioned)["KeyCount"] == 0
    assert listed(s3, versioned) == [("k", marker, True, True), ("k", one, False, False)]
    assert refused(s3.delete_bucket, Bucket=versioned) == (409, "BucketNotEmpty")
    again = s3.delete_object(Bucket=versioned, Key="k", VersionId=marker)
    assert (again["DeleteMarker"], again["VersionId"]) == (True, marker)
    assert s3.get_object(Bucket=versioned, Key="k")["VersionId"] == one
    taken = s3.delete_object(Bucket=versioned, Key="k", VersionId=one)
    assert (taken["VersionId"], "DeleteMarker" in taken) == (one, False)
    assert s3.delete_object(Bucket=versioned, Key="k", VersionId=one)["VersionId"] == one
    s3.delete_bucket(Bucket=versioned)


def test_a_marker_is_made_even_where_nothing_is(s3: Any, versioned: str) -> None:
    made = s3.delete_object(Bucket=versioned, Key="never")
    assert made["DeleteMarker"]
    assert listed(s3, versioned) == [("never", made["VersionId"], True, True)]


def test_the_null_version(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"before")
    switch(s3, bucket, "Enabled")
    assert s3.get_object(Bucket=bucket, Key="k")["VersionId"] == "null"
    (one,) = put(s3, bucket, "k", b"one")
    assert s3.get_object(Bucket=bucket, Key="k", VersionId="null")["Body"].read() == b"before"
    switch(s3, bucket, "Suspended")
    assert "VersionId" not in s3.put_object(Bucket=bucket, Key="k", Body=b"after")
    assert s3.head_object(Bucket=bucket, Key="k")["VersionId"] == "null"
    assert s3.get_object(Bucket=bucket, Key="k", VersionId="null")["Body"].read() == b"after"
    assert [row[1:] for row in listed(s3, bucket)] == [("null", True, False), (one, False, False)]
    gone = s3.delete_object(Bucket=bucket, Key="k")
    assert (gone["DeleteMarker"], gone["VersionId"]) == (True, "null")
    assert [row[1:] for row in listed(s3, bucket)] == [("null", True, True), (one, False, False)]
    s3.delete_object(Bucket=bucket, Key="k", VersionId="null")
    assert s3.get_object(Bucket=bucket, Key="k")["VersionId"] == one
    assert refused(s3.get_object, Bucket=bucket, Key="k", VersionId="null") == (404, "NoSuchVersion")


def test_writes_do_not_name_the_null_version(s3: Any, bucket: str) -> None:
    """PutObject's sample response for a bucket whose versioning is suspended has no x-amz-version-id."""
    switch(s3, bucket, "Suspended")
    assert "VersionId" not in s3.put_object(Bucket=bucket, Key="k", Body=b"1")
    assert "VersionId" not in s3.copy_object(Bucket=bucket, Key="copy", CopySource=f"{bucket}/k")
    upload = s3.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key="parts", UploadId=upload, PartNumber=1, Body=b"1")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    assert "VersionId" not in s3.complete_multipart_upload(
        Bucket=bucket, Key="parts", UploadId=upload, MultipartUpload=parts
    )
    assert {row[:2] for row in listed(s3, bucket)} == {(key, "null") for key in ("k", "copy", "parts")}
    assert s3.get_object(Bucket=bucket, Key="k")["VersionId"] == "null"


@pytest.mark.parametrize(
    ("version_id", "status", "code"),
    [("0" * 32, 404, "NoSuchVersion"), ("null", 404, "NoSuchVersion"), ("x", 400, "InvalidArgument"),
     ("", 400, "InvalidArgument"), ("F" * 32, 400, "InvalidArgument")],
)  # fmt: skip
def test_versions_that_are_not(
    s3: Any, raw: Raw, code_of: Code, versioned: str, version_id: str, status: int, code: str
) -> None:
    put(s3, versioned, "k", b"one")
    answer = raw("GET", f"/{versioned}/k?versionId={version_id}")
    assert (answer.status_code, code_of(answer)) == (status, code)
    answer = raw("DELETE", f"/{versioned}/k?versionId={version_id}")
    assert answer.status_code == (400 if status == 400 else 204)


def test_delete_objects(s3: Any, versioned: str) -> None:
    one, two = put(s3, versioned, "k", b"one", b"two")
    wanted = [{"Key": "k"}, {"Key": "k", "VersionId": one}, {"Key": "none"}, {"Key": "k", "VersionId": "bad"}]
    answer = s3.delete_objects(Bucket=versioned, Delete={"Objects": wanted})
    marker, version, other = answer["Deleted"]
    assert (marker["Key"], marker["DeleteMarker"], "VersionId" in marker) == ("k", True, False)
    assert version == {"Key": "k", "VersionId": one}
    assert (other["Key"], other["DeleteMarker"]) == ("none", True)
    (error,) = answer["Errors"]
    assert (error["Key"], error["VersionId"], error["Code"]) == ("k", "bad", "InvalidArgument")
    again = [{"Key": "k", "VersionId": marker["DeleteMarkerVersionId"]}]
    (back,) = s3.delete_objects(Bucket=versioned, Delete={"Objects": again})["Deleted"]
    assert back["DeleteMarker"]
    assert back["VersionId"] == back["DeleteMarkerVersionId"] == marker["DeleteMarkerVersionId"]
    assert s3.head_object(Bucket=versioned, Key="k")["VersionId"] == two


def test_multipart_and_copy_make_versions(s3: Any, versioned: str) -> None:
    upload = s3.create_multipart_upload(Bucket=versioned, Key="k")["UploadId"]
    part = s3.upload_part(Bucket=versioned, Key="k", UploadId=upload, PartNumber=1, Body=b"part")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    done = s3.complete_multipart_upload(Bucket=versioned, Key="k", UploadId=upload, MultipartUpload=parts)
    one = done["VersionId"]
    (two,) = put(s3, versioned, "k", b"two")
    source = {"Bucket": versioned, "Key": "k", "VersionId": one}
    copied = s3.copy_object(Bucket=versioned, Key="copy", CopySource=source)
    assert copied["CopySourceVersionId"] == one
    assert s3.get_object(Bucket=versioned, Key="copy", VersionId=copied["VersionId"])["Body"].read() == b"part"
    # An old version is brought back by a copy onto its own key.
    back = s3.copy_object(Bucket=versioned, Key="k", CopySource=source)
    assert s3.get_object(Bucket=versioned, Key="k")["Body"].read() == b"part"
    assert [row[1] for row in listed(s3, versioned, Prefix="k")] == [back["VersionId"], two, one]
    latest = {"Bucket": versioned, "Key": "k"}
    assert refused(s3.copy_object, Bucket=versioned, Key="k", CopySource=latest) == (400, "InvalidRequest")
    marker = s3.delete_object(Bucket=versioned, Key="k")["VersionId"]
    assert refused(s3.copy_object, Bucket=versioned, Key="x", CopySource=latest) == (404, "NoSuchKey")
    named = latest | {"VersionId": marker}
    assert refused(s3.copy_object, Bucket=versioned, Key="x", CopySource=named) == (400, "InvalidRequest")


def test_listing(s3: Any, raw: Raw, code_of: Code, versioned: str) -> None:
    keys = ["a", "b/1", "b/2", "c ü"]
    for key in keys:
        put(s3, versioned, key, b"1", b"2")
    s3.delete_object(Bucket=versioned, Key="a")
    found, markers, prefixes = [], 0, []
    arguments: dict[str, Any] = {"MaxKeys": 1, "Delimiter": "/"}
    while True:
        page = s3.list_object_versions(Bucket=versioned, **arguments)
        found += [row["Key"] for row in page.get("Versions", [])]
        markers += len(page.get("DeleteMarkers", []))
        prefixes += [row["Prefix"] for row in page.get("CommonPrefixes", [])]
        if not page["IsTruncated"]:
            break
        arguments["KeyMarker"] = page["NextKeyMarker"]
        arguments.pop("VersionIdMarker", None)
        if page.get("NextVersionIdMarker"):
            arguments["VersionIdMarker"] = page["NextVersionIdMarker"]
    assert (found, markers, prefixes) == (["a", "a", "c ü", "c ü"], 1, ["b/"])
    page = s3.list_object_versions(Bucket=versioned, KeyMarker="a", Prefix="b")
    assert [row["Key"] for row in page["Versions"]] == ["b/1", "b/1", "b/2", "b/2"]
    assert all(row["Owner"]["DisplayName"] == "Root" and row["StorageClass"] == "STANDARD" for row in page["Versions"])
    assert s3.list_object_versions(Bucket=versioned, MaxKeys=0)["IsTruncated"] is False
    encoded = raw("GET", f"/{versioned}?versions&encoding-type=url&prefix=c%20")
    assert "<Key>c%20%C3%BC</Key>" in encoded.text
    for query in ("version-id-marker=" + "0" * 32, "key-marker=a&version-id-marker="):
        assert code_of(raw("GET", f"/{versioned}?versions&{query}")) == "InvalidArgument"


def test_emptying_a_bucket_page_by_page(s3: Any, versioned: str) -> None:
    for key in ("a", "b"):
        put(s3, versioned, key, *(b"%d" % number for number in range(5)))
        s3.delete_object(Bucket=versioned, Key=key)
    pages = s3.get_paginator("list_object_versions").paginate(Bucket=versioned, PaginationConfig={"PageSize": 4})
    for page in pages:
        rows = page.get("Versions", []) + page.get("DeleteMarkers", [])
        objects = [{"Key": row["Key"], "VersionId": row["VersionId"]} for row in rows]
        assert "Errors" not in s3.delete_objects(Bucket=versioned, Delete={"Objects": objects})
    s3.delete_bucket(Bucket=versioned)


def test_conditional_deletes(s3: Any, versioned: str) -> None:
    etag = s3.put_object(Bucket=versioned, Key="k", Body=b"1")["ETag"]
    wrong = f'"{secrets.token_hex(16)}"'
    assert refused(s3.delete_object, Bucket=versioned, Key="k", IfMatch=wrong) == (412, "PreconditionFailed")
    s3.delete_object(Bucket=versioned, Key="k", IfMatch=etag)
    assert refused(s3.delete_object, Bucket=versioned, Key="k", IfMatch="*") == (412, "PreconditionFailed")
