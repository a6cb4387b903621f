"""What would be lost with a node: undrained versions and parts of which no other node has a copy.

In: the index, and the nodes that do not count (one that is to leave, and those that are gone). Out: counts, or the versions by
name. What always holds: a version with a copy in the archive, or with one whose bytes all lie on other nodes, is not among them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from ingest.catalog import rows, statements
from ingest.records import Extent, HeldByNode, NodeCounts


def stranded(database: sqlite3.Connection, away: frozenset[int]) -> Iterator[tuple[str, bytes, int, frozenset[int]]]:
    """(bucket, key, length, nodes of its bytes) of each undrained version without a copy that lies wholly on other nodes."""
    if not away:
        return
    for bucket, key, length, extents, mirrored, detail in database.execute(statements.QUEUE_PLACES):
        nodes = _nodes(rows.decode_extents(extents))
        if not nodes & away:
            continue
        if mirrored is not None:
            mirror = rows.decode_detail(detail).mirror
            if mirror and not _nodes(mirror) & away:
                continue
        yield bucket, key, length, nodes


def held_by(database: sqlite3.Connection, node: int, away: frozenset[int]) -> HeldByNode:
    """What one node holds that is not in the archive. ``away``: other nodes that do not count as holders of a copy."""
    without = away | {node}
    objects = size_bytes = parts = 0
    for _, _, length, nodes in stranded(database, without):
        if node in nodes:
            objects += 1
            size_bytes += length
    for (blob,) in database.execute(statements.ALL_PARTS):
        part = rows.decode_part(blob)
        if node in _nodes(part.extents) and not (part.mirror and not _nodes(part.mirror) & without):
            parts += 1
    counts = {one.node: one for one in node_counts(database)}.get(node, NodeCounts(node, 0, 0, 0))
    return HeldByNode(node, counts.undrained_objects, counts.undrained_bytes, objects, size_bytes, parts)


def node_counts(database: sqlite3.Connection) -> list[NodeCounts]:
    """For each node that has something to drain."""
    return [NodeCounts(*row) for row in database.execute(statements.QUEUE_BY_NODE).fetchall()]


def _nodes(extents: tuple[Extent, ...]) -> frozenset[int]:
    return frozenset(extent.node for extent in extents)
