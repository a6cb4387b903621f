"""Multipart uploads, as SDKs do them and as they go wrong."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import secrets
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from awscrt.auth import AwsCredentialsProvider
from awscrt.http import HttpHeaders, HttpRequest
from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
from awscrt.s3 import (
    S3ChecksumAlgorithm,
    S3ChecksumConfig,
    S3ChecksumLocation,
    S3Client,
    S3RequestTlsMode,
    S3RequestType,
    create_default_s3_signing_config,
)
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from ingest.records import CommitPart, Extent, PartRecord
from s3api.checksums import ALGORITHMS

Raw = Callable[..., httpx.Response]
Code = Callable[[httpx.Response], str]

MIB = 1 << 20
FIRST, LAST = os.urandom(5 * MIB), os.urandom(12345)


def refused(call: Callable[..., object], **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def upload(s3: Any, bucket: str, key: str, bodies: list[bytes], **create: Any) -> tuple[str, list[dict[str, Any]]]:
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key, **create)["UploadId"]
    parts = []
    for number, body in enumerate(bodies, 1):
        answer = s3.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    return upload_id, parts


def complete(s3: Any, bucket: str, key: str, upload_id: str, parts: list[dict[str, Any]], **extra: Any) -> Any:
    return s3.complete_multipart_upload(
        Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}, **extra
    )


def test_transfer_manager(s3: Any, bucket: str, tmp_path: Any) -> None:
    body = os.urandom(17 * MIB + 3)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(body)
    config = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB, max_concurrency=4)
    s3.upload_file(str(source), bucket, "big", Config=config, ExtraArgs={"Metadata": {"run": "7"}})
    s3.download_file(bucket, "big", str(target), Config=config)
    assert target.read_bytes() == body
    head = s3.head_object(Bucket=bucket, Key="big", ChecksumMode="ENABLED")
    assert head["Metadata"] == {"run": "7"}
    assert head["ETag"].endswith('-4"')
    assert head["ChecksumCRC32"]


def test_nothing_is_visible_before_complete(s3: Any, bucket: str) -> None:
    upload_id, parts = upload(s3, bucket, "k", [FIRST, LAST], ContentType="image/x")
    assert refused(s3.head_object, Bucket=bucket, Key="k") == (404, "404")
    assert [row["UploadId"] for row in s3.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [upload_id]
    listed = s3.list_parts(Bucket=bucket, Key="k", UploadId=upload_id)["Parts"]
    assert [(row["PartNumber"], row["Size"]) for row in listed] == [(1, len(FIRST)), (2, len(LAST))]
    complete(s3, bucket, "k", upload_id, parts)
    got = s3.get_object(Bucket=bucket, Key="k")
    assert got["Body"].read() == FIRST + LAST
    assert got["ContentType"] == "image/x"
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


def test_complete_may_be_asked_again(s3: Any, bucket: str) -> None:
    upload_id, parts = upload(s3, bucket, "k", [LAST])
    first = complete(s3, bucket, "k", upload_id, parts, IfNoneMatch="*")
    assert complete(s3, bucket, "k", upload_id, parts, IfNoneMatch="*")["ETag"] == first["ETag"]
    s3.put_object(Bucket=bucket, Key="k", Body=b"newer")
    assert refused(complete, s3=s3, bucket=bucket, key="k", upload_id=upload_id, parts=parts) == (404, "NoSuchUpload")


def test_a_part_may_be_sent_again(s3: Any, bucket: str) -> None:
    upload_id, _ = upload(s3, bucket, "k", [b"old"])
    answer = s3.upload_part(Bucket=bucket, Key="k", UploadId=upload_id, PartNumber=1, Body=b"new")
    complete(s3, bucket, "k", upload_id, [{"PartNumber": 1, "ETag": answer["ETag"]}])
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"new"


def test_only_the_named_parts_count(s3: Any, bucket: str) -> None:
    upload_id, parts = upload(s3, bucket, "k", [FIRST, b"dropped", LAST])
    complete(s3, bucket, "k", upload_id, [parts[0], parts[2]])
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == FIRST + LAST
    assert s3.get_object(Bucket=bucket, Key="k", PartNumber=2)["Body"].read() == LAST
    assert s3.head_object(Bucket=bucket, Key="k", PartNumber=1)["PartsCount"] == 2
    assert refused(s3.get_object, Bucket=bucket, Key="k", PartNumber=3) == (416, "InvalidPartNumber")


def test_etag_of_md5_parts(s3: Any, bucket: str) -> None:
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    parts = []
    for number, body in enumerate((FIRST, LAST), 1):
        answer = s3.upload_part(
            Bucket=bucket, Key="k", UploadId=upload_id, PartNumber=number, Body=body,
            ContentMD5=base64.b64encode(hashlib.md5(body).digest()).decode(),
        )  # fmt: skip
        assert answer["ETag"] == f'"{hashlib.md5(body).hexdigest()}"'
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    expected = hashlib.md5(hashlib.md5(FIRST).digest() + hashlib.md5(LAST).digest()).hexdigest()
    assert complete(s3, bucket, "k", upload_id, parts)["ETag"] == f'"{expected}-2"'


# -- checksums


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("CRC32", "FULL_OBJECT"), ("CRC32", "COMPOSITE"), ("CRC32C", "FULL_OBJECT"), ("CRC64NVME", "FULL_OBJECT"),
     ("SHA1", "COMPOSITE"), ("SHA256", "COMPOSITE")],
)  # fmt: skip
def test_checksum_types(s3: Any, bucket: str, algorithm: str, kind: str) -> None:
    created = s3.create_multipart_upload(Bucket=bucket, Key="k", ChecksumAlgorithm=algorithm, ChecksumType=kind)
    assert (created["ChecksumAlgorithm"], created["ChecksumType"]) == (algorithm, kind)
    parts = []
    for number, body in enumerate((FIRST, LAST), 1):
        answer = s3.upload_part(
            Bucket=bucket, Key="k", UploadId=created["UploadId"], PartNumber=number, Body=body,
            ChecksumAlgorithm=algorithm,
        )  # fmt: skip
        parts.append(
            {"PartNumber": number, "ETag": answer["ETag"], f"Checksum{algorithm}": answer[f"Checksum{algorithm}"]}
        )
    answer = complete(s3, bucket, "k", created["UploadId"], parts, MpuObjectSize=len(FIRST) + len(LAST))
    assert answer["ChecksumType"] == kind
    assert answer[f"Checksum{algorithm}"].endswith("-2") == (kind == "COMPOSITE")
    got = s3.get_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
    assert got["Body"].read() == FIRST + LAST
    assert got[f"Checksum{algorithm}"] == answer[f"Checksum{algorithm}"]
    if (algorithm, kind) == ("CRC32", "FULL_OBJECT"):
        crc = zlib.crc32(FIRST + LAST).to_bytes(4, "big")
        assert got["ChecksumCRC32"] == base64.b64encode(crc).decode()


def test_full_object_claim_at_complete(s3: Any, bucket: str) -> None:
    upload_id, parts = upload(s3, bucket, "k", [LAST], ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT")
    claim = {"s3": s3, "bucket": bucket, "key": "k", "upload_id": upload_id, "parts": parts}
    assert refused(complete, **claim, ChecksumCRC32="AAAAAA==") == (400, "BadDigest")
    assert refused(complete, **claim, ChecksumType="COMPOSITE") == (400, "InvalidRequest")
    assert refused(complete, **claim, MpuObjectSize=1) == (400, "InvalidRequest")
    crc = base64.b64encode(zlib.crc32(LAST).to_bytes(4, "big")).decode()
    complete(s3, bucket, "k", upload_id, parts, ChecksumCRC32=crc, ChecksumType="FULL_OBJECT")


@pytest.mark.parametrize(
    "create",
    [{"ChecksumAlgorithm": "SHA256", "ChecksumType": "FULL_OBJECT"},
     {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "COMPOSITE"}],
)  # fmt: skip
def test_impossible_checksum_types(s3: Any, bucket: str, create: dict[str, str]) -> None:
    assert refused(s3.create_multipart_upload, Bucket=bucket, Key="k", **create) == (400, "InvalidRequest")


def test_a_part_of_another_algorithm(s3: Any, bucket: str) -> None:
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k", ChecksumAlgorithm="SHA256")["UploadId"]
    part = {"Bucket": bucket, "Key": "k", "UploadId": upload_id, "PartNumber": 1, "Body": b"x"}
    assert refused(s3.upload_part, **part, ChecksumAlgorithm="CRC32") == (400, "InvalidRequest")


# -- refusals


def test_what_complete_refuses(s3: Any, bucket: str) -> None:
    upload_id, parts = upload(s3, bucket, "k", [b"short", b"last"])
    claim = {"s3": s3, "bucket": bucket, "key": "k", "upload_id": upload_id}
    assert refused(complete, **claim, parts=parts) == (400, "EntityTooSmall")
    assert refused(complete, **claim, parts=parts[::-1]) == (400, "InvalidPartOrder")
    assert refused(complete, **claim, parts=[{"PartNumber": 1, "ETag": '"x"'}]) == (400, "InvalidPart")
    assert refused(complete, **claim, parts=[{"PartNumber": 3, "ETag": parts[0]["ETag"]}]) == (400, "InvalidPart")
    assert refused(complete, **claim, parts=[]) == (400, "MalformedXML")
    assert refused(complete, **{**claim, "upload_id": "0" * 32}, parts=parts) == (404, "NoSuchUpload")
    s3.put_object(Bucket=bucket, Key="k", Body=b"x")
    assert refused(complete, **claim, parts=parts[:1], IfNoneMatch="*") == (412, "PreconditionFailed")


@pytest.mark.parametrize("quote", ['"{}"', "{}", "&quot;{}&quot;", "&#34;{}&#34;"])
@pytest.mark.parametrize("namespace", ["", ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'])
def test_spellings_of_complete(raw: Raw, s3: Any, bucket: str, quote: str, namespace: str) -> None:
    upload_id, parts = upload(s3, bucket, "k", [b"x"])
    etag = quote.format(parts[0]["ETag"].strip('"'))
    body = (
        f"<CompleteMultipartUpload{namespace}>\n <Part>\n  <PartNumber> 1 </PartNumber><ETag>{etag}</ETag></Part>"
        "</CompleteMultipartUpload>"
    )
    assert raw("POST", f"/{bucket}/k?uploadId={upload_id}", body.encode()).status_code == 200


@pytest.mark.parametrize("number", [0, 10001])
def test_part_numbers(s3: Any, bucket: str, number: int) -> None:
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    part = {"Bucket": bucket, "Key": "k", "UploadId": upload_id, "PartNumber": number, "Body": b"x"}
    assert refused(s3.upload_part, **part) == (400, "InvalidArgument")


def test_abort(s3: Any, bucket: str) -> None:
    upload_id, parts = upload(s3, bucket, "k", [LAST])
    s3.abort_multipart_upload(Bucket=bucket, Key="k", UploadId=upload_id)
    claim = {"s3": s3, "bucket": bucket, "key": "k", "upload_id": upload_id, "parts": parts}
    assert refused(complete, **claim) == (404, "NoSuchUpload")
    part = {"Bucket": bucket, "Key": "k", "UploadId": upload_id}
    assert refused(s3.upload_part, **part, PartNumber=1, Body=b"x") == (404, "NoSuchUpload")
    assert refused(s3.list_parts, **part) == (404, "NoSuchUpload")


def test_pages_of_parts_and_uploads(s3: Any, bucket: str) -> None:
    upload_id, _ = upload(s3, bucket, "b", [b"1", b"2", b"3"])
    page = s3.list_parts(Bucket=bucket, Key="b", UploadId=upload_id, MaxParts=2)
    assert page["IsTruncated"]
    rest = s3.list_parts(Bucket=bucket, Key="b", UploadId=upload_id, PartNumberMarker=page["NextPartNumberMarker"])
    assert [row["PartNumber"] for row in page["Parts"] + rest["Parts"]] == [1, 2, 3]
    for key in ("a", "c", "c"):
        s3.create_multipart_upload(Bucket=bucket, Key=key)
    pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, MaxUploads=1)
    assert [row["Key"] for page in pages for row in page["Uploads"]] == ["a", "b", "c", "c"]


def test_uploads_by_prefix_and_delimiter(s3: Any, bucket: str) -> None:
    for key in ("a/1", "a/1", "a/2", "b", "c/x/1", "c/y/1", "d", "ü/1"):
        s3.create_multipart_upload(Bucket=bucket, Key=key)

    def pages(size: int, **extra: Any) -> tuple[list[str], list[str]]:
        keys, prefixes, marker = [], [], {}
        for _ in range(20):
            page = s3.list_multipart_uploads(Bucket=bucket, MaxUploads=size, **extra, **marker)
            assert len(page.get("Uploads", [])) + len(page.get("CommonPrefixes", [])) <= size
            keys += [row["Key"] for row in page.get("Uploads", [])]
            prefixes += [row["Prefix"] for row in page.get("CommonPrefixes", [])]
            if not page["IsTruncated"]:
                return keys, prefixes
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        raise AssertionError("the listing does not end")

    for size in (1, 2, 3, 1000):
        assert pages(size, Delimiter="/") == (["b", "d"], ["a/", "c/", "ü/"])
        assert pages(size, Delimiter="/", Prefix="c/") == ([], ["c/x/", "c/y/"])
        assert pages(size, Prefix="a/") == (["a/1", "a/1", "a/2"], [])
    nothing = s3.list_multipart_uploads(Bucket=bucket, MaxUploads=0)
    assert (nothing["IsTruncated"], nothing.get("Uploads")) == (False, None)
    after = s3.list_multipart_uploads(Bucket=bucket, KeyMarker="a/1")
    assert [row["Key"] for row in after["Uploads"]][:2] == ["a/2", "b"]


def test_a_composite_upload_is_completed_with_the_checksum_of_each_part(s3: Any, bucket: str) -> None:
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k", ChecksumAlgorithm="SHA256")["UploadId"]
    of = {"Bucket": bucket, "Key": "k", "UploadId": upload_id, "PartNumber": 1}
    parts = [{"PartNumber": 1, "ETag": s3.upload_part(**of, Body=b"x", ChecksumAlgorithm="SHA256")["ETag"]}]
    with pytest.raises(ClientError, match="missing for part 1"):
        complete(s3, bucket, "k", upload_id, parts)


@pytest.mark.parametrize("algorithm", ["MD5", "SHA512", "XXHASH64", "XXHASH3", "XXHASH128"])
def test_composites_of_the_other_algorithms(raw: Raw, s3: Any, bucket: str, algorithm: str) -> None:
    """botocore knows their names and cannot compute them all."""
    digest = ALGORITHMS[algorithm.lower()].digest
    header = f"x-amz-checksum-{algorithm.lower()}"
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k", ChecksumAlgorithm=algorithm)["UploadId"]
    named, values = "", []
    for number, body in enumerate((FIRST, LAST), 1):
        value = base64.b64encode(digest(body)).decode()
        answer = raw("PUT", f"/{bucket}/k?partNumber={number}&uploadId={upload_id}", body, headers={header: value})
        assert answer.headers[header] == value
        named += f"<Part><PartNumber>{number}</PartNumber><ETag>{answer.headers['etag']}</ETag>"
        named += f"<Checksum{algorithm}>{value}</Checksum{algorithm}></Part>"
        values.append(value)
    body = f"<CompleteMultipartUpload>{named}</CompleteMultipartUpload>".encode()
    done = raw("POST", f"/{bucket}/k?uploadId={upload_id}", body)
    expected = base64.b64encode(digest(b"".join(map(base64.b64decode, values)))).decode() + "-2"
    assert f"<Checksum{algorithm}>{expected}</Checksum{algorithm}>" in done.text
    assert "<ChecksumType>COMPOSITE</ChecksumType>" in done.text
    head = raw("HEAD", f"/{bucket}/k", headers={"x-amz-checksum-mode": "ENABLED"})
    assert (head.headers[header], head.headers["x-amz-checksum-type"]) == (expected, "COMPOSITE")


def test_parts_of_what_is_over(s3: Any, bucket: str) -> None:
    """Completed or aborted while a part arrives: the part is refused, and so is any later one."""
    upload_id, parts = upload(s3, bucket, "k", [b"x"])
    complete(s3, bucket, "k", upload_id, parts)
    of = {"Bucket": bucket, "Key": "k", "UploadId": upload_id}
    assert refused(s3.upload_part, **of, PartNumber=2, Body=b"y") == (404, "NoSuchUpload")
    assert refused(s3.abort_multipart_upload, **of) == (404, "NoSuchUpload")
    assert refused(s3.list_parts, **of) == (404, "NoSuchUpload")
    s3.delete_object(Bucket=bucket, Key="k")
    claim = {"s3": s3, "bucket": bucket, "key": "k", "upload_id": upload_id, "parts": parts}
    assert refused(complete, **claim) == (404, "NoSuchUpload")


def test_an_abort_while_a_part_arrives(s3: Any, bucket: str, node: Any) -> None:
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    of = {"Bucket": bucket, "Key": "k", "UploadId": upload_id}
    url = s3.generate_presigned_url("upload_part", {**of, "PartNumber": 1}, ExpiresIn=60)
    begun = threading.Event()

    def body() -> Iterator[bytes]:
        yield FIRST[:MIB]
        begun.set()
        s3.abort_multipart_upload(**of)
        yield FIRST[MIB:]

    answer = httpx.put(url, content=body(), headers={"content-length": str(len(FIRST))}, timeout=60)
    assert begun.is_set()
    assert (answer.status_code, "NoSuchUpload" in answer.text) == (404, True)
    assert s3.list_multipart_uploads(Bucket=bucket).get("Uploads") is None


PART_BYTES = (5 << 40) // 10_000


def test_ten_thousand_parts_of_five_terabytes(node: Any, raw: Raw, s3: Any, bucket: str) -> None:
    """Arithmetic only: the parts' bytes lie on a node that is not there."""
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]

    def part(number: int, length: int = PART_BYTES) -> CommitPart:
        extent = Extent(1, 0, number, 1, 0, length)
        record = PartRecord(number, length, f"{number:032x}", number, {}, (extent,))
        return CommitPart(bucket, b"k", upload_id, record, secrets.token_bytes(16))

    async def commit(numbers: list[int]) -> None:
        for start in range(0, len(numbers), 500):
            await asyncio.gather(*(node.catalog.commit_part(part(number)) for number in numbers[start : start + 500]))

    numbers = list(range(1, 10_001))
    random.Random(1).shuffle(numbers)
    node.run(commit(numbers[:5000]))
    node.run(commit(numbers[5000:]))
    node.run(commit(numbers[:100]))  # sent again: the later ones count
    page = s3.list_parts(Bucket=bucket, Key="k", UploadId=upload_id, PartNumberMarker=9500)
    assert [row["PartNumber"] for row in page["Parts"]] == list(range(9501, 10_001))
    rows = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{number:032x}</ETag></Part>" for number in range(1, 10_001)
    )
    path = f"/{bucket}/k?uploadId={upload_id}"
    document = f"<CompleteMultipartUpload>{rows}</CompleteMultipartUpload>".encode()
    wrong = raw("POST", path, document, headers={"x-amz-mp-object-size": "5497558138880"})
    assert wrong.status_code == 400
    done = raw("POST", path, document, headers={"x-amz-mp-object-size": str(10_000 * PART_BYTES)})
    assert (done.status_code, "-10000&quot;</ETag>" in done.text) == (200, True)
    head = s3.head_object(Bucket=bucket, Key="k", PartNumber=10_000)
    assert (head["PartsCount"], head["ContentLength"]) == (10_000, PART_BYTES)
    assert head["ContentRange"] == f"bytes {9999 * PART_BYTES}-{10_000 * PART_BYTES - 1}/{10_000 * PART_BYTES}"
    assert s3.head_object(Bucket=bucket, Key="k")["ContentLength"] == 10_000 * PART_BYTES
    s3.delete_object(Bucket=bucket, Key="k")


