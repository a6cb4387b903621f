"""The other nodes, as a process of this one uses them: who they are, and a client that reaches them.

In: members.json and a ``PeerClient``. Out: addresses of members that are believed to be alive. Always holds: a node that has been
silent for a lease is not asked anything, so it costs nobody a timeout.
"""

from __future__ import annotations

import collections
import dataclasses
import time

from ingest.cluster.members import Member, Members
from ingest.cluster.peer import PeerClient
from ingest.errors import NodeAway

DOUBT_S = 15.0
"""Longer than a lease: whoever is still silent then is known to be."""


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Implements ``ingest.cluster.peer.PeerAddress``."""

    node: int
    name: str
    s3: str

    @classmethod
    def of(cls, member: Member) -> Address:
        return cls(member.node, member.record.name, member.record.s3)


class Neighbours:
    def __init__(self, members: Members, client: PeerClient) -> None:
        self.members = members
        self.client = client
        self.sending: collections.Counter[int] = collections.Counter()
        """Second copies that this process sends to each node now."""
        self._doubts: dict[int, float] = {}

    def doubt(self, node: int) -> None:
        """The node did not do what it should: others are asked before it for a while, so that not each of many requests waits
        for it in vain (it may be frozen, and its lease not over)."""
        self._doubts[node] = time.monotonic() + DOUBT_S

    def doubtful(self, node: int) -> bool:
        return self._doubts.get(node, 0.0) > time.monotonic()

    def living(self, node: int) -> Address:
        """Raises NodeAway."""
        member = self.members.get(node)
        if member is None:
            raise NodeAway(str(node), "is no member of this cluster")
        if not member.alive:
            raise NodeAway(member.record.name, f"has been silent for {member.silent_s:.0f} seconds")
        if not member.record.s3:
            raise NodeAway(member.record.name, "has no address yet")
        return Address.of(member)
