"""Delivery of events to webhooks: order, retries, endpoints that are dead or refuse, and what survives a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.notify import REFUSALS_MAX, Deliverer
from ingest.catalog import server
from ingest.catalog.batching import Batch
from ingest.catalog.client import CatalogClient
from ingest.catalog.entries import Noticed, NoticesDone, ObjectCommitted
from ingest.counters import CATALOGUE, DRAIN, Counters
from ingest.errors import StorageFailed
from ingest.notification import Target
from ingest.paths import NodePaths
from ingest.records import CommitObject, Durability, ObjectRecord, ObjectState


class Webhook:
    """A real HTTP server; ``answer`` says what the next request gets."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status: Callable[[dict[str, Any]], int] = lambda _: 200

    async def __aenter__(self) -> Webhook:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/hook"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                status = self.status(body)
                if 200 <= status < 300:
                    self.bodies.append(body)
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\nok".encode())
                await writer.drain()
        writer.close()

    def keys(self) -> list[str]:
        return [record["s3"]["object"]["key"] for body in self.bodies for record in body.get("Records", ())]


class Node:
    def __init__(self, paths: NodePaths, catalog: CatalogClient) -> None:
        self.paths, self.catalog = paths, catalog
        self.counters = Counters(None, DRAIN)

    async def reports_to(self, *names: str) -> None:
        targets = [Target(name, "Queue", f"arn:hiss:sqs:::{name}", ("s3:ObjectCreated:*",)) for name in names]
        await self.catalog.configure_bucket("b", {"notification": msgspec.json.encode(targets)})

    async def put(self, key: str, **fields: Any) -> None:
        await self.catalog.commit(
            CommitObject("b", key.encode(), secrets.token_bytes(16), 0, "e", 0, "ada", (), **fields)
        )

    @contextlib.asynccontextmanager
    async def delivering(self, **targets: str) -> AsyncIterator[None]:
        stop = asyncio.Event()
        running = asyncio.create_task(Deliverer(self.catalog, self.counters, targets, retry_first_s=0.02).run(stop))
        yield
        stop.set()
        await running

    def count(self, name: str) -> float:
        return self.counters.cell(f"hiss_notifications_{name}").value()


@contextlib.asynccontextmanager
async def serving(root: Path) -> AsyncIterator[Node]:
    paths = NodePaths(root)
    stop, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(server.serve(paths, Counters(None, CATALOGUE), node=0, ready=ready.set, stop=stop))
    await ready.wait()
    async with CatalogClient(paths) as catalog:
        yield Node(paths, catalog)
    stop.set()
    await task


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with serving(tmp_path / "node") as node:
        await node.catalog.create_bucket("b", "ada")
        yield node


async def until(holds: Callable[[], bool], deadline_s: float = 60.0) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    while not holds():
        assert loop.time() < end, "did not happen in time"
        await asyncio.sleep(0.01)


async def test_events_arrive_in_order_and_once(node: Node) -> None:
    async with Webhook() as hook, node.delivering(hook=hook.url):
        await node.reports_to("hook")
        for number in range(100):
            await node.put(f"{number:03}")
        await until(lambda: len(hook.bodies) == 101)
        assert hook.bodies[0]["Event"] == "s3:TestEvent"
        assert hook.keys() == [f"{number:03}" for number in range(100)]
        await until(lambda: node.count("delivered_total") == 101)
    assert await node.catalog.notice_counts() == {}


async def test_an_endpoint_that_fails_gets_them_later_and_holds_up_no_other(node: Node) -> None:
    async with Webhook() as broken, Webhook() as fine:
        broken.status = lambda _: 503
        async with node.delivering(broken=broken.url, fine=fine.url):
            await node.reports_to("broken", "fine")
            for key in ("a", "b"):
                await node.put(key)
            await until(lambda: fine.keys() == ["a", "b"])
            await until(lambda: node.count("failing_endpoints") == 1 and node.count("failures_total") >= 3)
            assert broken.bodies == []
            broken.status = lambda _: 200
            await until(lambda: broken.keys() == ["a", "b"])
            await until(lambda: node.count("failing_endpoints") == 0)
    assert node.count("dropped_total") == 0


