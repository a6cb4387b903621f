"""SIGKILL at random under load, of each process and of the whole node: nothing acknowledged is lost, nothing is half there."""

from __future__ import annotations

import contextlib
import os
import random
import time
from pathlib import Path

import pytest

from tests.crash.harness import Judge, Load, Node, running, until

ROLES = ("worker", "catalogue", "drain", "control")


def begin(load: Load) -> None:
    """On however slow a machine: something is acknowledged before anyone dies."""
    before = load.acknowledged
    load.start()
    until(lambda: load.acknowledged > before + 20, "the load is on")


def storm(node: Node, load: Load, rng: random.Random, kills: tuple[str, ...]) -> None:
    """Load, with the kills one after the other in it; everything is judged after the last."""
    begin(load)
    try:
        for role in kills:
            time.sleep(rng.uniform(0.15, 0.6))
            node.kill(role, rng.randrange(2))
        time.sleep(rng.uniform(0.1, 0.3))
    finally:
        load.stop()
    node.ready()
    Judge(node, load).reads_back()


def outage(node: Node, load: Load, rng: random.Random) -> None:
    """Load, and the whole node dies in it."""
    begin(load)
    time.sleep(rng.uniform(0.3, 0.9))
    node.kill_all()
    load.stop()
    known = node.lost()
    node.start()
    node.ready()
    for ledger in load.ledgers:
        ledger.lost(node.lost() - known)
    Judge(node, load).reads_back()


def finish(node: Node, load: Load) -> None:
    judge = Judge(node, load)
    judge.is_archived()
    judge.is_sound()
    judge.gives_everything_back()
    node.stop()
    judge.is_sound()


def test_any_process_may_die_at_any_moment(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with running(tmp_path) as node:
        load = Load(node, seed)
        for _ in range(3):
            storm(node, load, rng, tuple(rng.sample(ROLES, 2)))
        finish(node, load)


def test_the_whole_node_may_die_at_any_moment(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed + 1)
    with running(tmp_path) as node:
        load = Load(node, seed + 1)
        for _ in range(3):
            outage(node, load, rng)
        finish(node, load)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_soak(tmp_path: Path, seed: int) -> None:
    """Minutes of it (HISS_TEST_SOAK_S), a new node now and then, a new seed each time."""
    end = time.monotonic() + float(os.environ.get("HISS_TEST_SOAK_S", "600"))
    number = 0
    while time.monotonic() < end:
        number += 1
        print(f"round {number}: seed {seed + number}")
        rng = random.Random(seed + number)
        folder = tmp_path / str(number)
        folder.mkdir()
        # Every other node evicts all the time, so that recalls and recycling are in it.
        small = {"evict_high": "0.05", "evict_low": "0.01"} if number % 2 else {}
        with running(folder, **small) as node, contextlib.ExitStack():
            load = Load(node, seed + number)
            for _ in range(6):
                if rng.random() < 0.35:
                    outage(node, load, rng)
                else:
                    storm(node, load, rng, tuple(rng.choices(ROLES, k=rng.randrange(1, 5))))
            finish(node, load)
