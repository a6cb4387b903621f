"""One connection: keep-alive, pipelining, 100-continue, unread bodies, errors, aborts, half-close."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import socket
import struct

import pytest

from s3api.http.limits import HttpLimits

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
NOTHING = hashlib.sha256(b"").hexdigest().encode()


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def put(body: bytes, path: bytes = b"/sink", *fields: bytes) -> bytes:
    lines = [b"PUT " + path + b" HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    length = re.search(rb"Content-Length: (\d+)", head)
    body = await asyncio.wait_for(reader.readexactly(int(length[1])), 30) if length else b""
    return int(head[9:12]), head, body


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, as a machine that lost its process does."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# -- requests, one after the other


async def test_answers_and_keeps_the_connection(start):
    running = await start()
    reader, writer = await running.connect()
    ids = set()
    for _ in range(3):
        writer.write(GET)
        status, head, body = await read_answer(reader)
        assert (status, body) == (200, NOTHING)
        assert re.match(
            rb"HTTP/1.1 200 OK\r\nDate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\nServer: hiss\r\n", head
        )
        assert b"Connection:" not in head
        ids.add(re.search(rb"x-request-id: ([0-9A-F]{16})\r\n", head)[1])
    assert len(ids) == 3
    writer.close()


async def test_connection_close_and_http_1_0_close(start):
    running = await start()
    for raw in (LAST, b"GET / HTTP/1.0\r\n\r\n"):
        answer = await running.exchange(raw)
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.endswith(NOTHING)


async def test_receives_a_large_body_in_place(start):
    running = await start()
    body = bytes(range(256)) * 20_000
    reader, writer = await running.connect()
    for path in (b"/sink?size=5120000", b"/sink?size=5120000&span=65536", b"/sink?size=5120000&span=65536&dry=500000"):
        writer.write(put(body, path))
        assert (await read_answer(reader))[2] == digest(body)
    assert running.handler.sinks[-1].starved >= 8
    writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_sink_that_fills_up_in_the_middle_refuses_with_an_answer(start, chunked):
    # The sink's error comes up inside the transport's own callback: it must reach the client, not break the connection.
    running = await start()
    reader, writer = await running.connect()
    body = bytes(3_000_000)
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 3000000"
    head = b"PUT /sink?size=4000000&span=65536&full=500000 HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n"
    writer.write(head + (b"2dc6c0\r\n" + body + b"\r\n0\r\n\r\n" if chunked else body))
    assert (await read_answer(reader))[0] == 503
    assert running.handler.sinks[0].count >= 500_000
    writer.close()


async def test_pipelined_requests_are_answered_in_order(start):
    running = await start()
    raw = b"".join(put(b"body %d" % i, b"/sink", b"X-N: %d" % i) + GET for i in range(50)) + LAST
    answer = await running.exchange(raw)
    assert statuses(answer) == [200] * 101
    wanted = [h for i in range(50) for h in (digest(b"body %d" % i), NOTHING)] + [NOTHING]
    assert re.findall(rb"[0-9a-f]{64}", answer) == wanted


async def test_the_next_request_waits_for_the_answer_of_the_one_before(start):
    running = await start()
    reader, writer = await running.connect()
    writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + GET * 3)
    await running.handler.entered.wait()
    await asyncio.sleep(0.02)
    assert len(running.handler.requests) == 1
    running.handler.gate.set()
    assert [(await read_answer(reader))[2] for _ in range(4)] == [b"waited"] + [NOTHING] * 3
    writer.close()


async def test_more_pipelined_bytes_than_the_inbox_holds_are_left_in_the_socket(start):
    running = await start(limits=HttpLimits(inbox_bytes=1024))
    reader, writer = await running.connect()
    body = bytes(100_000)
    writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + put(body) + LAST)
    await running.handler.entered.wait()
    running.handler.gate.set()
    answer = await asyncio.wait_for(reader.read(), 30)
    assert statuses(answer) == [200, 200, 200]
    assert digest(body) in answer
    writer.close()


@pytest.mark.parametrize(
    "raw",
    [
        put(b"hello world", b"/sink", b"Connection: close"),
        b"PUT /sink HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5;a=b\r\nhello\r\n6\r\n world\r\n0\r\nX-T: v\r\n\r\n",
        b"\r\n\r\n" + put(b"hello world", b"/sink", b"Connection: close"),
    ],
)
async def test_any_split_of_a_request_gives_the_same_answer(start, raw):
    running = await start()

    async def split_at(*cuts: int) -> bytes:
        reader, writer = await running.connect()
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for a, b in zip((0, *cuts), (*cuts, len(raw)), strict=True):
            writer.write(raw[a:b])
            await asyncio.sleep(0.001)
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return answer

    answers = await asyncio.gather(*(split_at(at) for at in range(1, len(raw))), split_at(*range(1, len(raw))))
    assert all(statuses(answer) == [200] and answer.endswith(digest(b"hello world")) for answer in answers)


async def test_a_head_up_to_the_limit_is_read_and_one_over_it_is_431(start):
    running = await start(limits=HttpLimits(inbox_bytes=256, head_bytes=8192))
    for size, expected in ((7000, 200), (9000, 431)):
        raw = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: " + b"x" * size + b"\r\n\r\n"
        answer = await running.exchange(raw)
        assert statuses(answer) == [expected]
        assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET, 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + GET, 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 30\r\n\r\nabc" + GET, 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + GET, 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + GET, 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nA: b\r\n Content-Length: 30\r\n\r\n" + GET, 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n" + GET, 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello0\r\n\r\n" + GET, 400),
        *(
            (b"PUT / HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\n0\r\n\r\n" + GET, status)
            for fields, status in (
                (b"Content-Length : 5", 400),
                (b"Content-Length: +5", 400),
                (b"Content-Length: -5", 400),
                (b"Content-Length: 5, 5", 400),
                (b"Content-Length: 0x5", 400),
                (b"Content-Length: 5\r\nContent-Length: 5", 400),
                (b"Content-Length: 99999999999999999999", 400),
                (b"Content-Length:", 400),
                (b"Content-Length: 5\nX: y", 400),
                (b"Content-Length: 5\rX: y", 400),
                (b"Content-Length: 5\x00", 400),
                (b"Transfer-Encoding : chunked", 400),
                (b" Transfer-Encoding: chunked", 400),
                (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", 400),
                (b"Transfer-Encoding: identity", 400),
                (b"Transfer-Encoding: xchunked", 400),
                (b"Transfer-Encoding: chunked;q=1", 400),
                (b'Transfer-Encoding: "chunked"', 400),
                (b"Transfer-Encoding:\r\n chunked", 400),
                (b"Transfer-Encoding: gzip, chunked", 501),
            )
        ),
        *(
            (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + GET, 400)
            for chunks in (
                b"0x0\r\n\r\n",
                b"-0\r\n\r\n",
                b" 0\r\n\r\n",
                b"0 0\r\n\r\n",
                b"0;" + b"a" * 20_000 + b"\r\n\r\n",
                b'0;a="\n"\r\n\r\n',
                b"0;a\r\r\n\r\n",
                b"10000000000000000\r\n\r\n",
                b"0\r\n" + b"a: b\r\n" * 21 + b"\r\n",
                b"0\r\na : b\r\n\r\n",
                b"0\r\n folded\r\n\r\n",
                b"0\r\n\n",
            )
        ),
    ],
)
async def test_smuggling_gets_one_refusal_and_a_closed_connection(start, raw, status):
    running = await start()
    answer = await running.exchange(raw)
    assert statuses(answer) == [status]
    assert b"\r\nConnection: close\r\n" in answer


# -- 100-continue


async def test_100_continue_is_sent_by_the_first_read(start, until):
    running = await start()
    reader, writer = await running.connect()
    for _ in range(2):
        writer.write(b"PUT /sink HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello")
        assert (await read_answer(reader))[2] == digest(b"hello")
    writer.close()


async def test_no_100_when_the_body_is_already_there(start):
    running = await start()
    answer = await running.exchange(put(b"hello", b"/sink", b"Expect: 100-continue", b"Connection: close"))
    assert statuses(answer) == [200]


async def test_a_refusal_before_the_body_sends_no_100_and_closes(start):
    running = await start()
    reader, writer = await running.connect()
    writer.write(b"PUT /refuse HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    status, head, _ = await read_answer(reader)
    assert status == 503
    assert b"\r\nConnection: close\r\n" in head
    writer.write(b"hello" + GET)
    assert await asyncio.wait_for(reader.read(), 30) == b""
    assert len(running.handler.requests) == 1
    writer.close()


async def test_an_empty_body_with_expect_keeps_the_connection(start):
    running = await start()
    answer = await running.exchange(
        b"PUT /refuse HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n" + LAST
    )
    assert statuses(answer) == [503, 200]


# -- bodies the handler does not read


async def test_a_short_unread_body_is_dropped_and_the_connection_kept(start):
    running = await start()
    reader, writer = await running.connect()
    for _ in range(2):
        writer.write(put(bytes(200_000), b"/refuse"))
        status, head, _ = await read_answer(reader)
        assert status == 503
        assert b"Connection: close" not in head
    writer.write(LAST)
    assert (await read_answer(reader))[0] == 200
    writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_long_unread_body_costs_the_connection_but_the_answer_arrives(start, chunked):
    """The client sends everything before it looks: without lingering it would see a reset instead."""
    running = await start()
    coding = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 8000000"
    prefix = b"7a1200\r\n" if chunked else b""

    def blocking() -> bytes:
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as sock:
            sock.sendall(b"PUT /refuse HTTP/1.1\r\nHost: x\r\n" + coding + b"\r\n\r\n" + prefix)
            for _ in range(8):
                sock.sendall(bytes(1_000_000))
            answer = b""
            while part := sock.recv(65536):
                answer += part
            return answer

    answer = await asyncio.to_thread(blocking)
    assert statuses(answer) == [503]
    assert answer.endswith(b"slow down")
    assert b"\r\nConnection: close\r\n" in answer


async def test_a_narrow_window_keeps_a_body_at_its_sender(start):
    running = await start()
    body = os.urandom(16 << 20)
    loop = asyncio.get_running_loop()

    async def sent_unread(sock: socket.socket, window: int) -> int:
        """Bytes that the system takes from the sender while the handler reads none; then all of it arrives."""
        running.handler.gate.clear()
        head = b"PUT /narrow?size=%d&window=%d HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        await loop.sock_sendall(sock, head % (len(body), window, len(body)))
        await asyncio.sleep(0.1)
        sent = still = 0
        while still < 20 and sent < len(body):
            try:
                sent += sock.send(memoryview(body)[sent:])
                still = 0
            except BlockingIOError:
                still += 1
                await asyncio.sleep(0.01)
        running.handler.gate.set()
        await loop.sock_sendall(sock, memoryview(body)[sent:])
        assert b" 200 " in await loop.sock_recv(sock, 65536)
        assert running.handler.bodies[-1] == body
        return sent

    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", running.port))
        # The kernel gives a fast sender a larger buffer with each body.
        wide = max([await sent_unread(sock, 0) for _ in range(4)])
        narrow = await sent_unread(sock, 64 << 10)
        again = await sent_unread(sock, 0)
    assert narrow < 700_000
    assert wide > 2 * narrow
    assert again > narrow


async def test_lingering_ends_at_its_limit_of_bytes(start):
    running = await start(limits=HttpLimits(linger_bytes=100_000))
    _reader, writer = await running.connect()
    writer.write(b"PUT /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 80000000\r\n\r\n")

    async def send_for_ever() -> None:
        while True:
            writer.write(bytes(100_000))
            await writer.drain()

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send_for_ever(), 30)
    writer.close()


# -- errors


async def test_a_failing_handler_is_500_without_its_reason(start, caplog):
    running = await start()
    with caplog.at_level(logging.ERROR):
        answer = await running.exchange(b"GET /boom HTTP/1.1\r\nHost: x\r\n\r\n")
    assert statuses(answer) == [500]
    assert b"secret" not in answer
    assert b"InternalError" in answer
    record = next(record for record in caplog.records if record.exc_info)
    assert running.handler.requests[0].request_id in record.getMessage()


async def test_a_control_document_over_its_limit_is_413(start):
    running = await start()
    for raw in (
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n100001\r\n"
        + bytes(0x100001)
        + b"\r\n0\r\n\r\n",
    ):
        answer = await running.exchange(raw)
        assert statuses(answer) == [413]
        assert b"EntityTooLarge" in answer


async def test_a_control_document_of_exactly_its_limit_is_read(start):
    running = await start()
    body = bytes(1 << 20)
    chunks = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n100000\r\n" + body + b"\r\n0\r\n\r\n"
    answers = [
        await running.exchange(put(body, b"/", b"Connection: close")),
        await running.exchange(b"PUT / HTTP/1.1\r\nHost: x\r\n" + chunks),
    ]
    assert all(answer.endswith(digest(body)) for answer in answers)


# -- peers that leave


async def test_eof_in_the_body_is_incomplete_body(start):
    running = await start()
    answer = await running.exchange(
        b"PUT /sink HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n" + bytes(499), eof=True
    )
    assert statuses(answer) == [400]
    assert b"IncompleteBody" in answer
    assert running.handler.sinks[0].count == 499


async def test_a_reset_in_the_body_reaches_the_handler(start, until):
    running = await start()
    _reader, writer = await running.connect()
    writer.write(b"PUT /sink HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n" + bytes(100))
    await until(lambda: running.handler.sinks and running.handler.sinks[0].count == 100)
    reset(writer)
    await until(lambda: running.handler.errors)
    assert isinstance(running.handler.errors[0], ConnectionResetError)
    await until(lambda: running.observed)
    assert running.observed[0][1] == 0


async def test_a_half_closed_peer_still_gets_its_answers(start):
    running = await start()
    answer = await running.exchange(put(b"hello") + GET + GET, eof=True)
    assert statuses(answer) == [200] * 3
    assert digest(b"hello") in answer


async def test_eof_while_idle_or_within_a_head_closes_quietly(start):
    running = await start()
    assert await running.exchange(b"", eof=True) == b""
    assert await running.exchange(b"GET / HT", eof=True) == b""


async def test_a_handler_finishes_although_its_peer_left(start, until):
    running = await start()
    _reader, writer = await running.connect()
    writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
    await running.handler.entered.wait()
    reset(writer)
    await until(lambda: running.counters.cell("hiss_http_connections").value() == 0)
    running.handler.gate.set()
    await until(lambda: running.observed)


# -- aws-chunked on the wire


async def test_aws_chunked_inside_http_chunks(start):
    running = await start()
    body = bytes(range(256)) * 1200
    encoded = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (body[i : i + 70_000] for i in range(0, len(body), 70_000))
    )
    encoded += b"0\r\nx-amz-checksum-crc32:AAAA==\r\n\r\n"
    wire = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (encoded[i : i + 9000] for i in range(0, len(encoded), 9000))
    )
    head = b"PUT /aws?size=400000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    answer = await running.exchange(
        head + b"x-amz-decoded-content-length: %d\r\n\r\n" % len(body) + wire + b"0\r\n\r\n"
    )
    assert answer.endswith(digest(body))
    assert b"x-trailers: x-amz-checksum-crc32=AAAA==\r\n" in answer


async def test_aws_chunked_with_one_long_chunk_is_received_in_place(start):
    running = await start()
    body = bytes(range(256)) * 20_000
    encoded = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = b"PUT /aws?size=6000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += b"Content-Length: %d\r\nx-amz-decoded-content-length: %d\r\n\r\n" % (len(encoded), len(body))
    assert (await running.exchange(head + encoded)).endswith(digest(body))


async def test_very_many_tiny_chunks_do_not_hold_up_another_peer(start):
    running = await start()
    reader, writer = await running.connect()
    count = 60_000
    writer.write(b"PUT /sink HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(b"1\r\na\r\n" * count + b"0\r\n\r\n")
    other, other_writer = await running.connect()
    waits = []
    loop = asyncio.get_running_loop()
    for _ in range(20):
        before = loop.time()
        other_writer.write(GET)
        await read_answer(other)
        waits.append(loop.time() - before)
    assert (await read_answer(reader))[2] == digest(b"a" * count)
    assert max(waits) < 0.25
    writer.close()
    other_writer.close()


async def test_counts_and_observes(start, until):
    running = await start()
    await running.exchange(GET + LAST)
    assert running.counters.cell("hiss_http_sent_bytes_total").value() == 128
    await until(lambda: len(running.observed) == 2)
    request, status, sent, elapsed_ns = running.observed[1]
    assert (request.path, status, sent) == ("/last", 200, 64)
    assert 0 < elapsed_ns < 5_000_000_000
    assert request.peer.startswith("127.0.0.1:")
    assert request.scope["received_ns"] > 0
