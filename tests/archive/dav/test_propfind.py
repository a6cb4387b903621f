"""PROPFIND: what is listed, under which names, with which properties; big folders; peers that list."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from ingest.errors import StorageFailed
from ingest.records import ObjectState

STATE = '<D:propfind xmlns:D="DAV:"><D:prop><h:state xmlns:h="https://hiss"/><h:locality xmlns:h="https://hiss"/></D:prop></D:propfind>'


async def propfind(
    client: httpx.AsyncClient, path: str, depth: str | None = "1", body: str | None = None
) -> httpx.Response:
    headers = {} if depth is None else {"Depth": depth}
    return await client.request("PROPFIND", path, headers=headers, content=body)


def listed(answer: httpx.Response) -> dict[str, dict[str, str]]:
    """href -> the properties found, with Clark names; a property without text has its first child's tag."""
    assert answer.status_code == 207, answer.text
    found: dict[str, dict[str, str]] = {}
    for response in ET.fromstring(answer.content).iter("{DAV:}response"):
        properties = found.setdefault(response.findtext("{DAV:}href", ""), {})
        for stat in response.iter("{DAV:}propstat"):
            if " 200 " in stat.findtext("{DAV:}status", ""):
                for element in stat.find("{DAV:}prop") or ():
                    properties[element.tag] = element[0].tag if len(element) else element.text or ""
    return found


def names(answer: httpx.Response) -> list[str]:
    return [unquote(href) for href in listed(answer)]


async def test_every_property_of_an_object(dav: Any) -> None:
    record = dav.plane.put(
        "scan",
        b"run/a&b.npy",
        b"12345",
        headers={"content-type": "application/x-npy"},
        modified_ns=1_700_000_000 * 10**9,
    )
    async with dav.client() as client:
        found = listed(await propfind(client, "/scan/run/a%26b.npy", "0"))
        assert found == {
            "/scan/run/a&b.npy": {
                "{DAV:}resourcetype": "",
                "{DAV:}displayname": "a&b.npy",
                "{DAV:}creationdate": "2023-11-14T22:13:20Z",
                "{DAV:}getlastmodified": "Tue, 14 Nov 2023 22:13:20 GMT",
                "{DAV:}getcontentlength": "5",
                "{DAV:}getcontenttype": "application/x-npy",
                "{DAV:}getetag": f'"{record.etag}"',
            }
        }


async def test_folders_at_depth_one(dav: Any) -> None:
    for key in (b"run/a", b"run/b/c", b"run/b/d", b"other"):
        dav.plane.put("scan", key, b"x")
    async with dav.client() as client:
        assert names(await propfind(client, "/")) == ["/", "/scan/"]
        assert names(await propfind(client, "/scan")) == ["/scan/", "/scan/other", "/scan/run/"]
        found = listed(await propfind(client, "/scan/run/"))
        assert list(found) == ["/scan/run/", "/scan/run/a", "/scan/run/b/"]
        assert found["/scan/run/b/"] == {"{DAV:}resourcetype": "{DAV:}collection", "{DAV:}displayname": "b"}
        assert names(await propfind(client, "/scan/run/", "0")) == ["/scan/run/"]
        assert (await propfind(client, "/scan/absent/")).status_code == 404


async def test_infinite_depth_is_refused_with_its_condition(dav: Any) -> None:
    async with dav.client() as client:
        for depth in (None, "infinity", "Infinity"):
            answer = await propfind(client, "/", depth)
            assert answer.status_code == 403
            assert ET.fromstring(answer.content).find("{DAV:}propfind-finite-depth") is not None
        assert (await propfind(client, "/", "2")).status_code == 400


async def test_state_and_locality_are_told_and_nothing_is_recalled(dav: Any) -> None:
    for state in (ObjectState.BUFFERED, ObjectState.DRAINING, ObjectState.ARCHIVED, ObjectState.EVICTED):
        dav.plane.put("scan", state.value.encode(), b"x", state=state)
    async with dav.client() as client:
        found = listed(await propfind(client, "/scan/", "1", STATE))
    assert {name: tuple(values.values()) for name, values in found.items() if name != "/scan/"} == {
        "/scan/archived": ("archived", "ONLINE_AND_NEARLINE"),
        "/scan/buffered": ("buffered", "ONLINE"),
        "/scan/draining": ("draining", "ONLINE"),
        "/scan/evicted": ("evicted", "NEARLINE"),
    }
    assert dav.plane.opened == 0


async def test_properties_that_are_not_there_are_404(dav: Any) -> None:
    dav.plane.put("scan", b"a", b"x")
    body = '<propfind xmlns="DAV:"><prop><getetag/><x:y xmlns:x="urn:a&amp;&quot;b"/><z xmlns=""/></prop></propfind>'
    async with dav.client() as client:
        answer = await propfind(client, "/scan/a", "0", body)
    stats = list(ET.fromstring(answer.content).iter("{DAV:}propstat"))
    assert [stat.findtext("{DAV:}status") for stat in stats] == ["HTTP/1.1 200 OK", "HTTP/1.1 404 Not Found"]
    assert [element.tag for element in stats[1][0]] == ['{urn:a&"b}y', "z"]


