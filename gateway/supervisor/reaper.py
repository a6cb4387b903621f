"""The node's processes belong to the supervisor, also those that it did not fork itself.

As subreaper (prctl(2) PR_SET_CHILD_SUBREAPER) it becomes the parent of what the nursery forks, so it learns how each ends;
and of what a process of the node leaves behind when it dies. Nobody waits for the latter: ``sweep`` does.

Always holds: whoever is in ``known`` is reaped by whoever knows it, everybody else by the sweep.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

_PR_SET_CHILD_SUBREAPER = 36


class Reaper:
    """One for the process: made by the supervisor, in its loop."""

    def __init__(self) -> None:
        """Raises OSError where the kernel does not let this process adopt."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
        self._known: set[int] = set()
        self._expecting = 0
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self.sweep)

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """While a process is born whose pid is not known yet: nobody is taken for a stranger."""
        self._expecting += 1
        try:
            yield
        finally:
            self._expecting -= 1
            self.sweep()

    def add(self, pid: int) -> None:
        self._known.add(pid)

    def reap(self, pid: int) -> int:
        """The exit code of a known process that has ended (negative: the signal that killed it)."""
        _, status = os.waitpid(pid, 0)
        self._known.discard(pid)
        # The sweep stops at the first known process that has ended: there may be strangers behind it.
        self.sweep()
        return os.waitstatus_to_exitcode(status)

    def kill_strangers(self) -> None:
        """SIGKILL every child that nobody knows."""
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit() or int(entry.name) in self._known:
                continue
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{entry.name}/stat", encoding="utf-8", errors="replace") as file,
            ):
                # pid (comm) state ppid …: proc_pid_stat(5)
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    os.kill(int(entry.name), signal.SIGKILL)

    def sweep(self) -> None:
        """Reap strangers."""
        while not self._expecting:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid in self._known:
                return
            os.waitpid(found.si_pid, 0)
