"""Where the node's processes are born: one process that has imported everything forks them, in milliseconds each.

A role imports for one to two seconds of processor time. So the first worker would be there late, and one that died would be
missed for that long; and every process would hold a copy of the same code in memory.

In: the role, its boot descriptor, and the descriptors it is to have, over a socket from the supervisor. Out: a process with
exactly these descriptors, at the same numbers, that is the supervisor's child.

Always holds: the nursery has one thread, no secret, and opens only its socket, so a fork of it is as good as a fresh start;
it ends with the supervisor. A request that fails leaves nothing behind; when the nursery is gone, the next one starts another.

Protocol, over SOCK_SEQPACKET: ``Birth`` as msgpack, then its descriptors, FDS_MAX to a message; the answer is the pid, or nothing
(the nursery is gone). Linux hands an orphan to the nearest subreaper above it (prctl(2)): the fork is made by a process between
that ends at once, and nobody is told before that one is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence

import msgspec

from gateway.boot import die_with_parent
from gateway.supervisor.child import Child
from gateway.supervisor.reaper import Reaper
from ingest import crashpoints

logger = logging.getLogger(__name__)

PREPARED = ("catalogue", "worker", "drain", "control")
"""Roles that are imported before the first fork; others are imported by the process itself."""
BIRTH_TIMEOUT_S = 10.0
"""A fork takes milliseconds; a nursery that does not answer is replaced."""
FDS_MAX = 200
"""Linux passes 253 descriptors a message (SCM_MAX_FD)."""
MESSAGE_BYTES_MAX = 64 << 10
_PR_SET_NAME = 15


class Birth(msgspec.Struct, frozen=True):
    """``numbers``: of the descriptors that follow, in the supervisor and in the new process alike."""

    role: str
    name: str
    boot_fd: int
    numbers: tuple[int, ...]
    crashpoint: bool
    """Whether a crash point that the environment names is armed."""


class Nursery:
    """The supervisor's side. ``environ``: of the processes."""

    def __init__(self, environ: Mapping[str, str], reaper: Reaper, start_timeout_s: float) -> None:
        # One thread: numpy's would be lost in a fork, and nobody here multiplies matrices.
        self._environ = {**environ, "OPENBLAS_NUM_THREADS": "1"}
        self._reaper = reaper
        self._start_timeout_s = start_timeout_s
        self._child: Child | None = None
        self._life: asyncio.Task[None] | None = None
        self._channel: socket.socket | None = None
        self._turn = asyncio.Lock()

    async def bear(self, birth: Birth) -> int:
        """A new process of ours; its pid. Raises OSError."""
        async with self._turn:
            channel = await self._started()
            with self._reaper.expecting():
                try:
                    channel.send(msgspec.msgpack.encode(birth))
                    for first in range(0, len(birth.numbers), FDS_MAX):
                        socket.send_fds(channel, [b"F"], birth.numbers[first : first + FDS_MAX])
                    answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(channel, 16), BIRTH_TIMEOUT_S)
                    if not answer:
                        raise ConnectionResetError("the process that forks the others died")
                except BaseException:
                    # Nobody would know a process that it still makes, or has made.
                    await self._end()
                    self._reaper.kill_strangers()
                    raise
                pid = int(answer)
                self._reaper.add(pid)
                return pid

    async def close(self) -> None:
        async with self._turn:
            await self._end()

    async def _started(self) -> socket.socket:
        if self._channel is not None and self._child is not None:
            return self._channel
        await self._end()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ready, report = os.pipe2(os.O_CLOEXEC)
        with theirs:
            command = [sys.executable, "-P", "-m", "gateway.supervisor.nursery"]
            command += [str(number) for number in (theirs.fileno(), report, os.getpid())]
            try:
                passed = (theirs.fileno(), report)
                self._child = Child.spawn(command, self._reaper, pass_fds=passed, ready_fd=ready, environ=self._environ)
            except OSError:
                os.close(ready)
                ours.close()
                raise
            finally:
                os.close(report)
        ours.setblocking(False)
        self._channel = ours
        self._life = asyncio.create_task(self._until_gone(self._child), name="nursery")
        if not await self._child.ready(self._start_timeout_s):
            await self._end()
            raise OSError("the process that forks the others did not start; its log lines above say why")
        return ours

    async def _until_gone(self, child: Child) -> None:
        code = await child.wait()
        if self._child is child:
            logger.error("the process that forks the others ended (%d); the next fork starts it again", code)
            self._child = None

    async def _end(self) -> None:
        """Call it in turn: nobody waits on the channel."""
        child, self._child = self._child, None
        if child is not None:
            child.send(signal.SIGKILL)
        if self._life is not None:
            await self._life
            self._life = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None


