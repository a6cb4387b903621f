"""A node leaves with its second copies: those whose bodies are elsewhere get new ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.cluster.members import Members
from tests.cluster.loopback import LoopbackNode, Nodes, until

MIB = 1 << 20
_MIRRORED = (
    b"<Tagging><TagSet><Tag><Key>hiss.durability</Key><Value>mirror</Value></Tag>"
    b"<Tag><Key>hiss.drain-after-s</Key><Value>86400</Value></Tag></TagSet></Tagging>"
)


@pytest.fixture
def nodes(tmp_path: Path, database: str) -> Iterator[Nodes]:
    made = Nodes(tmp_path, database)
    try:
        yield made
    finally:
        made.end()


def mirrors(node: LoopbackNode) -> dict[bytes, set[int]]:
    """Key -> the nodes that have its second copy."""
    return {record.key: {extent.node for extent in record.mirror} for record in node.records()}


def alive(seen_by: LoopbackNode, number: int) -> bool:
    member = Members(seen_by.paths).get(number)
    return member is not None and member.alive


def test_what_a_removed_node_mirrored_is_mirrored_anew(nodes: Nodes) -> None:
    a, b, c = nodes.start("a", "b", "c")
    assert a.ask("PUT", "/scan", "", b"").status == 200
    assert a.ask("PUT", "/scan", "tagging=", _MIRRORED).ok
    numbers = {row["name"]: row["node"] for row in a.hiss("node", "list")["nodes"]}
    bodies: dict[bytes, bytes] = {}

    def both_mirror() -> bool:
        key, body = b"%d" % len(bodies), os.urandom(len(bodies) * MIB + 1)
        assert a.ask("PUT", f"/scan/{key.decode()}", "", body).status == 200
        bodies[key] = body
        return {numbers["b"], numbers["c"]} <= set().union(*mirrors(a).values())

    until(both_mirror, "both others mirror something")
    c.end()
    until(lambda: not alive(a, numbers["c"]), "the lease of c is over")
    a.hiss("node", "remove", "c", "--force")
    until(lambda: set().union(*mirrors(a).values()) == {numbers["b"]}, "b mirrors all")
    for node in (a, b):
        for key, body in bodies.items():
            assert node.ask("GET", f"/scan/{key.decode()}").body == body
