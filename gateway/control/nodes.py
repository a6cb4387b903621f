"""``/v1/nodes``: who is in the cluster, how they are, and what they are for: drained, taken back, removed.

In: DATA/run/members.json, the catalogue's records and counts, this node's counters. Out: rows with units in their names; a node
alone is one row. Changing a node is root's; whether it may leave is decided by the catalogue (ingest/catalog/decide.py), in the
order of the log. What always holds: a node that is forced out while it holds what exists nowhere else has that named in the log.
"""

from __future__ import annotations

import logging

from fastapi import HTTPException
from pydantic import BaseModel, Field

from gateway.control.auth import Caller
from gateway.metrics import Reader
from ingest.cluster.members import Load, Member, Members
from ingest.errors import NodeNeeded, NoSuchNode
from ingest.ports import Catalog
from ingest.records import HeldByNode, NodeCounts, NodeRecord, NodeState

log = logging.getLogger(__name__)

NAMED_MAX = 10_000
"""Lost versions that are named in the log one by one."""
SHOWN_MAX = 100


class NodeRow(BaseModel):
    """A member of the cluster."""

    node: int = Field(description="Its number, which is never given again.")
    name: str
    state: NodeState
    alive: bool = Field(description="Whether its lease runs.")
    silent_s: float = Field(description="How long the engine has not heard of it.")
    me: bool = Field(description="Whether this node answers.")
    epoch: int
    domain: str
    s3: str
    control: str
    dav: str
    version: str
    capacity_bytes: int
    buffered_bytes: int
    free_bytes: int
    receiving_bytes_per_s: int
    bodies: int = Field(description="Bodies that arrive now.")
    behind_entries: int = Field(description="Entries of the log that it did not know when it was last heard of.")
    undrained_objects: int
    undrained_bytes: int
    failing_objects: int = Field(description="Undrained ones whose last attempt failed.")


class NodeList(BaseModel):
    cluster_id: str = Field(description="Empty for a node alone.")
    engine_away_s: float
    head: int = Field(description="The last entry of the log.")
    nodes: list[NodeRow]


class Changed(BaseModel):
    """What became of a node, and what it still holds."""

    node: int
    name: str
    state: NodeState
    undrained_objects: int
    undrained_bytes: int
    only_objects: int = Field(description="Undrained versions of which no other node that is there has a copy.")
    only_bytes: int
    only_parts: int = Field(description="Parts of open uploads, likewise.")
    lost: list[str] = Field(description="The first of the versions that were given up with it: BUCKET/KEY.")


