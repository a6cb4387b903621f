"""Objects over a real server, as boto3 and bare HTTP see them."""

from __future__ import annotations

import base64
import datetime
import email.header
import email.utils
import hashlib
import os
import secrets
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from ingest.records import CommitObject

BODY = bytes(range(256)) * 40

Raw = Callable[..., httpx.Response]
Code = Callable[[httpx.Response], str]


def refused(call: Callable[..., object], **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


@pytest.fixture
def stored(s3: Any, bucket: str) -> dict[str, Any]:
    """One object; the answer to its PUT."""
    answer = s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    return {"Bucket": bucket, "Key": "k", "ETag": answer["ETag"]}


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


@pytest.mark.parametrize("key", ["ü/ß 1+2%&?#.raw", "/leading", "a//b", "a/../b", "trailing/", "\u2028", "x" * 1024])
def test_keys_are_kept_as_they_are(s3: Any, bucket: str, key: str) -> None:
    s3.put_object(Bucket=bucket, Key=key, Body=b"x")
    assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == b"x"
    assert [row["Key"] for row in s3.list_objects_v2(Bucket=bucket)["Contents"]] == [key]


def test_a_key_of_more_than_1024_bytes(raw: Raw, code_of: Code, bucket: str) -> None:
    assert code_of(raw("PUT", f"/{bucket}/{'k' * 1025}", b"x")) == "KeyTooLongError"


def test_a_key_that_is_not_utf8(raw: Raw, code_of: Code, bucket: str) -> None:
    assert code_of(raw("PUT", f"/{bucket}/%FF", b"x")) == "InvalidURI"


def test_missing(s3: Any, bucket: str) -> None:
    assert refused(s3.get_object, Bucket=bucket, Key="nope") == (404, "NoSuchKey")
    assert refused(s3.head_object, Bucket=bucket, Key="nope") == (404, "404")
    assert refused(s3.get_object, Bucket="nobodys", Key="nope") == (404, "NoSuchBucket")
    assert refused(s3.put_object, Bucket="nobodys", Key="nope", Body=b"x") == (404, "NoSuchBucket")


def test_overwrite_and_delete(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"1")
    s3.put_object(Bucket=bucket, Key="k", Body=b"22")
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"22"
    s3.delete_object(Bucket=bucket, Key="k")
    s3.delete_object(Bucket=bucket, Key="k")
    assert refused(s3.get_object, Bucket=bucket, Key="k") == (404, "NoSuchKey")


# -- headers


def test_content_headers_come_back(s3: Any, bucket: str) -> None:
    expires = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
    s3.put_object(
        Bucket=bucket, Key="k", Body=b"x", CacheControl="no-cache", ContentDisposition="attachment",
        ContentEncoding="gzip", ContentLanguage="de", Expires=expires,
    )  # fmt: skip
    got = s3.head_object(Bucket=bucket, Key="k")
    assert got["CacheControl"] == "no-cache"
    assert got["ContentDisposition"] == "attachment"
    assert got["ContentEncoding"] == "gzip"
    assert got["ContentLanguage"] == "de"
    assert got["ExpiresString"] == "Wed, 01 Jan 2031 00:00:00 GMT"
    assert got["ContentType"] == "binary/octet-stream"
    assert got["AcceptRanges"] == "bytes"


def test_aws_chunked_is_not_a_coding_of_the_object(raw: Raw, s3: Any, bucket: str) -> None:
    body = b"1;x=y\r\nz\r\n0\r\nx-amz-checksum-crc32:YtJ3rw==\r\n\r\n"
    headers = {
        "content-encoding": "aws-chunked, gzip",
        "x-amz-decoded-content-length": "1",
        "x-amz-trailer": "x-amz-checksum-crc32",
    }
    answer = raw("PUT", f"/{bucket}/k", body, headers=headers, payload_hash="STREAMING-UNSIGNED-PAYLOAD-TRAILER")
    assert answer.status_code == 200, answer.text
    assert s3.head_object(Bucket=bucket, Key="k")["ContentEncoding"] == "gzip"


def test_metadata_is_kept_byte_for_byte(raw: Raw, bucket: str) -> None:
    assert raw("PUT", f"/{bucket}/k", b"x", headers={"x-amz-meta-note": "Grüße"}).status_code == 200
    assert (b"x-amz-meta-note", "Grüße".encode()) in raw("GET", f"/{bucket}/k").headers.raw


def test_metadata_of_other_rooms_fits_a_header(node: Any, s3: Any, bucket: str) -> None:
    request = CommitObject(bucket, b"k", os.urandom(16), 0, "", 0, "root", (), metadata={"note": "µ→\n"})
    node.run(node.buffer.store(request, b"x"))
    note = s3.head_object(Bucket=bucket, Key="k")["Metadata"]["note"]
    assert str(email.header.make_header(email.header.decode_header(note))) == "µ→\n"


def test_overrides(s3: Any, stored: dict[str, Any]) -> None:
    got = s3.get_object(
        Bucket=stored["Bucket"], Key="k", ResponseContentType="text/x", ResponseCacheControl="private",
        ResponseContentDisposition="inline",
    )  # fmt: skip
    assert (got["ContentType"], got["CacheControl"], got["ContentDisposition"]) == ("text/x", "private", "inline")


@pytest.mark.parametrize("value", ["a%0D%0Ax-evil%3A1", "%E2%82%AC"])
def test_an_override_cannot_break_the_head(raw: Raw, code_of: Code, stored: dict[str, Any], value: str) -> None:
    answer = raw("GET", f"/{stored['Bucket']}/k?response-content-type={value}")
    assert (answer.status_code, code_of(answer)) == (400, "InvalidArgument")


def test_metadata_limit(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"", Metadata={"n": "v" * 2047})
    assert refused(s3.put_object, Bucket=bucket, Key="k", Body=b"", Metadata={"n": "v" * 2048}) == (
        400,
        "MetadataTooLarge",
    )


@pytest.mark.parametrize(
    ("header", "value", "status", "code"),
    [
        ("x-amz-server-side-encryption", "AES256", 501, "NotImplemented"),
        ("x-amz-server-side-encryption-customer-algorithm", "AES256", 501, "NotImplemented"),
        ("x-amz-tagging", "a=b&a=c", 400, "InvalidArgument"),
        ("x-amz-tagging", "a=%3C", 400, "InvalidTag"),
        ("x-amz-object-lock-mode", "GOVERNANCE", 400, "InvalidArgument"),
        ("x-amz-acl", "public-read", 400, "AccessControlListNotSupported"),
        ("x-amz-storage-class", "COLDER", 400, "InvalidStorageClass"),
    ],
)
def test_what_is_not_there_is_refused(
    raw: Raw, code_of: Code, bucket: str, header: str, value: str, status: int, code: str
) -> None:
    answer = raw("PUT", f"/{bucket}/k", b"x", headers={header: value})
    assert (answer.status_code, code_of(answer)) == (status, code)
    assert raw("HEAD", f"/{bucket}/k").status_code == 404


def test_a_key_to_read_with_is_refused(raw: Raw, code_of: Code, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x")
    headers = {"x-amz-server-side-encryption-customer-algorithm": "AES256"}
    answer = raw("GET", f"/{bucket}/k", headers=headers)
    assert (answer.status_code, code_of(answer)) == (400, "InvalidRequest")
    assert raw("HEAD", f"/{bucket}/k", headers=headers).status_code == 400
    hint = raw("PUT", f"/{bucket}/k", b"y", headers={"x-amz-server-side-encryption": "aws:kms"})
    assert (hint.status_code, "encrypt the gateway's disks" in hint.text) == (501, True)


def test_every_answer_names_its_request(raw: Raw, stored: dict[str, Any]) -> None:
    fine, missing = raw("GET", f"/{stored['Bucket']}/k"), raw("GET", f"/{stored['Bucket']}/nope%3C")
    for answer in (fine, missing):
        assert answer.headers["x-amz-request-id"]
        assert answer.headers["x-amz-id-2"] == "bm9kZQ=="
    assert f"<RequestId>{missing.headers['x-amz-request-id']}</RequestId>" in missing.text
    assert f"<Resource>/{stored['Bucket']}/nope%3C</Resource>" in missing.text


# -- ranges


@pytest.mark.parametrize(
    ("field", "start", "stop"),
    [("bytes=0-0", 0, 1), ("bytes=5000-6001", 5000, 6002), ("bytes=10000-", 10000, 10240), ("bytes=-7", 10233, 10240),
     ("bytes=-99999", 0, 10240), ("bytes=10239-99999", 10239, 10240)],
)  # fmt: skip
def test_ranges(s3: Any, stored: dict[str, Any], field: str, start: int, stop: int) -> None:
    got = s3.get_object(Bucket=stored["Bucket"], Key="k", Range=field)
    assert got["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert got["ContentRange"] == f"bytes {start}-{stop - 1}/{len(BODY)}"
    assert got["Body"].read() == BODY[start:stop]
    assert not any(name.startswith("x-amz-checksum") for name in got["ResponseMetadata"]["HTTPHeaders"])


@pytest.mark.parametrize("field", ["bytes=5-2", "bytes=0-1,5-6", "lines=0-1", "bytes=a-b", "bytes=-"])
def test_unusable_ranges_are_ignored(raw: Raw, stored: dict[str, Any], field: str) -> None:
    answer = raw("GET", f"/{stored['Bucket']}/k", headers={"range": field})
    assert (answer.status_code, answer.content) == (200, BODY)


@pytest.mark.parametrize("field", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
def test_ranges_beyond_the_end(raw: Raw, code_of: Code, stored: dict[str, Any], field: str) -> None:
    answer = raw("GET", f"/{stored['Bucket']}/k", headers={"range": field})
    assert (answer.status_code, code_of(answer)) == (416, "InvalidRange")
    assert answer.headers["content-range"] == f"bytes */{len(BODY)}"


def test_range_of_a_head(raw: Raw, stored: dict[str, Any]) -> None:
    answer = raw("HEAD", f"/{stored['Bucket']}/k", headers={"range": "bytes=1-4"})
    assert (answer.status_code, answer.headers["content-length"]) == (206, "4")


@pytest.mark.parametrize("fresh", [True, False])
def test_if_range(raw: Raw, stored: dict[str, Any], fresh: bool) -> None:
    etag = stored["ETag"] if fresh else '"other"'
    answer = raw("GET", f"/{stored['Bucket']}/k", headers={"range": "bytes=0-9", "if-range": etag})
    assert answer.status_code == (206 if fresh else 200)
    assert answer.content == (BODY[:10] if fresh else BODY)


# -- conditions


def http_date(offset_s: int) -> str:
    at = datetime.datetime.now(tz=datetime.UTC) + datetime.timedelta(seconds=offset_s)
    return email.utils.format_datetime(at, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if-match": "ETAG"}, 200),
        ({"if-match": '"x", ETAG'}, 200),
        ({"if-match": "*"}, 200),
        ({"if-match": '"x"'}, 412),
        ({"if-none-match": "ETAG"}, 304),
        ({"if-none-match": "W/ETAG"}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"x"'}, 200),
        ({"if-modified-since": "PAST"}, 200),
        ({"if-modified-since": "FUTURE"}, 304),
        ({"if-unmodified-since": "FUTURE"}, 200),
        ({"if-unmodified-since": "PAST"}, 412),
        ({"if-match": "ETAG", "if-unmodified-since": "PAST"}, 200),
        ({"if-none-match": '"x"', "if-modified-since": "FUTURE"}, 200),
        ({"if-match": '"x"', "if-none-match": "ETAG"}, 412),
        ({"if-modified-since": "whenever"}, 200),
        ({"if-match": "*", "range": "bytes=0-1"}, 206),
    ],
)  # fmt: skip
def test_conditional_reads(raw: Raw, stored: dict[str, Any], headers: dict[str, str], status: int) -> None:
    words = {"ETAG": stored["ETag"], "PAST": http_date(-3600), "FUTURE": http_date(3600)}
    for word, value in words.items():
        headers = {name: text.replace(word, value) for name, text in headers.items()}
    for method in ("GET", "HEAD"):
        answer = raw(method, f"/{stored['Bucket']}/k", headers=headers)
        assert answer.status_code == status
        if status == 304:
            assert answer.content == b""
            assert answer.headers["etag"] == stored["ETag"]


def test_create_only_once(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"1", IfNoneMatch="*")
    assert refused(s3.put_object, Bucket=bucket, Key="k", Body=b"2", IfNoneMatch="*") == (412, "PreconditionFailed")
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"1"


def test_replace_only_what_was_read(s3: Any, stored: dict[str, Any]) -> None:
    bucket = stored["Bucket"]
    assert refused(s3.put_object, Bucket=bucket, Key="k", Body=b"2", IfMatch='"x"') == (412, "PreconditionFailed")
    assert refused(s3.put_object, Bucket=bucket, Key="none", Body=b"2", IfMatch='"x"') == (404, "NoSuchKey")
    s3.put_object(Bucket=bucket, Key="k", Body=b"2", IfMatch=stored["ETag"])
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"2"


def test_a_lost_race_is_decided_at_the_commit(raw: Raw, s3: Any, node: Any, bucket: str) -> None:
    """Two creations whose heads are both in before either body: one wins, one is refused, nothing of it stays."""
    body = b"x" * 300_000
    heads = []
    for _ in range(2):
        headers = raw.signed("PUT", f"/{bucket}/k", body, {"if-none-match": "*"}, "UNSIGNED-PAYLOAD")  # type: ignore[attr-defined]
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if name.lower() != "content-length")
        peer = socket.create_connection(("127.0.0.1", node.port))
        peer.sendall(
            f"PUT /{bucket}/k HTTP/1.1\r\nhost: 127.0.0.1:{node.port}\r\n{lines}"
            f"content-length: {len(body)}\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n".encode()
        )
        assert peer.recv(100).startswith(b"HTTP/1.1 100 ")
        heads.append(peer)
    statuses = []
    for peer in heads:
        peer.sendall(body)
        answer = b""
        while more := peer.recv(65536):
            answer += more
        statuses.append(int(answer.split()[1]))
        peer.close()
    assert statuses == [200, 412]


# -- ETags


def test_etag_is_derived_unless_md5_is_asked_for(s3: Any, raw: Raw, bucket: str) -> None:
    md5 = hashlib.md5(BODY).hexdigest()
    plain = s3.put_object(Bucket=bucket, Key="k", Body=BODY)["ETag"].strip('"')
    again = s3.put_object(Bucket=bucket, Key="k2", Body=BODY)["ETag"].strip('"')
    assert plain == again
    assert len(plain) == 34
    assert plain.endswith("-1")
    content_md5 = base64.b64encode(hashlib.md5(BODY).digest()).decode()
    with_md5 = raw("PUT", f"/{bucket}/k", BODY, headers={"content-md5": content_md5})
    assert with_md5.headers["etag"] == f'"{md5}"'
    s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": "hiss.etag", "Value": "md5"}]})
    assert s3.put_object(Bucket=bucket, Key="k", Body=BODY)["ETag"] == f'"{md5}"'


# -- deleting many


def test_delete_objects(s3: Any, bucket: str) -> None:
    keys = [f"k{number} <&>" for number in range(5)]
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"x")
    answer = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in [*keys[:3], "never-was"]]})
    assert sorted(row["Key"] for row in answer["Deleted"]) == sorted([*keys[:3], "never-was"])
    assert "Errors" not in answer
    quiet = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": keys[3]}], "Quiet": True})
    assert "Deleted" not in quiet
    assert [row["Key"] for row in s3.list_objects_v2(Bucket=bucket)["Contents"]] == [keys[4]]


