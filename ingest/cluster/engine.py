"""The connection to a cluster's engine: transactions that are tried again, errors in our own words, the schema.

In: ``postgresql://…`` of the setting ``catalog``. Out: ``Engine``. What always holds: every statement is built with SQLAlchemy
Core; nothing waits longer than ENGINE_TIMEOUT_S; a transaction that the engine takes back for another's sake (SQLSTATE
40001, 40P01) is tried again; trouble with the engine is ``EngineAway``; a COMMIT is never cancelled (``_Client``).

A node that falls silent in a transaction must not hold up the others. The engine ends the session of one that is frozen after
IDLE_IN_TRANSACTION_S, and of one whose host is gone or cut off after SILENT_HOST_S. The first of the two has a hole: its time
runs only where the engine has been told that a statement is complete (a Sync message), and the driver prepares what is new to a
connection without one. So what is done while others wait for it has been rehearsed on the connection before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ingest.cluster.errors import ClusterRefused, EngineAway
from ingest.cluster.schema import SCHEMA_HEAD

logger = logging.getLogger(__name__)

T = TypeVar("T")
Rehearsal = Callable[[AsyncConnection], Awaitable[None]]

ENGINE_TIMEOUT_S = 8.0
"""Of a statement and of a transaction. More than IDLE_IN_TRANSACTION_S, for which a node that froze while it held the head keeps
all others waiting, and than what a piece of the log or a slow standby takes; less than a node's lease. That the engine is silent
is noticed sooner (SILENT_S, ingest/cluster/committer.py)."""
CONNECT_TIMEOUT_S = 5.0
IDLE_IN_TRANSACTION_S = 3
SILENT_HOST_S = 4
"""The engine drops a connection whose other end has confirmed nothing for so long: less than a turn waits."""
CONNECTIONS = 5
"""A turn, the follower, the listener, a heartbeat, a checkpoint."""
TRIES = 8
"""Of one transaction that the engine takes back."""
_TAKEN_BACK = ("40001", "40P01")
_PREFIXES = ("postgresql://", "postgres://", "postgresql+asyncpg://")


def driver_url(url: str) -> sa.URL:
    """Raises ClusterRefused for what is no address of a PostgreSQL-compatible engine."""
    if not url.startswith(_PREFIXES):
        raise ClusterRefused("catalog must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise ClusterRefused(f"catalog is no address of an engine: {error}") from None
    return parsed.set(drivername="postgresql+asyncpg")


class Engine:
    """Use as an async context manager."""

    def __init__(self, url: str) -> None:
        address = driver_url(url)
        self.shown = address.render_as_string(hide_password=True)
        self._engine: AsyncEngine = create_async_engine(
            address,
            isolation_level="READ COMMITTED",
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=ENGINE_TIMEOUT_S,
            connect_args={
                "connection_class": _Client,
                "timeout": CONNECT_TIMEOUT_S,
                "command_timeout": ENGINE_TIMEOUT_S,
                "server_settings": {
                    "application_name": "hiss",
                    "idle_in_transaction_session_timeout": str(int(IDLE_IN_TRANSACTION_S * 1000)),
                },
            },
        )
        sa.event.listen(self._engine.sync_engine, "connect", _watch)
        self._single = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def transaction(self, rehearsal: Rehearsal | None = None) -> AsyncIterator[AsyncConnection]:
        """One transaction, not tried again: what is in flight when EngineAway is raised may have been committed.

        ``rehearsal``: executes, to no effect, every statement of the transaction that comes after a lock others wait for. It is
        run once on each connection, in a transaction of its own."""
        with translated():
            async with asyncio.timeout(ENGINE_TIMEOUT_S), self._engine.connect() as connection:
                if rehearsal is not None and rehearsal not in connection.info:
                    async with connection.begin():
                        await rehearsal(connection)
                    connection.info[rehearsal] = True
                async with connection.begin():
                    yield connection

    @contextlib.asynccontextmanager
    async def single(self) -> AsyncIterator[AsyncConnection]:
        """For one statement, which is a transaction of its own: a third of the round trips."""
        with translated():
            async with asyncio.timeout(ENGINE_TIMEOUT_S), self._single.connect() as connection:
                yield connection

    async def run(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """``work`` in a transaction, which is tried again when the engine takes it back. Raises EngineAway."""
        for attempt in range(TRIES):
            try:
                async with self.transaction() as connection:
                    return await work(connection)
            except TakenBack:
                await give_way(attempt)
        raise EngineAway(f"{self.shown} took a transaction back {TRIES} times")

    async def upgrade(self) -> None:
        """Bring the engine to this program's schema, once; nodes that start meanwhile wait. Raises ClusterRefused, EngineAway."""
        async with self.transaction() as connection:
            if await connection.run_sync(_revision) == SCHEMA_HEAD:
                return
        for attempt in range(TRIES):
            try:
                async with self.transaction() as connection:
                    await connection.run_sync(lambda sync: _gate.create(sync, checkfirst=True))
                with contextlib.suppress(sa.exc.IntegrityError):
                    async with self.transaction() as connection:
                        await connection.execute(sa.insert(_gate).values(id=1))
                async with self.transaction() as connection:
                    # Its row's lock is whose turn it is.
                    await connection.execute(sa.update(_gate).values(id=1))
                    await connection.run_sync(_upgrade)
            except (EngineAway, sa.exc.IntegrityError) as error:
                # Two that create the same table at once: one of them is told so, in words that differ by engine.
                if attempt == TRIES - 1:
                    raise EngineAway(f"the schema could not be made: {error}") from error
                await asyncio.sleep(random.uniform(0.05, 0.3))
            else:
                return


