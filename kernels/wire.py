"""What travels between gateway, zygote and sandbox, and where results lie in the output memory.

- Gateway to zygote (SOCK_SEQPACKET, one connection for the life of one sandbox): a msgpack ``ForkRequest`` with
  descriptors by SCM_RIGHTS; back come ``Forked`` with the pidfd, and ``Exited`` once the process was reaped.
- Gateway to sandbox (SOCK_SEQPACKET pair): fixed little-endian structs, one datagram each. A request names a batch of
  frames in a region; a reply names counts only. Values lie in the output memory of ``OutputLayout``.

Everything that comes from a sandbox is untrusted: ``parse_reply`` bounds the datagram for each kind, and the gateway
checks sequence and counts before it copies anything.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from kernels.contract import Kernel, StateSpec

MAX_BATCH = 64
"""Most frames of one batch."""
MAX_FEEDBACK = 256
"""Most feedback entries of one batch; further ones are counted, not kept."""
MAX_SLOTS = 64
MAX_REGIONS = 64
MAX_TEXT_BYTES = 2000
MAX_FORK_REQUEST_BYTES = 160 * 1024
"""One SEQPACKET datagram with the kernel's source in it; below the default socket buffer (net.core.wmem_default)."""

NO_VERDICT = 255
"""Fills the verdicts before a batch, so that a frame the kernel never judged cannot pass for judged."""
BAD_VERDICT = 254
"""What the driver stores where ``frame()`` returned something other than KEEP or DROP."""
UNREADABLE = 253
"""Stands for the verdict of a frame whose stored bytes could not be decoded: the kernel never saw it."""

PAGE_BYTES = 4096

FEEDBACK_DTYPE = np.dtype([("frame", "<i8"), ("code", "<i8"), ("value", "<f8")])


# -- gateway and zygote


class SandboxSpec(msgspec.Struct, frozen=True):
    """Everything the forked process needs to know; descriptors travel beside it."""

    kernel: Kernel
    params: dict[str, int | float]
    layouts: tuple[tuple[str, tuple[int, ...]], ...]
    """(dtype, shape) of frames to compile for; batches are frames of the first."""
    region_count: int
    region_bytes: int
    slots: int
    memory_bytes: int
    nice: int
    batch_scheduling: bool
    populate: bool
    probe: str = ""
    """Name of a self-test probe to attempt instead of a kernel; see kernels/probes.py."""


class ForkRequest(msgspec.Struct, frozen=True, tag="fork"):
    """Descriptors beside it: the sandbox's end of the channel, the output memory, then every region in order."""

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

_RUN = struct.Struct("<QIIQQqII")
_REPLY = struct.Struct("<IIQIIQ")
RUN_BYTES = _RUN.size
REPLY_BYTES = _REPLY.size

KIND_READY = 1
KIND_DONE = 2
KIND_REFUSED = 3
"""The kernel does not compile for layout ``index``; ``detail`` is the line, the text says why. One for each layout that
fails; READY follows if any other succeeds, else the process ends."""
KIND_RAISED = 4
"""The kernel raised during a batch, in frame ``first_frame + index``; the text says what."""
KIND_PROBE = 5
"""A self-test probe survived; the text is its outcome."""
KIND_FAILED = 6
"""The process could not be locked down, and runs nothing; the text says why."""
_TEXT_KINDS = (KIND_REFUSED, KIND_RAISED, KIND_PROBE, KIND_FAILED)


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
    alone: bool = False
    """Each frame is the only one of its object: its index is 0, whatever number it has here."""

    def pack(self) -> bytes:
        return _RUN.pack(
            self.sequence,
            self.region,
            self.slot,
            self.offset,
            self.frame_bytes,
            self.first_frame,
            self.count,
            self.alone,
        )

    @classmethod
    def unpack(cls, datagram: bytes) -> Run:
        run = cls(*_RUN.unpack(datagram))
        return dataclasses.replace(run, alone=bool(run.alone))


@dataclasses.dataclass(frozen=True, slots=True)
class RawReply:
    """A reply as the sandbox wrote it: of a valid size and kind, otherwise unchecked."""

    kind: int
    index: int
    sequence: int
    feedback_count: int
    detail: int
    dropped_feedback: int
    text: str = ""

    def pack(self) -> bytes:
        head = _REPLY.pack(
            self.kind, self.index, self.sequence, self.feedback_count, self.detail, self.dropped_feedback
        )
        return head + self.text.encode("utf-8", "replace")[:MAX_TEXT_BYTES]


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


# -- output memory


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class OutputLayout:
    """Offsets in the output memory: verdicts, progress, feedback, then each slot's state arrays on its own pages."""

    def __init__(self, state: Sequence[StateSpec], slots: int) -> None:
        self.state = tuple(state)
        self.slots = slots
        self.verdicts_offset = 0
        self.progress_offset = _aligned(MAX_BATCH, 64)
        self.feedback_offset = self.progress_offset + 64
        feedback_end = self.feedback_offset + MAX_FEEDBACK * FEEDBACK_DTYPE.itemsize
        self.slots_offset = _aligned(feedback_end, PAGE_BYTES)
        self._offsets: list[int] = []
        offset = 0
        for spec in self.state:
            self._offsets.append(offset)
            offset = _aligned(offset + spec.size_bytes, 64)
        self.slot_bytes = _aligned(max(offset, 1), PAGE_BYTES)
        self.size_bytes = self.slots_offset + slots * self.slot_bytes

    def verdicts(self, memory: memoryview) -> npt.NDArray[np.uint8]:
        return np.frombuffer(memory, np.uint8, MAX_BATCH, self.verdicts_offset)

    def counters(self, memory: memoryview) -> npt.NDArray[np.int64]:
        """The driver's own: [number of the frame under way, feedback entries, feedback dropped]."""
        return np.frombuffer(memory, np.int64, 3, self.progress_offset)

    def feedback(self, memory: memoryview) -> npt.NDArray[np.void]:
        return np.frombuffer(memory, FEEDBACK_DTYPE, MAX_FEEDBACK, self.feedback_offset)

    def slot_state(self, memory: memoryview, slot: int) -> list[npt.NDArray[np.generic]]:
        """Views of one slot's arrays, in the order of ``state``."""
        base = self.slots_offset + slot * self.slot_bytes
        return [
            np.ndarray(spec.shape, spec.dtype, memory, base + offset)
            for spec, offset in zip(self.state, self._offsets, strict=True)
        ]
