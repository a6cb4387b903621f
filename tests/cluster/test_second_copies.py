"""Bodies on two nodes, and reads from any: real nodes on a network, one of which is killed, cut off or away."""

from __future__ import annotations

import http.client
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.netns import Network
from ingest.cluster import identity
from ingest.cluster.members import Members
from ingest.records import Durability, ObjectRecord
from tests.cluster.node import Cluster, ClusterNode, ended
from tests.crash.client import S3, Answer, sign
from tests.crash.node import until
from tests.engine import postgres_programs

__all__ = ["postgres_programs"]

MIB = 1 << 20
BODY = memoryview(secrets.token_bytes(48 * MIB))


@pytest.fixture(scope="module")
def cluster(network: Network, postgres_programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), network, postgres_programs)
    with ended(made):
        made.start()
        yield made


@pytest.fixture
def three(cluster: Cluster) -> Iterator[Cluster]:
    """All nodes run and see each other."""
    cluster.start()
    until(lambda: all(len(alive(node)) == 3 for node in cluster.nodes), "all nodes see each other")
    yield cluster
    cluster.network.mend()


def alive(node: ClusterNode) -> set[int]:
    return {member.node for member in Members(node.paths).all() if member.takes_bodies}


@pytest.fixture
def bucket(three: Cluster) -> str:
    name = f"m-{secrets.token_hex(4)}"
    s3 = S3(three["a"])
    # A node that has just come back may still be without the engine.
    until(lambda: s3.request("PUT", f"/{name}").status in (200, 409), "the bucket is made")
    until(lambda: s3.tag(name, durability="mirror", drain_after_s="3600").ok, "it is to be mirrored")
    s3.close()
    return name


def record_of(node: ClusterNode, bucket: str, key: str) -> ObjectRecord:
    with node.catalogue() as reader:
        return reader.head(bucket, key.encode())


def number(node: ClusterNode) -> int:
    known = identity.read(node.paths)
    assert known is not None
    return known.node


def node_of(cluster: Cluster, wanted: int) -> ClusterNode:
    return next(node for node in cluster.nodes if number(node) == wanted)


def metric(node: ClusterNode, name: str) -> float:
    connection = node.connection(20.0, "control")
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+]+)$", text, re.M))


def asked(node: ClusterNode, bucket: str, key: str) -> Answer:
    s3 = S3(node)
    try:
        return s3.get(bucket, key)
    finally:
        s3.close()


def got(node: ClusterNode, bucket: str, key: str) -> bytes:
    answer = asked(node, bucket, key)
    assert answer.status == 200, answer
    return answer.body


class Sending:
    """A PUT to a node that the test sends piece by piece."""

    def __init__(self, node: ClusterNode, bucket: str, key: str, body: memoryview) -> None:
        self._connection = node.connection(60.0)
        self._body = body
        self._sent = 0
        path = f"/{bucket}/{key}"
        self._connection.putrequest("PUT", path, skip_host=True, skip_accept_encoding=True)
        headers = {"host": f"{node.host}:{node.port()}"}
        for name, value in {**sign("PUT", path, "", headers), "content-length": str(len(body))}.items():
            self._connection.putheader(name, value)
        self._connection.endheaders()

    def to(self, stop: int) -> None:
        self._connection.sock.sendall(self._body[self._sent : stop])
        self._sent = stop

    def answer(self) -> http.client.HTTPResponse:
        self.to(len(self._body))
        answer = self._connection.getresponse()
        answer.read()
        self._connection.close()
        return answer


def peer_of(cluster: Cluster, before: dict[str, float]) -> ClusterNode:
    """The node that receives since ``before`` what another one is sent."""

    def found() -> list[ClusterNode]:
        others = (cluster["b"], cluster["c"])
        return [node for node in others if metric(node, "hiss_ingest_received_bytes_total") - before[node.name] > MIB]

    chosen: ClusterNode = until(found, "a node receives the copy")[0]
    return chosen


def received(cluster: Cluster) -> dict[str, float]:
    return {node.name: metric(node, "hiss_ingest_received_bytes_total") for node in cluster.nodes}