async def test_an_event_that_is_refused_for_good_does_not_hold_up_the_next(node: Node) -> None:
    refused = 0

    def status(body: dict[str, Any]) -> int:
        nonlocal refused
        bad = body.get("Records", [{}])[0].get("s3", {}).get("object", {}).get("key") == "poison"
        refused += bad
        return 400 if bad else 204

    async with Webhook() as hook, node.delivering(hook=hook.url):
        hook.status = status
        await node.reports_to("hook")
        for key in ("a", "poison", "b"):
            await node.put(key)
        await until(lambda: hook.keys() == ["a", "b"])
    assert refused == REFUSALS_MAX
    assert node.count("dropped_total") == 1


async def test_what_was_not_delivered_survives_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path / "node") as node:
        await node.catalog.create_bucket("b", "ada")
        await node.reports_to("hook")
        await node.put("a")
        assert await node.catalog.notice_counts() == {"hook": 2}
    (tmp_path / "node/catalogue/catalogue.sqlite").unlink()
    async with serving(tmp_path / "node") as node, Webhook() as hook, node.delivering(hook=hook.url):
        await until(lambda: hook.keys() == ["a"])


async def test_events_for_an_endpoint_that_the_settings_no_longer_have(node: Node) -> None:
    await node.reports_to("gone")
    await node.put("a")
    async with node.delivering():
        await until(lambda: node.count("dropped_total") == 2)
    assert await node.catalog.notice_counts() == {}


async def test_a_disk_that_fails_ends_no_delivery(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = dict.fromkeys(("notices", "notice_counts"), 0)

    def failing(name: str) -> Callable[..., Awaitable[Any]]:
        async def fail(*_: object) -> Any:
            asked[name] += 1
            raise StorageFailed("catalogue: disk I/O error")

        return fail

    async with Webhook() as hook:
        await node.reports_to("hook")
        await node.put("a")
        with monkeypatch.context() as patch:
            for name in asked:
                patch.setattr(node.catalog, name, failing(name))
            async with node.delivering(hook=hook.url):
                await until(lambda: min(asked.values()) >= 2)
                patch.undo()
                await until(lambda: hook.keys() == ["a"])
                await until(lambda: node.count("delivered_total") == 2)
    assert caplog.text.count("notifications for hook wait") == 1


async def test_an_event_that_cannot_be_given_up_is_not_posted_over_and_over(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirmations = 0

    async def refuse(_: object) -> None:
        nonlocal confirmations
        confirmations += 1
        raise StorageFailed("journal: the disk is gone")

    posts = 0

    def status(body: dict[str, Any]) -> int:
        nonlocal posts
        posts += 1
        return 400

    async with Webhook() as hook:
        hook.status = status
        await node.reports_to("hook")
        with monkeypatch.context() as patch:
            patch.setattr(node.catalog, "noticed", refuse)
            async with node.delivering(hook=hook.url):
                await until(lambda: confirmations >= 3)
                assert posts == REFUSALS_MAX + confirmations - 1
                assert node.count("dropped_total") == 0
                patch.undo()
                await until(lambda: node.count("dropped_total") == 1)
    assert await node.catalog.notice_counts() == {}


def test_an_event_makes_no_memory_commit_wait_for_the_disk() -> None:
    values = {"etag": "e", "crc64nvme": 0, "modified_ns": 0, "owner": "ada", "durability": Durability.MEMORY}
    record = ObjectRecord("b", b"k", "null", b"i" * 16, 1, ObjectState.BUFFERED, 0, 0, **values)  # type: ignore[arg-type]
    assert not Batch(1, entries=[ObjectCommitted(record, 0), Noticed("hook", b"{}")]).must_flush
    assert Batch(1, entries=[Noticed("hook", b"{}"), NoticesDone((1,))]).must_flush
