"""Durability ``mirror``: every body is on two nodes before its answer, whatever happens to the second one meanwhile."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import msgspec
import pytest

from ingest import compaction
from ingest.bucket_settings import BucketSettings
from ingest.cluster import members
from ingest.cluster.choice import candidates
from ingest.cluster.members import Load, Member, Membership
from ingest.cluster.relay import open_copies
from ingest.cluster.remirror import Remirror, RemirrorLimits
from ingest.counters import Counters
from ingest.landing import fill
from ingest.ports import BodyChange
from ingest.records import (
    BucketRecord,
    Durability,
    FrameGeometry,
    FrameLedger,
    NodeRecord,
    NodeState,
    ObjectRecord,
)
from ingest.stream_types import StreamSpec
from s3api.call import ServiceSettings
from tests.s3api.conftest import CheckingHost, Link, NodeThread, RawClient, s3_client, write_certificate

MIB = 1 << 20
FIRST, SECOND, THIRD = 1, 2, 3

# -- who is chosen


def other(node: int, *, domain: str = "", free: int = 1000, bodies: int = 0, silent_s: float = 0.0,
          state: NodeState = NodeState.UP, s3: str = "http://x") -> Member:  # fmt: skip
    record = NodeRecord(node, f"n{node}", epoch=1, state=state, domain=domain, s3=s3)
    return Member(record, silent_s, 0, Load(capacity_bytes=free, bodies=bodies))


def chosen(*found: Member, **how: Any) -> list[int]:
    return [member.node for member in candidates([other(1, domain="a", free=10**9), *found], 1, 100, **how)]


def test_only_who_can_take_it_is_asked() -> None:
    assert chosen() == []
    assert chosen(
        other(2, silent_s=11), other(3, state=NodeState.DRAINING), other(4, state=NodeState.REMOVED),
        other(5, free=50), other(6, s3=""), other(7),
    ) == [7]  # fmt: skip


def test_another_failure_domain_goes_first() -> None:
    assert chosen(other(2, domain="a", free=9000), other(3, domain="b", free=500), other(4, free=600)) == [4, 3, 2]


def test_room_and_load_decide_among_equals() -> None:
    assert chosen(other(2, free=1000), other(3, free=2000)) == [3, 2]
    assert chosen(other(2, free=1000), other(3, free=2000, bodies=3)) == [2, 3]
    assert chosen(other(2, free=1000), other(3, free=2000), sending={3: 4}) == [2, 3]


def test_who_failed_comes_last_and_not_for_ever() -> None:
    assert chosen(other(2, free=1000), other(3, free=2000), failures={3: 1}) == [2, 3]
    assert chosen(other(2, free=1000), other(3, free=2000), failures={3: 2}) == [2]


def test_who_failed_with_others_comes_after_them() -> None:
    both = (other(2, domain="a", free=1000), other(3, domain="b", free=2000))
    assert chosen(*both, doubtful=lambda node: node == 3) == [2, 3]


# -- three nodes with folders of their own and one catalogue


class Three:
    def __init__(self, folder: Callable[[str], Any]) -> None:
        self.first = self._start(folder, FIRST, None)
        self.second = self._start(folder, SECOND, self.first)
        self.third = self._start(folder, THIRD, self.first)
        self.all = (self.first, self.second, self.third)
        self.links: list[Link] = []

    @staticmethod
    def _start(folder: Callable[[str], Any], number: int, beside: NodeThread | None) -> NodeThread:
        root = folder(f"n{number}") / "node"
        host = CheckingHost()
        node = NodeThread(root, ServiceSettings(), host, number, number, beside, files_max=24)  # type: ignore[arg-type]
        write_certificate(node.certificate)
        node.start()
        return node

    def know(self, *, links: dict[int, Link] | None = None, away: tuple[int, ...] = (), free: dict[int, int] | None = None,
             ) -> None:  # fmt: skip
        found = []
        for node in self.all:
            at = links[node.number].endpoint if links and node.number in links else node.endpoint
            record = NodeRecord(node.number, f"n{node.number}", epoch=1, s3=at)
            room = Load(capacity_bytes=(free or {}).get(node.number, 1 << 40))
            found.append(Member(record, 100.0 if node.number in away else 0.0, 0, room))
        for node in self.all:
            members.write(node.paths, Membership(node.number, "c", 0.0, tuple(found)))
            assert node.buffer.neighbours is not None
            node.buffer.neighbours._doubts.clear()

    def link(self, node: NodeThread) -> Link:
        self.links.append(Link(node.port))
        return self.links[-1]

    def metric(self, name: str) -> float:
        return self.first.counters.cell(name).value()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    three = Three(tmp_path_factory.mktemp)
    yield three
    for node in reversed(three.all):
        node.stop()


@pytest.fixture
def three(nodes: Three) -> Iterator[Three]:
    nodes.know()
    yield nodes
    for link in nodes.links:
        link.close()
    nodes.links.clear()
    for node in nodes.all:
        quiet(node)


def quiet(node: NodeThread) -> None:
    """Nothing is left of any body but what is stored."""
    deadline = time.monotonic() + 60
    while node.buffer.busy() or node.run(idle_memory(node)):
        assert time.monotonic() < deadline, "memory of a body was not given back"
        time.sleep(0.01)


async def idle_memory(node: NodeThread) -> int:
    node.buffer.packer.close_idle()
    return node.buffer.arena.used_bytes


@pytest.fixture(scope="module")
def keys(nodes: Three) -> tuple[str, str]:
    access, secret = nodes.first.add_user("root", root=True)
    for node in nodes.all:
        node._secrets.update(nodes.first._secrets)
    return access, secret


@pytest.fixture(scope="module")
def s3(nodes: Three, keys: tuple[str, str]) -> Iterator[Any]:
    client = s3_client(nodes.first, keys)
    yield client
    client.close()


@pytest.fixture
def raw(three: Three, keys: tuple[str, str]) -> Iterator[RawClient]:
    client = RawClient(three.first.endpoint, keys)
    yield client
    client.http.close()


@pytest.fixture
def bucket(s3: Any) -> str:
    return mirrored(s3)


def mirrored(s3: Any, loss: str | None = None) -> str:
    name = f"m-{secrets.token_hex(6)}"
    s3.create_bucket(Bucket=name)
    set_tags(s3, name, loss)
    return name


def set_tags(s3: Any, name: str, loss: str | None) -> None:
    tags = {"hiss.durability": "mirror"} | ({"hiss.mirror-loss": loss} if loss else {})
    s3.put_bucket_tagging(
        Bucket=name, Tagging={"TagSet": [{"Key": key, "Value": value} for key, value in tags.items()]}
    )


def head(three: Three, bucket: str, key: str = "k") -> ObjectRecord:
    found: ObjectRecord = three.first.run(three.first.catalog.head(bucket, key.encode()))
    return found


def copy_of(three: Three, record: ObjectRecord) -> bytes:
    """The second copy, from the disk of the node that has it."""
    (number,) = {extent.node for extent in record.mirror}
    node = three.all[number - 1]

    async def read() -> bytes:
        args = (node.paths, node.buffer.executor, None, number)
        only = msgspec.structs.replace(record, extents=record.mirror)
        async with await open_copies(*args, only, 0, record.length) as reader:
            return b"".join([bytes(view) async for view in reader.chunks(MIB)])

    found: bytes = node.run(read())
    return found


def check(three: Three, bucket: str, data: bytes, key: str = "k", *, on: int | None = None) -> ObjectRecord:
    record = head(three, bucket, key)
    assert record.durability is Durability.MIRROR
    assert {extent.node for extent in record.extents} == {FIRST}
    assert copy_of(three, record) == data
    if on is not None:
        assert {extent.node for extent in record.mirror} == {on}
    return record


@pytest.mark.parametrize("length", [1, 70_000, MIB, MIB + 1, 20 * MIB + 13])
def test_a_body_is_on_two_nodes(three: Three, s3: Any, bucket: str, length: int) -> None:
    data = os.urandom(length)
    answer = s3.put_object(Bucket=bucket, Key="k", Body=data)
    assert "x-hiss-durability" not in answer["ResponseMetadata"]["HTTPHeaders"]
    check(three, bucket, data)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == data


def test_what_its_own_disk_does_not_give_comes_from_the_copy(
    three: Three, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3 * MIB + 13)
    s3.put_object(Bucket=bucket, Key="k", Body=data)
    (extent,) = head(three, bucket).extents
    path, real = three.first.paths.segment_name(extent.slot, extent.segment), os.open

    def refuses(name: Any, flags: int, *rest: Any, **named: Any) -> int:
        if name == path:
            raise OSError(5, "Input/output error")
        return real(name, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuses)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == data
    alone = f"a-{secrets.token_hex(6)}"
    s3.create_bucket(Bucket=alone)
    s3.put_object(Bucket=alone, Key="k", Body=data)
    (extent,) = head(three, alone).extents
    path = three.first.paths.segment_name(extent.slot, extent.segment)
    with pytest.raises(s3.exceptions.ClientError, match=r"ServiceUnavailable.*cannot be read now"):
        s3.get_object(Bucket=alone, Key="k")


def test_an_empty_body_needs_no_copy(three: Three, s3: Any, bucket: str) -> None:
    answer = s3.put_object(Bucket=bucket, Key="k", Body=b"")
    assert "x-hiss-durability" not in answer["ResponseMetadata"]["HTTPHeaders"]
    assert head(three, bucket).mirror == ()


def test_a_body_of_unknown_length(three: Three, raw: RawClient, bucket: str) -> None:
    data = os.urandom(9 * MIB + 5)
    path = f"/{bucket}/k"
    signed = raw.signed("PUT", path, payload_hash="UNSIGNED-PAYLOAD")
    signed.pop("Content-Length", None)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), 300_000):
            yield data[start : start + 300_000]

    answer = raw.http.put(raw.endpoint + path, content=pieces(), headers=signed)
    assert answer.status_code == 200, answer.text
    check(three, bucket, data)


def test_parts_are_on_two_nodes(three: Three, s3: Any, bucket: str) -> None:
    parts = [os.urandom(6 * MIB), os.urandom(5 * MIB + 1), os.urandom(10)]
    upload = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    etags = [
        s3.upload_part(Bucket=bucket, Key="k", UploadId=upload, PartNumber=number, Body=part)["ETag"]
        for number, part in enumerate(parts, 1)
    ]
    listed = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    s3.complete_multipart_upload(Bucket=bucket, Key="k", UploadId=upload, MultipartUpload={"Parts": listed})
    record = head(three, bucket)
    assert sum(extent.length for extent in record.mirror) == record.length
    # The first node is away: another one has everything, of its own or of the third.
    client = s3_client(three.second, s3_keys(s3))
    three.know(away=(FIRST,))
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == b"".join(parts)
    client.close()


def s3_keys(s3: Any) -> tuple[str, str]:
    found = s3._request_signer._credentials
    return found.access_key, found.secret_key


def test_copies_too(three: Three, s3: Any, bucket: str) -> None:
    data = os.urandom(3 * MIB)
    s3.put_object(Bucket=bucket, Key="k", Body=data)
    s3.copy_object(Bucket=bucket, Key="c", CopySource={"Bucket": bucket, "Key": "k"})
    check(three, bucket, data, "c")


def test_what_is_appended_too(three: Three, s3: Any, raw: RawClient, bucket: str) -> None:
    three.know(away=(THIRD,))
    pieces = [os.urandom(2 * MIB), os.urandom(3 * MIB + 1), os.urandom(10)]
    offset = 0
    for piece in pieces:
        headers = {"x-amz-write-offset-bytes": str(offset)}
        answer = raw("PUT", f"/{bucket}/k", piece, headers=headers)
        assert answer.status_code == 200, answer.text
        assert "x-hiss-durability" not in answer.headers
        offset += len(piece)
    check(three, bucket, b"".join(pieces), on=SECOND)
    # A piece without a copy leaves the object without one, and says so.
    set_tags(s3, bucket, "degrade")
    three.know(away=(SECOND, THIRD))
    answer = raw("PUT", f"/{bucket}/k", b"more", headers={"x-amz-write-offset-bytes": str(offset)})
    assert (answer.status_code, answer.headers["x-hiss-durability"]) == (200, "disk")
    assert head(three, bucket).mirror == ()
    three.know(away=(THIRD,))
    remirror(three)
    check(three, bucket, b"".join([*pieces, b"more"]), on=SECOND)


class Slow:
    """A PUT that the test sends piece by piece."""

    def __init__(self, raw: RawClient, bucket: str, length: int, **headers: str) -> None:
        path = f"/{bucket}/k"
        signed = raw.signed(
            "PUT", path, headers={"content-length": str(length), **headers}, payload_hash="UNSIGNED-PAYLOAD"
        )
        signed["content-length"] = str(length)
        host, port = raw.endpoint.removeprefix("http://").split(":")
        signed["host"] = f"{host}:{port}"
        self._socket = socket.create_connection((host, int(port)))
        self._socket.settimeout(60)
        lines = "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        self._socket.sendall(f"PUT {path} HTTP/1.1\r\n{lines}\r\n".encode())

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> str:
        found = b""
        while b"\r\n\r\n" not in found:
            data = self._socket.recv(65536)
            if not data:
                break
            found += data
        return found.decode()

    def close(self) -> None:
        self._socket.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_bytes_go_while_they_arrive(three: Three, raw: RawClient, bucket: str) -> None:
    data = os.urandom(40 * MIB)
    sent = three.metric("hiss_mirror_sent_bytes_total")
    slow = Slow(raw, bucket, len(data))
    slow.send(data[: 11 * MIB + 7])
    until(lambda: three.metric("hiss_mirror_sent_bytes_total") - sent == 11 * MIB + 7)
    slow.send(data[11 * MIB + 7 :])
    assert slow.answer().startswith("HTTP/1.1 200")
    slow.close()
    check(three, bucket, data)


@pytest.mark.parametrize(
    ("loss", "fault"), [("replace", "cut_after"), ("replace", "silent_after"), ("degrade", "cut_after")]
)
def test_a_lost_node_is_replaced(three: Three, s3: Any, loss: str, fault: str) -> None:
    bucket = mirrored(s3, loss)
    link = three.link(three.second)
    three.know(links={SECOND: link}, free={THIRD: 1 << 39})
    setattr(link, fault, 30 * MIB)
    lost = three.metric("hiss_mirror_lost_total")
    data = os.urandom(60 * MIB)
    answer = s3.put_object(Bucket=bucket, Key="k", Body=data)
    assert "x-hiss-durability" not in answer["ResponseMetadata"]["HTTPHeaders"]
    check(three, bucket, data, on=THIRD)
    assert three.metric("hiss_mirror_lost_total") == lost + 1
    s3.delete_object(Bucket=bucket, Key="k")


@pytest.mark.parametrize("length", [100_000, 30 * MIB])
def test_the_same_node_once_more(three: Three, s3: Any, bucket: str, length: int) -> None:
    """Of two nodes one remains: what is broken may have been the connection."""
    link = three.link(three.second)
    three.know(links={SECOND: link}, away=(THIRD,))
    data = os.urandom(length)
    s3.put_object(Bucket=bucket, Key="first", Body=b"x" * 2000)
    link.mend()
    link.cut_once, link.cut_after = True, length // 2
    s3.put_object(Bucket=bucket, Key="k", Body=data)
    check(three, bucket, data, on=SECOND)
    assert not link.cut_once


def test_a_body_may_be_refused(three: Three, s3: Any) -> None:
    bucket = mirrored(s3, "refuse")
    link = three.link(three.second)
    three.know(links={SECOND: link}, free={THIRD: 1 << 39})
    link.cut_after = 8 * MIB
    with pytest.raises(s3.exceptions.ClientError, match=r"ServiceUnavailable.*second copy.*lost: node n2"):
        s3.put_object(Bucket=bucket, Key="k", Body=os.urandom(30 * MIB))
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket)


@pytest.mark.parametrize("length", [1000, 30 * MIB])
def test_no_node_at_all(three: Three, raw: RawClient, s3: Any, bucket: str, length: int) -> None:
    """Refused before the body: a client that waits for 100 Continue never sends it."""
    three.know(away=(SECOND, THIRD))
    slow = Slow(raw, bucket, length, expect="100-continue")
    answer = slow.answer()
    assert answer.startswith("HTTP/1.1 503")
    slow.close()


def test_a_node_that_cannot_be_reached_is_found_out_before_the_body(three: Three, raw: RawClient, bucket: str) -> None:
    link = three.link(three.second)
    link.cut_after = 0
    three.know(links={SECOND: link}, away=(THIRD,))
    slow = Slow(raw, bucket, 30 * MIB, expect="100-continue")
    assert slow.answer().startswith("HTTP/1.1 503")
    slow.close()


@pytest.mark.parametrize("length", [1000, 30 * MIB])
def test_doing_without_is_said(three: Three, s3: Any, length: int) -> None:
    bucket = mirrored(s3, "degrade")
    three.know(away=(SECOND, THIRD))
    degraded = three.metric("hiss_mirror_degraded_total")
    data = os.urandom(length)
    answer = s3.put_object(Bucket=bucket, Key="k", Body=data)
    assert answer["ResponseMetadata"]["HTTPHeaders"]["x-hiss-durability"] == "disk"
    assert three.metric("hiss_mirror_degraded_total") == degraded + 1
    assert head(three, bucket).mirror == ()
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == data
    upload = s3.create_multipart_upload(Bucket=bucket, Key="p")["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key="p", UploadId=upload, PartNumber=1, Body=data)
    assert part["ResponseMetadata"]["HTTPHeaders"]["x-hiss-durability"] == "disk"
    listed = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    whole = s3.complete_multipart_upload(Bucket=bucket, Key="p", UploadId=upload, MultipartUpload=listed)
    assert whole["ResponseMetadata"]["HTTPHeaders"]["x-hiss-durability"] == "disk"


def test_a_node_lost_in_the_middle_with_nobody_else(three: Three, s3: Any) -> None:
    bucket = mirrored(s3, "degrade")
    link = three.link(three.second)
    three.know(links={SECOND: link}, away=(THIRD,))
    link.cut_after = 8 * MIB  # and every connection after that
    data = os.urandom(30 * MIB)
    answer = s3.put_object(Bucket=bucket, Key="k", Body=data)
    assert answer["ResponseMetadata"]["HTTPHeaders"]["x-hiss-durability"] == "disk"
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == data


def test_a_client_that_leaves_leaves_nothing(three: Three, raw: RawClient, bucket: str) -> None:
    slow = Slow(raw, bucket, 40 * MIB)
    slow.send(os.urandom(11 * MIB))
    slow.close()
    for node in three.all:
        quiet(node)
    assert three.first.run(three.second.catalog.held_mirrors(100)) == []


@pytest.mark.parametrize("length", [1000, 3 * MIB])
def test_what_is_not_committed_is_dropped(three: Three, s3: Any, raw: RawClient, bucket: str, length: int) -> None:
    answer = raw("PUT", f"/{bucket}/k", os.urandom(length), headers={"content-md5": "1B2M2Y8AsgTpgAmY7PhCfg=="})
    assert answer.status_code == 400, answer.text
    until(lambda: not [*held(three.second), *held(three.third)])


def test_a_copy_that_compaction_moves_is_found(three: Three, s3: Any, bucket: str) -> None:
    data = os.urandom(5 * MIB + 3)
    s3.put_object(Bucket=bucket, Key="k", Body=data)
    record = head(three, bucket)
    node = three.all[record.mirror[0].node - 1]
    for extent in record.mirror:
        assert node.run(compaction._Compaction(node.buffer, Counters(None, 0))._move(record, extent)) == extent.length
    assert not set(head(three, bucket).mirror) & set(record.mirror)
    check(three, bucket, data)


# -- a kernel's STOP


class StoppingHost(CheckingHost):
    """Kernels that want nothing behind a body's fifth frame, and a count of frames in its first bytes that says so."""

    def __init__(self, three: Three) -> None:
        self._three = three
        self.said = threading.Event()

    def open(self, info: Any) -> Any:
        if info.key != b"stopped":
            return None
        return Stopping(self._three.first.buffer.domain(info.bucket), self.said)


