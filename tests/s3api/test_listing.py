"""Listings: order, prefixes, delimiters, pages and odd keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3api.errors import S3Error
from s3api.operations.listing import decode_token, encode_token

Raw = Callable[..., httpx.Response]
Code = Callable[[httpx.Response], str]

KEYS = ["a", "a/1", "a/2", "a/b/3", "b", "b/4", "ä/5", "z 6+%"]


@pytest.fixture
def filled(s3: Any, bucket: str) -> str:
    for key in KEYS:
        s3.put_object(Bucket=bucket, Key=key, Body=b"x")
    return bucket


def keys_and_prefixes(answer: Any) -> tuple[list[str], list[str]]:
    return (
        [row["Key"] for row in answer.get("Contents", [])],
        [row["Prefix"] for row in answer.get("CommonPrefixes", [])],
    )


@pytest.mark.parametrize("version", ["list_objects", "list_objects_v2"])
@pytest.mark.parametrize(
    ("arguments", "keys", "prefixes"),
    [
        ({}, sorted(KEYS, key=str.encode), []),
        ({"Prefix": "a"}, ["a", "a/1", "a/2", "a/b/3"], []),
        ({"Prefix": "nothing"}, [], []),
        ({"Delimiter": "/"}, ["a", "b", "z 6+%"], ["a/", "b/", "ä/"]),
        ({"Prefix": "a/", "Delimiter": "/"}, ["a/1", "a/2"], ["a/b/"]),
        ({"Prefix": "ä/", "Delimiter": "/"}, ["ä/5"], []),
        ({"MaxKeys": 0}, [], []),
    ],
)
def test_listing(
    s3: Any, filled: str, version: str, arguments: dict[str, Any], keys: list[str], prefixes: list[str]
) -> None:
    answer = getattr(s3, version)(Bucket=filled, **arguments)
    assert keys_and_prefixes(answer) == (keys, prefixes)
    assert not answer["IsTruncated"]


@pytest.mark.parametrize("version", ["list_objects", "list_objects_v2"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pages(s3: Any, filled: str, version: str, size: int) -> None:
    keys: list[str] = []
    prefixes: list[str] = []
    for page in s3.get_paginator(version).paginate(Bucket=filled, Delimiter="/", PaginationConfig={"PageSize": size}):
        found, common = keys_and_prefixes(page)
        assert len(found) + len(common) <= size
        keys += found
        prefixes += common
    assert (keys, prefixes) == (["a", "b", "z 6+%"], ["a/", "b/", "ä/"])


def test_start_after(s3: Any, filled: str) -> None:
    answer = s3.list_objects_v2(Bucket=filled, StartAfter="a/2")
    assert keys_and_prefixes(answer)[0] == ["a/b/3", "b", "b/4", "z 6+%", "ä/5"]
    assert answer["StartAfter"] == "a/2"


def test_what_an_entry_says(s3: Any, filled: str) -> None:
    (entry,) = s3.list_objects_v2(Bucket=filled, Prefix="a/1", FetchOwner=True)["Contents"]
    head = s3.head_object(Bucket=filled, Key="a/1")
    assert (entry["ETag"], entry["Size"], entry["StorageClass"]) == (head["ETag"], 1, "STANDARD")
    assert entry["LastModified"].replace(microsecond=0) == head["LastModified"]
    assert entry["Owner"]["DisplayName"] == "Root"
    assert entry["Owner"] == s3.list_buckets()["Owner"]
    assert entry["ChecksumAlgorithm"] == ["CRC32"]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("list-type=2&max-keys=-1", "InvalidArgument"),
        ("list-type=2&max-keys=x", "InvalidArgument"),
        ("list-type=2&continuation-token=nonsense", "InvalidArgument"),
        ("list-type=2&encoding-type=base64", "InvalidArgument"),
        ("list-type=3", "InvalidArgument"),
    ],
)
def test_bad_arguments(raw: Raw, code_of: Code, bucket: str, query: str, code: str) -> None:
    assert code_of(raw("GET", f"/{bucket}?{query}")) == code


def test_more_than_a_page_at_most(raw: Raw, bucket: str) -> None:
    assert "<MaxKeys>1000</MaxKeys>" in raw("GET", f"/{bucket}?list-type=2&max-keys=5000").text


def test_keys_that_xml_cannot_hold(s3: Any, raw: Raw, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="a\x01<&>\r", Body=b"")
    assert [row["Key"] for row in s3.list_objects_v2(Bucket=bucket)["Contents"]] == ["a\x01<&>\r"]
    assert "<Key>a&#x1;&lt;&amp;&gt;&#xD;</Key>" in raw("GET", f"/{bucket}?list-type=2").text


@given(st.binary(max_size=1024))
def test_tokens_are_reversible(key: bytes) -> None:
    assert decode_token(encode_token(key)) == key


@given(st.text(max_size=30).filter(lambda token: not token.startswith("M")))
def test_nonsense_tokens_are_refused(token: str) -> None:
    """Ours start with the version byte, which base64 writes as M…"""
    with pytest.raises(S3Error, match="InvalidArgument"):
        decode_token(token)
