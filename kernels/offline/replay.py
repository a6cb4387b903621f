"""Computing a product again from what it records, and comparing bit by bit.

In: a ``Recorded`` product, and for each of its inputs a body that has the recorded checksum. Out: ``Difference``s, none when
everything is the same. Every input is judged in a state of its own, epoch by epoch, and states merge in the order of the
inputs: the order in which floating-point results were merged, too. One-frame objects of a run by an ordered kernel go
through one state, in their order. Where a kernel's answer depends on what is in the state
while frames are judged in several parts, the order of parts is not recorded and a difference may come from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ingest.ports import KernelRefused
from kernels.contract import Kernel, Stage, merge
from kernels.gate import admit
from kernels.offline.body import Body
from kernels.offline.memory import Window, window_bytes
from kernels.offline.runner import Arrays, Found, Runner
from kernels.recorded import Recorded, RecordedArray, RecordedInput
from kernels.verdicts import AFTER_STOP

Array = npt.NDArray[np.generic]
OBJECT_COLUMN = "object"
"""Of the rows of a run: number of the input (kernels/runs/product.py)."""


class Impossible(Exception):
    """The product cannot be computed again; ``str()`` says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """``what``: state/NAME, result/NAME, rows/NAME or verdicts; ``how`` names the first place and both values."""

    what: str
    how: str


@dataclasses.dataclass(frozen=True, slots=True)
class Replayed:
    """``verdicts`` of all inputs one after the other, ``rows`` by column."""

    state: Arrays
    result: Arrays | None
    rows: Mapping[str, Array] | None
    verdicts: npt.NDArray[np.uint8]
    frames: int


def kernels_of(recorded: Recorded) -> tuple[list[Kernel], list[str]]:
    """The chain, and what is odd about it. Raises Impossible."""
    listed = recorded.about_run.get("members_listed", len(recorded.inputs))
    if recorded.about_run.get("members", listed) != listed:
        raise Impossible(
            f"the run has {recorded.about_run['members']} members, its product names {listed} of them only"
        )
    kernels, notes = [], []
    for stage in recorded.stages:
        try:
            kernel = admit(stage.name, stage.source.encode())
        except KernelRefused as refusal:
            raise Impossible(f"this version of hiss does not admit the kernel: {refusal}") from None
        if kernel.sha256 != stage.sha256:
            notes.append(
                f"{kernel.file}: the recorded source has another SHA-256 than it says (its line ends were changed)"
            )
        kernels.append(kernel)
    return kernels, notes