class Stopping:
    kernels: tuple[str, ...] = ()
    filters: ClassVar[dict[str, str]] = {}
    epochs = ()

    def __init__(self, domain: Any, said: threading.Event) -> None:
        self.domain = domain
        self._stopped: Callable[[int], None] | None = None
        self._said = said

    def sniff(self, head: memoryview, *, complete: bool) -> Any:
        return FrameGeometry("|u1", (MIB,), 8, MIB) if len(head) >= 8 else 8

    def when_stopped(self, stopped: Callable[[int], None]) -> None:
        self._stopped = stopped

    def offer(self, batch: Any) -> None:
        if batch.first_frame + batch.count > 4 and self._stopped is not None:
            asyncio.get_running_loop().call_soon(self._stop, self._stopped)
            self._stopped = None
        asyncio.get_running_loop().call_soon(batch.release)

    def _stop(self, stopped: Callable[[int], None]) -> None:
        stopped(4)
        self._said.set()

    def lagging(self, first_frame: int, count: int) -> None: ...

    def cut_short(self, length: int) -> BodyChange:
        return BodyChange(0, b"lots of ", b"but five")

    def ledger(self, received: int, trailing_bytes: int, discarded_bytes: int | None = None) -> FrameLedger:
        return FrameLedger(received, truncated=discarded_bytes is not None)

    def committed(self, record: ObjectRecord) -> None: ...
    def aborted(self) -> None: ...