def test_more_than_an_object_may_have(node: Any, s3: Any, bucket: str) -> None:
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]

    async def commit() -> None:
        for number in (1, 2):
            extent = Extent(1, 0, number, 1, 0, 3 << 40)
            record = PartRecord(number, 3 << 40, f"{number:032x}", number, {}, (extent,))
            await node.catalog.commit_part(CommitPart(bucket, b"k", upload_id, record, secrets.token_bytes(16)))

    node.run(commit())
    parts = [{"PartNumber": number, "ETag": f"{number:032x}"} for number in (1, 2)]
    claim = {"s3": s3, "bucket": bucket, "key": "k", "upload_id": upload_id, "parts": parts}
    assert refused(complete, **claim) == (400, "EntityTooLarge")
    s3.abort_multipart_upload(Bucket=bucket, Key="k", UploadId=upload_id)


# -- copies of parts


def test_upload_part_copy(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="source", Body=FIRST + LAST)
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    source = {"Bucket": bucket, "Key": "source"}
    parts = []
    for number, span in enumerate((f"bytes=0-{len(FIRST) - 1}", f"bytes={len(FIRST)}-{len(FIRST + LAST) - 1}"), 1):
        answer = s3.upload_part_copy(
            Bucket=bucket, Key="k", UploadId=upload_id, PartNumber=number, CopySource=source, CopySourceRange=span
        )
        parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
    complete(s3, bucket, "k", upload_id, parts)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == FIRST + LAST


