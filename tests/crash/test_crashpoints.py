"""A process dies at each named step of a commit, a drain, an eviction, a recycling: what was acknowledged is there afterwards.

The nodes are real and shared by the points; a point is armed by a file that only the process that dies there removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from awscrt import checksums

from ingest import clock
from ingest.catalog.client import CatalogClient
from ingest.crashpoints import POINTS
from ingest.errors import CatalogError
from ingest.lifecycle import Lifecycle, Rule, When
from ingest.records import ObjectState
from tests.cluster.test_migrate import POINTS as MIGRATE_POINTS
from tests.crash.harness import MIB, S3, Body, Judge, Load, Node, running, until

EVICTING = {"evict_high": "0.05", "evict_low": "0.0"}
"""More than 51 MiB are evicted as soon as they are archived."""
KERNEL = b"def frame(frame, params, state, index, out, feedback):\n    return KEEP\n"


class Scene:
    """A node, one client's ledger, and what makes the node pass a point."""

    def __init__(self, node: Node, flag: Path) -> None:
        self.node = node
        self.load = Load(node, 0, threads=1)
        self.judge = Judge(node, self.load)
        self._flag = flag
        self._client = S3(node)
        self._count = 0

    def dies_at(self, point: str, trigger: Callable[[], None]) -> None:
        """Arm the point, make the node pass it, see a process die and come back."""
        restarts = self._restarts()
        draft = self._flag.with_suffix(".draft")
        draft.write_text(point)
        draft.rename(self._flag)
        try:
            deadline = time.monotonic() + 120
            while self._flag.exists():
                assert time.monotonic() < deadline, f"nothing passed {point}\n{self.node.tail()}"
                with contextlib.suppress(OSError):
                    trigger()
        finally:
            self._flag.unlink(missing_ok=True)
        until(lambda: self._restarts() > restarts, lambda: f"somebody was started again: {self.node.status()}")
        self.node.ready()

    def _restarts(self) -> int:
        return sum(row["restarts"] for row in self.node.status()["processes"])

    def put(self, bucket: str, length: int, key: str = "") -> str:
        """PUT something new; raises OSError when the connection broke."""
        self._count += 1
        key = key or f"k{self._count}"
        body = Body(self._count * 4099 % MIB, length)
        ledger = self.load.ledgers[0]
        content = body.length, body.crc
        self.load._told(ledger, bucket, key, content, lambda: self._client.put(bucket, key, body.view))
        return key

    def delete(self, bucket: str, key: str) -> None:
        self.load._told(self.load.ledgers[0], bucket, key, None, lambda: self._client.delete(bucket, key))

    def get(self, bucket: str, key: str) -> None:
        assert not self.load.look(self._client, self.load.ledgers[0], bucket, key)

    # -- what passes the points

    def puts(self) -> None:
        self.put("disk", 3 * MIB)
        self.put("disk", 20_000, "again")
        self.delete("disk", self.put("disk", 5000))
        time.sleep(0.05)

    def memory_puts(self) -> None:
        self.put("memory", 3 * MIB)
        self.put("memory", 5000)
        time.sleep(0.5)

    def segments_die(self) -> None:
        for key in [self.put("disk", 6 * MIB) for _ in range(6)]:
            self.delete("disk", key)
        time.sleep(0.5)

    def segments_become_sparse(self) -> None:
        keys = [self.put("disk", length) for length in (5 * MIB, 1200_000, 5 * MIB, 5 * MIB, 6 * MIB) * 2]
        for number, key in enumerate(keys):
            if number % 5 != 1:
                self.delete("disk", key)
        until(lambda: not self._flag.exists(), "compaction")

    def buffer_fills(self) -> None:
        for number in range(8):
            self.put("disk", 9 * MIB, f"large{number}")
        time.sleep(0.5)

    def recalls(self) -> None:
        self.buffer_fills()
        until(self._evicted, "something is evicted")
        for bucket, key in self._evicted():
            self.get(bucket, key)

    def _evicted(self) -> list[tuple[str, str]]:
        found = [record for record in self.node.records() if record.state is ObjectState.EVICTED]
        return [(record.bucket, record.key.decode()) for record in found]

    def takes_snapshot(self) -> None:
        async def snapshot() -> None:
            async with CatalogClient(self.node.paths) as catalog:
                with contextlib.suppress(CatalogError):
                    await catalog.snapshot()

        asyncio.run(snapshot())

    def fills_journal(self) -> None:
        """Tags are the largest entries: fifty of 768 bytes each."""
        for _ in range(40):
            self._count += 1
            tags = "".join(
                f"<Tag><Key>t{number}</Key><Value>{'€' * 250}{self._count:05}</Value></Tag>" for number in range(49)
            )
            document = f"<Tagging><TagSet>{tags}</TagSet></Tagging>".encode()
            answer = self._client.request("PUT", "/disk", "tagging=", document)
            assert answer.status in (200, 204, 500, 503), answer