# -- the nursery itself


def main(arguments: Sequence[str]) -> int:
    channel_fd, report, supervisor_pid = map(int, arguments)
    die_with_parent(supervisor_pid)
    _name("nursery")
    # A terminal's Ctrl-C is the supervisor's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing that an import makes is garbage soon: looking for it costs a tenth of the whole start.
    gc.disable()
    for role in PREPARED:
        importlib.import_module(f"gateway.roles.{role}")
    channel = socket.socket(fileno=channel_fd)
    channel.set_inheritable(False)
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise SystemExit(f"a process must have one thread to fork safely, this one has {threads}")
    # What is frozen is not written to by collections, so it stays shared by all.
    gc.collect()
    gc.freeze()
    os.write(report, b"R")
    os.close(report)
    kept = _descriptors() - {channel_fd}
    while asked := channel.recv(MESSAGE_BYTES_MAX):
        birth = msgspec.msgpack.decode(asked, type=Birth)
        received: list[int] = []
        while len(received) < len(birth.numbers):
            message, fds, _, _ = socket.recv_fds(channel, 1, FDS_MAX)
            if not message:
                return 0
            received += fds
        born = _fork(channel, birth, received, kept)
        if born is None:
            return _grow_up(birth)
        for fd in received:
            os.close(fd)
        channel.send(b"%d" % born)
    return 0


def _fork(channel: socket.socket, birth: Birth, received: Sequence[int], kept: set[int]) -> int | None:
    """The pid of the new process; None in that process, once its parent is the supervisor. ``kept``: descriptors of others,
    as a preloaded library opens them."""
    said, saying = os.pipe2(os.O_CLOEXEC)
    between = os.fork()
    if between:
        os.close(saying)
        with os.fdopen(said, "rb") as pipe:
            pid = int(pipe.read() or 0)
        os.waitpid(between, 0)
        if not pid:
            raise SystemExit("cannot fork: the limit on processes, or on memory")
        return pid
    try:
        between = os.getpid()
        pid = os.fork()
        if pid:
            os.write(saying, b"%d" % pid)
            os._exit(0)
    except OSError:
        os._exit(1)
    try:
        os.setpgid(0, 0)
        os.close(said)
        os.close(saying)
        channel.close()
        if taken := kept.intersection(birth.numbers):
            raise OSError(f"descriptors {sorted(taken)} are in use by a library of this process")
        _place(received, birth.numbers)
        while os.getppid() == between:
            time.sleep(0.0002)
        return None
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _place(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Move descriptors to their numbers; they are not inherited by programs that this process starts."""
    above = max((2, *received, *numbers)) + 1
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in received]
    for fd in received:
        os.close(fd)
    for fd, number in zip(high, numbers, strict=True):
        os.dup2(fd, number, inheritable=False)
        os.close(fd)


def _grow_up(birth: Birth) -> int:
    from gateway.roles.main import run

    _name(birth.name)
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not birth.crashpoint:
        os.environ.pop(crashpoints.VARIABLE, None)
        crashpoints.disarm()
    return run(birth.role, birth.boot_fd)


def _name(name: str) -> None:
    """What ``ps -o comm`` and ``top`` show."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"hiss {name}".encode()[:15], 0, 0, 0)


def _descriptors() -> set[int]:
    """Those that are open, without the one that is open to look."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            found.add(int(name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
