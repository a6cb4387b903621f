"""Links are cut, both ways and one way, between a node and everybody, the engine or another node.

Cases of the failure list: a mirror's peer is lost (6), a partition in which a node sees clients but not the engine (8).
"""

from __future__ import annotations

import contextlib

import pytest

from tests.cluster.scene import Scene
from tests.crash.load import MIB, POOL
from tests.crash.node import until


@pytest.mark.parametrize(("sends", "receives"), [(True, True), (True, False), (False, True)])
def test_a_node_is_cut_off(scene: Scene, sends: bool, receives: bool) -> None:
    """For less than a lease, and then whole again: nobody restarts anything."""
    load = scene.load(("disk", "mirror"))
    with scene.under(load):
        with load.storm():
            scene.c.link.cut(sends=sends, receives=receives)
            scene.goes_on(load)
            scene.c.link.mend()
            until(lambda: scene.takes(scene.c, load.buckets[0]), lambda: f"c serves again\n{scene.c.tail()}")
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


@pytest.mark.parametrize("one_way", [False, True])
def test_a_node_that_sees_clients_but_not_the_engine(scene: Scene, one_way: bool) -> None:
    """It refuses bodies before they are sent, answers reads of what it holds, and is itself again without anyone's hands."""
    load = scene.load(("disk",))
    (bucket,) = load.buckets
    held = scene.put(load, scene.c, bucket, 300_000)
    with load.storm():
        scene.c.link.cut_from(scene.cluster.engine_link)
        if not one_way:
            scene.cluster.engine_link.cut_from(scene.c.link)
        until(lambda: refused(scene, bucket) == 503, lambda: f"c refuses bodies\n{scene.c.tail()}", 60)
        assert scene.answers(scene.c, bucket, held).body == scene.client(scene.c).get(bucket, held).body
        elsewhere = scene.put(load, scene.a, bucket, 1000)
        assert scene.client(scene.c).get(bucket, elsewhere).status == 503, "c says that there is no such key"
        with scene.under(load):
            pass
        scene.cluster.network.mend()
        until(lambda: refused(scene, bucket) == 100, lambda: f"c takes bodies\n{scene.c.tail()}", 60)
    with scene.under(load):
        pass
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


def refused(scene: Scene, bucket: str) -> int:
    """What a PUT that waits for leave to send its body is told by c."""
    from tests.cluster.expect import status_before_body

    return status_before_body(scene.c, bucket, "refused", 1000)


def test_the_mirrors_peer_is_lost_while_a_body_arrives(scene: Scene) -> None:
    """The body finds another peer, or is refused; never is it answered with one copy only."""
    load = scene.load(("mirror",))
    (bucket,) = load.buckets
    from tests.cluster.expect import SlowPut

    with contextlib.closing(SlowPut(scene.a, bucket, "slow", memoryview(POOL)[: 12 * MIB])) as put:
        put.send(6 * MIB)
        # One of the other two holds the second copy, and both cannot be heard any more in turn.
        scene.b.link.cut()
        put.send(6 * MIB)
        status = put.status()
        scene.b.link.mend()
    assert status in (200, 503)
    if status == 200:
        (record,) = [record for record in scene.a.records() if record.bucket == bucket]
        assert record.mirror
        assert record.mirror[0].node != record.extents[0].node
        answer = scene.answers(scene.c, bucket, "slow")
        assert answer.body == POOL[: 12 * MIB]
    for node in scene.cluster.nodes:
        client = scene.client(node)
        client.delete(bucket, "slow")
