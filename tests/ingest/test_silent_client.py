"""A client of the engine that falls silent in its turn, at any step of it: the others wait for a moment, and go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from ingest.cluster.engine import Engine
from ingest.cluster.join import Joining, Place, join
from ingest.cluster.log import EngineLog
from ingest.paths import NodePaths

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


def log_of(engine: Engine, place: Place) -> EngineLog:
    return EngineLog(engine, place.cluster_id, place.node, place.epoch)


async def commit(log: EngineLog, payload: bytes) -> None:
    """What a committer does with its turn."""
    async with log.turn() as turn:
        await turn.since(turn.head.next_sequence)
        await turn.gone(10.0)
        await turn.append(1, payload, turn.head.now_ns)


async def test_whoever_falls_silent_in_its_turn_holds_up_the_others_for_a_moment_only(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.cluster.engine.IDLE_IN_TRANSACTION_S", 0.2)
    async with Engine(database) as whole:
        ours = log_of(whole, await joined(whole, tmp_path, "a"))
        theirs = await joined(whole, tmp_path, "b")
        for steps in range(1, 100):
            async with relayed(database, steps) as (relay, url), Engine(url) as engine:
                turn = asyncio.create_task(commit(log_of(engine, theirs), bytes(3 * PIECE)))
                silent = asyncio.create_task(relay.silent.wait())
                await asyncio.wait((turn, silent), return_when=asyncio.FIRST_COMPLETED)
                if turn.done():
                    await turn
                    break
                # EngineAway if the head is not free in time.
                await commit(ours, b"ours")
                turn.cancel()
            await asyncio.gather(turn, return_exceptions=True)
        else:
            pytest.fail("a turn has no end")
        silent.cancel()
        assert steps > 12, "it was silent at every step of a turn on a new connection"
