"""Objects whose bytes lie on other nodes, read over S3 from a node that has none or some of them."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from awscrt import checksums
from botocore.exceptions import IncompleteReadError, ResponseStreamingError
from urllib3.exceptions import ProtocolError

from ingest.bucket_settings import BucketSettings
from ingest.cluster import members
from ingest.cluster.members import Member, Membership
from ingest.cluster.relay import Run, plan
from ingest.errors import DataLost, NodeAway
from ingest.landing import fill
from ingest.records import BucketRecord, CommitObject, Extent, NodeRecord
from ingest.stream_types import StreamSpec
from s3api.call import ServiceSettings
from tests.s3api.conftest import CheckingHost, Link, NodeThread, s3_client, write_certificate

MIB = 1 << 20
HOLDERS = (5, 6)

# -- where to read what


def extent(node: int, length: int, segment: int = 1) -> Extent:
    return Extent(node, 0, segment, 1, 4096, length)


def runs(*copies: Sequence[Extent], start: int, stop: int, away: Sequence[int] = (), me: int = 1) -> list[Any]:
    found = plan(copies, me, start, stop, lambda node: node not in away)
    position = start
    for run in found:
        assert run.start == position < run.stop <= stop
        assert run.base <= run.start
        assert run.stop <= run.base + sum(one.length for one in run.extents)
        position = run.stop
    assert position == stop
    return [(run.node, run.start, run.stop) for run in found]


def test_one_node_is_asked_once() -> None:
    copy = (extent(2, 10, 1), extent(2, 10, 2), extent(2, 5, 3))
    assert plan([copy], 1, 3, 22, lambda _: True) == [Run(2, 3, 22, 0, copy)]
    assert plan([copy], 1, 12, 20, lambda _: True) == [Run(2, 12, 20, 10, (copy[1],))]


def test_what_is_here_is_read_here() -> None:
    assert runs([extent(2, 30)], [extent(1, 30)], start=5, stop=25) == [(1, 5, 25)]
    # Parts from several nodes, each mirrored on another.
    first = [extent(2, 10), extent(3, 10), extent(1, 10)]
    second = [extent(1, 4), extent(1, 6), extent(2, 10), extent(3, 10)]
    assert runs(first, second, start=0, stop=30) == [(1, 0, 10), (3, 10, 20), (1, 20, 30)]
    # A piece that is here lies in the middle of one that is not.
    assert runs([extent(2, 30)], [extent(3, 10), extent(1, 10), extent(3, 10)], start=0, stop=30) == [
        (2, 0, 10), (1, 10, 20), (2, 20, 30),
    ]  # fmt: skip


def test_who_is_away_is_not_asked() -> None:
    first, second = [extent(2, 10), extent(2, 10)], [extent(3, 7), extent(4, 13)]
    assert runs(first, second, start=0, stop=20, away=[2]) == [(3, 0, 7), (4, 7, 20)]
    assert runs(first, second, start=0, stop=20, away=[3, 4]) == [(2, 0, 20)]
    with pytest.raises(NodeAway, match="node 2"):
        runs(first, second, start=0, stop=20, away=[2, 4])
    with pytest.raises(DataLost):
        runs(first, start=0, stop=21)


def test_requests_name_a_bounded_number_of_extents() -> None:
    found = plan([[extent(2, 1, number) for number in range(1000)]], 1, 0, 1000, lambda _: True)
    assert [len(run.extents) for run in found] == [256, 256, 256, 232]


# -- real nodes


@pytest.fixture(scope="module")
def holders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, NodeThread]]:
    made = {}
    for number in HOLDERS:
        folder = tmp_path_factory.mktemp(f"holder{number}") / "node"
        made[number] = NodeThread(folder, ServiceSettings(), CheckingHost(), number=number)  # type: ignore[arg-type]
        write_certificate(made[number].certificate)
        made[number].start()
    yield made
    for one in made.values():
        one.stop()


def member(node: NodeThread, *, silent_s: float = 0.0, s3: str | None = None) -> Member:
    record = NodeRecord(node.number, f"n{node.number}", epoch=1, s3=node.endpoint if s3 is None else s3)
    return Member(record, silent_s=silent_s, applied=0)


@pytest.fixture
def know(node: NodeThread, holders: dict[int, NodeThread]) -> Iterator[Callable[..., None]]:
    """Tell the node who there is; ``changes``: of a holder's ``member``."""

    def tell(changes: dict[int, dict[str, Any]] | None = None) -> None:
        found = [member(one, **(changes or {}).get(one.number, {})) for one in (node, *holders.values())]
        members.write(node.paths, Membership(node.number, "c", 0.0, tuple(found)))
        assert node.buffer.neighbours is not None
        node.buffer.neighbours._doubts.clear()

    tell()
    yield tell
    node.paths.members.unlink()


