"""The engine restarts, freezes, dies, is away for a while, and comes back as it was yesterday.

Cases of the failure list: a commit's outcome is unknown (2), the engine is down in mid-stream (3), an old primary returns (4), a
catalogue restored from an old back-up (15).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time

import pytest

from tests.cluster.expect import SlowPut, status_before_body
from tests.cluster.node import ClusterNode
from tests.cluster.scene import Scene
from tests.crash.client import S3
from tests.crash.load import MIB, POOL
from tests.crash.node import until


@pytest.mark.parametrize("how", ["restart", "kill", "freeze"])
def test_the_engine_breaks_off_under_load(scene: Scene, how: str) -> None:
    """Commits in flight have an unknown outcome; each is whole or absent, and the same everywhere."""
    load = scene.load(("disk", "mirror"))
    engine = scene.cluster.engine
    with scene.under(load), load.storm():
        for _ in range(2):
            if how == "restart":
                engine.restart()
            elif how == "kill":
                engine.kill()
                engine.start()
            else:
                engine.freeze()
                time.sleep(3.0)
                engine.thaw()
            scene.goes_on(load)
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


def test_while_the_engine_is_away_bodies_are_refused_and_reads_go_on(scene: Scene) -> None:
    load = scene.load(("disk",))
    (bucket,) = load.buckets
    keys = {node.name: scene.put(load, node, bucket, 300_000) for node in scene.cluster.nodes}
    with load.storm():
        scene.cluster.engine.stop()
        for node in scene.cluster.nodes:
            until(lambda node=node: status_before_body(node, bucket, "new", 1000) == 503, f"{node.name} refuses", 60)
            assert scene.answers(node, bucket, keys[node.name], 10).ok
        scene.outlast_a_lease()
        for node in scene.cluster.nodes:
            assert status_before_body(node, bucket, "new", 1000) == 503
            assert scene.answers(node, bucket, keys[node.name], 10).ok
            assert scene.client(node).get(bucket, "never").status == 503
        scene.cluster.engine.start()
        for node in scene.cluster.nodes:
            until(lambda node=node: status_before_body(node, bucket, "new", 1000) == 100, f"{node.name} accepts", 60)
    with scene.under(load):
        pass
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()


@pytest.mark.parametrize("away_s", [1.0, 20.0])
def test_the_engine_goes_in_mid_stream(scene: Scene, away_s: float) -> None:
    """Short: the PUT waits and is acknowledged. Long: it is refused clearly, and never half there."""
    load = scene.load(("disk",))
    (bucket,) = load.buckets
    with contextlib.closing(SlowPut(scene.a, bucket, "slow", memoryview(POOL)[: 4 * MIB])) as put:
        put.send(2 * MIB)
        scene.cluster.engine.stop()
        begun = time.monotonic()
        put.send(2 * MIB)
        if away_s < 5:
            time.sleep(away_s)
            scene.cluster.engine.start()
            assert put.status() == 200
        else:
            assert put.status() == 503
            assert time.monotonic() - begun < away_s
            scene.cluster.engine.start()
    scene.cluster.ready()
    for node in scene.cluster.nodes:
        answer = scene.answers(node, bucket, "slow")
        assert answer.body == POOL[: 4 * MIB] if away_s < 5 else answer.status in (200, 404)
    scene.client(scene.b).delete(bucket, "slow")


def serves(scene: Scene, node: ClusterNode, bucket: str) -> bool:
    """It commits, soon."""
    with contextlib.suppress(AssertionError):
        return bool(until(lambda: scene.takes(node, bucket), f"{node.name} serves", 60))
    return False


def repair(scene: Scene, node: ClusterNode) -> None:
    command = [*node.launcher, sys.executable, "-m", "gateway.cli", "fsck", "--repair", "--json"]
    command += ["--data", str(node.paths.root), "--catalog", scene.cluster.engine.dsn()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert json.loads(done.stdout)["repaired"], done.stderr


@pytest.mark.soak  # takes minutes; tests/ingest/test_cluster.py has the same for the catalogue alone
def test_an_engine_of_yesterday_is_refused(scene: Scene) -> None:
    """An old primary, or an old back-up: nodes that know more than it must not go on as if nothing had been."""
    load = scene.load(("disk",))
    (bucket,) = load.buckets
    engine = scene.cluster.engine
    old, new = scene.put(load, scene.a, bucket, 10_000), ""
    yesterday, today = engine.folder / "yesterday", engine.folder / "today"
    with load.storm():
        engine.stop()
        shutil.copytree(engine.data, yesterday, copy_function=shutil.copy2)
        engine.start()
        until(lambda: status_before_body(scene.b, bucket, "x", 10) == 100, "b accepts", 60)
        new = scene.put(load, scene.b, bucket, 10_000)
        engine.stop()
        engine.data.rename(today)
        yesterday.rename(engine.data)
        engine.own(engine.data)
        engine.start()
        # Acknowledged is acknowledged: who knows it takes nothing that an engine without it would number the same.
        with contextlib.closing(S3(scene.b, timeout_s=20)) as client:
            with contextlib.suppress(OSError):
                answer = client.put(bucket, "after", b"after")
                assert answer.status >= 500, answer
        engine.stop()
        engine.data.rename(yesterday)
        today.rename(engine.data)
        engine.start()
        # Who knew too little to notice has followed the old one: it refuses, says what to do, and that helps.
        for node in scene.cluster.nodes:
            if not serves(scene, node, bucket):
                assert "hiss fsck --repair" in node.tail()
                node.stop()
                repair(scene, node)
                node.start()
    scene.heal()
    scene.client(scene.b).delete(bucket, "after")  # its outcome was unknown
    for node in scene.cluster.nodes:
        assert scene.answers(node, bucket, old).ok
        assert scene.answers(node, bucket, new).ok
    scene.judge(load).reads_back()
    scene.judge(load).is_archived()
