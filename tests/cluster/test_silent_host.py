"""A host that goes silent in a transaction: the engine gives back what it held before the others have waited too long."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
import sqlalchemy as sa

from bench.engine import Engine as Server
from bench.engine import serving
from bench.netns import Host, Network
from ingest.cluster.engine import Engine

_table = sa.Table("held", sa.MetaData(), sa.Column("id", sa.Integer))


@pytest.mark.parametrize("doing", ["prepares", "receives"])
def test_what_a_host_that_is_cut_off_held_is_free_again(network: Network, postgres_programs: Path, doing: str) -> None:
    """While it prepares a statement, or receives an answer that no buffer holds: there no time of the engine's own runs."""
    there = network.host("engine")
    with serving(Server(there.address, 5432, there.launcher, bin_folder=postgres_programs)) as server:
        asyncio.run(_cut_off(network.host("lost"), network.host("other"), server.fresh(), doing))


async def _cut_off(lost: Host, other: Host, url: str, doing: str) -> None:
    async with Engine(url) as theirs, Engine(url) as ours:
        with other.entered():
            async with ours.transaction() as connection:
                await connection.run_sync(_table.create)
                await connection.execute(sa.insert(_table).values(id=1))
        with lost.entered():
            held = theirs.transaction()
            connection = await held.__aenter__()
        await connection.execute(sa.select(_table).with_for_update())
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        if doing == "prepares":
            await driver.prepare("SELECT 1")
            lost.cut()
            answer = None
        else:
            answer = asyncio.create_task(driver.fetch("SELECT repeat('x', 1 << 16) FROM generate_series(1, 1 << 12)"))
            await asyncio.sleep(0.05)
            lost.cut()
            assert not answer.done()
        try:
            async with ours.transaction() as connection:
                # EngineAway if it is not free in time.
                assert (await connection.execute(sa.select(_table).with_for_update())).scalar_one() == 1
        finally:
            lost.mend()
            driver.terminate()
            with contextlib.suppress(Exception):
                await held.__aexit__(None, None, None)
            if answer is not None:
                await asyncio.gather(answer, return_exceptions=True)
