"""The client's side of a replay: tasks made of what is listed, kept in flight, folded in the order of keys.

In: listed objects in bytewise order of their keys; a cluster. Out: products to ``Results``, failures by object. What always
holds: tasks are folded in the order in which they were made, each once, whichever attempt of it came through; so many are
in flight that no Dask worker idles, and no more than a few answers wait for an earlier one; a task of several objects that
fails is done again object by object, so that one costs no other.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gateway.cli.output import CliError, ExitCode
from gateway.cli.s3 import S3, Listed
from gateway.replay.cluster import Cluster
from gateway.replay.plan import NOBODY, LiveRun, Settings
from gateway.replay.results import Results
from ingest.records import FrameGeometry
from ingest.runs import run_of
from kernels.offline import pieces
from kernels.offline.assembly import Arrays, Maker, RunAssembly, arrays_of, joined, of_object
from kernels.offline.pieces import Answer, Judged, Part, Task, Wanted
from kernels.runs.names import exact
from kernels.runs.partial import state_bytes

if TYPE_CHECKING:
    from distributed import Future

RETRIES = 2
"""Of a task that says it may be tried again; one whose worker died is retried by Dask itself (its allowed-failures, 3)."""
AHEAD = 3
"""Tasks in flight for each thread of the cluster."""
WAITING = 4
"""Times as many may wait for an earlier one to be folded."""
BATCH_OBJECTS = 64
BATCH_BYTES = 64 << 20
"""Small neighbours go together."""
STATES_BYTES = 64 << 20
"""States of one answer (one always fits)."""
SCATTER_BYTES = 1 << 20
"""Larger tasks go to a worker beside the graph."""


@dataclasses.dataclass(eq=False, slots=True)
class _Slot:
    """A task on its way; ``instead``: the tasks that took its place."""

    run: bytes
    task: Task
    last: bool = True
    """Of the parts of an object."""
    epochs: tuple[tuple[int, int], ...] = ()
    answer: Answer | None = None
    instead: list[_Slot] = dataclasses.field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.answer is not None or (bool(self.instead) and all(one.done for one in self.instead))

    def all(self) -> Iterator[_Slot]:
        if self.answer is not None:
            yield self
        for one in self.instead:
            yield from one.all()


Geometry = Callable[[Listed], tuple[FrameGeometry, int] | None]
"""How the plain frames of a large object lie, and its CRC64NVME; None where it is not to be cut."""


class Drive:
    """One replay. ``progress`` is told of bytes and frames that were folded."""

    def __init__(
        self,
        cluster: Cluster,
        s3: S3,
        bucket: str,
        settings: Settings,
        results: Results,
        split_bytes: int,
        geometry: Geometry,
        progress: Callable[[int, int], None],
    ) -> None:
        self.failures: list[tuple[bytes, str]] = []
        self.frames = 0
        self.bytes = 0
        self.first_s: float | None = None
        """When the first answer came (time.monotonic): until then fork servers start and kernels are compiled."""
        self.first_frames = 0
        """How many were in it."""
        self._cluster = cluster
        self._s3 = s3
        self._bucket = bucket
        self._settings = settings
        self._results = results
        self._split_bytes = split_bytes
        self._geometry = geometry
        self._progress = progress
        self._kernel = settings.now.kernel
        self._maker = Maker(bucket, settings.attachments, self._object_id, self._conclude)
        self._live: dict[bytes, LiveRun] = {}
        self._runs: dict[bytes, RunAssembly] = {}
        self._deferred: dict[bytes, dict[int, list[Wanted]]] = {}
        self._parts: list[Judged] = []
        self._futures: dict[str, tuple[Future, _Slot | None]] = {}

    def run(self, objects: Iterable[Listed]) -> None:
        """Raises CliError where the cluster is gone."""
        from distributed import as_completed

        slots = self._slots(objects)
        waiting: collections.deque[_Slot] = collections.deque()
        completed: Any = as_completed(loop=self._cluster.client.loop)
        flying = self._cluster.threads * AHEAD
        try:
            while True:
                while len(self._futures) < flying and len(waiting) < flying * WAITING:
                    slot = next(slots, None)
                    if slot is None:
                        break
                    completed.add(self._submit(slot.task, slot))
                    waiting.append(slot)
                if not waiting:
                    break
                for again in self._settle(next(completed)):
                    completed.add(again)
                while waiting and waiting[0].done:
                    for slot in waiting.popleft().all():
                        self._fold(slot)
            self._close_runs(None)
        finally:
            self._cancel()

    def _cancel(self) -> None:
        if self._futures:
            futures = [future for future, _ in self._futures.values()]
            self._futures.clear()
            try:
                self._cluster.client.cancel(futures, force=True, reason="the replay is over")
            except Exception:
                # Of a scheduler that has gone nothing can be cancelled, and nothing runs there.
                return

    # -- tasks

    def _slots(self, objects: Iterable[Listed]) -> Iterator[_Slot]:
        size = sum(spec.size_bytes for spec in self._kernel.state)
        most = max(1, min(BATCH_OBJECTS, STATES_BYTES // max(1, size)))
        batch: list[Wanted] = []
        batch_bytes = 0
        for run, listed in ((run_of(one.key), one) for one in objects):
            if batch and (
                run_of(batch[0].key) != run or len(batch) >= most or batch_bytes + listed.size_bytes > BATCH_BYTES
            ):
                yield self._slot(batch)
                batch, batch_bytes = [], 0
            wanted, parts = self._cut(listed, self._wanted(run, listed))
            if parts:
                if batch:
                    yield self._slot(batch)
                    batch, batch_bytes = [], 0
                for part in parts:
                    yield self._slot([wanted], part, last=part is parts[-1])
                continue
            batch.append(wanted)
            batch_bytes += listed.size_bytes
        if batch:
            yield self._slot(batch)

    def _slot(self, objects: list[Wanted], part: Part | None = None, *, last: bool = True) -> _Slot:
        recipe = self._settings.recipe(self._bucket)
        return _Slot(run_of(objects[0].key), Task(recipe, tuple(objects), part=part), last, objects[0].epochs)

    def _wanted(self, run: bytes, listed: Listed) -> Wanted:
        if run not in self._live:
            self._live[run] = self._settings.live_run(self._s3, self._bucket, run)
        member = self._live[run].members.get(listed.key)
        if member is None:
            return Wanted(listed.key, listed.etag, listed.size_bytes)
        return Wanted(listed.key, listed.etag, listed.size_bytes, member.epochs, member.crc64nvme)

    def _cut(self, listed: Listed, wanted: Wanted) -> tuple[Wanted, list[Part]]:
        """Where the object is too large for one task and its kernel does not mind: frames by parts, each within one epoch."""
        if listed.size_bytes <= self._split_bytes or self._kernel.ordered or not exact(self._kernel):
            return wanted, []
        found = self._geometry(listed)
        if found is None:
            return wanted, []
        geometry, crc = found
        if wanted.of_crc not in (None, crc):
            wanted = Wanted(listed.key, listed.etag, listed.size_bytes)
        frames = (listed.size_bytes - geometry.origin) // geometry.frame_bytes
        frames = frames if geometry.count is None else min(frames, geometry.count)
        together = max(1, self._split_bytes // geometry.frame_bytes)
        parts = []
        ends = [first for first, _ in wanted.epochs[1:]] + [frames]
        for (begin, number), end in zip(wanted.epochs, ends, strict=True):
            parts += [Part(at, min(at + together, end), number) for at in range(begin, min(end, frames), together)]
        return wanted, parts if len(parts) > 1 else []

    def _submit(self, task: Task, slot: _Slot | None = None) -> Future:
        from gateway.replay.dask_worker import judge

        body: Any = pieces.encode(task)
        client, name = self._cluster.client, self._cluster.plugin
        if len(body) > SCATTER_BYTES:
            body = client.scatter(body)
        key = f"{name}-{next(_numbers)}"
        future = client.submit(judge, body, name, key=key, pure=False, retries=RETRIES)
        self._futures[key] = (future, slot)
        return future

    def _settle(self, future: Future) -> list[Future]:
        """What came of a task: an answer, or others in its place."""
        _, slot = self._futures.pop(future.key)
        assert slot is not None
        task = slot.task
        outcome = self._outcome(future)
        if isinstance(outcome, Answer):
            slot.answer = outcome
            if self.first_s is None:
                self.first_s = time.monotonic()
                self.first_frames = sum(len(one.verdicts) for one in outcome.objects)
            return []
        if len(task.objects) > 1:
            slot.instead = [
                _Slot(slot.run, Task(task.recipe, (one,)), epochs=one.epochs) for one in task.objects
            ]  # fmt: skip
            return [self._submit(one.task, one) for one in slot.instead]
        slot.answer = Answer(tuple(Judged(one.key, failure=outcome) for one in task.objects))
        return []

    def _outcome(self, future: Future) -> Answer | str:
        """The answer, or why there is none. Raises CliError where the cluster is gone."""
        from distributed import CancelledError
        from distributed.scheduler import KilledWorker

        try:
            error = future.exception()
            if error is None:
                return pieces.answer(future.result())
        except (CancelledError, OSError):
            raise CliError("the Dask scheduler went away", ExitCode.NO_NODE) from None
        if isinstance(error, KilledWorker):
            return "the Dask workers that it was given to died"
        return str(error) or type(error).__name__

    def _ask(self, task: Task) -> Answer | str:
        """One task, waited for."""
        future = self._submit(task)
        try:
            return self._outcome(future)
        finally:
            self._futures.pop(future.key, None)

    # -- answers, in order

    def _fold(self, slot: _Slot) -> None:
        answer = slot.answer
        assert answer is not None
        self._close_runs(slot.task.objects[0].key)
        if slot.run not in self._runs:
            self._runs[slot.run] = RunAssembly(self._maker, slot.run, self._live[slot.run].names)
        run = self._runs[slot.run]
        if slot.task.part is not None:
            self._fold_part(slot, run, answer)
            return
        shared = []
        for wanted, one in zip(slot.task.objects, answer.objects, strict=True):
            if one.deferred:
                number = one.epochs[0][1]
                self._deferred.setdefault(slot.run, {}).setdefault(number, []).append(wanted)
            elif one.single and one.state is None and not one.failure:
                shared.append(one)
                self._counted(one)
            else:
                self._take(run, one, answer)
        if shared:
            run.share(shared, answer)

    def _take(self, run: RunAssembly, one: Judged, answer: Answer) -> None:
        """A version that is not deferred and shares no state."""
        if one.failure:
            self._failed(run, one.key, one.failure)
            return
        self._counted(one)
        if not one.single:
            self._results.take(of_object(self._maker, one, answer))
        if not one.error:
            run.add(one, answer)

    def _fold_part(self, slot: _Slot, run: RunAssembly, answer: Answer) -> None:
        self._parts.append(answer.objects[0])
        if not slot.last:
            return
        parts, self._parts = self._parts, []
        one = joined(self._kernel, parts, slot.epochs)
        if self._kernel.has_finish and not one.failure and not one.error:
            assert one.state is not None
            try:
                result = self._conclude(one.epochs[-1][1], one, arrays_of(self._kernel, one.state))
            except _NotConcluded as reason:
                self._failed(run, one.key, str(reason))
                return
            one = _with_result(one, state_bytes(result))
        self._take(run, one, answer)

    def _close_runs(self, key: bytes | None) -> None:
        """Of the runs that lie behind the key, or of all."""
        for run in [run for run in self._runs if key is None or not key.startswith(run)]:
            assembly = self._runs.pop(run)
            for number, objects in self._deferred.pop(run, {}).items():
                self._in_order(assembly, number, objects)
            try:
                for made in assembly.made():
                    self._results.take(made)
            except _NotConcluded as reason:
                self.failures.append((run, str(reason)))
            self._live.pop(run, None)

    def _in_order(self, run: RunAssembly, number: int, objects: list[Wanted]) -> None:
        """The objects of one frame of an ordered kernel, in one state."""
        given = tuple(Wanted(one.key, one.etag, one.length, ((0, number),)) for one in objects)
        outcome = self._ask(Task(self._settings.recipe(self._bucket), given, sequence=True))
        if isinstance(outcome, str):
            for one in given:
                self._failed(run, one.key, outcome)
            return
        judged = [one for one in outcome.objects if not one.failure]
        for failed in (one for one in outcome.objects if one.failure):
            self._failed(run, failed.key, failed.failure)
        for found in judged:
            self._counted(found)
        if judged:
            run.share(judged, outcome)

    def _conclude(self, number: int, one: Judged, state: Arrays) -> Arrays:
        task = Task(
            self._settings.recipe(self._bucket), conclude=state_bytes(state), geometry=one.geometry, epoch=number
        )
        outcome = self._ask(task)
        if isinstance(outcome, str) or outcome.result is None:
            raise _NotConcluded(f"finish(): {outcome if isinstance(outcome, str) else 'gave no result'}")
        return arrays_of(self._kernel, outcome.result)

    def _object_id(self, one: Judged) -> bytes:
        """As the live product has it, where it is of the same bytes."""
        live = self._live.get(run_of(one.key))
        member = None if live is None else live.members.get(one.key)
        return member.object_id if member is not None and member.crc64nvme == one.crc64nvme else NOBODY

    def _counted(self, one: Judged) -> None:
        self.frames += one.frames
        self.bytes += one.length
        self._progress(one.length, one.frames)

    def _failed(self, run: RunAssembly, key: bytes, reason: str) -> None:
        self.failures.append((key, reason))
        run.failed(key, reason)
        self._progress(0, 0)


class _NotConcluded(Exception):
    """finish() could not be run over a state; ``str()`` says why."""


_numbers: Iterator[int] = itertools.count()


def _with_result(one: Judged, result: Mapping[str, bytes]) -> Judged:
    import msgspec

    return msgspec.structs.replace(one, result=dict(result))
