"""The control process: health, status, metrics, runs and feedback on the control port.

It reads what others do (counters, DATA/run/processes.json, the catalogue), and shares out what is reserved.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import secrets
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from gateway.access import access_defaults, authenticator, sight_maker
from gateway.boot import Boot
from gateway.control import paces, process
from gateway.control.app import ControlContext, create_app
from gateway.control.cluster import ClusterWatch
from gateway.control.elsewhere import Elsewhere
from gateway.control.feedback.director import ActionDirector
from gateway.control.feedback.exchange import Exchange, Outlets
from gateway.control.feedback.executors import Executors
from gateway.control.feedback.hub import FeedbackHub
from gateway.control.feedback.peers import Peers
from gateway.control.feedback.zeromq import ZmqPublisher
from gateway.control.health import HealthCheck
from gateway.control.kernels import failing_in
from gateway.control.nodes import NodeSource
from gateway.control.paces import KernelPaces
from gateway.control.reservations import offers_of
from gateway.control.shares import rebalancing
from gateway.control.status import ProcessFile, Rates, SandboxFile, StatusSource
from gateway.metrics import Exposition, NodeCollector, Reader
from gateway.neighbours import peer_tls
from gateway.node_key import NodeKey
from gateway.settings import Settings
from gateway.supervisor.slot import SlotState
from gateway.tls import tls_context
from ingest.catalog.client import CatalogClient
from ingest.cluster.members import Members
from ingest.counters import CONTROL, Counters
from ingest.ports import Catalog
from ingest.share_table import ShareTable
from kernels.admission import Room
from s3api.auth.rules import Gate
from s3api.auth.users import CatalogUsers

DISTRIBUTION = "hiss-gateway"
KERNELS_LOOK_S = 1.0


def main(boot: Boot) -> None:
    uvloop.run(_serve(boot))


async def _serve(boot: Boot) -> None:
    assert boot.listeners.control is not None
    settings = boot.load_settings()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    counters = Counters(boot.counters, CONTROL)
    reader = Reader(counters)
    rates = Rates(reader)
    processes = ProcessFile(boot.paths.processes)
    kernels = SandboxFile(boot.paths.sandbox, settings.kernels)
    publisher = _publisher(settings, counters)
    version = importlib.metadata.version(DISTRIBUTION)
    members = Members(boot.paths)
    key = NodeKey.load(boot.paths.node_key)
    async with CatalogClient(boot.paths) as catalog:
        mine = Outlets(tuple(settings.feedback_target_globs), tuple(settings.feedback_schemes))
        executors = Executors(mine, members.look) if settings.catalog else None
        actions = ActionDirector(
            catalog,
            counters,
            globs=settings.feedback_target_globs,
            schemes=settings.feedback_schemes,
            paths=boot.paths,
            executors=executors,
        )
        watch = ClusterWatch(catalog, members, counters)

        def ahead_ns() -> int:
            return catalog.now_ns() - time.time_ns()

        exchange = None
        if settings.catalog:
            exchange = Exchange(catalog.node, f"{catalog.node}:{secrets.token_hex(4)}", mine, ahead_ns)
        feedback = FeedbackHub(counters, director=actions, publisher=publisher, exchange=exchange)
        actions.notify = feedback.notice
        peers = None
        if executors is not None:
            tls_of_peers = peer_tls(settings.tls_cert)
            peers = Peers(members, key.peers, feedback, actions, executors, tls=tls_of_peers, ahead_ns=ahead_ns)
            feedback.peers = peers
        users = CatalogUsers(catalog, key.open_secret)
        elsewhere = Elsewhere(members if settings.catalog else None, peers)
        context = ControlContext(
            version=version,
            catalog=catalog,
            authenticate=authenticator(users),
            sight_of=sight_maker(Gate(catalog, access_defaults(settings)), lambda: catalog.now_ns() / 1e9),
            check=health_check(processes, catalog, kernels, watch.degraded),
            status=StatusSource(
                reader,
                rates,
                processes,
                catalog,
                settings.shown(),
                version,
                kernels,
                lambda: outlets(actions, publisher, peers),
                watch.document,
            ),
            nodes=NodeSource(
                catalog,
                members,
                reader,
                name=settings.node_name,
                capacity_bytes=settings.buffer_bytes,
                version=version,
            ),
            metrics=Exposition(NodeCollector(counters, version, processes.rows)),
            feedback=feedback,
            actions=actions,
            run_folder=boot.paths.run,
            paces=KernelPaces(
                boot.paths.run,
                Room(settings.kernel_cores, settings.workers),
                elsewhere.paces,
            ),
            elsewhere=elsewhere,
            peers=key.peers if settings.catalog else None,
            offers=lambda: offers_of(settings, members.all()),
        )
        tls = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            tls = tls_context(settings.tls_cert, settings.tls_key)
        await feedback.listen(boot.paths.feedback_socket)
        work = [asyncio.create_task(rates.run(), name="rates"), asyncio.create_task(actions.run(), name="actions")]
        work.append(asyncio.create_task(watch.run(), name="cluster"))
        if peers is not None:
            work.append(asyncio.create_task(peers.run(), name="feedback of other nodes"))
        if exchange is not None:
            work.append(asyncio.create_task(_tell_kernels(exchange, boot.paths.run), name="kernels for other nodes"))
        if publisher is not None:
            work.append(asyncio.create_task(publisher.run(), name="zmq"))
        shares = ShareTable(boot.shares)
        try:
            with rebalancing(catalog, shares, settings.ingest_bytes_per_s, counters):
                await process.serve(
                    create_app(context),
                    socket.socket(fileno=boot.listeners.control),
                    stop=stop,
                    tls=tls,
                    ready=boot.ready,
                    stopping=feedback.close,
                )
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)


async def _tell_kernels(exchange: Exchange, run_folder: Path) -> None:
    """The other nodes know which kernels fail here."""
    while True:
        exchange.kernels(*await failing_in(run_folder), await paces.here(run_folder))
        await asyncio.sleep(KERNELS_LOOK_S)


def _publisher(settings: Settings, counters: Counters) -> ZmqPublisher | None:
    if not settings.feedback_zmq:
        return None
    return ZmqPublisher(
        settings.feedback_zmq,
        counters,
        key_file=settings.feedback_zmq_key,
        clients=settings.feedback_zmq_clients,
    )


def outlets(actions: ActionDirector, publisher: ZmqPublisher | None, peers: Peers | None) -> dict[str, Any]:
    """Where feedback leaves the node and which other nodes' it hears, for ``/v1/status``."""
    published = {"endpoint": publisher.endpoint or None, "error": publisher.error or None} if publisher else None
    heard = {} if peers is None else {"nodes": peers.links()}
    return {"zmq": published, "bridges": actions.bridges(), **heard}


def health_check(
    processes: ProcessFile, catalog: Catalog, kernels: SandboxFile, degraded: Callable[[], str] = str
) -> HealthCheck:
    """Yes while a worker and the catalogue process are ready, the catalogue can be read and the node is not stopping.
    That no kernel runs is said, and is no reason to refuse a detector's data."""

    async def check() -> tuple[bool, dict[str, Any]]:
        document = await asyncio.to_thread(processes.read)
        rows = document["processes"]
        ready = [row for row in rows if row["state"] == SlotState.READY]
        workers = sum(row["role"] == "worker" for row in ready)
        catalogue = any(row["role"] == "catalogue" for row in ready)
        details = {
            "state": document["state"],
            "workers_ready": workers,
            "workers": sum(row["role"] == "worker" for row in rows),
            "catalogue_ready": catalogue,
            "kernels": await asyncio.to_thread(kernels.read),
            "failing": sorted({row["role"] for row in rows if row["failing"]}),
            "degraded": degraded(),
        }
        if catalogue:
            await catalog.drain_counts()
        return bool(workers and catalogue and document["state"] != "stopping"), details

    return check
