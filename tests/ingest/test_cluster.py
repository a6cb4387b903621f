"""Nodes of a cluster on one engine: one order of commits, indexes that are alike, crashes and outages, who may be a member."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import secrets
import shutil
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bench.engine import Engine as Server
from ingest import crashpoints
from ingest.catalog import rows, server
from ingest.catalog.batching import Limits
from ingest.catalog.client import CatalogClient
from ingest.catalog.fsck import FsckReport, Problem, differences, fsck
from ingest.cluster import checkpoint, identity, node
from ingest.cluster.engine import Engine
from ingest.cluster.errors import ClusterRefused
from ingest.cluster.join import Joining
from ingest.cluster.log import Diverged, EngineLog, Fenced, Turn
from ingest.cluster.members import Load, Members
from ingest.cluster.retold import retell
from ingest.cluster.schema import metadata
from ingest.counters import CATALOGUE, Counters
from ingest.errors import CatalogUnavailable, IngestError, NoSuchKey, PreconditionFailed
from ingest.paths import NodePaths
from ingest.records import CommitObject, DeleteObject, Extent, NodeState

CommitOf = Callable[..., CommitObject]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["ingest.cluster.node", "alembic.command", "sqlalchemy.pool"])


@contextlib.asynccontextmanager
async def running(
    url: str, root: Path, name: str, *, key: str = "key", checkpoint_entries: int = 1 << 40
) -> AsyncIterator[CatalogClient]:
    """A node's catalogue process inside the test's loop, and a client of it."""
    paths = NodePaths(root)
    stop, ready = asyncio.Event(), asyncio.Event()
    options = node.NodeOptions(url, Joining(name, key), checkpoint_entries=checkpoint_entries)
    counters = Counters(None, CATALOGUE)
    work = asyncio.create_task(
        node.serve(paths, counters, options, load=Load, ready=ready.set, stop=stop, limits=Limits(part_bytes_min=100))
    )
    started = asyncio.create_task(ready.wait())
    await asyncio.wait((work, started), return_when=asyncio.FIRST_COMPLETED)
    started.cancel()
    if work.done():
        work.result()
    try:
        async with CatalogClient(paths, slot=0) as client:
            yield client
    finally:
        stop.set()
        await work


def same_index(one: Path, two: Path) -> bool:
    first, second = (rows.connect(NodePaths(root).catalogue, read_only=True) for root in (one, two))
    with contextlib.closing(first), contextlib.closing(second):
        return list(differences(first, second)) == []


async def level(*clients: CatalogClient) -> None:
    """Each knows everything that was decided."""
    for client in clients:
        await client.nodes()


async def until(true: Callable[[], bool], timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110  # what it waits for is elsewhere: in a file, in another process
            await asyncio.sleep(0.02)


# -- one order


async def test_what_one_node_was_answered_the_others_see_at_once(
    database: str, tmp_path: Path, commit_of: CommitOf
) -> None:
    async with running(database, tmp_path / "a", "a") as one, running(database, tmp_path / "b", "b") as two:
        assert (one.node, two.node) == (0, 1)
        await one.create_bucket("run", "root")
        for number in range(20):
            writer, reader = (one, two) if number % 2 else (two, one)
            made = await writer.commit(commit_of("run", b"%d" % number))
            assert await reader.head("run", b"%d" % number) == made
            listed, _ = await reader.list_objects("run")
            assert len(listed) == number + 1
        await two.delete([DeleteObject("run", b"0")])
        with pytest.raises(NoSuchKey):
            await one.head("run", b"0")
        assert [(one.node, one.name) for one in await two.nodes()] == [(0, "a"), (1, "b")]
        await level(one, two)
    assert same_index(tmp_path / "a", tmp_path / "b")


async def test_of_writers_on_three_nodes_one_wins(database: str, tmp_path: Path, commit_of: CommitOf) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(running(database, tmp_path / name, name)) for name in "abc"]
        await clients[0].create_bucket("run", "root")
        for key in (b"1", b"2", b"3"):
            tries = [client.commit(commit_of("run", key, if_none_match="*")) for client in clients for _ in range(8)]
            outcomes = await asyncio.gather(*tries, return_exceptions=True)
            assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1
            assert all(
                isinstance(outcome, PreconditionFailed) for outcome in outcomes if isinstance(outcome, Exception)
            )
        records = await asyncio.gather(
            *(client.commit(commit_of("run", b"many/%d" % n)) for n in range(60) for client in clients)
        )
        assert len({record.sequence for record in records}) == 180
        await level(*clients)
    assert same_index(tmp_path / "a", tmp_path / "b")
    assert same_index(tmp_path / "a", tmp_path / "c")


async def test_a_drain_job_is_claimed_by_the_node_that_holds_it(
    database: str, tmp_path: Path, commit_of: CommitOf
) -> None:
    async with running(database, tmp_path / "a", "a") as one, running(database, tmp_path / "b", "b") as two:
        await one.create_bucket("run", "root")
        ours = await one.commit(commit_of("run", b"a"))
        theirs = await two.commit(commit_of("run", b"b", extents=(Extent(1, 0, 1, 1, 0, 10),)))
        claims = await asyncio.gather(*(client.claim_drain(10, 60.0) for client in (one, two) for _ in range(4)))
        claimed = [record.object_id for claim in claims[:4] for record in claim]
        assert claimed == [ours.object_id]
        assert [record.object_id for claim in claims[4:] for record in claim] == [theirs.object_id]


async def test_a_drain_with_nothing_to_do_does_not_queue_for_the_head(
    database: str, tmp_path: Path, commit_of: CommitOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    turn = EngineLog.turn

    def counted(log: EngineLog) -> contextlib.AbstractAsyncContextManager[Turn]:
        turns.append(log.node)
        return turn(log)

    async with running(database, tmp_path / "a", "a") as one, running(database, tmp_path / "b", "b") as two:
        await one.create_bucket("run", "root")
        await one.commit(commit_of("run", b"k", extents=(Extent(0, 0, 1, 1, 0, 10),)))
        await level(one, two)
        monkeypatch.setattr(EngineLog, "turn", counted)
        assert await two.claim_drain(10, 60.0) == []
        assert turns == []
        assert len(await one.claim_drain(10, 60.0)) == 1
        assert await one.claim_drain(10, 60.0) == []
        assert turns == [0]
        # What becomes due by another's word is claimed without anybody having to say so here.
        await one.set_bucket_tags("run", {"hiss.drain-after-s": "86400"})
        await one.commit(commit_of("run", b"late"))
        assert await one.claim_drain(10, 60.0) == []
        record = (await two.nodes())[0]
        await two.put_node(msgspec.structs.replace(record, state=NodeState.DRAINING))
        claimed: list[bytes] = []
        for _ in range(500):
            claimed += [record.key for record in await one.claim_drain(10, 60.0)]
            if claimed:
                break
            await asyncio.sleep(0.02)
        assert claimed == [b"late"]


# -- second copies


async def test_a_mirrored_commit_needs_the_copy_that_another_node_holds(
    database: str, tmp_path: Path, commit_of: CommitOf
) -> None:
    async with running(database, tmp_path / "a", "a") as one, running(database, tmp_path / "b", "b") as two:
        await one.create_bucket("run", "root")
        request = commit_of("run", b"k", durability="mirror")
        with pytest.raises(IngestError, match="no other node"):
            await one.commit(request)
        mirror = Extent(1, 0, 3, 1, 0, 10)
        await two.hold_mirror(request.object_id, [mirror])
        assert [held for held, _ in await two.held_mirrors(10)] == [request.object_id]
        record = await one.commit(request)
        assert record.mirror == (mirror,)
        assert (await two.head("run", b"k")).mirror == (mirror,)
        assert list(await two.held_mirrors(10)) == []
        assert [use.live_bytes for use in await two.segment_use(0)] == [mirror.stored_bytes]
        await one.delete([DeleteObject("run", b"k")])
        with pytest.raises(NoSuchKey):
            await two.head("run", b"k")
        assert list(await two.segment_use(0)) == []


# -- crashes


def _catalogue_process(
    url: str, root: Path, name: str, ready: multiprocessing.synchronize.Event, crashpoint: tuple[str, int]
) -> None:
    crashpoints._name, crashpoints._left = crashpoint
    options = node.NodeOptions(url, Joining(name, "key"))
    counters = Counters(None, CATALOGUE)
    server.run(lambda stop: node.serve(NodePaths(root), counters, options, load=Load, ready=ready.set, stop=stop))


class Catalogue:
    """A real catalogue process of a node of a cluster, that dies where a test wants."""

    def __init__(self, url: str, root: Path, name: str) -> None:
        self._arguments = (url, root, name)
        self.process: BaseProcess | None = None

    def start(self, crashpoint: str = "", passage: int = 1) -> None:
        ready = _context.Event()
        self.process = _context.Process(
            target=_catalogue_process, args=(*self._arguments, ready, (crashpoint, passage)), daemon=True
        )
        self.process.start()
        assert ready.wait(60)

    def end(self, number: signal.Signals | None = None) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        if number is not None:
            process.kill() if number is signal.SIGKILL else process.terminate()
        process.join(60)
        return process.exitcode


@pytest.fixture
def catalogue(database: str, tmp_path: Path) -> Iterator[Catalogue]:
    made = Catalogue(database, tmp_path / "a", "a")
    yield made
    made.end(signal.SIGKILL)


@pytest.mark.parametrize("point", ["log-before", "log-appended", "index-before", "index-committed", "answer-before"])
async def test_killed_at_any_step_a_commit_is_answered_once_and_never_lost(
    database: str, tmp_path: Path, commit_of: CommitOf, catalogue: Catalogue, point: str
) -> None:
    async with running(database, tmp_path / "b", "b") as other:
        await other.create_bucket("run", "root")
        # Its first passage is the record of the node itself.
        catalogue.start(point, 2)
        async with CatalogClient(NodePaths(tmp_path / "a"), slot=0) as client:
            request = commit_of("run", b"k")
            answer = asyncio.create_task(client.commit(request))
            assert await asyncio.to_thread(catalogue.end) == -signal.SIGKILL
            await asyncio.to_thread(catalogue.start)
            record = await answer
            assert record.object_id == request.object_id
            assert await client.head("run", b"k") == record
            assert await other.head("run", b"k") == record
            assert len((await other.list_versions("run"))[0]) == 1
            await level(client, other)
        assert catalogue.end(signal.SIGTERM) == 0
    assert same_index(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("point", ["join-claimed", "join-placed"])
async def test_killed_while_it_joins_a_node_finds_itself_again(
    database: str, tmp_path: Path, catalogue: Catalogue, point: str
) -> None:
    with pytest.raises(AssertionError):
        await asyncio.to_thread(_start_and_die, catalogue, point)
    await asyncio.to_thread(catalogue.start)
    async with CatalogClient(NodePaths(tmp_path / "a")) as client:
        assert [(one.node, one.name) for one in await client.nodes()] == [(0, "a")]


def _start_and_die(catalogue: Catalogue, point: str) -> None:
    ready = _context.Event()
    process = _context.Process(target=_catalogue_process, args=(*catalogue._arguments, ready, (point, 1)), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode != -signal.SIGKILL


# -- the engine goes and comes


async def test_the_engine_is_killed_under_load_and_nothing_that_was_answered_is_lost(
    own_postgres: Server, tmp_path: Path, commit_of: CommitOf
) -> None:
    url = own_postgres.fresh()
    answered: dict[bytes, bytes] = {}
    stop = asyncio.Event()

    async def write(client: CatalogClient, name: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            request = commit_of("run", f"{name}/{number}".encode())
            with contextlib.suppress(CatalogUnavailable):
                await client.commit(request)
                answered[request.key] = request.object_id

    async with running(url, tmp_path / "a", "a") as one, running(url, tmp_path / "b", "b") as two:
        await one.create_bucket("run", "root")
        writers = [
            asyncio.create_task(write(client, f"{name}{n}"))
            for client, name in ((one, "a"), (two, "b"))
            for n in range(4)
        ]
        try:
            for _ in range(3):
                before = len(answered)
                await until(lambda before=before: len(answered) > before + 20)  # type: ignore[misc]
                await asyncio.to_thread(own_postgres.stop, signal.SIGQUIT)
                # What is known here can be read while nobody can commit.
                for key in list(answered)[:5]:
                    assert (await one.head("run", key)).object_id == answered[key]
                await until(lambda: one.engine_away_s > 0)
                own_postgres.start()  # not in a thread: the server ends with the one that started it
                await until(lambda: one.engine_away_s == 0 and two.engine_away_s == 0)
            before = len(answered)
            await until(lambda: len(answered) > before + 20)
            stop.set()
            await asyncio.gather(*writers)
        finally:
            for writer in writers:
                writer.cancel()
        for key, object_id in answered.items():
            assert (await two.head("run", key)).object_id == object_id
        versions, more = await one.list_versions("run")
        assert more or len(versions) >= len(answered)
        await level(one, two)
    assert same_index(tmp_path / "a", tmp_path / "b")


async def test_a_commit_that_the_engine_does_not_take_is_refused_and_not_held_for_ever(
    own_postgres: Server, tmp_path: Path, commit_of: CommitOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.cluster.committer.ENGINE_WAIT_S", 0.5)
    async with running(own_postgres.fresh(), tmp_path / "a", "a") as client:
        await client.create_bucket("run", "root")
        await asyncio.to_thread(own_postgres.stop, signal.SIGQUIT)
        try:
            with pytest.raises(CatalogUnavailable, match="engine"):
                await client.commit(commit_of("run", b"k"))
        finally:
            own_postgres.start()  # not in a thread: the server ends with the one that started it
        await until(lambda: client.engine_away_s == 0)
        assert (await client.commit(commit_of("run", b"k"))).key == b"k"


async def test_an_engine_that_hangs_is_noticed_soon_and_commits_under_way_are_still_decided_by_it(
    own_postgres: Server, tmp_path: Path, commit_of: CommitOf
) -> None:
    url = own_postgres.fresh()
    async with running(url, tmp_path / "a", "a") as one, running(url, tmp_path / "b", "b") as two:
        await one.create_bucket("run", "root")
        await one.commit(commit_of("run", b"known"))
        await level(one, two)
        own_postgres.freeze()
        began = time.monotonic()
        try:
            # Their turns hang, and hold what the node's follower needs.
            under_way = [asyncio.create_task(client.commit(commit_of("run", b"new"))) for client in (one, two)]
            await until(lambda: one.engine_away_s > 1 and two.engine_away_s > 1)
            noticed_s = time.monotonic() - began
            assert noticed_s < 6.0
            for client in (one, two):
                began = time.monotonic()
                assert (await client.head("run", b"known")).key == b"known"
                with pytest.raises(CatalogUnavailable, match="not heard of"):
                    await client.head("run", b"new")
                assert time.monotonic() - began < 3.0
            assert not any(commit.done() for commit in under_way)
        finally:
            own_postgres.thaw()
        made = await asyncio.gather(*under_way)
        await until(lambda: one.engine_away_s == 0 and two.engine_away_s == 0)
        newest = max(made, key=lambda record: record.sequence)
        for client in (one, two):
            assert (await client.head("run", b"new")).object_id == newest.object_id
        await level(one, two)
    assert same_index(tmp_path / "a", tmp_path / "b")


async def shows(client: CatalogClient, key: bytes) -> bool:
    """Whether it is there to be read, once the node can say."""
    async with asyncio.timeout(120):
        while True:
            try:
                return bool(await client.head("run", key))
            except NoSuchKey:
                return False
            except CatalogUnavailable:
                await asyncio.sleep(0.05)


async def test_a_commit_that_its_standby_has_not_is_never_answered_and_bodies_are_refused_meanwhile(
    own_postgres: Server, tmp_path: Path, commit_of: CommitOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.cluster.committer.ENGINE_WAIT_S", 1.5)
    monkeypatch.setattr("ingest.cluster.engine.ENGINE_TIMEOUT_S", 1.0)
    url = own_postgres.fresh()
    database = sa.make_url(url).database
    assert database is not None
    async with running(url, tmp_path / "a", "a") as one, running(url, tmp_path / "b", "b") as two:
        await one.create_bucket("run", "root")
        known = await one.commit(commit_of("run", b"known"))
        with own_postgres.without_standby():
            commit = commit_of("run", b"k")
            with pytest.raises(CatalogUnavailable, match="unknown"):
                await one.commit(commit)
            await until(lambda: one.commits_stuck_s > 0)
            # It goes on trying, and none of that makes the engine answer for the commit alone.
            await asyncio.sleep(3.0)
            assert own_postgres.sql("SELECT next_sequence FROM hiss_cluster", database) == [[str(known.sequence + 1)]]
            for client in (one, two):
                assert (await client.head("run", b"known")).object_id == known.object_id
                assert not await shows(client, b"k"), "it answers, so this is known"
        await until(lambda: one.commits_stuck_s == 0)
        made = await two.head("run", b"k")
        assert made.object_id == commit.object_id, "the one commit that waited for its standby"
        assert (await one.commit(commit)).sequence == made.sequence


async def test_what_an_engine_finds_when_it_comes_back_is_answered_when_its_standby_has_it(
    own_postgres: Server, tmp_path: Path, commit_of: CommitOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It crashed with a commit that waited for the standby: after that the commit is there to be read."""
    monkeypatch.setattr("ingest.cluster.committer.ENGINE_WAIT_S", 4.0)
    monkeypatch.setattr("ingest.cluster.engine.ENGINE_TIMEOUT_S", 2.0)
    url = own_postgres.fresh()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    async with running(url, tmp_path / "a", "a") as client, running(url, tmp_path / "b", "b") as other:
        await client.create_bucket("run", "root")
        with own_postgres.without_standby():
            commit = commit_of("run", b"k")
            under_way = asyncio.create_task(client.commit(commit))
            await until(lambda: own_postgres.sql(waiting) != [["0"]])
            own_postgres.stop(signal.SIGQUIT)
            own_postgres.start()
            async with asyncio.timeout(120):
                while not await shows(other, b"k"):  # noqa: ASYNC110  # what it waits for is elsewhere
                    await asyncio.sleep(0.05)
            with pytest.raises(CatalogUnavailable, match="outlive"):
                await other.barrier()
            with pytest.raises(CatalogUnavailable, match="unknown"):
                await under_way
            with pytest.raises(CatalogUnavailable, match="unknown"):
                await client.commit(commit)  # the same, once more
        assert (await client.commit(commit)).object_id == commit.object_id
        await until(lambda: other.commits_stuck_s == 0)
        await other.barrier()


