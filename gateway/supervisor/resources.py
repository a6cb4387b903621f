"""What the supervisor owns and hands down: the folder's lock, listening sockets, shared memory, the epoch.

Everything that can refuse a start for a reason the operator must know raises ``NodeRefused`` with that reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import ipaddress
import os
import socket
import time
from pathlib import Path

from gateway.settings import Settings, human_bytes
from ingest.arena import SLAB_BYTES, create_regions
from ingest.paths import NodePaths
from ingest.span_table import SpanTable

BACKLOG = 1024
LOCK_WAIT_S = 5.0
SPAWNS_PER_START = 1 << 24
"""Epoch numbers one start of the node may use."""


class NodeRefused(Exception):
    """The node cannot start, and why; ``held`` when another gateway (or program) holds its folder or a port."""

    def __init__(self, reason: str, *, held: bool = False) -> None:
        super().__init__(reason)
        self.held = held


@dataclasses.dataclass(frozen=True, slots=True)
class Arena:
    """Shared memory of one worker slot."""

    regions: tuple[int, ...]
    span_table: int


def lock_folder(paths: NodePaths) -> int:
    """Take DATA/lock and return its descriptor; raises NodeRefused when another gateway holds the folder.

    Children inherit the descriptor. After a SIGKILL of a supervisor they need a moment to die: that is waited for.
    """
    try:
        paths.create()
        fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NodeRefused(f"{paths.root}: cannot be used as data folder: {error.strerror}") from None
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            if _alive(holder) or time.monotonic() > deadline:
                os.close(fd)
                by = f"another gateway (pid {holder or 'unknown'})"
                raise NodeRefused(f"{paths.root} is held by {by}; stop it, or give another --data", held=True) from None
            time.sleep(0.05)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _alive(pid: str) -> bool:
    """Whether the process that wrote itself into the lock still runs."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        # A zombie holds nothing any more.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def bind(settings: Settings) -> dict[str, socket.socket]:
    """Listening sockets ``s3``, ``control`` and ``dav``; raises NodeRefused when one cannot be had."""
    sockets: dict[str, socket.socket] = {}
    for name in ("s3", "control", "dav"):
        port = getattr(settings, f"{name}_port")
        try:
            sockets[name] = _listen(settings.host, port)
        except OSError as error:
            for opened in sockets.values():
                opened.close()
            if error.errno == errno.EADDRINUSE:
                reason = f"port {port} ({name}) is held by another gateway or program; give another --{name}-port"
                raise NodeRefused(reason, held=True) from None
            reason = error.strerror or str(error)
            raise NodeRefused(f"cannot listen on {settings.host} port {port} ({name}): {reason}") from None
    return sockets


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and ipaddress.ip_address(address[0]).is_unspecified:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def create_arenas(settings: Settings) -> list[Arena]:
    """Shared memory of every worker slot. Takes a second for every few GiB: call it in a thread."""
    arenas = []
    slabs = settings.arena_region_bytes // SLAB_BYTES
    try:
        for _ in range(settings.workers):
            regions = create_regions(settings.regions_per_worker, settings.arena_region_bytes)
            arenas.append(Arena(tuple(regions), SpanTable.create(len(regions), slabs)))
    except OSError as error:
        wanted = human_bytes(settings.arena_bytes)
        raise NodeRefused(
            f"arena_bytes = {settings.arena_bytes} ({wanted}): this machine does not give so much shared memory "
            f"({error.strerror}); set less"
        ) from None
    return arenas


def next_epoch(paths: NodePaths) -> int:
    """First epoch of this start: larger than any that a process of an earlier start was given."""
    try:
        starts = int(paths.epoch.read_text()) + 1
    except (FileNotFoundError, ValueError):
        # A torn file must not turn the count back: the clock is far ahead of any count of starts.
        starts = time.time_ns() // 10**9 if paths.epoch.exists() else 1
    write_atomically(paths.epoch, f"{starts}\n".encode(), durable=True)
    return starts * SPAWNS_PER_START


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Replace ``path`` by a file that is whole at every moment; ``durable``: also after a power cut."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    draft.rename(path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
