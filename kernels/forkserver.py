"""The zygote's loop: one connection asks for one child, and hears when it has ended.

In: ``ForkRequest`` datagrams with descriptors, on connections of a socket only the gateway's user can open. Out: the pidfd
of a child that goes on in kernels/child.py, and ``Exited`` once it was reaped. What always holds: one thread, nothing
blocks; at most ``max_children`` children; a child whose connection closes is killed, and every child is reaped; a client
that sends nonsense or dies costs its own connection.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import logging
import os
import selectors
import signal
import socket
from typing import Any

import msgspec

from kernels import child, lockdown, wire

log = logging.getLogger("hiss.zygote")

MAX_IDLE_CONNECTIONS = 32
"""Connections beyond the children's: clients between connecting and asking."""


@dataclasses.dataclass(slots=True, eq=False)
class _Client:
    """A connection, and its child once it has one."""

    connection: socket.socket
    pid: int = 0
    pidfd: int = -1
    lane: int = -1
    """The child's place among the live ones: the n of its user id."""


class ForkServer:
    def __init__(self, listener: socket.socket, max_children: int, uid_base: int, *, tolerant: bool = False) -> None:
        """``tolerant``: children go on where the machine cannot confine them (lockdown.Confinement)."""
        self._listener = listener
        self._max_clients = max_children + MAX_IDLE_CONNECTIONS
        self._tolerant = tolerant
        self._uid_base = uid_base if os.geteuid() == 0 else None
        self._free_lanes = list(range(max_children))
        self._clients: set[_Client] = set()
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._decoder = msgspec.msgpack.Decoder(wire.ForkRequest)
        self._encoder = msgspec.msgpack.Encoder()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)

    def serve(self) -> None:
        while True:
            self.step(None)

    def step(self, timeout_s: float | None) -> None:
        """Handle what is ready, once."""
        for key, _ in self._selector.select(timeout_s):
            client = key.data
            if client is None:
                self._accept()
            elif client not in self._clients:
                continue  # dropped by an earlier event of this round
            elif key.fd == client.pidfd:
                self._reap(client)
            else:
                self._hear(client)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._clients) >= self._max_clients:
            connection.close()
            return
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _hear(self, client: _Client) -> None:
        try:
            data, fds, flags = _receive(client.connection)
        except BlockingIOError:
            return
        except OSError:
            data, fds, flags = b"", [], 0
        try:
            if client.pid or not data:
                self._drop(client)
                return
            reason = self._fork(client, data, fds, flags)
        finally:
            for fd in fds:
                os.close(fd)
        if reason:
            self._answer(client, wire.Refused(reason))
            self._drop(client)

    def _fork(self, client: _Client, data: bytes, fds: list[int], flags: int) -> str:
        """Fork a child for the client; why not, if not. Returns in the zygote only."""
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            return "the request is too large"
        try:
            spec = self._decoder.decode(data).spec
        except msgspec.MsgspecError as error:
            return f"malformed request: {error}"
        runs_nothing = not spec.reader and not (spec.layouts and spec.stages)
        if len(fds) != 2 + bool(spec.arrays_bytes) + spec.region_count or runs_nothing:
            return "the request does not match its descriptors"
        if not self._free_lanes:
            return "too many sandboxes are running"
        lane = self._free_lanes[0]
        uid = None if self._uid_base is None else self._uid_base + lane
        confinement = lockdown.Confinement(
            parent_pid=self._pid,
            uid=uid,
            memory_bytes=spec.memory_bytes,
            nice=spec.nice,
            policy=spec.policy,
            tolerant=self._tolerant,
        )
        try:
            pid = os.fork()
        except OSError as error:
            return f"fork: {error.strerror}"
        if pid == 0:
            child.main(spec, fds, confinement)
        self._free_lanes.pop(0)
        client.pid, client.lane = pid, lane
        try:
            client.pidfd = os.pidfd_open(pid)
            self._selector.register(client.pidfd, selectors.EVENT_READ, client)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            self._finish(client)
            return f"pidfd: {error.strerror}"
        self._answer(client, wire.Forked(pid), [client.pidfd])
        return ""

    def _answer(self, client: _Client, message: wire.ZygoteReply, fds: list[int] | None = None) -> None:
        rights: list[Any] = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        # A client that has gone is noticed by its end-of-file.
        with contextlib.suppress(OSError):
            client.connection.sendmsg([self._encoder.encode(message)], rights)

    def _reap(self, client: _Client) -> None:
        status = self._finish(client)
        self._answer(client, wire.Exited(status))
        self._drop(client)

    def _finish(self, client: _Client) -> int:
        """Wait for a child that has ended or was just killed; its place becomes free."""
        _, status = os.waitpid(client.pid, 0)
        if client.pidfd >= 0:
            self._selector.unregister(client.pidfd)
            os.close(client.pidfd)
        self._free_lanes.append(client.lane)
        client.pid, client.pidfd, client.lane = 0, -1, -1
        return os.waitstatus_to_exitcode(status)

    def _drop(self, client: _Client) -> None:
        """Forget a connection; a child it still has is killed and waited for (SIGKILL takes milliseconds)."""
        self._selector.unregister(client.connection)
        client.connection.close()
        self._clients.discard(client)
        if client.pid:
            signal.pidfd_send_signal(client.pidfd, signal.SIGKILL)
            self._finish(client)


def _receive(connection: socket.socket) -> tuple[bytes, list[int], int]:
    fds = array.array("i")
    space = socket.CMSG_SPACE((3 + wire.MAX_REGIONS) * fds.itemsize)
    data, ancillary, flags, _ = connection.recvmsg(wire.MAX_FORK_REQUEST_BYTES, space)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds), flags
