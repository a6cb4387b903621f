"""What the service does around the operations: refusing before the body, cold objects, counting, logging."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from ingest.records import ArchiveCopy, UserRecord

Raw = Callable[..., httpx.Response]
Code = Callable[[httpx.Response], str]


def wait_until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """An answer is counted just after its last byte is out: give the node that moment."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def head_only(node: Any, raw: Any, path: str, length: int, headers: dict[str, str] | None = None) -> bytes:
    """Send the head of a PUT that waits for 100 Continue; what comes back first."""
    signed = raw.signed("PUT", path, b"", headers, "UNSIGNED-PAYLOAD")
    lines = "".join(f"{name}: {value}\r\n" for name, value in signed.items() if name.lower() != "content-length")
    with socket.create_connection(("127.0.0.1", node.port), timeout=60) as peer:
        peer.sendall(
            f"PUT {path} HTTP/1.1\r\nhost: 127.0.0.1:{node.port}\r\n{lines}"
            f"content-length: {length}\r\nexpect: 100-continue\r\n\r\n".encode()
        )
        return peer.recv(65536)


@pytest.mark.parametrize(
    ("path", "length", "headers", "status", "code"),
    [
        ("/BUCKET/k", 1 << 30, {}, 503, "SlowDown"),
        ("/BUCKET/k", 6 << 40, {}, 400, "EntityTooLarge"),
        ("/BUCKET/there", 10, {"if-none-match": "*"}, 412, "PreconditionFailed"),
        ("/BUCKET/k", 10, {"content-md5": "x"}, 400, "InvalidDigest"),
        ("/BUCKET/k", 10, {"x-amz-checksum-crc32": "x"}, 400, "InvalidRequest"),
        ("/BUCKET/k", 10, {"x-amz-meta-a": "v" * 2048}, 400, "MetadataTooLarge"),
        ("/BUCKET/_products/k", 10, {}, 403, "AccessDenied"),
        ("/BUCKET/_kernels/k.py", 1 << 17, {}, 400, "EntityTooLarge"),
        ("/no-such-bucket/k", 10, {}, 404, "NoSuchBucket"),
        ("/BUCKET/k?uploadId=0&partNumber=1", 10, {}, 404, "NoSuchUpload"),
    ],
)
def test_refused_before_the_body(
    node: Any, raw: Any, s3: Any, bucket: str, path: str, length: int, headers: dict[str, str], status: int, code: str
) -> None:
    s3.put_object(Bucket=bucket, Key="there", Body=b"x")
    answer = head_only(node, raw, path.replace("BUCKET", bucket), length, headers)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert f"<Code>{code}</Code>".encode() in answer
    assert (b"retry-after: 1" in answer) == (status == 503)


def test_accepted_after_the_head(node: Any, raw: Any, bucket: str) -> None:
    assert head_only(node, raw, f"/{bucket}/k", 10).startswith(b"HTTP/1.1 100 Continue\r\n")


# -- cold objects


@pytest.fixture
def cold(node: Any, s3: Any, bucket: str) -> str:
    """A bucket whose only object ``k`` is on the archive tier alone, and nobody recalls."""
    s3.put_object(Bucket=bucket, Key="k", Body=b"x" * 1000)

    async def evict() -> None:
        catalog = node.catalog
        record = await catalog.head(bucket, b"k")
        while record.object_id not in {claimed.object_id for claimed in await catalog.claim_drain(100, 60.0)}:
            pass
        copy = ArchiveCopy("posix", f"{bucket}/k", record.crc64nvme, record.modified_ns)
        await catalog.drained(record.object_id, copy)
        await catalog.evicted(record.object_id)

    node.run(evict())
    return bucket


def test_cold_objects_are_recalled(raw: Raw, code_of: Code, cold: str) -> None:
    answer = raw("GET", f"/{cold}/k")
    assert (answer.status_code, code_of(answer)) == (503, "SlowDown")
    assert answer.headers["retry-after"]
    assert raw("HEAD", f"/{cold}/k").status_code == 200