# -- who may be a member


async def test_a_second_process_of_the_same_folder_fences_the_first(database: str, tmp_path: Path) -> None:
    async with running(database, tmp_path / "a", "a"):
        pass
    shutil.copytree(tmp_path / "a", tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(running(database, tmp_path / "a", "a"))
        second = await stack.enter_async_context(running(database, tmp_path / "copy", "a"))
        first._timeout_s = 1.0
        with pytest.raises(CatalogUnavailable):
            await first.create_bucket("late", "root")
        await second.create_bucket("mine", "root")
        assert [bucket.name for bucket in await second.buckets()] == ["mine"]
        with pytest.raises(Fenced):
            await stack.aclose()


async def test_who_cannot_be_a_member_is_told_why(database: str, postgres: Server, tmp_path: Path) -> None:
    async with running(database, tmp_path / "a", "a"):
        pass
    with pytest.raises(ClusterRefused, match=r"node\.key is not the cluster's"):
        async with running(database, tmp_path / "b", "b", key="other"):
            pass
    with pytest.raises(ClusterRefused, match="another node of the cluster is called a"):
        async with running(database, tmp_path / "b", "a"):
            pass
    with pytest.raises(ClusterRefused, match="database is empty"):
        async with running(postgres.fresh(), tmp_path / "a", "a"):
            pass
    other = postgres.fresh()
    async with running(other, tmp_path / "c", "c"):
        pass
    with pytest.raises(ClusterRefused, match="is catalog right"):
        async with running(other, tmp_path / "a", "a"):
            pass
    with pytest.raises(ClusterRefused, match="postgresql://"):
        async with running("mysql://x", tmp_path / "d", "d"):
            pass


async def test_a_folder_with_data_of_its_own_is_refused(database: str, tmp_path: Path) -> None:
    paths = NodePaths(tmp_path / "alone")
    stop, ready = asyncio.Event(), asyncio.Event()
    alone = asyncio.create_task(server.serve(paths, Counters(None, CATALOGUE), node=0, ready=ready.set, stop=stop))
    await ready.wait()
    async with CatalogClient(paths) as client:
        await client.create_bucket("mine", "root")
    stop.set()
    await alone
    with pytest.raises(ClusterRefused, match="hiss migrate"):
        async with running(database, tmp_path / "alone", "a"):
            pass


async def test_a_program_older_than_the_cluster_is_refused(database: str, postgres: Server, tmp_path: Path) -> None:
    async with running(database, tmp_path / "a", "a"):
        pass
    name = database.rpartition("/")[2]
    postgres.sql("UPDATE hiss_cluster SET log_format = 99", name)
    with pytest.raises(ClusterRefused, match="install their version here"):
        async with running(database, tmp_path / "a", "a"):
            pass
    postgres.sql("UPDATE hiss_cluster SET log_format = 1; UPDATE hiss_schema SET version_num = '9999'", name)
    with pytest.raises(ClusterRefused, match="install their version here"):
        async with running(database, tmp_path / "a", "a"):
            pass


async def test_an_engine_of_an_older_back_up_is_noticed(
    database: str, postgres: Server, tmp_path: Path, commit_of: CommitOf
) -> None:
    async with running(database, tmp_path / "a", "a") as client:
        await client.create_bucket("run", "root")
        for number in range(5):
            await client.commit(commit_of("run", b"%d" % number))
    name = database.rpartition("/")[2]
    (last,) = postgres.sql("SELECT max(first_sequence) FROM hiss_log", name)[0]
    postgres.sql(f"DELETE FROM hiss_log WHERE first_sequence = {last}", name)
    before = "SELECT chain FROM hiss_log ORDER BY first_sequence DESC LIMIT 1"
    postgres.sql(f"UPDATE hiss_cluster SET next_sequence = {last}, chain = ({before})", name)
    with pytest.raises(Diverged, match=r"older back-up.*run `hiss fsck --repair"):
        async with running(database, tmp_path / "a", "a"):
            pass
    paths = NodePaths(tmp_path / "a")
    (problem,) = of_the_index(await compared(database, paths))
    assert "the engine's log ends at entry" in problem.detail
    assert (await compared(database, paths, repair=True)).repaired
    async with running(database, tmp_path / "a", "a") as client:
        assert (await client.head("run", b"0")).key == b"0"
    assert of_the_index(await compared(database, paths)) == []


async def test_an_index_of_as_many_entries_of_another_engine_is_noticed(
    database: str, postgres: Server, tmp_path: Path, commit_of: CommitOf
) -> None:
    """Two copies of an engine went different ways: the node that followed the wrong one sees it before anything new is logged."""
    async with running(database, tmp_path / "a", "a") as client:
        await client.create_bucket("run", "root")
    name = database.rpartition("/")[2]
    other = postgres.fresh(template=name)
    async with running(other, tmp_path / "a", "a") as client:
        await client.commit(commit_of("run", b"wrong"))
    async with running(database, tmp_path / "b", "b") as client:
        await client.commit(commit_of("run", b"right"))
        await client.commit(commit_of("run", b"more"))
        with pytest.raises(Diverged, match="hiss fsck --repair"):
            async with running(database, tmp_path / "a", "a"):
                pass
        paths = NodePaths(tmp_path / "a")
        assert (await compared(database, paths, repair=True)).repaired
        async with running(database, tmp_path / "a", "a") as mended:
            assert (await mended.head("run", b"right")) == await client.head("run", b"right")
            with pytest.raises(NoSuchKey):
                await mended.head("run", b"wrong")


def of_the_index(report: FsckReport) -> list[Problem]:
    return [problem for problem in report.problems if problem.kind == "index"]


async def compared(database: str, paths: NodePaths, *, repair: bool = False) -> FsckReport:
    """What ``hiss fsck`` finds when the index is compared with the engine."""
    known = identity.read(paths)
    assert known is not None

    def tell(made: Path, up_to: int) -> None:
        asyncio.run(retell(database, known, made, up_to))

    return await asyncio.to_thread(fsck, paths.root, repair=repair, tell=tell)


# -- checkpoints


async def test_a_node_that_was_away_for_long_and_a_new_one_begin_with_a_checkpoint(
    database: str, postgres: Server, tmp_path: Path, commit_of: CommitOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.cluster.keeper._CHECKPOINT_LOOK_S", 0.1)
    name = database.rpartition("/")[2]
    async with running(database, tmp_path / "b", "b"):
        pass
    async with running(database, tmp_path / "a", "a", checkpoint_entries=50) as client:
        await client.create_bucket("run", "root")

        def log_begins_late() -> bool:
            return int(postgres.sql("SELECT min(first_sequence) FROM hiss_log", name)[0][0]) > 60

        number = 0
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(log_begins_late):
                number += 1
                await asyncio.gather(*(client.commit(commit_of("run", b"%d/%d" % (number, n))) for n in range(20)))
        async with Engine(database) as engine:
            assert len(await checkpoint.complete(engine)) == checkpoint.KEPT
        # One was away for so long that the log has forgotten; one is new; one has a broken index.
        async with running(database, tmp_path / "b", "b") as away, running(database, tmp_path / "c", "c") as new:
            for other in (away, new):
                assert (await other.head("run", b"1/1")) == await client.head("run", b"1/1")
    with NodePaths(tmp_path / "c").catalogue.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 8192)
    (NodePaths(tmp_path / "c").catalogue.parent / "clean").unlink()
    async with running(database, tmp_path / "c", "c") as mended:
        assert (await mended.head("run", b"1/1")).key == b"1/1"
    async with running(database, tmp_path / "a", "a") as one, running(database, tmp_path / "c", "c") as two:
        await level(one, two)
    assert same_index(tmp_path / "a", tmp_path / "c")


async def test_a_checkpoint_that_ended_half_way_is_gone_on_with_and_a_damaged_one_is_noticed(
    database: str, postgres: Server, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sqlite"
    with contextlib.closing(sqlite3.connect(copy)) as made:
        made.execute("CREATE TABLE t (x)")
        made.executemany("INSERT INTO t VALUES (?)", [(secrets.token_bytes(1000),) for _ in range(3000)])
        made.commit()
    name = database.rpartition("/")[2]
    sent: list[int] = []
    async with Engine(database) as engine:
        await engine.upgrade()

        def interrupted(done: int, _: int) -> None:
            sent.append(done)
            if len(sent) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            await checkpoint.publish(engine, copy, 7, interrupted)
        assert await checkpoint.newest(engine) is None
        postgres.sql("ALTER TABLE hiss_checkpoint_parts ADD COLUMN sent_again INTEGER DEFAULT 0", name)
        made_of = await checkpoint.publish(engine, copy, 7)
        await checkpoint.fetch(engine, made_of, tmp_path / "back.sqlite")
        assert (tmp_path / "back.sqlite").read_bytes() == copy.read_bytes()
        postgres.sql("UPDATE hiss_checkpoint_parts SET data = data || 'x' WHERE part = 1", name)
        with pytest.raises(ClusterRefused, match="damaged"):
            await checkpoint.fetch(engine, made_of, tmp_path / "again.sqlite")


# -- members


async def test_members_are_told_to_every_process(database: str, tmp_path: Path) -> None:
    async with running(database, tmp_path / "a", "a") as one:
        members = Members(NodePaths(tmp_path / "a"))
        async with running(database, tmp_path / "b", "b"):
            await until(lambda: [member.record.name for member in members.others() if member.alive] == ["b"])
            assert members.me is not None
            assert members.me.takes_bodies
            assert members.leads()
            # What b itself is told it may be told a heartbeat later.
            await until(lambda: not Members(NodePaths(tmp_path / "b")).leads())
        record = (await one.nodes())[1]
        await one.put_node(msgspec.structs.replace(record, state=NodeState.DRAINING))
        await until(lambda: members.others() != () and members.others()[0].record.state is NodeState.DRAINING)
        assert not members.others()[0].takes_bodies
    assert Members(NodePaths(tmp_path / "a")).all() == ()


# -- schema


async def test_migrations_build_the_engines_schema(database: str) -> None:
    async with Engine(database) as one, Engine(database) as two, Engine(database) as three:
        # Nodes that start together: one migrates, the others wait.
        await asyncio.gather(one.upgrade(), two.upgrade(), three.upgrade())
        async with one.transaction() as connection:

            def compare(sync: sa.Connection) -> list[object]:
                options = {
                    "version_table": "hiss_schema",
                    "include_name": lambda name, kind, _: kind != "table" or name != "hiss_gate",
                }
                return compare_metadata(MigrationContext.configure(sync, opts=options), metadata)

            assert await connection.run_sync(compare) == []
