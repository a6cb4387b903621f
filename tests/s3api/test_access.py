"""Who may do what, over the wire: policies, blocks, ownership, lists, anonymous requests, old signatures, temporary keys."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import boto3
import httpx
import msgspec
import pytest
from botocore import UNSIGNED
from botocore.auth import HmacV1Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials as BotoCredentials
from botocore.exceptions import ClientError

from ingest.records import AccessKey, Grant

OWN = json.dumps({"Statement": {"Effect": "Allow", "Action": "s3:CreateBucket", "Resource": "*"}})


def refused(call: Callable[..., Any], **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def policy(bucket: str, **fields: Any) -> str:
    statement = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement | fields]})


@pytest.fixture(scope="module")
def people(node: Any) -> dict[str, tuple[str, str]]:
    """Two users who own what they make and have no other rights, as conformance suites want them."""
    return {name: node.add_user(name, email=f"{name}@example.org", policies={"own": OWN}) for name in ("main", "alt")}


@pytest.fixture
def main(people: Any, make_client: Any) -> Any:
    return make_client(people["main"])


@pytest.fixture
def alt(people: Any, make_client: Any) -> Any:
    return make_client(people["alt"])


@pytest.fixture
def nobody(make_client: Any) -> Any:
    return make_client(("x", "y"), signature_version=UNSIGNED)


@pytest.fixture
def mine(main: Any) -> str:
    name = f"own-{secrets.token_hex(6)}"
    main.create_bucket(Bucket=name)
    main.put_object(Bucket=name, Key="k", Body=b"hello")
    return name


@pytest.fixture
def listed(main: Any, mine: str) -> str:
    """A bucket with access control lists."""
    main.put_bucket_ownership_controls(Bucket=mine, OwnershipControls={"Rules": [{"ObjectOwnership": "ObjectWriter"}]})
    return mine


# -- versions


def test_the_list_of_a_version_is_asked_where_a_copy_names_it(main: Any, alt: Any, listed: str) -> None:
    main.put_bucket_versioning(Bucket=listed, VersioningConfiguration={"Status": "Enabled"})
    secret = main.put_object(Bucket=listed, Key="v", Body=b"not for all")["VersionId"]
    public = main.put_object(Bucket=listed, Key="v", Body=b"for all", ACL="public-read")["VersionId"]
    other = f"own-{secrets.token_hex(6)}"
    alt.create_bucket(Bucket=other)
    for version, allowed in ((public, True), (secret, False)):
        source = {"Bucket": listed, "Key": "v", "VersionId": version}
        if allowed:
            alt.copy_object(Bucket=other, Key="v", CopySource=source)
        else:
            assert refused(alt.copy_object, Bucket=other, Key="v", CopySource=source) == (403, "AccessDenied")
            assert refused(alt.get_object, **source) == (403, "AccessDenied")


def test_conditions_see_what_the_body_says(main: Any, alt: Any, mine: str) -> None:
    """The version that DeleteObjects or a copy names, the tags of a tagging document."""
    main.put_bucket_versioning(Bucket=mine, VersioningConfiguration={"Status": "Enabled"})
    kept, free = (main.put_object(Bucket=mine, Key="v", Body=b"1")["VersionId"] for _ in range(2))
    objects = f"arn:aws:s3:::{mine}/*"
    everything = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": objects}
    conditions: list[dict[str, Any]] = [
        {"StringEquals": {"s3:VersionId": kept}},
        {"StringEquals": {"s3:RequestObjectTag/level": "secret"}},
    ]
    denied = [everything | {"Effect": "Deny", "Condition": condition} for condition in conditions]
    main.put_bucket_policy(Bucket=mine, Policy=json.dumps({"Statement": [everything, *denied]}))
    for level, allowed in (("open", True), ("secret", False)):
        tagging = {"TagSet": [{"Key": "level", "Value": level}]}
        if allowed:
            alt.put_object_tagging(Bucket=mine, Key="v", Tagging=tagging)
        else:
            assert refused(alt.put_object_tagging, Bucket=mine, Key="v", Tagging=tagging) == (403, "AccessDenied")
    source = {"Bucket": mine, "Key": "v"}
    assert refused(alt.copy_object, Bucket=mine, Key="w", CopySource=source | {"VersionId": kept})[0] == 403
    alt.copy_object(Bucket=mine, Key="w", CopySource=source | {"VersionId": free})
    named = [{"Key": "v", "VersionId": version} for version in (kept, free)]
    answer = alt.delete_objects(Bucket=mine, Delete={"Objects": named})
    assert [row["VersionId"] for row in answer["Errors"]] == [kept]
    assert [row["VersionId"] for row in answer["Deleted"]] == [free]


# -- owners and policies


def test_an_owner_may_everything_and_others_nothing(main: Any, alt: Any, nobody: Any, mine: str) -> None:
    assert main.get_object(Bucket=mine, Key="k")["Body"].read() == b"hello"
    for client in (alt, nobody):
        assert refused(client.get_object, Bucket=mine, Key="k") == (403, "AccessDenied")
        assert refused(client.list_objects_v2, Bucket=mine) == (403, "AccessDenied")
        assert refused(client.put_object, Bucket=mine, Key="k", Body=b"x") == (403, "AccessDenied")
        assert refused(client.delete_object, Bucket=mine, Key="k") == (403, "AccessDenied")
        assert refused(client.put_bucket_policy, Bucket=mine, Policy=policy(mine)) == (403, "AccessDenied")
        assert refused(client.get_object, Bucket="no-such-bucket", Key="k") == (404, "NoSuchBucket")
    assert mine in {row["Name"] for row in main.list_buckets()["Buckets"]}
    assert mine not in {row["Name"] for row in alt.list_buckets()["Buckets"]}
    assert refused(alt.create_bucket, Bucket=mine) == (409, "BucketAlreadyExists")


def test_a_policy_lets_others_in_and_goes(main: Any, alt: Any, nobody: Any, mine: str) -> None:
    assert refused(main.get_bucket_policy, Bucket=mine) == (404, "NoSuchBucketPolicy")
    main.put_bucket_policy(Bucket=mine, Policy=policy(mine))
    assert json.loads(main.get_bucket_policy(Bucket=mine)["Policy"]) == json.loads(policy(mine))
    assert main.get_bucket_policy_status(Bucket=mine)["PolicyStatus"]["IsPublic"] is True
    for client in (alt, nobody):
        assert client.get_object(Bucket=mine, Key="k")["Body"].read() == b"hello"
        assert refused(client.get_object, Bucket=mine, Key="missing") == (403, "AccessDenied")
        assert refused(client.list_objects_v2, Bucket=mine) == (403, "AccessDenied")
    main.put_bucket_policy(Bucket=mine, Policy=policy(mine, Principal={"AWS": "arn:aws:iam:::user/alt"}))
    assert main.get_bucket_policy_status(Bucket=mine)["PolicyStatus"]["IsPublic"] is False
    assert refused(nobody.get_object, Bucket=mine, Key="k") == (403, "AccessDenied")
    alt.get_object(Bucket=mine, Key="k")
    main.put_bucket_policy(Bucket=mine, Policy=policy(mine, Effect="Deny"))
    assert refused(main.get_object, Bucket=mine, Key="k") == (403, "AccessDenied")
    main.delete_bucket_policy(Bucket=mine)
    main.get_object(Bucket=mine, Key="k")


def test_a_bad_policy_is_refused_with_its_reason(main: Any, mine: str) -> None:
    for document, reason in (
        ("{", "valid JSON"),
        (policy(mine, Action="s3:Get"), "invalid action"),
        (policy("other"), "invalid resource"),
        (policy(mine, Principal={"AWS": "arn:aws:iam:::user/who"}), "Invalid principal"),
        (policy(mine, Sid="x" * 20_480), "at most 20480"),
    ):
        with pytest.raises(ClientError, match=reason) as caught:
            main.put_bucket_policy(Bucket=mine, Policy=document)
        assert caught.value.response["Error"]["Code"] == "MalformedPolicy"


def test_conditions_of_a_policy(main: Any, nobody: Any, make_client: Any, mine: str) -> None:
    condition = {"IpAddress": {"aws:SourceIp": "127.0.0.0/8"}, "Bool": {"aws:SecureTransport": "false"}}
    main.put_bucket_policy(Bucket=mine, Policy=policy(mine, Condition=condition))
    nobody.get_object(Bucket=mine, Key="k")
    encrypted = make_client(("x", "y"), signature_version=UNSIGNED, tls=True)
    assert refused(encrypted.get_object, Bucket=mine, Key="k") == (403, "AccessDenied")
    prefix = policy(
        mine, Action="s3:ListBucket", Resource=f"arn:aws:s3:::{mine}", Condition={"StringEquals": {"s3:prefix": "raw/"}}
    )
    main.put_bucket_policy(Bucket=mine, Policy=prefix)
    nobody.list_objects_v2(Bucket=mine, Prefix="raw/")
    assert refused(nobody.list_objects_v2, Bucket=mine) == (403, "AccessDenied")
    tagged = policy(mine, Condition={"StringEquals": {"s3:ExistingObjectTag/class": "open"}})
    main.put_bucket_policy(Bucket=mine, Policy=tagged)
    assert refused(nobody.get_object, Bucket=mine, Key="k") == (403, "AccessDenied")
    main.put_object_tagging(Bucket=mine, Key="k", Tagging={"TagSet": [{"Key": "class", "Value": "open"}]})
    nobody.get_object(Bucket=mine, Key="k")


def test_everybody_may_write_where_the_policy_says(main: Any, nobody: Any, mine: str) -> None:
    main.put_bucket_policy(Bucket=mine, Policy=policy(mine, Action=["s3:PutObject", "s3:GetObject"]))
    nobody.put_object(Bucket=mine, Key="a ü", Body=b"anonymous")
    kernel = {"Bucket": mine, "Key": "_kernels/hits.py", "Body": b"x = 1"}
    assert refused(nobody.put_object, **kernel) == (403, "AccessDenied"), "code is never taken from nobody"
    assert main.get_object(Bucket=mine, Key="a ü")["Body"].read() == b"anonymous"


def test_public_access_is_blocked(main: Any, alt: Any, nobody: Any, mine: str) -> None:
    assert refused(main.get_public_access_block, Bucket=mine) == (404, "NoSuchPublicAccessBlockConfiguration")
    main.put_bucket_policy(Bucket=mine, Policy=policy(mine))
    block = {
        "BlockPublicAcls": False,
        "IgnorePublicAcls": False,
        "BlockPublicPolicy": True,
        "RestrictPublicBuckets": True,
    }
    main.put_public_access_block(Bucket=mine, PublicAccessBlockConfiguration=block)
    assert main.get_public_access_block(Bucket=mine)["PublicAccessBlockConfiguration"] == block
    assert refused(nobody.get_object, Bucket=mine, Key="k") == (403, "AccessDenied")
    assert refused(main.put_bucket_policy, Bucket=mine, Policy=policy(mine)) == (403, "AccessDenied")
    main.delete_public_access_block(Bucket=mine)
    nobody.get_object(Bucket=mine, Key="k")


# -- lists


def test_lists_are_off_by_default(main: Any, mine: str) -> None:
    controls = main.get_bucket_ownership_controls(Bucket=mine)["OwnershipControls"]["Rules"]
    assert controls == [{"ObjectOwnership": "BucketOwnerEnforced"}]
    off = (400, "AccessControlListNotSupported")
    assert refused(main.put_bucket_acl, Bucket=mine, ACL="public-read") == off
    assert refused(main.put_object_acl, Bucket=mine, Key="k", ACL="public-read") == off
    assert refused(main.put_object, Bucket=mine, Key="k", ACL="public-read") == off
    for habit in ("bucket-owner-full-control", "private"):  # rclone before 1.61 says private with each write
        main.put_object(Bucket=mine, Key="k", ACL=habit)
    refusal = refused(main.create_bucket, Bucket=f"{mine}-2", ACL="public-read")
    assert refusal == (400, "InvalidBucketAclWithObjectOwnership")
    acl = main.get_object_acl(Bucket=mine, Key="k")
    assert [row["Permission"] for row in acl["Grants"]] == ["FULL_CONTROL"]
    assert acl["Owner"] == main.list_buckets()["Owner"]
    as_it_is = {"Owner": acl["Owner"], "Grants": acl["Grants"]}
    main.put_object_acl(Bucket=mine, Key="k", AccessControlPolicy=as_it_is)  # s3cmd says it of every copy


def test_a_public_object_and_a_public_bucket(main: Any, alt: Any, nobody: Any, listed: str) -> None:
    main.put_object(Bucket=listed, Key="open", Body=b"x", ACL="public-read")
    assert nobody.get_object(Bucket=listed, Key="open")["Body"].read() == b"x"
    assert refused(nobody.get_object, Bucket=listed, Key="k") == (403, "AccessDenied")
    main.put_object_acl(Bucket=listed, Key="k", ACL="authenticated-read")
    alt.get_object(Bucket=listed, Key="k")
    assert refused(nobody.get_object, Bucket=listed, Key="k") == (403, "AccessDenied")
    main.put_bucket_acl(Bucket=listed, ACL="public-read-write")
    grants = main.get_bucket_acl(Bucket=listed)["Grants"]
    assert [(row["Grantee"]["Type"], row["Permission"]) for row in grants] == [
        ("CanonicalUser", "FULL_CONTROL"),
        ("Group", "READ"),
        ("Group", "WRITE"),
    ]
    assert nobody.list_objects_v2(Bucket=listed)["KeyCount"] == 2
    alt.put_object(Bucket=listed, Key="theirs", Body=b"x")
    owners = {row["Key"]: row["Owner"] for row in main.list_objects_v2(Bucket=listed, FetchOwner=True)["Contents"]}
    assert owners["theirs"]["DisplayName"] == "Alt"
    assert refused(nobody.get_object, Bucket=listed, Key="theirs") == (403, "AccessDenied")
    alt.delete_object(Bucket=listed, Key="theirs")
    block = {"BlockPublicAcls": True, "IgnorePublicAcls": True}
    main.put_public_access_block(Bucket=listed, PublicAccessBlockConfiguration=block)
    assert refused(nobody.get_object, Bucket=listed, Key="open") == (403, "AccessDenied")
    assert refused(main.put_object, Bucket=listed, Key="open", ACL="public-read") == (403, "AccessDenied")


def test_who_may_list_learns_that_a_key_is_missing(main: Any, alt: Any, nobody: Any, listed: str) -> None:
    version = "0" * 32
    for acl, status, code in (("private", 403, "AccessDenied"), ("public-read", 404, "NoSuchKey")):
        main.put_bucket_acl(Bucket=listed, ACL=acl)
        for client in (alt, nobody):
            assert refused(client.get_object, Bucket=listed, Key="missing") == (status, code)
            assert refused(client.head_object, Bucket=listed, Key="missing") == (status, str(status))
            assert refused(client.get_object, Bucket=listed, Key="k") == (403, "AccessDenied")
            assert refused(client.get_object, Bucket=listed, Key="k", VersionId=version)[0] == status
            assert refused(client.delete_object, Bucket=listed, Key="missing") == (403, "AccessDenied")
        source = {"Bucket": listed, "Key": "missing"}
        assert refused(alt.copy_object, Bucket=listed, Key="copy", CopySource=source) == (403, "AccessDenied")


def test_grants_by_header_and_document(main: Any, alt: Any, listed: str) -> None:
    who = alt.list_buckets()["Owner"]["ID"]
    main.put_object_acl(Bucket=listed, Key="k", GrantRead=f'id="{who}", emailAddress="main@example.org"')
    alt.get_object(Bucket=listed, Key="k")
    assert refused(alt.get_object_acl, Bucket=listed, Key="k") == (403, "AccessDenied")
    acl = main.get_object_acl(Bucket=listed, Key="k")
    assert {row["Grantee"]["DisplayName"] for row in acl["Grants"]} == {"Alt", "Main"}
    grantee = {"Type": "CanonicalUser", "ID": who}
    document = {"Owner": acl["Owner"], "Grants": [{"Grantee": grantee, "Permission": "FULL_CONTROL"}]}
    main.put_object_acl(Bucket=listed, Key="k", AccessControlPolicy=document)
    assert [row["Permission"] for row in alt.get_object_acl(Bucket=listed, Key="k")["Grants"]] == ["FULL_CONTROL"]
    document["Grants"] = [{"Grantee": grantee, "Permission": "WRITE"}]
    main.put_bucket_acl(Bucket=listed, AccessControlPolicy=document)
    alt.put_object(Bucket=listed, Key="k2", Body=b"x")
    for arguments, expected in (
        ({"GrantRead": 'id="nobody"'}, "InvalidArgument"),
        ({"GrantRead": 'emailAddress="nobody@example.org"'}, "UnresolvableGrantByEmailAddress"),
        ({"GrantRead": f'id="{who}"', "ACL": "private"}, "InvalidRequest"),
        ({"ACL": "everybody"}, "InvalidArgument"),
        ({"AccessControlPolicy": {**document, "Owner": {"ID": who}}}, "AccessDenied"),
    ):
        assert refused(main.put_bucket_acl, Bucket=listed, **arguments)[1] == expected


def test_a_bucket_owner_preferred_takes_over(main: Any, alt: Any, mine: str) -> None:
    rules = {"Rules": [{"ObjectOwnership": "BucketOwnerPreferred"}]}
    main.put_bucket_ownership_controls(Bucket=mine, OwnershipControls=rules)
    main.put_bucket_acl(Bucket=mine, ACL="public-read-write")
    alt.put_object(Bucket=mine, Key="given", ACL="bucket-owner-full-control")
    alt.put_object(Bucket=mine, Key="kept")
    rows = main.list_objects_v2(Bucket=mine, FetchOwner=True)["Contents"]
    assert {row["Key"]: row["Owner"]["DisplayName"] for row in rows} == {"given": "Main", "k": "Main", "kept": "Alt"}
    enforced = {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
    refusal = refused(main.put_bucket_ownership_controls, Bucket=mine, OwnershipControls=enforced)
    assert refusal == (400, "InvalidBucketAclWithObjectOwnership")
    main.delete_bucket_ownership_controls(Bucket=mine)
    assert refused(main.get_bucket_ownership_controls, Bucket=mine) == (404, "OwnershipControlsNotFoundError")


# -- signatures


@pytest.mark.parametrize("style", ["path", "virtual"])
@pytest.mark.parametrize("version", ["s3", "s3v4"])
def test_both_signatures_in_both_styles(
    node: Any, people: Any, main: Any, mine: str, version: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = people["main"]
    endpoint = f"http://s3.test:{node.port}"
    _resolve(monkeypatch)
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=keys[0],
        aws_secret_access_key=keys[1],
        region_name="us-east-1",
        config=Config(signature_version=version, s3={"addressing_style": style}, retries={"total_max_attempts": 1}),
    )
    key = "a b+%&?#ü漢"
    client.put_object(Bucket=mine, Key=key, Body=b"body", Metadata={"note": "two  blanks"})
    assert client.get_object(Bucket=mine, Key=key)["Body"].read() == b"body"
    client.put_object_tagging(Bucket=mine, Key=key, Tagging={"TagSet": [{"Key": "a", "Value": "b"}]})
    assert client.list_objects_v2(Bucket=mine, Prefix="a b")["KeyCount"] == 1
    upload = client.create_multipart_upload(Bucket=mine, Key="mp")["UploadId"]
    client.abort_multipart_upload(Bucket=mine, Key="mp", UploadId=upload)
    arguments = {"Bucket": mine, "Key": key, "ResponseContentType": "text/x"}
    answer = httpx.get(client.generate_presigned_url("get_object", arguments))
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"body", "text/x")
    url = client.generate_presigned_url("put_object", {"Bucket": mine, "Key": "up", "Metadata": {"a": "b"}})
    headers = {} if version == "s3" else {"x-amz-meta-a": "b"}
    assert httpx.put(url, content=b"up", headers=headers).status_code == 200
    assert client.head_object(Bucket=mine, Key="up")["Metadata"] == {"a": "b"}
    changed = answer.request.url.copy_set_param("response-content-type", "text/y")
    assert httpx.get(changed).status_code == 403
    client.close()


def _resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name under s3.test is this machine."""
    real = socket.getaddrinfo

    def local(host: Any, *arguments: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return real("127.0.0.1" if str(name).endswith("s3.test") else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", local)


def test_old_presigned_urls_end(people: Any, make_client: Any, main: Any, mine: str) -> None:
    old = make_client(people["main"], signature_version="s3")
    url = httpx.URL(old.generate_presigned_url("get_object", {"Bucket": mine, "Key": "k"}))
    assert httpx.get(url).status_code == 200
    for expires in ("1", "soon", "99999999999999"):
        assert httpx.get(url.copy_set_param("Expires", expires)).status_code == 403
    assert httpx.get(url.copy_set_param("Signature", "AAAA")).status_code == 403


def test_old_presigned_urls_become_no_other_operation(people: Any, make_client: Any, main: Any, mine: str) -> None:
    old = make_client(people["main"], signature_version="s3")
    main.put_object(Bucket=mine, Key="given", Body=b"mine")
    tags = "<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tagging>"
    put = old.generate_presigned_url("put_object", {"Bucket": mine, "Key": "given"})
    for added in ("&%74agging", "&t%61gging=", "&retention", "&legal-hold", "&x-amz-meta-a=b"):
        assert httpx.put(put + added, content=tags.encode()).status_code == 403, added
    get = old.generate_presigned_url("get_object", {"Bucket": mine, "Key": "given"})
    for added in ("&attributes", "&retention", "&%61cl", "&%76ersionId=null"):
        assert httpx.get(get + added, headers={"x-amz-object-attributes": "ETag"}).status_code == 403, added
    delete = old.generate_presigned_url("delete_object", {"Bucket": mine, "Key": "given"})
    assert httpx.delete(delete + "&version%49d=null").status_code == 403
    granted = {"Bucket": mine, "Key": "given", "GrantRead": f'id="{"0" * 64}"'}
    url = old.generate_presigned_url("put_object", granted)
    assert httpx.put(f"{url}&x-amz-grant-read=id%3D1", content=b"").status_code == 403
    listed = old.generate_presigned_url("list_objects_v2", {"Bucket": mine})
    assert httpx.get(listed).status_code == 200
    assert main.get_object(Bucket=mine, Key="given")["Body"].read() == b"mine"
    old.close()


@pytest.mark.parametrize(
    ("date", "code"),
    [
        ("Mon, 05 Jan 2015 00:00:00 GMT", "RequestTimeTooSkewed"),
        ("Fri, 07 Jul 1950 21:53:04 GMT", "AccessDenied"),
        ("soon", "AccessDenied"),
        ("", "AccessDenied"),
    ],
)
def test_sigv2_is_judged_by_the_clock(node: Any, people: Any, mine: str, code_of: Any, date: str, code: str) -> None:
    """By the date that is signed: a Date beside x-amz-date is not."""
    request = AWSRequest("GET", f"{node.endpoint}/{mine}/k", headers={"x-amz-date": date})
    HmacV1Auth(BotoCredentials(*people["main"])).add_auth(request)
    headers = {**dict(request.headers.items()), "Date": formatdate(usegmt=True)}
    assert code_of(httpx.get(request.url, headers=headers)) == code


def test_sigv2_can_be_switched_off(node: Any, people: Any, make_client: Any, mine: str) -> None:
    old = make_client(people["main"], signature_version="s3")
    authenticator = node.service.authenticator
    authenticator.allow_sigv2 = False
    try:
        assert refused(old.get_object, Bucket=mine, Key="k") == (400, "InvalidRequest")
        answer = httpx.get(old.generate_presigned_url("get_object", {"Bucket": mine, "Key": "k"}))
        assert answer.status_code == 400
        assert "AWS4-HMAC-SHA256" in answer.text
    finally:
        authenticator.allow_sigv2 = True


def test_another_region_is_told_the_right_one(node: Any, people: Any, mine: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=node.endpoint,
        aws_access_key_id=people["main"][0],
        aws_secret_access_key=people["main"][1],
        region_name="eu-central-1",
        config=Config(retries={"total_max_attempts": 1}, signature_version="s3v4"),
    )
    answer = httpx.get(client.generate_presigned_url("get_object", {"Bucket": mine, "Key": "k"}))
    assert answer.status_code == 400
    assert "<Region>us-east-1</Region>" in answer.text
    assert "expecting &apos;us-east-1&apos;" in answer.text or "expecting 'us-east-1'" in answer.text
    client.close()


def test_key_pairs_rotate(node: Any, make_client: Any) -> None:
    first = node.add_user("rotating", Grant("*", "", "read"))
    (record,) = [user for user in node.run(node.catalog.users()) if user.user_id == "rotating"]
    second = ("AKSECOND", "second-secret")
    sealed = node.seal(second[1])
    both = msgspec.structs.replace(record, keys=(*record.keys, AccessKey(second[0], sealed)))
    node.run(node.catalog.put_user(both))
    for keys in (first, second):
        make_client(keys).list_buckets()
    old = msgspec.structs.replace(record.keys[0], enabled=False)
    node.run(node.catalog.put_user(msgspec.structs.replace(both, keys=(old, both.keys[1]))))
    assert refused(make_client(first).list_buckets) == (403, "InvalidAccessKeyId")
    make_client(second).list_buckets()


# -- temporary keys


@pytest.fixture
def sts(node: Any, people: Any) -> Iterator[Any]:
    client = boto3.client(
        "sts",
        endpoint_url=node.endpoint,
        aws_access_key_id=people["main"][0],
        aws_secret_access_key=people["main"][1],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}),
    )
    yield client
    client.close()


