"""XML in and out, the error table, times and ranges: the pure parts."""

from __future__ import annotations

import re
from xml.etree.ElementTree import fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest import errors as ingest
from ingest.bucket_settings import BadSetting
from ingest.counters import ERROR_CLASSES
from ingest.ports import KernelRefused
from s3api import times, xml
from s3api.errors import CODES, INGEST_CODES, S3Error, render, translated
from s3api.http.message import HttpError
from s3api.ranges import parse_copy_range, parse_range
from s3api.routes import ROUTES, SUBRESOURCES

# What XML 1.0 can carry at all: no surrogates, no control characters but tab and line breaks.
XML_TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff", include_characters="\t\n\r"),
    max_size=60,
)


@given(XML_TEXT, st.integers(), st.booleans())
def test_what_is_written_is_read(text: str, number: int, flag: bool) -> None:
    document = xml.document("Root", [("T", text), ("N", number), ("F", flag), ("Absent", None), ("In", [("T", text)])])
    tree = xml.parse(document, "Root")
    assert xml.raw_text(tree, "T") == text
    assert xml.text(tree, "N") == str(number)
    assert xml.text(tree, "F") == str(flag).lower()
    assert tree.find("Absent") is None
    assert xml.raw_text(tree.find("In") or tree, "T") == text


@given(st.binary(max_size=200))
def test_bytes_never_break_the_reader(body: bytes) -> None:
    with pytest.raises(xml.BadXml):
        xml.parse(body, "Root")


@pytest.mark.parametrize(
    "body",
    [
        b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "b">]><Root>&a;</Root>',
        b'<!DOCTYPE r SYSTEM "file:///etc/passwd"><Root/>',
        b"<Root>" + b"<a>" * 20 + b"</a>" * 20 + b"</Root>",
        b"<Root>" + b"<a/>" * 100_001 + b"</Root>",
        b"<Other/>",
        b'<?xml version="1.0" encoding="no-such"?><Root/>',
    ],
    ids=["entity", "external", "deep", "many", "other", "encoding"],
)
def test_hostile_documents(body: bytes) -> None:
    with pytest.raises(xml.BadXml):
        xml.parse(body, "Root")


# -- errors


def test_every_buffer_error_has_a_code() -> None:
    """But those that only the control API and the drain meet."""
    elsewhere = (
        ingest.BadReservation, ingest.DoesNotFit, ingest.NoSuchReservation, ingest.ReservationEnded, ingest.LeaseLost,
        ingest.NoSuchNode, ingest.NodeNeeded,
    )  # fmt: skip
    kinds = [kind for kind in vars(ingest).values() if isinstance(kind, type) and issubclass(kind, ingest.IngestError)]
    for kind in kinds:
        if kind not in (ingest.IngestError, ingest.CatalogError, *elsewhere):
            assert next(INGEST_CODES[one] for one in kind.__mro__ if one in INGEST_CODES) in CODES


def test_the_table_is_sound() -> None:
    for code, row in CODES.items():
        assert re.fullmatch(r"[A-Za-z0-9]+", code)
        assert 400 <= row.status < 600
        assert row.kind in ERROR_CLASSES
        assert (row.kind == "slow_down") == (row.status == 503)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (S3Error("NoSuchKey"), 404, "NoSuchKey"),
        (ingest.BufferFull(), 503, "SlowDown"),
        (ingest.CatalogUnavailable(), 503, "ServiceUnavailable"),
        (ingest.StorageFailed(), 500, "InternalError"),
        (ingest.BucketExists("me"), 409, "BucketAlreadyOwnedByYou"),
        (ingest.BucketExists("you"), 409, "BucketAlreadyExists"),
        (ingest.PreconditionFailed("If-Match"), 412, "PreconditionFailed"),
        (KernelRefused("a.py", 3, "no"), 400, "InvalidKernel"),
        (BadSetting("no"), 400, "InvalidTag"),
        (xml.BadXml("no"), 400, "MalformedXML"),
        (HttpError(413, "EntityTooLarge", "too large"), 413, "EntityTooLarge"),
        (HttpError(408, "RequestTimeout", "slow"), 408, "RequestTimeout"),
        (RuntimeError("secret detail"), 500, "InternalError"),
    ],
)
def test_translation(error: Exception, status: int, code: str) -> None:
    found = translated(error, user_id="me")
    assert (found.status, found.code) == (status, code)
    assert "secret" not in found.message


def test_rendering() -> None:
    error = S3Error("SlowDown", "<full>", fields=[("Condition", "a & b")])
    headers, body = render(error, resource="/b/<k>", request_id="R1", host_id="H")
    assert dict(headers) == {"content-type": "application/xml", "retry-after": "1"}
    tree = fromstring(body.decode())
    assert {child.tag: child.text for child in tree} == {
        "Code": "SlowDown", "Message": "<full>", "Condition": "a & b", "Resource": "/b/<k>", "RequestId": "R1",
        "HostId": "H",
    }  # fmt: skip


# -- routes


def test_routes_use_known_subresources() -> None:
    for row in ROUTES:
        assert SUBRESOURCES.issuperset(row.query)
        assert SUBRESOURCES.issuperset(row.accepts)
    assert len({(row.method, row.level, row.query, row.header) for row in ROUTES}) == len(ROUTES)


# -- times and ranges


@given(st.integers(0, 4_000_000_000))
def test_http_dates_are_reversible(time_s: int) -> None:
    assert times.parse_http_date(times.http_date(time_s * 1_000_000_000 + 999_999_999)) == time_s


def test_iso_time() -> None:
    assert times.iso(784_111_777_123_456_789) == "1994-11-06T08:49:37.123Z"


@given(st.text(max_size=30))
def test_dates_never_break(text: str) -> None:
    times.parse_http_date(text)


@given(st.text(alphabet="bytes=-,0123456789 x", max_size=30), st.integers(0, 1000))
def test_ranges_lie_inside(text: str, length: int) -> None:
    found = status = None
    try:
        found = parse_range(text, length)
    except S3Error as error:
        status = error.status
    assert status in (None, 416)
    assert found is None or 0 <= found[0] < found[1] <= length


@pytest.mark.parametrize("text", ["", "bytes=", "bytes=0-", "bytes=-5", "bytes=3-2", "bytes=0-10", "0-5"])
def test_bad_copy_ranges(text: str) -> None:
    with pytest.raises(S3Error):
        parse_copy_range(text, 10)
