"""The whole API through boto3, any steps in any order, beside a model in memory: what is acknowledged is what is there."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.s3api.model import NULL, Bucket, Upload, Version

PART_BYTES = 5 << 20
KEYS = ("a", "a/", "a/b", "a//b", "a b+%&?#ü漢", "../a", "z", "\U0001f600", "ﬀ")
BODIES = st.sampled_from([b"", b"x", b"0123456789" * 30, bytes(70_000), b"<a>&amp;</a>"])
METADATA = st.sampled_from([{}, {"a": "1"}, {"b-c": "x, y", "d": ""}])
TAGS = st.sampled_from([{}, {"a": "1"}, {"hä": "x y+/=", "b": ""}])
KEY = st.sampled_from(KEYS)
_large = bytes(range(256)) * (PART_BYTES // 256)


class S3Machine(RuleBasedStateMachine):
    """One bucket of its own for each example."""

    def __init__(self, s3: Any) -> None:
        super().__init__()
        self.s3 = s3
        self.name = f"model-{secrets.token_hex(8)}"
        self.bucket = Bucket()
        s3.create_bucket(Bucket=self.name)

    def refused(self, code: str, operation: Any, **arguments: Any) -> None:
        with pytest.raises(ClientError) as refused:
            operation(Bucket=self.name, **arguments)
        assert refused.value.response["Error"]["Code"] == code

    # -- objects

    @rule(key=KEY, body=BODIES, metadata=METADATA, content_type=st.sampled_from(["", "image/cbf"]))
    def put(self, key: str, body: bytes, metadata: dict[str, str], content_type: str) -> None:
        extra = {"ContentType": content_type} if content_type else {}
        answer = self.s3.put_object(Bucket=self.name, Key=key, Body=body, Metadata=metadata, **extra)
        kind = content_type or "binary/octet-stream"
        self.keep(key, Version(answer.get("VersionId", NULL), body, metadata, kind, etag=answer["ETag"]))

    def keep(self, key: str, version: Version) -> None:
        assert (version.version_id != NULL) == (self.bucket.versioning == "Enabled")
        self.bucket.put(key, version)

    @rule(key=KEY, body=BODIES)
    def put_if_absent(self, key: str, body: bytes) -> None:
        if self.bucket.current(key):
            self.refused("PreconditionFailed", self.s3.put_object, Key=key, Body=body, IfNoneMatch="*")
        else:
            answer = self.s3.put_object(Bucket=self.name, Key=key, Body=body, IfNoneMatch="*")
            self.keep(key, Version(answer.get("VersionId", NULL), body, etag=answer["ETag"]))

    @rule(key=KEY, body=BODIES, fits=st.booleans())
    def put_if_match(self, key: str, body: bytes, fits: bool) -> None:
        current = self.bucket.current(key)
        if current is None:
            self.refused("NoSuchKey", self.s3.put_object, Key=key, Body=body, IfMatch='"0"')
        elif not fits:
            self.refused("PreconditionFailed", self.s3.put_object, Key=key, Body=body, IfMatch='"0"')
        else:
            answer = self.s3.put_object(Bucket=self.name, Key=key, Body=body, IfMatch=current.etag)
            self.keep(key, Version(answer.get("VersionId", NULL), body, etag=answer["ETag"]))

    @rule(key=KEY)
    def get(self, key: str) -> None:
        current = self.bucket.current(key)
        if current is None:
            self.refused("NoSuchKey", self.s3.get_object, Key=key)
            self.refused("404", self.s3.head_object, Key=key)
            return
        self.same(current, self.s3.get_object(Bucket=self.name, Key=key))
        head = self.s3.head_object(Bucket=self.name, Key=key)
        assert head["ContentLength"] == len(current.body or b"")
        assert head["Metadata"] == current.metadata

    def same(self, version: Version, answer: dict[str, Any]) -> None:
        assert answer["Body"].read() == version.body
        assert answer["Metadata"] == version.metadata
        assert answer["ContentType"] == version.content_type
        assert answer["ETag"] == version.etag
        assert answer.get("VersionId", NULL) == version.version_id
        assert answer.get("TagCount", 0) == len(version.tags)

    @rule(key=KEY, first=st.integers(0, 400), count=st.integers(1, 100_000))
    def get_range(self, key: str, first: int, count: int) -> None:
        current = self.bucket.current(key)
        if current is None or current.body is None:
            return
        span = f"bytes={first}-{first + count - 1}"
        if first >= len(current.body):
            self.refused("InvalidRange", self.s3.get_object, Key=key, Range=span)
        else:
            answer = self.s3.get_object(Bucket=self.name, Key=key, Range=span)
            assert answer["Body"].read() == current.body[first : first + count]

    @rule(source=KEY, to=KEY, replace=st.booleans(), metadata=METADATA)
    def copy(self, source: str, to: str, replace: bool, metadata: dict[str, str]) -> None:
        current = self.bucket.current(source)
        where = {"Bucket": self.name, "Key": source}
        extra = {"MetadataDirective": "REPLACE", "Metadata": metadata} if replace else {}
        if current is None:
            self.refused("NoSuchKey", self.s3.copy_object, Key=to, CopySource=where)
            return
        if source == to and not replace and self.bucket.versioning != "Enabled":
            self.refused("InvalidRequest", self.s3.copy_object, Key=to, CopySource=where)
            return
        answer = self.s3.copy_object(Bucket=self.name, Key=to, CopySource=where, **extra)
        kind = "binary/octet-stream" if replace else current.content_type
        kept = metadata if replace else current.metadata
        etag = answer["CopyObjectResult"]["ETag"]
        self.keep(to, Version(answer.get("VersionId", NULL), current.body, kept, kind, current.tags, etag))

    @rule(key=KEY)
    def delete(self, key: str) -> None:
        answer = self.s3.delete_object(Bucket=self.name, Key=key)
        self.deleted(key, answer)

    def deleted(self, key: str, answer: dict[str, Any]) -> None:
        marker = answer.get("DeleteMarkerVersionId", answer.get("VersionId", ""))
        assert bool(answer.get("DeleteMarker")) == bool(self.bucket.versioning)
        assert (marker not in ("", NULL)) == (self.bucket.versioning == "Enabled")
        self.bucket.delete(key, marker)

    @rule(keys=st.lists(KEY, min_size=1, max_size=5, unique=True), quiet=st.booleans())
    def delete_many(self, keys: list[str], quiet: bool) -> None:
        asked = {"Objects": [{"Key": key} for key in keys], "Quiet": quiet and not self.bucket.versioning}
        answer = self.s3.delete_objects(Bucket=self.name, Delete=asked)
        assert "Errors" not in answer
        told = {item["Key"]: item for item in answer.get("Deleted", [])}
        assert list(told) == ([] if asked["Quiet"] else keys)
        for key in keys:
            self.deleted(key, told.get(key, {}))

    # -- versions

    @rule(status=st.sampled_from(["Enabled", "Suspended"]))
    def version_bucket(self, status: str) -> None:
        self.s3.put_bucket_versioning(Bucket=self.name, VersioningConfiguration={"Status": status})
        self.bucket.versioning = status
        assert self.s3.get_bucket_versioning(Bucket=self.name)["Status"] == status

    @precondition(lambda self: self.bucket.stacks)
    @rule(data=st.data())
    def get_version(self, data: Any) -> None:
        key, version = self.drawn(data)
        where = {"Key": key, "VersionId": version.version_id}
        if version.marker:
            self.refused("MethodNotAllowed", self.s3.get_object, **where)
            self.refused("405", self.s3.head_object, **where)
        else:
            answer = self.s3.get_object(Bucket=self.name, **where)
            assert answer.get("VersionId", NULL) == version.version_id
            self.same(version, answer)

    def drawn(self, data: Any) -> tuple[str, Version]:
        stacks = self.bucket.stacks
        key = data.draw(st.sampled_from(sorted(stacks)))
        return key, stacks[key][data.draw(st.integers(0, len(stacks[key]) - 1))]

    @precondition(lambda self: self.bucket.stacks)
    @rule(data=st.data())
    def delete_version(self, data: Any) -> None:
        key, version = self.drawn(data)
        answer = self.s3.delete_object(Bucket=self.name, Key=key, VersionId=version.version_id)
        assert answer.get("VersionId", NULL) == version.version_id
        assert bool(answer.get("DeleteMarker")) == version.marker
        self.bucket.delete_version(key, version.version_id)

    @precondition(lambda self: self.bucket.stacks)
    @rule(data=st.data(), to=KEY)
    def copy_version(self, data: Any, to: str) -> None:
        key, version = self.drawn(data)
        where = {"Bucket": self.name, "Key": key, "VersionId": version.version_id}
        if version.marker:
            self.refused("InvalidRequest", self.s3.copy_object, Key=to, CopySource=where)
            return
        extra = {"MetadataDirective": "REPLACE", "Metadata": {"from": "version"}}
        answer = self.s3.copy_object(Bucket=self.name, Key=to, CopySource=where, **extra)
        etag = answer["CopyObjectResult"]["ETag"]
        made = Version(answer.get("VersionId", NULL), version.body, extra["Metadata"], tags=version.tags, etag=etag)
        self.keep(to, made)

    @rule(prefix=st.sampled_from(["", "a", "a/"]), page=st.integers(1, 4))
    def list_versions(self, prefix: str, page: int) -> None:
        """Versions and markers come in two lists a page, each in order."""
        told: list[tuple[str, str, bool, bool]] = []
        pages = self.s3.get_paginator("list_object_versions").paginate(
            Bucket=self.name, Prefix=prefix, PaginationConfig={"PageSize": page}
        )
        for answer in pages:
            found = [(item, False) for item in answer.get("Versions", [])]
            found += [(item, True) for item in answer.get("DeleteMarkers", [])]
            assert len(found) <= page
            told += [(item["Key"], item["VersionId"], item["IsLatest"], marker) for item, marker in found]
        expected = [
            (key, version.version_id, latest, version.marker)
            for key, version, latest in self.bucket.versions()
            if key.startswith(prefix)
        ]
        assert sorted(told) == sorted(expected)
        for marker in (False, True):
            assert [row for row in told if row[3] is marker] == [row for row in expected if row[3] is marker]

    # -- tags

    @rule(key=KEY, tags=TAGS)
    def tag(self, key: str, tags: dict[str, str]) -> None:
        pairs = {"TagSet": [{"Key": name, "Value": value} for name, value in tags.items()]}
        current = self.bucket.current(key)
        if current is None:
            return
        self.s3.put_object_tagging(Bucket=self.name, Key=key, Tagging=pairs)
        told = self.s3.get_object_tagging(Bucket=self.name, Key=key)["TagSet"]
        assert {pair["Key"]: pair["Value"] for pair in told} == tags
        self.bucket.replace(key, Version(**{**vars(current), "tags": tags}))

    # -- uploads

    @rule(key=KEY, metadata=METADATA)
    def begin(self, key: str, metadata: dict[str, str]) -> None:
        answer = self.s3.create_multipart_upload(Bucket=self.name, Key=key, Metadata=metadata)
        self.bucket.uploads[answer["UploadId"]] = Upload(key, metadata)

    @precondition(lambda self: self.bucket.uploads)
    @rule(data=st.data(), number=st.sampled_from([1, 2, 7, 10_000]), large=st.booleans(), byte=st.integers(0, 255))
    def part(self, data: Any, number: int, large: bool, byte: int) -> None:
        upload_id = data.draw(st.sampled_from(list(self.bucket.uploads)))
        upload = self.bucket.uploads[upload_id]
        body = (_large if large else b"") + bytes([byte])
        where = {"Bucket": self.name, "Key": upload.key, "UploadId": upload_id}
        answer = self.s3.upload_part(**where, PartNumber=number, Body=body)
        upload.parts[number] = (answer["ETag"], body)
        told = self.s3.list_parts(**where).get("Parts", [])
        assert [(part["PartNumber"], part["ETag"], part["Size"]) for part in told] == [
            (number, etag, len(body)) for number, (etag, body) in sorted(upload.parts.items())
        ]

    @precondition(lambda self: self.bucket.uploads)
    @rule(data=st.data())
    def complete(self, data: Any) -> None:
        upload_id = data.draw(st.sampled_from(list(self.bucket.uploads)))
        upload = self.bucket.uploads[upload_id]
        chosen = [number for number in sorted(upload.parts) if data.draw(st.booleans())]
        parts = [{"PartNumber": number, "ETag": upload.parts[number][0]} for number in chosen]
        where = {"Key": upload.key, "UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
        if not parts:
            self.refused("MalformedXML", self.s3.complete_multipart_upload, **where)
        elif any(len(upload.parts[number][1]) < PART_BYTES for number in chosen[:-1]):
            self.refused("EntityTooSmall", self.s3.complete_multipart_upload, **where)
        else:
            answer = self.s3.complete_multipart_upload(Bucket=self.name, **where)
            body = b"".join(upload.parts[number][1] for number in chosen)
            version = answer.get("VersionId", NULL)
            self.keep(upload.key, Version(version, body, upload.metadata, etag=answer["ETag"]))
            del self.bucket.uploads[upload_id]

    @precondition(lambda self: self.bucket.uploads)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        upload_id = data.draw(st.sampled_from(list(self.bucket.uploads)))
        self.s3.abort_multipart_upload(Bucket=self.name, Key=self.bucket.uploads.pop(upload_id).key, UploadId=upload_id)

    # -- listings

    @rule(prefix=st.sampled_from(["", "a", "a/", "a//", "z", "no"]), delimiter=st.sampled_from(["", "/", "b", "//"]),
          page=st.integers(1, 4), second=st.booleans())  # fmt: skip
    def listing(self, prefix: str, delimiter: str, page: int, second: bool) -> None:
        operation = "list_objects_v2" if second else "list_objects"
        pages = self.s3.get_paginator(operation).paginate(
            Bucket=self.name, Prefix=prefix, Delimiter=delimiter, PaginationConfig={"PageSize": page}
        )
        keys: list[str] = []
        prefixes: list[str] = []
        for answer in pages:
            assert len(answer.get("Contents", [])) + len(answer.get("CommonPrefixes", [])) <= page
            keys += [item["Key"] for item in answer.get("Contents", [])]
            prefixes += [item["Prefix"] for item in answer.get("CommonPrefixes", [])]
        assert (keys, prefixes) == self.bucket.listing(prefix, delimiter)

    @invariant()
    def what_is_there(self) -> None:
        listed = self.s3.list_objects_v2(Bucket=self.name).get("Contents", [])
        assert [(item["Key"], item["Size"], item["ETag"]) for item in listed] == [
            (key, len(current.body or b""), current.etag)
            for key in self.bucket.keys()
            if (current := self.bucket.current(key))
        ]
        uploads = self.s3.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        assert sorted(item["UploadId"] for item in uploads) == sorted(self.bucket.uploads)

    def teardown(self) -> None:
        """Every version that should be there is read once more, then the bucket must be seen to be empty."""
        for upload_id, upload in self.bucket.uploads.items():
            self.s3.abort_multipart_upload(Bucket=self.name, Key=upload.key, UploadId=upload_id)
        for key, version, _ in list(self.bucket.versions()):
            where = {"Bucket": self.name, "Key": key, "VersionId": version.version_id}
            if not version.marker:
                self.same(version, self.s3.get_object(**where))
            self.s3.delete_object(**where)
        self.s3.delete_bucket(Bucket=self.name)


def test_any_steps_in_any_order(s3: Any) -> None:
    run_state_machine_as_test(
        lambda: S3Machine(s3),
        settings=settings(
            max_examples=20, stateful_step_count=40, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
