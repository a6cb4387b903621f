"""What clients were told: concurrent clients, and the ledger of what each key may be now.

In: a seed. Out: ``Load`` (the clients), ``Ledger`` (what was acknowledged and what has an unknown outcome). Always holds: a key
belongs to one client thread, so its requests are in order and every observation can be judged.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import re
import threading
import time
from collections.abc import Callable
from urllib.parse import quote

from awscrt import checksums

from tests.crash.client import BUCKETS, S3, Answer
from tests.crash.node import Node

MIB = 1 << 20
POOL = random.Random(20).randbytes(40 * MIB)


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """Bytes of POOL: any two bodies differ in offset or length, so each content names its PUT."""

    offset: int
    length: int

    @property
    def view(self) -> memoryview:
        return memoryview(POOL)[self.offset : self.offset + self.length]

    @property
    def crc(self) -> int:
        return int(checksums.crc64nvme(self.view))


Content = tuple[int, int] | None
"""(length, CRC64NVME) of a version; None: the key is absent."""


class Ledger:
    """What each key may be now: one content after an acknowledged request, more while outcomes are unknown."""

    def __init__(self) -> None:
        self.may_be: dict[tuple[str, str], list[Content]] = collections.defaultdict(lambda: [None])
        self.uploads: list[tuple[str, str, str]] = []
        self.acknowledged = 0
        self.unknown = 0

    def done(self, bucket: str, key: str, content: Content) -> None:
        self.acknowledged += 1
        self.may_be[bucket, key] = [content]

    def perhaps(self, bucket: str, key: str, content: Content) -> None:
        self.unknown += 1
        self.may_be[bucket, key] = [*self.may_be[bucket, key], content]

    def lost(self, named: set[tuple[str, str, str]]) -> int:
        """The host's memory is gone: what the node named may be absent; how many keys that concerns."""
        count = 0
        for (bucket, key), contents in self.may_be.items():
            said = [content for content in contents if content and (bucket, key, f"{content[1]:016x}") in named]
            if said and None not in contents:
                contents.append(None)
                count += 1
        return count

    def judge(self, bucket: str, key: str, seen: Content) -> str:
        """A complaint, or nothing; what was seen is what the key is from now on."""
        may_be = self.may_be[bucket, key]
        if seen not in may_be:
            return f"{bucket}/{key} is {seen}, it may be {may_be}"
        self.may_be[bucket, key] = [seen]
        return ""


class Load:
    """Concurrent clients, each with keys of its own. ``run`` in the background; ``stop`` ends it and raises complaints."""

    def __init__(self, node: Node, seed: int, threads: int = 5, keys: int = 6) -> None:
        self.node = node
        self.ledgers = [Ledger() for _ in range(threads)]
        self._seed = seed
        self._keys = keys
        self._going = threading.Event()
        self._threads: list[threading.Thread] = []
        self._round = 0
        self.complaints: list[str] = []

    def start(self) -> None:
        self._going.set()
        self._round += 1
        self._threads = [
            threading.Thread(target=self._client, args=(number,), name=f"client-{number}", daemon=True)
            for number in range(len(self.ledgers))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._going.clear()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"
        assert not self.complaints, "\n".join(self.complaints)

    @property
    def acknowledged(self) -> int:
        return sum(ledger.acknowledged for ledger in self.ledgers)

    def _client(self, number: int) -> None:
        rng = random.Random(f"{self._seed}.{self._round}.{number}")
        client = S3(self.node)
        try:
            while self._going.is_set():
                bucket = rng.choice(list(BUCKETS))
                key = f"c{number}/{rng.randrange(self._keys)}"
                try:
                    self._step(client, self.ledgers[number], rng, bucket, key)
                except OSError:
                    time.sleep(0.02)  # the node is being killed: do not spin
        except Exception as error:  # a thread's trouble is the test's
            self.complaints.append(f"client {number}: {type(error).__name__}: {error}")
        finally:
            client.close()

    def _step(self, client: S3, ledger: Ledger, rng: random.Random, bucket: str, key: str) -> None:
        action = rng.choices(("put", "delete", "get", "multipart"), (60, 12, 22, 6))[0]
        if action == "get":
            complaint = self.look(client, ledger, bucket, key)
            if complaint:
                self.complaints.append(complaint)
        elif action == "delete":
            self._told(ledger, bucket, key, None, lambda: client.delete(bucket, key))
        elif action == "put":
            body = self._body(rng)
            self._told(ledger, bucket, key, (body.length, body.crc), lambda: client.put(bucket, key, body.view))
        else:
            self._multipart(client, ledger, rng, bucket, key)

    def _body(self, rng: random.Random) -> Body:
        low, high = rng.choices(((1, 5000), (5000, 300_000), (300_000, 3 * MIB), (3 * MIB, 30 * MIB)), (40, 30, 20, 4))[
            0
        ]
        length = rng.randrange(low, high)
        return Body(rng.randrange(len(POOL) - length), length)

    def _told(self, ledger: Ledger, bucket: str, key: str, content: Content, ask: Callable[[], Answer]) -> None:
        try:
            answer = ask()
        except OSError:
            ledger.perhaps(bucket, key, content)
            raise
        if answer.ok:
            ledger.done(bucket, key, content)
        elif answer.status >= 500:
            ledger.perhaps(bucket, key, content)
            time.sleep(0.05)
        else:
            self.complaints.append(f"{bucket}/{key}: {answer.status} {answer.code}")

    def _multipart(self, client: S3, ledger: Ledger, rng: random.Random, bucket: str, key: str) -> None:
        path = f"/{bucket}/{quote(key)}"
        answer = client.request("POST", path, "uploads=")
        found = re.search(rb"<UploadId>([^<]+)<", answer.body)
        if not answer.ok or found is None:
            return
        upload = found[1].decode()
        ledger.uploads.append((bucket, key, upload))
        start = rng.randrange(8 * MIB)
        lengths = [5 * MIB + rng.randrange(MIB), rng.randrange(1, 2 * MIB)]
        etags, position = [], start
        for number, length in enumerate(lengths, 1):
            part = Body(position, length)
            query = f"partNumber={number}&uploadId={quote(upload, safe='')}"
            answer = client.request("PUT", path, query, part.view)
            if not answer.ok:
                return
            etags.append(answer.headers["etag"])
            position += length
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>" for number, etag in enumerate(etags, 1)
        )
        document = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        whole = Body(start, sum(lengths))
        query = f"uploadId={quote(upload, safe='')}"

        def complete() -> Answer:
            return client.request("POST", path, query, document)

        self._told(ledger, bucket, key, (whole.length, whole.crc), complete)

    @staticmethod
    def look(client: S3, ledger: Ledger, bucket: str, key: str) -> str:
        """Read a key; a complaint if it is not what it may be. Trouble of a node under fire is no complaint."""
        answer = client.get(bucket, key)
        if answer.status == 404:
            return ledger.judge(bucket, key, None)
        if answer.status == 200:
            if len(answer.body) != int(answer.headers["content-length"]):
                raise OSError("cut off")
            return ledger.judge(bucket, key, (len(answer.body), int(checksums.crc64nvme(answer.body))))
        return "" if answer.status >= 500 else f"GET {bucket}/{key}: {answer.status} {answer.code}"
