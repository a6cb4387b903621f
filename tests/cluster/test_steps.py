"""A process dies at each named step of a cluster's commit: what was acknowledged is there on every node afterwards.

Case 1 of the failure list. The steps that a node alone has too are tests/crash's.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.cluster.load import Load
from tests.cluster.scene import Scene
from tests.crash.load import MIB, Body
from tests.crash.node import until

# Whole nodes die at each step; tests/ingest/test_cluster.py kills the catalogue process at the same ones.
pytestmark = pytest.mark.soak

POINTS = ("log-before", "log-appended", "index-before", "index-committed", "answer-before")


@pytest.mark.parametrize("point", POINTS)
def test_the_catalogue_process_dies_at(scene: Scene, point: str) -> None:
    load = scene.load(("disk", "mirror"))
    scene.a.arm(point)
    number = 0

    def passed() -> bool:
        nonlocal number
        number += 1
        for bucket in load.buckets:
            _tries(scene, load, bucket, f"k{number}")
        return not scene.a.flag.exists()

    until(passed, lambda: f"something passes {point}\n{scene.a.tail()}")
    scene.a.ready()
    until(lambda: _tries(scene, load, load.buckets[0], "after"), lambda: f"a serves again\n{scene.a.tail()}")
    scene.judge(load).reads_back()


def _tries(scene: Scene, load: Load, bucket: str, key: str) -> bool:
    """A PUT through node a that may be broken off."""
    body = Body(len(key) * 4099, MIB // 4)
    with contextlib.suppress(OSError):
        return load.put(load.ledgers[0], scene.client(scene.a), bucket, key, body, scene.a)
    return False
