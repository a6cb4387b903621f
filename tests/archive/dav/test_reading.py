"""GET, HEAD and OPTIONS on the WebDAV port: bytes, ranges, conditions, digests, refusals."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from ingest.errors import CatalogUnavailable, DataLost, ObjectOffline, StaleVersion, StorageFailed, Unreadable
from ingest.records import ObjectState

BODY = os.urandom(300_000)


async def test_an_object_is_read_whole(dav: Any) -> None:
    record = dav.plane.put("scan", b"run/frame 1.npy", BODY, headers={"content-type": "application/x-npy"})
    async with dav.client() as client:
        answer = await client.get("/scan/run/frame%201.npy")
        assert (answer.status_code, answer.content) == (200, BODY)
        assert answer.headers["etag"] == f'"{record.etag}"'
        assert answer.headers["content-type"] == "application/x-npy"
        assert answer.headers["accept-ranges"] == "bytes"
        assert "sandbox" in answer.headers["content-security-policy"]
        head = await client.head("/scan/run/frame%201.npy")
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "300000", b"")
        assert head.headers["last-modified"] == answer.headers["last-modified"]
    assert dav.plane.opened == 1


async def test_an_empty_object_is_read(dav: Any) -> None:
    dav.plane.put("scan", b"empty")
    async with dav.client() as client:
        answer = await client.get("/scan/empty")
        assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")
        assert (await client.get("/scan/empty", headers={"Range": "bytes=0-"})).status_code == 416


@pytest.mark.parametrize(
    ("asked", "status", "start", "stop"),
    [
        ("bytes=0-99", 206, 0, 100),
        ("bytes=100-", 206, 100, 300_000),
        ("bytes=-7", 206, 299_993, 300_000),
        ("bytes=-999999", 206, 0, 300_000),
        ("bytes=299999-400000", 206, 299_999, 300_000),
        ("bytes=300000-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=5-2", 200, 0, 300_000),
        ("bytes=0-1,5-6", 200, 0, 300_000),
        ("lines=0-1", 200, 0, 300_000),
        ("bytes=-", 200, 0, 300_000),
    ],
)
async def test_ranges(dav: Any, asked: str, status: int, start: int, stop: int) -> None:
    dav.plane.put("scan", b"a", BODY)
    async with dav.client() as client:
        answer = await client.get("/scan/a", headers={"Range": asked})
    assert answer.status_code == status
    if status == 416:
        assert answer.headers["content-range"] == "bytes */300000"
    else:
        assert answer.content == BODY[start:stop]
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/300000"


async def test_if_range_takes_a_strong_etag_only(dav: Any) -> None:
    record = dav.plane.put("scan", b"a", BODY)
    async with dav.client() as client:
        date = (await client.head("/scan/a")).headers["last-modified"]
        for condition, status in [
            (f'"{record.etag}"', 206), (f'W/"{record.etag}"', 200), ('"other"', 200), (date, 200)
        ]:  # fmt: skip
            headers = {"Range": "bytes=0-9", "If-Range": condition}
            assert (await client.get("/scan/a", headers=headers)).status_code == status, condition


async def test_conditions(dav: Any) -> None:
    record = dav.plane.put("scan", b"a", BODY, modified_ns=1_700_000_000_500_000_000)
    tag, then = f'"{record.etag}"', "Tue, 14 Nov 2023 22:13:20 GMT"
    async with dav.client() as client:
        for headers, status in [
            ({"If-None-Match": f'"x", {tag}'}, 304),
            ({"If-None-Match": f"W/{tag}"}, 304),
            ({"If-None-Match": "*"}, 304),
            ({"If-None-Match": '"x"', "If-Modified-Since": then}, 200),
            ({"If-Modified-Since": then}, 304),
            ({"If-Modified-Since": "Tue, 14 Nov 2023 22:13:19 GMT"}, 200),
            ({"If-Modified-Since": "yesterday"}, 200),
            ({"If-Match": tag}, 200),
            ({"If-Match": f"W/{tag}"}, 412),
            ({"If-Match": '"x"'}, 412),
            ({"If-Unmodified-Since": "Tue, 14 Nov 2023 22:13:19 GMT"}, 412),
            ({"If-Unmodified-Since": then}, 200),
        ]:
            for method in ("GET", "HEAD"):
                answer = await client.request(method, "/scan/a", headers=headers)
                assert answer.status_code == status, headers
                assert status == 412 or answer.headers["etag"] == tag


async def test_only_known_hashes_are_told(dav: Any) -> None:
    md5, sha256 = hashlib.md5(BODY), hashlib.sha256(BODY)
    known = {"sha256": base64.b64encode(sha256.digest()).decode()}
    dav.plane.put("scan", b"known", BODY, etag=md5.hexdigest(), checksums=known)
    dav.plane.put("scan", b"parts", BODY, checksums=known, checksum_type="COMPOSITE")
    md5_text = base64.b64encode(md5.digest()).decode()
    async with dav.client() as client:

        async def field(key: str, name: str, wanted: str) -> str | None:
            return (await client.head(f"/scan/{key}", headers={f"Want-{name}": wanted})).headers.get(name)

        assert await field("known", "Digest", "adler32, MD5;q=0.5") == f"md5={md5_text}"
        assert await field("known", "Digest", "md5;q=0.3,sha-256") == f"sha-256={known['sha256']},md5={md5_text}"
        assert await field("known", "Digest", "md5;q=0, adler32") is None
        assert await field("known", "Repr-Digest", "sha-512=9, sha-256=3") == f"sha-256=:{known['sha256']}:"
        assert await field("parts", "Digest", "md5, sha-256") is None
        assert "digest" not in (await client.head("/scan/known")).headers


async def test_an_offline_object_says_when_to_come_back(dav: Any) -> None:
    dav.plane.put("scan", b"cold", BODY, state=ObjectState.EVICTED)
    dav.plane.refuse = [ObjectOffline("cold")]
    async with dav.client() as client:
        answer = await client.get("/scan/cold")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
        assert (await client.head("/scan/cold")).status_code == 200
        assert dav.plane.opened == 1
        assert (await client.get("/scan/cold")).content == BODY


async def test_one_user_waits_for_a_few_recalls_only(dav: Any) -> None:
    for number in range(10):
        dav.plane.put("scan", b"%d" % number, BODY, state=ObjectState.EVICTED)
    dav.plane.put("scan", b"hot", BODY)
    dav.plane.gate = asyncio.Event()
    async with dav.client() as client:
        waiting = {asyncio.create_task(client.get(f"/scan/{number}")) for number in range(10)}
        refused, waiting = await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        while len(refused) < 2:
            more, waiting = await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            refused |= more
        dav.plane.gate.set()
        assert [task.result().status_code for task in refused] == [503, 503]
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 8


async def test_an_object_replaced_while_it_is_opened_is_read_in_its_new_version(dav: Any) -> None:
    dav.plane.put("scan", b"a", BODY)
    dav.plane.refuse = [StaleVersion("a"), StaleVersion("a")]
    async with dav.client() as client:
        assert (await client.get("/scan/a")).content == BODY
        dav.plane.refuse = [StaleVersion("a")] * 3
        assert (await client.get("/scan/a")).status_code == 503


@pytest.mark.parametrize(
    ("error", "status"),
    [(DataLost("a"), 500), (CatalogUnavailable("x"), 503), (StorageFailed("x"), 503), (Unreadable("x"), 503)],
)
async def test_failures_are_told_without_their_inside(dav: Any, error: Exception, status: int) -> None:
    dav.plane.put("scan", b"a", BODY)
    dav.plane.refuse = [error]
    async with dav.client() as client:
        answer = await client.get("/scan/a")
    assert answer.status_code == status
    assert "Traceback" not in answer.text


async def test_signing_in(dav: Any) -> None:
    dav.plane.put("scan", b"a", BODY)
    for auth in (None, ("root", "wrong"), ("nobody", "x")):
        async with dav.client(auth) as client:
            answer = await client.get("/scan/a")
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith('Basic realm="HISS"')
            assert (await client.request("PROPFIND", "/")).status_code == 401
    async with dav.client(None) as client:
        for field in ("Basic", "Basic !!", "Basic cm9vdA==", "Bearer x", "Basic " + "A" * 5000):
            assert (await client.get("/scan/a", headers={"Authorization": field})).status_code == 401


async def test_a_user_sees_only_what_a_grant_covers(dav: Any) -> None:
    for bucket in ("scan", "calib", "other"):
        for key in (b"raw/1", b"raw/deep/2", b"secret/3", b"top"):
            dav.plane.put(bucket, key, b"x")
    auth = dav.add_user("ada", ("scan", "raw/"), ("cal*", ""))
    async with dav.client(auth) as client:
        for path, status in {
            "/scan/raw/1": 200, "/scan/raw/deep/2": 200, "/scan/secret/3": 404, "/scan/top": 404, "/calib/top": 200,
            "/other/top": 404, "/other/": 404, "/scan/": 200, "/scan/secret/": 404, "/scan/raw/": 200, "/": 200,
        }.items():  # fmt: skip
            assert (await client.get(path)).status_code == status, path
        page = (await client.get("/scan/")).text
        assert "raw/" in page
        assert "secret" not in page
        assert "top" not in page
        assert "other" not in (await client.get("/")).text


async def test_options_need_no_credentials(dav: Any) -> None:
    async with dav.client(None) as client:
        answer = await client.options("/scan/a")
    assert (answer.status_code, answer.headers["dav"]) == (200, "1")
    assert answer.headers["allow"] == "OPTIONS, GET, HEAD, PROPFIND"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "MKCOL", "COPY", "MOVE", "PROPPATCH", "LOCK", "UNLOCK", "POST"])
async def test_writing_is_refused_clearly(dav: Any, method: str) -> None:
    dav.plane.put("scan", b"a", BODY)
    async with dav.client() as client:
        answer = await client.request(method, "/scan/a", content=b"new" if method == "PUT" else None)
        assert answer.status_code == 405
        assert "read-only" in answer.text
        assert "PROPFIND" in answer.headers["allow"]
        assert (await client.get("/scan/a")).content == BODY


async def test_an_unknown_method_is_refused(dav: Any) -> None:
    async with dav.client() as client:
        assert (await client.request("REPORT", "/")).status_code == 405


async def test_sentinels_exist_at_the_roots_and_are_empty(dav: Any) -> None:
    dav.plane.put("scan", b"a", BODY)
    dav.plane.put("own", b".metadata_never_index", b"mine")
    async with dav.client() as client:
        for name in (".metadata_never_index", ".ql_disablethumbnails"):
            for folder in ("", "/scan"):
                answer = await client.get(f"{folder}/{name}")
                assert (answer.status_code, answer.content) == (200, b"")
                assert (await client.head(f"{folder}/{name}")).headers["content-length"] == "0"
        assert (await client.get("/own/.metadata_never_index")).content == b"mine"
        assert (await client.get("/scan/deep/.metadata_never_index")).status_code == 404


async def test_a_folder_is_a_page_for_browsers(dav: Any) -> None:
    dav.plane.put("scan", b"run/<b>&.npy", b"x")
    dav.plane.put("scan", b"run/sub/y", b"y")
    async with dav.client() as client:
        answer = await client.get("/scan/run")
        assert (answer.status_code, answer.headers["location"]) == (301, "/scan/run/")
        page = await client.get("/scan/run/")
        assert page.headers["content-type"].startswith("text/html")
        assert "&lt;b&gt;&amp;.npy" in page.text
        assert "<b>" not in page.text
        assert 'href="/scan/run/sub/"' in page.text
        assert (await client.head("/scan/run/")).status_code == 200
        assert (await client.get("/scan/absent/")).status_code == 404


async def test_curl_resumes_a_download(dav: Any, tmp_path: Path) -> None:
    dav.plane.put("scan", b"big", BODY)
    target = tmp_path / "big"
    target.write_bytes(BODY[:1000])
    command = ["curl", "-sS", "-f", "-u", "root:root-secret", "-C", "-", "-o", str(target), f"{dav.url}/scan/big"]
    code, _, error = await dav.run(*command)
    assert code == 0, error
    assert target.read_bytes() == BODY
