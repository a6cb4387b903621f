"""Requests between nodes: whose are believed, and what a node that is silent, slow or gone costs those who ask it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ingest.cluster.peer import Fetched, MirrorOf, MirrorStream, PeerClient, PeerLimits, decode_extents, encode_extents
from ingest.cluster.signing import WINDOW_S, BadPeerSignature, PeerKey, Sender, is_signed
from ingest.errors import BufferFull, NodeAway
from ingest.records import Extent

KEY = PeerKey.derived(b"a node key")
ME = Sender(1, 7)
OBJECT_ID = bytes(range(16))
LIMITS = PeerLimits(connect_s=1.0, answer_s=0.3, durable_s=0.3, stall_s=0.3)
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Address:
    s3: str
    node: int = 2
    name: str = "b"


# -- signatures


def test_a_signature_names_its_sender() -> None:
    fields = [("range", "bytes=0-9"), ("x-hiss-extents", "0;1.2.3.4.5")]
    name, value = KEY.sign(ME, "GET", "/-/object/00", fields, 1000)
    assert name == "authorization"
    assert is_signed(value)
    # Fields that a proxy may add, and the order of all of them, do not matter.
    arrived = [("via", "1.1 somebody"), *reversed(fields), ("host", "b:9000")]
    assert KEY.verify(value, "GET", "/-/object/00", arrived, 1000 + WINDOW_S) == ME


@pytest.mark.parametrize(
    ("method", "target", "fields", "now_s", "key"),
    [
        ("PUT", "/-/object/00", [("range", "bytes=0-9")], 1000, KEY),
        ("GET", "/-/object/01", [("range", "bytes=0-9")], 1000, KEY),
        ("GET", "/-/object/00?a=b", [("range", "bytes=0-9")], 1000, KEY),
        ("GET", "/-/object/00", [("range", "bytes=0-99")], 1000, KEY),
        ("GET", "/-/object/00", [], 1000, KEY),
        ("GET", "/-/object/00", [("range", "bytes=0-9"), ("content-length", "5")], 1000, KEY),
        ("GET", "/-/object/00", [("range", "bytes=0-9"), ("x-hiss-settle", "1")], 1000, KEY),
        ("GET", "/-/object/00", [("range", "bytes=0-9")], 1001 + WINDOW_S, KEY),
        ("GET", "/-/object/00", [("range", "bytes=0-9")], 999 - WINDOW_S, KEY),
        ("GET", "/-/object/00", [("range", "bytes=0-9")], 1000, PeerKey.derived(b"another node key")),
    ],
)
def test_a_signature_is_for_one_request(
    method: str, target: str, fields: list[tuple[str, str]], now_s: int, key: PeerKey
) -> None:
    _, value = KEY.sign(ME, "GET", "/-/object/00", [("range", "bytes=0-9")], 1000)
    with pytest.raises(BadPeerSignature):
        key.verify(value, method, target, fields, now_s)


@pytest.mark.parametrize("change", [("node=1", "node=2"), ("epoch=7", "epoch=8"), ("time=1000", "time=1001")])
def test_nobody_speaks_for_another_node_or_time(change: tuple[str, str]) -> None:
    _, value = KEY.sign(ME, "GET", "/", [], 1000)
    with pytest.raises(BadPeerSignature):
        KEY.verify(value.replace(*change), "GET", "/", [], 1000)


def test_the_key_is_derived() -> None:
    assert KEY.secret != b"a node key"
    assert len(KEY.secret) == 32
    assert PeerKey.derived(b"a node key") == KEY


def test_extents_travel() -> None:
    extents = (Extent(2, 0, 5, 3, 8192, 77), Extent(2, 1, 6, 1, 4096, 10))
    assert decode_extents(encode_extents(123, extents), 2) == (123, extents)
    for bad in ("", "1", "x;1.2.3.4.5", "1;1.2.3.4", "1;1.2.3.4.-5", "1;" + ",".join(["1.1.1.1.1"] * 257)):
        with pytest.raises(ValueError):
            decode_extents(bad, 2)


# -- a node that does not do what it should


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def node(script: Script) -> AsyncIterator[Address]:
    """Somebody on a socket who follows ``script`` on each connection."""

    playing = set()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        playing.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await script(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(play, "127.0.0.1", 0)
    try:
        yield Address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()
        if playing:
            await asyncio.wait(playing)


@pytest.fixture
async def client() -> AsyncIterator[PeerClient]:
    client = PeerClient(KEY, lambda: ME, limits=LIMITS)
    yield client
    await client.close()


async def head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await head(reader)
    await reader.read()


async def read_all(client: PeerClient, address: Address, length: int) -> bytes:
    fetched = await client.fetch(address, OBJECT_ID, 0, length)
    return b"".join([bytes(view) async for view in fetched.chunks()])


async def collect(fetched: Fetched, into: bytearray) -> None:
    async for view in fetched.chunks():
        into += view


async def send(mirror: MirrorStream, count: int) -> None:
    """Send ``count`` pieces of 1 MiB."""
    view = memoryview(bytearray(MIB))
    for _ in range(count):
        await mirror.send(view)


async def test_nobody_there(client: PeerClient) -> None:
    async with node(silence) as address:
        pass
    with pytest.raises(NodeAway, match="node b: cannot be reached"):
        await client.fetch(address, OBJECT_ID, 0, 10)


async def test_no_answer(client: PeerClient) -> None:
    async with node(silence) as address:
        with pytest.raises(NodeAway, match=r"node b: it did not answer within 0\.3 seconds"):
            await client.fetch(address, OBJECT_ID, 0, 10)


async def test_an_answer_that_is_none(client: PeerClient) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        await reader.read()

    async with node(script) as address:
        with pytest.raises(NodeAway, match="not HTTP"):
            await client.fetch(address, OBJECT_ID, 0, 10)


async def test_a_refusal_is_passed_on(client: PeerClient) -> None:
    document = b"<Error><Code>NoSuchKey</Code><Message>not here</Message></Error>"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%b" % (len(document), document))
        await reader.read()

    async with node(script) as address:
        with pytest.raises(NodeAway, match="answered 404 NoSuchKey: not here"):
            await client.fetch(address, OBJECT_ID, 0, 10)


@pytest.mark.parametrize("stalls", [True, False])
async def test_a_body_that_ends_early(client: PeerClient, stalls: bool) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 100\r\n\r\n" + b"x" * 60)
        if stalls:
            await reader.read()

    async with node(script) as address:
        fetched = await client.fetch(address, OBJECT_ID, 0, 100)
        got = bytearray()
        with pytest.raises(NodeAway, match="sent nothing" if stalls else "closed"):
            await collect(fetched, got)
        assert got == b"x" * 60


async def test_a_long_body_goes_through_little_memory(client: PeerClient) -> None:
    """However much is sent, and however slowly it is used: the sender waits."""
    block = os.urandom(MIB)
    sent = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await head(reader)
        writer.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n" % (64 * MIB))
        for _ in range(64):
            writer.write(block)
            await writer.drain()
            sent += MIB

    async with node(script) as address:
        fetched = await client.fetch(address, OBJECT_ID, 0, 64 * MIB)
        got = 0
        ahead = 0
        async for view in fetched.chunks():
            assert view == (block + block)[got % MIB : got % MIB + len(view)]
            got += len(view)
            ahead = max(ahead, sent - got)
        assert got == 64 * MIB
        assert ahead < 24 * MIB  # our buffers, and what sockets and the writer hold


async def test_a_connection_is_used_again(client: PeerClient) -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(3):
            await head(reader)
            writer.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nabcd")

    async with node(script) as address:
        for _ in range(3):
            assert await read_all(client, address, 4) == b"abcd"
        assert connections == 1
        # The other side closed it since: one more is made, and nobody notices.
        assert await read_all(client, address, 4) == b"abcd"
        assert connections == 2
        await client.close()


async def test_a_read_that_is_given_up_costs_its_connection(client: PeerClient) -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await head(reader)
        writer.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nab")
        await reader.read()

    async with node(script) as address:
        for expected in (1, 2):
            fetched = await client.fetch(address, OBJECT_ID, 0, 4)
            await fetched.close()
            assert connections == expected


# -- copies

BODY = MirrorOf(OBJECT_ID, "bucket", b"a/\xc3\xa4 b", 3 * MIB)


async def test_a_copy_is_refused_before_its_body(client: PeerClient) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"expect: 100-continue" in await head(reader)
        document = b"<Error><Code>SlowDown</Code><Message>full</Message></Error>"
        writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%b" % (len(document), document))
        await reader.read()

    async with node(script) as address:
        with pytest.raises(BufferFull):
            await client.mirror(address, BODY)


async def test_a_node_that_takes_no_bytes(client: PeerClient) -> None:
    hold = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await hold.wait()

    async with node(script) as address:
        mirror = await client.mirror(address, dataclasses.replace(BODY, length=64 * MIB))
        with pytest.raises(NodeAway, match="took nothing"):
            await send(mirror, 64)
        hold.set()


async def test_a_node_that_dies_under_a_copy(client: PeerClient) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await reader.readexactly(MIB)
        writer.transport.abort()

    async with node(script) as address:
        mirror = await client.mirror(address, dataclasses.replace(BODY, length=64 * MIB))
        with pytest.raises(NodeAway):
            await send(mirror, 64)


async def test_a_node_that_answers_before_the_end(client: PeerClient) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await reader.readexactly(MIB)
        writer.write(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await reader.read()

    async with node(script) as address:
        mirror = await client.mirror(address, dataclasses.replace(BODY, length=None))
        with pytest.raises(NodeAway, match="answered 500"):
            await send(mirror, 1000)
