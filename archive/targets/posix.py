"""The POSIX target: a folder on any mounted file system (local disk, NFS, GPFS, Lustre, BeeGFS).

    ROOT/<bucket>/<components of the key>      published files, see archive/keymap.py
    ROOT/.hiss/archive-id                      which archive this is
    ROOT/.hiss/snapshots/                      copies of the catalogue's snapshots
    ROOT/.hiss-tmp/<instance>/lock             held by a living drain (flock); the folder of a dead one is cleared
    ROOT/.hiss-tmp/<instance>/*.part           copies being written

Always true: a file is whole, flushed and has its owner, group, mode and time before it gets its name; the name and
every new folder above it are flushed before ``publish`` returns. Files carry their object id as an extended attribute
where the file system has those, so that no file of anybody else is ever replaced or removed. Folders are opened one
below the other without following links, so a link planted in the archive leads nowhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from archive import keymap
from archive.targets import files
from archive.targets.base import CopyMissing, FileRights, NameBlocked, Published, Staged, TargetError, translated
from archive.targets.instance import Abilities, Instance
from archive.threads import IoThreads
from ingest.records import ObjectRecord

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

_KEPT = (".hiss", "snapshots")
_IDENTITY = "archive-id"
_KEPT_RIGHTS = FileRights(0o600)
_FOLDERS_KNOWN_MAX = 65536


class PosixTarget:
    """``root`` is made if only its last component is missing. ``threads`` may serve several targets.

    ``identity_file`` lies on the node and remembers which archive this is. Without it, an archive that is not mounted
    looks like a new, empty one: copies would go to the disk under the mount point. With it, such a root does not open.
    """

    def __init__(
        self, root: Path, threads: IoThreads, *, name: str = "posix", identity_file: Path | None = None
    ) -> None:
        self.name = name
        self._identity_file = identity_file
        self._root = root
        self._threads = threads
        self._root_fd = -1
        self._instance: Instance | None = None
        self._durable_folders: set[tuple[int, int]] = set()

    # -- life
    async def open(self) -> None:
        await self._call(f"opening the archive {self._root}", self._open)

    def _open(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._root.mkdir(mode=0o755)
        with contextlib.ExitStack() as undo:
            self._root_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(self._close_root)
            if self._identity_file is not None:
                self._identify(self._identity_file)
            self._instance = Instance(self._root_fd)
            undo.pop_all()
        log.info("archive %s: %s", self._root, self.abilities)

    def _identify(self, known_as: Path) -> None:
        """TargetError unless this is the archive the node knows; a node that knows none learns this one's identity."""
        with files.closing(self._walk(_KEPT[:1], _KEPT_RIGHTS)) as folder:
            here = files.read_text(folder, _IDENTITY)
            known = known_as.read_text("ascii").strip() if known_as.exists() else ""
            if known and here != known:
                what = f"is archive {here}" if here else "bears no mark of it (is it mounted?)"
                raise TargetError(
                    f"this node archives to {known}, but {self._root} {what}. To begin a new archive there, remove {known_as}",
                    whole_target=True,
                )
            if not here:
                here = secrets.token_hex(16)
                files.write_text(folder, _IDENTITY, here)
        if not known:
            with files.closing(os.open(known_as.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as beside:
                files.write_text(beside, known_as.name, here)

    def _close_root(self) -> None:
        os.close(self._root_fd)
        self._root_fd = -1

    async def close(self) -> None:
        if self._instance is not None:
            await self._call(f"closing the archive {self._root}", self._instance.close)
            self._instance = None
        if self._root_fd >= 0:
            self._close_root()

    @property
    def abilities(self) -> Abilities:
        return self._opened.abilities

    @property
    def _opened(self) -> Instance:
        if self._instance is None:
            raise TargetError(f"the archive {self._root} is not open", whole_target=True)
        return self._instance

    # -- staged copies
    async def stage(self, record: ObjectRecord, rights: FileRights, chunks: AsyncIterator[memoryview]) -> Staged:
        doing = f"writing the archive copy of {_display(record)}"
        token = f"{record.object_id.hex()}.{secrets.token_hex(4)}.part"
        fd = await self._call(doing, self._create, token)
        try:
            writer = files.SequentialWriter(fd, direct=self.abilities.direct)
            await self._call(doing, files.allocate, fd, record.stored_length)
            async for view in chunks:
                await self._call(doing, writer.write, view)
            await self._call(doing, self._finish, writer, fd, record, rights)
        except BaseException:
            with contextlib.suppress(TargetError):
                await self._call(doing, self._unlink_token, token)
            raise
        finally:
            os.close(fd)
        return Staged(record, rights, token)

    def _create(self, token: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(
            token, flags | (os.O_DIRECT if self.abilities.direct else 0), 0o600, dir_fd=self._opened.folder_fd
        )

    def _finish(self, writer: files.SequentialWriter, fd: int, record: ObjectRecord, rights: FileRights) -> None:
        writer.finish()
        if self.abilities.marks:
            os.setxattr(fd, files.MARK, record.object_id.hex().encode())
            os.setxattr(fd, files.CHECKSUM_MARK, f"{record.crc64nvme:016x}".encode())
        files.give(fd, rights, rights.mode)
        os.utime(fd, ns=(record.modified_ns, record.modified_ns))
        os.fsync(fd)

    async def read_back(self, staged: Staged, size_bytes: int) -> AsyncGenerator[memoryview, None]:
        doing = f"reading back the archive copy of {_display(staged.record)}"
        fd = await self._call(doing, self._open_copy, self._opened.folder_fd, staged.token)
        async with contextlib.aclosing(self._chunks(doing, fd, size_bytes)) as chunks:
            async for view in chunks:
                yield view

    async def discard(self, staged: Staged) -> None:
        await self._call(f"removing the staged copy of {_display(staged.record)}", self._unlink_token, staged.token)

    def _unlink_token(self, token: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(token, dir_fd=self._opened.folder_fd)

    # -- publication
    def paths(self, bucket: str, key: bytes) -> Sequence[str]:
        return keymap.paths(bucket, key, portable=self.abilities.folds_names)

    def version_path(self, bucket: str, key: bytes, object_id: bytes) -> str:
        return keymap.version_path(bucket, key, object_id, portable=self.abilities.folds_names)

    async def publish(self, staged: Staged, *, only_at: str | None = None) -> str:
        return await self._call(f"publishing {_display(staged.record)}", self._publish, staged, only_at)

    def _publish(self, staged: Staged, only_at: str | None) -> str:
        record = staged.record
        every = self.paths(record.bucket, record.key)
        candidates = every if only_at is None else (only_at,)
        for path in candidates:
            try:
                self._publish_at(path, staged)
            except files.Blocked:
                continue
            for other in every if path in every else ():
                if other != path:
                    self._remove(other, None)
            return path
        raise NameBlocked(
            f"publishing {_display(record)}: {' and '.join(candidates)} are taken by files, links or folders that the "
            "gateway did not put there"
        )

    def _publish_at(self, path: str, staged: Staged) -> None:
        *above, leaf = keymap.components(path)
        for attempt in range(3):
            with files.closing(self._walk(above, staged.rights)) as folder:
                self._check_leaf(folder, leaf)
                try:
                    os.rename(staged.token, leaf, src_dir_fd=self._opened.folder_fd, dst_dir_fd=folder)
                except OSError as error:
                    if error.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
                        raise files.Blocked(error.errno, "a folder", leaf) from None
                    # A folder that lost its last file was removed between walking and renaming: walk again.
                    if error.errno == errno.ENOENT and attempt < 2:
                        continue
                    raise
                os.fsync(folder)
                return

    def _check_leaf(self, folder: int, leaf: str) -> None:
        """Blocked unless the name is free or an earlier version of ours has it."""
        try:
            there = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(there.st_mode) or (self.abilities.marks and files.mark_of(folder, leaf) is None):
            raise files.Blocked(errno.EEXIST, "not a file of the gateway", leaf)

    async def move_aside(self, old: str, new: str, object_id: bytes, rights: FileRights) -> None:
        await self._call(f"moving {old} to {new}", self._move_aside, old, new, object_id, rights)

    def _move_aside(self, old: str, new: str, object_id: bytes, rights: FileRights) -> None:
        *above, leaf = keymap.components(new)
        with files.closing(self._walk(above, rights)) as folder:
            if self._is_copy(folder, leaf, object_id):
                return
            try:
                *above_old, leaf_old = keymap.components(old)
                with files.closing(self._walk(above_old)) as source:
                    if not self._is_copy(source, leaf_old, object_id):
                        raise CopyMissing(f"{old} does not show that version")
                    files.second_name(source, leaf_old, folder, leaf)
            except (keymap.NotAKeyPath, files.Blocked, FileNotFoundError):
                raise CopyMissing(f"the archive has no file {old}") from None
            os.fsync(folder)

    def _is_copy(self, folder: int, leaf: str, object_id: bytes) -> bool:
        """Whether the name shows that version, as far as the file system can tell versions apart."""
        try:
            there = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(there.st_mode):
            return False
        return not self.abilities.marks or files.mark_of(folder, leaf) == object_id

    # -- published files
    async def find(self, path: str) -> Published | None:
        return await self._call(f"looking for {path}", self._find, path)

    def _find(self, path: str) -> Published | None:
        try:
            *above, leaf = keymap.components(path)
            with files.closing(self._walk(above)) as folder:
                there = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
                if not stat.S_ISREG(there.st_mode):
                    return None
                return Published(files.mark_of(folder, leaf) if self.abilities.marks else None, there.st_size)
        except (keymap.NotAKeyPath, files.Blocked, FileNotFoundError):
            return None

    async def read(self, path: str, size_bytes: int) -> AsyncGenerator[memoryview, None]:
        fd = await self._call(f"opening {path}", self._open_published, path)
        async with contextlib.aclosing(self._chunks(f"reading {path}", fd, size_bytes)) as chunks:
            async for view in chunks:
                yield view

    def _open_published(self, path: str) -> int:
        try:
            *above, leaf = keymap.components(path)
            with files.closing(self._walk(above)) as folder:
                return self._open_copy(folder, leaf)
        except (keymap.NotAKeyPath, files.Blocked, FileNotFoundError):
            raise CopyMissing(f"the archive has no file {path}") from None

    async def remove(self, path: str, object_id: bytes | None) -> bool:
        return await self._call(f"removing {path}", self._remove, path, object_id)

    def _remove(self, path: str, object_id: bytes | None) -> bool:
        try:
            *above, leaf = keymap.components(path)
            with files.closing(self._walk(above)) as folder:
                there = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
                if not stat.S_ISREG(there.st_mode):
                    return False
                if self.abilities.marks:
                    mark = files.mark_of(folder, leaf)
                    if mark is None or (object_id is not None and mark != object_id):
                        return False
                os.unlink(leaf, dir_fd=folder)
                os.fsync(folder)
        except (keymap.NotAKeyPath, files.Blocked, FileNotFoundError):
            return False
        self._prune(above)
        return True

    def _prune(self, names: Sequence[str]) -> None:
        """Remove folders that became empty, up to the bucket's own: an empty folder ``a`` would block the key ``a``."""
        for depth in range(len(names) - 1, 0, -1):
            with contextlib.suppress(OSError), files.closing(self._walk(names[:depth])) as parent:
                os.rmdir(names[depth], dir_fd=parent)
                continue
            return

    # -- files of the gateway itself
    async def keep_file(self, name: str, source: Path) -> None:
        await self._call(f"copying {source} to the archive", self._keep_file, name, source)

    def _keep_file(self, name: str, source: Path) -> None:
        (name,) = keymap.components(name)
        token = f"{secrets.token_hex(8)}.part"
        with open(source, "rb") as origin, files.closing(self._walk(_KEPT, _KEPT_RIGHTS)) as folder:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                with files.closing(os.open(token, flags, 0o600, dir_fd=self._opened.folder_fd)) as copy:
                    writer = files.SequentialWriter(copy, direct=False)
                    buffer = files.aligned_buffer(1 << 20)
                    offset = 0
                    while count := files.read_full(origin.fileno(), buffer, offset):
                        writer.write(buffer[:count])
                        offset += count
                    writer.finish()
                    at_ns = os.fstat(origin.fileno()).st_mtime_ns
                    os.utime(copy, ns=(at_ns, at_ns))
                os.rename(token, name, src_dir_fd=self._opened.folder_fd, dst_dir_fd=folder)
            except BaseException:
                self._unlink_token(token)
                raise
            os.fsync(folder)

    async def kept_files(self) -> Sequence[tuple[str, int]]:
        return await self._call("listing the snapshots in the archive", self._kept_files)

    def _kept_files(self) -> list[tuple[str, int]]:
        try:
            with files.closing(self._walk(_KEPT)) as folder, os.scandir(folder) as entries:
                found = [(entry.stat(follow_symlinks=False), entry.name) for entry in entries]
        except FileNotFoundError:
            return []
        found = [(status, name) for status, name in found if stat.S_ISREG(status.st_mode)]
        return [(name, status.st_size) for status, name in sorted(found, key=lambda one: (one[0].st_mtime_ns, one[1]))]

    async def drop_file(self, name: str) -> None:
        await self._call(f"removing the snapshot {name}", self._drop_file, name)

    def _drop_file(self, name: str) -> None:
        (name,) = keymap.components(name)
        with contextlib.suppress(FileNotFoundError), files.closing(self._walk(_KEPT)) as folder:
            os.unlink(name, dir_fd=folder)

    # -- common
    async def _call(self, doing: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await self._threads.run(function, *args, **kwargs)
        except OSError as error:
            raise translated(error, doing) from error

    def _walk(self, names: Sequence[str], rights: FileRights | None = None) -> int:
        """Descriptor of a folder below the root. With ``rights``, missing folders are made and all are made durable."""
        folder = os.dup(self._root_fd)
        try:
            for name in names:
                below = self._step(folder, name, rights)
                os.close(folder)
                folder = below
        except BaseException:
            os.close(folder)
            raise
        return folder

    def _step(self, folder: int, name: str, rights: FileRights | None) -> int:
        try:
            below = files.open_folder(folder, name)
        except FileNotFoundError:
            if rights is None:
                raise
            below = files.make_folder(folder, name, rights)
        if rights is not None:
            try:
                self._make_durable(folder, below, rights)
            except BaseException:
                os.close(below)
                raise
        return below

    def _make_durable(self, folder: int, below: int, rights: FileRights) -> None:
        """A folder found may be one that a dead drain made and never flushed: flush its parent once in this process."""
        status = os.fstat(below)
        identity = (status.st_dev, status.st_ino)
        if identity in self._durable_folders:
            return
        files.finish_folder(below, rights)
        os.fsync(folder)
        if len(self._durable_folders) >= _FOLDERS_KNOWN_MAX:
            self._durable_folders.clear()
        self._durable_folders.add(identity)

    def _open_copy(self, folder: int, name: str) -> int:
        fd = files.open_file(folder, name, direct=self.abilities.direct)
        if not self.abilities.direct:
            files.drop_cache(fd)
        # O_NONBLOCK guarded the open against a pipe of that name; reads are to block.
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        return fd

    async def _chunks(self, doing: str, fd: int, size_bytes: int) -> AsyncGenerator[memoryview, None]:
        try:
            # No larger than the file: the kernel touches every page of a buffer it is given.
            buffer = files.aligned_buffer(min(size_bytes, os.fstat(fd).st_size + 1))
            offset = 0
            while count := await self._call(doing, files.read_full, fd, buffer, offset):
                yield buffer[:count]
                offset += count
                if count < len(buffer):
                    break
        finally:
            os.close(fd)


def _display(record: ObjectRecord) -> str:
    return f"{record.bucket}/{record.key.decode('utf-8', 'backslashreplace')}"