async def test_names_only_and_included(dav: Any) -> None:
    dav.plane.put("scan", b"a", b"x")
    async with dav.client() as client:
        found = listed(await propfind(client, "/scan/a", "0", '<propfind xmlns="DAV:"><propname/></propfind>'))
        assert found["/scan/a"]["{https://hiss}state"] == ""
        assert found["/scan/a"]["{DAV:}getcontentlength"] == ""
        body = '<propfind xmlns="DAV:"><allprop/><include><x:state xmlns:x="https://hiss"/></include></propfind>'
        found = listed(await propfind(client, "/scan/a", "0", body))
        assert found["/scan/a"]["{https://hiss}state"] == "buffered"
        assert found["/scan/a"]["{DAV:}getcontentlength"] == "1"


@pytest.mark.parametrize(
    "body",
    [
        "<propfind",
        '<other xmlns="DAV:"/>',
        '<propfind xmlns="DAV:"/>',
        '<propfind xmlns="DAV:"><allprop/><propname/></propfind>',
        '<!DOCTYPE x [<!ENTITY a "b">]><propfind xmlns="DAV:"><prop><x>&a;</x></prop></propfind>',
        '<propfind xmlns="DAV:"><prop>' + "".join(f"<p{n}/>" for n in range(300)) + "</prop></propfind>",
    ],
)
async def test_a_bad_body_is_a_bad_request(dav: Any, body: str) -> None:
    async with dav.client() as client:
        answer = await propfind(client, "/", "0", body)
    assert answer.status_code == 400
    assert "Traceback" not in answer.text


async def test_a_large_body_is_refused(dav: Any) -> None:
    async with dav.client() as client:
        assert (await propfind(client, "/", "0", "<!--" + "x" * 100_000 + "-->")).status_code == 413


async def test_conditions_of_a_propfind(dav: Any) -> None:
    record = dav.plane.put("scan", b"a", b"x")
    async with dav.client() as client:
        for headers, status in [
            ({"If": f'(["{record.etag}"])'}, 207),
            ({"If": '(["other"])'}, 412),
            ({"If-Match": '"other"'}, 412),
            ({"If-Match": f'"{record.etag}"'}, 207),
        ]:
            answer = await client.request("PROPFIND", "/scan/a", headers={"Depth": "0", **headers})
            assert answer.status_code == status, headers


ODD = {
    b"a": b"object a", b"a/b": b"below a", b"a-b": b"between", b"a.d/x": b"between too", b"x//y": b"empty segment",
    b"../up": b"dots", b"./here": b"dot", b"folder/": b"bytes at a slash", b"marker/": b"", b"nul\x00\n": b"control",
    b"\xff\xfe": b"not UTF-8", b"=~x": b"like an escape", b"=+a": b"like a folder", b"/lead": b"leading slash",
    "ä ö%2F+?#.npy".encode(): b"percent", b"tail/x/": b"deep slash", b"..": b"dots alone", b"d/..": b"dots last",
}  # fmt: skip


async def test_every_odd_key_is_listed_once_and_reads_back(dav: Any) -> None:
    for key, body in ODD.items():
        dav.plane.put("odd", key, body)
    bodies: list[bytes] = []
    async with dav.client() as client:
        folders = ["/odd/"]
        while folders:
            folder = folders.pop()
            first, *children = listed(await propfind(client, folder)).items()
            assert first[0] == folder
            for href, properties in children:
                # A client takes the last segment for the name: neither normalisation nor a stripped slash may matter.
                plain = await propfind(client, href.rstrip("/"), "0")
                assert list(listed(plain)) == [href]
                if properties["{DAV:}resourcetype"]:
                    folders.append(href)
                else:
                    answer = await client.get(href)
                    assert answer.status_code == 200
                    bodies.append(answer.content)
    assert sorted(bodies) == sorted(body for body in ODD.values() if body)


async def test_an_object_keeps_its_name_beside_its_folder(dav: Any) -> None:
    for key in (b"a", b"a-1", b"a-2", b"a.txt", b"a/b", b"b/c"):
        dav.plane.put("scan", key, key)
    async with dav.client() as client:
        assert names(await propfind(client, "/scan/"))[1:] == [
            "/scan/a", "/scan/a-1", "/scan/a-2", "/scan/a.txt", "/scan/=+a/", "/scan/b/"
        ]  # fmt: skip
        assert names(await propfind(client, "/scan/=+a/"))[1:] == ["/scan/=+a/b"]
        for path in ("/scan/=+a/b", "/scan/a/b"):
            assert (await client.get(path)).content == b"a/b"


