"""File calls of the POSIX target: walking without following links, writing past the page cache, marking files.

In: descriptors, names of one component, memoryviews. Out: descriptors, counts; every failure is an OSError, which the
target translates. Everything here blocks and belongs in a thread. Always true: no call follows a symbolic link below
the folder it is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator

import numpy as np

from archive.targets.base import FileRights
from ingest.records import BLOCK_BYTES

MARK = "user.hiss.object"
"""Extended attribute of every file the gateway publishes: the object id in hex."""
CHECKSUM_MARK = "user.hiss.crc64nvme"
_BOUNCE_BYTES = 4 << 20
_SYNC_EVERY_BYTES = 256 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class Blocked(OSError):
    """Something that is not a folder (or not ours) is where a folder or file of ours must go."""


def aligned_buffer(size_bytes: int) -> memoryview:
    """Anonymous memory, page-aligned; freed with the last view of it."""
    whole_bytes = max(1, -(-size_bytes // BLOCK_BYTES)) * BLOCK_BYTES
    return memoryview(mmap.mmap(-1, whole_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def open_folder(parent: int, name: str) -> int:
    """Blocked when ``name`` is no folder (a symbolic link is none); FileNotFoundError when it is missing."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise Blocked(errno.ENOTDIR, "not a folder", name) from None
        raise


_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def second_name(source: int, old: str, folder: int, new: str) -> None:
    """Give a file another name. Where the file system has no hard links, the old one is then gone."""
    try:
        os.link(old, new, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(old, new, src_dir_fd=source, dst_dir_fd=folder)
        os.fsync(source)


def make_folder(parent: int, name: str, rights: FileRights) -> int:
    """A new folder with its rights, durable in its parent; or the one somebody made meanwhile."""
    # Closed to others until it has its rights: a folder found at 0700 is one whose maker died before it was done.
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    folder = open_folder(parent, name)
    try:
        finish_folder(folder, rights)
        os.fsync(parent)
    except BaseException:
        os.close(folder)
        raise
    return folder


def finish_folder(folder: int, rights: FileRights) -> None:
    """Give a folder that is still at 0700 its rights; leave any other as its owner wants it."""
    if stat.S_IMODE(os.fstat(folder).st_mode) == 0o700 and rights.folder_mode != 0o700:
        give(folder, rights, rights.folder_mode)


def give(fd: int, rights: FileRights, mode: int) -> None:
    if rights.owner is not None or rights.group is not None:
        os.fchown(fd, -1 if rights.owner is None else rights.owner, -1 if rights.group is None else rights.group)
    os.fchmod(fd, mode)


def open_file(folder: int, name: str, *, direct: bool) -> int:
    """Open for reading; FileNotFoundError for anything but a regular file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(errno.ENOENT, "a symbolic link, not a file", name) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "not a file", name)
    return fd


def mark_of(folder: int, name: str) -> bytes | None:
    """Object id of a file the gateway published; None for anybody else's."""
    try:
        with closing(open_file(folder, name, direct=False)) as fd:
            return bytes.fromhex(os.getxattr(fd, MARK).decode("ascii"))
    except (OSError, ValueError):
        return None


def read_text(folder: int, name: str) -> str:
    """A short ASCII file; empty when there is none."""
    try:
        with closing(open_file(folder, name, direct=False)) as fd:
            return os.read(fd, BLOCK_BYTES).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""


def write_text(folder: int, name: str, text: str) -> None:
    """Whole and durable on return."""
    part = f".{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with closing(os.open(part, flags, 0o600, dir_fd=folder)) as fd:
        os.write(fd, f"{text}\n".encode("ascii"))
        os.fsync(fd)
    os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def allocate(fd: int, length: int) -> None:
    """Reserve the space now, so that a full file system says so before the first byte, not after the last."""
    if length == 0 or _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(length)) == 0:
        return
    code = ctypes.get_errno()
    # A file system that cannot reserve is fine: os.posix_fallocate would write zeros instead, twice the work.
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR):
        raise OSError(code, os.strerror(code))


def read_full(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset``; less only at the end of the file. O_DIRECT wants whole blocks, hence the stop at
    any short read: only the end of the file is one."""
    filled = 0
    while filled < len(buffer):
        count = os.preadv(fd, [buffer[filled:]], offset + filled)
        filled += count
        if count == 0 or filled % BLOCK_BYTES:
            break
    return filled


def drop_cache(fd: int) -> None:
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class SequentialWriter:
    """Writes a file from its first byte to its last, by O_DIRECT when ``direct`` (the descriptor must be open so).

    Aligned memory at an aligned position goes to the device from where it lies; anything else through a bounce buffer.
    """

    def __init__(self, fd: int, *, direct: bool) -> None:
        self._fd = fd
        self._direct = direct
        self._bounce = aligned_buffer(_BOUNCE_BYTES) if direct else memoryview(b"")
        self._held = 0
        self._unsynced = 0
        self.length = 0
        """Bytes written to the file, without those held in the bounce buffer."""

    def write(self, view: memoryview) -> None:
        if not self._direct:
            self._put(view)
            self._unsynced += len(view)
            if self._unsynced >= _SYNC_EVERY_BYTES:
                # Dirty pages of a slow archive must not crowd the memory ingest works in.
                drop_cache(self._fd)
                self._unsynced = 0
            return
        at = 0
        while at < len(view):
            blocks = (len(view) - at) // BLOCK_BYTES * BLOCK_BYTES
            if blocks and not self._held and _is_aligned(view[at:]):
                self._put(view[at : at + blocks])
                at += blocks
                continue
            count = min(len(view) - at, _BOUNCE_BYTES - self._held)
            self._bounce[self._held : self._held + count] = view[at : at + count]
            self._held += count
            at += count
            if self._held == _BOUNCE_BYTES:
                self._put(self._bounce)
                self._held = 0

    def finish(self) -> None:
        """Write what is held and cut the file to its length. The caller flushes."""
        if self._held:
            whole = self._held // BLOCK_BYTES * BLOCK_BYTES
            self._put(self._bounce[:whole])
            if whole < self._held:
                # The end of a file is no whole block: it goes through the page cache and is flushed with it.
                fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
                self._direct = False
                self._put(self._bounce[whole : self._held])
        os.ftruncate(self._fd, self.length)

    def _put(self, view: memoryview) -> None:
        stalled = False
        while len(view):
            count = os.pwrite(self._fd, view, self.length)
            if self._direct:
                count = count // BLOCK_BYTES * BLOCK_BYTES
            if count == 0 and stalled:
                raise OSError(errno.EIO, "writes make no progress")
            stalled = count == 0
            self.length += count
            view = view[count:]


def _is_aligned(view: memoryview) -> bool:
    # numpy tells the address of read-only memory too; ctypes would not.
    return int(np.frombuffer(view, np.uint8).ctypes.data) % BLOCK_BYTES == 0
