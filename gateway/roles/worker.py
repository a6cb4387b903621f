"""A worker: S3 and WebDAV connections, the buffer of one slot, and its kernels, on one uvloop.

In: listening sockets, arena regions and a span table that the supervisor made and keeps. Out: a process that recovers what
its predecessor left, serves, and on SIGTERM finishes what is in flight, settles what is only in memory, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import uvloop

from archive.dav.errors import render as render_dav
from archive.dav.service import DavService
from gateway.access import access_defaults, authenticator, sight_maker
from gateway.boot import Boot
from gateway.drain_storage import files_elsewhere
from gateway.neighbours import neighbours
from gateway.node_key import NodeKey
from gateway.settings import Settings
from gateway.supervisor.resources import write_atomically
from gateway.tls import tls_context
from ingest.arena import SLAB_BYTES, Arena
from ingest.buffer import Buffer
from ingest.catalog.client import CatalogClient
from ingest.cluster.copies import Copies
from ingest.cluster.holdings import Holdings
from ingest.cluster.members import Members
from ingest.cluster.remirror import Remirror
from ingest.compaction import housekeep
from ingest.counters import Counters
from ingest.paths import socket_address
from ingest.recovery import recover
from ingest.segments import SegmentStore
from ingest.share_table import ShareTable
from ingest.span_table import SpanTable
from kernels.clearance import Clearance
from kernels.feedback import SocketFeedback
from kernels.host import HostLimits, KernelHost
from kernels.sandbox import SandboxLimits
from kernels.standing import Standing, Verdict
from s3api.auth.rules import Gate
from s3api.auth.users import CatalogUsers
from s3api.call import Limits, ServiceSettings
from s3api.http.limits import HttpLimits
from s3api.http.listener import Server
from s3api.peers import PeerService
from s3api.service import S3Service

log = logging.getLogger(__name__)

IO_THREADS = 4
"""Writes, flushes and hashes in flight: enough to keep a disk busy with 4 MiB requests."""
BODIES_SHARE = 2
"""With so many bodies arriving, a worker lets the others accept first, for ACCEPT_YIELD_S."""
ACCEPT_YIELD_S = 0.005
OWN_DESCRIPTORS = 1024
"""Files a worker has open beside its connections: segments, memory, kernels, and what readers hold."""


def main(boot: Boot) -> None:
    uvloop.run(_serve(boot))


async def _serve(boot: Boot) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    settings = boot.load_settings()
    counters = Counters(boot.counters, boot.slot)
    executor = ThreadPoolExecutor(IO_THREADS, "io")
    arena = Arena(boot.regions, counters, functools.partial(loop.run_in_executor, executor))
    prefault = threading.Thread(target=arena.prefault, args=(stop.is_set,), name="prefault", daemon=True)
    async with CatalogClient(boot.paths, slot=boot.slot) as catalog:
        assert boot.span_table is not None
        spans = SpanTable(boot.span_table, boot.region_bytes // SLAB_BYTES)
        segments = SegmentStore(
            boot.paths,
            node=catalog.node,
            slot=boot.slot,
            segment_bytes=settings.segment_bytes,
            files_max=settings.buffer_bytes // settings.segment_bytes,
            files_elsewhere=functools.partial(files_elsewhere, counters, boot.slot),
            use=functools.partial(catalog.segment_use, boot.slot),
            durable=catalog.barrier,
            executor=executor,
            counters=counters,
        )
        await recover(boot.paths, catalog, segments, arena, spans, counters)
        buffer = Buffer(
            paths=boot.paths,
            arena=arena,
            spans=spans,
            segments=segments,
            catalog=catalog,
            executor=executor,
            counters=counters,
            recall_timeout_s=settings.recall_timeout_s,
            shares=ShareTable(boot.shares),
        )
        others = neighbours(boot.paths, settings, NodeKey.load(boot.paths.node_key))
        buffer.neighbours = others
        if settings.catalog:
            buffer.copies = Copies(
                boot.paths,
                catalog,
                executor,
                others,
                catalog.node,
                lambda record: buffer.open_stored(record, 0, record.length),
            )
        prefault.start()
        async with _kernels(boot, settings, buffer, counters) as host:
            buffer.host = host
            keepers = [asyncio.create_task(housekeep(buffer, counters, stop), name="housekeeping")]
            if boot.slot == 0:  # one of the node's workers looks after the copies of all
                remirror = Remirror(buffer, others, counters)
                keepers.append(asyncio.create_task(remirror.run(stop), name="second copies"))
                if buffer.copies is not None:
                    keepers.append(asyncio.create_task(buffer.copies.run(), name="copies of kernels"))
            async with _servers(boot, settings, buffer, host, counters):
                boot.ready()
                await stop.wait()
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
        await buffer.close(settings.shutdown_grace_s / 2)
        await others.client.close()
    executor.shutdown(wait=True)
    segments.close()


@contextlib.asynccontextmanager
async def _kernels(
    boot: Boot, settings: Settings, buffer: Buffer, counters: Counters
) -> AsyncIterator[KernelHost | None]:
    """The kernel room, or None where the node runs no kernels."""
    if settings.kernels == "off":
        yield None
        return
    feedback = SocketFeedback(lambda: socket_address(boot.paths.feedback_socket), counters)
    sandbox = SandboxLimits(memory_bytes=settings.kernel_memory_bytes, batch_timeout_s=settings.kernel_batch_timeout_s)
    host = KernelHost(
        buffer.catalog,
        buffer,
        str(boot.paths.zygote_socket),
        feedback,
        counters,
        boot.slot,
        HostLimits(sandbox=sandbox, workers=settings.workers, cores=settings.kernel_cores),
        _clearance(boot, settings, counters),
        boot.paths.strikes_file(boot.slot),
        Members(boot.paths) if settings.catalog else None,
    )
    await feedback.start()
    await host.start()
    try:
        yield host
    finally:
        await host.close()
        await feedback.close()


def _clearance(boot: Boot, settings: Settings, counters: Counters) -> Clearance:
    """Says in the metrics and in DATA/run/sandbox.json whether this machine can confine kernels."""
    refused = counters.cell("hiss_kernels_refused")
    refused.set(0)

    def tell(standing: Standing) -> None:
        refused.set(standing.verdict is Verdict.REFUSED)
        write_atomically(boot.paths.sandbox, msgspec.json.encode(standing))

    accepted = settings.kernels == "unconfined"
    return Clearance(str(boot.paths.zygote_socket), accept_unconfined=accepted, tell=tell)


def _allow_descriptors(wanted: int) -> None:
    """Raise the soft limit, which is 1,024 on most machines, as far as connections on both ports may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning(
            "only %d open files are allowed, %d may be needed: raise the hard limit (ulimit -Hn)", allowed, wanted
        )


