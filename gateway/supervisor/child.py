"""One child process: spawn it with descriptors, learn when it is ready and when it is gone, signal it safely.

Always holds: the process leads a process group of its own (a terminal's Ctrl-C does not reach it), signals go through a
pidfd (never to a stranger that got the same pid), and when it is gone, what is left of its group is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from gateway.supervisor.reaper import Reaper

READY = b"R"


class Child:
    """``wait`` must be awaited to the end exactly once."""

    def __init__(self, pid: int, reaper: Reaper, ready_fd: int) -> None:
        """``pid``: a child of this process that ``reaper`` knows. ``ready_fd``: our end of the pipe it reports on."""
        self._reaper = reaper
        self._pidfd = os.pidfd_open(pid)
        self._ready_fd: int | None = ready_fd
        self._over = False
        self.pid = pid
        self.since_ns = time.time_ns()

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        reaper: Reaper,
        *,
        pass_fds: Sequence[int],
        ready_fd: int,
        environ: Mapping[str, str],
    ) -> Child:
        """Start ``command``. Raises OSError.

        Call it from the main thread only: PR_SET_PDEATHSIG fires when the *thread* that spawned the child ends.
        """
        process = subprocess.Popen(
            list(command),
            pass_fds=tuple(pass_fds),
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__,
            env=dict(environ),
            process_group=0,
        )
        reaper.add(process.pid)
        process.returncode = 0  # reaped by the reaper: Popen has nothing more to do
        return cls(process.pid, reaper, ready_fd)

    async def ready(self, timeout_s: float) -> bool:
        """True once it said ready; False when it closed the pipe without (it died) or took too long."""
        if self._ready_fd is None:
            return False
        fd, self._ready_fd = self._ready_fd, None
        try:
            await asyncio.wait_for(_readable(fd), timeout_s)
            return os.read(fd, 1) == READY
        except TimeoutError:
            return False
        finally:
            os.close(fd)

    async def wait(self) -> int:
        """Its exit code, once it is gone; negative: the signal that killed it."""
        await _readable(self._pidfd)
        # Before it is reaped its pid cannot be anyone else's: the moment to clear up what it started and left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._reaper.reap(self.pid)
        self._over = True
        os.close(self._pidfd)
        if self._ready_fd is not None:
            os.close(self._ready_fd)
        return code

    def send(self, number: signal.Signals) -> None:
        """Signal it; nothing happens when it is gone already."""
        if not self._over:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)
