"""What nodes of a cluster know of each other, as a test sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ingest.cluster.members import Members
from ingest.paths import NodePaths
from tests.crash.node import until


class Named(Protocol):
    name: str
    paths: NodePaths


def know_each_other(nodes: Sequence[Named]) -> None:
    """Wait until each of these has heard that the others live: a heartbeat or two."""
    names = {node.name for node in nodes}

    def heard() -> bool:
        lists = [Members(node.paths).all() for node in nodes]
        return all(names <= {one.record.name for one in members if one.alive} for members in lists)

    until(heard, lambda: f"{sorted(names)} know each other")
