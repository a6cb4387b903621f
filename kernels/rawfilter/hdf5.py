"""An HDF5/NeXus object with the frames that remain: a sandbox says how the new file lies, the gateway copies the bytes.

In: a stored version, its index, a plan. Out: the new file's length and its bytes. Stored chunks are copied as they are where
a chunk holds one frame or part of one. Where several frames share a chunk, or ``out`` takes the place of frames, each frame
is brought decoded out of a sandbox and encoded anew (shuffle and gzip) into a spool on disk. What always holds: every byte
of what remains comes from where the gateway's own index says that it lies; the gateway never reads HDF5; nothing of the file
but the dropped frames is left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncIterator, Callable

import numpy as np
import numpy.typing as npt

from ingest.ports import LandingPad
from ingest.records import ObjectRecord
from kernels.decode.table import ENTRY
from kernels.layout.conversation import Conversation, Lie
from kernels.layout.dialogue import (
    BITS_A_DATAGRAM,
    CHUNKS_A_DATAGRAM,
    LITERAL,
    OF_FRAME,
    OF_REST,
    OF_SPOOL,
    RANGE,
    RANGES,
    Ask,
    Refusal,
    Rewrite,
    Rewritten,
)
from kernels.layout.index import CHUNK_STORED_BYTES_MAX, CHUNKS_MAX, FrameIndex
from kernels.layout.indexer import printable
from kernels.rawfilter.plan import DROPPED, KEPT, REPLACED, CannotFilter, Plan
from kernels.rawfilter.replay import Replay
from kernels.rawfilter.spool import Spool

SOURCE = "HDF5 "
"""What an index of such a file calls its source, before the dataset's path."""
LENGTH_MAX_TIMES = 4
"""A file that grows under its filter beyond this many times what was received is not worth it."""
THINKING_S = 120.0
"""For the structure of four million chunks."""


def copies_chunks(index: FrameIndex, plan: Plan) -> bool:
    """Whether the stored chunks of what remains can be taken as they are."""
    return index.encoding.depth == 1 and not plan.replaces


def chunks_of(index: FrameIndex, plan: Plan) -> npt.NDArray[np.void]:
    """The stored chunks of the frames that are kept, for the new dataset."""
    entries = index.entries_of(np.flatnonzero(plan.fates))
    entries["region"] = OF_FRAME
    return entries


def spool_bytes_max(record: ObjectRecord) -> int:
    return max(LENGTH_MAX_TIMES * record.length, 64 << 20)


async def spooled(
    spool: Spool, plan: Plan, kept: Callable[[], Replay] | None, replaced: Replay | None
) -> npt.NDArray[np.void]:
    """Every frame that remains, encoded anew, as chunks for the new dataset. ``kept`` starts what decodes frames."""
    if plan.frames > CHUNKS_MAX or plan.frame_bytes > CHUNK_STORED_BYTES_MAX:
        raise CannotFilter(f"{plan.frames} frames of {plan.frame_bytes} bytes are more than can be encoded anew")
    found: list[tuple[int, int]] = []
    element_bytes = np.dtype(plan.dtype).itemsize
    decoding = kept() if kept is not None and np.any(plan.fates == KEPT) else None
    try:
        for first, count, fate in plan.runs():
            replay = replaced if fate == REPLACED else decoding
            assert replay is not None
            async for frames in replay.outs(first, count):
                found += await spool.add(frames, plan.frame_bytes, element_bytes)
    finally:
        if decoding is not None:
            await decoding.close()
    entries = np.zeros(len(found), ENTRY)
    entries["number"] = np.arange(len(found))
    entries["offset"] = [offset for offset, _ in found]
    entries["length"] = [length for _, length in found]
    entries["region"] = OF_SPOOL
    return entries


