"""GET and HEAD by part and under conditions, GetObjectAttributes of parts, and listings of keys that are odd."""

from __future__ import annotations

import datetime
import os
import urllib.parse
from typing import Any

import pytest

from tests.s3api.conftest import RawClient as Raw
from tests.s3api.test_versioning import refused

MIB = 1 << 20
ODD = [
    "/lead", "//", "a//b", "a/./b", "a/../b", ".", "..", "../../etc/passwd", " ", "+%&?#ü漢", "a b", "tab\tkey", "\u00e9",
    "e\u0301", "\U0001f600", "x" * 1024, "_", "~", "A", "a", "a/", "a/b", "*", "'\"<&>", "%2F", "a%00", "-",
    "key\u2028sep",
]  # fmt: skip


@pytest.fixture
def parts(s3: Any, bucket: str) -> tuple[str, list[bytes]]:
    bodies = [os.urandom(5 * MIB), os.urandom(5 * MIB + 1), b"end"]
    upload = s3.create_multipart_upload(Bucket=bucket, Key="k", ChecksumAlgorithm="SHA256")["UploadId"]
    done = []
    for number, body in zip((2, 7, 9), bodies, strict=True):
        part = s3.upload_part(
            Bucket=bucket, Key="k", UploadId=upload, PartNumber=number, Body=body, ChecksumAlgorithm="SHA256"
        )
        done.append({"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": part["ChecksumSHA256"]})
    s3.complete_multipart_upload(Bucket=bucket, Key="k", UploadId=upload, MultipartUpload={"Parts": done})
    return bucket, bodies


