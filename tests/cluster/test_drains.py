"""Who drains and recalls what: each object once, by one node, whatever happens to it meanwhile.

Cases of the failure list: duplicate drain workers (9), overwrite and delete during a drain (10), recall storms (16).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ingest.records import ObjectState
from tests.cluster.load import Load
from tests.cluster.node import ClusterNode
from tests.cluster.scene import Scene
from tests.crash.client import S3
from tests.crash.load import MIB
from tests.crash.node import until


def drained(scene: Scene) -> float:
    return sum(node.metric("hiss_drain_objects_total") for node in scene.cluster.nodes)


def test_every_object_is_drained_by_one_node(scene: Scene) -> None:
    """Two nodes hold each of these: the origin and the mirror; one of them drains it."""
    load = scene.load(("mirror",))
    (bucket,) = load.buckets
    until(lambda: all(record.archive is not None for record in scene.a.records()), "what was before is drained")
    before = drained(scene)
    for node in scene.cluster.nodes:
        for _ in range(10):
            scene.put(load, node, bucket, 20_000)
    scene.judge(load).is_archived()
    assert drained(scene) - before == 30


@contextlib.contextmanager
def drain_is_stopped(scene: Scene, node: ClusterNode, load: Load, bucket: str, key: str) -> Iterator[None]:
    """The node's drain process is frozen between verifying that key's archive file and giving it its name."""
    node.arm("drain-verified", "stop")
    scene.put(load, node, bucket, 50_000, key)
    until(lambda: not node.flag.exists(), lambda: f"{node.name} drains\n{node.tail()}")
    stopped = [row["pid"] for row in node.rows("drain")]
    try:
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("what", ["overwrite", "delete"])
def test_a_late_drain_does_not_bring_back_what_was(scene: Scene, what: str) -> None:
    """Overwritten or deleted through another node while one drains it."""
    load = scene.load(("mirror",))
    (bucket,) = load.buckets
    with drain_is_stopped(scene, scene.b, load, bucket, "key"):
        if what == "overwrite":
            scene.put(load, scene.a, bucket, 60_000, "key")
        else:
            client = scene.client(scene.a)
            assert load.ask(load.ledgers[0], bucket, "key", None, scene.a, lambda: client.delete(bucket, "key"))
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


def test_a_recall_storm_on_all_nodes(scene: Scene) -> None:
    """Everybody asks every node for the same evicted objects at once: all get them, and
    recalls are shared."""
    load = scene.load(("disk",))
    (bucket,) = load.buckets
    scene.tag(bucket, recall="on-read")
    # More than a twentieth of the buffer on each node: what is archived is evicted, until there is room.
    for node in scene.cluster.nodes:
        for _ in range(6):
            scene.put(load, node, bucket, 10 * MIB)

    def evicted() -> list[str]:
        rows = [one for one in scene.a.records() if one.bucket == bucket and one.state is ObjectState.EVICTED]
        return [one.key.decode() for one in rows]

    keys = until(lambda: len(found := evicted()) >= 3 and found[:3], lambda: f"evicted: {evicted()}")
    before = sum(node.metric("hiss_recall_objects_total") for node in scene.cluster.nodes)

    def storm(node: ClusterNode) -> None:
        with contextlib.closing(S3(node)) as client:
            for key in keys:
                until(lambda key=key: client.get(bucket, key).ok, f"{node.name} has {key}")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(storm, scene.cluster.nodes * 4))
    scene.judge(load).reads_back()
    recalls = sum(node.metric("hiss_recall_objects_total") for node in scene.cluster.nodes) - before
    assert len(keys) <= recalls < 12 * len(keys), recalls


@pytest.mark.timeout(600)
def test_parts_that_nobody_completes_are_given_back(scene: Scene) -> None:
    """Parts on different nodes, aborted through a third."""
    load = scene.load(("disk", "mirror"))
    for bucket in load.buckets:
        answer = scene.client(scene.a).request("POST", f"/{bucket}/parts", "uploads=")
        upload = answer.body.partition(b"<UploadId>")[2].partition(b"<")[0].decode()
        for number, node in enumerate(scene.cluster.nodes, 1):
            query = f"partNumber={number}&uploadId={upload}"
            assert scene.client(node).request("PUT", f"/{bucket}/parts", query, bytes(5 * MIB)).ok
        listed = scene.client(scene.b).request("GET", f"/{bucket}/parts", f"uploadId={upload}")
        assert listed.body.count(b"<PartNumber>") == 3
        assert scene.client(scene.c).request("DELETE", f"/{bucket}/parts", f"uploadId={upload}").status == 204
        assert scene.client(scene.a).request("GET", f"/{bucket}/parts", f"uploadId={upload}").status == 404
    scene.judge(load).gives_everything_back()
