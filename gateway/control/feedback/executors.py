"""Which node of a cluster writes to a target of named actions: one of those whose operators allow it.

In: the targets that each node may write to, as they say themselves; who lives. Out: one node's number. What always holds:
nodes that know the same name the same one; a node that has heard nothing of the cluster for nearly a lease writes to no
target that another one may write to, because that one takes over when the lease ends; where only this node may, it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.control.feedback.exchange import Outlets
from ingest import action_settings
from ingest.cluster.members import LEASE_S, Membership
from ingest.records import NodeState

START_S = LEASE_S
"""How long a control process that has just started waits to be told by every node that lives what it may write to."""
FENCE_S = LEASE_S - 2.0


def permits(outlets: Outlets, target: str) -> bool:
    return target.partition(":")[0] in outlets.schemes and action_settings.allowed(target, outlets.globs)


class Executors:
    """Of one control process."""

    def __init__(
        self,
        mine: Outlets,
        membership: Callable[[], Membership],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock``: of ``Membership.as_of_s``."""
        self._mine = mine
        self._membership = membership
        self._clock = clock
        self._started_s = clock()
        self._told: dict[int, Outlets] = {}

    def told(self, node: int, outlets: Outlets) -> None:
        self._told[node] = outlets

    def of(self, target: str) -> int | None:
        """The node that writes to the target; None: no node, or not known yet."""
        known = self._membership()
        living = {one.node for one in known.members if one.alive and one.record.state is not NodeState.REMOVED} - {
            known.me
        }
        if living - self._told.keys() and self._clock() - self._started_s < START_S:
            return None
        others = [node for node in living if node in self._told and permits(self._told[node], target)]
        if permits(self._mine, target):
            if not others or self._clock() - known.as_of_s < FENCE_S:
                others.append(known.me)
        return min(others, default=None)

    def me(self, target: str) -> bool:
        return self.of(target) == self._membership().me

    def name(self, node: int) -> str:
        return next((one.record.name for one in self._membership().members if one.node == node), str(node))
