"""The mapping of keys to paths: examples a person would check, then properties over hostile keys."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from archive import keymap

BUCKET = "mx-2026"
PIECES = (
    b"a", b"b", b"/", b"//", b".", b"..", b"%", b"%d-", b"%f-", b"%c-", b"%k-", b"%25", b"%2F", b"\0", b"\n", b"\xff",
    b"\xc3\xa9", b"e\xcc\x81", b"\xe2\x80\xa8", b".hiss", b".hiss-tmp", b".versions", b".HISS", b"A", b"x" * 130,
    b"\xc3\xa9" * 130, b"\x01" * 90, b" ", b"~", b"\\",
)  # fmt: skip
hostile_keys = st.one_of(
    st.binary(min_size=1, max_size=1024),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map(b"".join),
    st.text(min_size=1, max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
)
buckets = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", fullmatch=True), st.sampled_from((".hiss", "Old_Bucket", "%d-a"))
)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        (b"scan/0001.npy", "mx-2026/scan/0001.npy"),
        (b"Scan 1/50%.npy", "mx-2026/Scan 1/50%.npy"),
        ("größe/µ.npy".encode(), "mx-2026/größe/µ.npy"),
        (b"_products/hits/scan/0001.npy.nxs", "mx-2026/_products/hits/scan/0001.npy.nxs"),
        (b"a//b", "mx-2026/a/%d-/b"),
        (b"/a", "mx-2026/%d-/a"),
        (b"a/", "mx-2026/a/%f-"),
        (b"../../etc/passwd", "mx-2026/%d-../%d-../etc/passwd"),
        (b".", "mx-2026/%f-."),
        (b"a\nb", "mx-2026/%f-a%0Ab"),
        (b"a\0b", "mx-2026/%f-a%00b"),
        (b"\xff/x", "mx-2026/%d-%FF/x"),
        (b"%f-a", "mx-2026/%f-%25f-a"),
        (b".hiss-tmp/x", "mx-2026/%d-.hiss-tmp/x"),
        (b".versions", "mx-2026/%f-.versions"),
        (b"n" * 300, "mx-2026/%c-" + "n" * 252 + "/%f-" + "n" * 48),
    ],
)
def test_natural_path_is_plain_where_the_key_is(key: bytes, path: str) -> None:
    assert keymap.natural(BUCKET, key) == path
    assert keymap.key_of(path) == (BUCKET, key)


def test_detached_path_keeps_a_beside_a_slash_b() -> None:
    assert keymap.paths(BUCKET, b"a") == ("mx-2026/a", "mx-2026/%f-a")
    assert keymap.paths(BUCKET, b"a/b") == ("mx-2026/a/b", "mx-2026/%d-a/%f-b")


def test_portable_path_never_depends_on_case_or_normalisation() -> None:
    assert keymap.paths(BUCKET, b"scan/a", portable=True) == ("mx-2026/scan/a", "mx-2026/%d-scan/%f-a")
    assert keymap.natural(BUCKET, b"Scan/a", portable=True) == "mx-2026/%d-%53can/a"
    assert keymap.natural(BUCKET, "\u00e9".encode(), portable=True) == "mx-2026/%f-%C3%A9"
    assert keymap.natural(BUCKET, "e\u0301".encode(), portable=True) == "mx-2026/%f-e%CC%81"


@pytest.mark.parametrize(
    "path",
    [
        "mx-2026",
        "mx-2026/",
        "mx-2026/../x",
        "mx-2026/%x-a",
        "mx-2026/%f-a/b",
        "mx-2026/a/%d-b",
        "mx-2026/%f-%zz",
        "mx-2026/%f-%0a",
        "mx-2026/%c-a/%f-b",
        "mx-2026/%c-" + "n" * 252,
        "mx-2026/%k-aa",
        "mx-2026/a/%k-mfra",
        "mx-2026/%f-%61",
        "mx-2026/.hiss-tmp/x",
        ".hiss/snapshots/1",
        "",
    ],
)
def test_key_of_refuses_paths_it_did_not_make(path: str) -> None:
    with pytest.raises(keymap.NotAKeyPath):
        keymap.key_of(path)


@given(bucket=buckets, key=hostile_keys, portable=st.booleans())
@example(bucket=BUCKET, key=b"/" * 1024, portable=False)
@example(bucket=BUCKET, key=b"\0" * 1024, portable=False)
@example(bucket=BUCKET, key=b"/\0" * 512, portable=True)
@example(bucket=BUCKET, key=b"a/" * 512, portable=False)
def test_every_path_leads_back_to_its_key(bucket: str, key: bytes, portable: bool) -> None:
    for path in keymap.paths(bucket, key, portable=portable):
        assert keymap.key_of(path) == (bucket, key)


@given(bucket=buckets, key=hostile_keys, portable=st.booleans())
def test_every_path_can_exist_on_a_file_system(bucket: str, key: bytes, portable: bool) -> None:
    for path in keymap.paths(bucket, key, portable=portable):
        encoded = path.encode("utf-8")
        assert len(encoded) <= keymap.PATH_BYTES_MAX
        assert b"\0" not in encoded
        for name in keymap.components(path):
            assert name not in (".", "..", "")
            assert len(name.encode()) <= keymap.NAME_BYTES_MAX
            assert name not in keymap.RESERVED


@given(one=hostile_keys, other=hostile_keys, portable=st.booleans())
@example(one=b"a", other=b"a/b", portable=False)
@example(one=b"n" * 252, other=b"n" * 300, portable=False)
def test_detached_paths_never_block_each_other_nor_natural_ones(one: bytes, other: bytes, portable: bool) -> None:
    if one == other:
        return
    mine = keymap.detached(BUCKET, one, portable=portable)
    for path in keymap.paths(BUCKET, other, portable=portable):
        assert mine != path
        assert not path.startswith(mine + "/")
        assert not mine.startswith(path + "/")


@given(key=hostile_keys, other=hostile_keys)
def test_portable_paths_differ_even_when_case_is_folded(key: bytes, other: bytes) -> None:
    if key == other:
        return
    mine = {path.casefold() for path in keymap.paths(BUCKET, key, portable=True)}
    assert mine.isdisjoint({path.casefold() for path in keymap.paths(BUCKET, other, portable=True)})


def test_versions_lie_below_their_bucket() -> None:
    assert (
        keymap.version_path(BUCKET, b"scan/0001.npy", b"\x01" * 16) == "mx-2026/.versions/scan/%f-0001.npy/" + "01" * 16
    )


@given(
    keys=st.lists(hostile_keys, min_size=2, max_size=2),
    object_id=st.binary(min_size=16, max_size=16),
    portable=st.booleans(),
)
@example(keys=[b"a", b"a/b"], object_id=bytes(16), portable=False)
@example(keys=[b"a", b"a/" + b"0" * 32], object_id=bytes(16), portable=False)
@example(keys=[b"x/" * 500 + b"y", b"\x01" * 1024], object_id=bytes(16), portable=False)
def test_paths_of_versions_are_reversible_and_in_nobodys_way(
    keys: list[bytes], object_id: bytes, portable: bool
) -> None:
    found = [keymap.version_path(BUCKET, key, object_id, portable=portable) for key in keys]
    for key, path in zip(keys, found, strict=True):
        assert keymap.version_of(path) == (BUCKET, key, object_id)
        assert len(path.encode()) <= 4096 - 512
        with pytest.raises(keymap.NotAKeyPath):
            keymap.key_of(path)
    one, two = found
    if keys[0] != keys[1]:
        assert one != two
        assert not one.startswith(two + "/")
        assert not two.startswith(one + "/")
