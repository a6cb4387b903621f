"""Objects over a real server, as boto3 and bare HTTP see them."""

from __future__ import annotations

import os
from typing import Any

import pytest
from botocore.exceptions import ClientError


def test_put_get_round_trip(s3: Any, bucket: str) -> None:
    body = os.urandom(3_000_000)
    put = s3.put_object(Bucket=bucket, Key="run/1.raw", Body=body, ContentType="application/x-raw", Metadata={"a": "b"})
    got = s3.get_object(Bucket=bucket, Key="run/1.raw")
    assert got["Body"].read() == body
    assert got["ETag"] == put["ETag"]
    assert got["ContentType"] == "application/x-raw"
    assert got["Metadata"] == {"a": "b"}


@pytest.mark.parametrize("size", [0, 1, 4096, 300_000])
def test_sizes(s3: Any, bucket: str, size: int) -> None:
    body = os.urandom(size)
    s3.put_object(Bucket=bucket, Key="k", Body=body)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == body
    assert s3.head_object(Bucket=bucket, Key="k")["ContentLength"] == size


def test_missing_key(s3: Any, bucket: str) -> None:
    with pytest.raises(ClientError) as caught:
        s3.get_object(Bucket=bucket, Key="nope")
    assert caught.value.response["Error"]["Code"] == "NoSuchKey"