@pytest.mark.parametrize("span", ["bytes=0-5", "bytes=5-5", "bytes=2-1", "bytes=0", "0-2", "bytes=-2", "bytes=0-1,3-4"])
def test_a_copied_range_lies_inside_the_source(s3: Any, bucket: str, span: str) -> None:
    s3.put_object(Bucket=bucket, Key="source", Body=b"01234")
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    arguments = {"Bucket": bucket, "Key": "k", "UploadId": upload_id, "PartNumber": 1, "CopySourceRange": span}
    answer = refused(s3.upload_part_copy, CopySource={"Bucket": bucket, "Key": "source"}, **arguments)
    assert answer == (400, "InvalidArgument")


def crt_client(keys: tuple[str, str]) -> S3Client:
    group = EventLoopGroup(1)
    provider = AwsCredentialsProvider.new_static(*keys)
    return S3Client(
        bootstrap=ClientBootstrap(group, DefaultHostResolver(group)),
        region="us-east-1",
        signing_config=create_default_s3_signing_config(region="us-east-1", credential_provider=provider),
        tls_mode=S3RequestTlsMode.DISABLED,
        part_size=8 * MIB,
    )


@pytest.mark.parametrize("checksum", [S3ChecksumAlgorithm.CRC32, S3ChecksumAlgorithm.CRC64NVME, None])
def test_common_runtime_client(
    node: Any, s3: Any, bucket: str, root_keys: tuple[str, str], tmp_path: Any, checksum: S3ChecksumAlgorithm | None
) -> None:
    """The CRT sends each part as one aws-chunk with a trailer, states the object's size at Complete, reads in ranges."""
    body = os.urandom(21 * MIB + 5)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(body)
    client = crt_client(root_keys)
    host = ("Host", f"127.0.0.1:{node.port}")
    put = HttpRequest("PUT", f"/{bucket}/big", HttpHeaders([host, ("Content-Length", str(len(body)))]))
    config = S3ChecksumConfig(algorithm=checksum, location=S3ChecksumLocation.TRAILER) if checksum else None
    sent = client.make_request(
        type=S3RequestType.PUT_OBJECT, request=put, send_filepath=str(source), checksum_config=config
    )
    sent.finished_future.result(30)
    get = HttpRequest("GET", f"/{bucket}/big", HttpHeaders([host]))
    received = client.make_request(type=S3RequestType.GET_OBJECT, request=get, recv_filepath=str(target))
    received.finished_future.result(30)
    assert target.read_bytes() == body
    assert s3.head_object(Bucket=bucket, Key="big")["ETag"].endswith('-3"')
