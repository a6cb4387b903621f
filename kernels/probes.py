"""What the self-test attempts inside a locked-down process, to see with its own eyes that it cannot be done.

A probe returns a line of text if it survives: ``DENIED`` is the outcome expected, except of the probes in ``KILLED``, which
must not survive. kernels/selftest.py runs them and judges.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from collections.abc import Callable, Sequence

import numpy as np

DENIED = "denied"
KILLED_OUTCOME = "killed"
_libc = ctypes.CDLL(None, use_errno=True)


def _denied(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except PermissionError:
        return DENIED
    except OSError as error:
        return f"failed otherwise: {error.strerror}"
    return "allowed"


def _open_file() -> str:
    return _denied(lambda: os.open("/proc/self/status", os.O_RDONLY))


def _list_root() -> str:
    return _denied(lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY))


def _open_under_filter(_regions: Sequence[mmap.mmap]) -> str:
    return _open_file()


def _udp_socket(_regions: Sequence[mmap.mmap]) -> str:
    return f"opened descriptor {socket.socket(socket.AF_INET, socket.SOCK_DGRAM).fileno()}"


def _fork(_regions: Sequence[mmap.mmap]) -> str:
    if os.fork() == 0:
        os._exit(0)
    return "forked"


def _signal_parent(_regions: Sequence[mmap.mmap]) -> str:
    os.kill(os.getppid(), 0)
    return "signalled"


def _executable_memory(_regions: Sequence[mmap.mmap]) -> str:
    mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_EXEC)
    return "mapped executable memory"


def _writable_input(regions: Sequence[mmap.mmap]) -> str:
    """mprotect(2) of a sealed shared mapping: EACCES."""
    address = np.frombuffer(regions[0], np.uint8).ctypes.data
    result = _libc.mprotect(
        ctypes.c_void_p(address), ctypes.c_size_t(4096), ctypes.c_int(mmap.PROT_READ | mmap.PROT_WRITE)
    )
    return DENIED if result != 0 else "made the input writable"


BEFORE_FILTER: dict[str, Callable[[], str]] = {"landlock-file": _open_file, "landlock-folder": _list_root}
"""Attempted under Landlock alone: the filter would hide whether it holds."""

UNDER_FILTER: dict[str, Callable[[Sequence[mmap.mmap]], str]] = {
    "open": _open_under_filter,
    "input-write": _writable_input,
    "socket": _udp_socket,
    "fork": _fork,
    "signal": _signal_parent,
    "executable-memory": _executable_memory,
}
RUN_FILTER = ("executable-memory",)
"""Attempted under the second filter too."""

KILLED = ("socket", "fork", "signal", "executable-memory")
ALL = (*BEFORE_FILTER, *UNDER_FILTER)
