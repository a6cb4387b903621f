"""The catalogue process: the node's only writer of journal and index. The room does the work; this wires it.

A node alone keeps its journal in a file, one of a cluster in the cluster's engine (setting ``catalog``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal

from gateway.boot import Boot
from gateway.control.status import SandboxFile
from gateway.metrics import Reader
from gateway.node_key import NodeKey
from gateway.settings import Settings
from ingest.catalog import server
from ingest.cluster import identity
from ingest.cluster.errors import ClusterRefused
from ingest.cluster.members import Load
from ingest.cluster.schema import LOG_FORMAT
from ingest.counters import CATALOGUE, Counters
from kernels.standing import Verdict

log = logging.getLogger(__name__)


def main(boot: Boot) -> None:
    settings = boot.load_settings()
    counters = Counters(boot.counters, CATALOGUE)
    if settings.catalog:
        _main_of_cluster(boot, settings, counters)
        return
    if (known := identity.read(boot.paths)) is not None:
        raise ClusterRefused(
            f"{boot.data_dir} is of cluster {known.cluster_id}: start it with the setting catalog, the address of the cluster's "
            "engine"
            if known.joined
            else f"{boot.data_dir} was about to join a cluster: start it with the setting catalog, or run `hiss migrate` again"
        )
    server.run(lambda stop: server.serve(boot.paths, counters, node=0, ready=boot.ready, stop=stop))


def _main_of_cluster(boot: Boot, settings: Settings, counters: Counters) -> None:
    # A node alone starts without the engine's driver.
    from ingest.cluster import node
    from ingest.cluster.join import Joining
    from ingest.cluster.log import Diverged, Fenced, Left

    key = NodeKey.load_or_create(boot.paths.node_key)
    scheme = "https" if settings.tls else "http"
    reached = {name: f"{scheme}://{settings.advertised}:{port}" for name, port in boot.ports.items()}
    options = node.NodeOptions(
        url=settings.catalog,
        joining=Joining(settings.node_name, key.fingerprint),
        domain=settings.failure_domain,
        s3=reached["s3"],
        control=reached["control"],
        dav=reached["dav"],
    )
    load = LoadMeter(settings, counters, SandboxFile(boot.paths.sandbox, settings.kernels))

    async def serving(stop: asyncio.Event) -> None:
        await node.serve(boot.paths, counters, options, load=load, ready=boot.ready, stop=stop)

    try:
        server.run(serving)
    except (ClusterRefused, Fenced, Diverged) as error:
        log.error("%s", error)
        if isinstance(error, Left) and _serves(boot):
            # It is not to answer from what it knew, and nothing it takes can be committed: the supervisor, our parent, ends the
            # node, and without grace (the second signal). A start fails by itself.
            os.kill(os.getppid(), signal.SIGTERM)
            os.kill(os.getppid(), signal.SIGINT)
        with contextlib.suppress(OSError):
            logging.shutdown()
        os._exit(1)


def _serves(boot: Boot) -> bool:
    """Whether the node has started, and is not stopping."""
    try:
        return bool(json.loads(boot.paths.processes.read_bytes())["state"] == "serving")
    except (OSError, ValueError, KeyError):
        return False


class LoadMeter:
    """What this node says of itself with each heartbeat, from the counters of all its processes."""

    def __init__(self, settings: Settings, counters: Counters, sandbox: SandboxFile) -> None:
        self._sandbox = sandbox
        self._capacity_bytes = settings.buffer_bytes
        self._ingest_bytes_per_s = settings.ingest_bytes_per_s
        self._reader = Reader(counters)
        self._received = -1.0
        self._at = 0.0

    def __call__(self) -> Load:
        now = asyncio.get_running_loop().time()
        received = self._reader.value("hiss_ingest_received_bytes_total")
        rate = (received - self._received) / (now - self._at) if self._received >= 0 and now > self._at else 0.0
        self._received, self._at = received, now
        return Load(
            capacity_bytes=self._capacity_bytes,
            buffered_bytes=int(self._reader.value("hiss_buffer_used_bytes")),
            held_bytes=int(self._reader.value("hiss_reserved_held_bytes")),
            receiving_bytes_per_s=int(max(0.0, rate)),
            bodies=int(self._reader.value("hiss_ingest_active_streams")),
            log_format=LOG_FORMAT,
            kernels=self._sandbox.read()["state"] not in ("off", Verdict.REFUSED.value),
            ingest_bytes_per_s=self._ingest_bytes_per_s,
        )
