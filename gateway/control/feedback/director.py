"""Carries named actions out: looks up what a bucket's codes mean, has actions.py decide, and hands orders to the bridges.

In: events and running streams from the hub; bucket settings from the catalogue; the targets the operator allows. Out: orders
on the links, notices to the bucket's subscribers (expired, failed), counts. What always holds: ``take`` never waits; settings
are at most one catalogue generation old; without the catalogue what was known last stays in force; a worker that dies while a
stream runs leaves its actions armed, so they expire, and so does another node that cannot be heard any more. In a cluster the
values of a target are decided by the one node that writes to it (executors.py), for the streams of all nodes; an action
without a target by each node for its own streams.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gateway.control.feedback.actions import FORWARDED, Action, BucketActions, Expired, Order
from gateway.control.feedback.exchange import Notice
from gateway.control.feedback.executors import Executors
from gateway.control.feedback.link import Link
from ingest import action_settings, bucket_settings
from ingest.counters import ACTION_OUTCOMES, Counters
from ingest.errors import IngestError, NoSuchBucket
from ingest.paths import NodePaths
from ingest.ports import Catalog, FeedbackEvent

logger = logging.getLogger(__name__)

BUCKETS_MAX = 1024
LOOK_EVERY_S = 1.0
"""How soon changed settings count for a stream whose kernel says nothing."""

Pair = tuple[str, str]


@dataclasses.dataclass(slots=True)
class _Known:
    generation: int
    actions: BucketActions


class ActionDirector:
    """Implements ``hub.Director``. ``notify`` is set by the composition root before ``run``."""

    def __init__(
        self,
        catalog: Catalog,
        counters: Counters,
        *,
        globs: Sequence[str] = (),
        schemes: Sequence[str] = (),
        paths: NodePaths,
        executors: Executors | None = None,
    ) -> None:
        """``schemes``: those that have a bridge process. ``executors``: on a node of a cluster."""
        self._executors = executors
        self._catalog = catalog
        self._globs = tuple(globs)
        self._links = {scheme: Link(scheme, paths.bridge_socket(scheme), self._done) for scheme in schemes}
        self._cells = {outcome: counters.cell("hiss_feedback_actions_total", outcome) for outcome in ACTION_OUTCOMES}
        self._known: dict[str, _Known] = {}
        self._running: dict[object, tuple[Pair, ...]] = {}
        self._remote: dict[int, tuple[Pair, ...]] = {}
        """By node."""
        self._orphans: set[Pair] = set()
        self._unheard: dict[Pair, set[int]] = {}
        """Streams of other nodes whose end nobody told -> the nodes that may still tell it; a worker that died there will not."""
        self._wake = asyncio.Event()
        self._trouble = ""
        """Why settings could not be looked up last; empty once they could."""
        self.notify: Callable[[Notice], None] = lambda _: None

    # -- the hub's side

    async def prepare(self, buckets: Iterable[str]) -> None:
        for bucket in buckets:
            try:
                generation = self._catalog.generation()
                known = self._known.get(bucket)
                if known is None or known.generation != generation:
                    await self._look(bucket, generation)
            except IngestError as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    logger.warning("the actions of bucket %s cannot be looked up: %s", bucket, error)

    async def _look(self, bucket: str, generation: int) -> None:
        try:
            settings = bucket_settings.parse((await self._catalog.bucket(bucket)).tags).actions
        except (NoSuchBucket, bucket_settings.BadSetting):
            settings = ()
        self._trouble = ""
        actions = BucketActions(bucket, settings, permitted=self._permitted, counted=self._counted)
        old = self._known.pop(bucket, None)
        if old is not None:
            actions.keep(old.actions)
        elif len(self._known) >= BUCKETS_MAX:
            self._forget_one()
        self._known[bucket] = _Known(generation, actions)
        self._arm(bucket)

    def _permitted(self, target: str) -> bool:
        return self._scheme(target) in self._links and action_settings.allowed(target, self._globs)

    def _counted(self, outcome: str) -> None:
        self._cells[outcome].add()

    def _forget_one(self) -> None:
        """The bucket heard of longest ago whose actions wait for nothing."""
        for bucket, known in self._known.items():
            if math.isinf(known.actions.due_s()):
                del self._known[bucket]
                return

    def take(self, event: FeedbackEvent, *, remote: bool = False) -> Mapping[str, str] | None:
        known = self._known.get(event.bucket)
        concerned = known.actions.of(event.kernel, event.code) if known is not None else ()
        if not concerned:
            return None
        now_s = time.monotonic()
        # The event's clock is the wall's, the deciding one does not jump: only the age is carried over.
        born_s = now_s - max(0.0, (time.time_ns() - event.time_ns) / 1e9)
        outcomes = {}
        for action in concerned:
            if (elsewhere := self._elsewhere(action, remote)) is not None:
                if not remote:
                    action.count(elsewhere)
                    outcomes[action.settings.name] = elsewhere
                continue
            outcome, order = action.take(event.value, fresh=event.live, born_s=born_s, now_s=now_s)
            if order is not None and not self._send(action, order):
                outcome = "unavailable"
            outcomes[action.settings.name] = outcome
        self._wake.set()
        return outcomes

    def streams(self, worker: object, running: Sequence[Pair]) -> None:
        before = self._running.get(worker, ())
        self._running[worker] = tuple(running)
        for bucket in {bucket for bucket, _ in (*before, *running)}:
            self._arm(bucket)
        self._wake.set()

    def lost(self, worker: object) -> None:
        # Streams that were arriving end unheard: their silence must count.
        self._orphans.update(self._running.pop(worker, ()))
        self._wake.set()

    # -- other nodes' streams

    def streams_of(self, node: int, running: Sequence[Pair], orphans: Sequence[Pair]) -> None:
        """What arrives at another node; ``orphans``: of workers that died there since."""
        before = self._remote.get(node, ())
        self._remote[node] = tuple(running)
        for pair, nodes in list(self._unheard.items()):
            # It can be heard again and says itself what runs.
            nodes_left = nodes - {node}
            if nodes_left:
                self._unheard[pair] = nodes_left
            elif nodes:
                del self._unheard[pair]
        self._unheard.update((pair, set()) for pair in orphans)
        for bucket in {bucket for bucket, _ in (*before, *running, *orphans)}:
            self._arm(bucket)
        self._wake.set()

    def node_lost(self, node: int) -> None:
        """Its streams may go on or have ended: what is not heard counts as silence."""
        for pair in self._remote.pop(node, ()):
            if self._unheard.get(pair, {node}):
                self._unheard.setdefault(pair, set()).add(node)
        self._wake.set()

    def _elsewhere(self, action: Action, remote: bool) -> str | None:
        """What becomes of a value that is not decided here; None: it is."""
        if not action.settings.target or self._executors is None:
            return FORWARDED if remote else None
        node = self._executors.of(action.settings.target)
        if node is None:
            # Nobody may write there: that is said as on a node alone; or it is not known yet who does.
            return "unavailable" if action.permitted else None
        return None if self._executors.me(action.settings.target) else FORWARDED

    def _counting(self, action: Action, bucket: str) -> Iterator[str]:
        """Kernels of the streams whose silence counts for an action."""
        if self._elsewhere(action, False) is not None:
            action.leave()
            return
        elsewhere = (self._unheard, *self._remote.values()) if action.settings.target else ()
        for pairs in (self._orphans, *self._running.values(), *elsewhere):
            yield from (kernel for name, kernel in pairs if name == bucket)

    def _arm(self, bucket: str) -> None:
        known = self._known.get(bucket)
        if known is not None:
            known.actions.arm(lambda action: self._counting(action, bucket), time.monotonic())

    # -- time

    async def run(self) -> None:
        """Links, deferred values and dead-man times, for ever."""
        async with asyncio.TaskGroup() as group:
            for link in self._links.values():
                group.create_task(link.run())
            while True:
                self._wake.clear()
                now_s = time.monotonic()
                for known in list(self._known.values()):
                    if known.actions.due_s() <= now_s:
                        self._due(known.actions, now_s)
                self._bury()
                next_s = min((known.actions.due_s() for known in self._known.values()), default=math.inf)
                running = (*self._running.values(), *self._remote.values(), self._unheard)
                arriving = {bucket for pairs in running for bucket, _ in pairs}
                wait_s = min(next_s - time.monotonic(), LOOK_EVERY_S if arriving else math.inf)
                try:
                    async with asyncio.timeout(None if math.isinf(wait_s) else max(0.0, wait_s)):
                        await self._wake.wait()
                except TimeoutError:
                    await self.prepare(arriving)
                    if self._executors is not None:
                        for bucket in arriving:
                            self._arm(bucket)

    def _due(self, actions: BucketActions, now_s: float) -> None:
        for action in actions.actions.values():
            found = action.due(now_s)
            if isinstance(found, Expired):
                self._expire(action, actions.bucket, found.order)
            elif found is not None:
                self._send(action, found)

    def _expire(self, action: Action, bucket: str, order: Order | None) -> None:
        settings = action.settings
        value = order.value if order is not None else None
        reason = f"nothing heard for {settings.deadman_s:g} s while a stream runs"
        logger.warning("action %s of bucket %s: %s", settings.name, bucket, reason)
        if order is not None:
            self._send(action, order)
        self.notify(
            Notice("expired", bucket, settings.name, time.time_ns(), value=value, reason=reason, kernel=settings.kernel)
        )

    def _bury(self) -> None:
        """Streams of dead workers are forgotten once no action listens to their silence any more."""
        for bucket, kernel in [*self._orphans, *self._unheard]:
            known = self._known.get(bucket)
            actions = known.actions.actions.values() if known is not None else ()
            if not any(one.of(kernel) and one.settings.deadman_s is not None and not one.expired for one in actions):
                self._orphans.discard((bucket, kernel))
                self._unheard.pop((bucket, kernel), None)
                self._arm(bucket)

    # -- the bridges' side

    def _send(self, action: Action, order: Order) -> bool:
        if self._links[self._scheme(order.target)].send(order):
            return True
        action.count("unavailable", "the bridge process is not there")
        return False

    def _done(self, order: Order, outcome: str, error: str) -> None:
        known = self._known.get(order.bucket)
        action = known.actions.actions.get(order.action) if known is not None else None
        if action is not None:
            action.count(outcome, error)
        else:
            self._counted(outcome)  # its settings are gone by now
        if outcome == "failed":
            kernel = action.settings.kernel if action is not None else ""
            logger.warning("action %s of bucket %s: %s: %s", order.action, order.bucket, order.target, error)
            self.notify(
                Notice(
                    "failed", order.bucket, order.action, time.time_ns(), value=order.value, reason=error, kernel=kernel
                )
            )

    @staticmethod
    def _scheme(target: str) -> str:
        return target.partition(":")[0]

    # -- status

    def bridges(self) -> dict[str, str]:
        return {scheme: "connected" if link.connected else "away" for scheme, link in self._links.items()}

    async def document(self, bucket: str) -> list[dict[str, Any]]:
        """The bucket's actions: settings, whether the operator allows them, counts since this process started."""
        await self.prepare([bucket])
        known = self._known.get(bucket)
        return [self._shown(action) for action in known.actions.actions.values()] if known is not None else []

    def _shown(self, action: Action) -> dict[str, Any]:
        node = None
        if self._executors is not None and action.settings.target:
            node = self._executors.of(action.settings.target)
        return shown(action) | ({} if node is None or self._executors is None else {"node": self._executors.name(node)})


def shown(action: Action) -> dict[str, Any]:
    """``node`` beside these, in a cluster: the one that writes to the target, and counts what became of the values."""
    return {
        "name": action.settings.name,
        "settings": action.settings.text(),
        "target": action.settings.target or None,
        "permitted": action.permitted,
        "streams_running": action.armed,
        "expired": action.expired,
        "last_value": action.last.value if action.last is not None else None,
        "last_age_s": round(time.monotonic() - action.last.born_s, 3) if action.last is not None else None,
        "last_outcome": action.last_outcome or None,
        "last_error": action.last_error or None,
        "counts": dict(action.counts),
    }