@pytest.mark.parametrize("known", [True, False])
def test_what_a_stop_leaves_is_on_two_nodes(three: Three, raw: RawClient, s3: Any, bucket: str, known: bool) -> None:
    """The copy has the header that was put right afterwards, and not a byte of what was thrown away."""
    data = b"lots of " + os.urandom(40 * MIB)
    before = three.first.buffer.host
    host = StoppingHost(three)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), MIB):
            if start == 16 * MIB:
                assert host.said.wait(30), "nobody said stop"
            yield data[start : start + MIB]

    three.first.buffer.host = host  # type: ignore[assignment]
    try:
        path = f"/{bucket}/stopped"
        signed = raw.signed("PUT", path, payload_hash="UNSIGNED-PAYLOAD")
        signed.pop("Content-Length", None)
        length = {"content-length": str(len(data))} if known else {}
        answer = raw.http.put(raw.endpoint + path, content=pieces(), headers={**signed, **length})
        assert answer.status_code == 200, answer.text
    finally:
        three.first.buffer.host = before
    record = head(three, bucket, "stopped")
    assert 5 * MIB <= record.length < len(data)
    check(three, bucket, b"but five" + data[8 : record.length], "stopped")
    assert s3.get_object(Bucket=bucket, Key="stopped")["Body"].read() == b"but five" + data[8 : record.length]


