"""A gateway to measure: started as an operator would, in a folder of its own on a real disk, stopped with SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.wire import Connection, Endpoint, head

START_TIMEOUT_S = 120.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Node:
    def __init__(self, data: Path, process: subprocess.Popen[bytes], endpoint: Endpoint, ports: dict[str, int]) -> None:
        self.data = data
        self.endpoint = endpoint
        self.ports = ports
        self._process = process

    def processes(self) -> dict[int, str]:
        """pid -> role of every process of the node."""
        listed = json.loads((self.data / "run" / "processes.json").read_text())
        found = {int(entry["pid"]): str(entry["role"]) for entry in listed["processes"] if entry.get("pid")}
        return {self._process.pid: "supervisor", **found}

    def cpu_s(self) -> float:
        """User and system time of every process of the node so far, sandboxes included."""
        total = 0
        for pid in [*self.processes(), *self._grandchildren()]:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / _TICKS_PER_S

    def sandboxes(self) -> list[int]:
        """Process ids of the kernels' sandboxes."""
        return self._children([pid for pid, role in self.processes().items() if role == "zygote"])

    def _grandchildren(self) -> list[int]:
        return self._children(list(self.processes()))

    def _children(self, parents: list[int]) -> list[int]:
        pids = []
        for pid in parents:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    pids += [int(child) for child in task.read_text().split()]
        return [pid for pid in set(pids) if pid not in self.processes()]

    def resident_bytes(self) -> dict[int, tuple[int, int]]:
        """Worker pid -> (private, shared) resident bytes; the shared ones are the arena."""
        found = {}
        for pid, role in self.processes().items():
            if role == "worker":
                status = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
                )
                kib = {name: int(status[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")}
                found[pid] = ((kib["RssAnon"] + kib["RssFile"]) * 1024, kib["RssShmem"] * 1024)
        return found

    def metric(self, name: str) -> float:
        """Sum of a metric's series, from /metrics."""
        url = f"{'https' if self.endpoint.ca else 'http'}://{self.endpoint.host}:{self.ports['control']}/metrics"
        with urllib.request.urlopen(url, timeout=10, context=_trust(self.endpoint.ca)) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)

    def kill(self) -> None:
        """As a host's power goes; the kernel kills the children with the supervisor."""
        self._process.kill()
        self._process.wait(30)

    def call(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        connection = Connection(self.endpoint)
        try:
            request = head(self.endpoint, method, path, len(body), headers)
            return connection.call(request, memoryview(body) if body else None)
        finally:
            connection.close()

    def bucket(self, name: str, durability: str) -> None:
        """Make a bucket whose data stays buffered (its drain is put off), with this durability."""
        self.call("PUT", f"/{name}")
        tags = {"hiss.durability": durability, "hiss.drain-after-s": "86400"}
        rows = "".join(f"<Tag><Key>{key}</Key><Value>{value}</Value></Tag>" for key, value in tags.items())
        self.call("PUT", f"/{name}?tagging=", f"<Tagging><TagSet>{rows}</TagSet></Tagging>".encode())

    def clear(self, bucket: str) -> None:
        """Delete every object of the bucket but its kernels."""
        while True:
            connection = Connection(self.endpoint)
            connection.send(head(self.endpoint, "GET", f"/{bucket}?list-type=2", 0))
            listing = connection.answer_body().decode()
            keys = [key for key in re.findall("<Key>([^<]+)</Key>", listing) if not key.startswith("_kernels/")]
            for key in keys:
                connection.call(head(self.endpoint, "DELETE", f"/{bucket}/{key}", 0))
            connection.close()
            if not keys:
                return

    def settle(self, timeout_s: float = 60.0) -> None:
        """Wait until nothing is held in the arena but packing slabs: earlier rounds must not weigh on the next."""
        deadline = time.monotonic() + timeout_s
        while self.metric("hiss_arena_used_bytes") > 160 << 20 and time.monotonic() < deadline:
            time.sleep(0.05)


@contextlib.contextmanager
def running(
    folder: Path,
    *settings: str,
    host: str = "127.0.0.1",
    launcher: Sequence[str] = (),
    secret: str = "",
    node_key: bytes = b"",
) -> Iterator[Node]:
    """A node on free ports, in a fresh folder under ``folder`` that is removed afterwards; its log is DIR/serve.log.
    ``launcher``: a command before the node's own. Nodes of a cluster have the same ``secret`` and ``node_key``."""
    data = Path(tempfile.mkdtemp(prefix="hiss-bench-", dir=folder))
    try:
        if node_key:
            (data / "node.key").touch(mode=0o600)
            (data / "node.key").write_bytes(node_key)
        secret = secret or secrets.token_urlsafe(24)
        with started(data, secret, *settings, host=host, launcher=launcher) as node:
            yield node
    finally:
        shutil.rmtree(data, ignore_errors=True)


@contextlib.contextmanager
def started(
    data: Path, secret: str, *settings: str, ca: str = "", host: str = "127.0.0.1", launcher: Sequence[str] = ()
) -> Iterator[Node]:
    """A node on the folder ``data``, which stays; ``secret`` is root's, the same each time. ``ca``: it speaks TLS, with this
    certificate."""
    access = "bench"
    environment = {**os.environ, "HISS_ROOT_ACCESS_KEY": access, "HISS_ROOT_SECRET_KEY": secret}
    command = [*launcher, sys.executable, "-m", "gateway.cli", "serve", "--data", str(data), "--host", host]
    command += ["--s3-port", "0", "--control-port", "0", "--dav-port", "0"]
    for setting in ("log_level=warning", *settings):
        command += ["--set", setting]
    log = (data / "serve.log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        ports = _ready(data, process, ca, host)
        yield Node(data, process, Endpoint(host, ports["s3"], access, secret, ca), ports)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _trust(ca: str) -> ssl.SSLContext | None:
    return ssl.create_default_context(cafile=ca) if ca else None


def _ready(data: Path, process: subprocess.Popen[bytes], ca: str, host: str) -> dict[str, int]:
    scheme = "https" if ca else "http"
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, ValueError, KeyError):
            ports = json.loads((data / "run" / "ports.json").read_text())
            url = f"{scheme}://{host}:{ports['control']}/v1/health"
            with urllib.request.urlopen(url, timeout=5, context=_trust(ca)) as answer:
                if answer.status == 200:
                    return {name: int(ports[name]) for name in ("s3", "control", "dav")}
        time.sleep(0.1)
    raise RuntimeError(f"the node did not start:\n{(data / 'serve.log').read_text()[-3000:]}")
