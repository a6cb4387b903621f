"""Two control processes of a cluster, linked over their real ports: who writes to a target, and what a cut link means."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from gateway.bridge import wire
from gateway.control.feedback.exchange import ITEMS_KEPT, MESSAGES, Exchange, Item, Items, Outlets
from gateway.control.feedback.executors import FENCE_S, START_S, Executors
from gateway.control.feedback.ring import Entry, Filter, Ring
from gateway.control.feedback.sse import SSE
from ingest.cluster import members
from ingest.cluster.members import LEASE_S, Member, Membership
from ingest.counters import Counters
from ingest.paths import socket_address
from ingest.ports import FeedbackEvent
from ingest.records import NodeRecord
from kernels.feedback import SocketFeedback
from tests.gateway.control.test_feedback import subscribed

EPICS = Outlets(("epics:*",), ("epics",))
ACTION = "code=1 target=epics:X min=0 max=10 rate=100/s deadman=1.5s safe=0"


def membership(me: int, nodes: Sequence[tuple[int, float, str]], as_of_s: float | None = None) -> Membership:
    """``nodes``: number, silence in seconds, control URL."""
    found = (Member(NodeRecord(node, f"n{node}", 1, control=url), silent_s, 0) for node, silent_s, url in nodes)
    return Membership(me, "c", time.monotonic() if as_of_s is None else as_of_s, tuple(found))


# -- who writes


def test_one_node_writes_to_a_target_whoever_is_asked() -> None:
    living = [(1, 0.0, ""), (2, 0.0, ""), (3, 0.0, "")]
    made = {}
    for me in (1, 2, 3):
        made[me] = Executors(EPICS if me != 1 else Outlets(), lambda me=me: membership(me, living))
        assert made[me].of("epics:X") is None, "the others have not said yet what they may write to"
    for me, executors in made.items():
        for node in {1, 2, 3} - {me}:
            executors.told(node, EPICS if node != 1 else Outlets())
        assert executors.of("epics:X") == 2
        assert executors.of("tango:X") is None
        assert executors.me("epics:X") is (me == 2)


def test_the_next_one_takes_over_when_the_lease_is_over_and_not_before() -> None:
    now = [100.0]
    silent = [0.0]

    def seen(me: int) -> Membership:
        return membership(me, [(1, silent[0] if me == 2 else 0.0, ""), (2, 0.0, "")], as_of_s=now[0] - silent[0])

    first = Executors(EPICS, lambda: seen(1), lambda: now[0])
    second = Executors(EPICS, lambda: membership(2, seen(2).members and [(1, silent[0], ""), (2, 0.0, "")], now[0]))
    first.told(2, EPICS)
    second.told(1, EPICS)
    assert first.me("epics:X")
    assert not second.me("epics:X")
    # Node 1 loses the engine: it leaves the target before node 2 takes it.
    silent[0] = FENCE_S + 0.1
    assert not first.me("epics:X")
    assert not second.me("epics:X")
    silent[0] = LEASE_S + 0.1
    assert second.me("epics:X")
    assert not first.me("epics:X")


def test_where_nobody_else_may_the_engine_is_not_needed() -> None:
    now = [100.0]
    alone = Executors(EPICS, lambda: membership(1, [(1, 0.0, ""), (2, 0.0, "")], as_of_s=0.0), lambda: now[0])
    alone.told(2, Outlets())
    assert alone.me("epics:X")
    silent = Executors(EPICS, lambda: membership(1, [(1, 0.0, ""), (2, 0.0, "")], as_of_s=now[0]), lambda: now[0])
    assert silent.of("epics:X") is None
    now[0] += START_S
    assert silent.me("epics:X"), "a node that never says what it may write to is not waited for"


# -- ids that are good on every node


def entry(frame: int) -> Entry:
    return Entry(b"feedback", "hits", b"k", msgspec.json.encode({"frame": frame}))


def frames_after(ring: Ring, last_id: str, living: Sequence[str] = ()) -> tuple[list[int], Any]:
    cursor, gap = ring.resume(last_id, living)
    found = []
    while chunk := ring.follow(cursor, Filter(), SSE):
        found += [
            json.loads(line[6:]).get("frame") for line in chunk.decode().splitlines() if line.startswith("data: ")
        ]
    assert ring.id(cursor) == ring.id(type(cursor)(ring.next))
    return found, gap


def test_an_id_of_one_node_tells_another_what_is_missing() -> None:
    here, there = Ring(64, "1:aa"), Ring(64, "2:bb")
    # The same events in another order: 1..5 of node 1, 101..105 of node 2.
    for frame in range(1, 6):
        here.append(entry(frame))
    for frame in range(101, 106):
        here.append_of("2:bb", frame - 100, entry(frame))
        there.append(entry(frame))
    for frame in range(1, 6):
        there.append_of("1:aa", frame, entry(frame))
        assert not there.append_of("1:aa", frame, entry(frame)), "once"
    cursor, _ = here.resume("1:aa-2")
    assert frames_after(here, "1:aa-2") == ([3, 4, 5, 101, 102, 103, 104, 105], None)
    assert frames_after(there, "1:aa-2") == ([101, 102, 103, 104, 105, 3, 4, 5], None)
    assert frames_after(there, "1:aa-5~2:bb-3") == ([104, 105], None)
    assert frames_after(there, "1:aa-5~2:bb-5") == ([], None)
    assert cursor.position < here.next


def test_what_a_node_has_not_got_yet_is_not_doubled_when_it_comes() -> None:
    ring = Ring(64, "1:aa")
    ring.append_of("2:bb", 1, entry(1))
    cursor, gap = ring.resume("1:aa-0~2:bb-3")
    assert gap is None
    assert ring.follow(cursor, Filter(), SSE) == b""
    for number in (2, 3, 4):
        ring.append_of("2:bb", number, entry(number))
    chunk = ring.follow(cursor, Filter(), SSE)
    assert chunk.count(b"data: ") == 1
    assert b'"frame":4' in chunk


def test_numbers_that_never_came_are_a_gap() -> None:
    ring = Ring(64, "1:aa")
    ring.append_of("2:bb", 1, entry(1))
    ring.append_of("2:bb", 8, entry(8))
    cursor, _ = ring.resume("1:aa-0~2:bb-1")
    chunk = ring.follow(cursor, Filter(), SSE).decode()
    assert '"reason":"link","lost":6' in chunk
    assert chunk.index('"lost":6') < chunk.index('"frame":8')


async def test_a_follower_that_is_slow_loses_the_oldest_and_holds_up_nobody() -> None:
    exchange = Exchange(1, "1:aa", Outlets())
    follower = exchange.follow("", 0)
    await anext(follower)
    for first in range(0, ITEMS_KEPT + 1000, 1000):
        exchange.tell(Item("scan", first + number + 1) for number in range(1000))
    message: Any = None
    while not isinstance(message, Items):
        message = MESSAGES.decode(await anext(follower))
    assert msgspec.msgpack.decode(message.items[0])[1] == exchange.next - ITEMS_KEPT
    await follower.aclose()


# -- a target, and a link that is cut


@contextlib.asynccontextmanager
async def bridge(path: Any) -> AsyncIterator[list[float]]:
    """Takes every value."""
    written: list[float] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                order = wire.WRITE.decode(await wire.read(reader))
                written.append(order.value)
                writer.write(wire.encode(wire.Written(order.number)))
        writer.close()

    server = await asyncio.start_unix_server(serve, socket_address(path))
    try:
        yield written
    finally:
        server.close()


@pytest.mark.timeout(120)
async def test_the_node_with_the_bridge_writes_and_hears_a_silent_link(start: Any, poll: Any) -> None:
    a = await start(number=1)
    b = await start(number=2, globs=EPICS.globs, schemes=EPICS.schemes)
    a.secrets |= b.secrets  # one catalogue
    await a.catalog.create_bucket("scan", "root")
    await a.catalog.set_bucket_tags("scan", {"hiss.action.shutter": ACTION})

    def tell() -> None:
        for me, node in ((1, a), (2, b)):
            members.write(node.paths, membership(me, [(1, 0.0, a.url), (2, 0.0, b.url)]))

    tell()
    async with bridge(b.paths.bridge_socket("epics")) as written:
        for node, other in ((a, "n2"), (b, "n1")):
            await asyncio.to_thread(poll, lambda n=node, o=other: n.hub.peers.links() == {o: "connected"}, "linked")
        await asyncio.to_thread(poll, lambda: b.actions.bridges() == {"epics": "connected"}, "the bridge is there")
        worker = SocketFeedback(lambda: socket_address(a.paths.feedback_socket), Counters(None, 0))
        await worker.start()
        async with subscribed(a) as at_a, subscribed(b) as at_b:
            worker.stream_opened("scan", ["hits"])
            worker.publish([FeedbackEvent("scan", b"k", "hits", 0, 1, 5.0, time.time_ns())])
            for subscription in (at_a, at_b):
                data = json.loads((await subscription.next())["data"])
                assert data["actions"] == {"shutter": "forwarded"}
            await asyncio.to_thread(poll, lambda: written == [5.0], "the other node's bridge writes")
            async with a.client() as http:
                (action,) = (await http.get("/v1/feedback/actions?bucket=scan")).json()["actions"]
            assert (action["node"], action["counts"]["forwarded"]) == ("n2", 1)
            # The stream goes on and cannot be heard any more.
            a.stop.set()
            expired = await at_b.next()
            assert expired["event"] == "expired"
            await asyncio.to_thread(poll, lambda: written == [5.0, 0.0], "silence counts")
        await worker.close()


async def test_only_nodes_may_follow(start: Any) -> None:
    node = await start(number=1)
    async with node.client() as http:
        answer = await http.get("/v1/internal/feedback")
        assert answer.status_code == 404, "it is no page"
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://localhost:{node.port}/v1/internal/feedback", proxy=None):
            pass
    assert refused.value.response.status_code == 403
