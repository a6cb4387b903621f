"""The data plane between nodes, against real ones: what they read from each other, what they keep for each other."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
import uvloop
from awscrt import checksums

from ingest.cluster.peer import MirrorAnswer, MirrorOf, PeerClient
from ingest.cluster.signing import PeerKey, Sender
from ingest.errors import BufferFull, NodeAway
from ingest.records import LifetimeClass
from s3api.call import ServiceSettings
from tests.s3api.conftest import PEER_KEY, CheckingHost, NodeThread, RawClient, write_certificate

MIB = 1 << 20
OTHER = 5


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeThread]:
    """A second node, with a folder of its own."""
    node = NodeThread(
        tmp_path_factory.mktemp("other") / "node",
        ServiceSettings(),
        CheckingHost(),  # type: ignore[arg-type]
        number=OTHER,
    )
    write_certificate(node.certificate)
    node.start()
    yield node
    node.stop()


@dataclasses.dataclass(frozen=True)
class Address:
    s3: str
    node: int
    name: str = "other"


def address(node: NodeThread) -> Address:
    return Address(node.endpoint, node.number)


@pytest.fixture
def run() -> Iterator[Callable[..., Any]]:
    """Run ``work(client)`` with a node's client for its peers."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        def run(work: Callable[[PeerClient], Any], key: PeerKey = PEER_KEY, tls: Any = None) -> Any:
            async def main() -> Any:
                client = PeerClient(key, lambda: Sender(1, 1), tls=tls)
                try:
                    return await work(client)
                finally:
                    await client.close()

            return runner.run(main())

        yield run


def put(node: NodeThread, s3: Any, bucket: str, data: bytes) -> bytes:
    """The object id of what was put."""
    s3.put_object(Bucket=bucket, Key="k", Body=data)
    return bytes(node.run(node.catalog.head(bucket, b"k")).object_id)


async def fetch(client: PeerClient, at: Address, object_id: bytes, start: int, stop: int, **known: Any) -> bytes:
    fetched = await client.fetch(at, object_id, start, stop, **known)
    return b"".join([bytes(view) async for view in fetched.chunks()])