def with_keys(node: Any, credentials: dict[str, Any], **config: Any) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=node.endpoint,
        aws_access_key_id=credentials["AccessKeyId"],
        aws_secret_access_key=credentials["SecretAccessKey"],
        aws_session_token=credentials["SessionToken"],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, **config),
    )


@pytest.mark.parametrize("version", ["s3", "s3v4"])
def test_temporary_keys_are_their_user_s(node: Any, sts: Any, mine: str, version: str) -> None:
    assert sts.get_caller_identity()["Arn"] == "arn:aws:iam::000000000000:user/main"
    credentials = sts.get_session_token(DurationSeconds=900)["Credentials"]
    client = with_keys(node, credentials, signature_version=version)
    assert client.get_object(Bucket=mine, Key="k")["Body"].read() == b"hello"
    url = client.generate_presigned_url("get_object", {"Bucket": mine, "Key": "k"})
    assert httpx.get(url).status_code == 200
    for wrong in ({"SessionToken": "nonsense"}, {"SecretAccessKey": "x" * 40}, {"AccessKeyId": "ASIA0123456789ABCDEF"}):
        status, code = refused(with_keys(node, {**credentials, **wrong}).get_object, Bucket=mine, Key="k")
        assert (status, code) in ((400, "InvalidToken"), (403, "SignatureDoesNotMatch"))
    client.close()


