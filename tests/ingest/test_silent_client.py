"""A client of the engine that falls silent in its turn, at any step of it: the others wait for a moment, and go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from bench.engine import Engine as Server
from ingest.catalog import rows
from ingest.catalog.reader import Reader
from ingest.cluster.engine import Engine
from ingest.cluster.errors import EngineAway
from ingest.cluster.join import Joining, Place, join
from ingest.cluster.keeper import Keeper
from ingest.cluster.log import EngineLog
from ingest.cluster.members import Load
from ingest.cluster.schema import cluster, nodes
from ingest.paths import NodePaths
from tests.ingest.test_cluster import running

PIECE = 64 << 10


class Relay:
    """Between a client and the engine: what the client sends arrives until it has been read ``limit`` times, and then no more.
    To both of them the connection is whole, as that of a process that was stopped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.read = 0
        self.silent = asyncio.Event()

    async def forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, limited: bool) -> None:
        while piece := await source.read(PIECE):
            if limited:
                self.read += 1
                if self.read > self.limit:
                    self.silent.set()
                    return
            target.write(piece)
            await target.drain()
        target.close()


@contextlib.asynccontextmanager
async def relayed(url: str, limit: int) -> AsyncIterator[tuple[Relay, str]]:
    """A relay for one connection, and the engine's address by way of it."""
    relay = Relay(limit)
    there = sa.make_url(url)
    ways: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection(there.host, there.port)
        ways.extend((writer, back_writer))
        with contextlib.suppress(OSError):
            await asyncio.gather(
                relay.forward(reader, back_writer, limited=True), relay.forward(back_reader, writer, limited=False)
            )

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        try:
            yield relay, there.set(port=port).render_as_string(hide_password=False)
        finally:
            for way in ways:
                way.close()


async def joined(engine: Engine, folder: Path, name: str) -> Place:
    (folder / name).mkdir()
    return await join(engine, NodePaths(folder / name), Joining(name, "key"))


async def commit(engine: Engine, place: Place, payload: bytes) -> None:
    """What a committer does with its turn."""
    async with EngineLog(engine, place.cluster_id, place.node, place.epoch).turn() as turn:
        await turn.since(turn.head.next_sequence)
        await turn.gone(10.0)
        await turn.append(1, payload, turn.head.now_ns)


class Silent:
    """Its work is done on connections that say nothing any more, each after one step more than the last."""

    def __init__(self, database: str) -> None:
        self._database = database
        self.steps = 0

    @contextlib.asynccontextmanager
    async def working(self, work: Callable[[Engine], Awaitable[None]]) -> AsyncIterator[bool]:
        """Whether it fell silent; else it is done."""
        self.steps += 1
        assert self.steps < 100, "what it does has no end"
        async with relayed(self._database, self.steps) as (relay, url), impatient(url) as engine:
            doing = asyncio.ensure_future(work(engine))
            silent = asyncio.ensure_future(relay.silent.wait())
            await asyncio.wait((doing, silent), return_when=asyncio.FIRST_COMPLETED)
            try:
                yield not doing.done() or doing.exception() is not None
            finally:
                silent.cancel()
                doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)


def impatient(url: str) -> Engine:
    """A client that may be silent for half a second only. On a busy machine one that is not may be cut off for it, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ingest.cluster.engine.IDLE_IN_TRANSACTION_S", 0.5)
        return Engine(url)


async def test_whoever_falls_silent_in_its_turn_holds_up_the_others_for_a_moment_only(
    database: str, tmp_path: Path
) -> None:
    async with Engine(database) as whole:
        ours, theirs = [await joined(whole, tmp_path, name) for name in "ab"]
        silent, there = Silent(database), True
        while there:
            async with silent.working(lambda engine: commit(engine, theirs, bytes(3 * PIECE))) as there:
                await commit(whole, ours, b"EngineAway if the head is not free in time")
    assert silent.steps > 12, "it was silent at every step of a turn on a new connection"


async def test_whoever_falls_silent_in_its_heartbeat_can_be_fenced(database: str, tmp_path: Path) -> None:
    paths = NodePaths(tmp_path)
    async with running(database, tmp_path, "b"):
        pass
    async with Engine(database) as whole:
        theirs = await join(whole, paths, Joining("b", "key"))
        with contextlib.closing(Reader(rows.connect(paths.catalogue, read_only=True), 0)) as reader:

            async def beat(engine: Engine) -> None:
                log = EngineLog(engine, theirs.cluster_id, theirs.node, theirs.epoch)
                await Keeper(paths, engine, log, theirs, reader, applied=lambda: 0, load=Load).beat()

            silent, there = Silent(database), True
            while there:
                async with silent.working(beat) as there, whole.transaction() as connection:
                    await connection.execute(sa.update(nodes).where(nodes.c.node == theirs.node).values(applied=1))
    assert silent.steps > 8, "it was silent at every step of a heartbeat on a new connection"


async def test_a_turn_that_was_given_up_waits_no_longer_in_the_engine(
    database: str, postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an hour's attempts would be all the connections that the engine has."""
    async with contextlib.AsyncExitStack() as stack:
        whole = await stack.enter_async_context(Engine(database))
        place = await joined(whole, tmp_path, "a")
        for name in ("ENGINE_TIMEOUT_S", "IDLE_IN_TRANSACTION_S"):
            monkeypatch.setattr(f"ingest.cluster.engine.{name}", 250)
        patient = await stack.enter_async_context(Engine(database))
        held = await stack.enter_async_context(patient.transaction())
        await held.execute(sa.select(cluster.c.id).with_for_update())
        monkeypatch.setattr("ingest.cluster.engine.ENGINE_TIMEOUT_S", 0.2)
        for _ in range(6):
            with pytest.raises(EngineAway):
                await commit(whole, place, b"")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        async with asyncio.timeout(60):
            while postgres.sql(waiting, sa.make_url(database).database) != [["0"]]:  # noqa: ASYNC110  # it is elsewhere
                await asyncio.sleep(0.1)
        assert await held.scalar(sa.select(sa.literal(1))) == 1, "what they waited for is still held"
