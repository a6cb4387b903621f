"""Browser uploads: forms that boto3 signs and httpx sends, whole and in the smallest pieces; and what their policies forbid."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import secrets
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from s3api.form import FormBody, boundary_of
from s3api.http.message import Headers

MIB = 1 << 20


@pytest.fixture
def sign(s3: Any, make_client: Any, root_keys: Any, bucket: str) -> Callable[..., dict[str, Any]]:
    def signed(key: str, fields: Any = None, conditions: Any = None, version: str = "s3v4") -> dict[str, Any]:
        client = make_client(root_keys, signature_version=version)
        return dict(client.generate_presigned_post(bucket, key, Fields=fields, Conditions=conditions, ExpiresIn=600))

    return signed


def post(form: dict[str, Any], body: bytes, **fields: str) -> httpx.Response:
    return httpx.post(form["url"], data={**form["fields"], **fields}, files={"file": ("a b.txt", body, "text/x")})


@pytest.mark.parametrize("version", ["s3", "s3v4"])
def test_a_form_uploads_a_file(s3: Any, bucket: str, sign: Any, version: str) -> None:
    conditions: list[Any] = [
        {"acl": "public-read"},
        ["starts-with", "$x-amz-meta-note", ""],
        {"success_action_status": "201"},
    ]
    form = sign("up/${filename}", conditions=[*conditions, ["content-length-range", 1, 100]], version=version)
    fields = {"acl": "bucket-owner-full-control"}
    answer = post(form, b"hello", **fields, success_action_status="201")
    assert (answer.status_code, code(answer)) == (403, "AccessDenied")
    answer = post(form, b"hello", acl="public-read", success_action_status="201", **{"x-amz-meta-note": "grüße"})
    assert answer.status_code == 400, "the bucket has no lists"
    form = sign("up/${filename}", conditions=[*conditions[1:], ["content-length-range", 1, 100]], version=version)
    answer = post(form, b"hello", success_action_status="201", **{"x-amz-meta-note": "ascii"})
    assert answer.status_code == 201
    assert "<Key>up/a b.txt</Key>" in answer.text
    head = s3.get_object(Bucket=bucket, Key="up/a b.txt")
    assert (head["Body"].read(), head["ContentType"], head["Metadata"]) == (b"hello", "text/x", {"note": "ascii"})
    assert answer.headers["etag"] == head["ETag"]
    assert code(post(form, b"", success_action_status="201", **{"x-amz-meta-note": ""})) == "EntityTooSmall"
    assert code(post(form, b"x" * 101, success_action_status="201", **{"x-amz-meta-note": ""})) == "EntityTooLarge"
    assert code(post(form, b"x", success_action_status="201", extra="1", **{"x-amz-meta-note": ""})) == "AccessDenied"


def test_a_large_file_and_one_full_of_boundaries(s3: Any, bucket: str, sign: Any) -> None:
    for number, body in enumerate((secrets.token_bytes(9 * MIB + 17), b"\r\n--" * 400_000, b"\r" * 300_000, b"")):
        answer = post(sign(f"large-{number}"), body)
        assert answer.status_code == 204
        assert hashlib.sha256(s3.get_object(Bucket=bucket, Key=f"large-{number}")["Body"].read()).digest() == (
            hashlib.sha256(body).digest()
        )


def test_tags_redirect_and_statuses(s3: Any, bucket: str, sign: Any) -> None:
    tagging = "<Tagging><TagSet><Tag><Key>a</Key><Value>b c</Value></Tag></TagSet></Tagging>"
    redirect = "http://example.org/done?x=1"
    conditions = [{"tagging": tagging}, {"success_action_redirect": redirect}]
    answer = post(sign("k", conditions=conditions), b"x", tagging=tagging, success_action_redirect=redirect)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith(f"http://example.org/done?x=1&bucket={bucket}&key=k&etag=%22")
    assert s3.get_object_tagging(Bucket=bucket, Key="k")["TagSet"] == [{"Key": "a", "Value": "b c"}]


@pytest.mark.parametrize(
    ("redirect", "status", "location"),
    [
        ("http://example.org/ü?ö=\0", 303, "http://example.org/%C3%BC?%C3%B6=%00&bucket="),
        ("http://example.org/a\r\nx-evil: 1", 303, "http://example.org/a%0D%0Ax-evil:%201?bucket="),
        ("http://[::1/", 204, ""),
        ("javascript:alert(1)", 204, ""),
    ],
)
def test_a_redirect_is_a_url_or_nothing(
    s3: Any, bucket: str, sign: Any, redirect: str, status: int, location: str
) -> None:
    form = sign("k", conditions=[{"success_action_redirect": redirect}])
    answer = post(form, b"x", success_action_redirect=redirect)
    assert answer.status_code == status, answer.text
    assert "x-evil" not in answer.headers
    assert not location or answer.headers["location"].startswith(location)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"x"


@pytest.mark.parametrize("name", ["x-amz-meta-a b", "x-amz-meta-a: b", "x-amz-meta-ü", "x-amz-meta-漢"])
def test_a_field_that_no_header_can_be_called_is_refused(s3: Any, bucket: str, sign: Any, name: str) -> None:
    form = sign("k", conditions=[{name: "v"}])
    assert code(post(form, b"x", **{name: "v"})) == "InvalidArgument"
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def code(answer: httpx.Response) -> str:
    return answer.text.partition("<Code>")[2].partition("</Code>")[0]


def policy_form(node: Any, keys: tuple[str, str], bucket: str, document: Any) -> dict[str, Any]:
    text = document if isinstance(document, str) else json.dumps(document)
    policy = base64.b64encode(text.encode()).decode()
    signature = base64.b64encode(hmac.digest(keys[1].encode(), policy.encode(), "sha1")).decode()
    fields = {"key": "k", "AWSAccessKeyId": keys[0], "signature": signature, "policy": policy}
    return {"url": f"{node.endpoint}/{bucket}", "fields": fields}


def expiration(seconds: int = 600) -> str:
    at = datetime.datetime.now(tz=datetime.UTC) + datetime.timedelta(seconds=seconds)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"expiration": expiration(-10)}, (403, "AccessDenied")),
        ({"expiration": "tomorrow"}, (400, "InvalidPolicyDocument")),
        ({"expiration": None}, (400, "InvalidPolicyDocument")),
        ({"conditions": []}, (400, "InvalidPolicyDocument")),
        ({"conditions": None}, (400, "InvalidPolicyDocument")),
        ({"conditions": [{"bucket": "other"}, {"key": "k"}]}, (403, "AccessDenied")),
        ({"conditions": [{"key": "other"}]}, (403, "AccessDenied")),
        ({"conditions": [{"key": "k"}]}, (403, "AccessDenied")),
        ({"conditions": [["content-length-range", 0], {"key": "k"}]}, (400, "InvalidPolicyDocument")),
        ({"conditions": [["content-length-range", -1, 9], {"key": "k"}]}, (400, "InvalidPolicyDocument")),
        ({"conditions": [["like", "$key", "k"]]}, (400, "InvalidPolicyDocument")),
    ],
)
def test_policies_that_forbid(
    node: Any, root_keys: Any, bucket: str, change: dict[str, Any], expected: tuple[int, str]
) -> None:
    document = {"expiration": expiration(), "conditions": [{"bucket": bucket}, {"key": "k"}]} | change
    answer = post(policy_form(node, root_keys, bucket, document), b"x")
    assert (answer.status_code, code(answer)) == expected
    good = {"expiration": expiration(), "conditions": [{"bucket": bucket}, {"key": "k"}]}
    assert post(policy_form(node, root_keys, bucket, good), b"x").status_code == 204


@pytest.mark.parametrize(("written", "key"), [(r"\$k", "$k"), (r"\\$k", r"\$k"), (r"\\\$k", r"\$k"), ("$k", "$k")])
def test_a_dollar_may_be_escaped_in_a_policy(
    node: Any, s3: Any, root_keys: Any, bucket: str, written: str, key: str
) -> None:
    document = json.dumps({"expiration": expiration(), "conditions": [{"bucket": bucket}, ["eq", "$key", "KEY"]]})
    form = policy_form(node, root_keys, bucket, document.replace("KEY", written))
    form["fields"]["key"] = key
    assert post(form, b"x").status_code == 204
    assert s3.list_objects_v2(Bucket=bucket, Prefix=key)["KeyCount"] == 1
    form["fields"]["key"] = "k"
    assert post(form, b"x").status_code == 403


def test_forms_that_are_not_signed_right(node: Any, s3: Any, root_keys: Any, bucket: str, sign: Any) -> None:
    good = sign("k")
    for name, value, expected in (
        ("x-amz-signature", "0" * 64, "SignatureDoesNotMatch"),
        (
            "x-amz-credential",
            good["fields"]["x-amz-credential"].replace("us-east-1", "x"),
            "AuthorizationQueryParametersError",
        ),
        ("policy", "", "InvalidArgument"),
        ("x-amz-signature", "", "InvalidArgument"),
        ("key", "", "InvalidArgument"),
    ):
        assert code(post({**good, "fields": {**good["fields"], name: value}}, b"x")) == expected
    anonymous = {"url": f"{node.endpoint}/{bucket}", "fields": {"key": "k"}}
    assert code(post(anonymous, b"x")) == "AccessDenied"
    statement = {"Effect": "Allow", "Principal": "*", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
    s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Statement": [statement]}))
    assert post(anonymous, b"x").status_code == 204
    assert httpx.post(anonymous["url"], content=b"x").status_code == 412
    assert httpx.post(anonymous["url"], data={"key": "k"}, files={"other": b"x"}).status_code == 400
    wide = {**anonymous, "fields": {"key": "k", "x-ignore-me": "y" * 30_000}}
    assert code(post(wide, b"x")) == "MaxPostPreDataLengthExceededError"


def test_a_form_that_breaks_off_leaves_nothing(node: Any, s3: Any, bucket: str, sign: Any) -> None:
    request = httpx.Request("POST", sign("cut")["url"], data=sign("cut")["fields"], files={"file": b"y" * 100_000})
    body = request.read()
    head = f"POST /{bucket} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: {request.headers['content-type']}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", node.port), timeout=60) as peer:
        peer.sendall(head.encode() + body[:60_000])
        peer.shutdown(socket.SHUT_WR)
        assert b" 400 " in peer.recv(65536).split(b"\r\n")[0]
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket)


class Pieces:
    """A body that comes in pieces of a given size."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = data, size

    async def into(self, sink: Any) -> int:
        at = 0
        while at < len(self.data):
            room = sink.get_buffer()
            if room is None:
                await sink.writable()
                continue
            count = min(self.size, len(room), len(self.data) - at)
            room[:count] = self.data[at : at + count]
            sink.received(count)
            at += count
        return at


