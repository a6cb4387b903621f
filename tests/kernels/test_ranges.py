"""Ranges against Python's own sets."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kernels.ranges import Ranges

OPERATIONS = st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 12)), max_size=30)


@given(OPERATIONS, st.integers(0, 50), st.integers(0, 12), st.integers(1, 20))
def test_ranges_behave_like_a_set(operations: list[tuple[bool, int, int]], first: int, count: int, limit: int) -> None:
    ranges, model = Ranges(), set[int]()
    for adds, start, size in operations:
        if adds:
            ranges.add(start, size)
            model |= set(range(start, start + size))
        else:
            ranges.remove(start, size)
            model -= set(range(start, start + size))
    items = list(ranges)
    assert [n for start, size in items for n in range(start, start + size)] == sorted(model)
    assert ranges.total == len(model)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(items)), "neighbours are merged"
    assert ranges.covers(first, count) == (set(range(first, first + count)) <= model)
    head = ranges.head(limit)
    assert head == ((items[0][0], min(limit, items[0][1])) if items else None)
