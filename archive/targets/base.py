"""The contract of an archive target, and the errors a target may raise.

A copy goes through ``stage`` (written under a name nobody reads, durable), ``read_back`` (what really lies there, past
every cache) and ``publish`` (it appears under its own name, whole, durably); ``discard`` ends one that is not published.

Always true of a target: a published name only ever shows a whole file that was staged; a key has one published file,
that of its last publication; a file the target did not publish is neither replaced nor removed; nothing outside its root
is touched, whatever symbolic links lie inside.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

from ingest.bucket_settings import BucketSettings
from ingest.records import ObjectRecord


class TargetError(Exception):
    """The target could not do it. ``str()`` is fit for an operator. ``whole_target``: the next object will fail too."""

    def __init__(self, message: str, *, whole_target: bool = False) -> None:
        super().__init__(message)
        self.whole_target = whole_target


class TargetLost(TargetError):
    """What was opened is gone for good (unmounted, exported anew): it must be opened again, by a new process."""


class CopyMissing(TargetError):
    """No published file at that path."""


class NameBlocked(TargetError):
    """Every path the key may have is taken by something that is not ours."""


_ERRNO_TABLE: dict[int, tuple[str, bool]] = {
    errno.ENOSPC: ("the archive is full", True),
    errno.EDQUOT: ("the archive's quota is used up", True),
    errno.EROFS: ("the archive is read-only", True),
    errno.EIO: ("the archive reports an I/O error", False),
    errno.EACCES: ("the archive process may not write there", False),
    errno.EPERM: ("the archive process may not give files that owner or mode", False),
    errno.EFBIG: ("the file is larger than the archive allows", False),
    errno.ENAMETOOLONG: ("the name is longer than the archive allows", False),
    errno.EXDEV: (
        "the folder is another file system than the archive's root, so nothing can be renamed into it",
        False,
    ),
    errno.ETIMEDOUT: ("the archive does not answer", True),
    errno.EHOSTDOWN: ("the archive's host is down", True),
}
_LOST = {
    errno.ESTALE: "the archive's file system was unmounted or exported anew",
    errno.ENOTCONN: "the archive's file system is not connected",
    errno.ENODEV: "the archive's device is gone",
}


def translated(error: OSError, doing: str) -> TargetError:
    """The one place where errno becomes a sentence: ``doing`` says what was attempted, with the path."""
    if error.errno in _LOST:
        return TargetLost(f"{doing}: {_LOST[error.errno]} ({error.strerror})", whole_target=True)
    text, whole_target = _ERRNO_TABLE.get(error.errno or 0, ("the archive refused", False))
    return TargetError(f"{doing}: {text} ({error.strerror or error})", whole_target=whole_target)


@dataclasses.dataclass(frozen=True, slots=True)
class FileRights:
    """Who may read an archived file. ``owner`` and ``group`` are numeric; None keeps the archive process's own."""

    mode: int = 0o640
    owner: int | None = None
    group: int | None = None

    @property
    def folder_mode(self) -> int:
        """Whoever may read the file may enter its folder; the owner may always write."""
        return 0o700 | self.mode & 0o077 | (self.mode & 0o044) >> 2

    @classmethod
    def of(cls, settings: BucketSettings) -> FileRights:
        return cls(settings.archive_mode, settings.archive_owner, settings.archive_group)


@dataclasses.dataclass(frozen=True, slots=True)
class Staged:
    """A written, durable copy that nobody can see yet."""

    record: ObjectRecord
    rights: FileRights
    token: str
    """The target's own name for it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """What lies under a published name. ``object_id`` is None where the target cannot mark files."""

    object_id: bytes | None
    length: int


class Target(Protocol):
    """Every method raises TargetError, nothing else of the system's."""

    name: str
    """What ``ArchiveCopy.target`` says."""

    async def open(self) -> None:
        """Make the root usable and clear away what dead drains staged. Once, before anything else."""
        ...

    async def close(self) -> None: ...

    async def stage(self, record: ObjectRecord, rights: FileRights, chunks: AsyncIterator[memoryview]) -> Staged:
        """Write ``chunks`` (each view valid until the next is asked for); durable on return. An exception of ``chunks``
        passes through; whatever was written is then gone."""
        ...

    def read_back(self, staged: Staged, size_bytes: int) -> AsyncGenerator[memoryview, None]:
        """The staged bytes as the device holds them, in views of up to ``size_bytes``, each valid until the next."""
        ...

    async def publish(self, staged: Staged, *, only_at: str | None = None) -> str:
        """Show the copy under the first of ``paths`` that is free or ours (under ``only_at`` alone, if given), in place
        of whatever was published for this key before; durable on return. Returns the path. NameBlocked if none is."""
        ...

    async def discard(self, staged: Staged) -> None:
        """Remove a copy that is not published; nothing happens when it is gone already."""
        ...

    def paths(self, bucket: str, key: bytes) -> Sequence[str]:
        """Every path the current version of this key may be published at."""
        ...

    def version_path(self, bucket: str, key: bytes, object_id: bytes) -> str:
        """The path of a version that is not current."""
        ...

    async def move_aside(self, old: str, new: str, object_id: bytes, rights: FileRights) -> None:
        """Give the published copy of a version the name ``new``; durable on return. ``old`` may show it still, until
        another version is published there. Doing it again changes nothing. CopyMissing when ``old`` does not show it."""
        ...

    async def find(self, path: str) -> Published | None:
        """What is published at ``path``; None when nothing is."""
        ...

    def read(self, path: str, size_bytes: int) -> AsyncGenerator[memoryview, None]:
        """Published bytes in order; CopyMissing when there are none."""
        ...

    async def remove(self, path: str, object_id: bytes | None) -> bool:
        """Remove a published file, if it is that version (any version of ours for None). False when it is not there."""
        ...

    async def keep_file(self, name: str, source: Path) -> None:
        """Store a file of the gateway itself (a catalogue snapshot) under ``name``, whole and durable."""
        ...

    async def kept_files(self) -> Sequence[tuple[str, int]]:
        """(name, size in bytes) of what ``keep_file`` stored, oldest first."""
        ...

    async def drop_file(self, name: str) -> None: ...