def test_parts_are_read_by_number(s3: Any, raw: Raw, parts: tuple[str, list[bytes]]) -> None:
    bucket, bodies = parts
    start = 0
    for number, body in enumerate(bodies, 1):
        got = s3.get_object(Bucket=bucket, Key="k", PartNumber=number)
        assert got["Body"].read() == body
        assert (got["ResponseMetadata"]["HTTPStatusCode"], got["PartsCount"]) == (206, 3)
        assert got["ContentRange"] == f"bytes {start}-{start + len(body) - 1}/{sum(map(len, bodies))}"
        head = s3.head_object(Bucket=bucket, Key="k", PartNumber=number)
        assert (head["ContentLength"], head["PartsCount"]) == (len(body), 3)
        start += len(body)
    assert refused(s3.get_object, Bucket=bucket, Key="k", PartNumber=4) == (416, "InvalidPartNumber")
    both = {"Bucket": bucket, "Key": "k", "PartNumber": 1, "Range": "bytes=0-1"}
    assert refused(s3.get_object, **both) == (400, "InvalidRequest")
    assert "PartsCount" not in s3.head_object(Bucket=bucket, Key="k")
    s3.put_object(Bucket=bucket, Key="plain", Body=b"abc")
    assert s3.get_object(Bucket=bucket, Key="plain", PartNumber=1)["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert refused(s3.get_object, Bucket=bucket, Key="plain", PartNumber=2) == (416, "InvalidPartNumber")
    # Never the whole object's checksum beside a part of it.
    answer = raw("GET", f"/{bucket}/k?partNumber=3", headers={"x-amz-checksum-mode": "ENABLED"})
    assert not any(name.startswith("x-amz-checksum") for name in answer.headers)


def test_attributes_of_parts(s3: Any, raw: Raw, parts: tuple[str, list[bytes]]) -> None:
    bucket, bodies = parts
    wanted = {"Bucket": bucket, "Key": "k", "ObjectAttributes": ["ObjectParts", "Checksum", "ObjectSize", "ETag"]}
    found = s3.get_object_attributes(**wanted)
    assert (found["ObjectSize"], found["Checksum"]["ChecksumType"]) == (sum(map(len, bodies)), "COMPOSITE")
    assert "VersionId" not in found
    listed = found["ObjectParts"]
    assert listed["TotalPartsCount"] == 3
    assert [(part["PartNumber"], part["Size"]) for part in listed["Parts"]] == list(enumerate(map(len, bodies), 1))
    assert all(part["ChecksumSHA256"] for part in listed["Parts"])
    page = s3.get_object_attributes(**wanted, MaxParts=1, PartNumberMarker=1)["ObjectParts"]
    assert ([part["PartNumber"] for part in page["Parts"]], page["IsTruncated"]) == ([2], True)
    assert page["NextPartNumberMarker"] == 2
    for value in ("", "Size", "ETag,Nonsense"):
        answer = raw("GET", f"/{bucket}/k?attributes", headers={"x-amz-object-attributes": value})
        assert answer.status_code == 400
    missing = {"Bucket": bucket, "Key": "none", "ObjectAttributes": ["ETag"]}
    assert refused(s3.get_object_attributes, **missing) == (404, "NoSuchKey")


@pytest.mark.parametrize(
    ("match", "unmodified", "none_match", "modified", "status"),
    [
        ("same", None, None, None, 200), ("other", None, None, None, 412), ("*", None, None, None, 200),
        (None, "after", None, None, 200), (None, "before", None, None, 412),
        ("same", "before", None, None, 200),  # If-Match is what counts
        ("other", "after", None, None, 412),
        (None, None, "other", None, 200), (None, None, "same", None, 304), (None, None, "*", None, 304),
        (None, None, None, "before", 200), (None, None, None, "after", 304),
        (None, None, "same", "before", 304),  # If-None-Match is what counts
        (None, None, "other", "after", 200),
        ("other", None, "same", None, 412), ("same", None, "same", None, 304),
    ],
)  # fmt: skip
def test_conditions_of_a_read(
    s3: Any, raw: Raw, bucket: str, match: str | None, unmodified: str | None, none_match: str | None,
    modified: str | None, status: int,
) -> None:  # fmt: skip
    etag = s3.put_object(Bucket=bucket, Key="k", Body=b"abc")["ETag"]
    at = s3.head_object(Bucket=bucket, Key="k")["LastModified"]
    tags = {"same": etag, "other": '"' + "0" * 32 + '"', "*": "*"}
    times = {
        name: (at + datetime.timedelta(seconds=shift)).strftime("%a, %d %b %Y %H:%M:%S GMT")
        for name, shift in (("before", -60), ("after", 60))
    }
    given = {
        "if-match": tags.get(match or ""), "if-unmodified-since": times.get(unmodified or ""),
        "if-none-match": tags.get(none_match or ""), "if-modified-since": times.get(modified or ""),
    }  # fmt: skip
    headers = {name: value for name, value in given.items() if value}
    for method in ("GET", "HEAD"):
        answer = raw(method, f"/{bucket}/k", headers=headers)
        assert answer.status_code == status
        if status == 304:
            assert answer.headers["etag"] == etag
    source = {"x-amz-copy-source": f"{bucket}/k"} | {f"x-amz-copy-source-{n}": v for n, v in headers.items()}
    assert raw("PUT", f"/{bucket}/copy", headers=source).status_code == (412 if status == 304 else status)


def test_odd_keys_come_back_as_they_went(s3: Any, raw: Raw, bucket: str) -> None:
    for key in ODD:
        s3.put_object(Bucket=bucket, Key=key, Body=key.encode())
    expected = sorted(ODD, key=str.encode)
    for operation in (s3.list_objects, s3.list_objects_v2):
        assert [row["Key"] for row in operation(Bucket=bucket)["Contents"]] == expected
    assert [row["Key"] for row in s3.list_object_versions(Bucket=bucket)["Versions"]] == expected
    found = []
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, PaginationConfig={"PageSize": 1}):
        found += [row["Key"] for row in page.get("Contents", [])]
    assert found == expected
    for key in ODD:
        assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == key.encode()
        s3.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": key})
        encoded = urllib.parse.quote(f"{bucket}/{key}", safe="")
        assert raw("PUT", f"/{bucket}/copy", headers={"x-amz-copy-source": encoded}).status_code == 200
    folded = s3.list_objects_v2(Bucket=bucket, Delimiter="/")
    assert {row["Prefix"] for row in folded["CommonPrefixes"]} == {
        key.partition("/")[0] + "/" for key in ODD if "/" in key
    }
    assert s3.list_objects_v2(Bucket=bucket, MaxKeys=0)["KeyCount"] == 0
    objects = [{"Key": key} for key in [*ODD, "copy"]]
    assert "Errors" not in s3.delete_objects(Bucket=bucket, Delete={"Objects": objects})
    s3.delete_bucket(Bucket=bucket)
