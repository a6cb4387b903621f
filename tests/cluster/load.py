"""What clients of a cluster were told: concurrent clients that go from node to node, and the ledger of each key.

In: a seed and nodes. Out: ``Load`` (the clients), ``Ledger`` (what was acknowledged by whom, and what has an unknown outcome).
Always holds: a key belongs to one client thread, so its requests are in order; a request without an answer may take effect at any
later time (it may wait in a frozen node's socket), so its content stays possible for good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import quote

from awscrt import checksums

from tests.cluster.node import ClusterNode
from tests.crash.client import S3, Answer
from tests.crash.load import MIB, POOL, Body, Content

ANSWER_TIMEOUT_S = 6.0
"""Of a client under fire: it goes to another node then."""


def content_of(answer: Answer) -> Content:
    return len(answer.body), int(checksums.crc64nvme(answer.body))


@dataclasses.dataclass(slots=True)
class Entry:
    """One key. ``said`` by the node ``by``; ``perhaps``: outcomes unknown, possible from then on."""

    said: Content = None
    by: str = ""
    perhaps: set[Content] = dataclasses.field(default_factory=set)
    ever: set[Content] = dataclasses.field(default_factory=lambda: {None})

    def may_be(self) -> set[Content]:
        return {self.said, *self.perhaps}


class Ledger:
    """One client's keys."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}
        self.uploads: list[tuple[str, str, str]] = []
        self.acknowledged = 0
        self.acknowledged_bytes = 0
        self.unknown = 0
        self.refused = 0

    def of(self, bucket: str, key: str) -> Entry:
        return self.entries.setdefault((bucket, key), Entry())

    def done(self, bucket: str, key: str, content: Content, node: str) -> None:
        entry = self.of(bucket, key)
        entry.said, entry.by = content, node
        entry.ever.add(content)
        self.acknowledged += 1
        self.acknowledged_bytes += content[0] if content else 0

    def unanswered(self, bucket: str, key: str, content: Content) -> None:
        entry = self.of(bucket, key)
        entry.perhaps.add(content)
        entry.ever.add(content)
        self.unknown += 1


