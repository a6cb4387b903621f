"""A real node that is killed: ``hiss serve`` and its processes, by pid.

In: a folder, settings, an environment. Out: ``Node``. Always holds: every wait has a deadline; every process that is started here
is ended by ``end``.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway.boot import die_with_parent
from ingest.catalog import rows
from ingest.catalog.reader import Reader
from ingest.paths import NodePaths
from ingest.records import ObjectRecord

ROOT = {
    "HISS_ROOT_ACCESS_KEY": "CRASHTESTROOTKEY0001",
    "HISS_ROOT_SECRET_KEY": "crash-test-root-secret-0000000000000001",
}
SETTINGS = {
    "workers": "2",
    "segment_bytes": "16MiB",
    "arena_region_bytes": "16MiB",
    "arena_bytes": "256MiB",
    "buffer_bytes": "1GiB",
    "kernels": "off",
    "shutdown_grace_s": "20",
    "restart_delay_max_s": "0.2",  # they die by dozens
}


def until(condition: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = 90.0) -> Any:
    """Poll until ``condition`` gives something true, and return it; fails with ``what`` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out: {what() if callable(what) else what}"
        time.sleep(0.02)
    return value


class Node:
    """``hiss serve`` on a folder of its own. ``environ`` and ``settings`` may be changed between starts."""

    host = "127.0.0.1"
    ports = (0, 0, 0)
    """S3, control, WebDAV; 0: a free one."""
    launcher: Sequence[str] = ()
    """A command before the node's own."""

    def __init__(self, folder: Path, environ: dict[str, str] | None = None, **settings: str) -> None:
        self.paths = NodePaths(folder / "data")
        self.log = folder / "log"
        self.environ = environ or {}
        self.settings = {**SETTINGS, **settings}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.process is None
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HISS_")}
        command = [*self.launcher, sys.executable, "-m", "gateway.cli", "serve", "--data", str(self.paths.root)]
        command += ["--host", self.host]
        for name, port in zip(("s3", "control", "dav"), self.ports, strict=True):
            command += [f"--{name}-port", str(port)]
        for name, value in self.settings.items():
            command += ["--set", f"{name}={value}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**environ, **ROOT, **self.environ},
                # A node never outlives the tests, however these end.
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def status(self) -> dict[str, Any]:
        try:
            document = dict(json.loads(self.paths.processes.read_text()))
        except (FileNotFoundError, ValueError):
            return {"pid": 0, "state": "absent", "processes": []}
        # After a SIGKILL the file of the last node is still there for a moment.
        return document if self.process and document["pid"] == self.process.pid else {"state": "old", "processes": []}

    def rows(self, role: str) -> list[dict[str, Any]]:
        return [row for row in self.status()["processes"] if row["role"] == role]

    def ready(self, timeout_s: float = 120.0) -> None:
        """Wait until the node serves and every process of it is ready."""

        def serves() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the node ended: {self.tail()}"
            status = self.status()
            return status["state"] == "serving" and all(row["state"] == "ready" for row in status["processes"])

        until(serves, lambda: f"every process is ready: {self.status()}\n{self.tail()}", timeout_s)

    def port(self, name: str = "s3") -> int:
        return int(json.loads(self.paths.ports.read_text())[name])

    def connection(self, timeout_s: float, name: str = "s3") -> http.client.HTTPConnection:
        """To one of its ports; made when it is first used."""
        return http.client.HTTPConnection(self.host, self.port(name), timeout=timeout_s)

    def kill(self, role: str, slot: int = 0) -> None:
        """SIGKILL the process of a role; nothing happens when it is between two lives."""
        found = [row["pid"] for row in self.rows(role) if row["pid"]]
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[slot % len(found)], signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL the supervisor; the kernel kills its children with it."""
        assert self.process is not None
        pids = [row["pid"] for row in self.status()["processes"] if row["pid"]]
        self.process.kill()
        self.process.wait(30)
        self.process = None
        until(lambda: not any(_alive(pid) for pid in pids), "the children died with the supervisor")

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process = None
        assert code == 0, f"the node stopped with {code}: {self.tail()}"

    def end(self) -> None:
        """Whatever state it is in: nothing of it runs afterwards."""
        if self.process is not None and self.process.poll() is None:
            self.kill_all()
        self.process = None

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def catalogue(self) -> contextlib.closing[Reader]:
        return contextlib.closing(Reader(rows.connect(self.paths.catalogue, read_only=True), 0))

    def records(self) -> list[ObjectRecord]:
        with self.catalogue() as reader:
            found: list[ObjectRecord] = []
            for bucket in reader.buckets():
                listed, _ = reader.list_objects(bucket.name, b"", b"", b"", 100_000)
                found += [row.record for row in listed if row.record is not None]
        return found

    def lost(self) -> set[tuple[str, str, str]]:
        """(bucket, key, crc64nvme) of every ``memory`` object the node said it lost."""
        file = self.paths.root / "lost-objects.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {(line["bucket"], line["key"], line["crc64nvme"]) for line in lines}


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
