"""What every archive target must do, whatever it stores on. A new target adds itself to the ``archive`` fixture."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from archive.targets.base import CopyMissing, FileRights, NameBlocked, Target
from ingest.errors import DataLost

RIGHTS = FileRights()


async def joined(chunks: AsyncIterator[memoryview]) -> bytes:
    return b"".join([bytes(view) async for view in chunks])


async def publish(target: Target, version) -> str:
    staged = await target.stage(version.record, RIGHTS, version.chunks())
    return await target.publish(staged)


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4096, 4097, 1 << 20, (9 << 20) + 13])
async def test_bytes_come_back_from_the_staged_and_from_the_published_copy(archive, version, size_bytes) -> None:
    one = version(b"scan/0001.npy", size_bytes)
    staged = await archive.target.stage(one.record, RIGHTS, one.chunks())
    assert archive.stored() == {}
    assert await joined(archive.target.read_back(staged, 1 << 20)) == one.body
    path = await archive.target.publish(staged)
    assert archive.stored() == {path: one.body}
    assert await joined(archive.target.read(path, 1 << 20)) == one.body
    assert (await archive.target.find(path)).length == size_bytes


async def test_chunks_of_any_size_and_alignment_are_written_in_order(archive, version) -> None:
    one = version(b"odd", 300_000)

    async def odd() -> AsyncIterator[memoryview]:
        at = 0
        for size in (1, 4095, 4096, 10, 8192, 65536, 3, 300_000):
            yield memoryview(one.body)[at : at + size]
            at += size

    await archive.target.publish(await archive.target.stage(one.record, RIGHTS, odd()))
    assert archive.stored() == {"mx-2026/odd": one.body}


async def test_a_source_that_fails_leaves_nothing(archive, version) -> None:
    one = version(b"broken")

    async def failing() -> AsyncIterator[memoryview]:
        yield memoryview(one.body)[:4096]
        raise DataLost("segment 3 does not read")

    with pytest.raises(DataLost):
        await archive.target.stage(one.record, RIGHTS, failing())
    assert archive.stored() == {}
    assert archive.unfinished() == []


async def test_discard_removes_a_staged_copy_once_and_again(archive, version) -> None:
    one = version(b"unwanted")
    staged = await archive.target.stage(one.record, RIGHTS, one.chunks())
    await archive.target.discard(staged)
    await archive.target.discard(staged)
    assert archive.stored() == {}
    assert archive.unfinished() == []


@pytest.mark.parametrize("order", [(b"a", b"a/b", b"a/b/c"), (b"a/b/c", b"a/b", b"a"), (b"a/b", b"a", b"a/b/c")])
async def test_a_key_and_the_keys_below_it_live_side_by_side(archive, version, order) -> None:
    versions = [version(key, key * 10) for key in order]
    paths = [await publish(archive.target, one) for one in versions]
    assert archive.stored() == {path: one.body for path, one in zip(paths, versions, strict=True)}


async def test_hostile_keys_stay_inside_and_apart(archive, version) -> None:
    keys = [
        b"../x",
        b"..",
        b".",
        b"/etc/passwd",
        b"a//b",
        b"a/",
        b"n" * 600,
        b"\xff\xfe",
        b"x\0y",
        b".hiss-tmp/lock",
        b"%f-a",
    ]
    versions = [version(key, b"of " + key) for key in keys]
    paths = [await publish(archive.target, one) for one in versions]
    assert archive.stored() == {path: one.body for path, one in zip(paths, versions, strict=True)}


async def test_an_overwrite_replaces_the_earlier_version(archive, version) -> None:
    first, second = version(b"scan/1", 10_000), version(b"scan/1", 20)
    path = await publish(archive.target, first)
    assert await publish(archive.target, second) == path
    assert archive.stored() == {path: second.body}


async def test_somebody_elses_file_is_neither_replaced_nor_removed(archive, version) -> None:
    archive.plant("mx-2026/notes.txt", b"mine")
    one = version(b"notes.txt")
    path = await publish(archive.target, one)
    assert archive.stored() == {"mx-2026/notes.txt": b"mine", path: one.body}
    assert not await archive.target.remove("mx-2026/notes.txt", None)
    archive.plant("mx-2026/log", b"mine")
    archive.plant("mx-2026/%f-log", b"mine too")
    with pytest.raises(NameBlocked, match="mx-2026/log and mx-2026/%f-log"):
        await publish(archive.target, version(b"log"))


async def test_remove_takes_only_the_version_it_names(archive, version) -> None:
    first, second = version(b"scan/1"), version(b"scan/1")
    path = await publish(archive.target, first)
    await publish(archive.target, second)
    assert not await archive.target.remove(path, first.record.object_id)
    assert archive.stored() == {path: second.body}
    assert await archive.target.remove(path, second.record.object_id)
    assert archive.stored() == {}
    assert await archive.target.find(path) is None
    assert not await archive.target.remove(path, None)


async def test_a_folder_that_lost_its_last_file_does_not_block_its_name(archive, version) -> None:
    below = await publish(archive.target, version(b"a/b/c"))
    await archive.target.remove(below, None)
    assert await publish(archive.target, version(b"a")) == "mx-2026/a"


@pytest.mark.parametrize("path", ["mx-2026/none", "none/none", "../outside", "mx-2026//x", ""])
async def test_reading_what_is_not_there_says_so(archive, path) -> None:
    with pytest.raises(CopyMissing):
        await joined(archive.target.read(path, 1 << 20))
    assert await archive.target.find(path) is None


async def test_a_new_version_under_another_name_takes_the_place_of_the_old_one(archive, version) -> None:
    below, first, second = version(b"a/b"), version(b"a"), version(b"a")
    path = await publish(archive.target, below)
    assert await publish(archive.target, first) == "mx-2026/%f-a"
    await archive.target.remove(path, None)
    assert await publish(archive.target, second) == "mx-2026/a"
    assert archive.stored() == {"mx-2026/a": second.body}


async def test_publishing_only_at_one_path_does_not_look_for_another(archive, version) -> None:
    await publish(archive.target, version(b"a/b"))
    staged = await archive.target.stage((one := version(b"a")).record, RIGHTS, one.chunks())
    with pytest.raises(NameBlocked):
        await archive.target.publish(staged, only_at="mx-2026/a")
    assert await archive.target.publish(staged, only_at="mx-2026/%f-a") == "mx-2026/%f-a"
    assert list(archive.target.paths("mx-2026", b"a")) == ["mx-2026/a", "mx-2026/%f-a"]


async def test_a_restart_clears_what_a_dead_drain_staged(archive, version) -> None:
    staged, published = version(b"staged"), version(b"published")
    path = await publish(archive.target, published)
    leave_unfinished = archive.dead_copy(b"half a copy")
    assert leave_unfinished in archive.unfinished()
    await archive.target.stage(staged.record, RIGHTS, staged.chunks())
    successor = archive.again()
    await successor.open()
    assert leave_unfinished not in archive.unfinished()
    assert len(archive.unfinished()) == 1
    assert archive.stored() == {path: published.body}
    await successor.close()


async def test_two_living_drains_leave_each_other_alone(archive, version) -> None:
    one = version(b"scan/1")
    staged = await archive.target.stage(one.record, RIGHTS, one.chunks())
    other = archive.again()
    await other.open()
    path = await archive.target.publish(staged)
    assert archive.stored() == {path: one.body}
    await other.close()


async def test_files_of_the_gateway_are_kept_replaced_and_dropped(archive, tmp_path: Path) -> None:
    source = tmp_path / "snapshot-7"
    source.write_bytes(b"catalogue" * 200_000)
    await archive.target.keep_file("snapshot-7", source)
    assert await archive.target.kept_files() == [("snapshot-7", source.stat().st_size)]
    source.write_bytes(b"newer")
    await archive.target.keep_file("snapshot-7", source)
    assert await archive.target.kept_files() == [("snapshot-7", 5)]
    await archive.target.drop_file("snapshot-7")
    await archive.target.drop_file("snapshot-7")
    assert await archive.target.kept_files() == []