@pytest.mark.parametrize("length", [1, 5000, MIB, 9 * MIB + 17])
def test_ranges_of_what_a_node_holds(node: NodeThread, s3: Any, bucket: str, run: Any, length: int) -> None:
    data = os.urandom(length)
    object_id = put(node, s3, bucket, data)

    async def work(client: PeerClient) -> None:
        for start, stop in ((0, length), (length - 1, length), (length // 3, length // 3 + 1), (0, 1)):
            assert await fetch(client, address(node), object_id, start, stop) == data[start:stop]

    run(work)


def test_a_hint_saves_the_look_up_and_a_stale_one_costs_nothing(
    node: NodeThread, s3: Any, bucket: str, run: Any
) -> None:
    data = os.urandom(3 * MIB)
    object_id = put(node, s3, bucket, data)
    extents = node.run(node.catalog.head(bucket, b"k")).extents
    moved = tuple(msgspec.structs.replace(extent, generation=extent.generation + 1) for extent in extents)

    async def work(client: PeerClient) -> None:
        unknown = secrets.token_bytes(16)
        assert await fetch(client, address(node), unknown, 10, 2 * MIB, extents=extents) == data[10 : 2 * MIB]
        assert await fetch(client, address(node), object_id, 10, 2 * MIB, extents=moved) == data[10 : 2 * MIB]
        with pytest.raises(NodeAway, match="NoSuchKey"):
            await fetch(client, address(node), unknown, 10, 2 * MIB, extents=moved)

    run(work)


def test_what_is_only_in_memory_is_written_first(node: NodeThread, s3: Any, bucket: str, run: Any) -> None:
    s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": "hiss.durability", "Value": "memory"}]})
    data = os.urandom(2 * MIB)
    object_id = put(node, s3, bucket, data)

    async def work(client: PeerClient) -> None:
        assert await fetch(client, address(node), object_id, 0, len(data), settle=True) == data

    run(work)


def test_over_tls(node: NodeThread, s3: Any, bucket: str, run: Any) -> None:
    data = os.urandom(5 * MIB + 3)
    object_id = put(node, s3, bucket, data)
    secure = Address(node.tls_endpoint, node.number)

    async def work(client: PeerClient) -> None:
        assert await fetch(client, secure, object_id, 1, len(data)) == data[1:]
        answer = await send(client, secure, MirrorOf(secrets.token_bytes(16), bucket, b"k", len(data)), data)
        assert answer.length == len(data)

    run(work, tls=ssl.create_default_context(cafile=str(node.certificate)))

    async def unknown(client: PeerClient) -> None:
        with pytest.raises(NodeAway, match="cannot be reached"):
            await fetch(client, secure, object_id, 0, 1)

    run(unknown, tls=ssl.create_default_context())


def test_what_is_not_here(node: NodeThread, run: Any) -> None:
    async def work(client: PeerClient) -> None:
        with pytest.raises(NodeAway, match="node other: answered 404 NoSuchKey"):
            await client.fetch(address(node), secrets.token_bytes(16), 0, 10)

    run(work)


def test_another_key_is_refused(node: NodeThread, s3: Any, bucket: str, run: Any) -> None:
    object_id = put(node, s3, bucket, b"secret")

    async def work(client: PeerClient) -> None:
        with pytest.raises(NodeAway, match="answered 403 SignatureDoesNotMatch"):
            await client.fetch(address(node), object_id, 0, 6)
        with pytest.raises(NodeAway, match="answered 403 SignatureDoesNotMatch"):
            await client.mirror(address(node), MirrorOf(object_id, bucket, b"k", 6))

    run(work, PeerKey.derived(b"another key"))


def test_refusals_are_s3_documents(node: NodeThread, code_of: Callable[[httpx.Response], str]) -> None:
    fields = [("range", "bytes=0-5")]
    path = f"/-/object/{secrets.token_hex(16)}"
    _, signature = PEER_KEY.sign(Sender(1, 1), "GET", path, fields, time.time() - 3600)
    answer = httpx.get(node.endpoint + path, headers=[*fields, ("authorization", signature)])
    assert (answer.status_code, code_of(answer)) == (403, "SignatureDoesNotMatch")
    assert answer.headers["content-type"] == "application/xml"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_no_client_gets_there(node: NodeThread, raw: RawClient, s3: Any, bucket: str, method: str) -> None:
    """A user's key pair is good for S3 only, be it root's; and so is no key at all."""
    object_id = put(node, s3, bucket, b"secret")
    for path in (f"/-/object/{object_id.hex()}", f"/-/mirror/{object_id.hex()}"):
        assert raw(method, path).status_code in (403, 404)
        assert httpx.request(method, node.endpoint + path).status_code in (403, 404)


def test_a_key_may_look_like_a_node_s_path(raw: RawClient, bucket: str) -> None:
    key = f"/{bucket}/-/object/00"
    assert raw("PUT", key, b"mine").status_code == 200
    assert raw("GET", key).content == b"mine"


# -- second copies


async def send(client: PeerClient, at: Address, body: MirrorOf, data: bytes, *, ask: bool = True) -> MirrorAnswer:
    mirror = await client.mirror(at, body, ask=ask)
    left = memoryview(data)
    while left:
        left = left[await mirror.send(left) :]
    return await mirror.finish()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("length", [1, 70_000, 9 * MIB + 17])
def test_a_copy_lands_and_is_held(other: NodeThread, run: Any, length: int, known: bool) -> None:
    data = os.urandom(length)
    object_id = secrets.token_bytes(16)
    body = MirrorOf(object_id, "bucket", "ä b".encode(), length if known else None, LifetimeClass.STREAM)
    answer = run(lambda client: send(client, address(other), body, data, ask=known))
    assert answer == MirrorAnswer(OTHER, length, f"{checksums.crc64nvme(data):016x}")
    assert object_id in dict(other.run(other.catalog.held_mirrors(1000)))
    used = used_bytes(other)
    other.run(other.catalog.drop_mirror([object_id]))
    assert object_id not in dict(other.run(other.catalog.held_mirrors(1000)))
    assert used_bytes(other) < used


def used_bytes(node: NodeThread) -> int:
    return sum(use.live_bytes for use in node.run(node.catalog.segment_use(0)))


def test_a_copy_that_stays_away_half_way_leaves_nothing(other: NodeThread, run: Any) -> None:
    object_id = secrets.token_bytes(16)

    async def work(client: PeerClient) -> None:
        mirror = await client.mirror(address(other), MirrorOf(object_id, "bucket", b"k", 8 * MIB))
        await mirror.send(memoryview(os.urandom(MIB)))
        mirror.abort()

    before, memory = used_bytes(other), other.buffer.arena.used_bytes
    run(work)
    deadline = time.monotonic() + 60
    while other.buffer.busy():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert object_id not in dict(other.run(other.catalog.held_mirrors(1000)))
    assert used_bytes(other) == before
    assert other.buffer.arena.used_bytes == memory


def test_a_second_copy_takes_the_place_of_the_first(other: NodeThread, run: Any) -> None:
    object_id = secrets.token_bytes(16)
    body = MirrorOf(object_id, "bucket", b"k", 2 * MIB)
    before = used_bytes(other)
    for _ in range(3):
        run(lambda client: send(client, address(other), body, os.urandom(2 * MIB)))
    assert used_bytes(other) - before < 3 * MIB
    other.run(other.catalog.drop_mirror([object_id]))


def test_a_full_node_says_so_before_the_body(other: NodeThread, run: Any) -> None:
    body = MirrorOf(secrets.token_bytes(16), "bucket", b"k", 1 << 40)

    async def work(client: PeerClient) -> None:
        with pytest.raises(BufferFull, match="node other has no room"):
            await client.mirror(address(other), body)

    run(work)
