"""One living drain at a POSIX archive: its folder for unfinished work, and what the file system there is able to do.

In: a descriptor of the archive's root. Out: ``folder_fd`` (on the same file system as the root) and ``Abilities``. Always
true: a folder is cleared only when the lock of the drain that made it is free, i.e. that drain is dead, on this host or
(where the file system has cluster-wide locks) on another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Callable
from typing import ParamSpec

from archive.targets import files
from archive.targets.base import FileRights
from ingest.records import BLOCK_BYTES

P = ParamSpec("P")
log = logging.getLogger(__name__)

_PRIVATE = FileRights(0o600)


@dataclasses.dataclass(frozen=True, slots=True)
class Abilities:
    """Found by trying, not by asking what kind of file system it is."""

    direct: bool
    """O_DIRECT works: copies are written and read back past the page cache. Else they are read back after
    fdatasync and POSIX_FADV_DONTNEED."""
    marks: bool
    """Extended attributes work: files carry their object id."""
    folds_names: bool
    """Names that differ only in case or normalisation are one file: keys get portable paths."""

    def __str__(self) -> str:
        read_back = "O_DIRECT" if self.direct else "fdatasync and POSIX_FADV_DONTNEED"
        marks = "marked with their object id" if self.marks else "not marked (no extended attributes)"
        names = "folds names, keys get portable paths" if self.folds_names else "keeps names as they are"
        return f"verifies by {read_back}, files {marks}, {names}"


class Instance:
    """OSError when the file system refuses."""

    def __init__(self, root_fd: int) -> None:
        with contextlib.ExitStack() as undo:
            self._tmp = _private_folder(root_fd, ".hiss-tmp")
            undo.callback(os.close, self._tmp)
            self._name, self.folder_fd, self._lock_fd = _locked_folder(self._tmp)
            undo.callback(os.close, self.folder_fd)
            undo.callback(os.close, self._lock_fd)
            self.abilities = self._probe()
            self._clear_dead()
            undo.pop_all()

    def close(self) -> None:
        try:
            _remove_folder(self._tmp, self._name)
        finally:
            for fd in (self._lock_fd, self.folder_fd, self._tmp):
                os.close(fd)

    # -- dead drains
    def _clear_dead(self) -> None:
        """Remove what dead drains were writing."""
        for name in os.listdir(self._tmp):
            if name == self._name:
                continue
            with contextlib.suppress(FileNotFoundError, files.Blocked):
                with files.closing(files.open_folder(self._tmp, name)) as folder:
                    lock = _free_lock(folder)
                    if lock is None:
                        continue
                    with files.closing(lock):
                        _remove_folder(self._tmp, name)
                log.info("cleared what a dead drain left in .hiss-tmp/%s", name)

    # -- what works here
    def _probe(self) -> Abilities:
        name = f"probe-é-{secrets.token_hex(4)}.part"
        with files.closing(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.folder_fd)) as fd:
            try:
                marks = _works(os.setxattr, fd, files.MARK, b"00")
                direct = _works(self._direct_round, name)
                aliases = (name.replace("probe", "PROBE"), name.replace("é", "e\u0301"))
                folds = any(_works(os.stat, alias, dir_fd=self.folder_fd) for alias in aliases)
            finally:
                os.unlink(name, dir_fd=self.folder_fd)
        return Abilities(direct=direct, marks=marks, folds_names=folds)

    def _direct_round(self, name: str) -> None:
        block = files.aligned_buffer(BLOCK_BYTES)
        with files.closing(os.open(name, os.O_RDWR | os.O_DIRECT, dir_fd=self.folder_fd)) as fd:
            os.pwrite(fd, block, 0)
            os.preadv(fd, [block], 0)


def _works(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
    """False when the file system says that it cannot; a full or broken one is an error, not an inability."""
    try:
        function(*args, **kwargs)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE):
            raise
        return False
    return True


def _private_folder(parent: int, name: str) -> int:
    try:
        return files.open_folder(parent, name)
    except FileNotFoundError:
        return files.make_folder(parent, name, _PRIVATE)


def _locked_folder(tmp: int) -> tuple[str, int, int]:
    """A folder of our own: (name, its descriptor, its held lock)."""
    while True:
        name = secrets.token_hex(8)
        with contextlib.suppress(FileNotFoundError):
            folder = files.make_folder(tmp, name, _PRIVATE)
            try:
                lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=folder)
                # Another drain may have found the folder before it was locked, and clear it: begin again.
                if _try_lock(lock) and os.fstat(lock).st_nlink:
                    return name, folder, lock
                os.close(lock)
            except BaseException:
                os.close(folder)
                raise
            os.close(folder)


def _free_lock(folder: int) -> int | None:
    """The lock of a dead drain, now held by us; None while its drain lives."""
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    if _try_lock(lock):
        return lock
    os.close(lock)
    return None


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        # Without locks every other drain counts as dead: a living one's copy then fails to publish and is retried.
        log.warning("the archive's file system has no locks: only one drain process may use it")
    return True


def _remove_folder(tmp: int, name: str) -> None:
    with files.closing(files.open_folder(tmp, name)) as folder:
        for unfinished in os.listdir(folder):
            os.unlink(unfinished, dir_fd=folder)
    os.rmdir(name, dir_fd=tmp)
