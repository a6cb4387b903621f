"""Object lock over S3, on a node whose clock the tests move."""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from ingest import clock
from ingest.records import Grant
from s3api.call import ServiceSettings
from tests.s3api.conftest import CheckingHost, NodeThread, RawClient, error_code, s3_client, write_certificate
from tests.s3api.test_versioning import refused

DAY_S = 86400
DENIED = (403, "AccessDenied")


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeThread]:
    node = NodeThread(tmp_path_factory.mktemp("lock") / "node", ServiceSettings(), CheckingHost())  # type: ignore[arg-type]
    write_certificate(node.certificate)
    node.paths.create()
    clock.create(node.paths)
    node.start()
    yield node
    node.stop()


@pytest.fixture(scope="module")
def keys(timed: NodeThread) -> tuple[str, str]:
    return timed.add_user("root", root=True)


@pytest.fixture(scope="module")
def s3(timed: NodeThread, keys: tuple[str, str]) -> Iterator[Any]:
    client = s3_client(timed, keys)
    yield client
    client.close()


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"lock-{secrets.token_hex(6)}"
    s3.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    return name


def in_days(node: NodeThread, days: float) -> datetime.datetime:
    now_s = node.catalog.now_ns() // 1_000_000_000
    return datetime.datetime.fromtimestamp(now_s, datetime.UTC) + datetime.timedelta(days=days)


def test_configuration(s3: Any, bucket: str) -> None:
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    assert s3.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"] == {
        "ObjectLockEnabled": "Enabled"
    }
    for retention in ({"Mode": "GOVERNANCE", "Days": 7}, {"Mode": "COMPLIANCE", "Years": 2}):
        wanted = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": retention}}
        s3.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=wanted)
        assert s3.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"] == wanted
    suspended = {"Status": "Suspended"}
    answer = refused(s3.put_bucket_versioning, Bucket=bucket, VersioningConfiguration=suspended)
    assert answer == (409, "InvalidBucketState")


@pytest.mark.parametrize(
    ("retention", "code"),
    [
        ({"Mode": "GOVERNANCE", "Days": 0}, "InvalidRetentionPeriod"),
        ({"Mode": "GOVERNANCE", "Years": 101}, "InvalidRetentionPeriod"),
        ({"Mode": "GOVERNANCE", "Days": 1, "Years": 1}, "MalformedXML"),
        ({"Mode": "abc", "Days": 1}, "MalformedXML"),
        ({"Mode": "GOVERNANCE"}, "MalformedXML"),
    ],
)
def test_rules_that_cannot_be(s3: Any, bucket: str, retention: dict[str, Any], code: str) -> None:
    wanted = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": retention}}
    assert refused(s3.put_object_lock_configuration, Bucket=bucket, ObjectLockConfiguration=wanted) == (400, code)


def test_a_bucket_without_lock(s3: Any, timed: NodeThread) -> None:
    name = f"plain-{secrets.token_hex(6)}"
    s3.create_bucket(Bucket=name)
    s3.put_object(Bucket=name, Key="k", Body=b"1")
    wanted = {"ObjectLockEnabled": "Enabled"}
    assert refused(s3.get_object_lock_configuration, Bucket=name) == (404, "ObjectLockConfigurationNotFoundError")
    put = s3.put_object_lock_configuration
    assert refused(put, Bucket=name, ObjectLockConfiguration=wanted) == (409, "InvalidBucketState")
    invalid = (400, "InvalidRequest")
    retention = {"Mode": "GOVERNANCE", "RetainUntilDate": in_days(timed, 1)}
    assert refused(s3.put_object_retention, Bucket=name, Key="k", Retention=retention) == invalid
    assert refused(s3.get_object_retention, Bucket=name, Key="k") == invalid
    assert refused(s3.put_object_legal_hold, Bucket=name, Key="k", LegalHold={"Status": "ON"}) == invalid
    assert refused(s3.get_object_legal_hold, Bucket=name, Key="k") == invalid
    assert refused(s3.put_object, Bucket=name, Key="k", Body=b"", ObjectLockLegalHoldStatus="ON") == invalid
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    put(Bucket=name, ObjectLockConfiguration=wanted)
    s3.put_object_legal_hold(Bucket=name, Key="k", LegalHold={"Status": "ON"})