def test_delete_of_more_than_1000(s3: Any, bucket: str) -> None:
    objects = [{"Key": f"{number}"} for number in range(1001)]
    assert refused(s3.delete_objects, Bucket=bucket, Delete={"Objects": objects}) == (400, "MalformedXML")


@pytest.mark.parametrize(
    "body",
    [b"", b"<Delete", b"<Delete/>", b"<Other/>", b"<Delete><Object/></Delete>", b"\xff\xfe",
     b'<!DOCTYPE d [<!ENTITY e "x">]><Delete><Object><Key>&e;</Key></Object></Delete>',
     b"<Delete>" + b"<Object>" * 50 + b"</Object>" * 50 + b"</Delete>"],
)  # fmt: skip
def test_malformed_documents(raw: Raw, code_of: Code, bucket: str, body: bytes) -> None:
    digest = base64.b64encode(hashlib.md5(body).digest()).decode()
    answer = raw("POST", f"/{bucket}?delete", body, headers={"content-md5": digest})
    assert (answer.status_code, code_of(answer)) == (400, "MalformedXML")


# -- presigned


def test_presigned_urls(make_client: Callable[..., Any], root_keys: tuple[str, str], bucket: str) -> None:
    client = make_client(root_keys, signature_version="s3v4")
    put = client.generate_presigned_url("put_object", {"Bucket": bucket, "Key": "ü k"}, ExpiresIn=60)
    assert httpx.put(put, content=BODY).status_code == 200
    get = client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": "ü k"}, ExpiresIn=60)
    assert httpx.get(get).content == BODY
    assert httpx.get(get.replace("Expires=60", "Expires=61")).status_code == 403


def test_anonymous_is_refused(node: Any, bucket: str) -> None:
    assert httpx.get(f"{node.endpoint}/{bucket}/k").status_code == 403
    assert httpx.get(f"{node.endpoint}/").status_code == 403


def test_virtual_host_style(raw: Raw, node: Any, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="a/b", Body=b"hello")
    headers = {"host": f"{bucket}.s3.test:{node.port}"}
    assert raw("GET", "/a/b", headers=headers).content == b"hello"
    assert raw("HEAD", "/", headers=headers).status_code == 200


def test_head_of_a_failed_put_leaves_nothing(raw: Raw, s3: Any, bucket: str) -> None:
    key = secrets.token_hex(4)
    headers = {"content-md5": base64.b64encode(hashlib.md5(b"other").digest()).decode()}
    answer = raw("PUT", f"/{bucket}/{key}", BODY, headers=headers)
    assert answer.status_code == 400
    assert refused(s3.head_object, Bucket=bucket, Key=key) == (404, "404")
