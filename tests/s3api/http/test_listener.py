"""The listener: TLS and plain HTTP on its port, limits, sharing with other workers, shutting down."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import ssl

import pytest

from s3api.http.limits import HttpLimits
from s3api.http.listener import Server
from s3api.http.message import Response

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


# -- TLS


async def test_requests_over_tls(start, server_tls, client_tls, until):
    running = await start(tls=server_tls)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=client_tls)
    body = bytes(range(256)) * 8000
    for last in (b"", b"", b"Connection: close\r\n"):
        writer.write(b"PUT /sink?size=3000000&dry=600000 HTTP/1.1\r\nHost: x\r\n" + last)
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        assert b" 200 " in head
        assert await reader.readexactly(64) == hashlib.sha256(body).hexdigest().encode()
    assert await asyncio.wait_for(reader.read(), 30) == b""
    assert all(request.secure for request in running.handler.requests)
    assert running.handler.sinks[0].starved
    writer.close()


async def test_chunked_bodies_over_tls(start, server_tls, client_tls):
    running = await start(tls=server_tls)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=client_tls)
    body = bytes(range(256)) * 3000
    writer.write(
        b"PUT /sink?size=3000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for at in range(0, len(body), 50_000):
        writer.write(b"%x\r\n%b\r\n" % (len(body[at : at + 50_000]), body[at : at + 50_000]))
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), 30)).endswith(hashlib.sha256(body).hexdigest().encode())
    writer.close()


async def test_a_refused_body_over_tls_still_sees_its_answer(start, server_tls, client_tls):
    running = await start(tls=server_tls, limits=HttpLimits(linger_timeout_s=0.5))

    def blocking() -> bytes:
        with (
            socket.create_connection(("127.0.0.1", running.port), timeout=60) as raw,
            client_tls.wrap_socket(raw, server_hostname="localhost") as sock,
        ):
            sock.sendall(b"PUT /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
            for _ in range(30):
                sock.sendall(bytes(100_000))
            return sock.recv(65536)

    assert statuses(await asyncio.to_thread(blocking)) == [503]


@pytest.mark.parametrize(
    "raw", [GET, b"x", b"PUT /b/k HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n" + bytes(500_000)]
)
async def test_plain_http_on_a_tls_port_is_told_so(start, server_tls, raw):
    running = await start(tls=server_tls)
    answer = await running.exchange(raw)
    assert statuses(answer) == [400]
    assert b"https://" in answer


async def test_tls_on_a_plain_port_is_refused_at_once(start, client_tls):
    running = await start()
    with pytest.raises(ssl.SSLError):
        await asyncio.wait_for(asyncio.open_connection("127.0.0.1", running.port, ssl=client_tls), 30)


async def test_a_silent_peer_on_a_tls_port_is_dropped(start, server_tls):
    running = await start(tls=server_tls, limits=HttpLimits(head_timeout_s=0.1, tls_handshake_timeout_s=0.1))
    assert await running.exchange(b"") == b""
    assert await running.exchange(b"\x16\x03\x01") == b""


# -- how many


async def test_no_more_connections_than_the_limit(start):
    running = await start(limits=HttpLimits(connections=2))
    first = [await running.connect() for _ in range(2)]
    for reader, writer in first:
        writer.write(GET)
        await asyncio.wait_for(reader.readexactly(64), 30)
    reader, writer = await running.connect()
    writer.write(GET)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(64), 0.1)
    first[0][1].close()
    assert await asyncio.wait_for(reader.readexactly(64), 30)
    writer.close()
    first[1][1].close()


async def test_a_worker_above_its_share_lets_an_idle_one_accept(until):
    """Two servers on one listening socket, as two workers: the one with a body in hand yields."""
    bodies: dict[str, int] = {"busy": 0, "idle": 0}
    answered: dict[str, int] = {"busy": 0, "idle": 0}
    release = asyncio.Event()

    class Sink:
        def get_buffer(self) -> memoryview:
            return memoryview(bytearray(1000))

        def received(self, count: int) -> None:
            pass

        async def writable(self) -> None:
            pass

    def handler(name):
        async def handle(request) -> Response:
            if request.method == "PUT":
                bodies[name] += 1
                await request.body.into(Sink())
            else:
                answered[name] += 1
            return Response(200, [], name.encode())

        return handle

    with socket.create_server(("127.0.0.1", 0)) as listener:
        busy = Server([listener], handler("busy"), HttpLimits(accept_share=1, accept_yield_s=0.3))
        busy.start()
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
        await until(lambda: busy.active_bodies)
        duplicate = listener.dup()
        idle = Server([duplicate], handler("idle"), HttpLimits(accept_share=1))
        idle.start()
        for _ in range(5):
            other, other_writer = await asyncio.open_connection(*listener.getsockname())
            other_writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await asyncio.wait_for(other.read(), 30)
            other_writer.close()
        assert answered == {"busy": 0, "idle": 5}
        await idle.close(1)
        duplicate.close()
        # Nobody else is there: it accepts, although above its share.
        other, other_writer = await asyncio.open_connection(*listener.getsockname())
        other_writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await asyncio.wait_for(other.read(), 30)).endswith(b"busy")
        other_writer.close()
        writer.write(b"67890")
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 30)
        writer.close()
        await busy.close(1)
    assert bodies == {"busy": 1, "idle": 0}
    release.set()


# -- shutting down


async def test_shutdown_closes_idle_and_finishes_busy_connections(start):
    running = await start()
    idle, idle_writer = await running.connect()
    idle_writer.write(GET)
    await asyncio.wait_for(idle.readexactly(64), 30)
    busy, busy_writer = await running.connect()
    busy_writer.write(WAIT)
    await asyncio.sleep(0.02)
    await running.handler.entered.wait()
    closing = asyncio.create_task(running.server.close(5))
    await asyncio.wait_for(idle.read(), 30)
    assert not closing.done()
    running.handler.gate.set()
    answer = await asyncio.wait_for(busy.read(), 30)
    assert b"Connection: close" in answer
    assert answer.endswith(b"waited")
    await asyncio.wait_for(closing, 30)
    idle_writer.close()
    busy_writer.close()


async def test_shutdown_lets_a_body_finish(start):
    running = await start()
    reader, writer = await running.connect()
    writer.write(b"PUT /sink HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
    await running.handler.entered.wait()
    closing = asyncio.create_task(running.server.close(5))
    await asyncio.sleep(0.05)
    writer.write(b"67890")
    answer = await asyncio.wait_for(reader.read(), 30)
    assert answer.endswith(hashlib.sha256(b"1234567890").hexdigest().encode())
    assert b"Connection: close" in answer
    await asyncio.wait_for(closing, 30)
    writer.close()


async def test_after_the_grace_what_is_left_is_aborted(start, until):
    running = await start()
    reader, writer = await running.connect()
    writer.write(b"PUT /sink HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
    stuck, stuck_writer = await running.connect()
    stuck_writer.write(WAIT)
    await until(lambda: len(running.handler.requests) == 2)
    await asyncio.wait_for(running.server.close(0.05), 30)
    assert isinstance(running.handler.errors[0], ConnectionResetError)
    for peer in (reader, stuck):
        try:
            assert await asyncio.wait_for(peer.read(), 30) == b""
        except ConnectionResetError:
            pass
    writer.close()
    stuck_writer.close()


async def test_shutdown_leaves_the_listening_socket_to_its_owner():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def handle(request) -> Response:
            return Response(200, [], b"again")

        for _ in range(2):
            server = Server([listener], handle, HttpLimits())
            server.start()
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), 30)).endswith(b"again")
            writer.close()
            await server.close(1)