class Replay:
    """One product. ``array`` fetches a parameter array that is not in the product (raises Impossible)."""

    def __init__(
        self, zygote_socket: str, recorded: Recorded, kernels: Sequence[Kernel], array: Callable[[RecordedArray], Array]
    ) -> None:
        self._zygote_socket = zygote_socket
        self._recorded = recorded
        self._kernels = kernels
        self._array = array
        self._state: Arrays | None = None
        self._in_order: Arrays | None = None
        """State of an ordered kernel after the one-frame objects so far."""
        self._inputs = 0
        self._rows: list[tuple[int, npt.NDArray[np.void]]] = []
        self._verdicts: list[npt.NDArray[np.uint8]] = []
        self._frames = 0
        self._window: Window | None = None
        self._runners: dict[tuple[int, str, tuple[int, ...]], Runner] = {}

    async def add(self, one: RecordedInput, body: Body) -> None:
        """Judge the next input. Raises Impossible, KernelRefused, SandboxFailed."""
        if body.frames < one.frames:
            raise Impossible(
                f"{_shown(one)}: {body.frames} frames are found in it, the product was made of {one.frames}"
            )
        alone = bool(self._recorded.run) and one.frames == 1
        stopped = False
        for number, (first, settings) in enumerate(one.epochs):
            end = one.epochs[number + 1][0] if number + 1 < len(one.epochs) else one.frames
            if stopped or first >= end:
                continue
            runner = await self._runner(settings, body)
            ordered = alone and self._kernels[-1].ordered
            found = await runner.judge(body, first, end, alone=alone, fresh=not ordered or self._in_order is None)
            if ordered:
                self._in_order = found.state
            else:
                self._merge(found.state)
            self._take(found)
            stopped = found.stopped_at is not None
        missing = self._frames + one.frames - sum(len(part) for part in self._verdicts)
        if missing:
            self._verdicts.append(np.full(missing, AFTER_STOP, np.uint8))
        self._frames += one.frames
        self._inputs += 1

    async def end(self) -> Replayed:
        if self._in_order is not None:
            self._merge(self._in_order)
        if self._state is None:
            raise Impossible("the product names no frames")
        result = None
        if self._kernels[-1].has_finish:
            result = await next(iter(self._runners.values())).finish(self._state)
        rows = self._table()
        verdicts = np.concatenate(self._verdicts) if self._verdicts else np.zeros(0, np.uint8)
        return Replayed(self._state, result, rows, verdicts, self._frames)

    async def close(self) -> None:
        for runner in self._runners.values():
            await runner.close()
        self._runners.clear()
        if self._window is not None:
            self._window.close()
            self._window = None

    async def _runner(self, settings: int, body: Body) -> Runner:
        """Sandboxes are kept for the next input, unless its frames do not fit the window."""
        needed = window_bytes(body, body.frames)
        if self._window is None or self._window.size_bytes < needed:
            await self.close()
            self._window = Window(needed)
        key = (settings, body.dtype, body.shape)
        if key not in self._runners:
            stages = [
                Stage(
                    kernel,
                    stage.params[settings] if kernel.params else {},
                    self._arrays(kernel, stage.arrays, settings),
                )
                for kernel, stage in zip(self._kernels, self._recorded.stages, strict=True)
            ]
            self._runners[key] = await Runner.start(self._zygote_socket, stages, body.dtype, body.shape, self._window)
        return self._runners[key]

    def _arrays(
        self, kernel: Kernel, recorded: Sequence[Mapping[str, RecordedArray]], settings: int
    ) -> dict[str, Array]:
        found = {}
        for spec in kernel.arrays:
            use = recorded[settings].get(spec.name) if settings < len(recorded) else None
            if use is None:
                raise Impossible(f"the product does not say which array {spec.name} was")
            found[spec.name] = use.values if use.values is not None else self._array(use)
        return found

    def _merge(self, state: Arrays) -> None:
        if self._state is None:
            self._state = {name: values.copy() for name, values in state.items()}
            return
        for spec in self._kernels[-1].state:
            merge(spec, self._state[spec.name], state[spec.name])

    def _take(self, found: Found) -> None:
        self._verdicts.append(found.verdicts)
        if found.rows is not None:
            self._rows.append((self._inputs, found.rows))

    def _table(self) -> Mapping[str, Array] | None:
        """Columns as in a product; those of a run say which input each row is from."""
        spec = self._kernels[-1].rows
        if spec is None:
            return None
        table = np.concatenate([rows for _, rows in self._rows]) if self._rows else np.zeros(0, spec.dtype)
        columns: dict[str, Array] = {name: table[name] for name in table.dtype.names or ()}
        if self._recorded.run:
            counts = [len(rows) for _, rows in self._rows]
            columns[OBJECT_COLUMN] = np.repeat(np.array([number for number, _ in self._rows], np.int64), counts)
        return columns


def differences(recorded: Recorded, replayed: Replayed) -> list[Difference]:
    """What is not the same, bit by bit."""
    found: list[Difference] = []
    for group in ("state", "result", "rows"):
        then, now = getattr(recorded, group), getattr(replayed, group)
        if then is None and (now is None or recorded.run):
            continue  # a run's product need not repeat what those of its members say
        for name in sorted({*(then or {}), *(now or {})}):
            how = _compared((then or {}).get(name), (now or {}).get(name))
            if how:
                found.append(Difference(f"{group}/{name}", how))
    if recorded.verdicts is not None:
        how = _compared(recorded.verdicts, replayed.verdicts)
        if how:
            found.append(Difference("verdicts", how))
    return found


def _compared(then: Array | None, now: Array | None) -> str:
    """Empty when they are the same bits."""
    if then is None or now is None:
        return "only in the product" if now is None else "not in the product"
    if then.dtype != now.dtype or then.shape != now.shape:
        return f"{then.dtype}{then.shape} in the product, now {now.dtype}{now.shape}"
    a, b = (
        np.ascontiguousarray(each).reshape(-1).view(np.uint8).reshape(-1, each.dtype.itemsize) for each in (then, now)
    )
    different = np.flatnonzero((a != b).any(axis=1))
    if not different.size:
        return ""
    place = tuple(int(i) for i in np.unravel_index(int(different[0]), then.shape)) if then.ndim else ()
    at = f"[{', '.join(map(str, place))}]"
    return f"{different.size} of {then.size} values; first at {at}: {then[place]} in the product, now {now[place]}"


def _shown(one: RecordedInput) -> str:
    return f"s3://{one.bucket}/{one.key.decode('utf-8', 'backslashreplace')}"
