"""Who of a cluster works on what a version owes: a number for each slot of each node.

The index names the owner of a reduction or a filter by one integer. A node alone is node 0, whose places are its slots: an
index of one node stays as it is when it becomes a cluster's.
"""

from __future__ import annotations

from collections.abc import Sequence

from ingest.records import Extent

SLOTS_MAX = 64
"""Slots of one node (workers and the drain process), and what the numbers of two nodes are apart."""


def place(node: int, slot: int) -> int:
    return node * SLOTS_MAX + slot


def of_extents(extents: Sequence[Extent]) -> int:
    """The slot that received a version's first bytes; place 0 for a version without bytes."""
    return place(extents[0].node, extents[0].slot) if extents else 0


def node_of(extents: Sequence[Extent]) -> int:
    return extents[0].node if extents else 0
