"""Everything that can happen to a cluster, drawn from a seed, one after the other and sometimes at once, while clients go on.

HISS_TEST_SEED repeats a run; HISS_TEST_SOAK_S says how long the long one is. After each run: every acknowledged object is
readable on every node, drained once, the nodes' indexes are equal, and all room comes back.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.load import Load
from tests.cluster.node import ClusterNode
from tests.cluster.scene import LEASE_S, Scene

pytestmark = pytest.mark.soak  # a minute of random breakage and several of looking afterwards

QUICK_S = 25.0


class Thrasher:
    """``strike`` draws one event and plays it to its end; what it touched works again afterwards."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self._scene = scene
        self._rng = rng
        self.story: list[str] = []
        self._busy: set[str] = set()
        self._events: list[tuple[int, Callable[[], contextlib.AbstractContextManager[None]]]] = [
            (4, self._kill),
            (3, self._freeze),
            (1, self._freeze_for_longer_than_a_lease),
            (4, self._cut),
            (3, self._cut_a_pair),
            (3, self._cut_from_the_engine),
            (2, self._engine_restarts),
            (2, self._engine_freezes),
            (2, self._restart),
            (2, self._set_the_clock),
            (2, self._fill_the_disk),
            (3, self._a_process_dies),
        ]

    def strike(self) -> None:
        weights = [weight for weight, _ in self._events]
        chosen = self._rng.choices(self._events, weights, k=2 if self._rng.random() < 0.25 else 1)
        with contextlib.ExitStack() as stack:
            for _, event in chosen:
                stack.enter_context(event())
                time.sleep(self._rng.uniform(0.1, 0.5))
            time.sleep(self._rng.uniform(0.3, 2.0))
        # Only now: a node that starts waits for an engine that another event has stopped.
        self._busy.clear()
        self._scene.cluster.ready()

    def _tell(self, what: str) -> None:
        self.story.append(what)
        print(f"{time.strftime('%H:%M:%S')} {what}")

    def _node(self) -> ClusterNode:
        """One that nothing is happening to."""
        node = self._rng.choice([one for one in self._scene.cluster.nodes if one.name not in self._busy])
        self._busy.add(node.name)
        return node

    @contextlib.contextmanager
    def _kill(self) -> Iterator[None]:
        node = self._node()
        self._tell(f"{node.name} is killed")
        node.kill_node()
        yield
        node.start()

    @contextlib.contextmanager
    def _restart(self) -> Iterator[None]:
        node = self._node()
        self._tell(f"{node.name} is restarted")
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            node.stop()
        node.end()  # without an engine a stop may take longer than anybody waits
        yield
        node.start()

    @contextlib.contextmanager
    def _freeze(self) -> Iterator[None]:
        node = self._node()
        self._tell(f"{node.name} freezes")
        node.freeze()
        yield
        node.thaw()

    @contextlib.contextmanager
    def _freeze_for_longer_than_a_lease(self) -> Iterator[None]:
        node = self._node()
        self._tell(f"{node.name} freezes for longer than a lease")
        node.freeze()
        yield
        time.sleep(LEASE_S + 1)
        node.thaw()

    @contextlib.contextmanager
    def _cut(self) -> Iterator[None]:
        node = self._node()
        sends, receives = self._rng.choice([(True, True), (True, False), (False, True)])
        self._tell(f"{node.name} is cut off, {sends=} {receives=}")
        node.link.cut(sends=sends, receives=receives)
        yield
        node.link.mend()

    @contextlib.contextmanager
    def _cut_a_pair(self) -> Iterator[None]:
        one, other = self._rng.sample(self._scene.cluster.nodes, 2)
        self._tell(f"{one.name} does not reach {other.name}")
        one.link.cut_from(other.link)
        yield
        one.link.mend()

    @contextlib.contextmanager
    def _cut_from_the_engine(self) -> Iterator[None]:
        node = self._node()
        self._tell(f"{node.name} does not reach the engine")
        node.link.cut_from(self._scene.cluster.engine_link)
        yield
        node.link.mend()

    @contextlib.contextmanager
    def _engine_restarts(self) -> Iterator[None]:
        engine = self._scene.cluster.engine
        if engine.running:
            how = self._rng.choice(["stop", "kill"])
            self._tell(f"the engine: {how}")
            engine.thaw()
            getattr(engine, how)()
        yield
        if not engine.running:
            engine.start()

    @contextlib.contextmanager
    def _engine_freezes(self) -> Iterator[None]:
        engine = self._scene.cluster.engine
        if engine.running:
            self._tell("the engine freezes")
            engine.freeze()
        yield
        if engine.running:
            engine.thaw()

    @contextlib.contextmanager
    def _set_the_clock(self) -> Iterator[None]:
        ahead_s = self._rng.choice([-300.0, -20.0, 20.0, 300.0])
        self._tell(f"b's clock is {ahead_s} s ahead")
        self._scene.wall_clock.set(ahead_s)
        yield
        self._scene.wall_clock.set(0.0)

    @contextlib.contextmanager
    def _fill_the_disk(self) -> Iterator[None]:
        self._tell("c's disk is full")
        ballast = self._scene.fill_disk()
        yield
        ballast.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _a_process_dies(self) -> Iterator[None]:
        node, role = self._node(), self._rng.choice(["worker", "catalogue", "drain", "control"])
        self._tell(f"{role} of {node.name} is killed")
        node.kill(role)
        yield


def thrash(scene: Scene, load: Load, rng: random.Random, seconds: float) -> None:
    thrasher = Thrasher(scene, rng)
    end = time.monotonic() + seconds
    with scene.under(load), load.storm():
        while time.monotonic() < end:
            thrasher.strike()
            assert not load.complaints, "\n".join([*thrasher.story, *load.complaints])
        scene.heal()
    judge = scene.judge(load)
    judge.reads_back()
    judge.is_archived()


@pytest.mark.timeout(900)
def test_a_short_thrashing(scene: Scene, seed: int) -> None:
    load = scene.load(("disk", "mirror"))
    thrash(scene, load, random.Random(seed), QUICK_S)
    scene.judge(load).gives_everything_back()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_long_thrashing(scene: Scene, seed: int) -> None:
    end = time.monotonic() + float(os.environ.get("HISS_TEST_SOAK_S", "600"))
    number = 0
    while time.monotonic() < end:
        number += 1
        print(f"round {number}: HISS_TEST_SEED={seed + number}")
        load = scene.load(("disk", "mirror"))
        thrash(scene, load, random.Random(seed + number), 60.0)
        scene.judge(load).gives_everything_back()