@pytest.mark.parametrize("length", [1, 300_000, 20 * MIB + 5])
def test_every_node_reads_what_two_have(three: Cluster, bucket: str, length: int) -> None:
    s3 = S3(three["a"])
    assert s3.put(bucket, "k", BODY[:length]).ok
    s3.close()
    record = record_of(three["a"], bucket, "k")
    assert record.durability is Durability.MIRROR
    assert {one.node for one in record.extents} == {number(three["a"])}
    assert len({one.node for one in record.mirror}) == 1
    assert {one.node for one in record.mirror} != {number(three["a"])}
    for node in three.nodes:
        assert got(node, bucket, "k") == BODY[:length]


def test_what_is_deleted_is_free_on_both(three: Cluster, bucket: str) -> None:
    s3 = S3(three["a"])
    assert s3.put(bucket, "k", BODY).ok
    peer = node_of(three, record_of(three["a"], bucket, "k").mirror[0].node)
    for node in (three["a"], peer):
        until(lambda node=node: metric(node, "hiss_buffer_used_bytes") >= len(BODY), "it is counted")  # type: ignore[misc]
    used = {node.name: metric(node, "hiss_buffer_used_bytes") for node in (three["a"], peer)}
    assert s3.delete(bucket, "k").ok
    s3.close()
    for node in (three["a"], peer):
        most = used[node.name] - len(BODY)
        until(lambda node=node, most=most: metric(node, "hiss_buffer_used_bytes") <= most, "it is free")  # type: ignore[misc]


def test_a_peer_killed_in_the_middle(three: Cluster, bucket: str) -> None:
    before = received(three)
    sending = Sending(three["a"], bucket, "k", BODY)
    sending.to(24 * MIB)
    peer = peer_of(three, before)
    peer.kill_node()
    assert sending.answer().status == 200
    record = record_of(three["a"], bucket, "k")
    assert {one.node for one in record.mirror} == {number(node) for node in three.nodes if node.running} - {
        number(three["a"])
    }
    for node in three.nodes:
        if node.running:
            assert got(node, bucket, "k") == BODY


def test_a_link_that_goes_silent_in_the_middle(three: Cluster, bucket: str) -> None:
    before = received(three)
    sending = Sending(three["a"], bucket, "k", BODY)
    sending.to(24 * MIB)
    peer = peer_of(three, before)
    peer.link.cut()
    assert sending.answer().status == 200
    record = record_of(three["a"], bucket, "k")
    assert {one.node for one in record.mirror}.isdisjoint({number(peer), number(three["a"])})
    three.network.mend()
    # Until it reaches the engine again it answers from what it knows.
    until(lambda: asked(peer, bucket, "k").body == BODY, "the node that was cut off reads it, too")


def test_the_first_node_dies_and_the_second_has_it(three: Cluster, bucket: str) -> None:
    s3 = S3(three["a"])
    assert s3.put(bucket, "mirrored", BODY).ok
    assert s3.tag(bucket, durability="disk", drain_after_s="3600").ok
    assert s3.put(bucket, "sole", BODY[:MIB]).ok
    s3.close()
    until(lambda: got(three["b"], bucket, "mirrored") == BODY, "it is there")
    three["a"].kill_node()
    for node in (three["b"], three["c"]):
        assert got(node, bucket, "mirrored") == BODY
        answer = asked(node, bucket, "sole")
        assert (answer.status, answer.code) == (503, "ServiceUnavailable")
        assert b"node a" in answer.body


def test_without_a_second_node(three: Cluster, bucket: str) -> None:
    for node in (three["b"], three["c"]):
        node.kill_node()
    until(lambda: len(alive(three["a"])) == 1, "their leases are over")
    s3 = S3(three["a"])
    answer = s3.put(bucket, "k", BODY[: 2 * MIB])
    assert (answer.status, answer.code) == (503, "ServiceUnavailable")
    assert s3.tag(bucket, durability="mirror", mirror_loss="degrade", drain_after_s="3600").ok
    answer = s3.put(bucket, "k", BODY[: 2 * MIB])
    assert answer.ok
    assert answer.headers["x-hiss-durability"] == "disk"
    until(lambda: metric(three["a"], "hiss_under_mirrored_objects") == 1, "it is counted")
    three.start()
    until(lambda: record_of(three["a"], bucket, "k").mirror, "its copy was made")
    until(lambda: metric(three["a"], "hiss_under_mirrored_objects") == 0, "none is missing")
    s3.close()
