"""How the supervisor tells a child process what it is: the ``Boot`` value, in a memfd the child inherits.

Supervisor: ``fd = write(boot)``, then a process (gateway/supervisor/nursery.py) with that descriptor and those that
``boot.descriptors()`` names. Child: ``boot = load(fd)`` first of all, ``boot.ready()`` once it serves.

What always holds: descriptors keep their numbers across the spawn, so ``Boot`` names them by number; a child that
called ``load`` is killed by the kernel when the supervisor dies, however it dies. No secret travels here: a child that
needs one reads the node key.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import msgspec

from gateway.settings import Settings
from ingest.paths import NodePaths

_PR_SET_PDEATHSIG = 1
_BOOT_BYTES_MAX = 1 << 20


class Listeners(msgspec.Struct, frozen=True):
    """Listening sockets (non-blocking) as descriptors; None where the role does not serve that port."""

    s3: int | None = None
    control: int | None = None
    dav: int | None = None


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a process of the node needs to know. The same descriptors go to every process of a slot in turn."""

    role: str
    slot: int
    """Worker number, or the role's own slot (gateway/supervisor/table.py): counters and segments are kept by it."""
    epoch: int
    """Grows with every process started on this data folder, across restarts of the node: newer takes a slot over."""
    supervisor_pid: int
    data_dir: str
    settings: dict[str, Any]
    listeners: Listeners = Listeners()
    ports: dict[str, int] = {}
    """Bound port numbers: ``s3``, ``control``, ``dav``."""
    regions: tuple[int, ...] = ()
    """memfds of this slot's arena regions, each ``region_bytes`` long; they outlive the process."""
    region_bytes: int = 0
    span_table: int | None = None
    """memfd of the slot (ingest/span_table.py): what a successor must know of the regions' content."""
    counters: int | None = None
    shares: int | None = None
    """memfd of ingest/share_table.py."""
    ready_fd: int | None = None
    """Write end of a pipe: one byte says ready. Use ``Boot.ready``."""
    restarts: int = 0
    """How often this slot was restarted since the node started; above 0 a predecessor's state may need recovery."""

    @property
    def paths(self) -> NodePaths:
        return NodePaths(Path(self.data_dir))

    def load_settings(self) -> Settings:
        return Settings.of(self.settings)

    def descriptors(self) -> list[int]:
        """Every descriptor named here: what the spawn must pass on."""
        single = (*msgspec.structs.astuple(self.listeners), self.span_table, self.counters, self.shares, self.ready_fd)
        return [*self.regions, *(fd for fd in single if fd is not None)]

    def ready(self) -> None:
        """Tell the supervisor that this process serves. Call once."""
        if self.ready_fd is not None:
            os.write(self.ready_fd, b"R")
            os.close(self.ready_fd)


def write(boot: Boot) -> int:
    """A sealed-off memfd that holds ``boot``; the caller passes it on and closes its own copy."""
    fd = os.memfd_create("hiss-boot", os.MFD_CLOEXEC)
    os.write(fd, msgspec.msgpack.encode(boot))
    return fd


def load(fd: int) -> Boot:
    """Read and close the memfd, and tie this process's life to the supervisor's.

    Exits at once if the supervisor is already gone (it died between the spawn and this line).
    """
    boot = msgspec.msgpack.decode(os.pread(fd, _BOOT_BYTES_MAX, 0), type=Boot)
    os.close(fd)
    die_with_parent(boot.supervisor_pid)
    for inherited in boot.descriptors():
        # Popen's pass_fds leaves them inheritable; grandchildren get only what they are given on purpose.
        os.set_inheritable(inherited, False)
    return boot


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process when its parent dies (prctl(2) PR_SET_PDEATHSIG); survives execve."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)
