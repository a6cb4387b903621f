"""Eviction between watermarks: how much, what first, and never what is not safe."""

from __future__ import annotations

import pytest

from archive.evict import Evictor, buffered_bytes, bytes_to_free
from archive.pace import DrainLimits
from ingest.catalog import reader
from ingest.records import ObjectState

ARCHIVED, EVICTED = ObjectState.ARCHIVED, ObjectState.EVICTED
MIB = 1 << 20


@pytest.mark.parametrize(
    ("used", "capacity", "expected"),
    [(0, 100, 0), (80, 100, 0), (81, 100, 11), (100, 100, 30), (120, 100, 50), (5, 0, 0), (0, 0, 0)],
)
def test_nothing_up_to_the_high_mark_then_down_to_the_low_one(used, capacity, expected) -> None:
    assert bytes_to_free(used, capacity, 0.80, 0.70) == expected


@pytest.fixture
async def archived(node):
    records = [await node.put(b"scan/%d" % number, MIB) for number in range(10)]
    node.start()
    records = [await node.state(record, ARCHIVED) for record in records]
    await node.stop()
    return records


def evictor(node, used: int, capacity: int) -> Evictor:
    return Evictor(node.catalog, lambda: (used, capacity), node.counters, DrainLimits(evict_batch_objects=3))


async def states(node, records) -> list[ObjectState]:
    return [(await node.catalog.by_id(record.object_id)).state for record in records]


async def test_the_oldest_stored_go_first_and_no_more_than_needed(node, archived) -> None:
    each = buffered_bytes(archived[0])
    await evictor(node, 10 * each, 11 * each).step()
    assert await states(node, archived) == [EVICTED] * 3 + [ARCHIVED] * 7
    assert node.count("hiss_evicted_objects_total") == 3
    assert node.count("hiss_evicted_bytes_total") == 3 * MIB
    assert node.count("hiss_evict_stalled") == 0
    await evictor(node, 7 * each, 11 * each).step()
    assert await states(node, archived) == [EVICTED] * 3 + [ARCHIVED] * 7


async def test_more_than_one_batch_goes_when_needed(node, archived) -> None:
    each = buffered_bytes(archived[0])
    await evictor(node, 10 * each, 6 * each).step()
    assert await states(node, archived) == [EVICTED] * 6 + [ARCHIVED] * 4


async def test_what_is_not_archived_stays_and_the_operator_hears_of_it(node, caplog) -> None:
    record = await node.put(b"scan/1", MIB)
    await evictor(node, 10 * MIB, 10 * MIB).step()
    assert (await node.catalog.by_id(record.object_id)).state is ObjectState.BUFFERED
    assert node.count("hiss_evict_stalled") == 1
    assert "100 % full and nothing may be evicted" in caplog.text
    await evictor(node, 0, 10 * MIB).step()
    assert node.count("hiss_evict_stalled") == 0


async def test_the_bucket_may_keep_its_buffered_copies(node, archived) -> None:
    await node.catalog.set_bucket_tags("mx-2026", {"hiss.evict-after-s": "3600"})
    await evictor(node, 10 * MIB, 10 * MIB).step()
    assert await states(node, archived) == [ARCHIVED] * 10
    assert node.count("hiss_evict_stalled") == 1


async def test_what_came_back_for_a_reader_stays_a_moment_in_a_full_buffer(node, archived, monkeypatch) -> None:
    """Nothing else may go, and still: evicted before its reader has opened it, it would be recalled for ever."""
    record = archived[0]
    for other in archived:
        await node.catalog.evicted(other.object_id)
    node.start()
    await node.catalog.request_recall(record.object_id)
    await node.state(record, ARCHIVED)
    await node.stop()
    full = evictor(node, 10 * MIB, 10 * MIB)
    await full.step()
    assert await states(node, [record]) == [ARCHIVED]
    monkeypatch.setattr(reader, "RECALLED_STAYS_NS", 0)
    await full.step()
    assert await states(node, [record]) == [EVICTED]
