"""The catalogue process of a node of a cluster: joins, brings its index to the log's end, serves, and keeps saying that it lives.

In: how the node is called and reached, and the engine. Out: the same service on the same socket as a node alone has
(ingest/catalog/server.py). It waits for an engine that is away at the start. Ends with Fenced, Diverged or ClusterRefused when it
must not go on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from importlib.metadata import version

from ingest.catalog import wire
from ingest.catalog.batching import Batch, Limits
from ingest.catalog.generation import GenerationFile
from ingest.catalog.recovery import Recovered
from ingest.catalog.server import CatalogueServer, locked
from ingest.cluster import replica
from ingest.cluster.committer import END_WAIT_S, ClusterCommitter
from ingest.cluster.engine import Engine
from ingest.cluster.errors import EngineAway
from ingest.cluster.join import Joining, Place, join
from ingest.cluster.keeper import CHECKPOINT_ENTRIES, Keeper
from ingest.cluster.log import EngineLog, Left
from ingest.cluster.members import Load
from ingest.counters import Counters
from ingest.errors import CatalogUnavailable, IngestError
from ingest.origin import Origin
from ingest.paths import NodePaths
from ingest.records import Extent, NodeRecord, NodeState

logger = logging.getLogger(__name__)

_START_RETRY_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class NodeOptions:
    """``url`` is the engine's; ``s3``, ``control``, ``dav`` are where others reach this node."""

    url: str
    joining: Joining
    domain: str = ""
    s3: str = ""
    control: str = ""
    dav: str = ""
    checkpoint_entries: int = CHECKPOINT_ENTRIES


class OwnTicket:
    """A mutation of the catalogue process itself."""

    origin: Origin | None = None
    fenced = False

    def __init__(self, mutation: wire.Mutation) -> None:
        self.mutation = mutation
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def answer(self, result: bytes) -> None:
        if not self.done.done():
            self.done.set_result(result)

    def refuse(self, error: IngestError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def serve(
    paths: NodePaths,
    counters: Counters,
    options: NodeOptions,
    *,
    load: Callable[[], Load],
    ready: Callable[[], None],
    stop: asyncio.Event,
    limits: Limits | None = None,
) -> None:
    """Raises CatalogueBusy, ClusterRefused, Fenced, Diverged, sqlite3.Error, OSError."""
    async with locked(paths), Engine(options.url) as engine:
        while True:
            try:
                place = await join(engine, paths, options.joining)
                log = EngineLog(engine, place.cluster_id, place.node, place.epoch)
                recovered = await replica.recover(paths, engine, log)
                break
            except EngineAway as error:
                logger.error("cannot start yet: %s", error)
                if await _stopped(stop):
                    return
        logger.info("node %d of cluster %s, epoch %d", place.node, place.cluster_id, place.epoch)
        await _serve(paths, counters, options, engine, log, place, recovered, load, ready, stop, limits or Limits())


async def _serve(
    paths: NodePaths,
    counters: Counters,
    options: NodeOptions,
    engine: Engine,
    log: EngineLog,
    place: Place,
    recovered: Recovered,
    load: Callable[[], Load],
    ready: Callable[[], None],
    stop: asyncio.Event,
    limits: Limits,
) -> None:
    made: list[ClusterCommitter] = []

    def make(
        recovered: Recovered,
        generation: GenerationFile,
        committed: Callable[[Batch], None],
        freed: Callable[[tuple[Extent, ...]], None],
    ) -> ClusterCommitter:
        made.append(
            ClusterCommitter(
                paths,
                recovered.database,
                recovered.applied,
                counters,
                log=log,
                limits=limits,
                committed=committed,
                freed=freed,
                generation=generation,
            )
        )
        return made[0]

    async def before_ready(server: CatalogueServer) -> None:
        while not await server.committer.fresh():
            if await _stopped(stop):
                return
        record = self_record(place, options, server.reader.nodes())
        if record.state is NodeState.REMOVED:
            raise Left(record.name)
        # Nobody is told that this node serves before its own processes can read who they are.
        if await _said(server, record, stop):
            await _beat(keeper, stop)

    server = CatalogueServer(paths, node=place.node, recovered=recovered, make=make)
    keeper = Keeper(
        paths,
        engine,
        log,
        place,
        server.reader,
        applied=lambda: made[0].applied,
        load=load,
        checkpoint_entries=options.checkpoint_entries,
    )
    serving = asyncio.ensure_future(server.serve(ready, stop, before_ready))
    keeping = asyncio.ensure_future(keeper.run())
    try:
        await asyncio.wait((serving, keeping), return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
        await serving
    finally:
        keeper.stop()
        await asyncio.wait((keeping,), timeout=END_WAIT_S)
        for task in (keeping, serving):
            task.cancel()
        await asyncio.gather(keeping, serving, return_exceptions=True)
        paths.members.unlink(missing_ok=True)


def self_record(place: Place, options: NodeOptions, known: list[NodeRecord]) -> NodeRecord:
    """What the cluster is told of this node; what it is for stays as it was."""
    before = next((one for one in known if one.node == place.node), None)
    return NodeRecord(
        node=place.node,
        name=options.joining.name,
        epoch=place.epoch,
        state=NodeState.UP if before is None else before.state,
        domain=options.domain,
        s3=options.s3,
        control=options.control,
        dav=options.dav,
        version=version("hiss-gateway"),
    )


async def _said(server: CatalogueServer, record: NodeRecord, stop: asyncio.Event) -> bool:
    """Tell the cluster who this is, when its engine is there; False where the node stops before."""
    while True:
        ticket = OwnTicket(wire.PutNode(record))
        server.committer.submit(ticket)
        try:
            await ticket.done
        except CatalogUnavailable as error:
            logger.error("cannot start yet: %s", error)
            if await _stopped(stop):
                return False
        else:
            return True


async def _beat(keeper: Keeper, stop: asyncio.Event) -> None:
    while True:
        try:
            return await keeper.beat()
        except EngineAway:
            if await _stopped(stop):
                return


async def _stopped(stop: asyncio.Event) -> bool:
    """Wait a little; whether the node is to stop."""
    try:
        async with asyncio.timeout(_START_RETRY_S):
            await stop.wait()
    except TimeoutError:
        return False
    return True
