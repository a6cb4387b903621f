"""What one process of a Dask cluster needs to judge: a fork server, sandboxes, connections, and a loop they belong to.

In: ``Access``; tasks as bytes, from any thread. Out: answers as bytes. What always holds: everything is started with the first
task and is gone after ``close``, or after ``idle_s`` without a task (a client that was killed closes nothing); a process
that is killed takes its fork server with it, and that its sandboxes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator

from gateway.replay.access import Access
from gateway.replay.ranges import Endpoint
from kernels.offline import pieces
from kernels.offline.judging import Again, Judging
from kernels.offline.seats import Seats
from kernels.offline.zygote import NoZygote, private_zygote

IDLE_S = 60.0
CLOSE_S = 30.0
READY_S = 300.0
"""For the fork server, which takes seconds of a core: many workers may begin at once on a machine that others use, too."""
SPARE_PROCESSES = 8
"""Sandboxes beside those that judge: readers of structures, and ones that are just ending."""


class Station:
    """``threads``: how many tasks run at once."""

    def __init__(self, access: Access, threads: int, idle_s: float = IDLE_S) -> None:
        self._access = access
        self._threads = threads
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._life: _Life | None = None
        self._closed = False

    def begin(self) -> None:
        """A task is to be expected: what takes seconds to start may start. Returns at once."""
        self._entered().leave()

    def _entered(self) -> _Life:
        with self._lock:
            if self._closed:
                raise Again("the replay is over")
            if self._life is None or not self._life.enter():
                self._life = _Life(self._access, self._threads, self._idle_s)
                self._life.enter()
            return self._life

    def run(self, task: bytes) -> bytes:
        """Blocks. Raises Again, also when the station is closed meanwhile."""
        life = self._entered()
        try:
            return life.run(task)
        finally:
            life.leave()

    def close(self) -> None:
        """Tasks that run fail with Again. Idempotent; returns when no process is left."""
        with self._lock:
            self._closed = True
            life, self._life = self._life, None
        if life is not None:
            life.close()


class _Life:
    """From the first task to the last: one thread with its loop, which owns the processes."""

    def __init__(self, access: Access, threads: int, idle_s: float) -> None:
        self._access = access
        self._threads = threads
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._users = 0
        self._left_s = time.monotonic()
        self._over = False
        self._ready: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, Judging]] = concurrent.futures.Future()
        self._end: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._live, name="hiss-replay", daemon=True)
        self._thread.start()

    def enter(self) -> bool:
        """False: it is over."""
        with self._lock:
            self._users += not self._over
            return not self._over

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            self._left_s = time.monotonic()

    def run(self, task: bytes) -> bytes:
        loop, judging = self._ready.result()
        work = asyncio.run_coroutine_threadsafe(self._work(judging, task), loop)
        try:
            return work.result()
        except concurrent.futures.CancelledError:
            raise Again("the replay is over") from None

    @staticmethod
    async def _work(judging: Judging, task: bytes) -> bytes:
        return pieces.encode(await judging.run(pieces.task(task)))

    def close(self) -> None:
        with self._lock:
            self._over = True
        with contextlib.suppress(Exception):
            loop, _ = self._ready.result(CLOSE_S)
            assert self._end is not None
            loop.call_soon_threadsafe(self._end.set)
        self._thread.join(CLOSE_S)

    # -- in its thread

    def _live(self) -> None:
        try:
            with self._reading() as endpoint, private_zygote(2 * self._threads + SPARE_PROCESSES, READY_S) as socket:
                asyncio.run(self._serve(socket, endpoint))
        except (NoZygote, LookupError, OSError) as error:
            self._failed(f"no sandbox on this machine: {error}" if isinstance(error, NoZygote) else str(error))
        except BaseException as error:
            self._failed(f"{type(error).__name__}: {error}")
            raise

    def _failed(self, reason: str) -> None:
        with self._lock:
            self._over = True
        if not self._ready.done():
            self._ready.set_exception(Again(reason))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Endpoint]:
        endpoint = Endpoint(self._access)
        try:
            yield endpoint
        finally:
            endpoint.close()

    async def _serve(self, socket: str, endpoint: Endpoint) -> None:
        self._end = asyncio.Event()
        seats = Seats(socket, self._threads + 1, endpoint.array)
        judging = Judging(socket, seats, endpoint.open)
        self._ready.set_result((asyncio.get_running_loop(), judging))
        try:
            while not self._idle():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(1.0, self._idle_s)):
                        await self._end.wait()
                    break
        finally:
            endpoint.close()
            running = asyncio.all_tasks() - {asyncio.current_task()}
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await seats.close()

    def _idle(self) -> bool:
        """True once: nobody enters any more then."""
        with self._lock:
            if not self._users and time.monotonic() - self._left_s >= self._idle_s:
                self._over = True
            return self._over
