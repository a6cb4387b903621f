"""One sandbox and the streams that share it: carries out what the schedule decides, and survives the sandbox's death.

In: frames of streams with one kernel, one parameter set and one geometry; outcomes of the process. Out: calls on each
stream's ``LaneClient``. What always holds: the process is started as soon as the lane exists (compiling overlaps with
the first frames); frames are claimed from the arena only when a process is ready for them; a batch is released only once
the process has answered or is gone; nothing here raises into the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingest.counters import Counters
from ingest.ports import Domain, FrameBatch, KernelRefused
from ingest.records import FrameGeometry
from kernels.attach import Attachment, stages_of
from kernels.contract import Stage
from kernels.decode import table as encoded
from kernels.offload.device import Differs, Plans
from kernels.offload.verify import Verifier
from kernels.pace import Meter
from kernels.sandbox import Batch, Reply, Sandbox, SandboxFailed, SandboxLimits
from kernels.scheduler import Collect, Reset, Run, Schedule
from kernels.tally import Tally
from kernels.wire import MAX_BATCH

log = logging.getLogger("hiss.kernels")

StateArrays = dict[str, npt.NDArray[np.generic]]

SLOTS_MAX = 16
SLOT_STATE_BYTES_MAX = 256 << 20
"""State memory of one sandbox, over all its slots (one slot always exists)."""
BATCH_BYTES_MAX = 16 << 20
"""Bounds how long one stream's batch can delay another's (about 4 ms at 4 GB/s)."""
TRANSIENT = ("internal", "unavailable")
"""Kinds of refusal that say nothing about the kernel: the product stays owed."""
STATE_ON_LOOP_BYTES_MAX = 1 << 20
"""Larger states are copied and merged in a thread, so that the loop goes on receiving."""
START_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class LaneClient(Protocol):
    """One kernel's pass over one stream, as its lane sees it. Calls come from the event loop and return at once."""

    def table(self, run: Run) -> bytes:
        """Where the stored chunks of the run's frames lie (kernels/decode/table.py); empty: plainly, back to back."""
        ...

    def judged(self, run: Run, reply: Reply) -> None: ...
    def stopped(self, frame: int) -> None:
        """This frame said STOP; none behind it is judged. Called after ``judged``, and after what follows is void."""
        ...

    def restarted(self) -> None:
        """What was merged is void: all frames are judged anew."""
        ...

    def voided(self, first: int, count: int) -> None:
        """The state these frames went into is lost; they lag now."""
        ...

    def merge(self, state: StateArrays) -> None:
        """Fold a part of the state into what was taken out before. May run in a thread, one call at a time."""
        ...

    def banked(self, final: bool) -> None:
        """What was merged counts now; ``final``: nothing of the stream is left in the sandbox."""
        ...

    def lagged(self) -> None:
        """Frames of the stream lag that did not before."""
        ...

    def refused(self, kind: str, reason: str) -> None:
        """No frame of this stream will ever be judged here. ``kind``: compile, or as of SandboxFailed, or internal."""
        ...


class LaneOwner(Protocol):
    """The host, as its lanes see it."""

    plans: Plans
    tally: Tally

    zygote_socket: str
    counters: Counters
    sandbox_limits: SandboxLimits

    async def admit(self, lane: Lane) -> int:
        """Returns once this lane may have a process: how many lanes of the worker have one then."""
        ...

    def refused(self, lane: Lane) -> None:
        """The kernel does not compile for this layout."""
        ...

    def paced(self, lane: Lane, bytes_per_s: float) -> None:
        """One core judges so many bytes of a stream a second."""
        ...

    def idle(self, lane: Lane) -> None:
        """The lane's last stream left."""
        ...

    def dismissed(self, lane: Lane) -> None:
        """The lane's process is gone."""
        ...

    def struck(self, lane: Lane, failure: SandboxFailed) -> bool:
        """A sandbox failed; True when that was the kernel's last chance."""
        ...


