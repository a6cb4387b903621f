"""What travels between gateway, zygote and sandbox.

- Gateway to zygote (SOCK_SEQPACKET, one connection for the life of one sandbox): a msgpack ``ForkRequest`` with
  descriptors by SCM_RIGHTS; back come ``Forked`` with the pidfd, and ``Exited`` once the process was reaped.
- Gateway to sandbox (SOCK_SEQPACKET pair): fixed little-endian structs, one datagram each. A request names a batch of
  frames in a region; a reply names counts only. Values lie in the output memory (kernels/memory.py).

Everything that comes from a sandbox is untrusted: ``parse_reply`` bounds the datagram for each kind, and the gateway
checks sequence and counts before it copies anything.
"""

from __future__ import annotations

import dataclasses
import struct

import msgspec
import numpy as np

from kernels.contract import Kernel

MAX_BATCH = 64
"""Most frames of one batch."""
MAX_FEEDBACK = 256
"""Most feedback entries of one batch; further ones are counted, not kept."""
MAX_SLOTS = 64
MAX_REGIONS = 64
MAX_STAGES = 4
"""Kernels of a chain."""
MAX_TEXT_BYTES = 2000
MAX_CHAIN_SOURCE_BYTES = 128 * 1024
"""Sources of a chain together."""
MAX_FORK_REQUEST_BYTES = 160 * 1024
"""One SEQPACKET datagram with the kernels' sources in it; below the default socket buffer (net.core.wmem_default)."""

NO_VERDICT = 255
"""Fills the verdicts before a batch, so that a frame the kernel never judged cannot pass for judged."""
BAD_VERDICT = 254
"""What the driver stores where ``frame()`` returned something that is no verdict of the kernel's."""
UNREADABLE = 253
"""Stands for the verdict of a frame whose stored bytes could not be decoded: the kernel never saw it."""

COUNTERS = 8
"""Counters in the output memory, written by the driver and by emit and append:"""
AT_FRAME = 0
"""number of the frame under way,"""
FEEDBACK_KEPT = 1
FEEDBACK_DROPPED = 2
ROWS_KEPT = 3
ROWS_OF_FRAME = 4
"""rows that the frame under way has appended,"""
ROWS_DROPPED = 5

FEEDBACK_DTYPE = np.dtype([("frame", "<i8"), ("code", "<i8"), ("value", "<f8")])


# -- gateway and zygote


class ArrayPlace(msgspec.Struct, frozen=True):
    """An array parameter in the memory of arrays; its dtype is the kernel's to declare."""

    shape: tuple[int, ...]
    offset: int


class StageSpec(msgspec.Struct, frozen=True):
    """One kernel of the chain."""

    kernel: Kernel
    params: dict[str, int | float]
    arrays: tuple[ArrayPlace, ...]
    """In the order of ``kernel.arrays``; empty where the kernel is only compiled."""


class SandboxSpec(msgspec.Struct, frozen=True):
    """Everything the forked process needs to know; descriptors travel beside it."""

    stages: tuple[StageSpec, ...]
    layouts: tuple[tuple[str, tuple[int, ...]], ...]
    """(dtype, shape) of frames to compile for; batches are frames of the first."""
    compile_only: bool
    """No batch will follow, and arrays are not there."""
    region_count: int
    region_bytes: int
    arrays_bytes: int
    """Size of the memory of arrays; 0: there is none."""
    slots: int
    out_frames: int
    memory_bytes: int
    nice: int
    policy: int
    """As of sched_setscheduler(2)."""
    populate: bool
    probe: str = ""
    """Name of a self-test probe to attempt instead of a kernel; see kernels/probes.py."""
    reader: bool = False
    """Read the structure of a stored file instead of running a kernel; see kernels/layout/reader.py."""


class ForkRequest(msgspec.Struct, frozen=True, tag="fork"):
    """Descriptors beside it: the sandbox's end of the channel, the output memory, the memory of arrays if there is one,
    then every region in order."""

    spec: SandboxSpec


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """The pidfd travels beside it."""

    pid: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    reason: str


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """The process was reaped. ``status``: exit code, or minus the signal's number."""

    status: int