def land(node: NodeThread, data: bytes) -> tuple[Extent, ...]:
    """Bytes on a node's disk, held there."""

    async def work() -> tuple[Extent, ...]:
        spec = StreamSpec(BucketRecord("b", "", 0), BucketSettings(), b"k", len(data))
        stream = node.buffer.open_copy(spec, secrets.token_bytes(16))
        await fill(stream, memoryview(data))
        await stream.finish()
        await stream.hold()
        return stream.extents()

    return node.run(work())


class Store:
    """Commits versions on the node under test, whose bytes lie where a test puts them."""

    def __init__(self, node: NodeThread, bucket: str) -> None:
        self.node = node
        self.bucket = bucket

    def __call__(
        self, key: str, data: bytes, extents: tuple[Extent, ...], mirror: tuple[Extent, ...] = (), settled: bool = True
    ) -> None:
        object_id = secrets.token_bytes(16)
        if mirror:
            self.node.run(self.node.catalog.hold_mirror(object_id, mirror))
        self.node.run(
            self.node.catalog.commit(
                CommitObject(
                    self.bucket,
                    key.encode(),
                    object_id,
                    len(data),
                    hashlib.md5(data).hexdigest(),
                    checksums.crc64nvme(data),
                    "root",
                    extents,
                    durability="mirror" if mirror else "disk",  # type: ignore[arg-type]
                    settled=settled,
                )
            )
        )


@pytest.fixture
def store(node: NodeThread, bucket: str) -> Store:
    return Store(node, bucket)


@pytest.mark.parametrize("length", [1, 5000, 70_000, 20 * MIB + 13])
def test_a_get_of_what_another_node_has(
    node: NodeThread, holders: dict[int, NodeThread], know: Any, store: Store, s3: Any, bucket: str, length: int
) -> None:
    data = os.urandom(length)
    store("k", data, land(holders[5], data))
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == data
    assert s3.head_object(Bucket=bucket, Key="k")["ContentLength"] == length
    middle = s3.get_object(Bucket=bucket, Key="k", Range=f"bytes={length // 3}-{length // 2}")
    assert middle["Body"].read() == data[length // 3 : length // 2 + 1]


def test_over_tls(
    node: NodeThread, holders: dict[int, NodeThread], know: Any, store: Store, root_keys: Any, bucket: str
) -> None:
    data = os.urandom(5 * MIB + 1)
    store("k", data, land(holders[5], data))
    client = s3_client(node, root_keys, tls=True)
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == data
    client.close()


def test_pieces_from_everywhere(
    node: NodeThread, holders: dict[int, NodeThread], know: Any, store: Store, s3: Any, bucket: str
) -> None:
    pieces = [os.urandom(3 * MIB + 100 * number) for number in range(6)]
    places = [land(holders.get(number, node), piece) for number, piece in zip((5, 0, 6, 6, 0, 5), pieces, strict=True)]
    data = b"".join(pieces)
    store("k", data, tuple(one for extents in places for one in extents))
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == data
    s3.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": "k"}, Metadata={"a": "b"},
                   MetadataDirective="REPLACE")  # fmt: skip
    start, stop = 2 * MIB, 14 * MIB
    part = s3.get_object(Bucket=bucket, Key="copy", Range=f"bytes={start}-{stop - 1}")["Body"].read()
    assert part == data[start:stop]


