"""A node becomes part of a cluster, or finds itself in it again.

In: the engine, the data folder, how the node is called and reached. Out: ``Place``: its number and its epoch, which no other
process has. What always holds: a number is given once and never again; a folder that holds a node's own data, or another
cluster's, is refused with what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import random
import secrets

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingest import journal
from ingest.cluster import identity
from ingest.cluster.engine import TRIES, Engine
from ingest.cluster.errors import ClusterRefused, EngineAway
from ingest.cluster.identity import Identity
from ingest.cluster.log import Left
from ingest.cluster.members import LEASE_S, Load
from ingest.cluster.places import SLOTS_MAX
from ingest.cluster.schema import LOG_FORMAT, THE_ONE, checkpoint_parts, checkpoints, cluster, nodes
from ingest.crashpoints import crashpoint
from ingest.paths import NodePaths

NODES_MAX = 4096
"""Numbers of nodes, those that have left included."""


@dataclasses.dataclass(frozen=True, slots=True)
class Joining:
    """What a node says of itself."""

    name: str
    key_fingerprint: str
    """Of the node key, which all nodes of a cluster share: with another one, users' secrets could not be read here."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    cluster_id: str
    node: int
    epoch: int


async def join(engine: Engine, paths: NodePaths, joining: Joining) -> Place:
    """The caller holds the catalogue's lock. Raises ClusterRefused, EngineAway."""
    await engine.upgrade()
    known = identity.read(paths)
    if (known is None or not known.joined) and _alone(paths):
        raise ClusterRefused(
            f"{paths.root} holds the data of a node alone: take it into a new cluster with `hiss migrate` (again, where that was "
            "interrupted), or start on an empty folder"
        )
    known = identity.claimed(paths)
    crashpoint("join-claimed")
    place = await _first(engine, known, joining)
    crashpoint("join-placed")
    if not known.joined:
        identity.write(paths, Identity(known.claim, place.cluster_id, place.node))
    return place


async def _first(engine: Engine, known: Identity, joining: Joining) -> Place:
    """Of nodes that make the cluster at the same moment the engine lets one through; the others find it made."""
    for _ in range(TRIES):
        with contextlib.suppress(sa.exc.IntegrityError):
            return await engine.run(lambda connection: _placed(connection, known, joining))
        await asyncio.sleep(random.uniform(0.02, 0.1))
    raise EngineAway("too many nodes join at once")


def _alone(paths: NodePaths) -> bool:
    """Whether a folder without a number in a cluster has a catalogue: a member gets its own only when it has joined."""
    return paths.catalogue.exists() or journal.last_sequence(paths.journal) is not None


async def _placed(connection: AsyncConnection, known: Identity, joining: Joining) -> Place:
    cluster_id = await _cluster(connection, known, joining)
    found = (
        await connection.execute(sa.select(nodes.c.node, nodes.c.claim).where(nodes.c.name == joining.name))
    ).first()
    if known.joined:
        renamed = sa.update(nodes).where(nodes.c.node == known.node, nodes.c.claim == known.claim)
        if found is not None and found[0] != known.node:
            raise ClusterRefused(_name_taken(joining.name))
        values = {"name": joining.name, "epoch": nodes.c.epoch + 1, "heartbeat": sa.func.current_timestamp()}
        if (await connection.execute(renamed.values(values))).rowcount != 1:
            there = (await connection.execute(sa.select(nodes.c.claim).where(nodes.c.node == known.node))).first()
            if there is not None and there[0] == "":
                raise Left(joining.name)
            raise ClusterRefused(
                f"the cluster does not know this folder as node {known.node}: the engine's database was made anew, or restored "
                "from before this node joined"
            )
        node = known.node
    elif found is not None:
        if found[1] != known.claim:
            raise ClusterRefused(_name_taken(joining.name))
        node = found[0]  # it was given before a crash
    else:
        highest = (await connection.execute(sa.select(sa.func.max(nodes.c.node)))).scalar()
        node = 0 if highest is None else highest + 1
        if node >= NODES_MAX:
            raise ClusterRefused(f"a cluster has at most {NODES_MAX} nodes in its life")
        await connection.execute(sa.insert(nodes).values(node_row(node, joining.name, known.claim)))
    epoch = (await connection.execute(sa.select(nodes.c.epoch).where(nodes.c.node == node))).scalar_one()
    return Place(cluster_id, node, epoch)


