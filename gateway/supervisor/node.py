"""The life of a node: start the roles in order, keep them running, report them, stop them in order.

In: decided settings and a role table. Out: an exit (``run`` returns when the node has stopped cleanly, or raises
``NodeRefused`` / ``RoleFailed``), DATA/run/ports.json and DATA/run/processes.json for tools and the control API.

Shutdown: the listeners close, then stage by stage SIGTERM and, after the grace period, SIGKILL: workers first (they
finish what is in flight and still need the catalogue), the catalogue last. A second signal ends the patience.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from gateway import boot
from gateway.settings import Settings
from gateway.supervisor import resources
from gateway.supervisor.backoff import Backoff
from gateway.supervisor.child import Child
from gateway.supervisor.notify import notify, watchdog
from gateway.supervisor.nursery import Birth, Nursery
from gateway.supervisor.reaper import Reaper
from gateway.supervisor.slot import Slot
from gateway.supervisor.table import Role
from ingest import clock, crashpoints
from ingest.counters import SUPERVISOR, Counters
from ingest.paths import NodePaths
from ingest.share_table import ShareTable

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Processes of an essential role that may die before they are ready until the start counts as failed."""

Hook = Callable[[], Awaitable[None]]


class RoleFailed(Exception):
    """An essential process could not be started; ``str()`` names it and says how it ended."""


