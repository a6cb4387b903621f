"""The drain process, composed: drain, recall, reconciliation, eviction, snapshots and gauges over one catalogue and target.

In: everything it works on, injected by the composition root. Out: it returns after ``stop``. Always true: trouble of the
catalogue or the target is logged and tried again, and ends nothing; anything unexpected, and a target that must be opened
anew, ends the process, loudly, and the supervisor starts another, which goes on where this one died.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path

from archive.copier import Copier, OpenReader
from archive.drain import Drain
from archive.evict import Evictor
from archive.keylocks import KeyLocks
from archive.pace import DrainLimits, retry_after_s
from archive.recall import Landing, Recaller
from archive.reconcile import Reconciler
from archive.remains import Remains
from archive.snapshots import keep_snapshots
from archive.targets.base import Target, TargetError, TargetLost
from ingest.cluster.members import Members
from ingest.counters import Counters
from ingest.errors import IngestError
from ingest.ports import Catalog

log = logging.getLogger(__name__)

_GAUGES_EVERY_S = 2.0
_EVICT_EVERY_S = 1.0
_DELETES_EVERY_S = 1.0
_SNAPSHOTS_EVERY_S = 30.0
_REMAINS_EVERY_S = 2.0
_OPEN_RETRY_CAP_S = 30.0


async def serve(
    *,
    catalog: Catalog,
    target: Target,
    open_reader: OpenReader,
    landing: Landing,
    usage: Callable[[], tuple[int, int]],
    snapshots_dir: Path,
    counters: Counters,
    limits: DrainLimits,
    members: Members,
    stop: asyncio.Event,
    also: Sequence[Callable[[asyncio.Event], Coroutine[None, None, None]]] = (),
) -> None:
    """``usage`` gives (used, capacity) bytes of the buffer. ``members``: the cluster's nodes, of which one leads. ``also``: more
    to run until ``stop``.

    Opens and closes ``target``."""
    gauges = _Gauges(catalog, counters)
    evictor = Evictor(catalog, usage, counters, limits, everything=lambda: members.leaving)
    remains = Remains(catalog, counters)
    async with asyncio.TaskGroup() as always:
        # These need no archive: the operator sees a queue that grows, the buffer is kept in its bounds.
        always.create_task(_repeat("reading the drain queue", gauges.step, _GAUGES_EVERY_S, stop))
        always.create_task(_repeat("evicting", evictor.step, _EVICT_EVERY_S, stop))
        always.create_task(
            _repeat("giving up copies on nodes that left", _led(members, remains.step), _REMAINS_EVERY_S, stop)
        )
        for run in also:
            always.create_task(run(stop))
        if await _opened(target, stop):
            try:
                await _with_target(
                    catalog, target, open_reader, landing, snapshots_dir, counters, limits, members, stop
                )
            finally:
                await target.close()


async def _with_target(
    catalog: Catalog,
    target: Target,
    open_reader: OpenReader,
    landing: Landing,
    snapshots_dir: Path,
    counters: Counters,
    limits: DrainLimits,
    members: Members,
    stop: asyncio.Event,
) -> None:
    keys = KeyLocks()
    copier = Copier(target, open_reader, limits)
    reconciler = Reconciler(catalog, target, copier, keys, counters, limits)
    drain = Drain(catalog, copier, reconciler, keys, counters, limits)
    recaller = Recaller(catalog, target, landing, counters, limits)

    async def compare() -> None:
        await reconciler.sweep(stop)

    async def copy_snapshots() -> None:
        await keep_snapshots(snapshots_dir, target, limits.snapshots_kept)

    async def remove_deleted() -> None:
        while members.leads() and not stop.is_set() and await reconciler.carry_out_deletes():
            pass

    # Nodes of a cluster share the archive: one of them does for all what is about all of it.
    sweep, snapshots = (_led(members, step) for step in (compare, copy_snapshots))
    async with asyncio.TaskGroup() as group:
        group.create_task(drain.run(stop))
        group.create_task(recaller.run(stop))
        group.create_task(_repeat("removing deleted copies", remove_deleted, _DELETES_EVERY_S, stop))
        group.create_task(_repeat("comparing archive and catalogue", sweep, limits.sweep_interval_s, stop))
        group.create_task(_repeat("copying catalogue snapshots", snapshots, _SNAPSHOTS_EVERY_S, stop))


def _led(members: Members, step: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """``step``, on the one node of a cluster that does it for all."""

    async def led() -> None:
        if members.leads():
            await step()

    return led


async def _opened(target: Target, stop: asyncio.Event) -> bool:
    """Wait for the archive as long as it takes; False when ``stop`` came first."""
    rng = random.Random()
    attempt = 0
    while not stop.is_set():
        try:
            await target.open()
        except TargetError as error:
            wait_s = retry_after_s(attempt, 1.0, _OPEN_RETRY_CAP_S, rng)
            log.error("nothing can be archived, again in %.0f s: %s", wait_s, error)
            attempt += 1
            await _pause(wait_s, stop)
        else:
            return True
    return False


async def _repeat(doing: str, step: Callable[[], Awaitable[None]], interval_s: float, stop: asyncio.Event) -> None:
    while not stop.is_set():
        try:
            await step()
        except TargetLost:
            raise
        except (IngestError, TargetError) as error:
            log.warning("%s: %s", doing, error)
        await _pause(interval_s, stop)


async def _pause(seconds: float, stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


class _Gauges:
    def __init__(self, catalog: Catalog, counters: Counters) -> None:
        self._catalog = catalog
        self._objects = counters.cell("hiss_drain_queue_objects")
        self._bytes = counters.cell("hiss_drain_queue_bytes")
        self._age = counters.cell("hiss_drain_oldest_undrained_age_seconds")
        self._failing = counters.cell("hiss_drain_failing_objects")

    async def step(self) -> None:
        counts = await self._catalog.drain_counts()
        oldest_ns = counts.oldest_undrained_ns
        self._objects.set(counts.queued_objects)
        self._bytes.set(counts.queued_bytes)
        self._failing.set(counts.failing_objects)
        self._age.set(0.0 if oldest_ns is None else max(0.0, (time.time_ns() - oldest_ns) / 1e9))
