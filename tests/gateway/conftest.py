"""Real little nodes for the composition root's tests: a supervisor process with children that are a few lines each."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.boot import die_with_parent
from gateway.cli import main
from kernels.offline import zygote

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


def until(condition: Callable[[], Any], what: str, timeout_s: float = 90.0) -> Any:
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
        return self.process.wait(60)


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


class RealNode:
    """``hiss serve`` on a folder of its own, ports picked free, small."""

    def __init__(self, folder: Path, *flags: str, launcher: Sequence[str] = ()) -> None:
        """``launcher``: a program that changes something and then becomes the command after it."""
        self.data_dir = folder / "data"
        self._flags = flags
        self._launcher = launcher
        self.users_file = folder / "users.toml"
        self.users_file.touch(mode=0o600)
        self.log = folder / "log"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._keys: dict[str, str] = {}
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HISS_")}
        sizes = ("--set", "arena_region_bytes=16MiB", "--set", "arena_bytes=64MiB", "--set", "buffer_bytes=1GiB")
        sizes += ("--set", "restart_delay_max_s=0.2")
        command = [*self._launcher, sys.executable, "-m", "gateway.cli", "serve", "--data", str(self.data_dir)]
        command += [
            "--host",
            "127.0.0.1",
            "--s3-port",
            "0",
            "--control-port",
            "0",
            "--dav-port",
            "0",
            "--workers",
            "1",
            *sizes,
            *self._flags,
        ]
        command += ["--users", str(self.users_file)]
        with self.log.open("ab") as log:
            # A node never outlives the tests, however these end.
            ends_with_us = functools.partial(die_with_parent, os.getpid())
            return subprocess.Popen(command, stdout=log, stderr=log, env=environ, preexec_fn=ends_with_us)

    def again(self) -> None:
        """Start it anew on the same folder."""
        assert self.process.poll() is not None
        self.process = self._start()
        self.healthy()

    def ports(self) -> dict[str, Any]:
        return dict(json.loads((self.data_dir / "run" / "ports.json").read_text()))

    def processes(self) -> list[dict[str, Any]]:
        return list(json.loads((self.data_dir / "run" / "processes.json").read_text())["processes"])

    def url(self, name: str) -> str:
        ports = self.ports()
        return f"{'https' if ports['tls'] else 'http'}://127.0.0.1:{ports[name]}"

    def healthy(self) -> None:
        """Wait for a 200 of /v1/health."""

        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError, FileNotFoundError):
                if self.ports()["pid"] == self.process.pid:
                    return httpx.get(self.url("control") + "/v1/health", verify=False, timeout=5).status_code == 200
            return False

        until(answers, "the node is healthy", 120)

    def hiss(self, *arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command against this node."""
        return run_hiss(*arguments, "--data", str(self.data_dir), environ=environ)

    def keys(self) -> dict[str, str]:
        """Of root; asked once in a life of the node: a command takes a second."""
        if not self._keys:
            self._keys = dict(json.loads(self.hiss("user", "show-root", "--json").stdout))
        return self._keys

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def run_hiss(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HISS_")}
    command = [sys.executable, "-m", "gateway.cli", *arguments]
    return subprocess.run(
        command, env={**clean, **(environ or {})}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="session")
def hiss() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``hiss ARGUMENTS`` in a process of its own, without HISS_ variables but those given."""
    return run_hiss


@contextlib.contextmanager
def real_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RealNode]]:
    nodes: list[RealNode] = []

    def start(*flags: str, launcher: Sequence[str] = ()) -> RealNode:
        nodes.append(RealNode(tmp_path_factory.mktemp("node"), *flags, launcher=launcher))
        nodes[-1].healthy()
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.process.kill()
            node.process.wait()
        # Its segments are gigabytes; its log stays.
        shutil.rmtree(node.data_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def start_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RealNode]]:
    """Start real nodes: ``start_node("--tls-cert", …)``, healthy on return; they end with the module."""
    with real_nodes(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="package")
def real_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealNode]:
    """One node for every test that leaves it running and healthy."""
    with real_nodes(tmp_path_factory) as start:
        yield start()


@dataclasses.dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process: a new one would take a second each."""

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["hiss", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ran(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def warm_zygote() -> Iterator[str]:
    with zygote.private_zygote() as socket:
        yield socket


@pytest.fixture
def quick(here: Callable[..., Ran], warm_zygote: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """As ``here``, without seconds of warming a fork server up for every command."""
    monkeypatch.setattr(zygote, "private_zygote", lambda: contextlib.nullcontext(warm_zygote))
    return here


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hiss test")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"