class Narrow:
    """A sink that takes a few bytes at a time, and has no memory every other time."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._room = bytearray(7)
        self._full = False

    def get_buffer(self) -> memoryview | None:
        self._full = not self._full
        return None if self._full else memoryview(self._room)

    def received(self, count: int) -> None:
        self.data += self._room[:count]

    async def writable(self) -> None:
        return


@pytest.mark.parametrize("size", [1, 2, 3, 7, 61, 10_000])
async def test_any_cut_of_a_form_gives_the_same_file(size: int) -> None:
    content = b"a\r\n--bound\r\n--boun\r\r\n--" + bytes(range(256)) + b"\r\n-"
    request = httpx.Request(
        "POST", "http://x", data={"key": "k", "x-ignore-empty": ""}, files={"file": ("C:\\x\\f.bin", content)},
        headers={"content-type": "multipart/form-data; boundary=boundary"},
    )  # fmt: skip
    body = request.read()
    boundary = boundary_of(Headers([("content-type", request.headers["content-type"])]).get("content-type"))
    assert boundary == b"boundary"
    form = FormBody(Pieces(body + b"\r\nepilogue", size), boundary)  # type: ignore[arg-type]
    fields = await form.fields()
    assert (fields["key"], fields["x-ignore-empty"], fields["filename"]) == ("k", "", "f.bin")
    sink = Narrow()
    assert await form.into(sink) == len(content)
    assert bytes(sink.data) == content