class NodeSource:
    def __init__(
        self, catalog: Catalog, members: Members, reader: Reader, *, name: str, capacity_bytes: int, version: str
    ) -> None:
        """``name``, ``capacity_bytes``, ``version``: this node's, for where it is alone."""
        self._catalog = catalog
        self._members = members
        self._reader = reader
        self._name = name
        self._capacity_bytes = capacity_bytes
        self._version = version

    async def listing(self) -> NodeList:
        known = self._members.look()
        counts = {one.node: one for one in await self._catalog.node_counts()}
        away_s = round(self._catalog.engine_away_s, 3)
        if not known.members:
            rows = [self._alone(counts.get(0, NodeCounts(0, 0, 0, 0)))]
            return NodeList(cluster_id="", engine_away_s=away_s, head=0, nodes=rows)
        # What a member is for is in the log, and known here before the next heartbeat.
        states = {record.node: record for record in await self._catalog.nodes()}
        rows = [
            _row(
                one,
                states.get(one.node, one.record),
                counts.get(one.node, NodeCounts(one.node, 0, 0, 0)),
                me=one.node == known.me,
                head=known.head,
            )
            for one in known.members
            if states.get(one.node, one.record).state is not NodeState.REMOVED
        ]
        return NodeList(cluster_id=known.cluster_id, engine_away_s=away_s, head=known.head, nodes=rows)

    async def held(self, asked: str) -> Changed:
        """What a node holds. Raises 404."""
        record = await self._found(asked)
        return _changed(record, await self._catalog.held_by(record.node, self._members.away() - {record.node}), [])

    async def set_state(self, caller: Caller, asked: str, state: NodeState, *, force: bool = False) -> Changed:
        """Raises 403, 404, 409."""
        if not caller.user.root:
            raise HTTPException(403, "only root may change what a node is for")
        record = await self._found(asked)
        member = self._members.get(record.node)
        lost: list[tuple[str, bytes]] = []
        away = self._members.away() - {record.node}
        held = await self._catalog.held_by(record.node, away)
        if state is NodeState.REMOVED:
            others = [one for one in self._members.all() if one.node != record.node and one.alive]
            if not others:
                raise HTTPException(409, f"no other node of the cluster is there: {record.name} cannot be removed")
            if force:
                _, named = await self._catalog.stranded(away | {record.node}, NAMED_MAX, record.node)
                lost = list(named)
        try:
            record = await self._catalog.set_node_state(record.node, state, force=force)
        except NoSuchNode as error:
            raise HTTPException(404, str(error)) from None
        except NodeNeeded as error:
            raise HTTPException(409, str(error)) from None
        log.warning("node %d (%s) is %s now, by %s", record.node, record.name, state.value, caller.user.user_id)
        for bucket, key in lost:
            log.error("lost with node %s: %s/%s", record.name, bucket, key.decode("utf-8", "replace"))
        if held.only_objects > len(lost) and force:
            log.error("lost with node %s: %d more objects", record.name, held.only_objects - len(lost))
        if member is not None and not member.alive:
            log.warning("node %s was silent for %.0f s", record.name, member.silent_s)
        return _changed(record, held, lost)

    async def _found(self, asked: str) -> NodeRecord:
        """By number or name; the living before those that left and had the same name."""
        if not self._members.look().members:
            raise HTTPException(409, "this node is alone: there is no cluster it could leave")
        found = [one for one in await self._catalog.nodes() if asked in (str(one.node), one.name)]
        found.sort(key=lambda one: (one.state is NodeState.REMOVED, asked != str(one.node)))
        if not found:
            raise HTTPException(404, f"the cluster has no node {asked}; `hiss node list` shows all")
        return found[0]

    def _alone(self, counts: NodeCounts) -> NodeRow:
        load = Load(
            capacity_bytes=self._capacity_bytes,
            buffered_bytes=int(self._reader.value("hiss_buffer_used_bytes")),
            held_bytes=int(self._reader.value("hiss_reserved_held_bytes")),
            bodies=int(self._reader.value("hiss_ingest_active_streams")),
        )
        record = NodeRecord(node=0, name=self._name, epoch=0, version=self._version)
        return _row(Member(record, 0.0, 0, load), record, counts, me=True, head=0)


def _row(member: Member, record: NodeRecord, counts: NodeCounts, *, me: bool, head: int) -> NodeRow:
    return NodeRow(
        node=record.node,
        name=record.name,
        state=record.state,
        alive=member.alive,
        silent_s=round(member.silent_s, 3),
        me=me,
        epoch=record.epoch,
        domain=record.domain,
        s3=record.s3,
        control=record.control,
        dav=record.dav,
        version=record.version,
        capacity_bytes=member.load.capacity_bytes,
        buffered_bytes=member.load.buffered_bytes,
        free_bytes=member.free_bytes,
        receiving_bytes_per_s=member.load.receiving_bytes_per_s,
        bodies=member.load.bodies,
        behind_entries=max(0, head - member.applied),
        undrained_objects=counts.undrained_objects,
        undrained_bytes=counts.undrained_bytes,
        failing_objects=counts.failing_objects,
    )


def _changed(record: NodeRecord, held: HeldByNode, lost: list[tuple[str, bytes]]) -> Changed:
    return Changed(
        node=record.node,
        name=record.name,
        state=record.state,
        undrained_objects=held.undrained_objects,
        undrained_bytes=held.undrained_bytes,
        only_objects=held.only_objects,
        only_bytes=held.only_bytes,
        only_parts=held.only_parts,
        lost=[f"{bucket}/{key.decode('utf-8', 'replace')}" for bucket, key in lost[:SHOWN_MAX]],
    )
