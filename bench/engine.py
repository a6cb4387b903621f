"""A PostgreSQL server of our own on a folder of its own, that can be stopped, frozen and killed.

In: Debian's package, 15 or newer. Out: ``Engine``. Always holds: the server runs as an unprivileged user, flushes what it
commits, listens only where it is told to, and is gone after ``end`` or when the process that started it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

VERSION_MIN = 15
USER = "hiss"
_CONFIGURATION = """
unix_socket_directories = '{folder}'
listen_addresses = '{host}'
port = {port}
fsync = on
shared_buffers = 16MB
max_connections = 200
max_wal_size = 256MB
logging_collector = off
log_line_prefix = '%m [%p] %q%a '
"""


def programs() -> Path | None:
    """Folder of the newest server's programs that is new enough, or None."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    in_path = shutil.which("postgres")
    if in_path is not None:
        found.append(Path(in_path).resolve())
    versions = {path.parent: _version(path) for path in found if (path.parent / "initdb").exists()}
    newest = max(versions, key=lambda folder: versions[folder], default=None)
    return newest if newest is not None and versions[newest] >= VERSION_MIN else None


def _version(postgres: Path) -> int:
    said = subprocess.run([postgres, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    number = re.search(r"\) (\d+)", said)
    return int(number[1]) if number else 0


class Engine:
    """A PostgreSQL server. ``start`` and ``ready`` before use; ``end`` afterwards, whatever state it is in."""

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, launcher: Sequence[str] = (), *, bin_folder: Path | None = None
    ) -> None:
        """``launcher``: a command before the server's own, such as one that enters a namespace. ``port`` 0: a free one."""
        found = bin_folder or programs()
        assert found is not None, "PostgreSQL is not installed"
        self._bin = found
        self._launcher = launcher
        self.host = host
        self.port = port or _free_port(host)
        # Of its own: root's temporary folders are closed to the server's user, and a socket's path is short.
        self.folder = Path(tempfile.mkdtemp(prefix="hiss-engine-"))
        self.log = self.folder / "log"
        self.data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)
        self._account = pwd.getpwnam("postgres") if os.getuid() == 0 else None
        self.own(self.folder)
        self._initialise()

    def own(self, folder: Path) -> None:
        """Give a folder and what is in it to the server's user."""
        if self._account is not None:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, self._account.pw_uid, self._account.pw_gid, follow_symlinks=False)

    def _as_user(self) -> list[str]:
        """Not as root, which the server refuses; and it ends when this process does."""
        command = ["setpriv", "--pdeathsig=QUIT"]
        if self._account is not None:
            user, group = self._account.pw_uid, self._account.pw_gid
            command += [f"--reuid={user}", f"--regid={group}", "--clear-groups", "--inh-caps=-all"]
        return [*command, "--"]

    def _initialise(self) -> None:
        command = [*self._as_user(), str(self._bin / "initdb"), "--pgdata", str(self.data), "--username", USER]
        command += ["--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions"]
        subprocess.run(command, cwd=self.folder, capture_output=True, timeout=120, check=True)
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(_CONFIGURATION.format(folder=self.folder, host=self.host, port=self.port))
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write("host all all samenet trust\n")

    def dsn(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}@{self.host}:{self.port}/{database}"

    def fresh(self, prefix: str = "hiss", *, template: str = "template1") -> str:
        """DSN of a new database, empty or a copy of ``template``, to which nobody is connected."""
        name = f"{prefix}_{next(self._names)}"
        self.sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.dsn(name)

    def sql(self, statement: str, database: str = "postgres") -> list[list[str]]:
        """Run a statement over the server's own socket, so also where the network is cut; rows of text."""
        command = [str(self._bin / "psql"), "-X", "-q", "-A", "-t", "-F", "\x1f", "-v", "ON_ERROR_STOP=1"]
        command += ["-h", str(self.folder), "-p", str(self.port), "-U", USER, "-d", database, "-c", statement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return [line.split("\x1f") for line in done.stdout.splitlines()]

    # -- its life

    def start(self) -> None:
        assert self._process is None
        command = [*self._launcher, *self._as_user(), str(self._bin / "postgres"), "-D", str(self.data)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.ready()

    def ready(self, timeout_s: float = 60.0) -> None:
        """Wait until it takes connections: its pid file says so in the eighth line."""
        pid_file = self.data / "postmaster.pid"

        def state() -> list[str]:
            with contextlib.suppress(FileNotFoundError):
                return pid_file.read_text().split("\n")
            return []

        deadline = time.monotonic() + timeout_s
        while True:
            assert self._process is not None
            assert self._process.poll() is None, f"the engine ended: {self.tail()}"
            lines = state()
            if lines and lines[0] == str(self._process.pid) and len(lines) > 7 and lines[7].strip() == "ready":
                return
            assert time.monotonic() < deadline, f"timed out: the engine is ready\n{self.tail()}"
            time.sleep(0.02)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT breaks sessions off (what a service manager does), SIGQUIT is a crash, SIGTERM waits for the sessions' end."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(60)
        self._process = None

    def restart(self, number: int = signal.SIGINT) -> None:
        self.stop(number)
        self.start()

    def kill(self) -> None:
        """SIGKILL every process of it."""
        assert self._process is not None
        everyone = self._freeze()
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def freeze(self) -> None:
        """SIGSTOP every process of it: connections stay and nothing answers."""
        self._freeze()

    def _freeze(self) -> list[int]:
        assert self._process is not None
        # The postmaster first: then nobody new is born.
        os.kill(self._process.pid, signal.SIGSTOP)
        everyone = [self._process.pid, *_children(self._process.pid)]
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        return everyone

    def thaw(self) -> None:
        assert self._process is not None
        for pid in (*_children(self._process.pid), self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def without_standby(self) -> Iterator[None]:
        """It answers, and its commits wait for a synchronous standby that is not there."""
        self.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        self.sql("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            self.sql("ALTER SYSTEM RESET synchronous_standby_names")
            self.sql("SELECT pg_reload_conf()")

    def end(self) -> None:
        if self.running:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[Engine]:
    """A started engine that is ended whatever happens."""
    try:
        engine.start()
        yield engine
    finally:
        engine.end()
