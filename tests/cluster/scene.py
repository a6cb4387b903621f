"""What the tests of one cluster share: it, loads with buckets of their own, and putting it right afterwards.

In: a running ``Cluster`` whose node b has a wall clock that can be set and whose node c has a small disk of its own. Out:
``Scene``. Always holds: after ``heal`` every node serves, every link is whole, every clock is right.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ingest.errors import NoSuchBucket
from tests.cluster.judge import Judge
from tests.cluster.load import Entry, Load
from tests.cluster.node import Cluster, ClusterNode
from tests.cluster.wall_clock import WallClock
from tests.crash.client import S3, Answer
from tests.crash.load import Body
from tests.crash.node import until

LEASE_S = 10.0
"""A node that was silent for longer is dead to the others (ingest.cluster.members.LEASE_S)."""


class Scene:
    def __init__(self, cluster: Cluster, wall_clock: WallClock, name: str, seed: int) -> None:
        self.cluster = cluster
        self.wall_clock = wall_clock
        self.a, self.b, self.c = cluster["a"], cluster["b"], cluster["c"]
        self._name = name
        self._seed = seed
        self._stack = contextlib.ExitStack()
        self._clients: dict[str, S3] = {}
        self._count = 0

    # -- asking

    def client(self, node: ClusterNode, timeout_s: float = 40.0) -> S3:
        """A connection to that node that ends with the test."""
        if node.name not in self._clients:
            self._clients[node.name] = S3(node, timeout_s)
            self._stack.callback(self._clients[node.name].close)
        return self._clients[node.name]

    def bucket(self, suffix: str, **tags: str) -> str:
        """A new bucket with these settings."""
        bucket = f"{self._name}-{suffix}"
        client = self.client(self.a)
        answer = client.request("PUT", f"/{bucket}")
        assert answer.status in (200, 409), answer
        if tags:
            self.tag(bucket, **tags)
        return bucket

    def tag(self, bucket: str, node: ClusterNode | None = None, **tags: str) -> None:
        """Change settings of a bucket, on node a unless another is named. They hold on every node that runs."""
        assert self.client(node or self.a).tag(bucket, **tags).ok
        wanted = {(f"hiss.{name.replace('_', '-')}", value) for name, value in tags.items()}

        def known(node: ClusterNode) -> bool:
            with node.catalogue() as reader, contextlib.suppress(NoSuchBucket):
                return wanted <= reader.bucket(bucket).tags.items()
            return False

        running = [node for node in self.cluster.nodes if node.running]
        until(lambda: all(known(node) for node in running), "every node knows the settings")

    def load(
        self, durabilities: Sequence[str] = ("disk",), clients: int = 4, nodes: Sequence[ClusterNode] = ()
    ) -> Load:
        """Clients on buckets of this test alone, on all nodes unless ``nodes`` says which."""
        buckets = [self.bucket(durability, durability=durability) for durability in durabilities]
        return Load(nodes or self.cluster.nodes, self._seed, buckets, clients)

    def put(self, load: Load, node: ClusterNode, bucket: str, length: int, key: str = "") -> str:
        """PUT something new that must be acknowledged; its key."""
        self._count += 1
        key = key or f"k{self._count}"
        body = Body(self._count * 4099 % (1 << 20), length)
        assert load.put(load.ledgers[0], self.client(node), bucket, key, body, node), (
            f"{node.name} took no {key}\n{node.tail()}"
        )
        return key

    def answers(self, node: ClusterNode, bucket: str, key: str, timeout_s: float = 90.0) -> Answer:
        """GET until it is no 5xx."""

        def answer() -> Answer | None:
            with contextlib.suppress(OSError):
                found = self.client(node).get(bucket, key)
                return found if found.status < 500 else None
            return None

        return until(answer, lambda: f"{node.name} answers\n{node.tail()}", timeout_s)

    @staticmethod
    def takes(node: ClusterNode, bucket: str) -> bool:
        """It commits something, so it sees the engine and the engine sees it."""
        with contextlib.closing(S3(node, timeout_s=10)) as client, contextlib.suppress(OSError):
            return client.put(bucket, "probe", bytes(1 << 20)).ok and client.delete(bucket, "probe").ok
        return False

    # -- judging

    def judge(self, load: Load) -> Judge:
        return Judge(self.cluster, load)

    @contextlib.contextmanager
    def under(self, load: Load, before: int = 20) -> Iterator[None]:
        """The load is on, before the block and after it."""
        self.goes_on(load, before, start=True)
        try:
            yield
        except BaseException:
            load.stop_quietly()
            raise
        self.goes_on(load, before)
        load.stop()

    def goes_on(self, load: Load, more: int = 20, *, start: bool = False) -> None:
        """Somebody acknowledges something."""
        if start:
            load.start()
        target = load.acknowledged + more
        until(
            lambda: load.acknowledged >= target or load.complaints,
            lambda: f"the load goes on: {load.acknowledged} of {target}\n{Judge(self.cluster, load).tails()}",
        )

    def fill_disk(self) -> Path:
        """Node c has not a byte left; the file that takes all room."""
        ballast = self.c.paths.root / "ballast"
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(256 << 10))
                file.flush()
        return ballast

    def outlast_a_lease(self) -> None:
        """Longer than a node may be silent."""
        time.sleep(LEASE_S + 2.0)

    # -- putting right

    def heal(self) -> None:
        self._stack.close()
        self._clients.clear()
        self.wall_clock.set(0.0)
        self.cluster.network.mend()
        for ballast in self.cluster.folder.glob("*/data/ballast"):
            ballast.unlink()
        for node in self.cluster.nodes:
            node.flag.unlink(missing_ok=True)
            node.thaw()
            if not node.running:
                node.process = None
        if self.cluster.engine.running:
            self.cluster.engine.thaw()
        self.cluster.start()

    def settled(self, load: Load, key: tuple[str, str]) -> Entry:
        """What the ledger says of a key."""
        return next(ledger.entries[key] for ledger in load.ledgers if key in ledger.entries)
