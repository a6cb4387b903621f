"""A control port on loopback: the real application on uvicorn, over a real catalogue process's server and real counters."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from gateway.access import authenticator, sight_maker
from gateway.control import process
from gateway.control.app import ControlContext, create_app
from gateway.control.feedback.director import ActionDirector
from gateway.control.feedback.exchange import Exchange, Outlets
from gateway.control.feedback.executors import Executors
from gateway.control.feedback.hub import FeedbackHub
from gateway.control.feedback.peers import Peers
from gateway.control.feedback.zeromq import ZmqPublisher
from gateway.control.nodes import NodeSource
from gateway.control.paces import KernelPaces
from gateway.control.status import ProcessFile, Rates, SandboxFile, StatusSource
from gateway.metrics import Exposition, NodeCollector, Reader
from gateway.tls import tls_context
from ingest.catalog import server as catalogue
from ingest.catalog.client import CatalogClient
from ingest.cluster.members import Members
from ingest.cluster.signing import PeerKey
from ingest.counters import CATALOGUE, CONTROL, Counters
from ingest.paths import NodePaths
from ingest.records import ArchiveCopy, CommitObject, Extent, FrameLedger, Grant, ObjectRecord, UserRecord
from kernels.admission import Room
from s3api.auth.rules import Gate
from s3api.auth.users import CatalogUsers

ROOT = ("ROOTKEY", "root-secret")
PEER_KEY = PeerKey.derived(b"a key of all nodes, of 32 bytes.")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], Any]]:
    return {"uvloop": uvloop.new_event_loop}


@dataclasses.dataclass
class ControlNode:
    """``health`` is what the injected check answers; ``counters_fd`` leads to every process slot."""

    paths: NodePaths
    catalog: CatalogClient
    hub: FeedbackHub
    actions: ActionDirector
    rates: Rates
    counters_fd: int
    port: int
    tls: ssl.SSLContext | None = None
    health: Any = (True, {"workers_ready": 2})
    stop: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    secrets: dict[bytes, str] = dataclasses.field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://localhost:{self.port}"

    def client(self, auth: tuple[str, str] | None = ROOT) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, auth=auth, timeout=60, verify=self.tls or True)

    async def check(self) -> tuple[bool, dict[str, Any]]:
        if isinstance(self.health, Exception):
            raise self.health
        if isinstance(self.health, asyncio.Event):
            await self.health.wait()
        return self.health

    def counters(self, slot: int) -> Counters:
        return Counters(self.counters_fd, slot)

    async def add_user(self, keys: tuple[str, str], *grants: Grant, **fields: Any) -> tuple[str, str]:
        sealed = secrets.token_bytes(8)
        self.secrets[sealed] = keys[1]
        await self.catalog.put_user(UserRecord(keys[0].lower(), keys[0], keys[0], sealed, tuple(grants), **fields))
        return keys

    async def put(
        self,
        bucket: str,
        key: bytes,
        length: int = 100,
        ledger: FrameLedger | None = None,
        reductions: tuple[str, ...] = (),
    ) -> ObjectRecord:
        """Commit an object whose bytes nobody will read."""
        extent = Extent(0, 0, 0, 1, 4096 * secrets.randbelow(1 << 40), length)
        return await self.catalog.commit(
            CommitObject(
                bucket=bucket, key=key, object_id=secrets.token_bytes(16), length=length, etag="0" * 32 + "-1",
                crc64nvme=7, owner="root", extents=(extent,), ledger=ledger,
                reductions=reductions,
            )
        )  # fmt: skip

    async def archive(self, record: ObjectRecord) -> None:
        await self.catalog.claim_drain(1000, 60)
        await self.catalog.drained(record.object_id, ArchiveCopy("posix", "a/b", record.crc64nvme, 1))


Start = Callable[..., Awaitable[ControlNode]]


def member(folder: Path, number: int, outlets: Outlets) -> tuple[NodePaths, Executors, Exchange]:
    """What a control process of a cluster has more than one alone."""
    own = NodePaths(folder / f"node-{number}")
    own.create()
    source = f"{number}:{secrets.token_hex(4)}"
    return own, Executors(outlets, Members(own).look), Exchange(number, source, outlets)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """``await start(tls=…, globs=…, schemes=…, publisher=…, number=…, **hub settings)``: a running control port; it ends with
    the test. ``number``: it is a node of a cluster, whose members the test writes into its folder."""
    paths = NodePaths(tmp_path / "node")
    ready, stop_catalogue = asyncio.Event(), asyncio.Event()
    writer = asyncio.create_task(
        catalogue.serve(paths, Counters(None, CATALOGUE), node=0, ready=ready.set, stop=stop_catalogue)
    )
    await ready.wait()
    counters_fd = Counters.create()
    running: list[tuple[ControlNode, asyncio.Task[None]]] = []
    work: list[asyncio.Task[None]] = []
    async with CatalogClient(paths) as catalog:

        async def make(
            *,
            tls: tuple[Path, Path] | None = None,
            globs: tuple[str, ...] = (),
            schemes: tuple[str, ...] = (),
            publisher: Callable[[Counters], ZmqPublisher] | None = None,
            number: int | None = None,
            **hub_settings: Any,
        ) -> ControlNode:
            counters = Counters(counters_fd, CONTROL)
            own, executors = paths, None
            if number is not None:
                own, executors, hub_settings["exchange"] = member(tmp_path, number, Outlets(globs, schemes))
            actions = ActionDirector(catalog, counters, globs=globs, schemes=schemes, paths=own, executors=executors)
            zmq = publisher(counters) if publisher is not None else None
            hub = FeedbackHub(counters, director=actions, publisher=zmq, **hub_settings)
            if executors is not None:
                hub.peers = Peers(Members(own), PEER_KEY, hub, actions, executors)
                work.append(asyncio.create_task(hub.peers.run()))
            actions.notify = hub.notice
            work.append(asyncio.create_task(actions.run()))
            if zmq is not None:
                work.append(asyncio.create_task(zmq.run()))
            await hub.listen(own.feedback_socket)
            listener = socket.create_server(("127.0.0.1", 0))
            rates = Rates(Reader(counters))
            node = ControlNode(own, catalog, hub, actions, rates, counters_fd, listener.getsockname()[1])
            if tls is not None:
                node.tls = ssl.create_default_context(cafile=tls[0])
            await node.add_user(ROOT, root=True)

            processes = ProcessFile(paths.processes)
            settings = {"workers": 2, "host": "0.0.0.0"}
            context = ControlContext(
                version="1.2.3",
                catalog=catalog,
                authenticate=authenticator(CatalogUsers(catalog, lambda _, key: node.secrets[key.secret])),
                sight_of=sight_maker(Gate(catalog), time.time),
                check=node.check,
                status=StatusSource(
                    Reader(counters),
                    node.rates,
                    processes,
                    catalog,
                    settings,
                    "1.2.3",
                    SandboxFile(paths.sandbox, "on"),
                ),
                nodes=NodeSource(
                    catalog, Members(paths), Reader(counters), name="lab", capacity_bytes=1 << 30, version="1.2.3"
                ),
                metrics=Exposition(NodeCollector(counters, "1.2.3", processes.rows)),
                feedback=hub,
                run_folder=paths.run,
                actions=actions,
                offers=lambda: (),
                paces=KernelPaces(paths.run, Room(2, 2)),
                peers=PEER_KEY if number is not None else None,
            )
            accepting = asyncio.Event()
            served = process.serve(
                create_app(context),
                listener,
                stop=node.stop,
                tls=tls_context(*tls) if tls else None,
                ready=accepting.set,
                stopping=hub.close,
            )
            running.append((node, asyncio.create_task(served)))
            await accepting.wait()
            return node

        yield make
        for node, task in running:
            node.stop.set()
            await asyncio.wait_for(task, 60)
        for task in work:
            task.cancel()
        for ended in await asyncio.gather(*work, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended
    stop_catalogue.set()
    await writer
    os.close(counters_fd)


@pytest.fixture
async def node(start: Start) -> ControlNode:
    return await start()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) for localhost, signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return certificate, key


@pytest.fixture
def write_processes() -> Callable[[ControlNode, list[dict[str, Any]]], None]:
    def write(node: ControlNode, rows: list[dict[str, Any]]) -> None:
        document = {"pid": os.getpid(), "state": "serving", "since_ns": 1, "processes": rows}
        node.paths.processes.write_text(json.dumps(document))

    return write
