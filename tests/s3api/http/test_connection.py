"""One connection: keep-alive, pipelining, 100-continue, unread bodies, aborts, half-close."""

from __future__ import annotations

import hashlib

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


async def test_answers_a_get_and_keeps_the_connection(start):
    running = await start()
    reader, writer = await running.connect()
    for _ in range(3):
        writer.write(GET)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nDate: ")
        assert await reader.readexactly(64) == digest(b"")
    writer.close()


async def test_receives_a_body_into_the_sink(start):
    running = await start()
    body = bytes(range(256)) * 2000
    answer = await running.exchange(
        b"PUT /sink?size=1000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        + body
    )
    assert answer.endswith(digest(body))
