"""CopyObject: what is copied, what is replaced, when it is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from botocore.exceptions import ClientError

BODY = os.urandom(1_500_000)

Raw = Callable[..., httpx.Response]
Code = Callable[[httpx.Response], str]


def refused(call: Callable[..., object], **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


@pytest.fixture
def source(s3: Any, bucket: str) -> dict[str, str]:
    s3.put_object(Bucket=bucket, Key="ü source+1", Body=BODY, ContentType="image/x", Metadata={"run": "7"})
    return {"Bucket": bucket, "Key": "ü source+1"}


def test_copy(s3: Any, bucket: str, source: dict[str, str]) -> None:
    answer = s3.copy_object(Bucket=bucket, Key="copy", CopySource=source)["CopyObjectResult"]
    got = s3.get_object(Bucket=bucket, Key="copy", ChecksumMode="ENABLED")
    assert got["Body"].read() == BODY
    assert (got["ContentType"], got["Metadata"]) == ("image/x", {"run": "7"})
    assert got["ETag"] == answer["ETag"]
    assert got["ChecksumCRC32"] == answer["ChecksumCRC32"]


def test_replace_metadata(s3: Any, bucket: str, source: dict[str, str]) -> None:
    s3.copy_object(
        Bucket=bucket, Key="copy", CopySource=source, MetadataDirective="REPLACE", Metadata={"a": "b"},
        ContentType="text/x", ChecksumAlgorithm="SHA256",
    )  # fmt: skip
    got = s3.head_object(Bucket=bucket, Key="copy", ChecksumMode="ENABLED")
    assert (got["ContentType"], got["Metadata"]) == ("text/x", {"a": "b"})
    assert got["ChecksumSHA256"]


def test_onto_itself(s3: Any, source: dict[str, str]) -> None:
    target = {"Bucket": source["Bucket"], "Key": source["Key"], "CopySource": source}
    assert refused(s3.copy_object, **target) == (400, "InvalidRequest")
    s3.copy_object(**target, MetadataDirective="REPLACE", Metadata={"new": "1"})
    got = s3.get_object(**source)
    assert (got["Metadata"], got["Body"].read()) == ({"new": "1"}, BODY)


def test_an_empty_object(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="empty", Body=b"")
    s3.copy_object(Bucket=bucket, Key="copy", CopySource=f"{bucket}/empty")
    assert s3.head_object(Bucket=bucket, Key="copy")["ContentLength"] == 0


@pytest.mark.parametrize(
    ("conditions", "status"),
    [({"CopySourceIfMatch": '"x"'}, 412), ({"CopySourceIfNoneMatch": "*"}, 412), ({"CopySourceIfMatch": "*"}, 200)],
)
def test_conditions_on_the_source(
    s3: Any, bucket: str, source: dict[str, str], conditions: dict[str, str], status: int
) -> None:
    arguments = {"Bucket": bucket, "Key": "copy", "CopySource": source, **conditions}
    if status == 200:
        s3.copy_object(**arguments)
    else:
        assert refused(s3.copy_object, **arguments) == (status, "PreconditionFailed")


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("nonsense", 400, "InvalidArgument"),
        ("", 400, "InvalidArgument"),
        ("/BUCKET/", 400, "InvalidArgument"),
        ("BUCKET/%FF", 400, "InvalidArgument"),
        ("BUCKET/missing", 404, "NoSuchKey"),
        ("no-such-bucket/key", 404, "NoSuchBucket"),
        ("BUCKET/SOURCE?versionId=abc", 400, "InvalidArgument"),
        (f"BUCKET/SOURCE?versionId={'0' * 32}", 404, "NoSuchVersion"),
        ("BUCKET%2FSOURCE", 200, ""),
        ("%2FBUCKET%2FSOURCE%3FversionId=null", 404, "NoSuchKey"),
        ("BUCKET/SOURCE?versionId=null", 200, ""),
        ("/BUCKET/SOURCE", 200, ""),
    ],
)
def test_spellings_of_the_source(
    raw: Raw, code_of: Code, bucket: str, source: dict[str, str], text: str, status: int, code: str
) -> None:
    text = text.replace("BUCKET", bucket).replace("SOURCE", quote(source["Key"]))
    answer = raw("PUT", f"/{bucket}/copy", headers={"x-amz-copy-source": text})
    assert (answer.status_code, code_of(answer)) == (status, code)


def test_unknown_directive(raw: Raw, code_of: Code, bucket: str) -> None:
    headers = {"x-amz-copy-source": f"{bucket}/k", "x-amz-metadata-directive": "MERGE"}
    assert code_of(raw("PUT", f"/{bucket}/copy", headers=headers)) == "InvalidArgument"
