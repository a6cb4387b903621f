"""The tree over the real catalogue: a walk finds every key once, whatever the pages."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from archive.dav.auth import Sight
from archive.dav.paths import href, parse
from archive.dav.tree import File, Folder, Root, Tree
from gateway.access import sight_maker
from ingest.catalog import server as catalogue
from ingest.catalog.client import CatalogClient
from ingest.counters import CATALOGUE, Counters
from ingest.paths import NodePaths
from ingest.records import CommitObject, Grant, UserRecord
from s3api.auth.rules import Gate
from s3api.http.message import Headers, Request


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[CatalogClient]:
    paths = NodePaths(tmp_path)
    ready, stop = asyncio.Event(), asyncio.Event()
    writer = asyncio.create_task(catalogue.serve(paths, Counters(None, CATALOGUE), node=0, ready=ready.set, stop=stop))
    await ready.wait()
    async with CatalogClient(paths) as client:
        yield client
    stop.set()
    await writer


def sight_of(catalog: CatalogClient, user: UserRecord) -> Sight:
    request = Request("GET", "/", "/", (), Headers(()), None, "", False, "")  # type: ignore[arg-type]
    return sight_maker(Gate(catalog), time.time)(user, request)


async def fill(catalog: CatalogClient, bucket: str, keys: set[bytes]) -> None:
    await catalog.create_bucket(bucket, "root")
    requests = [CommitObject(bucket, key, secrets.token_bytes(16), 0, "e", 0, "root", ()) for key in sorted(keys)]
    await asyncio.gather(*(catalog.commit(request) for request in requests))


async def walk(tree: Tree, path: str) -> tuple[list[bytes], list[str]]:
    """(keys, paths of folders) below ``path``, each node looked up again by its own path."""
    node = await tree.resolve(parse(href(path)))
    assert isinstance(node, Root | Folder)
    keys: list[bytes] = []
    folders: list[str] = []
    async for page in tree.children(node):
        for entry in page:
            found = await tree.resolve(parse(href(path + entry.name)))
            assert found == entry.node, path + entry.name
            if isinstance(entry.node, File):
                keys.append(entry.node.record.key)
            else:
                folders.append(path + entry.name + "/")
                below = await walk(tree, path + entry.name + "/")
                keys += below[0]
                folders += below[1]
    return keys, folders


def random_keys(count: int, seed: int) -> set[bytes]:
    chance = random.Random(seed)
    names = [b"a", b"b", b"a-1", b"a.x", b"", b"..", b"\xff", b"=~", b"=+a", b"\xc3\xa9", b"z\n"]
    keys = {b"/".join(chance.choices(names, k=chance.randint(1, 5))) for _ in range(count)}
    return {key for key in keys if key and not key.endswith(b"/")}


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_walk_finds_every_key_once(catalog: CatalogClient, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("archive.dav.tree.PAGE_ENTRIES", 3)
    keys = random_keys(150, seed)
    await fill(catalog, "odd", keys)
    tree = Tree(catalog, sight_of(catalog, UserRecord("root", "root", "R", b"", root=True)))
    found, folders = await walk(tree, "/")
    assert sorted(found) == sorted(keys)
    assert len(folders) == len(set(folders))


async def test_a_walk_with_grants_finds_what_they_cover(
    catalog: CatalogClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archive.dav.tree.PAGE_ENTRIES", 2)
    keys = random_keys(150, 3)
    await fill(catalog, "odd", keys)
    await fill(catalog, "even", {b"x"})
    grants = (Grant("odd", "a/b"), Grant("odd", "a/b/a"), Grant("o*", "a-"), Grant("odd", "b/../"))
    sight = sight_of(catalog, UserRecord("ada", "ada", "A", b"", grants))
    found, folders = await walk(Tree(catalog, sight), "/")
    assert sorted(found) == sorted(key for key in keys if key.startswith((b"a/b", b"a-", b"b/../")))
    assert len(folders) == len(set(folders))


async def test_what_a_run_is_made_of_is_not_shown(catalog: CatalogClient) -> None:
    shown = {b"_products/k/run/_run.nxs", b"_products/k/run/a.nxs", b"run/.partials/mine"}
    await fill(catalog, "scan", shown | {b"_products/k/run/.partials/1.partial", b"_products/k/.partials/2.partial"})
    keys, _ = await walk(Tree(catalog, sight_of(catalog, UserRecord("root", "root", "R", b"", root=True))), "/")
    assert set(keys) == shown
