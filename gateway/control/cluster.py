"""How the cluster is, as this node knows it: for ``/v1/status``, ``/v1/health`` and the metrics.

In: DATA/run/members.json, the word in shared memory that says since when the engine is away, counts from the index. Out: a
document, and gauges that are set once a second. What always holds: on a node alone there is none and the gauges are zero; it
needs neither the engine nor another node to answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ingest.cluster.members import Member, Members
from ingest.counters import Counters
from ingest.errors import IngestError
from ingest.ports import Catalog
from ingest.records import NodeState

log = logging.getLogger(__name__)

PERIOD_S = 1.0
COUNT_EVERY_S = 5.0
"""Counting what no living node has looks at the whole drain queue."""
COUNT_SHARE = 20
"""and takes one in so many seconds at most."""
AWAY_S = 1.0
"""An engine that does not answer for so long is said to be away: new bodies are refused from then on."""
NAMED_MAX = 20


class ClusterWatch:
    def __init__(self, catalog: Catalog, members: Members, counters: Counters) -> None:
        self._catalog = catalog
        self._members = members
        self._away = counters.cell("hiss_cluster_engine_away_seconds")
        self._stuck = counters.cell("hiss_cluster_commits_stuck_seconds")
        self._nodes = {state: counters.cell("hiss_cluster_nodes", state) for state in ("up", "draining", "gone")}
        self._lag = counters.cell("hiss_cluster_log_lag_entries")
        self._unreachable = counters.cell("hiss_cluster_unreachable_objects")
        self._unreachable_named: list[str] = []
        self._under_mirrored = 0
        self._count_again_at = 0.0

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.step()
            except (IngestError, OSError) as error:
                log.warning("the cluster cannot be looked at: %s", error)
            await asyncio.sleep(PERIOD_S)

    async def step(self) -> None:
        known = self._members.look()
        self._away.set(self._catalog.engine_away_s)
        self._stuck.set(self._catalog.commits_stuck_s)
        states = [_state(one) for one in self._members.all()]
        for state, cell in self._nodes.items():
            cell.set(states.count(state))
        me = self._members.me
        self._lag.set(0 if me is None else max(0, known.head - me.applied))
        now = time.monotonic()
        if now >= self._count_again_at:
            await self._count()
            took_s = time.monotonic() - now
            self._count_again_at = now + max(COUNT_EVERY_S, COUNT_SHARE * took_s)

    async def _count(self) -> None:
        if not self._members.look().members:
            return
        count, named = await self._catalog.stranded(self._members.away(), NAMED_MAX)
        self._unreachable.set(count)
        self._unreachable_named = [f"{bucket}/{key.decode('utf-8', 'replace')}" for bucket, key in named]
        self._under_mirrored = await self._catalog.unmirrored_count()

    def degraded(self) -> str:
        """Why this node takes no bodies although it serves; empty while it does."""
        if self._catalog.engine_away_s > AWAY_S:
            return "the cluster's engine does not answer: reads go on, writes do not"
        if self._catalog.commits_stuck_s:
            return "the cluster's engine answers and takes no commits: reads go on, writes do not"
        if self._members.leaving:
            return "this node is being drained: reads go on, writes go to other nodes"
        return ""

    def _engine(self) -> str:
        if self._catalog.engine_away_s > AWAY_S:
            return "away"
        return "takes no commits" if self._catalog.commits_stuck_s else "ok"

    def document(self) -> dict[str, Any] | None:
        """None for a node alone."""
        known = self._members.look()
        me = self._members.me
        if me is None:
            return None
        states = [_state(one) for one in self._members.all()]
        return {
            "cluster_id": known.cluster_id,
            "node": me.node,
            "name": me.record.name,
            "state": me.record.state.value,
            "engine": self._engine(),
            "engine_away_s": round(self._catalog.engine_away_s, 3),
            "commits_stuck_s": round(self._catalog.commits_stuck_s, 3),
            "heard_of_engine_s": round(max(0.0, time.monotonic() - known.as_of_s), 3),
            "log_entries": known.head,
            "log_lag_entries": max(0, known.head - me.applied),
            "nodes": {state: states.count(state) for state in ("up", "draining", "gone")},
            "gone": [one.record.name for one in self._members.all() if _state(one) == "gone"],
            "leads": self._members.leads(),
            "under_mirrored_objects": self._under_mirrored,
            "unreachable_objects": round(self._unreachable.value()),
            "unreachable": self._unreachable_named,
        }


def _state(member: Member) -> str:
    if not member.alive:
        return "gone"
    return "draining" if member.record.state is NodeState.DRAINING else "up"
