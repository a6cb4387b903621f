"""Keys as names and back."""

from __future__ import annotations

import re
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archive.dav.paths import BadPath, Target, escape, folder_beside, href, parse, shown, unescape

segments = st.one_of(
    st.binary(max_size=24),
    st.text(max_size=12).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from([b"", b".", b"..", b"=~", b"=+x", b"=~=2E", b"\xff", b"a\x00b", "\u2028".encode(), b"=", b"=41"]),
).filter(lambda segment: b"/" not in segment)


@given(segments)
def test_every_segment_has_a_name_that_leads_back(segment: bytes) -> None:
    for name in (escape(segment), folder_beside(segment)):
        assert unescape(name) == segment
        assert name not in ("", ".", "..")
        assert not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff/]", name)


@given(segments, segments)
def test_two_segments_never_share_a_name(one: bytes, other: bytes) -> None:
    names = {escape(one), folder_beside(one), escape(other), folder_beside(other)}
    assert len(names) == (2 if one == other else 4)


@given(st.text(max_size=12))
def test_a_name_leads_to_one_segment_or_nowhere(name: str) -> None:
    for candidate in (name, "=~" + name, "=+" + name):
        try:
            segment = unescape(candidate)
        except (BadPath, UnicodeEncodeError):
            continue
        assert candidate in (escape(segment), folder_beside(segment))


@given(st.lists(segments, min_size=1, max_size=5).filter(lambda parts: parts != [b""]))
def test_a_key_survives_the_way_through_an_href(parts: list[bytes]) -> None:
    key = b"/".join(parts)
    target = parse(href(shown(Target("bucket", key))))
    assert target == Target("bucket", key)
    assert parse(href(shown(target) + "/")) == Target("bucket", key, folder_only=True)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/", Target()),
        ("/b", Target("b", folder_only=True)),
        ("/b/", Target("b", folder_only=True)),
        ("/b/a%20c", Target("b", b"a c")),
        ("/b/a+c", Target("b", b"a+c")),
        ("/b/a/", Target("b", b"a", folder_only=True)),
        ("/b/=+a", Target("b", b"a", folder_only=True)),
        ("/b/=~/a", Target("b", b"/a")),
        ("/b/%C3%A9", Target("b", "é".encode())),
        ("/b/=~=2E=2E/x", Target("b", b"../x")),
    ],
)
def test_paths(path: str, target: Target) -> None:
    assert parse(path) == target


@pytest.mark.parametrize(
    "path",
    [
        "",
        "b",
        "//",
        "//b",
        "/b//a",
        "/b/a//",
        "/b/..",
        "/b/../c",
        "/b/./a",
        "/b/%FF",
        "/b/=~plain",
        "/b/=~=2e",
        "/b/%00",
    ],
)
def test_paths_that_name_nothing_are_refused(path: str) -> None:
    with pytest.raises(BadPath):
        parse(path)


def test_a_path_has_a_limit() -> None:
    with pytest.raises(BadPath, match="longer"):
        parse("/b/" + "a" * 9000)


def test_what_the_prefix_of_a_name_is() -> None:
    assert (Target("b").prefix, Target("b", b"").prefix, Target("b", b"a/b").prefix) == (b"", b"/", b"a/b/")


def test_hrefs_leave_what_clients_compare_alone() -> None:
    assert href("/b/scan_(1)~x.npy") == "/b/scan_(1)~x.npy"
    assert urllib.parse.unquote(href("/b/a+b %?#é")) == "/b/a+b %?#é"
    assert href("/b/a+b ?#") == "/b/a%2Bb%20%3F%23"
