"""CORS: rules in and out, preflight, and what answers to browsers carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

RULES = [
    {"ID": "get", "AllowedMethods": ["GET", "HEAD"], "AllowedOrigins": ["*.lab.example", "https://exact.example"],
     "ExposeHeaders": ["ETag", "x-amz-meta-run"], "MaxAgeSeconds": 3000},
    {"AllowedMethods": ["PUT"], "AllowedOrigins": ["*"], "AllowedHeaders": ["x-amz-*", "content-type"]},
]  # fmt: skip


@pytest.fixture
def rules(s3: Any, bucket: str) -> list[dict[str, Any]]:
    s3.put_bucket_cors(Bucket=bucket, CORSConfiguration={"CORSRules": RULES})
    return RULES


def preflight(endpoint: str, path: str, origin: str = "", method: str = "", headers: str = "") -> httpx.Response:
    fields = {"origin": origin, "access-control-request-method": method, "access-control-request-headers": headers}
    return httpx.options(endpoint + path, headers={name: value for name, value in fields.items() if value})


def test_rules_are_stored_and_returned(s3: Any, bucket: str, rules: list[dict[str, Any]]) -> None:
    assert s3.get_bucket_cors(Bucket=bucket)["CORSRules"] == rules
    s3.delete_bucket_cors(Bucket=bucket)
    with pytest.raises(ClientError, match="NoSuchCORSConfiguration"):
        s3.get_bucket_cors(Bucket=bucket)
    s3.delete_bucket_cors(Bucket=bucket)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ({"AllowedMethods": ["PATCH"], "AllowedOrigins": ["*"]}, "InvalidRequest"),
        ({"AllowedMethods": ["GET"], "AllowedOrigins": ["http://*.*"]}, "InvalidRequest"),
        ({"AllowedMethods": ["GET"], "AllowedOrigins": ["*"], "AllowedHeaders": ["x-*-*"]}, "InvalidRequest"),
        ({"AllowedMethods": ["GET"], "AllowedOrigins": ["*"], "ExposeHeaders": ["*"]}, "InvalidRequest"),
        ({"AllowedMethods": ["GET"], "AllowedOrigins": ["*"], "ID": "i" * 256}, "InvalidRequest"),
        ({"AllowedMethods": ["GET"], "AllowedOrigins": []}, "MalformedXML"),
    ],
)
def test_wrong_rules_are_refused(s3: Any, bucket: str, rule: dict[str, Any], code: str) -> None:
    with pytest.raises(ClientError, match=code):
        s3.put_bucket_cors(Bucket=bucket, CORSConfiguration={"CORSRules": [rule]})
    with pytest.raises(ClientError, match="InvalidRequest"):
        s3.put_bucket_cors(Bucket=bucket, CORSConfiguration={"CORSRules": [RULES[0]] * 101})


def test_a_configuration_needs_a_checksum(raw: Callable[..., httpx.Response], bucket: str) -> None:
    body = b"<CORSConfiguration/>"
    answer = raw("PUT", f"/{bucket}?cors", body)
    assert (answer.status_code, "Content-MD5" in answer.text) == (400, True)


def test_preflight(node: Any, bucket: str, rules: list[dict[str, Any]]) -> None:
    path = f"/{bucket}/any%20key"
    answer = preflight(node.endpoint, path, "https://p11.lab.example", "GET")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://p11.lab.example"
    assert answer.headers["access-control-allow-methods"] == "GET, HEAD"
    assert answer.headers["access-control-expose-headers"] == "ETag, x-amz-meta-run"
    assert answer.headers["access-control-max-age"] == "3000"
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "Origin" in answer.headers["vary"]
    anybody = preflight(node.endpoint, path, "https://x", "PUT", "X-Amz-Date, Content-Type")
    assert anybody.headers["access-control-allow-origin"] == "*"
    assert anybody.headers["access-control-allow-headers"] == "x-amz-date, content-type"
    assert "access-control-allow-credentials" not in anybody.headers
    assert preflight(node.endpoint, f"/{bucket}", "https://exact.example", "HEAD").status_code == 200


@pytest.mark.parametrize(
    ("origin", "method", "headers", "status", "code"),
    [
        ("", "GET", "", 400, "BadRequest"),
        ("https://a.lab.example", "", "", 400, "BadRequest"),
        ("https://a.lab.example", "PATCH", "", 400, "BadRequest"),
        ("https://a.lab.example", "DELETE", "", 403, "AccessForbidden"),
        ("https://exact.example.evil", "GET", "", 403, "AccessForbidden"),
        ("https://a.lab.example", "GET", "x-amz-date", 403, "AccessForbidden"),
        ("https://x", "PUT", "authorization", 403, "AccessForbidden"),
    ],
)
def test_refused_preflights(
    node: Any, bucket: str, rules: Any, origin: str, method: str, headers: str, status: int, code: str
) -> None:
    answer = preflight(node.endpoint, f"/{bucket}/k", origin, method, headers)
    assert (answer.status_code, f"<Code>{code}</Code>" in answer.text) == (status, True)
    assert "access-control-allow-origin" not in answer.headers


def test_preflight_without_rules(node: Any, bucket: str) -> None:
    for name, text in ((bucket, "CORS is not enabled"), ("no-such-bucket-at-all", "Bucket not found")):
        answer = preflight(node.endpoint, f"/{name}/k", "https://x", "GET")
        assert (answer.status_code, text in answer.text) == (403, True)


def test_answers_to_browsers(s3: Any, raw: Callable[..., httpx.Response], bucket: str, rules: Any) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x")
    origin = {"origin": "https://a.lab.example"}
    found = raw("GET", f"/{bucket}/k", headers=origin)
    assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, origin["origin"])
    missing = raw("GET", f"/{bucket}/gone", headers=origin)
    assert (missing.status_code, missing.headers["access-control-allow-origin"]) == (404, origin["origin"])
    assert "access-control-allow-origin" not in raw("DELETE", f"/{bucket}/k", headers=origin).headers
    assert "access-control-allow-origin" not in raw("GET", f"/{bucket}/k").headers


NONE = [
    ("encryption", 404, "ServerSideEncryptionConfigurationNotFoundError"),
    ("website", 404, "NoSuchWebsiteConfiguration"),
    ("replication", 404, "ReplicationConfigurationNotFoundError"),
    ("logging", 200, "BucketLoggingStatus"),
    ("accelerate", 200, "AccelerateConfiguration"),
    ("requestPayment", 200, "BucketOwner"),
    ("inventory", 200, "ListInventoryConfigurationsResult"),
    ("inventory&id=x", 404, "NoSuchConfiguration"),
    ("analytics", 200, "ListBucketAnalyticsConfigurationResult"),
    ("metrics&id=x", 404, "NoSuchConfiguration"),
    ("intelligent-tiering", 200, "ListBucketIntelligentTieringConfigurationsOutput"),
]


@pytest.mark.parametrize(("query", "status", "text"), NONE)
def test_configurations_that_no_bucket_has(
    raw: Callable[..., httpx.Response], bucket: str, query: str, status: int, text: str
) -> None:
    answer = raw("GET", f"/{bucket}?{query}")
    assert (answer.status_code, text in answer.text) == (status, True)
    assert raw("GET", f"/no-such-bucket-at-all?{query}").status_code == 404
    if query != "requestPayment":
        assert raw("PUT", f"/{bucket}?{query}", b"<X/>").status_code == 501


def test_nobody_is_billed(s3: Any, bucket: str) -> None:
    s3.put_bucket_request_payment(Bucket=bucket, RequestPaymentConfiguration={"Payer": "BucketOwner"})
    assert s3.get_bucket_request_payment(Bucket=bucket)["Payer"] == "BucketOwner"
    with pytest.raises(ClientError, match="NotImplemented"):
        s3.put_bucket_request_payment(Bucket=bucket, RequestPaymentConfiguration={"Payer": "Requester"})
