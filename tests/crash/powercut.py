"""What a power cut may leave behind: reads the log of the preloaded shim and builds legal states of the disk.

In: the log of a node's writes, flushes and names (tests/crash/shim/shim.c) with the client's marks in it, a moment, a random
generator. Out: a folder as it may look after the power went at that moment.
What is legal: everything a finished flush covers is there; a write since may be there, absent or torn at 4 KiB; names
(create, rename, remove) since the last flush of their folder are kept up to any point, in order. Writes past the page
cache count as unflushed like any other.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import mmap
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_RECORD = struct.Struct("<IIQQqQIIQ")
_MAGIC = 0x4D494853
BEGIN_WRITE, END_WRITE, BEGIN_FLUSH, END_FLUSH, CREATE, RENAME, UNLINK, MKDIR, RMDIR, TRUNCATE, FLUSH_FOLDER = range(
    1, 12
)
MARK = 100
BLOCK_BYTES = 4096
_ZEROS = bytes(1 << 20)


def build_shim(folder: Path) -> Path:
    """Compile the shim (a second, once a session)."""
    library = folder / "shim.so"
    source = Path(__file__).parent / "shim" / "shim.c"
    command = ["gcc", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-o", str(library), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return library


class Marks:
    """The client's side of the log: what it was told, in order with what the node wrote."""

    def __init__(self, log: Path) -> None:
        self._fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, **what: Any) -> None:
        text = json.dumps(what).encode()
        os.write(self._fd, _RECORD.pack(_MAGIC, MARK, 0, 0, 0, 0, len(text), 0, 0) + text)

    def close(self) -> None:
        os.close(self._fd)


@dataclasses.dataclass(slots=True, eq=False)
class Write:
    """``end`` is the record of its return, None while it has not returned."""

    begin: int
    offset: int
    data: memoryview
    zero: bool
    end: int | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Resize:
    begin: int
    end: int | None
    size: int
    shrinks: bool


@dataclasses.dataclass(slots=True, eq=False)
class File:
    changes: list[Write | Resize] = dataclasses.field(default_factory=list)
    flushes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(begin, end) records of flushes that succeeded."""


@dataclasses.dataclass(slots=True, eq=False)
class Name:
    """A change of names: ``path`` (and for a rename ``target``), the file it is about."""

    at: int
    operation: int
    path: str
    target: str = ""
    file: File | None = None

    @property
    def folder(self) -> str:
        """Whose flush makes it durable."""
        return os.path.dirname(self.target or self.path)


class Log:
    """A parsed log. ``marks``: (record number, what the client said). ``deaf_to``: flushes of such paths count for
    nothing, to see that the judge would find out."""

    def __init__(self, path: Path, root: Path, deaf_to: str = "") -> None:
        self._deaf_to = deaf_to
        self._root = str(root)
        self._map = mmap.mmap(os.open(path, os.O_RDONLY), 0, prot=mmap.PROT_READ)
        self.records = 0
        self.marks: list[tuple[int, dict[str, Any]]] = []
        self.moments: list[int] = []
        """Records after which something durable, visible or told has changed."""
        self._names: list[Name] = []
        self._folder_flushes: dict[str, list[int]] = {}
        self._files: dict[int, File] = {}
        self._calls: dict[int, Write] = {}
        self._flushes: dict[int, int] = {}
        for fields, name, other, data in self._parse():
            self._take(fields, name, other, data)
            self.records += 1

    def _parse(self) -> Iterator[tuple[tuple[int, ...], str, str, memoryview]]:
        view, position = memoryview(self._map), 0
        while position + _RECORD.size <= len(view):
            fields = _RECORD.unpack_from(view, position)
            assert fields[0] == _MAGIC, f"the log is broken at {position}"
            position += _RECORD.size
            texts = []
            for size in fields[6:8]:
                texts.append(bytes(view[position : position + size]).decode())
                position += size
            yield fields, texts[0], texts[1], view[position : position + fields[8]]
            position += fields[8]

    def _take(self, fields: tuple[int, ...], path: str, other: str, data: memoryview) -> None:
        _, operation, call, inode, offset, length = fields[:6]
        now = self.records
        if operation not in (BEGIN_WRITE, END_WRITE, BEGIN_FLUSH):
            self.moments.append(now + 1)
        if operation == MARK:
            self.marks.append((now, json.loads(path)))
        elif operation in (BEGIN_WRITE, END_WRITE):
            self._take_write(operation, call, inode, offset, length, data)
        elif operation in (BEGIN_FLUSH, END_FLUSH, FLUSH_FOLDER):
            if not self._deaf_to or self._deaf_to not in path:
                self._take_flush(operation, call, inode, path)
        elif operation == TRUNCATE:
            self._file(inode).changes.append(Resize(now, now, offset, length == 1))
        else:
            if operation == CREATE:
                self._files.pop(inode, None)
            file = self._file(inode) if operation in (CREATE, RENAME) else None
            self._names.append(Name(now, operation, path, other, file))

    def _take_write(self, operation: int, call: int, inode: int, offset: int, length: int, data: memoryview) -> None:
        if operation == BEGIN_WRITE:
            steps = range(0, len(data), len(_ZEROS))
            zero = all(data[at : at + len(_ZEROS)] == _ZEROS[: len(data) - at] for at in steps)
            write = self._calls[call] = Write(self.records, offset, data, zero)
            self._file(inode).changes.append(write)
        else:
            write = self._calls.pop(call)
            write.end, write.data = self.records, write.data[:length]

    def _take_flush(self, operation: int, call: int, inode: int, path: str) -> None:
        if operation == BEGIN_FLUSH:
            self._flushes[call] = self.records
        elif operation == END_FLUSH:
            self._file(inode).flushes.append((self._flushes.pop(call), self.records))
        else:
            self._folder_flushes.setdefault(path, []).append(self.records)

    def _file(self, inode: int) -> File:
        if inode not in self._files:
            self._files[inode] = File()
        return self._files[inode]

    # -- states

    def materialise(self, target: Path, cut: int, rng: random.Random, *, keep: float) -> None:
        """Build the folder as it may be when the power goes before record ``cut``. ``keep``: how likely each unflushed
        change is there (0: none, 1: all)."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(mode=0o700, parents=True)
        folders, names = self._namespace(cut, rng, keep)
        for folder in sorted(folders):
            self._moved(folder, target).mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, file in names.items():
            place = self._moved(path, target)
            if place.parent.is_dir():
                _write_file(place, file, cut, rng, keep)

    def _moved(self, path: str, target: Path) -> Path:
        return target / os.path.relpath(path, self._root)

    def _namespace(self, cut: int, rng: random.Random, keep: float) -> tuple[set[str], dict[str, File]]:
        folders: set[str] = set()
        names: dict[str, File] = {}
        applied = []
        until: dict[str, int] = {}
        for name in self._names:
            if name.at >= cut:
                break
            flushes = self._folder_flushes.get(name.folder, [])
            position = bisect.bisect_left(flushes, cut)
            durable = position > 0 and flushes[position - 1] > name.at
            # Names of a folder survive in order: once one is gone, so is every later one.
            if not durable and name.folder not in until and rng.random() >= keep:
                until[name.folder] = name.at
            if durable or name.folder not in until:
                applied.append(name)
        for name in applied:
            if name.operation == MKDIR:
                folders.add(name.path)
            elif name.operation == RMDIR:
                folders.discard(name.path)
            elif name.operation == UNLINK:
                names.pop(name.path, None)
            elif name.operation == CREATE:
                assert name.file is not None
                names[name.path] = name.file
            else:
                self._rename(name, names, folders)
        return folders, names

    @staticmethod
    def _rename(name: Name, names: dict[str, File], folders: set[str]) -> None:
        if name.path in folders:
            folders.discard(name.path)
            folders.add(name.target)
            return
        # The old name may never have reached its folder: a rename carries the file all the same.
        assert name.file is not None
        names.pop(name.path, None)
        names[name.target] = name.file