def test_other_rooms_read_the_same(
    node: NodeThread, holders: dict[int, NodeThread], know: Any, store: Store, bucket: str
) -> None:
    data = os.urandom(5 * MIB)
    store("k", data, land(holders[5], data))
    record = node.run(node.catalog.head(bucket, b"k"))
    assert node.run(node.buffer.read(record)) == data
    domain = node.buffer.domain(bucket)

    async def load() -> bytes:
        lent = await node.buffer.load(record, 1000, 3 * MIB, domain)
        found = bytes(lent.view)
        lent.release()
        return found

    assert node.run(load()) == data[1000 : 1000 + 3 * MIB]


def test_a_mirror_here_spares_the_way(
    node: NodeThread, holders: dict[int, NodeThread], know: Any, store: Store, s3: Any, bucket: str
) -> None:
    data = os.urandom(2 * MIB)
    store("k", data, land(holders[5], data), land(node, data))
    know({5: {"silent_s": 100.0}})
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == data


@pytest.mark.parametrize("how", [{"silent_s": 100.0}, {"s3": "http://127.0.0.1:1"}])
def test_a_holder_that_is_away(
    node: NodeThread, holders: dict[int, NodeThread], know: Any, store: Store, s3: Any, bucket: str, how: dict[str, Any]
) -> None:
    data = os.urandom(2 * MIB)
    store("one", data, land(holders[5], data))
    store("two", data, land(holders[5], data), land(holders[6], data))
    know({5: how})
    assert s3.get_object(Bucket=bucket, Key="two")["Body"].read() == data
    with pytest.raises(s3.exceptions.ClientError, match=r"ServiceUnavailable.*node n5") as caught:
        s3.get_object(Bucket=bucket, Key="one")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
    know()
    assert s3.get_object(Bucket=bucket, Key="one")["Body"].read() == data


def test_a_holder_that_lost_it(
    node: NodeThread, holders: dict[int, NodeThread], know: Any, store: Store, s3: Any, bucket: str
) -> None:
    data = os.urandom(2 * MIB)
    gone = tuple(msgspec.structs.replace(one, generation=one.generation + 9) for one in land(holders[5], data))
    store("one", data, gone)
    store("two", data, gone, land(holders[6], data))
    assert s3.get_object(Bucket=bucket, Key="two")["Body"].read() == data
    with pytest.raises(s3.exceptions.ClientError, match="ServiceUnavailable"):
        s3.get_object(Bucket=bucket, Key="one")


@pytest.fixture
def link(holders: dict[int, NodeThread]) -> Iterator[Link]:
    link = Link(holders[5].port)
    yield link
    link.close()


@pytest.mark.parametrize("fault", ["cut_after", "silent_after"])
def test_a_holder_lost_in_the_middle(
    node: NodeThread,
    know: Any,
    holders: dict[int, NodeThread],
    link: Link,
    store: Store,
    s3: Any,
    bucket: str,
    fault: str,
) -> None:
    """With a mirror nobody notices; without one the answer breaks off, and never looks whole."""
    data = os.urandom(24 * MIB)
    first = land(holders[5], data)
    store("two", data, first, land(holders[6], data))
    store("one", data, first)
    know({5: {"s3": link.endpoint}})
    setattr(link, fault, 8 * MIB)
    assert s3.get_object(Bucket=bucket, Key="two")["Body"].read() == data
    link.mend()
    setattr(link, fault, 8 * MIB)
    body = s3.get_object(Bucket=bucket, Key="one")["Body"]
    with pytest.raises((IncompleteReadError, ResponseStreamingError, ProtocolError, ConnectionError)):
        body.read()


def test_nothing_is_left_behind(
    node: NodeThread, holders: dict[int, NodeThread], know: Any, store: Store, s3: Any, bucket: str
) -> None:
    """Reads that end early leave no descriptor open, here or there."""
    data = os.urandom(24 * MIB)
    store("k", data, land(holders[5], data))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        body = s3.get_object(Bucket=bucket, Key="k")["Body"]
        body.read(1000)
        body.close()
    s3.get_object(Bucket=bucket, Key="k")["Body"].read()
    assert len(os.listdir("/proc/self/fd")) < before + 15