# -- copies that are missing


def remirror(three: Three, **limits: Any) -> None:
    node = three.first

    async def once() -> None:
        assert node.buffer.neighbours is not None
        await Remirror(node.buffer, node.buffer.neighbours, node.counters, RemirrorLimits(**limits)).once()

    node.run(once())


def under_mirrored(three: Three) -> tuple[float, float]:
    return three.metric("hiss_under_mirrored_objects"), three.metric("hiss_under_mirrored_bytes")


@pytest.fixture
def sole(three: Three, s3: Any) -> tuple[str, dict[str, bytes]]:
    """A bucket of objects that were stored without a second copy, and nothing else that has none."""
    remirror(three)
    assert under_mirrored(three) == (0, 0)
    bucket = mirrored(s3, "degrade")
    three.know(away=(SECOND, THIRD))
    bodies = {f"k{number}": os.urandom(length) for number, length in enumerate((1, 70_000, 9 * MIB))}
    for key, data in bodies.items():
        s3.put_object(Bucket=bucket, Key=key, Body=data)
    return bucket, bodies


def test_missing_copies_are_counted_and_made(three: Three, sole: tuple[str, dict[str, bytes]]) -> None:
    bucket, bodies = sole
    remirror(three)
    assert under_mirrored(three) == (3, sum(map(len, bodies.values())))
    three.know()
    remirror(three, page=2)
    assert under_mirrored(three) == (0, 0)
    for key, data in bodies.items():
        check(three, bucket, data, key)
    # Linked, not only held; and once is enough.
    assert held(three.second) == held(three.third) == []
    made = three.metric("hiss_remirrored_objects_total")
    remirror(three)
    assert three.metric("hiss_remirrored_objects_total") == made


