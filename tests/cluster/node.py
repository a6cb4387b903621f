"""Nodes of a cluster, each in a network namespace, and the engine in another: started, killed, frozen, cut off.

In: a ``Network``. Out: ``Cluster`` and its ``ClusterNode``s. Always holds: every process and mount of a cluster is gone after
``end``; clients reach nodes over the network, from a host of their own.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.netns import Host, Network
from ingest.cluster.members import Member, Members
from tests.cluster.acquaintance import know_each_other
from tests.crash.node import Node, until
from tests.engine import Engine

PORTS = (9000, 9001, 9002)
ENGINE_PORT = 5432
_MOUNT = "hiss-test-"
"""Names of mounts begin so, with the pid of who made them."""
SETTINGS = {
    "workers": "1",
    "segment_bytes": "16MiB",
    "arena_region_bytes": "16MiB",
    "arena_bytes": "96MiB",
    "buffer_bytes": "1GiB",
    "kernels": "off",
    "shutdown_grace_s": "20",
    "restart_delay_max_s": "0.2",
}


class ClusterNode(Node):
    """``hiss serve`` on a host of the network. Requests come from the host ``clients``."""

    ports = PORTS

    def __init__(
        self, folder: Path, host: Host, clients: Host, environ: dict[str, str] | None = None, **settings: str
    ) -> None:
        super().__init__(folder, environ, **{**SETTINGS, **settings})
        self.name = host.name
        self.link = host
        self.host = host.address
        self.launcher = host.launcher
        self._clients = clients
        self.flag = folder / "crashpoint"
        self.environ = {"HISS_CRASHPOINT_ONCE": str(self.flag), **self.environ}

    def __repr__(self) -> str:
        return f"node {self.name}"

    def port(self, name: str = "s3") -> int:
        """Known before it starts, and whether or not it runs."""
        return self.ports[("s3", "control", "dav").index(name)]

    def connection(self, timeout_s: float, name: str = "s3") -> http.client.HTTPConnection:
        return _Connection(self._clients, self.host, self.port(name), timeout_s)

    def members(self) -> tuple[Member, ...]:
        """Who is in the cluster, as this node's processes know it."""
        return Members(self.paths).all()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's series with these labels, from /metrics."""
        with contextlib.closing(self.connection(10, "control")) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if re.split("[{ ]", line, maxsplit=1)[0] == name and all(part in line for part in wanted)
        )

    def pids(self) -> list[int]:
        """Every process of the node, its supervisor first."""
        return [] if self.process is None else _tree(self.process.pid)

    def kill_node(self) -> None:
        """SIGKILL everything at once, as a host's power goes."""
        assert self.process is not None
        pids = self.freeze()
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        self.process.wait(30)
        self.process = None
        until(lambda: not any(_lives(pid) for pid in pids), "the node's processes are gone")

    def tail(self, lines: int = 60) -> str:
        """Without the requests: there are thousands."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join([line for line in text if "INFO" not in line or "access" not in line][-lines:])

    def arm(self, point: str, how: str = "") -> None:
        """The next process of this node that passes the point dies there; ``how`` "stop": it is frozen there."""
        draft = self.flag.with_suffix(".draft")
        draft.write_text(f"{point} {how}".strip())
        draft.rename(self.flag)

    def freeze(self) -> list[int]:
        """SIGSTOP every process; those that are born meanwhile too."""
        stopped: list[int] = []
        while fresh := [pid for pid in self.pids() if pid not in stopped]:
            for pid in fresh:
                _signal(pid, signal.SIGSTOP)
            stopped += fresh
        return stopped

    def thaw(self) -> None:
        for pid in self.pids():
            _signal(pid, signal.SIGCONT)

    def end(self) -> None:
        if self.running:
            self.kill_node()
        self.process = None


class _Connection(http.client.HTTPConnection):
    """A connection whose socket belongs to the clients' namespace."""

    def __init__(self, source: Host, address: str, port: int, timeout_s: float) -> None:
        super().__init__(address, port, timeout=timeout_s)
        self._source = source

    def connect(self) -> None:
        with self._source.entered():
            super().connect()


class Cluster:
    """An engine and nodes that share an archive and a node key. ``start`` makes all of it serve; ``end`` leaves nothing."""

    def __init__(
        self, folder: Path, network: Network, bin_folder: Path, names: Sequence[str] = ("a", "b", "c"), **settings: str
    ) -> None:
        _sweep_mounts()
        self.folder = folder
        self.network = network
        self.clients = network.host("clients")
        engine_host = network.host("engine")
        self.engine = Engine(engine_host.address, ENGINE_PORT, engine_host.launcher, bin_folder=bin_folder)
        self.engine_link = engine_host
        self.archive = folder / "archive"
        self.archive.mkdir()
        self.key = folder / "node.key"
        with open(os.open(self.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(32))
        self.settings = settings
        self.nodes: list[ClusterNode] = []
        self._mounts: list[Path] = []
        self.used: list[str] = []
        """Names that tests have given their buckets."""
        for name in names:
            self.add(name)

    def add(
        self, name: str, environ: dict[str, str] | None = None, disk_bytes: int | None = None, **settings: str
    ) -> ClusterNode:
        """One more node, not started. ``disk_bytes``: it gets a file system of its own of that size."""
        folder = self.folder / name
        data = folder / "data"
        data.mkdir(parents=True, mode=0o700)
        if disk_bytes is not None:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={disk_bytes},mode=700", f"{_MOUNT}{os.getpid()}-{name}", data],
                check=True,
            )
            self._mounts.append(data)
        shutil.copy2(self.key, data / "node.key")
        its = {
            "catalog": self.engine.dsn(),
            "node_name": name,
            "archive_dir": str(self.archive),
            **self.settings,
            **settings,
        }
        node = ClusterNode(folder, self.network.host(name), self.clients, environ, **its)
        self.nodes.append(node)
        return node

    def __getitem__(self, name: str) -> ClusterNode:
        return next(node for node in self.nodes if node.name == name)

    def start(self) -> None:
        """The engine, then every node that does not run; all are ready on return."""
        if not self.engine.running:
            self.engine.start()
        for node in self.nodes:
            if not node.running:
                node.start()
        self.ready()

    def ready(self) -> None:
        for node in self.nodes:
            node.ready()
        know_each_other(self.nodes)

    def stop(self) -> None:
        """Every node with SIGTERM, all at once; each must end well."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(ClusterNode.stop, [node for node in self.nodes if node.running]))

    def end(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(Exception):  # the others must end too
                node.end()
        self.engine.end()
        for mount in self._mounts:
            subprocess.run(["umount", "--lazy", mount], check=False)


@contextlib.contextmanager
def ended(cluster: Cluster) -> Iterator[Cluster]:
    try:
        yield cluster
    except BaseException:
        for node in cluster.nodes:
            print(
                f"--- {node.name}\n{node.tail(80)}" if node.log.exists() else f"--- {node.name}: never started",
                file=sys.stderr,
            )
        raise
    finally:
        cluster.end()


def _sweep_mounts() -> None:
    """Remove what runs left behind that were killed."""
    for line in Path("/proc/mounts").read_text().splitlines():
        source, target, *_ = line.split()
        if source.startswith(_MOUNT) and not Path(f"/proc/{source.removeprefix(_MOUNT).split('-')[0]}").exists():
            subprocess.run(["umount", "--lazy", target], check=False)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                with contextlib.suppress(OSError):
                    found += map(int, (task / "children").read_text().split())
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
