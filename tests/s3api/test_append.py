"""Appending with ``x-amz-write-offset-bytes``."""

from __future__ import annotations

import base64
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from awscrt.checksums import crc64nvme

from tests.s3api.test_versioning import refused


def append(s3: Any, bucket: str, body: bytes, offset: int, **rest: Any) -> dict[str, Any]:
    return s3.put_object(Bucket=bucket, Key="k", Body=body, WriteOffsetBytes=offset, **rest)  # type: ignore[no-any-return]


@pytest.mark.parametrize("sizes", [(3, 5, 7), (0, 10, 0, 3), (300_000, 1, 6 << 20, 4096)])
def test_an_object_grows_piece_by_piece(s3: Any, bucket: str, sizes: tuple[int, ...]) -> None:
    whole = b""
    for size in sizes:
        body = os.urandom(size)
        answer = append(s3, bucket, body, len(whole), Metadata={"first": "1"})
        whole += body
        got = s3.get_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
        assert got["Body"].read() == whole
        assert answer["ETag"] == got["ETag"]
        if "Size" in answer:  # it was appended; the first piece has the checksum that its client chose
            assert got["ChecksumCRC64NVME"] == base64.b64encode(crc64nvme(whole).to_bytes(8, "big")).decode()
            assert answer["Size"] == len(whole)
        assert got["Metadata"] == {"first": "1"}
    middle = s3.get_object(Bucket=bucket, Key="k", Range=f"bytes=2-{len(whole) - 2}")
    assert middle["Body"].read() == whole[2:-1]
    s3.copy_object(Bucket=bucket, Key="copy", CopySource=f"{bucket}/k")
    assert s3.get_object(Bucket=bucket, Key="copy")["Body"].read() == whole


def test_it_must_go_on_where_the_object_ends(s3: Any, bucket: str) -> None:
    wrong = (400, "InvalidWriteOffset")
    assert refused(append, s3=s3, bucket=bucket, body=b"x", offset=1) == wrong
    append(s3, bucket, b"abc", 0)
    for offset in (0, 2, 4):
        assert refused(append, s3=s3, bucket=bucket, body=b"x", offset=offset) == wrong
    etag = s3.head_object(Bucket=bucket, Key="k")["ETag"]
    failed = (412, "PreconditionFailed")
    assert refused(append, s3=s3, bucket=bucket, body=b"x", offset=3, IfNoneMatch="*") == failed
    assert append(s3, bucket, b"def", 3, IfMatch=etag)["Size"] == 6
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert refused(append, s3=s3, bucket=bucket, body=b"x", offset=6) == (400, "InvalidRequest")


def test_of_those_who_append_at_once_one_wins(s3: Any, bucket: str) -> None:
    def attempt(number: int) -> str:
        try:
            append(s3, bucket, bytes([number]) * 100, length)
        except s3.exceptions.ClientError as error:
            return str(error.response["Error"]["Code"])
        return ""

    append(s3, bucket, b"", 0)
    for length in (0, 100, 200):
        with ThreadPoolExecutor(8) as pool:
            codes = list(pool.map(attempt, range(8)))
        assert codes.count("") == 1
        assert set(codes) <= {"", "InvalidWriteOffset", "OperationAborted"}
        body = s3.get_object(Bucket=bucket, Key="k")["Body"].read()
        assert len(body) == length + 100
        assert body[-100:] == bytes([codes.index("")]) * 100


def test_many_pieces(s3: Any, bucket: str) -> None:
    for number in range(60):
        append(s3, bucket, bytes([number]), number)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == bytes(range(60))
    s3.delete_object(Bucket=bucket, Key="k")
    append(s3, bucket, b"new", 0)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"new"