@contextlib.asynccontextmanager
async def _servers(
    boot: Boot, settings: Settings, buffer: Buffer, host: KernelHost | None, counters: Counters
) -> AsyncIterator[None]:
    """S3 and WebDAV on their listeners; closing finishes what is in flight."""
    key = NodeKey.load(boot.paths.node_key)
    users = CatalogUsers(buffer.catalog, key.open_secret, key.sealer())
    service = S3Service(
        buffer,
        users,
        counters,
        ServiceSettings(
            region=settings.region,
            domains=(settings.domain,) if settings.domain else (),
            etag=settings.etag,
            host_id=f"hiss-{boot.slot:02d}",
            limits=Limits(object_bytes=settings.max_object_bytes),
            day_s=settings.lifecycle_day_s,
            notification_endpoints=frozenset(settings.notification_urls),
            access=access_defaults(settings),
            allow_sigv2=settings.allow_sigv2,
            any_region=settings.any_region,
        ),
        host,
        peers=PeerService(Holdings(buffer), key.peers),
    )
    gate = Gate(buffer.catalog, access_defaults(settings))
    dav = DavService(buffer, authenticator(users), sight_maker(gate, lambda: buffer.catalog.now_ns() / 1e9))
    limits = HttpLimits(
        head_timeout_s=settings.head_timeout_s,
        idle_timeout_s=settings.keepalive_timeout_s,
        body_timeout_s=settings.body_idle_timeout_s,
        body_rate_bytes_per_s=settings.body_rate_bytes_per_s,
        connections=settings.max_connections,
        accept_share=BODIES_SHARE if settings.workers > 1 else 0,
        accept_yield_s=ACCEPT_YIELD_S,
    )
    _allow_descriptors(2 * limits.connections + OWN_DESCRIPTORS)
    tls = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = tls_context(settings.tls_cert, settings.tls_key)
    servers = []
    for fd, handler, render in (
        (boot.listeners.s3, service, service.render_error),
        (boot.listeners.dav, dav, lambda _, error: render_dav(error)),
    ):
        if fd is not None:
            listener = socket.socket(fileno=fd)
            server = Server([listener], handler, limits, counters, tls, render, service.observe)
            server.start()
            servers.append(server)
    try:
        yield
    finally:
        await asyncio.gather(*(server.close(settings.shutdown_grace_s / 2) for server in servers))
        dav.close()
