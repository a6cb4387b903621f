"""Who there is in the cluster, for every process of a node: DATA/run/members.json, which the catalogue process keeps.

In: member records from the index, heartbeats and loads from the engine. Out: ``Members``, which reads the file anew when it has
changed. What always holds: a node alone has no members; the file is replaced as a whole; what it says is at most a few seconds
old while the engine answers, and as it last was while it does not (``as_of_s`` says when that was).
"""

from __future__ import annotations

import os

import msgspec

from ingest.paths import NodePaths
from ingest.records import NodeRecord, NodeState

LEASE_S = 10.0
"""A node that has not been heard of for so long has gone: what it mirrored elsewhere is drained there."""
HEARTBEAT_S = 1.0


class Load(msgspec.Struct, frozen=True):
    """How a node is, as it says of itself with each heartbeat."""

    capacity_bytes: int = 0
    """What its segments may hold."""
    buffered_bytes: int = 0
    held_bytes: int = 0
    """Room that is reserved and not used yet."""
    receiving_bytes_per_s: int = 0
    bodies: int = 0
    """Bodies that arrive now."""
    log_format: int = 0
    ingest_bytes_per_s: int = 0
    """What it takes in, at most; 0: it does not say."""
    kernels: bool = True
    """It runs kernels."""


class Member(msgspec.Struct, frozen=True):
    record: NodeRecord
    silent_s: float
    """How long nothing has been heard of it, by the engine's clock."""
    applied: int
    """The last entry of the log that it knows."""
    load: Load = Load()

    @property
    def node(self) -> int:
        return self.record.node

    @property
    def alive(self) -> bool:
        return self.silent_s < LEASE_S

    @property
    def takes_bodies(self) -> bool:
        return self.alive and self.record.state is NodeState.UP

    @property
    def free_bytes(self) -> int:
        """Room for bodies that nothing is reserved for."""
        return max(0, self.load.capacity_bytes - self.load.buffered_bytes - self.load.held_bytes)


class Membership(msgspec.Struct, frozen=True):
    """The file's content."""

    me: int
    cluster_id: str
    as_of_s: float
    """CLOCK_MONOTONIC seconds of this machine when the engine said so."""
    members: tuple[Member, ...] = ()
    head: int = 0
    """The last entry of the log."""


_NOBODY = Membership(me=-1, cluster_id="", as_of_s=0.0)
_decode = msgspec.json.Decoder(Membership).decode


def write(paths: NodePaths, membership: Membership) -> None:
    made = paths.members.with_name(".members.json")
    made.write_bytes(msgspec.json.encode(membership))
    made.replace(paths.members)


class Members:
    """As of now, at the price of a stat."""

    def __init__(self, paths: NodePaths) -> None:
        self._path = os.fspath(paths.members)
        self._stamp: tuple[int, int] | None = None
        self._known = _NOBODY

    def look(self) -> Membership:
        """Nobody for a node alone."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            self._stamp, self._known = None, _NOBODY
            return self._known
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self._stamp:
            with open(self._path, "rb") as file:
                self._known = _decode(file.read())
            self._stamp = stamp
        return self._known

    def all(self) -> tuple[Member, ...]:
        """Those that have not left, by number."""
        return tuple(one for one in self.look().members if one.record.state is not NodeState.REMOVED)

    def get(self, node: int) -> Member | None:
        return next((one for one in self.look().members if one.node == node), None)

    def away(self) -> frozenset[int]:
        """Nodes whose bytes cannot be had: those that are gone, and those that have left."""
        known = self.look()
        gone = (one for one in known.members if one.record.state is NodeState.REMOVED or not one.alive)
        return frozenset(one.node for one in gone) - {known.me}

    @property
    def leaving(self) -> bool:
        """Whether this node is being emptied: it takes no bodies, and keeps nothing that is in the archive."""
        me = self.me
        return me is not None and me.record.state is not NodeState.UP

    @property
    def me(self) -> Member | None:
        known = self.look()
        return next((one for one in known.members if one.node == known.me), None)

    def others(self) -> tuple[Member, ...]:
        me = self.look().me
        return tuple(one for one in self.all() if one.node != me)

    def reducing(self) -> tuple[int, ...]:
        """Who works on runs now: those that live and run kernels; one that is draining only where there is no other."""
        living = [one for one in self.all() if one.alive and one.load.kernels]
        up = [one.node for one in living if one.record.state is NodeState.UP]
        return tuple(sorted(up or [one.node for one in living]))

    def gone(self) -> tuple[int, ...]:
        """Those whose lease has ended, and those that have left."""
        return tuple(one.node for one in self.look().members if one.record.state is NodeState.REMOVED or not one.alive)

    def leads(self) -> bool:
        """Whether what one node does for all (rules, webhooks, deleted copies) is for this one: the first that lives."""
        known = self.look()
        if not known.members:
            return True
        living = [one.node for one in self.all() if one.alive]
        return not living or min(living) == known.me
