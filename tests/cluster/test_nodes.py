"""Nodes die, freeze for longer than a lease, leave and come back, while clients go on: nothing acknowledged is lost.

Cases of the failure list: a crash at any step (1), a zombie after a pause (5), an origin that is dead undrained, and both
copies dead (7), parts on different nodes (11), members that come and go during writes (14), a rolling restart (15).
"""

from __future__ import annotations

import contextlib
import random

from tests.cluster.scene import Scene
from tests.crash.client import S3
from tests.crash.load import MIB
from tests.crash.node import until


def test_every_node_shows_what_any_node_took(scene: Scene) -> None:
    load = scene.load(("disk", "mirror"))
    with scene.under(load, 40):
        pass
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


def test_a_node_is_killed_under_load_and_returns(scene: Scene, seed: int) -> None:
    load = scene.load(("disk", "mirror"))
    rng = random.Random(seed)
    with scene.under(load):
        # The first is the one that does the chores of all (Members.leads): another one takes them over under load.
        for node in (scene.a, rng.choice([scene.b, scene.c])):
            node.kill_node()
            scene.goes_on(load)
            node.start()
            node.ready()
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


def test_a_rolling_restart_is_no_more_than_a_busy_moment(scene: Scene) -> None:
    load = scene.load(("disk", "mirror"), clients=2)
    with scene.under(load):
        for node in scene.cluster.nodes:
            node.stop()
            scene.goes_on(load)
            node.start()
            node.ready()
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


def test_a_zombie_writes_nothing(scene: Scene) -> None:
    """A node is frozen between verifying an archive file and giving it its name, for longer than a lease. Its mirror drains
    the object, the client deletes it: the zombie's late rename must not bring it back. What it knew is of yesterday."""
    load = scene.load(("mirror",))
    (bucket,) = load.buckets
    # The drain process of b stops at its next passage, so one of these is in its hands.
    scene.b.arm("drain-verified", "stop")
    keys = [scene.put(load, scene.b, bucket, 100_000, f"zombie/{number}") for number in range(6)]
    until(lambda: not scene.b.flag.exists(), lambda: f"b drains\n{scene.b.tail()}")
    scene.b.freeze()
    scene.outlast_a_lease()
    scene.judge(load).drains(scene.a, bucket, 60)
    gone, kept = keys[:3], keys[3:]
    for key in gone:
        load.ask(load.ledgers[0], bucket, key, None, scene.a, lambda key=key: scene.client(scene.a).delete(bucket, key))
    places = [scene.cluster.archive / bucket / key for key in kept]
    inodes = [place.stat().st_ino for place in places]
    scene.b.thaw()
    with scene.under(load):  # b catches up, and is one of them again
        pass
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()
    assert [place.stat().st_ino for place in places] == inodes, "the zombie replaced archived files"
    assert not any((scene.cluster.archive / bucket / key).exists() for key in gone)


def test_a_dead_nodes_mirrored_objects_are_drained_and_what_exists_nowhere_is_named(scene: Scene) -> None:
    load = scene.load(("mirror", "disk"))
    mirror, disk = load.buckets
    for bucket in load.buckets:
        scene.tag(bucket, drain_after_s="3")
    mirrored = [scene.put(load, scene.b, mirror, 2 * MIB) for _ in range(3)]
    alone = scene.put(load, scene.b, disk, 2 * MIB)
    scene.b.kill_node()
    # Until the lease is over and for ever: the second copy answers.
    for key in mirrored:
        assert scene.answers(scene.a, mirror, key).ok
    scene.judge(load).drains(scene.a, mirror, 90)
    with contextlib.suppress(OSError):
        answer = scene.client(scene.c).get(disk, alone)
        assert answer.status == 503, answer
    scene.b.start()
    scene.b.ready()
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


def test_both_copies_dead_are_named_and_come_back(scene: Scene) -> None:
    """Two of three nodes die, with what only they hold: it is there for HEAD, counted, refused clearly, and there again with
    the first of them that returns."""
    load = scene.load(("mirror",))
    (bucket,) = load.buckets
    scene.tag(bucket, drain_after_s="600")
    keys = [scene.put(load, scene.b, bucket, 1 * MIB) for _ in range(6)]
    records = {record.key.decode(): record for record in scene.b.records() if record.bucket == bucket}
    names = {member.node: member.record.name for member in scene.b.members()}
    second = {key: names[records[key].mirror[0].node] for key in keys}
    peer = scene.cluster[second[keys[0]]]
    (left,) = (node for node in scene.cluster.nodes if node not in (scene.b, peer))
    lost = [key for key in keys if second[key] == peer.name]
    scene.b.kill_node()
    peer.kill_node()
    until(
        lambda: left.metric("hiss_cluster_unreachable_objects") >= len(lost),
        lambda: f"{len(lost)} objects are counted\n{left.tail()}",
        60,
    )
    with contextlib.closing(S3(left)) as client:
        for key in keys:
            assert client.request("HEAD", f"/{bucket}/{key}").ok
            answer = client.get(bucket, key)
            assert answer.status == (503 if key in lost else 200), (key, answer)
    peer.start()
    peer.ready()
    for key in lost:
        assert scene.answers(left, bucket, key).ok
    scene.b.start()
    scene.b.ready()
    scene.tag(bucket, left, drain_after_s="0")
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()