def node_row(node: int, name: str, claim: str) -> dict[str, object]:
    """A new row of ``nodes``."""
    status = msgspec.json.encode(Load(log_format=LOG_FORMAT)).decode()
    return {
        "node": node,
        "name": name,
        "claim": claim,
        "epoch": 1,
        "heartbeat": sa.func.current_timestamp(),
        "applied": 0,
        "status": status,
    }


def _name_taken(name: str) -> str:
    return f"another node of the cluster is called {name}: give this one a node_name of its own"


async def _cluster(connection: AsyncConnection, known: Identity, joining: Joining) -> str:
    """The cluster's id; makes the cluster where there is none. Its row stays locked: one joins after the other."""
    asked = sa.select(cluster.c.cluster_id, cluster.c.key_fingerprint, cluster.c.log_format).where(
        cluster.c.id == THE_ONE
    )
    row = (await connection.execute(asked.with_for_update())).first()
    if row is None:
        if known.joined:
            raise ClusterRefused(
                f"this folder is node {known.node} of cluster {known.cluster_id}, and the engine's database is empty: "
                "is catalog right?"
            )
        made = secrets.token_hex(16)
        # Of a migration that was given up: not of this cluster's log.
        await connection.execute(sa.delete(checkpoints))
        await connection.execute(sa.delete(checkpoint_parts))
        await connection.execute(sa.insert(cluster).values(cluster_row(made, joining.key_fingerprint, 1, 0)))
        return made
    cluster_id, fingerprint, log_format = row
    if known.joined and known.cluster_id != cluster_id:
        raise ClusterRefused(
            f"this folder is of cluster {known.cluster_id}, the engine holds cluster {cluster_id}: is catalog right?"
        )
    if fingerprint != joining.key_fingerprint:
        raise ClusterRefused(
            "DATA/node.key is not the cluster's: copy the file from another node (mode 0600), so that users' secrets can be "
            "read here"
        )
    if log_format > LOG_FORMAT:
        raise ClusterRefused(
            f"the cluster writes entries of format {log_format}, this program knows {LOG_FORMAT} at most: it is older than "
            "the nodes that run; install their version here"
        )
    if log_format < LOG_FORMAT:
        await _raise_format(connection, log_format)
    return str(cluster_id)


async def _raise_format(connection: AsyncConnection, found: int) -> None:
    """From now on the log may hold entries that older programs cannot read: none of them may be running."""
    alive = nodes.c.heartbeat > sa.func.current_timestamp() - datetime.timedelta(seconds=LEASE_S)
    rows = (await connection.execute(sa.select(nodes.c.name, nodes.c.status).where(alive))).all()
    older = [name for name, status in rows if msgspec.json.decode(status, type=Load).log_format < LOG_FORMAT]
    if older:
        raise ClusterRefused(
            f"nodes {', '.join(sorted(older))} run a program that writes format {found} and could not read this one's entries "
            f"(format {LOG_FORMAT}): stop them, start this one, then start them with this version"
        )
    await connection.execute(sa.update(cluster).where(cluster.c.id == THE_ONE).values(log_format=LOG_FORMAT))


def cluster_row(cluster_id: str, fingerprint: str, next_sequence: int, chain: int) -> dict[str, object]:
    """The row of ``cluster``."""
    return {
        "id": THE_ONE,
        "cluster_id": cluster_id,
        "key_fingerprint": fingerprint,
        "log_format": LOG_FORMAT,
        "next_sequence": next_sequence,
        "chain": chain,
        "time_ns": 0,
    }


assert SLOTS_MAX * NODES_MAX < 1 << 31
