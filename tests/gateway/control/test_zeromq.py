"""Feedback over ZeroMQ: topics, numbers that show gaps, heartbeats, a full queue, keys; pyzmq's own subscriber."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth

from gateway.control.feedback.hub import entry_of
from gateway.control.feedback.zeromq import HEARTBEAT_TOPIC, ZmqPublisher
from ingest.counters import Counters
from ingest.ports import FeedbackEvent


def event(frame: int, *, bucket: str = "scan", kernel: str = "hits", key: bytes = b"run1/a") -> FeedbackEvent:
    return FeedbackEvent(bucket, key, kernel, frame, 1, frame / 2, 7)


class Subscriber:
    """Blocking calls, made in threads."""

    def __init__(self, endpoint: str, *topics: bytes, prepare: Callable[[Any], None] = lambda _: None) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        prepare(self._socket)
        for topic in topics:
            self._socket.subscribe(topic)
        self._socket.connect(endpoint)

    async def next(self, timeout_s: float = 60) -> tuple[bytes, dict[str, Any], int] | None:
        if not await asyncio.to_thread(self._socket.poll, timeout_s * 1000):
            return None
        topic, body, number = self._socket.recv_multipart()
        return topic, json.loads(body), int.from_bytes(number, "big")

    async def numbers(self, until: int) -> list[int]:
        """Numbers of events up to ``until``, or up to a heartbeat that says that no more come."""

        def read() -> list[int]:
            found: list[int] = []
            while (not found or found[-1] < until) and self._socket.poll(60_000):
                topic, body, number = self._socket.recv_multipart()
                if topic != HEARTBEAT_TOPIC:
                    found.append(int.from_bytes(number, "big"))
                elif until in json.loads(body)["last"].values():
                    break
            return found

        return await asyncio.to_thread(read)

    async def event(self) -> tuple[bytes, dict[str, Any], int]:
        while found := await self.next():
            if found[0] != HEARTBEAT_TOPIC:
                return found
        raise AssertionError("nothing came")

    async def ready(self) -> None:
        """A heartbeat has come: the subscription is in force."""
        found = await self.next()
        assert found is not None
        assert found[0] == HEARTBEAT_TOPIC

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextlib.asynccontextmanager
async def subscribed(endpoint: str, *topics: bytes, **options: Any) -> AsyncIterator[Subscriber]:
    subscriber = Subscriber(endpoint, HEARTBEAT_TOPIC, *topics, **options)
    try:
        await subscriber.ready()
        yield subscriber
    finally:
        subscriber.close()


@pytest.fixture
async def publish(poll: Any) -> AsyncIterator[Callable[..., Any]]:
    """``await publish(**options)``: a bound publisher."""
    tasks = []

    async def begin(endpoint: str = "tcp://127.0.0.1:*", **options: Any) -> ZmqPublisher:
        publisher = ZmqPublisher(endpoint, Counters(None, 0), heartbeat_s=0.05, **options)
        tasks.append(asyncio.create_task(publisher.run()))
        await asyncio.to_thread(poll, lambda: publisher.endpoint or publisher.error, "bound, or not")
        return publisher

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def send(publisher: ZmqPublisher, *events: FeedbackEvent) -> None:
    for one in events:
        publisher.send(one.bucket, entry_of(one, {"shutter": "taken"}))


async def test_messages_have_topic_event_and_number(publish: Any) -> None:
    publisher = await publish()
    async with subscribed(publisher.endpoint, b"scan/") as everything:
        send(publisher, event(0), event(1, kernel="rings"), event(2), event(3, bucket="scan2"), event(4))
        got = [await everything.event() for _ in range(4)]
    assert [(topic, body["frame"], number) for topic, body, number in got] == [
        (b"scan/hits", 0, 1), (b"scan/rings", 1, 1), (b"scan/hits", 2, 2), (b"scan/hits", 4, 3)
    ]  # fmt: skip
    assert got[0][1] == {"event": "feedback", "bucket": "scan", "key": "run1/a", "kernel": "hits", "frame": 0, "code": 1,
                         "value": 0.0, "time_ns": 7, "actions": {"shutter": "taken"}}  # fmt: skip


async def test_heartbeats_say_the_last_number_of_each_topic(publish: Any) -> None:
    publisher = await publish()
    async with subscribed(publisher.endpoint) as only_heartbeats:
        send(publisher, event(0), event(1), event(2, kernel="rings"))
        numbers = []
        while True:
            found = await only_heartbeats.next()
            assert found is not None
            numbers.append(found[2])
            if found[1]["last"]:
                break
    assert found[1]["last"] == {"scan/hits": 2, "scan/rings": 1}
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert found[1]["epoch"]


async def test_one_that_reads_nothing_loses_what_the_numbers_show_and_delays_nobody(
    publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.control.feedback.zeromq.QUEUE_MESSAGES", 2000)
    publisher = await publish()

    def small(socket: Any) -> None:
        socket.setsockopt(zmq.RCVHWM, 10)
        socket.setsockopt(zmq.RCVBUF, 4096)

    async with (
        subscribed(publisher.endpoint, b"scan/", prepare=small) as slow,
        subscribed(publisher.endpoint, b"scan/") as quick,
    ):
        key = b"k" * 1000
        for first in range(0, 10_000, 1000):
            send(publisher, *(event(first + number, key=key) for number in range(1000)))
            assert await quick.numbers(first + 1000) == list(range(first + 1, first + 1001))
        numbers = await slow.numbers(10_000)
    assert numbers[:1000] == list(range(1, 1001)), "what was queued comes"
    assert numbers == sorted(set(numbers))
    assert len(numbers) < 10_000


async def test_with_keys_only_known_clients_are_let_in(publish: Any, tmp_path: Path) -> None:
    clients = tmp_path / "clients"
    clients.mkdir()
    _, server_secret = zmq.auth.create_certificates(tmp_path, "server")
    zmq.auth.create_certificates(clients, "known")
    zmq.auth.create_certificates(tmp_path, "stranger")
    publisher = await publish(key_file=Path(server_secret), clients=clients)
    server_key, _ = zmq.auth.load_certificate(tmp_path / "server.key")

    def as_client(name: Path) -> Callable[[Any], None]:
        def prepare(socket: Any) -> None:
            socket.curve_publickey, socket.curve_secretkey = zmq.auth.load_certificate(name)
            socket.curve_serverkey = server_key

        return prepare

    async with subscribed(publisher.endpoint, b"scan/", prepare=as_client(clients / "known.key_secret")) as known:
        send(publisher, event(0))
        assert (await known.event())[1]["frame"] == 0
    for prepare in (as_client(tmp_path / "stranger.key_secret"), lambda _: None):
        outsider = Subscriber(publisher.endpoint, b"", prepare=prepare)
        assert await outsider.next(0.5) is None
        outsider.close()


async def test_an_address_in_use_is_said_and_tried_again(
    publish: Any, poll: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.control.feedback.zeromq.RETRY_S", 0.05)
    with zmq.Context() as context, context.socket(zmq.PUB) as holder:
        port = holder.bind_to_random_port("tcp://127.0.0.1")
        publisher = await publish(f"tcp://127.0.0.1:{port}")
        assert "in use" in publisher.error
        send(publisher, event(0))
    await asyncio.to_thread(poll, lambda: publisher.endpoint, "bound")
    assert publisher.error == ""


async def test_the_node_publishes_what_its_subscribers_see(start: Any, poll: Any) -> None:
    made: list[ZmqPublisher] = []

    def make(counters: Counters) -> ZmqPublisher:
        made.append(ZmqPublisher("tcp://127.0.0.1:*", counters, heartbeat_s=0.05))
        return made[0]

    node = await start(publisher=make)
    await asyncio.to_thread(poll, lambda: made[0].endpoint, "bound")
    async with subscribed(made[0].endpoint, b"scan/") as subscriber:
        node.hub.publish([event(7)])
        assert (await subscriber.event())[1]["frame"] == 7