async def test_grants_inside_a_folder_show_the_way_to_them_only(dav: Any) -> None:
    for key in (b"p/a/1", b"p/a/2", b"p/b/1", b"p/c1", b"p/c2", b"p/d"):
        dav.plane.put("scan", key, b"x")
    auth = dav.add_user("ada", ("scan", "p/a/1"), ("scan", "p/b/"), ("scan", "p/c"))
    async with dav.client(auth) as client:
        assert names(await propfind(client, "/scan/")) == ["/scan/", "/scan/p/"]
        assert names(await propfind(client, "/scan/p/"))[1:] == ["/scan/p/a/", "/scan/p/b/", "/scan/p/c1", "/scan/p/c2"]
        assert names(await propfind(client, "/scan/p/a/"))[1:] == ["/scan/p/a/1"]


async def test_ten_thousand_entries_stream(dav: Any) -> None:
    for number in range(10_000):
        dav.plane.catalog.held.setdefault("big", {})
        dav.plane.catalog.held["big"][b"run/frame_%05d.npy" % number] = None
    template = dav.plane.catalog.put("big", b"run/frame_00000.npy", b"x" * 100)
    held = dav.plane.catalog.held["big"]
    held.update(dict.fromkeys(held, template))
    dav.plane.catalog.sorted["big"] = sorted(held)
    async with dav.client() as client:
        async with client.stream("PROPFIND", "/big/run/", headers={"Depth": "1"}) as answer:
            chunks = [chunk async for chunk in answer.aiter_raw()]
    responses = ET.fromstring(b"".join(chunks)).findall("{DAV:}response")
    assert len(responses) == 10_001
    assert "content-length" not in answer.headers
    assert len(chunks) > 10, "it is not made whole before it is sent"


async def test_a_listing_that_fails_midway_does_not_look_complete(dav: Any) -> None:
    for number in range(600):
        dav.plane.catalog.put("big", b"%04d" % number)
    dav.plane.catalog.fail_after = 1
    async with dav.client() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await propfind(client, "/big/")


async def test_a_catalogue_whose_disk_fails_is_503(dav: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise StorageFailed("catalogue: disk I/O error")

    monkeypatch.setattr(dav.plane.catalog, "head", fail)
    async with dav.client() as client:
        answer = await client.request("PROPFIND", "/scan/a", headers={"Depth": "0"})
    assert answer.status_code == 503


async def test_many_at_once_wait_for_a_few_threads(dav: Any) -> None:
    dav.plane.put("scan", b"a", b"x")
    async with dav.client() as client:
        for answer in await asyncio.gather(*(propfind(client, "/scan/") for _ in range(40))):
            assert len(listed(answer)) == 2


def peer(name: str) -> str:
    """A program that must be there in CI and may be missing elsewhere."""
    found = shutil.which(name)
    if found is None and os.environ.get("CI") != "true":
        pytest.skip(f"{name} is not installed")
    assert found is not None, f"{name} is not installed"
    return found


async def test_rclone_lists_and_reads_and_checks(dav: Any, tmp_path: Path) -> None:
    rclone = peer("rclone")
    bodies = {f"run/frame {number}.npy": os.urandom(1000 + number) for number in range(5)}
    for key, body in bodies.items():
        dav.plane.put("scan", key.encode(), body, etag=hashlib.md5(body).hexdigest())
    config = tmp_path / "rclone.conf"
    code, obscured, error = await dav.run(rclone, "obscure", "root-secret")
    assert code == 0, error
    config.write_text(f"[hiss]\ntype=webdav\nurl={dav.url}\nvendor=owncloud\nuser=root\npass={obscured.decode()}\n")
    local = tmp_path / "copy"
    base = [rclone, "--config", str(config), "--retries", "1"]
    code, out, error = await dav.run(*base, "lsjson", "-R", "--hash", "hiss:scan")
    assert code == 0, error
    found = {entry["Path"]: entry for entry in json.loads(out) if not entry["IsDir"]}
    assert {path: entry["Hashes"]["md5"] for path, entry in found.items()} == {
        path: hashlib.md5(body).hexdigest() for path, body in bodies.items()
    }
    code, _, error = await dav.run(*base, "copy", "hiss:scan", str(local))
    assert code == 0, error
    code, _, error = await dav.run(*base, "check", "hiss:scan", str(local))
    assert code == 0, error
    for path, body in bodies.items():
        assert (local / path).read_bytes() == body


async def test_curl_asks_for_properties(dav: Any) -> None:
    dav.plane.put("scan", b"a", b"x")
    code, out, error = await dav.run(
        peer("curl"), "-sS", "-f", "-u", "root:root-secret", "-X", "PROPFIND", "-H", "Depth: 1", f"{dav.url}/scan/"
    )
    assert code == 0, error
    assert len(ET.fromstring(out).findall("{DAV:}response")) == 2