class LaneRefused(Exception):
    """The lane serves nobody any more; ``kind`` and text as for ``LaneClient.refused``."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclasses.dataclass(frozen=True, slots=True)
class LaneKey:
    """What streams must have in common to share a sandbox."""

    bucket: str
    kernel: str
    sha256: str
    settings: tuple[object, ...]
    """Sources, parameters and arrays of every kernel of the chain."""
    dtype: str
    shape: tuple[int, ...]
    regions: tuple[int, ...]
    device: str

    @classmethod
    def of(cls, bucket: str, attachment: Attachment, geometry: FrameGeometry, domain: Domain) -> LaneKey:
        kernel = attachment.kernel
        settings = tuple(
            (
                use.kernel,
                use.sha256,
                # 1 and 1.0 are equal, and not the same parameter to a compiler.
                tuple((name, type(value).__name__, value) for name, value in sorted(use.params.items())),
                tuple(sorted(use.arrays.items())),
            )
            for use in attachment.uses
        )
        dtype = np.dtype(geometry.dtype).name
        return cls(
            bucket,
            kernel.name,
            kernel.sha256,
            settings,
            dtype,
            geometry.shape,
            tuple(domain.region_fds),
            attachment.device,
        )


class Lane:
    """Made by the host; ``close`` ends the process and gives the domain back."""

    def __init__(self, key: LaneKey, attachment: Attachment, geometry: FrameGeometry, domain: Domain, owner: LaneOwner):
        self.key = key
        self.attachment = attachment
        self.geometry = geometry
        self.idle_since_s: float | None = time.monotonic()
        self._frame_bytes = geometry.frame_bytes
        self._domain = domain
        self._owner = owner
        self._sandbox: Sandbox | None = None
        self._clients: dict[int, LaneClient] = {}
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._failure: tuple[str, str] | None = None
        self._admitted = asyncio.Event()
        self._begun = False
        self._limits = owner.sandbox_limits
        self._state_bytes = max(1, sum(spec.size_bytes for spec in attachment.kernel.state))
        self._slots = max(1, min(SLOTS_MAX, SLOT_STATE_BYTES_MAX // self._state_bytes))
        self._schedule = Schedule(
            self._slots,
            batch_bytes_max=BATCH_BYTES_MAX,
            batch_frames_max=MAX_BATCH,
            ordered=attachment.kernel.ordered,
        )
        self._conclusions: deque[tuple[StateArrays, asyncio.Future[StateArrays]]] = deque()
        self._batch_seconds = owner.counters.histogram("hiss_kernel_batch_seconds")
        self._bytes = owner.counters.cell("hiss_kernel_bytes_total")
        self._cpu_seconds = owner.counters.cell("hiss_kernel_cpu_seconds_total")
        self._meter = Meter()
        # For the lane's whole life, not only the process's: between two processes the regions must stay this bucket's.
        domain.hold()
        self._verifier: Verifier | None = None
        self._task = asyncio.create_task(self._work(), name=f"lane {key.bucket}/{key.kernel}")

    # -- the streams

    def join(self, client: LaneClient, *, alone: bool = False, encoded: int = 0) -> int:
        """``alone``: the stream's frames are objects of one frame each, numbered as they come. ``encoded``: where the
        frames are found by ``LaneClient.table``, how many of them at most in one batch."""
        number = next(self._numbers)
        self._clients[number] = client
        self._schedule.join(number, self._frame_bytes, alone=alone, encoded=encoded)
        self.idle_since_s = None
        if self._failure is not None:
            client.refused(*self._failure)
        self._wake.set()
        return number

    def offer(self, stream: int, batch: FrameBatch, *, live: bool) -> None:
        self._schedule.offer(stream, batch, live=live)
        self._wake.set()

    def lag(self, stream: int, first: int, count: int) -> None:
        self._schedule.lag(stream, first, count)
        self._wake.set()

    def load(self, stream: int, count_max: int) -> tuple[int, int] | None:
        return self._schedule.load(stream, count_max)

    def forget(self, stream: int, first: int, count: int) -> None:
        """Frames that were ``load``ed and will not come: their objects are gone."""
        self._schedule.forget(stream, first, count)
        self._wake.set()

    def finish(self, stream: int) -> None:
        """Every frame is announced; the final state follows once all are judged."""
        self._schedule.close(stream)
        self._wake.set()

    def leave(self, stream: int) -> None:
        """Idempotent."""
        if self._clients.pop(stream, None) is None:
            return
        self._schedule.leave(stream)
        if self._verifier is not None:
            self._verifier.forget(stream)
        if not self._clients:
            self.idle_since_s = time.monotonic()
            self._owner.idle(self)
        self._wake.set()

    async def conclude(self, stream: int, state: StateArrays) -> StateArrays:
        """The state after the kernel's finish(), for a stream that has not left yet. Raises LaneRefused."""
        assert stream in self._clients or self._failure is not None
        if self._failure is not None:
            raise LaneRefused(*self._failure)
        answer: asyncio.Future[StateArrays] = asyncio.get_running_loop().create_future()
        self._conclusions.append((state, answer))
        self._wake.set()
        return await answer

    async def admitted(self) -> None:
        """Returns once the lane may have a process, or never will."""
        await self._admitted.wait()

    @property
    def frames_waiting(self) -> int:
        return self._schedule.unjudged()

    @property
    def sandbox_pid(self) -> int | None:
        """Process id of the sandbox while it lives (for operators and tests)."""
        return self._sandbox.pid if self._sandbox is not None and self._sandbox.alive else None

    @property
    def refused(self) -> bool:
        """The kernel cannot serve any stream of this layout; whoever joins is told why."""
        return self._failure is not None and self._failure[0] not in TRANSIENT

    async def close(self) -> None:
        """End the process; streams that are left get ``refused``. Idempotent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if not self._begun:
            # A task that is cancelled before its first step runs nothing, not even its end.
            self._begun = True
            self._refuse("unavailable", "the kernel host is closing")
            await self._end()

    # -- the work

    async def _work(self) -> None:
        self._begun = True
        try:
            self._limits = self._owner.sandbox_limits.among(await self._owner.admit(self))
            self._admitted.set()
            while self._failure is None:
                await self._serve()
        except asyncio.CancelledError:
            self._refuse("unavailable", "the kernel host is closing")
            raise
        except Exception:
            log.exception("lane of kernel %s in bucket %s failed", self.key.kernel, self.key.bucket)
            self._refuse("internal", "internal error of the kernel host")
        finally:
            await self._end()

    async def _end(self) -> None:
        await self._end_process()
        await self._end_verifier()
        self._schedule.failed()
        self._domain.drop()
        self._owner.dismissed(self)

    async def _serve(self) -> None:
        """One life of the process."""
        try:
            self._sandbox = await self._start()
        except KernelRefused as refusal:
            self._owner.refused(self)
            self._refuse("compile", str(refusal))
            return
        except SandboxFailed as failure:
            self._died(failure)
            return
        try:
            while True:
                while self._conclusions:
                    await self._conclude()
                step = self._schedule.next()
                self._after_choice()
                if step is None:
                    self._wake.clear()
                    await self._wake.wait()
                elif isinstance(step, Run):
                    await self._judge(step)
                else:
                    await self._move_state(step)
        except SandboxFailed as failure:
            await self._end_process()
            self._died(failure)
        except Differs as found:
            await self._end_process()
            self._fall_back(found)

    async def _start(self) -> Sandbox:
        """Start a process; waits out a missing zygote, which is nobody's fault."""
        stages = await self._stages()
        for attempt in itertools.count():
            try:
                return await Sandbox.start(
                    self._owner.zygote_socket,
                    stages,
                    dtype=self.key.dtype,
                    shape=self.key.shape,
                    region_fds=self._domain.region_fds,
                    region_bytes=self._domain.region_bytes,
                    slots=self._slots,
                    limits=self._limits,
                )
            except SandboxFailed as failure:
                if failure.kind != "unavailable":
                    raise
                log.warning("no sandbox for kernel %s: %s; trying again", self.key.kernel, failure.message)
                await asyncio.sleep(START_BACKOFF_S[min(attempt, len(START_BACKOFF_S) - 1)])
        raise AssertionError("unreachable")

    # -- an offloaded kernel: the model runs, sampled frames are compared, and what differs is judged again

    async def _stages(self) -> list[Stage]:
        plan = await self._owner.plans.plan(self.key.bucket, self.attachment, self.key.dtype, self.key.shape)
        await self._end_verifier()
        if plan is None:
            return stages_of(self.attachment)
        self._verifier = Verifier(
            plan, self.attachment, self._owner.zygote_socket, self._owner.sandbox_limits, self._owner.tally.compared
        )
        return plan.stages(self.attachment)

    async def _sample(self, run: Run) -> None:
        """The batch is still held: its first frame may be copied."""
        verifier = self._verifier
        if verifier is None or not verifier.wants(run.stream):
            return
        region_fd = self._domain.region_fds[run.region]
        if self._frame_bytes > STATE_ON_LOOP_BYTES_MAX:
            await _to_its_end(lambda: verifier.copy(region_fd, run.offset))
        else:
            verifier.copy(region_fd, run.offset)
        verifier.compare(run.stream, 0 if run.alone else run.first_frame)

    def _fall_back(self, found: Differs) -> None:
        """Nothing that the model counted and that was not handed over counts; the plain kernel judges it again."""
        log.error(
            "kernel %s in bucket %s: the offload failed, it runs on the cpu from now on: %s",
            self.key.kernel,
            self.key.bucket,
            found,
        )
        self._owner.tally.error("offload")
        self._owner.plans.failed(self.key.bucket, self.attachment, str(found))
        self._void()

    async def _end_verifier(self) -> None:
        verifier, self._verifier = self._verifier, None
        if verifier is not None:
            await asyncio.shield(verifier.close())

    async def _judge(self, run: Run) -> None:
        assert self._sandbox is not None
        began_s, began_cpu_s = time.perf_counter(), self._sandbox.cpu_s()
        # A stream that left has no run begun any more.
        table = self._clients[run.stream].table(run)
        region, offset = (0, 0) if table else (run.region, run.offset)
        reply = await self._sandbox.run(
            Batch(region, offset, self._frame_bytes, run.first_frame, run.count, run.slot, run.alone, table=table)
        )
        client = self._clients.get(run.stream)
        if client is not None:
            # Feedback leaves from here: before anything else is done.
            client.judged(run, reply)
        stored_bytes = encoded.stored_bytes(table) if table else run.count * self._frame_bytes
        self._count(stored_bytes, self._sandbox.cpu_s() - began_cpu_s)
        await self._sample(run)
        if reply.stopped_at is None:
            self._schedule.done()
        else:
            self._stop(run, reply.stopped_at)
        self._batch_seconds.observe(time.perf_counter() - began_s)
        self._bytes.add(run.count * self._frame_bytes)

    def _count(self, stored_bytes: int, cpu_s: float) -> None:
        if cpu_s > 0.0:
            self._cpu_seconds.add(cpu_s)
            bytes_per_s = self._meter.add(stored_bytes, cpu_s)
            if bytes_per_s is not None:
                self._owner.paced(self, bytes_per_s)

    def _stop(self, run: Run, frame: int) -> None:
        void = self._schedule.stopped(frame)
        client = self._clients.get(run.stream)
        if client is None:
            return
        for first, count in void:
            client.voided(first, count)
        if void:
            client.restarted()
        client.stopped(frame)

    async def _conclude(self) -> None:
        """Run finish() for whoever waits longest; a process that dies over it leaves it to the next one."""
        assert self._sandbox is not None
        state, answer = self._conclusions[0]
        if not answer.done():
            result = await self._sandbox.finish(state)
            if not answer.done():
                answer.set_result(result)
        self._conclusions.popleft()

    async def _move_state(self, step: Reset | Collect) -> None:
        sandbox, client = self._sandbox, self._clients.get(step.stream)
        assert sandbox is not None
        if isinstance(step, Collect) and self._verifier is not None:
            await self._verifier.settled()

        def move() -> None:
            if isinstance(step, Reset):
                sandbox.reset(step.slot)
            elif step.slot is not None and client is not None:
                client.merge(sandbox.collect(step.slot))

        if self._state_bytes > STATE_ON_LOOP_BYTES_MAX:
            await _to_its_end(move)
        else:
            move()
        self._schedule.done()
        if isinstance(step, Collect) and client is not None and step.stream in self._clients:
            client.banked(step.final)

    def _after_choice(self) -> None:
        """Choosing may have found revoked frames: their streams must hear that they lag."""
        for number, client in list(self._clients.items()):
            if self._schedule.lagging(number):
                client.lagged()

    def _died(self, failure: SandboxFailed) -> None:
        """The process is gone and reaped."""
        self._void()
        if failure.kind == "unavailable":
            return
        self._limits = dataclasses.replace(self._limits, on_probation=True)
        if self._owner.struck(self, failure):
            self._refuse(failure.kind, failure.message)

    def _void(self) -> None:
        for stream, first, count in self._schedule.failed():
            client = self._clients.get(stream)
            if client is not None:
                client.voided(first, count)
        self._after_choice()

    def _refuse(self, kind: str, reason: str) -> None:
        if self._failure is None:
            self._failure = (kind, reason)
            self._admitted.set()
        while self._conclusions:
            _, answer = self._conclusions.popleft()
            if not answer.done():
                answer.set_exception(LaneRefused(kind, reason))
        for client in list(self._clients.values()):
            client.refused(kind, reason)

    async def _end_process(self) -> None:
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            with contextlib.suppress(SandboxFailed):
                await asyncio.shield(sandbox.close())


async def _to_its_end(work: Callable[[], None]) -> None:
    """Run in a thread; a cancelled caller still waits, because the thread uses memory that the caller would free."""
    job = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise
