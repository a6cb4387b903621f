"""Feedback over WebSocket: the same events as SSE, credentials, filters, resuming, slow and dead clients; another's client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ingest.counters import CONTROL, Counters
from ingest.errors import StorageFailed
from ingest.ports import FeedbackEvent
from ingest.records import Grant

ROOT = ("ROOTKEY", "root-secret")


def event(frame: int, *, bucket: str = "scan", key: bytes = b"run1/a", kernel: str = "hits") -> FeedbackEvent:
    return FeedbackEvent(bucket, key, kernel, frame, 1, frame / 2, 7)


def basic(keys: tuple[str, str]) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(":".join(keys).encode()).decode()}


class Follower:
    """Reads one event after the other."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.last_id = ""
        self._events: list[dict[str, Any]] = []

    async def next(self) -> dict[str, Any]:
        while not self._events:
            async with asyncio.timeout(60):
                self._events = json.loads(await self.connection.recv())
        found = self._events.pop(0)
        self.last_id = found["id"]
        return found if found["event"] != "heartbeat" else await self.next()

    async def frames(self, count: int) -> list[int]:
        found = [await self.next() for _ in range(count)]
        assert {one["event"] for one in found} == {"feedback"}
        return [one["frame"] for one in found]


@contextlib.asynccontextmanager
async def following(
    node: Any, query: str = "", *, headers: dict[str, str] | None = None, **options: Any
) -> AsyncIterator[Follower]:
    url = f"{node.url.replace('http', 'ws')}/v1/feedback?bucket=scan{query}"
    async with connect(
        url, additional_headers=headers if headers is not None else basic(ROOT), **options
    ) as connection:
        follower = Follower(connection)
        assert (await follower.next())["event"] == "ready"
        yield follower