class Load:
    """Concurrent clients, each with keys of its own. ``start``, ``stop`` (which raises complaints), start again."""

    def __init__(
        self, nodes: Sequence[ClusterNode], seed: int, buckets: Sequence[str], clients: int = 4, hot_keys: int = 3
    ) -> None:
        self.nodes = list(nodes)
        self.buckets = list(buckets)
        self.ledgers = [Ledger() for _ in range(clients)]
        self.complaints: list[str] = []
        self._seed = seed
        self._hot_keys = hot_keys
        self._going = threading.Event()
        self._threads: list[threading.Thread] = []
        self._round = 0
        self._numbers = [0] * clients
        self._storms = 0
        self._weather = 0

    @contextlib.contextmanager
    def storm(self) -> Iterator[None]:
        """While a node may not see the engine, it answers from what it knows: an older content is no complaint. That something is
        not there is: what it has not heard of, it does not know."""
        self._storms += 1
        self._weather += 1
        try:
            yield
        finally:
            self._weather += 1
            self._storms -= 1

    def start(self) -> None:
        self._going.set()
        self._round += 1
        self._threads = [
            threading.Thread(target=self._client, args=(number,), name=f"client-{number}", daemon=True)
            for number in range(len(self.ledgers))
        ]
        for thread in self._threads:
            thread.start()

    def stop_quietly(self) -> None:
        """Its complaints are not the news: something else failed."""
        self._going.clear()
        for thread in self._threads:
            thread.join(120)

    def stop(self) -> None:
        self.stop_quietly()
        assert not any(thread.is_alive() for thread in self._threads), "a client hangs"
        assert not self.complaints, "\n".join(self.complaints[:20])

    @property
    def acknowledged(self) -> int:
        return sum(ledger.acknowledged for ledger in self.ledgers)

    def keys(self) -> list[tuple[Ledger, str, str]]:
        return [(ledger, bucket, key) for ledger in self.ledgers for bucket, key in list(ledger.entries)]

    def _client(self, number: int) -> None:
        rng = random.Random(f"{self._seed}.{self._round}.{number}")
        connections = {node.name: S3(node, timeout_s=ANSWER_TIMEOUT_S) for node in self.nodes}
        try:
            while self._going.is_set():
                node = rng.choice(self.nodes)
                try:
                    self._step(connections, node, number, rng)
                except OSError:
                    time.sleep(0.02)  # the node is dead or cut off: to another one
        except Exception as error:  # a thread's trouble is the test's
            self.complaints.append(f"client {number}: {type(error).__name__}: {error}")
        finally:
            for client in connections.values():
                client.close()

    def _step(self, connections: dict[str, S3], node: ClusterNode, number: int, rng: random.Random) -> None:
        ledger, client = self.ledgers[number], connections[node.name]
        bucket = rng.choice(self.buckets)
        action = rng.choices(("new", "again", "delete", "get", "multipart"), (36, 16, 6, 36, 6))[0]
        if action == "get":
            if ledger.entries:
                bucket, key = rng.choice(list(ledger.entries))
                self._look(client, ledger, bucket, key, node)
        elif action == "multipart":
            self._multipart(connections, ledger, rng, bucket, self._new_key(number))
        elif action == "delete":
            key = f"c{number}/hot-{rng.randrange(self._hot_keys)}"
            self.ask(ledger, bucket, key, None, node, lambda: client.delete(bucket, key))
        else:
            key = self._new_key(number) if action == "new" else f"c{number}/hot-{rng.randrange(self._hot_keys)}"
            self.put(ledger, client, bucket, key, self._body(rng), node)

    def _new_key(self, number: int) -> str:
        self._numbers[number] += 1
        return f"c{number}/{self._numbers[number]:05d}"

    @staticmethod
    def _body(rng: random.Random) -> Body:
        sizes = ((1, 5000), (5000, 300_000), (300_000, 2 * MIB))
        low, high = rng.choices(sizes, (50, 40, 8))[0]
        length = rng.randrange(low, high)
        return Body(rng.randrange(len(POOL) - length), length)

    def put(self, ledger: Ledger, client: S3, bucket: str, key: str, body: Body, node: ClusterNode) -> bool:
        """Whether it was acknowledged; raises OSError where nothing answered."""
        content = body.length, body.crc
        return self.ask(ledger, bucket, key, content, node, lambda: client.put(bucket, key, body.view))

    def ask(
        self, ledger: Ledger, bucket: str, key: str, content: Content, node: ClusterNode, request: Callable[[], Answer]
    ) -> bool:
        weather, stormy = self._weather, self._storms > 0
        try:
            answer = request()
        except OSError:
            ledger.unanswered(bucket, key, content)
            raise
        if answer.ok:
            ledger.done(bucket, key, content, node.name)
            return True
        stormy = stormy or self._storms > 0 or self._weather != weather
        if answer.status < 500 and (not stormy or answer.status == 404 or answer.code == "InvalidPart"):
            self.complaints.append(f"{node.name} {bucket}/{key}: {answer.status} {answer.code}")
        # A 5xx says nothing about the outcome, except that a later request may find it.
        ledger.unanswered(bucket, key, content)
        ledger.refused += 1
        time.sleep(0.05)
        return False

    def _multipart(self, connections: dict[str, S3], ledger: Ledger, rng: random.Random, bucket: str, key: str) -> None:
        """Each request of it goes to a node of its own choice."""

        def any_node() -> tuple[ClusterNode, S3]:
            node = rng.choice(self.nodes)
            return node, connections[node.name]

        path = f"/{bucket}/{quote(key)}"
        answer = any_node()[1].request("POST", path, "uploads=")
        found = re.search(rb"<UploadId>([^<]+)<", answer.body)
        if not answer.ok or found is None:
            return
        upload = quote(found[1].decode(), safe="")
        ledger.uploads.append((bucket, key, upload))
        start = position = rng.randrange(8 * MIB)
        etags = []
        for number, length in enumerate((5 * MIB + rng.randrange(MIB), rng.randrange(1, MIB)), 1):
            part = Body(position, length)
            answer = any_node()[1].request("PUT", path, f"partNumber={number}&uploadId={upload}", part.view)
            if not answer.ok:
                return
            etags.append(answer.headers["etag"])
            position += length
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>" for number, etag in enumerate(etags, 1)
        )
        document = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        whole = Body(start, position - start)
        node, client = any_node()
        content = whole.length, whole.crc
        done = self.ask(
            ledger, bucket, key, content, node, lambda: client.request("POST", path, f"uploadId={upload}", document)
        )
        if done:
            ledger.uploads.remove((bucket, key, upload))

    @staticmethod
    def _whole(answer: Answer) -> None:
        if len(answer.body) != int(answer.headers["content-length"]):
            raise OSError("cut off")

    def _look(self, client: S3, ledger: Ledger, bucket: str, key: str, node: ClusterNode) -> None:
        """Read a key; trouble of a node under fire is no complaint."""
        weather, stormy = self._weather, self._storms > 0
        answer = client.get(bucket, key)
        stormy = stormy or self._weather != weather
        if answer.status == 404:
            seen: Content = None
        elif answer.status == 200:
            self._whole(answer)
            seen = content_of(answer)
        else:
            if answer.status < 500:
                self.complaints.append(f"{node.name} GET {bucket}/{key}: {answer.status} {answer.code}")
            return
        entry = ledger.of(bucket, key)
        allowed = entry.ever if stormy and seen is not None else entry.may_be()
        if seen not in allowed:
            self.complaints.append(
                f"{node.name} GET {bucket}/{key} is {seen}, it may be {allowed} (said by {entry.by})"
            )
