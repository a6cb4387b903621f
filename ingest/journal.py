"""The journal: the commit point of the node. Batches of entries, framed, checksummed, flushed, in numbered files.

In: encoded batches in sequence order, appended by one process. Out: the same batches at recovery, up to the first that
is not whole. Knows bytes and sequences only; what an entry means is the catalogue's business.

What always holds:
- A file is published (renamed to NNNNNN.jrnl) only when its header is durable. Its header names the first sequence it
  holds, and that sequence ends every older file: whatever an older file holds from there on never happened.
- A file that was closed by a crash or by an error is never appended to. So a torn or stale frame can never be followed
  by a newer one and come back to life.
- A batch is one frame with one checksum: it is there as a whole or not at all.
- After a failed write or flush the file is given up at once, because the page cache may now say "clean" about pages
  that never reached the disk. Batches that were accepted but not flushed are written again at the head of the next file.

Layout: 4 KiB header block (magic, format, first sequence, CRC-32), then frames (length, CRC-32, first sequence, count,
payload), then the zeros the file was prepared with. Writing zeros beforehand makes a flush cheap: it changes no metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from ingest.errors import IngestError

FORMAT = 2
"""1: without versions of a key."""
SIZE_BYTES = 16 * 1024 * 1024
HEADER_BYTES = 4096
FRAME_BYTES_MAX = 1 << 30
_SMALLEST_FILE_BYTES = 256 * 1024
_ZEROS = bytes(1 << 20)

_MAGIC = b"HISSJRNL"
_header = struct.Struct("<8sIQI")
_frame = struct.Struct("<IIQI")
_checked = struct.Struct("<IQI")


class JournalDamaged(IngestError):
    """A journal file is unreadable or missing where entries must be: start from a backup, or repair the disk."""


class JournalLost(IngestError):
    """No journal file can be begun. What was written last has an unknown outcome until the process starts again."""


class FileOps:
    """The system calls that can fail under a journal; a test passes its own."""

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def flush(self, fd: int) -> None:
        os.fdatasync(fd)


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    first_sequence: int
    count: int
    payload: memoryview
    end: int
    """File offset behind the frame."""

    @property
    def next_sequence(self) -> int:
        return self.first_sequence + self.count


@dataclasses.dataclass(frozen=True, slots=True)
class JournalFile:
    path: Path
    number: int
    first_sequence: int


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def files(folder: Path) -> list[JournalFile]:
    """Journal files in order; raises JournalDamaged for one without a valid header (they are published whole)."""
    found = []
    for path in sorted(folder.glob("*.jrnl"), key=lambda path: int(path.stem)):
        with path.open("rb") as file:
            head = file.read(_header.size)
        if len(head) < _header.size:
            raise JournalDamaged(f"{path.name} has no header")
        magic, version, first_sequence, checksum = _header.unpack(head)
        if magic != _MAGIC or checksum != zlib.crc32(head[:-4]):
            raise JournalDamaged(f"{path.name} has a damaged header")
        if not 1 <= version <= FORMAT:
            raise JournalDamaged(f"{path.name} has format {version}; this program reads formats up to {FORMAT}")
        found.append(JournalFile(path, int(path.stem), first_sequence))
    return found


def frames(file: JournalFile, stop_before: int | None = None) -> Iterator[Frame]:
    """Whole frames in sequence order; ends at the first that is torn, out of sequence or at ``stop_before``."""
    content = memoryview(file.path.read_bytes())
    position, expected = HEADER_BYTES, file.first_sequence
    while position + _frame.size <= len(content):
        length, checksum, first_sequence, count = _frame.unpack_from(content, position)
        end = position + _frame.size + length
        if count == 0 or length > FRAME_BYTES_MAX or end > len(content) or first_sequence != expected:
            return
        if stop_before is not None and first_sequence >= stop_before:
            return
        payload = content[position + _frame.size : end]
        if zlib.crc32(payload, zlib.crc32(_checked.pack(length, first_sequence, count))) != checksum:
            return
        yield Frame(first_sequence, count, payload, end)
        position, expected = end, first_sequence + count


def replay(folder: Path, after: int) -> Iterator[Frame]:
    """Every frame that holds entries later than sequence ``after``, without a gap.

    Raises JournalDamaged when entries between ``after`` and a later file are missing.
    """
    chain = files(folder)
    expected = after + 1
    for index, file in enumerate(chain):
        stop_before = chain[index + 1].first_sequence if index + 1 < len(chain) else None
        if stop_before is not None and stop_before <= expected:
            continue
        if file.first_sequence > expected:
            raise JournalDamaged(f"entries {expected} to {file.first_sequence - 1} are in no journal file")
        for frame in frames(file, stop_before):
            if frame.next_sequence > expected:
                yield frame
                expected = frame.next_sequence
        if stop_before is not None and expected < stop_before:
            raise JournalDamaged(
                f"{file.path.name} ends before entry {expected}; the next file starts at {stop_before}"
            )


def last_sequence(folder: Path) -> int | None:
    """Sequence of the newest whole entry; None when there is no journal."""
    chain = files(folder)
    if not chain:
        return None
    last = chain[-1].first_sequence - 1
    for frame in frames(chain[-1]):
        last = frame.next_sequence - 1
    return last


class Journal:
    """The writing end. Not thread-safe, except that ``flush`` may run in a thread while ``append`` goes on."""

    def __init__(
        self, folder: Path, next_sequence: int, *, size_bytes: int = SIZE_BYTES, ops: FileOps | None = None
    ) -> None:
        """Begins a new file, in any case: see "what always holds" above. Raises JournalLost, JournalDamaged.

        The newest file's frames are written again into the new one, which takes its place: after a crash nobody knows
        which of them a flush had covered, and what is answered from now on must be on disk.
        """
        self._folder = folder
        self._size_bytes = size_bytes
        self._ops = ops or FileOps()
        self._unflushed: list[tuple[int, bytes]] = []
        self._fd = -1
        self._position = 0
        self._capacity = 0
        for pattern in ("[0-9]*.new", "*.partial"):
            for leftover in folder.glob(pattern):
                leftover.unlink()
        chain = files(folder)
        self._number = chain[-1].number if chain else 0
        first_sequence = self._carry_over(chain[-1], next_sequence) if chain else next_sequence
        self._begin(first_sequence)
        self._unflushed.clear()
        if chain and chain[-1].first_sequence == first_sequence:
            chain[-1].path.unlink()

    def _carry_over(self, newest: JournalFile, next_sequence: int) -> int:
        whole = [frame for frame in frames(newest) if frame.next_sequence <= next_sequence]
        end = whole[-1].next_sequence if whole else newest.first_sequence
        if end != next_sequence:
            raise JournalDamaged(f"{newest.path.name} ends before entry {end}; the index goes on at {next_sequence}")
        if whole:
            content = newest.path.read_bytes()[HEADER_BYTES : whole[-1].end]
            self._unflushed.append((newest.first_sequence, content))
        return newest.first_sequence

    @property
    def unflushed(self) -> bool:
        return bool(self._unflushed)

    @property
    def number(self) -> int:
        return self._number

    def fits(self, payload_bytes: int) -> bool:
        return self._position + _frame.size + payload_bytes <= self._capacity

    def append(self, first_sequence: int, count: int, payload: bytes) -> int:
        """Write one batch; returns the bytes written. The batch is not durable before ``flush``.

        Raises OSError: the caller must then ``give_up`` the file.
        """
        length = len(payload)
        checksum = zlib.crc32(payload, zlib.crc32(_checked.pack(length, first_sequence, count)))
        frame = _frame.pack(length, checksum, first_sequence, count) + payload
        self._unflushed.append((first_sequence, frame))
        self._write(self._fd, frame, self._position)
        self._position += len(frame)
        return len(frame)

    def mark(self) -> int:
        """How many batches a ``flush`` that starts now will cover: what to tell ``flushed`` when it has returned."""
        return len(self._unflushed)

    def flush(self) -> None:
        """Make every batch appended so far durable. One flush at a time: an error is reported to one caller only.

        Raises OSError: never call it again for this file, ``give_up`` instead.
        """
        self._ops.flush(self._fd)

    def flushed(self, covered: int) -> None:
        del self._unflushed[:covered]

    def durable_before(self, next_sequence: int) -> int:
        """Every entry before the answer is on disk, when ``next_sequence`` is the one after the last appended."""
        return self._unflushed[0][0] if self._unflushed else next_sequence

    def rotate(self, next_sequence: int, payload_bytes: int = 0) -> None:
        """Go on in a new file. Everything appended must be flushed. Raises JournalLost."""
        if self._unflushed:
            raise ValueError("rotation needs a flushed journal")
        self._begin(next_sequence, payload_bytes)

    def give_up(self, next_sequence: int) -> None:
        """Leave the file after an error; batches from ``next_sequence`` on are void. Durable on return.

        Accepted batches that no flush had covered are written again into the new file. Raises JournalLost.
        """
        self._unflushed = [(first, frame) for first, frame in self._unflushed if first < next_sequence]
        first_sequence = self._unflushed[0][0] if self._unflushed else next_sequence
        self._begin(first_sequence)
        self._unflushed.clear()

    def prepare(self) -> None:
        """Write the zeros of the next file ahead of time (a thread's work). Errors only cost the preparation."""
        spare = self._folder / "spare.new"
        if spare.exists():
            return
        partial = self._folder / "spare.partial"
        with contextlib.suppress(OSError):
            fd = self._blank(partial, self._size_bytes)
            os.close(fd)
            partial.rename(spare)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self, first_sequence: int, payload_bytes: int = 0) -> None:
        carried = b"".join(frame for _, frame in self._unflushed)
        needed = HEADER_BYTES + len(carried) + _frame.size + payload_bytes
        size, errors = max(self._size_bytes, needed), []
        smallest = max(_SMALLEST_FILE_BYTES, needed)
        # A full disk must not end the node's commits at once: shorter files are still files.
        for attempt in dict.fromkeys((size, size, max(size // 8, smallest), smallest)):
            try:
                self._publish(first_sequence, carried, attempt)
            except OSError as error:
                errors.append(f"{attempt} bytes: {error}")
            else:
                return
        raise JournalLost(f"cannot begin a journal file in {self._folder}: {'; '.join(errors)}")

    def _publish(self, first_sequence: int, carried: bytes, size_bytes: int) -> None:
        number = self._number + 1
        made = self._folder / f"{number:06d}.new"
        made.unlink(missing_ok=True)
        spare = self._folder / "spare.new"
        if spare.exists() and spare.stat().st_size >= size_bytes:
            spare.rename(made)
            fd = os.open(made, os.O_RDWR | os.O_CLOEXEC)
        else:
            fd = self._blank(made, size_bytes)
        try:
            head = _header.pack(_MAGIC, FORMAT, first_sequence, 0)[:-4]
            self._write(fd, head + struct.pack("<I", zlib.crc32(head)), 0)
            if carried:
                self._write(fd, carried, HEADER_BYTES)
            self._ops.flush(fd)
            made.rename(self._folder / f"{number:06d}.jrnl")
            _flush_folder(self._folder)
        except OSError:
            os.close(fd)
            raise
        self.close()
        self._fd, self._number = fd, number
        self._position, self._capacity = HEADER_BYTES + len(carried), os.fstat(fd).st_size

    def _blank(self, path: Path, size_bytes: int) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for position in range(0, size_bytes, len(_ZEROS)):
                self._write(fd, _ZEROS[: size_bytes - position], position)
            os.fsync(fd)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return fd

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = self._ops.write(fd, view, offset)
            if written <= 0:
                raise OSError(f"wrote {written} of {len(view)} bytes")
            view, offset = view[written:], offset + written