def _write_file(place: Path, file: File, cut: int, rng: random.Random, keep: float) -> None:
    durable_from = max((begin for begin, end in file.flushes if end < cut), default=-1)
    fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    written = False
    try:
        for change in file.changes:
            if change.begin >= cut:
                break
            durable = change.end is not None and change.end < durable_from
            if isinstance(change, Resize):
                if durable or rng.random() < keep:
                    size = os.fstat(fd).st_size
                    os.ftruncate(fd, change.size if change.shrinks else max(size, change.size))
                continue
            if not durable and rng.random() >= keep:
                continue
            whole = durable or keep >= 1 or rng.random() < 0.5
            for start, end in [(0, len(change.data))] if whole else _torn(change, rng):
                if change.zero and not written:
                    os.ftruncate(fd, max(os.fstat(fd).st_size, change.offset + end))
                elif end > start:
                    os.pwrite(fd, change.data[start:end], change.offset + start)
                    written = True
    finally:
        os.close(fd)


def _torn(write: Write, rng: random.Random) -> list[tuple[int, int]]:
    """Some of the write's blocks."""
    edges = [0]
    first = BLOCK_BYTES - write.offset % BLOCK_BYTES
    edges += range(first, len(write.data), BLOCK_BYTES)
    edges.append(len(write.data))
    return [(start, end) for start, end in itertools.pairwise(edges) if rng.random() < 0.5]


Content = tuple[int, int] | None


def may_be(log: Log, cut: int, buckets: set[str]) -> dict[tuple[str, str], list[Content]]:
    """What each key of these buckets may be after a cut: the last thing acknowledged, or anything begun since."""
    allowed: dict[tuple[str, str], list[Content]] = {}
    for at, mark in log.marks:
        if at >= cut or mark["bucket"] not in buckets:
            continue
        key = mark["bucket"], mark["key"]
        content = None if mark["content"] is None else (mark["content"][0], mark["content"][1])
        if mark["what"] == "asked":
            allowed.setdefault(key, [None]).append(content)
        else:
            allowed[key] = [content]
    return allowed
