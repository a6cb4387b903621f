"""Real little nodes for the composition root's tests: a supervisor process with children that are a few lines each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NODE_PROGRAM = """
import asyncio, json, sys
from gateway import logging as gateway_logging
from gateway.settings import load
from gateway.supervisor.node import RoleFailed, Supervisor
from gateway.supervisor.resources import NodeRefused
from gateway.supervisor.table import Role

asked = json.loads(sys.argv[1])
settings = load(asked["settings"], environ={}).settings
gateway_logging.setup("debug", "text", role="supervisor")
roles = [
    Role(
        one["role"], tuple(one.get("slots", [0])), one.get("stage", 0), essential=one.get("essential", True),
        barrier=one.get("barrier", False),
        listeners=frozenset(one.get("listeners", [])), arena=one.get("arena", False),
        command=lambda role, fd, how=one["how"]: [sys.executable, asked["child"], how, asked["journal"], str(fd)],
    )
    for one in asked["roles"]
]
try:
    asyncio.run(Supervisor(settings, roles).run())
except (NodeRefused, RoleFailed) as error:
    sys.exit(f"refused: {error}")
"""

CHILD_PROGRAM = """
import json, os, signal, sys, time
from gateway.boot import load

how, journal, fd = sys.argv[1:]
boot = load(int(fd))

def note(what, **more):
    line = json.dumps({"role": boot.role, "slot": boot.slot, "what": what, "pid": os.getpid(), **more})
    with open(journal, "a") as file:
        file.write(line + "\\n")

def stop(*_):
    note("stopped")
    sys.exit(0)

signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "stubborn" else stop)
if how == "unready":
    note("dead")
    sys.exit(7)
if how == "silent":
    note("silent")
    time.sleep(60)
note("started", epoch=boot.epoch, restarts=boot.restarts, regions=len(boot.regions), fds=boot.descriptors(),
     environment=sorted(name for name in os.environ if name.startswith("HISS_")))
boot.ready()
if how == "crasher":
    sys.exit(3)
if how == "counter":
    held = os.pread(boot.span_table, 8, 0)
    os.pwrite(boot.span_table, (int.from_bytes(held, "little") + 1).to_bytes(8, "little"), 0)
    note("count", before=int.from_bytes(held, "little"))
time.sleep(60)
"""


def until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Poll until ``condition`` gives something true, and return it; fails with ``what`` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)
    return value


class LittleNode:
    """A running supervisor over test children. ``notes`` are what the children wrote down, in order."""

    def __init__(self, folder: Path, roles: list[dict[str, Any]], environ: dict[str, str], **settings: Any) -> None:
        self.data_dir = folder / "data"
        self.journal = folder / "notes"
        (folder / "node.py").write_text(NODE_PROGRAM)
        (folder / "child.py").write_text(CHILD_PROGRAM)
        asked = {
            "settings": {
                "data_dir": str(self.data_dir),
                "host": "127.0.0.1",
                "workers": 1,
                "arena_region_bytes": "16MiB",
                "arena_bytes": "64MiB",
                **dict.fromkeys(("s3_port", "control_port", "dav_port"), 0),
                **settings,
            },
            "child": str(folder / "child.py"),
            "journal": str(self.journal),
            "roles": roles,
        }
        self.log = folder / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(folder / "node.py"), json.dumps(asked)], stderr=log, env={**os.environ, **environ}
            )

    def notes(self, what: str | None = None) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [note for note in map(json.loads, lines) if what in (None, note["what"])]

    def processes(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.data_dir / "run" / "processes.json").read_text()))
        except FileNotFoundError:
            return {"state": "absent", "processes": []}

    def serving(self) -> dict[str, Any]:
        def state() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.log.read_text()
            status = self.processes()  # after a SIGKILL those of the last node are still there for a moment
            return status if status["state"] == "serving" and status["pid"] == self.process.pid else None

        return dict(until(state, "the node serves"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def little_node(tmp_path: Path) -> Iterator[Callable[..., LittleNode]]:
    """Start a node: ``little_node(roles, environ={…}, **settings)``; whatever still runs at the end is killed."""
    nodes: list[LittleNode] = []

    def start(roles: list[dict[str, Any]], *, environ: dict[str, str] | None = None, **settings: Any) -> LittleNode:
        nodes.append(LittleNode(tmp_path, roles, environ or {}, **settings))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.process.kill()
            node.process.wait()


def gone(pid: int) -> bool:
    """Whether the process is dead (a zombie that nobody has reaped yet counts as dead)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


@pytest.fixture(scope="session")
def poll() -> Callable[..., Any]:
    return until


@pytest.fixture(scope="session")
def is_gone() -> Callable[[int], bool]:
    return gone