class _Client(asyncpg.Connection):  # type: ignore[misc]  # the driver has no types
    """A statement that is given up, because its time is over or its task was cancelled, loses its connection. The driver would
    ask the engine to cancel it: a COMMIT that waits for its synchronous standby is then done without one, and what we find in
    the log, and answer for, is gone after a failover."""

    def _cancel_current_command(self, *_: object) -> None:
        asyncio.get_running_loop().call_soon(self.terminate)


def _watch(connection: Any, _: object) -> None:
    """Have the engine look whether the other end of a new connection is there, also while it waits for a lock. Not with the
    connection's first message, where an engine that does not know one of these settings would refuse it."""
    settings = {
        "client_connection_check_interval": 1000,
        "tcp_user_timeout": SILENT_HOST_S * 1000,
        "tcp_keepalives_idle": 2,
        "tcp_keepalives_interval": 1,
        "tcp_keepalives_count": SILENT_HOST_S - 2,
    }

    async def ask(driver: asyncpg.Connection) -> None:
        for name, value in settings.items():
            try:
                await driver.execute(f"SET {name} = {value}")
            except asyncpg.InterfaceError as error:
                raise ConnectionError(str(error)) from error
            except asyncpg.PostgresError as error:
                logger.warning(
                    "the engine does not notice clients that are gone (%s): one may hold up the others", error
                )

    connection.run_async(ask)


_gate = sa.Table("hiss_gate", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True, autoincrement=False))


def _upgrade(connection: sa.Connection) -> None:
    found = _revision(connection)
    if found == SCHEMA_HEAD:
        return
    if found is not None and found > SCHEMA_HEAD:
        raise ClusterRefused(
            f"the cluster's schema is {found}, this program knows {SCHEMA_HEAD} at most: it is older than the nodes that run; "
            "install their version here"
        )
    import alembic.command
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("hiss_schema"):
        return None
    row = connection.execute(sa.text("SELECT version_num FROM hiss_schema")).first()
    return None if row is None else str(row[0])


class TakenBack(EngineAway):
    """The engine took the transaction back for another's sake: nothing of it happened."""


async def give_way(attempt: int) -> None:
    """Before a transaction that was taken back is tried again, so that the same two do not meet once more."""
    await asyncio.sleep(random.uniform(0, 0.005 * 2**attempt))


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """The driver's errors in our own words; a violated constraint stays what it is."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DBAPIError as error:
        raise _translation(error) from error
    except (OSError, TimeoutError, sa.exc.TimeoutError, sa.exc.InvalidRequestError) as error:
        raise EngineAway(f"the engine does not answer ({type(error).__name__}: {error})") from error


def _translation(error: sa.exc.DBAPIError) -> EngineAway:
    code = getattr(error.orig, "sqlstate", None)
    lines = str(error.orig).split(">: ")[-1].splitlines()
    text = lines[0] if lines else type(error).__name__
    return TakenBack(text) if code in _TAKEN_BACK else EngineAway(f"the engine refuses: {text}")