@pytest.mark.parametrize("mode", ["GOVERNANCE", "COMPLIANCE"])
def test_retention_passes_with_time(s3: Any, timed: NodeThread, bucket: str, mode: str) -> None:
    until = in_days(timed, 30)
    put = s3.put_object(Bucket=bucket, Key="k", Body=b"raw", ObjectLockMode=mode, ObjectLockRetainUntilDate=until)
    version = {"Bucket": bucket, "Key": "k", "VersionId": put["VersionId"]}
    head = s3.head_object(**version)
    assert (head["ObjectLockMode"], head["ObjectLockRetainUntilDate"]) == (mode, until)
    assert s3.get_object_retention(**version)["Retention"] == {"Mode": mode, "RetainUntilDate": until}
    assert refused(s3.delete_object, **version) == DENIED
    (error,) = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "k", "VersionId": put["VersionId"]}]})[
        "Errors"
    ]
    assert error["Code"] == "AccessDenied"
    if mode == "COMPLIANCE":
        assert refused(s3.delete_object, **version, BypassGovernanceRetention=True) == DENIED
    s3.delete_object(Bucket=bucket, Key="k")
    s3.put_object(Bucket=bucket, Key="k", Body=b"more")
    assert s3.get_object(**version)["Body"].read() == b"raw"
    clock.advance(timed.paths, 31 * DAY_S)
    s3.delete_object(**version)


def test_bypassing_needs_the_permission(s3: Any, timed: NodeThread, bucket: str) -> None:
    writer = s3_client(timed, timed.add_user("writer", Grant(bucket="*", access="write")))
    retention = {"Mode": "GOVERNANCE", "RetainUntilDate": in_days(timed, 10)}
    version = {"Bucket": bucket, "Key": "k", "VersionId": s3.put_object(Bucket=bucket, Key="k")["VersionId"]}
    s3.put_object_retention(**version, Retention=retention)
    shorter = retention | {"RetainUntilDate": in_days(timed, 5)}
    for client in (s3, writer):
        assert refused(client.put_object_retention, **version, Retention=shorter) == DENIED
    assert refused(writer.delete_object, **version, BypassGovernanceRetention=True) == DENIED
    assert refused(writer.put_object_retention, **version, Retention=shorter, BypassGovernanceRetention=True) == DENIED
    writer.put_object_retention(**version, Retention=retention | {"RetainUntilDate": in_days(timed, 20)})
    s3.put_object_retention(**version, Retention=shorter, BypassGovernanceRetention=True)
    s3.delete_object(**version, BypassGovernanceRetention=True)
    writer.close()


def test_bypassing_is_decided_for_each_key(s3: Any, timed: NodeThread, bucket: str) -> None:
    lifts = {"Effect": "Allow", "Action": "s3:*", "Resource": f"arn:aws:s3:::{bucket}/*"}
    not_here = lifts | {
        "Effect": "Deny",
        "Action": "s3:BypassGovernanceRetention",
        "Resource": f"arn:aws:s3:::{bucket}/kept/*",
    }
    policies = {"most": json.dumps({"Statement": [lifts, not_here]})}
    client = s3_client(timed, timed.add_user("lifter", policies=policies))
    lock = {"ObjectLockMode": "GOVERNANCE", "ObjectLockRetainUntilDate": in_days(timed, 10)}
    named = [
        {"Key": key, "VersionId": s3.put_object(Bucket=bucket, Key=key, Body=b"1", **lock)["VersionId"]}
        for key in ("kept/a", "free/a")
    ]
    answer = client.delete_objects(Bucket=bucket, Delete={"Objects": named}, BypassGovernanceRetention=True)
    assert [(row["Key"], row["Code"]) for row in answer["Errors"]] == [("kept/a", "AccessDenied")]
    assert [row["Key"] for row in answer["Deleted"]] == ["free/a"]
    s3.head_object(Bucket=bucket, **named[0])
    client.close()


