"""A persistent slot: one process of a role after the other, each with the same descriptors.

In: how to spawn (from ``gateway.supervisor.node``), a ``Backoff``. Out: a process that is kept running until ``stop``,
and ``Status`` rows for the status file. Every death is logged, counted and followed by a new process, for ever.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import logging
import signal
import time
from collections.abc import Awaitable, Callable

from gateway.supervisor.backoff import Backoff
from gateway.supervisor.child import Child

logger = logging.getLogger(__name__)


class SlotState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    """Dead; a new process starts after the back-off."""
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """One row of DATA/run/processes.json."""

    role: str
    slot: int
    state: str
    pid: int | None
    restarts: int
    since_ns: int
    """When the process was started, or when the slot entered its state; nanoseconds since the epoch."""
    failing: bool
    """It dies so often that an operator should look."""
    last_exit: str
    """How its last process ended; empty while none has."""


class Slot:
    """``spawn(restarts)`` starts a process; ``changed`` is called after every change of ``status``."""

    def __init__(
        self,
        role: str,
        number: int,
        spawn: Callable[[int], Awaitable[Child]],
        *,
        start_timeout_s: float,
        backoff: Backoff,
        changed: Callable[[], None],
        restarted: Callable[[], None],
    ) -> None:
        self.role = role
        self.number = number
        self.restarts = 0
        self.deaths_before_ready = 0
        self._spawn = spawn
        self._start_timeout_s = start_timeout_s
        self._changed = changed
        self._restarted = restarted
        self._backoff = backoff
        self._child: Child | None = None
        self._state = SlotState.STARTING
        self._since_ns = time.time_ns()
        self._last_exit = ""
        self._stopping = asyncio.Event()
        self._progress = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_running(), name=f"slot {self.role}/{self.number}")

    def status(self) -> Status:
        child = self._child
        return Status(
            role=self.role,
            slot=self.number,
            state=self._state,
            pid=child.pid if child else None,
            restarts=self.restarts,
            since_ns=child.since_ns if child else self._since_ns,
            failing=self._backoff.failing(time.monotonic()),
            last_exit=self._last_exit,
        )

    async def first_ready(self, attempts: int) -> bool:
        """Wait until a process of this slot is ready; False once ``attempts`` of them died before they were."""
        while self._state is not SlotState.READY:
            if self.deaths_before_ready >= attempts or self._stopping.is_set():
                return False
            self._progress.clear()
            await self._progress.wait()
        return True

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """SIGTERM, then SIGKILL after ``grace_s`` or as soon as ``hurry`` is set. Returns when the process is gone."""
        self._stopping.set()
        if self._task is None:
            return
        if self._child is not None:
            self._enter(SlotState.STOPPING)
            self._child.send(signal.SIGTERM)
        rush = asyncio.create_task(hurry.wait())
        await asyncio.wait({self._task, rush}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        rush.cancel()
        if self._child is not None:
            logger.warning("%s/%d did not stop in time: killed", self.role, self.number)
            self._child.send(signal.SIGKILL)
        await self._task
        self._enter(SlotState.STOPPED)

    async def _keep_running(self) -> None:
        while not self._stopping.is_set():
            self._enter(SlotState.STARTING)
            self._backoff.started(time.monotonic())
            ready, how = await self._one_process()
            if self._stopping.is_set():
                return
            if not ready:
                self.deaths_before_ready += 1
            delay_s = self._backoff.died(time.monotonic())
            logger.error("%s/%d %s; next start in %.1f s", self.role, self.number, how, delay_s)
            self._enter(SlotState.WAITING)
            try:
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            except TimeoutError:
                self.restarts += 1
                self._restarted()

    async def _one_process(self) -> tuple[bool, str]:
        """Run one process to its end; whether it became ready, and how it ended."""
        try:
            child = await self._spawn(self.restarts)
        except OSError as error:
            self._last_exit = f"could not be started: {error}"
            return False, self._last_exit
        self._child = child
        if self._stopping.is_set():
            child.send(signal.SIGTERM)
        ready = await child.ready(self._start_timeout_s)
        if ready and not self._stopping.is_set():
            self.deaths_before_ready = 0
            self._enter(SlotState.READY)
            logger.info("%s/%d is ready (pid %d)", self.role, self.number, child.pid)
        elif not ready and not self._stopping.is_set():
            # Dead already, or so late that it has to be taken for hung.
            child.send(signal.SIGKILL)
        code = await child.wait()
        self._child = None
        self._last_exit = _how(code, ready)
        return ready, self._last_exit

    def _enter(self, state: SlotState) -> None:
        self._state = state
        self._since_ns = time.time_ns()
        self._progress.set()
        self._changed()


def _how(code: int, ready: bool) -> str:
    before = "" if ready else " before it was ready"
    if code >= 0:
        return f"exited with code {code}{before}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}{before}"
