"""What only a file system can get wrong: rights, links, full and broken disks, caches."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import resource
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from archive.targets import files
from archive.targets.base import FileRights, NameBlocked, TargetError, TargetLost, translated
from archive.targets.posix import PosixTarget

RIGHTS = FileRights()


@pytest.fixture
async def target(tmp_path: Path, threads) -> AsyncIterator[PosixTarget]:
    target = PosixTarget(tmp_path / "archive", threads)
    await target.open()
    yield target
    await target.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "archive"


async def publish(target: PosixTarget, version, rights: FileRights = RIGHTS) -> str:
    return await target.publish(await target.stage(version.record, rights, version.chunks()))


def unfinished(root: Path) -> list[Path]:
    return list(root.rglob("*.part"))


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


@pytest.mark.parametrize(
    ("mode", "folder_mode"),
    [(0o640, 0o750), (0o600, 0o700), (0o444, 0o755), (0o660, 0o770), (0o400, 0o700), (0o777, 0o777)],
)
async def test_whoever_may_read_a_file_may_reach_it(target, root, version, mode, folder_mode) -> None:
    one = version(b"scan/deep/1.npy")
    await publish(target, one, FileRights(mode))
    status = (root / "mx-2026/scan/deep/1.npy").stat()
    assert stat.S_IMODE(status.st_mode) == mode
    assert status.st_mtime_ns == one.record.modified_ns
    for folder in ("mx-2026", "mx-2026/scan", "mx-2026/scan/deep"):
        assert stat.S_IMODE((root / folder).stat().st_mode) == folder_mode


@pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="giving files away needs root")
async def test_owner_and_group_of_the_bucket_are_given_to_file_and_folders(target, root, version) -> None:
    await publish(target, version(b"scan/1"), FileRights(0o640, owner=12345, group=23456))
    for name in ("mx-2026", "mx-2026/scan", "mx-2026/scan/1"):
        status = (root / name).stat()
        assert (status.st_uid, status.st_gid) == (12345, 23456)


async def test_a_folder_left_without_its_rights_by_a_crash_gets_them(target, root, version) -> None:
    (root / "mx-2026").mkdir(mode=0o700)
    await publish(target, version(b"1"))
    assert stat.S_IMODE((root / "mx-2026").stat().st_mode) == 0o750


async def test_links_planted_in_the_archive_lead_nowhere(target, root, tmp_path: Path, version) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    (root / "mx-2026").mkdir(mode=0o755)
    (root / "mx-2026/scan").symlink_to(outside)
    (root / "mx-2026/file").symlink_to(outside / "precious")
    assert await publish(target, version(b"scan/precious")) == "mx-2026/%d-scan/%f-precious"
    assert await publish(target, version(b"file")) == "mx-2026/%f-file"
    assert not await target.remove("mx-2026/scan/precious", None)
    assert not await target.remove("mx-2026/file", None)
    assert await target.find("mx-2026/file") is None
    with pytest.raises(TargetError):
        _ = [bytes(view) async for view in target.read("mx-2026/scan/precious", 1 << 20)]
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"precious": b"precious"}


async def test_a_bucket_folder_that_is_a_link_is_refused(target, root, tmp_path: Path, version) -> None:
    (tmp_path / "outside").mkdir()
    (root / "mx-2026").symlink_to(tmp_path / "outside")
    with pytest.raises(NameBlocked, match="mx-2026/a and mx-2026/%f-a"):
        await publish(target, version(b"a"))
    assert list((tmp_path / "outside").iterdir()) == []


async def test_a_fifo_in_the_way_neither_hangs_nor_is_replaced(target, root, version) -> None:
    (root / "mx-2026").mkdir()
    os.mkfifo(root / "mx-2026/a")
    assert await publish(target, version(b"a")) == "mx-2026/%f-a"
    assert stat.S_ISFIFO((root / "mx-2026/a").stat().st_mode)


async def test_read_back_sees_the_device_and_not_the_cache(target, root, version) -> None:
    one = version(b"a", 1 << 20)
    staged = await target.stage(one.record, RIGHTS, one.chunks())
    (copy,) = (root / ".hiss-tmp").rglob("*.part")
    raw = os.open(copy, os.O_WRONLY | os.O_DIRECT)
    block = files.aligned_buffer(4096)
    os.pwrite(raw, block, 8192)
    os.close(raw)
    assert b"".join([bytes(view) async for view in target.read_back(staged, 1 << 20)]) != one.body


async def test_without_direct_io_and_marks_it_still_archives(target, version) -> None:
    instance = target._instance
    instance.abilities = dataclasses.replace(instance.abilities, direct=False, marks=False)
    one = version(b"scan/1", 300_001)
    staged = await target.stage(one.record, RIGHTS, one.chunks())
    assert b"".join([bytes(view) async for view in target.read_back(staged, 1 << 20)]) == one.body
    path = await target.publish(staged)
    assert (await target.find(path)).object_id is None
    assert await target.remove(path, one.record.object_id)


async def test_names_that_fold_are_escaped(target, version) -> None:
    instance = target._instance
    instance.abilities = dataclasses.replace(instance.abilities, folds_names=True)
    assert await publish(target, version(b"scan/A")) == "mx-2026/scan/%f-%41"
    assert await publish(target, version(b"scan/a")) == "mx-2026/scan/a"


@contextlib.contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_file_too_large_for_the_archive_is_refused_and_leaves_nothing(target, root, version) -> None:
    with file_size_limit(256 << 10), pytest.raises(TargetError, match="mx-2026/big: the file is larger than"):
        await publish(target, version(b"big", 1 << 20))
    assert unfinished(root) == []
    await publish(target, version(b"big", 1 << 20))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("mounting a small file system needs root")
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "small"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", place)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


async def test_a_full_archive_says_so_and_goes_on_once_there_is_room(full_disk: Path, threads, version) -> None:
    target = PosixTarget(full_disk / "archive", threads)
    await target.open()
    small, large = version(b"small", 500_000), version(b"large", 900_000)
    path = await publish(target, small)
    with pytest.raises(TargetError, match="large: the archive is full") as caught:
        await publish(target, large)
    assert caught.value.whole_target
    assert unfinished(full_disk) == []
    assert (full_disk / "archive" / path).read_bytes() == small.body
    await target.remove(path, None)
    await publish(target, large)
    assert (full_disk / "archive/mx-2026/large").read_bytes() == large.body
    await target.close()


async def test_a_read_only_archive_says_so(full_disk: Path, threads) -> None:
    target = PosixTarget(full_disk / "archive", threads)
    await target.open()
    await target.close()
    mount("-o", "remount,ro", full_disk)
    with pytest.raises(TargetError, match="the archive is read-only") as caught:
        await PosixTarget(full_disk / "archive", threads).open()
    assert caught.value.whole_target


async def test_a_missing_archive_is_named(tmp_path: Path, threads) -> None:
    with pytest.raises(TargetError, match=r"opening the archive .*none/below"):
        await PosixTarget(tmp_path / "none/below", threads).open()


async def test_an_archive_that_is_not_mounted_is_not_taken_for_a_new_one(tmp_path: Path, threads, version) -> None:
    root, identity = tmp_path / "archive", tmp_path / "archive-id"
    for _ in range(2):
        target = PosixTarget(root, threads, identity_file=identity)
        await target.open()
        await target.close()
    root.rename(tmp_path / "elsewhere")
    root.mkdir()
    with pytest.raises(TargetError, match=r"bears no mark of it \(is it mounted\?\)") as caught:
        await PosixTarget(root, threads, identity_file=identity).open()
    assert caught.value.whole_target
    other = PosixTarget(root, threads)
    await other.open()
    await other.close()
    with pytest.raises(TargetError, match="is it mounted"):
        await PosixTarget(root, threads, identity_file=identity).open()
    identity.unlink()
    target = PosixTarget(root, threads, identity_file=identity)
    await target.open()
    await publish(target, version(b"1"))
    await target.close()


async def test_cancelling_a_copy_leaves_nothing(target, root, version) -> None:
    one = version(b"slow")
    started = asyncio.Event()

    async def never_ending() -> AsyncIterator[memoryview]:
        yield memoryview(one.body)
        started.set()
        await asyncio.Event().wait()

    copy = asyncio.create_task(target.stage(one.record, RIGHTS, never_ending()))
    await started.wait()
    copy.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copy
    assert unfinished(root) == []


def test_every_errno_becomes_a_sentence() -> None:
    assert isinstance(translated(OSError(errno.ESTALE, "stale"), "writing x"), TargetLost)
    for code in (errno.EIO, errno.EACCES, errno.EPERM, errno.EXDEV, errno.EBADMSG):
        text = str(translated(OSError(code, os.strerror(code)), "writing x"))
        assert text.startswith("writing x: ")
        assert os.strerror(code) in text