def test_legal_hold(s3: Any, timed: NodeThread, bucket: str) -> None:
    put = s3.put_object(Bucket=bucket, Key="k", Body=b"1", ObjectLockLegalHoldStatus="ON")
    version = {"Bucket": bucket, "Key": "k", "VersionId": put["VersionId"]}
    assert s3.get_object_legal_hold(**version)["LegalHold"] == {"Status": "ON"}
    assert s3.head_object(**version)["ObjectLockLegalHoldStatus"] == "ON"
    assert refused(s3.get_object_retention, **version) == (404, "NoSuchObjectLockConfiguration")
    clock.advance(timed.paths, 999 * DAY_S)
    assert refused(s3.delete_object, **version, BypassGovernanceRetention=True) == DENIED
    assert refused(s3.put_object_legal_hold, **version, LegalHold={"Status": "abc"}) == (400, "MalformedXML")
    s3.put_object_legal_hold(**version, LegalHold={"Status": "OFF"})
    s3.delete_object(**version)


def test_default_retention_covers_every_kind_of_write(s3: Any, bucket: str) -> None:
    rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 3}}
    configuration = {"ObjectLockEnabled": "Enabled", "Rule": rule}
    s3.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=configuration)
    s3.put_object(Bucket=bucket, Key="put", Body=b"1")
    s3.copy_object(Bucket=bucket, Key="copied", CopySource=f"{bucket}/put")
    upload = s3.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key="parts", UploadId=upload, PartNumber=1, Body=b"1")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s3.complete_multipart_upload(Bucket=bucket, Key="parts", UploadId=upload, MultipartUpload=parts)
    for key in ("put", "copied", "parts"):
        assert s3.head_object(Bucket=bucket, Key=key)["ObjectLockMode"] == "GOVERNANCE"


def test_locks_of_copies_and_uploads(s3: Any, timed: NodeThread, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"1")
    lock = {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": in_days(timed, 1)}
    s3.copy_object(Bucket=bucket, Key="copied", CopySource=f"{bucket}/k", **lock)
    upload = s3.create_multipart_upload(Bucket=bucket, Key="parts", **lock)["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key="parts", UploadId=upload, PartNumber=1, Body=b"1")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s3.complete_multipart_upload(Bucket=bucket, Key="parts", UploadId=upload, MultipartUpload=parts)
    for key in ("copied", "parts"):
        assert s3.head_object(Bucket=bucket, Key=key)["ObjectLockMode"] == "COMPLIANCE"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"x-amz-object-lock-mode": "GOVERNANCE"}, "InvalidArgument"),
        ({"x-amz-object-lock-retain-until-date": "2099-01-01T00:00:00Z"}, "InvalidArgument"),
        ({"x-amz-object-lock-mode": "X", "x-amz-object-lock-retain-until-date": "2099-01-01T00:00:00Z"},
         "InvalidArgument"),
        ({"x-amz-object-lock-mode": "GOVERNANCE", "x-amz-object-lock-retain-until-date": "2001-01-01T00:00:00Z"},
         "InvalidArgument"),
        ({"x-amz-object-lock-mode": "GOVERNANCE", "x-amz-object-lock-retain-until-date": "soon"}, "InvalidArgument"),
        ({"x-amz-object-lock-mode": "GOVERNANCE", "x-amz-object-lock-retain-until-date": "9999-12-31T00:00:00Z"},
         "InvalidArgument"),
        ({"x-amz-object-lock-legal-hold": "MAYBE"}, "InvalidArgument"),
        ({"x-amz-object-lock-legal-hold": "ON"}, "InvalidRequest"),  # no checksum
    ],
)  # fmt: skip
def test_headers_that_cannot_be(
    timed: NodeThread, keys: tuple[str, str], bucket: str, headers: dict[str, str], code: str
) -> None:
    raw = RawClient(timed.endpoint, keys)
    answer = raw("PUT", f"/{bucket}/k", b"1", headers=headers)
    assert (answer.status_code, error_code(answer)) == (400, code)
    raw.http.close()
