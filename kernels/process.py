"""One process forked by the zygote, seen from the gateway: its channel, its end, and nothing of what it computes.

In: a ``SandboxSpec`` and descriptors. Out: datagrams that passed ``wire.parse_reply``, and how the process ended. What
always holds: nothing here blocks the event loop; a process is known to have ended only by its pidfd, at which point it
maps nothing any more; ``kill`` may be called in any state, any number of times.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kernels import wire

log = logging.getLogger("hiss.kernels")

FORK_TIMEOUT_S = 10.0
"""A fork takes milliseconds; a zygote that has just started may still be warming up."""
CONNECT_RETRY_S = 0.02
STATUS_TIMEOUT_S = 2.0
STUCK_REPORT_S = 10.0
"""How often to say that a killed process has not gone."""

_ENDINGS = {
    -signal.SIGSYS: "it made a forbidden system call",
    -signal.SIGSEGV: "it accessed memory that is not its own, or recursed too deeply",
    -signal.SIGBUS: "it accessed memory that does not exist",
    -signal.SIGKILL: "it was killed, perhaps for want of memory",
    -signal.SIGABRT: "it aborted",
    -signal.SIGFPE: "it divided an integer by zero",
}


class SandboxFailed(Exception):
    """``kind``: crash | timeout | lie (the process was killed and is gone), or unavailable (it never ran, or ended with the
    zygote)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class SandboxProcess:
    """Made by ``fork``; belongs to the event loop it was made in."""

    def __init__(self, control: socket.socket, channel: socket.socket, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._control = control
        self._channel = channel
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._released = False
        self.orphaned = False
        """It ended with the zygote, which is nobody's fault here; known once ``ending`` or ``kill`` has returned."""
        self._loop.add_reader(pidfd, self._on_ended)

    @classmethod
    async def fork(
        cls, zygote_socket: str, spec: wire.SandboxSpec, output_fd: int, region_fds: Sequence[int]
    ) -> SandboxProcess:
        """Raises SandboxFailed("unavailable") when the zygote cannot be reached or refuses."""
        request = msgspec.msgpack.encode(wire.ForkRequest(spec))
        if len(request) > wire.MAX_FORK_REQUEST_BYTES:
            raise SandboxFailed("unavailable", "the kernel is too large to send")
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            ours.setblocking(False)
            with theirs:
                control = await _connect(zygote_socket)
                undo.callback(control.close)
                fds = array.array("i", [theirs.fileno(), output_fd, *region_fds])
                try:
                    control.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                except OSError as error:
                    raise SandboxFailed("unavailable", f"asking the zygote: {error.strerror}") from None
            try:
                async with asyncio.timeout(FORK_TIMEOUT_S):
                    await _readable(control)
            except TimeoutError:
                raise SandboxFailed("unavailable", "the zygote does not answer") from None
            forked, pidfd = _read_forked(control)
            process = cls(control, ours, forked.pid, pidfd)
            undo.pop_all()
            return process

    @property
    def ended(self) -> bool:
        return self._ended.done()

    def _on_ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        if not self._ended.done():
            self._ended.set_result(None)

    def send(self, datagram: bytes) -> bool:
        """False when the process has gone, or has not read what it was sent."""
        try:
            self._channel.send(datagram)
        except OSError:
            return False
        return True

    async def send_in_time(self, datagram: bytes, timeout_s: float) -> bool:
        """As ``send``, and waits while the process has not read what it was sent. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    self._channel.send(datagram)
                except BlockingIOError:
                    await _writable(self._channel)
                except OSError:
                    return False
                else:
                    return True

    async def receive_datagram(self, size_max: int, timeout_s: float) -> bytes | None:
        """The next datagram, cut to ``size_max`` bytes; None when the process has ended. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            await _readable(self._channel)
        try:
            return self._channel.recv(size_max) or None
        except OSError:
            return None

    async def receive(self, timeout_s: float) -> wire.RawReply | None:
        """The next reply; None when the process has ended. Raises TimeoutError, or SandboxFailed("lie")."""
        datagram = await self.receive_datagram(wire.REPLY_BYTES + wire.MAX_TEXT_BYTES + 1, timeout_s)
        if datagram is None:
            return None
        reply = wire.parse_reply(datagram)
        if reply is None:
            raise SandboxFailed("lie", f"a reply of {len(datagram)} bytes makes no sense")
        return reply

    async def ending(self) -> str:
        """Wait for the end of a process that was killed or hung up, and say how it ended."""
        await self._wait_ended()
        status = await self._exit_status()
        if status is None:
            return "it ended with the fork server" if self.orphaned else "it ended"
        if status < 0:
            return _ENDINGS.get(status, f"it was ended by {signal.Signals(-status).name}")
        return f"it exited with status {status}"

    async def exit_status(self) -> int | None:
        """Exit code, or minus the signal, of a process that has been asked to end; None when the zygote died first."""
        await self._wait_ended()
        return await self._exit_status()

    async def _exit_status(self) -> int | None:
        if self._released:
            return None
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                await _readable(self._control)
            report = self._control.recv(4096)
            self.orphaned = not report
            message = msgspec.msgpack.decode(report, type=wire.ZygoteReply)
        except (TimeoutError, OSError, msgspec.MsgspecError):
            return None
        return message.status if isinstance(message, wire.Exited) else None

    def step_back(self) -> None:
        """Compute only when nobody else wants the core (SCHED_IDLE), until ``step_forward``."""
        self._schedule(os.SCHED_IDLE)

    def step_forward(self) -> None:
        """As it began. An unprivileged gateway may not undo ``step_back``: then the process stays in the background."""
        self._schedule(os.SCHED_BATCH)

    def _schedule(self, policy: int) -> None:
        if not self.ended:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(self.pid, policy, os.sched_param(0))

    def cpu_s(self) -> float:
        """CPU time it has taken so far; 0.0 once it has ended, or where the machine does not say."""
        try:
            return 0.0 if self.ended else time.clock_gettime(_cpu_clock(self.pid))
        except OSError:
            return 0.0

    def signal_kill(self) -> None:
        if not self._released:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def kill(self) -> str:
        """Kill, wait until the process has ended, release every descriptor. Returns how it ended."""
        self.signal_kill()
        try:
            return await self.ending()
        finally:
            # Also when the wait was cancelled: the process ends soon, and its descriptors with it.
            if self.ended:
                self._release()
            else:
                self._ended.add_done_callback(lambda _: self._release())

    async def _wait_ended(self) -> None:
        while not self._ended.done():
            await asyncio.wait((self._ended,), timeout=STUCK_REPORT_S)
            if not self._ended.done():
                log.error("sandboxed process %d was killed and has not ended", self.pid)

    def _release(self) -> None:
        if self._released:
            return
        self._released = True
        self._channel.close()
        self._control.close()
        os.close(self._pidfd)


def _cpu_clock(pid: int) -> int:
    """As clock_getcpuclockid(3), which Python does not have: Linux's clock of all threads of a process."""
    return ~pid << 3 | 2


async def _connect(path: str) -> socket.socket:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.setblocking(False)
    try:
        async with asyncio.timeout(FORK_TIMEOUT_S):
            while not _connected(control, path):  # noqa: ASYNC110  # another process's state: only asking tells
                await asyncio.sleep(CONNECT_RETRY_S)
    except TimeoutError:
        control.close()
        raise SandboxFailed("unavailable", "the kernel zygote is not running") from None
    except OSError as error:
        control.close()
        raise SandboxFailed("unavailable", f"connecting to the zygote: {error.strerror}") from None
    except BaseException:
        control.close()
        raise
    return control


def _connected(control: socket.socket, path: str) -> bool:
    """False while the zygote is starting, or its backlog is full. sun_path holds 107 bytes: longer paths go through an
    open folder."""
    folder = -1
    if len(os.fsencode(path)) >= 100:
        folder = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        path = f"/proc/self/fd/{folder}/{Path(path).name}"
    try:
        control.connect(path)
    except (BlockingIOError, ConnectionRefusedError, FileNotFoundError):
        return False
    finally:
        if folder >= 0:
            os.close(folder)
    return True


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection.fileno(), _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())


async def _writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(connection.fileno(), _wake, ready)
    try:
        await ready
    finally:
        loop.remove_writer(connection.fileno())


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _read_forked(control: socket.socket) -> tuple[wire.Forked, int]:
    fds = array.array("i")
    try:
        data, ancillary, _, _ = control.recvmsg(4096, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    except OSError:
        data, ancillary = b"", []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    try:
        message = msgspec.msgpack.decode(data, type=wire.ZygoteReply) if data else None
    except msgspec.MsgspecError:
        message = None
    if isinstance(message, wire.Forked) and len(fds) == 1:
        return message, fds[0]
    for fd in fds:
        os.close(fd)
    reason = message.reason if isinstance(message, wire.Refused) else "the zygote hung up"
    raise SandboxFailed("unavailable", reason)