@dataclasses.dataclass(slots=True)
class Rewriting:
    """One file as a sandbox writes it anew. ``talk``: with a process that has been told nothing yet. ``spool``: None where
    stored chunks are copied."""

    talk: Conversation
    pad: LandingPad
    record: ObjectRecord
    index: FrameIndex
    plan: Plan
    chunks: npt.NDArray[np.void]
    spool: Spool | None
    length: int = 0

    async def begin(self, note: str) -> None:
        """Sets ``length``. Raises CannotFilter with the sandbox's reason, Lie, and what conversations raise."""
        plan = self.plan
        task = Rewrite(
            ask=Ask(self.record.length, self.index.source.removeprefix(SOURCE)),
            frames=len(plan.fates),
            remain=plan.frames,
            dtype="" if self.spool is None else plan.dtype,
            shape=plan.shape,
            chunk=self.index.encoding.chunk if self.spool is None else (1, *plan.shape),
            chunks=len(self.chunks),
            note=note,
        )
        await self.talk.begin(task)
        bits = np.packbits(plan.fates != DROPPED).tobytes()
        for start in range(0, len(bits), BITS_A_DATAGRAM):
            await self.talk.send(bits[start : start + BITS_A_DATAGRAM])
        for start in range(0, len(self.chunks), CHUNKS_A_DATAGRAM):
            await self.talk.send(self.chunks[start : start + CHUNKS_A_DATAGRAM].tobytes())
        answer = await self.talk.answer()
        if isinstance(answer, Refusal):
            raise CannotFilter(f"its file cannot be written anew: {printable(answer.reason)}")
        if not isinstance(answer, Rewritten):
            raise Lie("an answer to another question")
        if not 0 < answer.length <= LENGTH_MAX_TIMES * self.record.length + (64 << 20):
            raise CannotFilter(f"its file would become {answer.length} bytes long")
        self.length = answer.length

    async def bytes(self) -> AsyncIterator[memoryview]:
        """The new file. Raises Lie unless it holds every chunk of what remains."""
        left = self.length
        placed: list[npt.NDArray[np.void]] = []
        while left > 0:
            datagram = await self.talk.hear()
            kind, body = datagram[:1], memoryview(datagram)[1:]
            if kind == LITERAL and 0 < len(body) <= left:
                left -= len(body)
                yield body
            elif kind == RANGES and len(body) and len(body) % RANGE.itemsize == 0:
                ranges = np.frombuffer(body, RANGE)
                left -= self._checked(ranges, left)
                placed.append(ranges[ranges["kind"] != OF_REST])
                async for piece in self._copied(ranges):
                    yield piece
            else:
                raise Lie("pieces of a file that nobody understands")
        if not _same(placed, self.chunks):
            raise Lie("the file that it wrote does not hold the frames that remain")

    def _checked(self, ranges: npt.NDArray[np.void], left: int) -> int:
        """Bytes of these ranges, which lie inside their sources."""
        ends = np.zeros(3, np.uint64)
        ends[[OF_FRAME, OF_REST]] = self.record.length
        ends[OF_SPOOL] = self.spool.length if self.spool is not None else 0
        if int(ranges["kind"].max()) > OF_REST:
            raise Lie("a source that nobody knows")
        end, offset, length = ends[ranges["kind"].astype(np.int64)], ranges["offset"], ranges["length"]
        if bool((length > end).any() or (offset > end - length).any()) or sum(length.tolist()) > left:
            raise Lie("a piece lies outside its source")
        return sum(length.tolist())

    async def _copied(self, ranges: npt.NDArray[np.void]) -> AsyncIterator[memoryview]:
        """Neighbours in one go."""
        at = start = stop = -1
        for kind, offset, length in [*ranges.tolist(), (-1, -1, 0)]:
            source = OF_SPOOL if kind == OF_SPOOL else OF_FRAME if kind >= 0 else -1
            if source == at and offset == stop:
                stop += length
                continue
            if at == OF_SPOOL:
                assert self.spool is not None
                async for piece in self.spool.read(start, stop):
                    yield piece
            elif at == OF_FRAME:
                async for piece in self.pad.read_range(self.record, start, stop):
                    yield piece
            at, start, stop = source, offset, offset + length


def _same(placed: list[npt.NDArray[np.void]], chunks: npt.NDArray[np.void]) -> bool:
    """Whether exactly these chunks were placed, in whatever order."""
    found = np.concatenate(placed) if placed else np.zeros(0, RANGE)
    if len(found) != len(chunks):
        return False
    ours = np.lexsort((chunks["length"], chunks["offset"], chunks["region"]))
    theirs = np.lexsort((found["length"], found["offset"], found["kind"]))
    pairs = (("region", "kind"), ("offset", "offset"), ("length", "length"))
    return all(np.array_equal(chunks[mine][ours], found[other][theirs]) for mine, other in pairs)


def note_of(record: ObjectRecord, plan: Plan, filters: dict[str, str], *, encoded_anew: bool) -> str:
    """For the scientist who opens the file."""
    asked = ", ".join(f"{kernel} (raw={raw})" for kernel, raw in sorted(filters.items()))
    lines = [
        f"Raw filter of an ingest gateway: {plan.frames} of {len(plan.fates)} frames as received remain.",
        f"Asked by the kernels: {asked}.",
        f"As received: {record.length} bytes, CRC64NVME {record.crc64nvme:016x}, ETag {_plain(record.etag)}.",
        "frame_index holds the number of each frame in the file as received; other arrays still count those.",
    ]
    replaced = int(np.count_nonzero(plan.fates == REPLACED))
    if replaced:
        lines.append(f"{replaced} frames were replaced by what the kernel {plan.replaces} made of them (its OUT).")
    elif encoded_anew:
        lines.append("Frames shared chunks: they were decoded and encoded anew, values are the same.")
    else:
        lines.append("Their stored chunks are those of the file as received, byte for byte.")
    return "\n".join(lines)


def _plain(text: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", text)
