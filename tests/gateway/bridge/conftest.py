"""A real IOC and a real device server on loopback, each a process that can be stopped, and the bridge processes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

IOC = """
import json, sys, threading
from p4p.nt import NTEnum, NTScalar
from p4p.server import Server
from p4p.server.thread import SharedPV

journal = open(sys.argv[1], "a", buffering=1)

class Put:
    def put(self, pv, op):
        value = op.value()
        if op.name().endswith("LIMITED") and value > 5:
            op.done(error="above the drive limit")
            return
        pv.post(value)
        journal.write(json.dumps([op.name(), float(value)]) + "\\n")
        op.done()

pvs = {
    "BL1:ATT": SharedPV(nt=NTScalar("d"), initial=-1.0, handler=Put()),
    "BL1:COUNT": SharedPV(nt=NTScalar("i"), initial=-1, handler=Put()),
    "BL1:SHUTTER": SharedPV(nt=NTEnum(), initial={"index": 0, "choices": ["Closed", "Open"]}, handler=Put()),
    "BL1:LIMITED": SharedPV(nt=NTScalar("d"), initial=0.0, handler=Put()),
    "BL1:NAME": SharedPV(nt=NTScalar("s"), initial="x", handler=Put()),
}
conf = {"EPICS_PVAS_INTF_ADDR_LIST": "127.0.0.1", "EPICS_PVAS_SERVER_PORT": "0", "EPICS_PVAS_BROADCAST_PORT": "0",
        "EPICS_PVAS_AUTO_BEACON_ADDR_LIST": "NO"}
with Server(providers=[pvs], conf=conf, useenv=False) as server:
    print(json.dumps(server.conf()), flush=True)
    threading.Event().wait()
"""

DEVICE_SERVER = """
import json, sys
import tango
from tango.server import Device, attribute, run

journal = open(sys.argv[1], "a", buffering=1)

def note(name, value):
    journal.write(json.dumps([name, value]) + "\\n")

class Shutter(Device):
    _position, _number, _is_open = -1.0, 0, False

    @attribute(dtype=float)
    def position(self):
        return self._position

    @position.write
    def position(self, value):
        if value > 50:
            raise RuntimeError("beyond the end switch")
        self._position = value
        note("position", value)

    @attribute(dtype=int)
    def number(self):
        return self._number

    @number.write
    def number(self, value):
        self._number = value
        note("number", value)

    @attribute(dtype=bool)
    def is_open(self):
        return self._is_open

    @is_open.write
    def is_open(self, value):
        self._is_open = value
        note("is_open", value)

    @attribute(dtype=float)
    def fixed(self):
        return 1.0

endpoint = f"giop:tcp:127.0.0.1:{sys.argv[2]}"
run([Shutter], args=["Shutter", "test", "-ORBendPoint", endpoint, "-nodb", "-dlist", "test/nodb/shutter"],
    post_init_callback=lambda: print("{}", flush=True))
"""

BRIDGE = """
import importlib, logging, pathlib, sys
from gateway.bridge.server import run
scheme, path = sys.argv[1:]
logging.basicConfig()
driver = getattr(importlib.import_module(f"gateway.bridge.{scheme}"), f"{scheme.title()}Driver")
run(pathlib.Path(path), driver(), lambda: print("{}", flush=True))
"""


@dataclasses.dataclass
class Peer:
    """A control system's server: ``environment`` leads a client to it, ``target`` makes a target's name."""

    process: subprocess.Popen[str]
    journal: Path
    environment: dict[str, str]
    target: Callable[[str], str]

    def written(self, name: str = "") -> list[float]:
        """What was written, in order."""
        lines = self.journal.read_text().splitlines()
        return [float(value) for one, value in map(json.loads, lines) if name in ("", one)]

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        try:
            # The signal is sent; a thread that has a core goes on until it sees it.
            threads = Path(f"/proc/{self.process.pid}/task")
            while any(_state(one) not in "TX" for one in threads.iterdir()):
                time.sleep(0.001)
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


def start(
    program: str, *arguments: str, environment: dict[str, str] | None = None
) -> tuple[subprocess.Popen[str], Any]:
    """A process that prints one line of JSON once it serves."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, env=environ, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    while line and not line.startswith("{"):
        line = process.stdout.readline()
    assert line, "it ended before it served"
    return process, json.loads(line)


def _state(thread: Path) -> str:
    """Of a thread, as proc(5) has it; X where it is gone."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def need(package: str, extra: str) -> None:
    """Skip where an optional library is missing; in CI it must be there."""
    if importlib.util.find_spec(package) is None:
        if os.environ.get("CI") != "true":
            pytest.skip(f"{package} is not installed: pip install hiss-gateway[{extra}]")
        pytest.fail(f"{package} is not installed")


@contextlib.contextmanager
def serve_ioc(folder: Path) -> Iterator[Peer]:
    need("p4p", "epics")
    (folder / "epics").touch()
    process, conf = start(IOC, str(folder / "epics"))
    environment = {
        "EPICS_PVA_NAME_SERVERS": f"127.0.0.1:{conf['EPICS_PVAS_SERVER_PORT']}",
        "EPICS_PVA_AUTO_ADDR_LIST": "NO",
        "EPICS_PVA_ADDR_LIST": "",
    }
    try:
        yield Peer(process, folder / "epics", environment, lambda name: f"epics:{name}")
    finally:
        end(process)


@pytest.fixture(scope="session")
def running_ioc() -> Callable[[Path], contextlib.AbstractContextManager[Peer]]:
    """``with running_ioc(folder) as peer``: an EPICS PVAccess server with ``BL1:*`` variables."""
    return serve_ioc


@pytest.fixture
def ioc(tmp_path: Path) -> Iterator[Peer]:
    with serve_ioc(tmp_path) as peer:
        yield peer


@pytest.fixture
def device_server(tmp_path: Path) -> Iterator[Peer]:
    """A Tango device server without a database; its device has writable attributes."""
    need("tango", "tango")
    (tmp_path / "tango").touch()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process, _ = start(DEVICE_SERVER, str(tmp_path / "tango"), str(port))
    yield Peer(
        process, tmp_path / "tango", {}, lambda name: f"tango://127.0.0.1:{port}/test/nodb/shutter/{name}#dbase=no"
    )
    end(process)


Bridge = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    """``bridge(scheme, path, environment)``: a bridge process that listens at ``path``."""
    processes = []

    def begin(scheme: str, path: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
        process, _ = start(BRIDGE, scheme, str(path), environment=environment)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        end(process)