async def refused(node: Any, query: str = "", **options: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        async with following(node, query, **options):
            pass
    return caught.value.response.status_code, json.loads(caught.value.response.body)["detail"]


@pytest.fixture
async def scan(node: Any) -> Any:
    await node.catalog.create_bucket("scan", "root")
    return node


async def test_events_have_the_fields_and_ids_of_sse(scan: Any) -> None:
    async with following(scan) as follower:
        scan.hub.publish([event(0), event(1)])
        first, second = await follower.next(), await follower.next()
    number = first.pop("id")
    assert first == {"event": "feedback", "bucket": "scan", "key": "run1/a", "kernel": "hits", "frame": 0, "code": 1,
                     "value": 0.0, "time_ns": 7}  # fmt: skip
    assert second["id"] == number[:-1] + "2"
    async with following(scan, f"&last_event_id={number}") as again:
        assert await again.frames(1) == [1]


async def test_events_that_come_together_share_a_message(scan: Any) -> None:
    async with following(scan) as follower:
        scan.hub.publish([event(number) for number in range(600)])
        sizes = []
        while sum(sizes) < 600:
            sizes.append(len(json.loads(await follower.connection.recv())))
    assert sizes == [256, 256, 88]


async def test_filters_and_grants_are_those_of_sse(scan: Any) -> None:
    await scan.add_user(("READER", "reader-secret"), Grant(access="read", bucket="scan", prefix="run2/"))
    reader = {"headers": basic(("READER", "reader-secret"))}
    async with following(scan, "&kernel=rings") as rings, following(scan, "&key_prefix=run2/", **reader) as run2:
        scan.hub.publish([event(0), event(1, kernel="rings"), event(2, key=b"run2/x"), event(3, bucket="other")])
        assert await rings.frames(1) == [1]
        assert await run2.frames(1) == [2]
    assert await refused(scan, "&key_prefix=run1/", **reader) == (
        403, "your key pair may not read 'run1/' in bucket 'scan'"
    )  # fmt: skip
    assert (await refused(scan, headers={}))[0] == 401
    assert (await refused(scan, headers=basic(("ROOTKEY", "wrong"))))[0] == 401


async def test_a_bucket_that_is_not_there(node: Any) -> None:
    assert await refused(node) == (404, "there is no such bucket")


async def test_a_catalogue_whose_disk_fails_is_an_ordinary_503(scan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: str) -> None:
        raise StorageFailed("catalogue: disk I/O error")

    monkeypatch.setattr(scan.catalog, "bucket", fail)
    assert (await refused(scan))[0] == 503


async def test_a_browser_sends_its_keys_as_a_subprotocol(scan: Any) -> None:
    token = base64.urlsafe_b64encode(":".join(ROOT).encode()).decode().rstrip("=")
    foreign = {"Origin": "https://elsewhere.example"}
    offered = {"headers": {**foreign}, "subprotocols": ["hiss.feedback", f"hiss.basic.{token}"]}
    async with following(scan, **offered) as follower:
        assert follower.connection.subprotocol == "hiss.feedback", "the secret is not repeated in the answer"
        scan.hub.publish([event(5)])
        assert await follower.frames(1) == [5]
    for wrong in ("!", "a" * 2000, base64.urlsafe_b64encode(b"ROOTKEY:wrong").decode().rstrip("=")):
        status, _ = await refused(scan, headers={}, subprotocols=["hiss.feedback", f"hiss.basic.{wrong}"])
        assert status == 401


async def test_a_foreign_page_cannot_use_the_keys_a_browser_remembers(scan: Any) -> None:
    assert (await refused(scan, headers={**basic(ROOT), "Origin": "https://elsewhere.example"}))[0] == 401
    async with following(scan, headers={**basic(ROOT), "Origin": scan.url}):
        pass


async def test_coming_back_too_late_and_after_a_restart(start: Any) -> None:
    node = await start(ring_events=4)
    await node.catalog.create_bucket("scan", "root")
    async with following(node) as first:
        node.hub.publish([event(0)])
        await first.frames(1)
    node.hub.publish([event(number) for number in range(1, 8)])
    async with following(node, f"&last_event_id={first.last_id}") as late:
        gap = await late.next()
        assert (gap["event"], gap["reason"], gap["lost"], gap["exact"]) == ("gap", "expired", 3, True)
        assert await late.frames(4) == [4, 5, 6, 7]
    async with following(node, "&last_event_id=garbage") as restarted:
        assert (await restarted.next())["reason"] == "restart"


async def test_a_slow_client_is_told_what_it_lost_and_delays_nobody(start: Any) -> None:
    node = await start(ring_events=2000)
    await node.catalog.create_bucket("scan", "root")
    lost_total = Counters(node.counters_fd, CONTROL).cell("hiss_feedback_lost_total", "websocket")
    long_key = b"run1/" + b"k" * 900
    async with following(node, max_queue=1) as slow:
        async with following(node) as quick:
            sent = 0
            while sent < 30_000:
                node.hub.publish([event(sent + number, key=long_key) for number in range(1000)])
                assert await quick.frames(1000) == list(range(sent, sent + 1000))
                sent += 1000
        frames, lost = 0, 0
        while frames + lost < sent:
            one = await slow.next()
            if one["event"] == "gap":
                assert (one["reason"], one["exact"]) == ("slow", True)
                lost += one["lost"]
            else:
                assert one["frame"] == frames + lost
                frames += 1
    assert lost > 0
    assert lost_total.value() == lost
    assert frames >= 2000


async def test_a_client_that_does_not_answer_pings_is_closed(
    start: Any, monkeypatch: pytest.MonkeyPatch, poll: Any
) -> None:
    monkeypatch.setattr("gateway.control.feedback.websocket.PING_S", 0.2)
    monkeypatch.setattr("gateway.control.feedback.websocket.PONG_TIMEOUT_S", 0.2)
    node = await start()
    await node.catalog.create_bucket("scan", "root")
    gauge = Counters(node.counters_fd, CONTROL).cell("hiss_feedback_subscribers", "websocket")
    async with following(node, ping_interval=None) as alive:
        with socket.create_connection(("127.0.0.1", node.port)) as dead:
            lines = [
                "GET /v1/feedback?bucket=scan HTTP/1.1",
                "Host: localhost",
                "Upgrade: websocket",
                "Connection: upgrade",
            ]
            lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
            lines += [f"Authorization: {basic(ROOT)['Authorization']}", "", ""]
            dead.sendall("\r\n".join(lines).encode())
            await asyncio.to_thread(poll, lambda: gauge.value() == 2, "both are subscribed")
            await asyncio.to_thread(poll, lambda: gauge.value() == 1, "the dead one is closed", 10)
        node.hub.publish([event(1)])
        assert await alive.frames(1) == [1]


async def test_a_client_s_ping_is_answered_and_its_talk_ignored(scan: Any) -> None:
    async with following(scan) as follower:
        await follower.connection.send("hello")
        await asyncio.wait_for(await follower.connection.ping(), 60)
        scan.hub.publish([event(1)])
        assert await follower.frames(1) == [1]


async def test_a_client_that_says_too_much_is_closed(scan: Any) -> None:
    async with following(scan) as follower:
        await follower.connection.send("x" * 5000)
        with pytest.raises(ConnectionClosed):
            await follower.next()
    assert follower.connection.close_code == 1009


async def test_heartbeats_carry_the_id_on_and_stopping_closes(start: Any) -> None:
    node = await start(heartbeat_s=0.05)
    await node.catalog.create_bucket("scan", "root")
    async with following(node, "&kernel=rings") as follower:
        node.hub.publish([event(0), event(1)])
        async with asyncio.timeout(60):
            while True:
                (beat,) = json.loads(await follower.connection.recv())
                assert beat["event"] == "heartbeat"
                if beat["id"].endswith("-2"):
                    break
        node.stop.set()
        with pytest.raises(ConnectionClosed):
            await follower.next()
    assert follower.connection.close_code == 1001


async def test_the_limit_is_shared_with_sse(scan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.control.feedback.hub.SUBSCRIBERS_MAX", 1)
    async with following(scan):
        assert await refused(scan) == (503, "too many feedback streams are open")
        async with scan.client() as client:
            assert (await client.get("/v1/feedback?bucket=scan")).status_code == 503


async def test_over_tls(start: Any, certificate: tuple[Path, Path]) -> None:
    node = await start(tls=certificate)
    await node.catalog.create_bucket("scan", "root")
    async with following(node, ssl=ssl.create_default_context(cafile=certificate[0])) as follower:
        node.hub.publish([event(3)])
        assert await follower.frames(1) == [3]