class Supervisor:
    """One node. ``hooks`` run after a role's first process is ready (``catalogue``: write the users); ``reload`` runs
    on SIGHUP; ``serving`` is called once when the node serves, with its ports."""

    def __init__(
        self,
        settings: Settings,
        roles: Sequence[Role],
        *,
        hooks: Mapping[str, Hook] | None = None,
        reload: Hook | None = None,
        serving: Callable[[dict[str, int]], None] | None = None,
    ) -> None:
        self._settings = settings
        self._roles = tuple(roles)
        self._hooks = dict(hooks or {})
        self._reload = reload
        self._serving = serving
        self._paths = NodePaths(settings.data_dir)
        self._state = "starting"
        self._started_ns = time.time_ns()
        self._slots: dict[str, list[Slot]] = {role.name: [] for role in self._roles}
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        # Root credentials are the supervisor's business: no child, least of all a kernel, finds them in its
        # environment.
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("HISS_ROOT_")}
        self._arenas: list[resources.Arena] = []
        self._listeners: dict[str, socket.socket] = {}
        self._ports: dict[str, int] = {}
        self._lock_fd = -1
        self._counters_fd = -1
        self._shares_fd = -1
        self._epoch = 0

    async def run(self) -> None:
        """Start, serve until SIGTERM or SIGINT, stop. Raises NodeRefused or RoleFailed when the start fails."""
        self._lock_fd = resources.lock_folder(self._paths)
        try:
            self._listeners = resources.bind(self._settings)
            # Kept: while the node stops its listeners are closed, and what dies then is still started again.
            self._ports = {name: listener.getsockname()[1] for name, listener in self._listeners.items()}
            self._epoch = resources.next_epoch(self._paths)
            self._counters_fd = Counters.create()
            self._counters = Counters(self._counters_fd, SUPERVISOR)
            self._shares_fd = ShareTable.create()
            self._counters.cell("hiss_buffer_capacity_bytes").set(self._settings.buffer_bytes)
            # A killed node's: this one has not tested yet.
            self._paths.sandbox.unlink(missing_ok=True)
            (clock.create if self._settings.virtual_clock == "on" else clock.discard)(self._paths)
            self._write_ports()
            self._handle_signals()
            self._reaper = Reaper()
            self._nursery = Nursery(self._environ, self._reaper, self._settings.start_timeout_s)
            await self._serve()
        finally:
            self._release()

    @property
    def ports(self) -> dict[str, int]:
        return dict(self._ports)

    async def _serve(self) -> None:
        beat = asyncio.create_task(watchdog())
        try:
            await self._start_roles()
            if not self._stop.is_set():
                self._state = "serving"
                self._write_processes()
                notify("READY=1")
                ports = self.ports
                logger.info("serving", extra={"host": self._settings.host, **ports})
                if self._serving is not None:
                    self._serving(ports)
            await self._stop.wait()
        finally:
            notify("STOPPING=1")
            await self._stop_roles()
            await self._nursery.close()
            beat.cancel()

    async def _start_roles(self) -> None:
        making_arenas = asyncio.create_task(asyncio.to_thread(resources.create_arenas, self._settings))
        try:
            for role in self._roles:
                if role.arena:
                    self._arenas = await making_arenas
                if self._stop.is_set():
                    return
                self._start_role(role)
                if role.barrier:
                    await self._role_ready(role)
            for role in self._roles:
                if not role.barrier:
                    await self._role_ready(role)
        finally:
            # A thread cannot be cancelled; what it made is freed with the process.
            with contextlib.suppress(resources.NodeRefused):
                await making_arenas

    def _start_role(self, role: Role) -> None:
        cell = self._counters.cell("hiss_process_restarts_total", role.name)
        for number in role.slots:
            slot = Slot(
                role.name,
                number,
                self._spawner(role, number),
                start_timeout_s=self._settings.start_timeout_s,
                backoff=Backoff(cap_s=self._settings.restart_delay_max_s),
                changed=self._write_processes,
                restarted=cell.add,
            )
            self._slots[role.name].append(slot)
            slot.start()

    async def _role_ready(self, role: Role) -> None:
        """Wait for the role if the node cannot do without it, then run its hook. Raises RoleFailed."""
        for slot in self._slots[role.name] if role.essential else ():
            if not await self._first_ready(slot, START_ATTEMPTS) and not self._stop.is_set():
                raise RoleFailed(f"the {role.name} process {slot.status().last_exit}; its log lines above say why")
        if (hook := self._hooks.get(role.name)) is not None and not self._stop.is_set():
            await hook()

    async def _first_ready(self, slot: Slot, attempts: int) -> bool:
        """As ``Slot.first_ready``, but a node that is to stop does not wait for it."""
        ready = asyncio.create_task(slot.first_ready(attempts))
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not ready.done():
            ready.cancel()
            return False
        return ready.result()

    def _spawner(self, role: Role, number: int) -> Callable[[int], Awaitable[Child]]:
        """What starts the next process of a slot, with the descriptors of the slot."""

        async def spawn(restarts: int) -> Child:
            ready_fd, report_fd = os.pipe2(os.O_CLOEXEC)
            told = self._boot(role, number, report_fd, restarts)
            boot_fd = boot.write(told)
            passed = [boot_fd, *told.descriptors()]
            if role.holds_lock:
                passed.append(self._lock_fd)
            # Who died at a crash point is followed by one that is to recover, not to die there again.
            armed = restarts == 0
            try:
                if role.command is None:
                    name = f"{role.name}/{number}" if len(role.slots) > 1 else role.name
                    birth = Birth(role.name, name, boot_fd, tuple(passed), armed)
                    return Child(await self._nursery.bear(birth), self._reaper, ready_fd)
                environ = dict(self._environ)
                if not armed:
                    environ.pop(crashpoints.VARIABLE, None)
                command = role.command(role.name, boot_fd)
                return Child.spawn(command, self._reaper, pass_fds=passed, ready_fd=ready_fd, environ=environ)
            except OSError:
                os.close(ready_fd)
                raise
            finally:
                os.close(report_fd)
                os.close(boot_fd)

        return spawn

    def _boot(self, role: Role, number: int, report_fd: int, restarts: int) -> boot.Boot:
        self._epoch += 1
        arena = self._arenas[number] if role.arena else None
        listeners = {name: self._listeners[name].fileno() for name in role.listeners}
        return boot.Boot(
            role=role.name,
            slot=number,
            epoch=self._epoch,
            supervisor_pid=os.getpid(),
            data_dir=str(self._settings.data_dir),
            settings=self._settings.as_dict(),
            listeners=boot.Listeners(**listeners),
            ports=self.ports,
            regions=arena.regions if arena else (),
            region_bytes=self._settings.arena_region_bytes if arena else 0,
            span_table=arena.span_table if arena else None,
            counters=self._counters_fd,
            shares=self._shares_fd,
            ready_fd=report_fd,
            restarts=restarts,
        )

    async def _stop_roles(self) -> None:
        self._state = "stopping"
        logger.info("stopping")
        for listener in self._listeners.values():
            # Once the workers have closed theirs, new connections are refused, not parked in a backlog nobody reads.
            listener.close()
        by_stage: dict[int, list[Slot]] = {}
        for role in self._roles:
            by_stage.setdefault(role.stop_stage, []).extend(self._slots[role.name])
        for _, slots in sorted(by_stage.items()):
            await asyncio.gather(*(slot.stop(self._settings.shutdown_grace_s, self._hurry) for slot in slots))
        logger.info("stopped")

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_reload)

    def _asked_to_stop(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            logger.warning("%s again: stopping without grace", number.name)
            self._hurry.set()
        self._stop.set()

    def _asked_to_reload(self) -> None:
        if self._reload is None or self._state != "serving":
            return
        task = asyncio.create_task(self._run_reload(self._reload))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_reload(self, reload: Hook) -> None:
        try:
            await reload()
        except Exception as error:
            logger.error("users were not reloaded: %s", error)

    def _write_ports(self) -> None:
        document = {**self.ports, "host": self._settings.host, "pid": os.getpid(), "tls": self._settings.tls}
        resources.write_atomically(self._paths.ports, json.dumps(document).encode())

    def _write_processes(self) -> None:
        rows = [msgspec.to_builtins(slot.status()) for slots in self._slots.values() for slot in slots]
        document = {"pid": os.getpid(), "state": self._state, "since_ns": self._started_ns, "processes": rows}
        try:
            resources.write_atomically(self._paths.processes, json.dumps(document).encode())
        except OSError as error:
            # A full disk: whoever looks sees what was. Children are started again all the same.
            logger.warning("the state of the processes cannot be written down: %s", error)

    def _release(self) -> None:
        """Close what the node held; the lock last, when nothing of this node is left."""
        for path in (self._paths.ports, self._paths.processes, self._paths.sandbox):
            path.unlink(missing_ok=True)
        for listener in self._listeners.values():
            listener.close()
        arena_fds = [fd for arena in self._arenas for fd in (*arena.regions, arena.span_table)]
        for fd in (*arena_fds, self._counters_fd, self._shares_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
