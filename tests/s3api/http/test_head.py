"""Request heads: what is understood, and what is refused because two servers might read it differently."""

from __future__ import annotations

import pytest

from s3api.http.head import find_head_end, parse_head
from s3api.http.limits import HttpLimits
from s3api.http.message import HttpError

LIMITS = HttpLimits()


def head(line: str, *fields: str, host: bool = True) -> bytes:
    lines = [line, *(["Host: h:9000"] if host else []), *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def refusal(raw: bytes, limits: HttpLimits = LIMITS) -> tuple[int, str]:
    with pytest.raises(HttpError) as caught:
        parse_head(raw, limits)
    assert caught.value.close
    return caught.value.status, caught.value.code


def test_parts_of_a_head():
    parsed = parse_head(
        head("PUT /b/k%20y?uploads&partNumber=1&x=a%2Bb+c HTTP/1.1", "X-Amz-Meta-A:  v \t", "Content-Length: 12"),
        LIMITS,
    )
    assert (parsed.method, parsed.path) == ("PUT", "/b/k%20y")
    assert parsed.target == "/b/k%20y?uploads&partNumber=1&x=a%2Bb+c"
    assert parsed.query == (("uploads", ""), ("partNumber", "1"), ("x", "a+b c"))
    assert parsed.headers["x-amz-meta-a"] == "v"
    assert (parsed.content_length, parsed.chunked, parsed.keep_alive) == (12, False, True)


@pytest.mark.parametrize(
    ("fields", "keep"),
    [
        ([], True),
        (["Connection: close"], False),
        (["Connection: TE, Close"], False),
        (["Connection: keep-alive"], True),
    ],
)
def test_keep_alive(fields, keep):
    assert parse_head(head("GET / HTTP/1.1", *fields), LIMITS).keep_alive is keep


@pytest.mark.parametrize(
    ("value", "waits"),
    [("100-continue", True), ("100-Continue", True), ("x=y, 100-continue", True), ("200", False), ("", False)],
)
def test_expectations(value, waits):
    assert parse_head(head("PUT / HTTP/1.1", f"Expect: {value}"), LIMITS).expects_continue is waits


def test_http_1_0_closes_and_needs_no_host():
    parsed = parse_head(head("GET / HTTP/1.0", "Connection: keep-alive", host=False), LIMITS)
    assert not parsed.keep_alive


def test_webdav_methods_and_upgrade_offers_are_ordinary_requests():
    assert parse_head(head("PROPFIND / HTTP/1.1"), LIMITS).method == "PROPFIND"
    assert parse_head(head("GET / HTTP/1.1", "Connection: Upgrade", "Upgrade: h2c"), LIMITS).method == "GET"


@pytest.mark.parametrize("target", ["http://h:9000/b/k?x=1", "HTTP://H:9000/b/k?x=1"])
def test_absolute_form_becomes_origin_form(target):
    parsed = parse_head(head(f"GET {target} HTTP/1.1"), LIMITS)
    assert (parsed.path, parsed.query, parsed.target) == ("/b/k", (("x", "1"),), "/b/k?x=1")


def test_absolute_form_without_path():
    assert parse_head(head("GET http://h:9000?uploads HTTP/1.1"), LIMITS).target == "/?uploads"


def test_obs_text_in_values_survives():
    assert parse_head(head("GET / HTTP/1.1", "x-amz-meta-a: caf\xe9"), LIMITS).headers["x-amz-meta-a"] == "caf\xe9"


@pytest.mark.parametrize(
    "raw",
    [
        head("GET / HTTP/1.1", host=False),
        head("GET / HTTP/1.1", "Host: other"),
        head("PUT / HTTP/1.1", "Content-Length: 5", "Content-Length: 6"),
        head("PUT / HTTP/1.1", "Content-Length: 5", "Content-Length: 5"),
        head("PUT / HTTP/1.1", "Content-Length: 5, 5"),
        head("PUT / HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked"),
        head("PUT / HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 5"),
        head("PUT / HTTP/1.1", "Transfer-Encoding: chunked, gzip"),
        head("PUT / HTTP/1.1", "Transfer-Encoding: xchunked"),
        head("PUT / HTTP/1.1", "Transfer-Encoding : chunked"),
        head("PUT / HTTP/1.0", "Transfer-Encoding: chunked"),
        *(head("PUT / HTTP/1.1", f"Content-Length: {n}") for n in ("-1", "+5", "0x5", "5 5", "", "9" * 19, "5_0")),
        head("GET / HTTP/1.1", "A: b", " c"),
        head("GET / HTTP/1.1", "A: b", "\tc"),
        head("GET / HTTP/1.1", "A b: c"),
        head("GET / HTTP/1.1", ": c"),
        head("GET / HTTP/1.1", "no colon"),
        head("GET / HTTP/1.1", "A: b\rX: y"),
        head("GET / HTTP/1.1", "A: b\nX: y"),
        head("GET / HTTP/1.1", "A: b\0"),
        head("GET / HTTP/1.1", "A: b\x7f"),
        head("GET  / HTTP/1.1"),
        head("GET /  HTTP/1.1"),
        head("GET /a b HTTP/1.1"),
        head("GET\t/\tHTTP/1.1"),
        head("GET /"),
        head("GET / HTTPS/1.1"),
        head("GET /#f HTTP/1.1"),
        head("GET * HTTP/1.1"),
        head("CONNECT h:9000 HTTP/1.1"),
        head("GET ftp://h:9000/ HTTP/1.1"),
        head("GET http://elsewhere/ HTTP/1.1"),
        head("GET /?a=%ff HTTP/1.1"),
        head("GET /\xe9 HTTP/1.1"),
    ],
)  # fmt: skip
def test_ambiguous_or_malformed_heads_are_refused(raw):
    status, code = refusal(raw)
    assert (status, code) in ((400, "InvalidRequest"), (400, "InvalidURI"))


def test_other_refusals():
    assert refusal(head("GET / HTTP/2.0")) == (505, "HTTPVersionNotSupported")
    assert refusal(head("PRI * HTTP/2.0")) == (505, "HTTPVersionNotSupported")
    assert refusal(head("BREW / HTTP/1.1")) == (501, "NotImplemented")
    assert refusal(head("PUT / HTTP/1.1", "Transfer-Encoding: gzip, chunked")) == (501, "NotImplemented")
    many = [f"X-{i}: y" for i in range(LIMITS.head_fields)]
    assert refusal(head("GET / HTTP/1.1", *many)) == (431, "RequestHeaderSectionTooLarge")
    assert parse_head(head("GET / HTTP/1.1", *many[1:]), LIMITS)
    query = "&".join(f"a{i}" for i in range(LIMITS.query_parameters + 1))
    assert refusal(head(f"GET /?{query} HTTP/1.1")) == (400, "InvalidURI")


def test_the_end_of_a_head_is_found_however_it_arrives():
    raw = head("GET / HTTP/1.1", "A: b")
    buffer = bytearray(b"..") + raw + b"body\r\n\r\n"
    scanned = 2
    for stop in range(3, len(buffer)):
        end = find_head_end(buffer, 2, scanned, stop, LIMITS)
        if stop < 2 + len(raw):
            assert end == -1
            scanned = stop
        else:
            assert end == 2 + len(raw)


@pytest.mark.parametrize("raw", [b"\x16\x03\x01", b" GET", b"\0", b"GET / HTTP/1.1\nHost: x\n\n"])
def test_what_can_never_become_a_head_is_refused_at_once(raw):
    with pytest.raises(HttpError) as caught:
        find_head_end(bytearray(raw), 0, 0, len(raw), LIMITS)
    assert caught.value.status == 400


def test_a_head_over_the_limit_is_refused_before_its_end():
    raw = bytearray(b"GET / HTTP/1.1\r\nA: " + b"a" * LIMITS.head_bytes)
    with pytest.raises(HttpError) as caught:
        find_head_end(raw, 0, 0, len(raw), LIMITS)
    assert caught.value.status == 431


def test_limits_check_their_own_relations():
    with pytest.raises(ValueError, match="inbox_bytes"):
        HttpLimits(inbox_bytes=1 << 20)
    with pytest.raises(ValueError, match="head_timeout_s"):
        HttpLimits(head_timeout_s=0)
    with pytest.raises(ValueError, match="accept_share"):
        HttpLimits(accept_share=-1)