def test_cold_objects_like_glacier(raw: Raw, code_of: Code, s3: Any, cold: str) -> None:
    s3.put_bucket_tagging(Bucket=cold, Tagging={"TagSet": [{"Key": "hiss.recall", "Value": "never"}]})
    answer = raw("GET", f"/{cold}/k")
    assert (answer.status_code, code_of(answer)) == (403, "InvalidObjectState")
    head = raw("HEAD", f"/{cold}/k")
    assert (head.status_code, head.headers["x-amz-storage-class"]) == (200, "GLACIER")
    assert s3.list_objects_v2(Bucket=cold)["Contents"][0]["StorageClass"] == "GLACIER"
    copied = raw("PUT", f"/{cold}/copy", headers={"x-amz-copy-source": f"{cold}/k"})
    assert (copied.status_code, code_of(copied)) == (403, "InvalidObjectState")


# -- counting and logging


def test_requests_are_counted_by_operation_and_error(node: Any, raw: Raw, bucket: str) -> None:
    def value(name: str, label: str) -> float:
        return float(node.counters.cell(name, label).value())

    puts = value("hiss_http_requests_total", "PutObject")
    others = value("hiss_http_requests_total", "Other")
    missing = value("hiss_http_errors_total", "not_found")
    auth = value("hiss_http_errors_total", "auth")
    raw("PUT", f"/{bucket}/k", b"x")
    raw("GET", f"/{bucket}/missing")
    raw("GET", f"/{bucket}?versioning")
    httpx.get(f"{node.endpoint}/{bucket}/k")
    wait_until(lambda: value("hiss_http_errors_total", "auth") == auth + 1)
    assert value("hiss_http_requests_total", "PutObject") == puts + 1
    assert value("hiss_http_requests_total", "Other") == others + 1
    assert value("hiss_http_errors_total", "not_found") == missing + 1


def test_the_access_log_tells_no_secrets(
    raw: Any, bucket: str, caplog: pytest.LogCaptureFixture, root_keys: tuple[str, str]
) -> None:
    with caplog.at_level(logging.INFO, "s3api.access"):
        raw("GET", f"/{bucket}/k?X-Amz-Signature=0&response-content-type=a")
        raw("PUT", f"/{bucket}/k", b"x")
        raw("GET", "/")  # on the same connection: what came before is logged by now
    text = caplog.text
    assert f"root PutObject /{bucket}/k 200" in text
    assert "Signature" not in text
    assert root_keys[1] not in text


def test_a_fault_of_ours_is_an_internal_error_without_its_text(
    node: Any, make_client: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A user whose secret cannot be opened, as after a changed node key."""
    sealed = b"sealed with another key"
    node.run(node.catalog.put_user(UserRecord("stale", "Stale", "AKSTALE", sealed, root=True)))
    with caplog.at_level(logging.ERROR), pytest.raises(ClientError) as caught:
        make_client(("AKSTALE", "secret-key")).list_buckets()
    response = caught.value.response
    assert (response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]) == (500, "InternalError")
    assert "sealed" not in str(response)
    assert response["Error"]["Message"] == "We encountered an internal error. Please try again."
    assert response["ResponseMetadata"]["RequestId"] in caplog.text


def test_a_peer_that_leaves_amid_its_body(node: Any, raw: Any, s3: Any, bucket: str) -> None:
    aborted = node.counters.cell("hiss_ingest_aborted_streams_total").value()
    signed = raw.signed("PUT", f"/{bucket}/k", b"", None, "UNSIGNED-PAYLOAD")
    lines = "".join(f"{name}: {value}\r\n" for name, value in signed.items() if name.lower() != "content-length")
    with socket.create_connection(("127.0.0.1", node.port), timeout=60) as peer:
        peer.sendall(
            f"PUT /{bucket}/k HTTP/1.1\r\nhost: 127.0.0.1:{node.port}\r\n{lines}content-length: 1000000\r\n\r\n".encode()
            + bytes(500_000)
        )
    wait_until(lambda: node.counters.cell("hiss_ingest_aborted_streams_total").value() == aborted + 1)
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
