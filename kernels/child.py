"""The life of a sandboxed process: map, lock down, compile, judge batches until the gateway hangs up.

Entered in a fresh fork of the zygote and never left: every way out is ``os._exit``. In: descriptors of the channel, of the
output memory and of the regions. Order matters and is the security argument: everything that needs a right happens before
it is given up, and the first line of the user's source runs after Landlock and the first filter hold.
"""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kernels import lockdown, probes, wire
from kernels.decode.frames import FrameDecoder
from kernels.decode.table import TABLE_BYTES_MAX
from kernels.program import Feedback, NotCompiled, Program
from kernels.wire import OutputLayout, RawReply, Run, SandboxSpec

CHANNEL_FD = 3

EXIT_HUNG_UP = 0
EXIT_REFUSED = 64
EXIT_BAD_REQUEST = 65
EXIT_FAILED = 70


def main(spec: SandboxSpec, fds: Sequence[int], confinement: lockdown.Confinement) -> NoReturn:
    """``fds``: channel, output memory, regions; see wire.ForkRequest."""
    try:
        channel, output_fd, *region_fds = fds
        output = mmap.mmap(output_fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        populate = mmap.MAP_POPULATE if spec.populate else 0
        regions = [mmap.mmap(fd, spec.region_bytes, mmap.MAP_SHARED | populate, mmap.PROT_READ) for fd in region_fds]
        _keep_only(channel)
        _confined(spec, confinement, memoryview(output), regions)
    except BaseException:
        os._exit(EXIT_FAILED)


def _keep_only(channel: int) -> None:
    """Descriptors 0 to 2 on /dev/null, the channel on 3, nothing else (mappings outlive theirs)."""
    aside = fcntl.fcntl(channel, fcntl.F_DUPFD, CHANNEL_FD + 1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(aside, CHANNEL_FD)
    os.closerange(CHANNEL_FD + 1, os.sysconf("SC_OPEN_MAX"))


def _confined(
    spec: SandboxSpec, confinement: lockdown.Confinement, output: memoryview, regions: list[mmap.mmap]
) -> NoReturn:
    try:
        lockdown.leave_parent(confinement)
        lockdown.deny_files_and_network(tolerant=confinement.tolerant)
        if spec.probe in probes.BEFORE_FILTER:
            _say(RawReply(wire.KIND_PROBE, 0, 0, 0, 0, 0, probes.BEFORE_FILTER[spec.probe]()))
            os._exit(EXIT_HUNG_UP)
        lockdown.install_filter(lockdown.COMPILE, tolerant=confinement.tolerant)
    except lockdown.LockdownError as error:
        _say(RawReply(wire.KIND_FAILED, 0, 0, 0, 0, 0, str(error)))
        os._exit(EXIT_FAILED)
    if spec.probe:
        _probe(spec.probe, regions, tolerant=confinement.tolerant)
    session = _Session(spec, output, regions)
    gc.collect()
    gc.freeze()
    lockdown.install_filter(lockdown.RUN, tolerant=confinement.tolerant)
    _say(RawReply(wire.KIND_READY, 0, 0, 0, 0, 0))
    session.serve()


def _probe(name: str, regions: list[mmap.mmap], *, tolerant: bool) -> NoReturn:
    if name in probes.RUN_FILTER:
        lockdown.install_filter(lockdown.RUN, tolerant=tolerant)
    _say(RawReply(wire.KIND_PROBE, 0, 0, 0, 0, 0, probes.UNDER_FILTER[name](regions)))
    os._exit(EXIT_HUNG_UP)


class _Session:
    """A compiled kernel with its memory."""

    def __init__(self, spec: SandboxSpec, output: memoryview, regions: list[mmap.mmap]) -> None:
        layout = OutputLayout(spec.kernel.state, spec.slots)
        dtype, self._shape = spec.layouts[0]
        self._dtype = np.dtype(dtype)
        self._regions = regions
        self._decoder = FrameDecoder(regions, self._dtype, self._shape)
        self._verdicts = layout.verdicts(output)
        self._counters = layout.counters(output)
        self._feedback = Feedback(self._counters, layout.feedback(output))
        try:
            program = Program(spec.kernel)
        except NotCompiled as refusal:
            _refuse(0, refusal)
            os._exit(EXIT_REFUSED)
        self._params = program.params(spec.params)
        self._states = [program.state(layout.slot_state(output, slot)) for slot in range(spec.slots)]
        self._drive = _compile(program, spec, self._params, self._states[0], self._feedback)

    def serve(self) -> NoReturn:
        while True:
            try:
                datagram = os.read(CHANNEL_FD, wire.RUN_BYTES + TABLE_BYTES_MAX)
            except ConnectionError:
                os._exit(EXIT_HUNG_UP)
            if not datagram:
                os._exit(EXIT_HUNG_UP)
            if len(datagram) < wire.RUN_BYTES:
                os._exit(EXIT_BAD_REQUEST)
            self._run(Run.unpack(datagram[: wire.RUN_BYTES]), datagram[wire.RUN_BYTES :])

    def _run(self, run: Run, table: bytes) -> None:
        self._counters[:] = 0
        try:
            if table:
                self._judge_encoded(run, table)
            elif run.offset % self._dtype.alignment:
                self._judge_unaligned(run)
            else:
                frames = np.ndarray((run.count, *self._shape), self._dtype, self._regions[run.region], run.offset)
                self._judge(frames, run, 0)
        except Exception as error:
            index = int(self._counters[0]) - run.first_frame
            index = index if 0 <= index < run.count else 0
            _say(RawReply(wire.KIND_RAISED, index, run.sequence, 0, 0, 0, f"{type(error).__name__}: {error}"))
            os._exit(EXIT_FAILED)
        _, entries, dropped = (int(counter) for counter in self._counters)
        _say(RawReply(wire.KIND_DONE, run.count, run.sequence, entries, 0, dropped))

    def _judge(self, frames: npt.NDArray[np.generic], run: Run, start: int) -> None:
        verdicts = self._verdicts[start:]
        state, step = self._states[run.slot], 0 if run.alone else 1
        self._drive(frames, self._params, state, self._feedback, verdicts, run.first_frame + start, step)

    def _judge_encoded(self, run: Run, table: bytes) -> None:
        for start, count, frames in self._decoder.runs(run.first_frame, run.count, table):
            if frames is None:
                self._verdicts[start : start + count] = wire.UNREADABLE
            else:
                self._judge(frames, run, start)

    def _judge_unaligned(self, run: Run) -> None:
        """numba's loads assume aligned elements: copy such frames, one at a time."""
        region = np.frombuffer(self._regions[run.region], np.uint8)
        for i in range(run.count):
            start = run.offset + i * run.frame_bytes
            frame = region[start : start + run.frame_bytes].copy().view(self._dtype).reshape((1, *self._shape))
            frame.flags.writeable = False
            self._judge(frame, run, i)


def _compile(program: Program, spec: SandboxSpec, params: Any, state: Any, feedback: Feedback) -> Callable[..., None]:
    """Compile for every layout, tell of each that fails; ends the process if all do."""
    drive = None
    for index, (dtype, shape) in enumerate(spec.layouts):
        try:
            drive = program.compile(dtype, shape, params, state, feedback)
        except NotCompiled as refusal:
            _refuse(index, refusal)
    if drive is None:
        os._exit(EXIT_REFUSED)
    return drive


def _refuse(layout: int, refusal: NotCompiled) -> None:
    _say(RawReply(wire.KIND_REFUSED, layout, 0, 0, refusal.line, 0, refusal.reason))


def _say(reply: RawReply) -> None:
    os.write(CHANNEL_FD, reply.pack())