def test_a_node_that_fails_is_not_sent_all_the_others(three: Three, sole: tuple[str, dict[str, bytes]]) -> None:
    link = three.link(three.second)
    link.cut_after = 0
    three.know(links={SECOND: link}, away=(THIRD,))
    remirror(three)
    assert under_mirrored(three)[0] == 3
    three.know()
    remirror(three)


def test_what_is_deleted_needs_no_copy(three: Three, s3: Any, sole: tuple[str, dict[str, bytes]]) -> None:
    bucket, bodies = sole
    for key in bodies:
        s3.delete_object(Bucket=bucket, Key=key)
    remirror(three)
    assert under_mirrored(three) == (0, 0)


def test_a_forgotten_copy_is_dropped(three: Three) -> None:
    node = three.first
    spec = StreamSpec(BucketRecord("b", "", 0), BucketSettings(), b"k", 5000)

    async def hold() -> None:
        stream = node.buffer.open_copy(spec, secrets.token_bytes(16))
        await fill(stream, memoryview(bytes(5000)))
        await stream.finish()
        await stream.hold()

    node.run(hold())
    remirror(three)
    assert len(held(node)) == 1
    remirror(three, held_s=0.0)
    assert held(node) == []


def held(node: NodeThread) -> list[Any]:
    return list(node.run(node.catalog.held_mirrors(100)))


def test_a_slow_node_slows_the_sender_and_costs_no_memory(three: Three, raw: RawClient, bucket: str) -> None:
    """The link takes nothing for a while: the body waits in the arena, and no further than that."""
    link = three.link(three.second)
    three.know(links={SECOND: link}, away=(THIRD,))
    data = os.urandom(60 * MIB)
    slow = Slow(raw, bucket, len(data))
    sent = three.metric("hiss_mirror_sent_bytes_total")
    slow.send(data[:MIB])
    until(lambda: three.metric("hiss_mirror_sent_bytes_total") - sent == MIB)
    link.hold.clear()
    slow.send(data[MIB : 30 * MIB])
    until(lambda: three.first.buffer.arena.used_bytes >= 16 * MIB)
    link.hold.set()
    slow.send(data[30 * MIB :])
    assert slow.answer().startswith("HTTP/1.1 200")
    slow.close()
    check(three, bucket, data, on=SECOND)