ZygoteReply = Forked | Refused | Exited

# -- gateway and sandbox

_RUN = struct.Struct("<QIIQQqIB??x")
_REPLY = struct.Struct("<IIQIIIIQQ")
RUN_BYTES = _RUN.size
REPLY_BYTES = _REPLY.size

OP_JUDGE = 0
OP_FINISH = 1
"""Run ``finish`` on the state that lies in its place; the fields of a batch are 0."""

KIND_READY = 1
KIND_DONE = 2
KIND_REFUSED = 3
"""Kernel ``stage`` does not compile for layout ``index``; the text says why. One for each layout that fails; READY follows
if any other succeeds, else the process ends."""
KIND_RAISED = 4
"""Kernel ``stage`` raised in frame ``first_frame + index`` of a batch, or in finish; the text says what."""
KIND_PROBE = 5
"""A self-test probe survived; the text is its outcome."""
KIND_FAILED = 6
"""The process could not be locked down, and runs nothing; the text says why."""
KIND_CAUTION = 7
"""Kernel ``stage`` compiles for layout ``index`` and does something that is probably not meant; before READY."""
_TEXT_KINDS = (KIND_REFUSED, KIND_RAISED, KIND_PROBE, KIND_FAILED, KIND_CAUTION)
MAX_CAUTIONS = 8
"""For each layout."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A batch of frames, contiguous in one region. ``offset`` is bytes into the region.

    Where a table follows in the same datagram (kernels/decode/table.py), the frames are encoded and lie where it says.
    """

    sequence: int
    region: int
    slot: int
    offset: int
    frame_bytes: int
    first_frame: int
    count: int
    operation: int = OP_JUDGE
    alone: bool = False
    """Each frame is the only one of its object: its index is 0, whatever number it has here, and STOP ends no other."""
    collect_out: bool = False
    """Keep the ``out`` of every frame of the batch, not of the last only."""

    def pack(self) -> bytes:
        place = (self.region, self.slot, self.offset, self.frame_bytes, self.first_frame, self.count)
        return _RUN.pack(self.sequence, *place, self.operation, self.alone, self.collect_out)

    @classmethod
    def unpack(cls, datagram: bytes) -> Run:
        return cls(*_RUN.unpack(datagram))


@dataclasses.dataclass(frozen=True, slots=True)
class RawReply:
    """A reply as the sandbox wrote it: of a valid size and kind, otherwise unchecked."""

    kind: int
    index: int = 0
    """Frames that were judged (DONE), the frame (RAISED), or the layout (REFUSED, CAUTION)."""
    sequence: int = 0
    stage: int = 0
    line: int = 0
    """Of the user's file; 0: not known."""
    feedback_count: int = 0
    row_count: int = 0
    dropped_feedback: int = 0
    dropped_rows: int = 0
    text: str = ""

    def pack(self) -> bytes:
        head = (self.kind, self.index, self.sequence, self.stage, self.line)
        counts = (self.feedback_count, self.row_count, self.dropped_feedback, self.dropped_rows)
        return _REPLY.pack(*head, *counts) + self.text.encode("utf-8", "replace")[:MAX_TEXT_BYTES]


def parse_reply(datagram: bytes) -> RawReply | None:
    """None when no honest sandbox sends such a datagram. The text holds printable characters and newlines only."""
    if not REPLY_BYTES <= len(datagram) <= REPLY_BYTES + MAX_TEXT_BYTES:
        return None
    reply = RawReply(*_REPLY.unpack_from(datagram))
    tail = datagram[REPLY_BYTES:]
    if reply.kind in _TEXT_KINDS:
        text = tail.decode("utf-8", "replace")
        return dataclasses.replace(reply, text="".join(c for c in text if c.isprintable() or c == "\n"))
    if reply.kind in (KIND_READY, KIND_DONE) and not tail:
        return reply
    return None
