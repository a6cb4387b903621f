"""One node's disk is full, one node's clock is wrong: the others go on, and so does it when that is put right.

Cases of the failure list: ENOSPC on one node (12), clock jumps (13). Bit rot, EIO and torn records are tests/crash's.
"""

from __future__ import annotations

import time

import pytest

from tests.cluster.scene import Scene
from tests.crash.node import until


def test_a_full_disk_on_one_node(scene: Scene) -> None:
    load = scene.load(("disk", "mirror"))
    with scene.under(load):
        with load.storm():  # it cannot write down what the others decide, and answers from what it knows
            ballast = scene.fill_disk()
            scene.goes_on(load)
            ballast.unlink()
            until(lambda: scene.takes(scene.c, load.buckets[0]), lambda: f"c takes bodies again\n{scene.c.tail()}")
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


@pytest.mark.parametrize("ahead_s", [-45.0, -600.0, 600.0])
def test_the_clock_of_one_node_is_set(scene: Scene, ahead_s: float) -> None:
    """Back, far back, and ahead. Leases are by the engine's clock: nobody dies of it, nothing is drained twice or early, and
    what is newer stays newer. Signatures between nodes may be refused beyond a minute: then there is no second copy there,
    and a PUT that wants one goes elsewhere or is refused; nothing that was acknowledged is less safe."""
    load = scene.load(("disk", "mirror"))
    with scene.under(load):
        scene.wall_clock.set(ahead_s)
        scene.goes_on(load)
        begun = time.monotonic()
        members = until(lambda: scene.a.members(), "a knows its members")
        assert all(member.alive for member in members), members
        assert time.monotonic() - begun < 30
        scene.wall_clock.set(0.0)
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


def test_versions_follow_each_other_across_clocks(scene: Scene) -> None:
    """A node that is ten minutes behind overwrites: its version is the newer one everywhere, with a later time."""
    load = scene.load(("disk",))
    (bucket,) = load.buckets
    scene.put(load, scene.a, bucket, 5000, "key")
    before = scene.client(scene.a).request("HEAD", f"/{bucket}/key").headers["last-modified"]
    scene.wall_clock.set(-600.0)
    scene.put(load, scene.b, bucket, 6000, "key")
    after = scene.client(scene.a).request("HEAD", f"/{bucket}/key").headers["last-modified"]
    order = [time.strptime(text, "%a, %d %b %Y %H:%M:%S GMT") for text in (before, after)]
    assert order == sorted(order)
    scene.wall_clock.set(0.0)
    scene.judge(load).reads_back()