def test_a_session_policy_narrows(node: Any, sts: Any, mine: str) -> None:
    arguments = {"RoleArn": "arn:aws:iam::000000000000:role/main", "RoleSessionName": "scan"}
    made = sts.assume_role(**arguments, Policy=policy(mine).replace('"Principal": "*", ', ""))
    client = with_keys(node, made["Credentials"])
    client.get_object(Bucket=mine, Key="k")
    assert refused(client.put_object, Bucket=mine, Key="k", Body=b"x") == (403, "AccessDenied")
    client.close()
    assert refused(sts.assume_role, **{**arguments, "RoleArn": "arn:aws:iam::000000000000:role/alt"}) == (
        403,
        "AccessDenied",
    )
    assert refused(sts.get_session_token, DurationSeconds=129_601)[1] == "ValidationError"


def test_temporary_keys_end_with_their_pair(node: Any) -> None:
    keys = node.add_user("short-lived", Grant("*", "", "read"))
    sts = boto3.client(
        "sts",
        endpoint_url=node.endpoint,
        aws_access_key_id=keys[0],
        aws_secret_access_key=keys[1],
        region_name="us-east-1",
    )
    client = with_keys(node, sts.get_session_token()["Credentials"])
    client.list_buckets()
    (record,) = [user for user in node.run(node.catalog.users()) if user.user_id == "short-lived"]
    off = msgspec.structs.replace(record, keys=(msgspec.structs.replace(record.keys[0], enabled=False),))
    node.run(node.catalog.put_user(off))
    assert refused(client.list_buckets) == (403, "InvalidAccessKeyId")
    sts.close()
    client.close()
