"""The drain process: the archive room over the catalogue, the segments and a POSIX target.

It owns segment slot ``DRAIN_SLOT``: recalled bytes go there. A stop gives objects in flight a short time, then gives them
back to the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
from concurrent.futures import ThreadPoolExecutor

from archive import process
from archive.lifecycle import LifecycleScanner
from archive.pace import DrainLimits
from archive.targets.posix import PosixTarget
from archive.threads import IoThreads
from gateway.boot import Boot
from gateway.drain_storage import BufferUsage, SegmentLanding, files_elsewhere, open_version, reserved_usage, shortages
from gateway.neighbours import neighbours
from gateway.node_key import NodeKey
from gateway.notify import Deliverer
from gateway.settings import Settings
from gateway.supervisor.table import DRAIN_SLOT
from ingest.catalog.client import CatalogClient
from ingest.cluster.members import Members
from ingest.counters import DRAIN, Counters
from ingest.errors import IngestError
from ingest.records import FreedExtents
from ingest.segments import SegmentStore
from ingest.share_table import MAKE_ROOM_BYTES, ShareTable

log = logging.getLogger(__name__)

_USAGE_EVERY_S = 1.0


def main(boot: Boot) -> None:
    asyncio.run(_serve(boot))


async def _serve(boot: Boot) -> None:
    settings = boot.load_settings()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    counters = Counters(boot.counters, DRAIN)
    threads = IoThreads(2 * settings.drain_parallel + 2)
    with ThreadPoolExecutor(settings.drain_parallel + 2, "segments") as executor:
        async with CatalogClient(boot.paths, slot=DRAIN_SLOT) as catalog:
            segments = SegmentStore(
                boot.paths,
                node=catalog.node,
                slot=DRAIN_SLOT,
                segment_bytes=settings.segment_bytes,
                files_max=settings.buffer_bytes // settings.segment_bytes,
                files_elsewhere=functools.partial(files_elsewhere, counters, DRAIN),
                use=functools.partial(catalog.segment_use, DRAIN_SLOT),
                durable=catalog.barrier,
                executor=executor,
                counters=counters,
            )
            segments.open(await catalog.segment_use(DRAIN_SLOT))
            await segments.recycle_quietly()

            async def freed(push: object) -> None:
                if isinstance(push, FreedExtents):
                    segments.freed(push.extents)

            catalog.subscribe(freed)
            slots = (*range(settings.workers), DRAIN_SLOT)
            usage = BufferUsage(
                catalog,
                slots,
                settings.segment_bytes,
                settings.buffer_bytes,
                shortages=functools.partial(shortages, counters),
            )
            shares = ShareTable(boot.shares)
            members = Members(boot.paths)
            lifecycle = LifecycleScanner(
                catalog,
                counters,
                boot.paths.lifecycle,
                day_s=settings.lifecycle_day_s,
                every_s=settings.lifecycle_scan_s,
                leads=members.leads,
            )
            others = neighbours(boot.paths, settings, NodeKey.load(boot.paths.node_key))
            deliverer = Deliverer(catalog, counters, settings.notification_urls, leads=members.leads)
            watching = asyncio.create_task(_watch(usage))
            boot.ready()
            try:
                await process.serve(
                    catalog=catalog,
                    target=PosixTarget(settings.archive_dir, threads, identity_file=boot.paths.archive_identity),
                    open_reader=functools.partial(open_version, boot.paths, catalog, executor, others, catalog.node),
                    landing=SegmentLanding(segments),
                    usage=reserved_usage(usage, lambda: shares.words[MAKE_ROOM_BYTES], settings.evict_high),
                    snapshots_dir=boot.paths.snapshots,
                    counters=counters,
                    limits=limits(settings),
                    members=members,
                    stop=stop,
                    also=(lifecycle.run, deliverer.run),
                )
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
                await others.client.close()
                segments.close()
                threads.close()


def limits(settings: Settings) -> DrainLimits:
    """The drain's limits, as far as settings decide them."""
    return DrainLimits(
        parallel_objects=settings.drain_parallel,
        recall_parallel_objects=settings.drain_parallel,
        rate_bytes_per_s=settings.drain_bytes_per_s or None,
        evict_high=settings.evict_high,
        evict_low=settings.evict_low,
        stop_grace_s=min(10.0, settings.shutdown_grace_s / 2),
    )


async def _watch(usage: BufferUsage) -> None:
    while True:
        try:
            await usage.refresh()
        except IngestError as error:
            log.warning("cannot see how full the buffer is: %s", error)
        await asyncio.sleep(_USAGE_EVERY_S)
