"""Peers that are slow or silent are let go in time; those we make wait are not."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import socket

import pytest

from s3api.http.limits import HttpLimits
from s3api.http.pace import Pace

SHORT = HttpLimits(
    head_timeout_s=0.12, idle_timeout_s=0.2, body_timeout_s=0.12, send_timeout_s=0.3, linger_timeout_s=0.2,
    body_rate_bytes_per_s=1,
)  # fmt: skip
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


async def test_a_head_that_trickles_in_is_408(start):
    running = await start(limits=SHORT)
    reader, writer = await running.connect()
    loop = asyncio.get_running_loop()
    before = loop.time()

    async def trickle() -> None:
        for octet in b"GET / HTTP/1.1\r\nX: " + b"x" * 1000:
            writer.write(bytes([octet]))
            await asyncio.sleep(0.01)

    trickling = asyncio.create_task(trickle())
    answer = await asyncio.wait_for(reader.read(), 30)
    trickling.cancel()
    assert statuses(answer) == [408]
    assert b"RequestTimeout" in answer
    assert 0.1 < loop.time() - before < 1.5
    writer.close()


async def test_an_idle_connection_is_closed_without_a_word(start):
    running = await start(limits=SHORT)
    assert await running.exchange(b"") == b""
    assert statuses(await running.exchange(GET)) == [200]


async def test_a_silent_body_is_408(start):
    running = await start(limits=SHORT)
    answer = await running.exchange(b"PUT /sink HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\nabc")
    assert statuses(answer) == [408]
    assert running.handler.sinks[0].value() == b"abc"


async def test_a_slow_body_that_moves_is_not_timed_out(start):
    running = await start(limits=SHORT)
    reader, writer = await running.connect()
    writer.write(b"PUT /sink HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 20\r\n\r\n")
    for _ in range(20):
        await asyncio.sleep(0.03)
        writer.write(b"x")
    assert statuses(await asyncio.wait_for(reader.read(), 30)) == [200]
    writer.close()


@pytest.mark.parametrize("length", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
async def test_a_body_that_trickles_is_408(start, length):
    """It is never silent for long, but it would hold the space of its declared length for hours."""
    running = await start(limits=dataclasses.replace(SHORT, body_rate_bytes_per_s=10_000))
    reader, writer = await running.connect()
    writer.write(b"PUT /sink HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n")

    async def trickle() -> None:
        while True:
            writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    answer = await asyncio.wait_for(reader.read(), 30)
    trickling.cancel()
    assert statuses(answer) == [408]
    assert b"10000 bytes a second or faster" in answer
    writer.close()


def test_the_pace_of_a_body():
    limits = HttpLimits(body_timeout_s=60, body_rate_bytes_per_s=500, body_duration_s=1000)
    pace = Pace(limits, None)
    assert not pace.too_slow(0, 0, excused=False)
    assert not pace.too_slow(59, 0, excused=False)
    assert not pace.too_slow(60, 30_000, excused=False)
    assert pace.too_slow(120, 59_999, excused=False)

    # Longer ones must come faster: all of it within the time that their space may be kept.
    pace = Pace(limits, 10_000_000)
    assert not pace.too_slow(0, 0, excused=False)
    assert pace.too_slow(60, 599_999, excused=False)

    # Time in which we had no memory does not count.
    pace = Pace(limits, None)
    assert not pace.too_slow(0, 0, excused=False)
    assert not pace.too_slow(59, 0, excused=True)
    assert not pace.too_slow(100, 0, excused=False)
    assert pace.too_slow(119, 0, excused=False)


async def test_our_own_back_pressure_is_not_held_against_the_peer(start, until):
    running = await start(limits=SHORT)
    reader, writer = await running.connect()
    sinks = running.handler.sinks
    writer.write(
        b"PUT /sink HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 200000\r\n\r\n" + bytes(100_000)
    )
    await until(lambda: sinks and sinks[0].count == 100_000)
    sinks[0].dry.clear()
    writer.write(bytes(100_000))
    await asyncio.sleep(0.4)
    assert not running.handler.errors
    sinks[0].dry.set()
    assert statuses(await asyncio.wait_for(reader.read(), 30)) == [200]
    writer.close()


async def test_a_slow_handler_has_all_the_time(start):
    running = await start(limits=SHORT)
    reader, writer = await running.connect()
    writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    await asyncio.sleep(0.5)
    running.handler.gate.set()
    assert (await asyncio.wait_for(reader.read(), 30)).endswith(b"waited")
    writer.close()


async def test_a_peer_that_takes_nothing_of_its_answer_is_dropped(start, until):
    running = await start(limits=SHORT)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", running.port))
        await loop.sock_sendall(sock, b"GET /stream?n=2000&times=10000 HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: running.observed)
    assert running.counters.cell("hiss_http_connections").value() == 0


async def test_lingering_ends_in_time(start, until):
    running = await start(limits=SHORT)
    reader, writer = await running.connect()
    writer.write(b"PUT /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n")
    assert statuses(await asyncio.wait_for(reader.read(), 30)) == [503]
    await until(lambda: not running.counters.cell("hiss_http_connections").value())
    writer.close()


async def test_a_lingering_peer_that_keeps_sending_is_dropped_in_time(start):
    running = await start(limits=SHORT)
    _reader, writer = await running.connect()
    writer.write(b"PUT /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n")
    async with asyncio.timeout(30):
        while not running.observed or running.counters.cell("hiss_http_connections").value():
            writer.write(b"x")
            await asyncio.sleep(0.01)
    writer.close()
