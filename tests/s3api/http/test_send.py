"""Answers: small ones, iterated ones, stored files from the page cache and from the disk, plain and encrypted."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket

import pytest

from s3api.http.limits import HttpLimits
from s3api.http.message import FileBody, Response
from s3api.http.send import Residency, response_head

MIB = 1 << 20
FILE = b"GET /file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Piece:
    def __init__(self, fd: int, offset: int, length: int) -> None:
        self.fd, self.offset, self.length = fd, offset, length


@pytest.fixture
def stored(tmp_path):
    """A file of 9 MiB of random bytes on the disk: (descriptor, contents)."""
    contents = os.urandom(9 * MIB)
    path = tmp_path / "segment"
    path.write_bytes(contents)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    yield fd, contents
    os.close(fd)


def file_body(running, *pieces: Piece, length: int | None = None) -> None:
    async def closed() -> None:
        running.handler.closed += 1

    running.handler.file = FileBody(pieces, sum(p.length for p in pieces) if length is None else length, closed)


def split(answer: bytes) -> tuple[bytes, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


async def test_file_pieces_in_order(start, stored):
    running = await start()
    fd, contents = stored
    file_body(running, Piece(fd, 5, 3 * MIB), Piece(fd, 0, 0), Piece(fd, 7 * MIB + 1, 12345), Piece(fd, 0, 1))
    head, body = split(await running.exchange(FILE))
    assert b"Content-Length: %d" % (3 * MIB + 12346) in head
    assert body == contents[5 : 5 + 3 * MIB] + contents[7 * MIB + 1 :][:12345] + contents[:1]
    assert running.handler.closed == 1
    assert running.counters.cell("hiss_http_sent_bytes_total").value() == len(body)


@pytest.mark.parametrize("cold", [False, True])
async def test_a_file_in_or_out_of_the_page_cache(start, stored, cold):
    running = await start()
    fd, contents = stored
    file_body(running, Piece(fd, 0, len(contents)))
    if cold:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    _head, body = split(await running.exchange(FILE))
    assert hashlib.sha256(body).digest() == hashlib.sha256(contents).digest()


async def test_residency_tells_memory_from_disk(stored):
    fd, contents = stored
    os.pread(fd, len(contents), 0)
    for residency in (Residency(), Residency()):
        assert residency.resident(fd, 0, len(contents))
        assert residency.resident(fd, len(contents) - 1, 1)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if residency.resident(fd, 0, len(contents)):
            pytest.skip("this filesystem keeps its pages in memory")
        os.pread(fd, len(contents), 0)
        residency._cachestat = False  # the second way, of kernels before 6.5
        assert residency.resident(fd, 0, len(contents))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert not residency.resident(fd, 0, len(contents))
        os.pread(fd, len(contents), 0)


async def test_keep_alive_and_pipelining_around_files(start, stored):
    running = await start()
    fd, contents = stored
    file_body(running, Piece(fd, 0, 300_000))
    answer = await running.exchange(
        b"GET /file HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + FILE
    )
    assert answer.count(contents[:300_000]) == 3
    assert answer.count(b"HTTP/1.1 200 OK") == 5


async def test_a_slow_reader_gets_the_whole_file(start, stored):
    running = await start()
    fd, contents = stored
    file_body(running, Piece(fd, 0, len(contents)))
    loop = asyncio.get_running_loop()
    received = bytearray()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", running.port))
        await loop.sock_sendall(sock, FILE)
        while part := await asyncio.wait_for(loop.sock_recv(sock, 400_000), 30):
            received += part
    assert split(bytes(received))[1] == contents


async def test_a_peer_that_leaves_frees_the_file(start, stored, until):
    running = await start()
    fd, contents = stored
    file_body(running, Piece(fd, 0, len(contents)))
    reader, writer = await running.connect()
    writer.write(FILE)
    await asyncio.wait_for(reader.readexactly(100_000), 30)
    writer.transport.abort()
    await until(lambda: running.handler.closed)


async def test_a_silent_peer_in_a_file_is_dropped(start, stored, until):
    running = await start(limits=HttpLimits(send_timeout_s=0.2))
    fd, contents = stored
    file_body(running, Piece(fd, 0, len(contents)))
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", running.port))
        await loop.sock_sendall(sock, FILE)
        await until(lambda: running.handler.closed)


async def test_a_file_shorter_than_promised_breaks_the_connection(start, stored, caplog):
    """A long one when what there is has gone out, a small one before anything has."""
    running = await start()
    fd, contents = stored
    file_body(running, Piece(fd, 9 * MIB - 100_000, 200_000))
    _head, body = split(await running.exchange(FILE))
    assert body == contents[-100_000:]
    assert "could not be sent" in caplog.text
    caplog.clear()
    file_body(running, Piece(fd, 9 * MIB - 100, 200))
    assert await running.exchange(FILE) == b""
    assert "could not be sent" in caplog.text
    assert running.handler.closed == 2


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("cold", [False, True])
async def test_a_small_file_of_several_pieces(start, stored, server_tls, client_tls, cold, secure):
    running = await start(tls=server_tls if secure else None)
    fd, contents = stored
    file_body(running, Piece(fd, 3, 5000), Piece(fd, 8 * MIB, 0), Piece(fd, 5 * MIB + 1, 40_000))
    if cold:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=client_tls if secure else None)
    writer.write(FILE)
    head, body = split(await asyncio.wait_for(reader.read(), 30))
    assert b"Content-Length: 45000\r\n" in head + b"\r\n"
    assert body == contents[3:5003] + contents[5 * MIB + 1 :][:40_000]
    assert running.handler.closed == 1
    writer.close()


@pytest.mark.parametrize("cold", [False, True])
async def test_files_over_tls(start, stored, server_tls, client_tls, cold):
    running = await start(tls=server_tls)
    fd, contents = stored
    file_body(running, Piece(fd, 1, 2 * MIB), Piece(fd, 8 * MIB, 5000))
    if cold:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=client_tls)
    writer.write(FILE)
    _head, body = split(await asyncio.wait_for(reader.read(), 30))
    assert body == contents[1 : 1 + 2 * MIB] + contents[8 * MIB :][:5000]
    assert running.handler.closed == 1
    writer.close()


async def test_head_announces_a_length_and_sends_no_body(start, stored):
    running = await start()
    fd, _contents = stored
    file_body(running, Piece(fd, 0, 777))
    for path, length in ((b"/head", b"12345"), (b"/file", b"777"), (b"/", b"64")):
        answer = await running.exchange(b"HEAD %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path)
        head, body = split(answer)
        assert b"Content-Length: " + length in head
        assert body == b""
    assert running.handler.closed == 1


async def test_204_has_neither_body_nor_length(start):
    running = await start()
    answer = await running.exchange(b"GET /empty HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 204 No Content\r\n")
    assert b"Content-Length" not in answer


async def test_iterated_bodies(start):
    running = await start()
    end = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, body = split(await running.exchange(b"GET /stream" + end))
    assert b"Transfer-Encoding: chunked" in head
    assert body == b"7\r\n000000,\r\n7\r\n000001,\r\n7\r\n000002,\r\n0\r\n\r\n"
    head, body = split(await running.exchange(b"GET /stream?length=21" + end))
    assert b"Content-Length: 21" in head
    assert body == b"000000,000001,000002,"
    head, body = split(await running.exchange(b"GET /stream HTTP/1.0\r\n\r\n"))
    assert b"chunked" not in head
    assert body == b"000000,000001,000002,"


@pytest.mark.parametrize("path", [b"/stream?fail", b"/stream?length=22", b"/stream?length=20"])
async def test_an_iterated_body_that_fails_is_seen_to_be_broken(start, caplog, path):
    running = await start()
    _head, body = split(await running.exchange(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path))
    assert not body.endswith(b"0\r\n\r\n")
    assert len(body) in (0, 14, 21, 36)
    assert "could not be sent" in caplog.text


async def test_a_long_iterated_body_waits_for_its_reader(start):
    running = await start()
    reader, writer = await running.connect()
    writer.write(b"GET /stream?n=3000&times=2000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    await asyncio.sleep(0.1)
    assert running.counters.cell("hiss_http_sent_bytes_total").value() < 20 * MIB
    answer = await asyncio.wait_for(reader.read(), 30)
    assert len(re.findall(b"002999,", answer)) == 2000
    writer.close()


def test_a_field_cannot_break_the_head():
    for value in ("a\r\nX: y", "a\nX", "a\rX"):
        with pytest.raises(ValueError, match="line break"):
            response_head(Response(200, [("X-Amz-Meta-A", value)]), length=0, chunked=False, close=False)
