"""Who keeps a run's product in a cluster: every node comes to the same, and a node that goes moves only its own runs."""

from __future__ import annotations

from collections import Counter

import pytest

from kernels.runs.keeping import Keeping, keeper

RUNS = [f"scan/{number}/".encode() for number in range(2000)]


def test_runs_are_shared_out_and_only_those_of_a_node_that_goes_move() -> None:
    before = {run: keeper("b", run, "k", (1, 2, 5, 9)) for run in RUNS}
    assert all(400 < count < 600 for count in Counter(before.values()).values())
    after = {run: keeper("b", run, "k", (1, 2, 9)) for run in RUNS}
    assert {run for run in RUNS if before[run] != after[run]} == {run for run in RUNS if before[run] == 5}
    assert len({keeper("b", run, "k", (1, 2, 5, 9)) == keeper("b", run, "other", (1, 2, 5, 9)) for run in RUNS}) == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_one_worker_of_all_nodes_keeps_a_run(workers: int) -> None:
    nodes = (0, 3, 4)
    keeping = [Keeping(slot, workers, lambda me=me: (me, nodes)) for me in nodes for slot in range(workers)]
    for run in RUNS[:200]:
        assert sum(one.keeps("b", run, "k") for one in keeping) == 1
    # One that is not among those that can: it keeps nothing.
    assert not any(Keeping(0, 1, lambda: (7, nodes)).keeps("b", run, "k") for run in RUNS[:200])
    assert not Keeping(0, 1, lambda: (-1, ())).keeps("b", b"", "k")