PLAIN: dict[str, Callable[[Scene], None]] = {
    **dict.fromkeys(("data-written", "data-flushed", "drain-claimed", "drain-written"), Scene.puts),
    "settle-written": Scene.memory_puts,
    **dict.fromkeys(("recycle-locked", "recycle-marked"), Scene.segments_die),
    "relocate-written": Scene.segments_become_sparse,
    **dict.fromkeys(("snapshot-written", "snapshot-renamed"), Scene.takes_snapshot),
    "journal-rotated": Scene.fills_journal,
}
FULL: dict[str, Callable[[Scene], None]] = {
    **dict.fromkeys(
        ("journal-before", "journal-written", "journal-flushed", "index-before", "index-committed", "answer-before"),
        Scene.puts,
    ),
    **dict.fromkeys(("drain-verified", "drain-published", "drain-recorded"), Scene.puts),
    **dict.fromkeys(("evict-before", "evict-recorded"), Scene.buffer_fills),
    "recall-written": Scene.recalls,
}

CLUSTER = {"join-claimed", "join-placed", "log-before", "log-appended", *(f"migrate-{step}" for step in MIGRATE_POINTS)}
"""In tests/ingest/test_cluster.py and tests/cluster/test_migrate.py."""
PRODUCTS = {"product-before", "partial-before", "run-product-before", "filter-before", "cut-mended"}
"""Points of the kernel room: below, in tests/kernels/test_runs.py and tests/gateway/test_stop.py."""


@contextlib.contextmanager
def scene_of(folder: Path, **settings: str) -> Iterator[Scene]:
    flag = folder / "crashpoint"
    with running(folder, {"HISS_CRASHPOINT_ONCE": str(flag)}, **settings) as node:
        scene = Scene(node, flag)
        yield scene
        scene._client.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene_of(tmp_path_factory.mktemp("plain")) as scene:
        yield scene


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene_of(tmp_path_factory.mktemp("full"), **EVICTING) as scene:
        yield scene


def test_every_point_has_its_test() -> None:
    # The last two: tests/archive/test_drain_crash.py.
    assert {*PLAIN, *FULL, *PRODUCTS, *CLUSTER, "lifecycle-before", "aside-named"} == set(POINTS)


@pytest.mark.parametrize("point", PLAIN)
def test_a_process_dies_at(plain: Scene, point: str) -> None:
    plain.dies_at(point, lambda: PLAIN[point](plain))
    plain.judge.reads_back()


@pytest.mark.parametrize("point", FULL)
def test_a_process_dies_in_a_full_buffer_at(full: Scene, point: str) -> None:
    full.dies_at(point, lambda: FULL[point](full))
    full.judge.reads_back()


@pytest.mark.parametrize("name", ["plain", "full"])
def test_in_the_end_everything_is_one_verified_copy_and_all_space_comes_back(
    name: str, request: pytest.FixtureRequest
) -> None:
    scene: Scene = request.getfixturevalue(name)
    scene.judge.is_archived()
    scene.judge.is_sound()
    scene.judge.gives_everything_back()
    scene.node.stop()
    assert scene.judge.is_sound().live_bytes == 0


def test_the_drain_dies_while_it_carries_out_lifecycle_rules(tmp_path: Path) -> None:
    """What was to expire expires in the next life, and nothing else does."""
    with (
        scene_of(tmp_path, virtual_clock="on", lifecycle_scan_s="0.1") as scene,
        contextlib.closing(S3(scene.node)) as client,
    ):
        rules = msgspec.json.encode(Lifecycle((Rule("old", True, prefix="old/", expire=When(days=1)),)))

        async def configure() -> None:
            async with CatalogClient(scene.node.paths) as catalog:
                await catalog.configure_bucket("disk", {"lifecycle": rules})

        asyncio.run(configure())
        for key in ("old/1", "old/2", "old/3", "new/1"):
            assert client.put("disk", key, b"body of " + key.encode()).ok

        def days_pass() -> None:
            clock.advance(scene.node.paths, 2 * 86400)
            time.sleep(1.0)

        scene.dies_at("lifecycle-before", days_pass)
        until(lambda: [record.key for record in scene.node.records()] == [b"new/1"], "the rest expired")
        client.close()
        assert client.get("disk", "new/1").body == b"body of new/1"
        scene.judge.is_sound()


def test_a_worker_dies_with_a_product_in_its_hands(tmp_path: Path) -> None:
    """The product is owed, remembered and made by the next worker."""
    frames = io.BytesIO()
    np.save(frames, np.arange(4 * 64 * 64, dtype="<u2").reshape(4, 64, 64))
    with scene_of(tmp_path, kernels="on", workers="1") as scene, contextlib.closing(S3(scene.node)) as client:
        assert client.put("disk", "_kernels/keep.py", KERNEL).ok

        def put() -> None:
            client.put("disk", "run/1.npy", frames.getvalue())
            time.sleep(0.5)

        scene.dies_at("product-before", put)
        client.close()
        product = until(
            lambda: (answer := client.get("disk", "_products/keep/run/1.npy.nxs")).ok and answer,
            lambda: f"the product: {scene.node.tail()}",
        )
        assert product.body[1:4] == b"HDF"
        assert checksums.crc64nvme(client.get("disk", "run/1.npy").body) == checksums.crc64nvme(frames.getvalue())
        scene.judge.is_sound()
