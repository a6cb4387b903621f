"""A reader never sees another object's bytes while segments are recycled under it.

Slow and fast readers over HTTP, on a buffer so small for its load that versions are overwritten, deleted, archived, evicted
and recalled all the time. Every 4 KiB block of a body says which version of which key it is of, and where in it.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.crash.harness import S3, Node, running

BLOCK_BYTES = 4096
KEYS = 12
"""Keys that are overwritten and deleted all the time."""
QUIET_KEYS = 8
"""Keys behind them that are written once: evicted and recalled."""
LOAD_S = 10.0


def body(key: int, version: int, blocks: int) -> bytes:
    words = np.full((blocks, BLOCK_BYTES // 8), version, "<u8")
    words[:, 0] = key
    words[:, 2] = np.arange(blocks)
    return words.tobytes()


def fault(content: bytes, key: int) -> str:
    """What is wrong with a body that was read, if anything."""
    if len(content) % BLOCK_BYTES or not content:
        return f"{len(content)} bytes"
    words = np.frombuffer(content, "<u8").reshape(-1, BLOCK_BYTES // 8)
    version = int(words[0, 1])
    if content == body(key, version, len(words)):
        return ""
    expected = np.frombuffer(body(key, version, len(words)), "<u8").reshape(words.shape)
    at = int(np.nonzero((words != expected).any(axis=1))[0][0])
    return f"version {version}: block {at} is of (key, version, block) {words[at, :3].tolist()}"


class Crowd:
    def __init__(self, node: Node, seed: int) -> None:
        self._node = node
        self._seed = seed
        self._going = threading.Event()
        self._versions = iter(range(1, 1 << 30))
        self.complaints: list[str] = []
        self.reads = 0
        self.refused: dict[str, int] = {}

    def run(self, seconds: float, enough: Callable[[], bool]) -> None:
        """At least so long, and until it was enough."""
        self._going.set()
        with contextlib.closing(S3(self._node)) as client:
            for key in range(KEYS, KEYS + QUIET_KEYS):
                assert client.put("disk", f"k{key}", body(key, next(self._versions), 2000)).ok
        threads = [threading.Thread(target=self._writer, args=(number,), daemon=True) for number in range(3)]
        threads += [
            threading.Thread(target=self._reader, args=(number, number % 2 == 0), daemon=True) for number in range(6)
        ]
        for thread in threads:
            thread.start()
        begin = time.monotonic()
        while (seconds > time.monotonic() - begin or not enough()) and not self.complaints:
            assert time.monotonic() - begin < 20 * seconds, "the test could not try hard"
            time.sleep(0.05)
        self._going.clear()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"

    def _writer(self, number: int) -> None:
        """Keys of its own, so that what is deleted is put again at once."""
        rng = random.Random(f"{self._seed}.w{number}")
        with contextlib.closing(S3(self._node)) as client:
            while self._going.is_set():
                key = number + 3 * rng.randrange(KEYS // 3)
                if rng.random() < 0.2:
                    client.delete("disk", f"k{key}")
                blocks = rng.choice((1, 20, 300, 1500, 2000))
                answer = client.put("disk", f"k{key}", body(key, next(self._versions), blocks))
                if not answer.ok and answer.code not in ("SlowDown",):
                    self.complaints.append(f"PUT k{key}: {answer.status} {answer.code}")

    def _reader(self, number: int, slow: bool) -> None:
        rng = random.Random(f"{self._seed}.r{number}")
        with contextlib.closing(S3(self._node)) as client:
            while self._going.is_set():
                key = rng.randrange(KEYS + QUIET_KEYS)
                try:
                    answer = client.get("disk", f"k{key}", pause_s=rng.uniform(0.005, 0.05) if slow else 0.0)
                except OSError as error:
                    self.complaints.append(f"GET k{key}: {error}")
                    return
                if answer.status == 200:
                    self.reads += 1
                    if complaint := fault(answer.body, key):
                        self.complaints.append(f"GET k{key}: {complaint}")
                elif answer.status != 404:
                    self.refused[answer.code] = self.refused.get(answer.code, 0) + 1


def counted(node: Node, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{node.port('control')}/metrics", timeout=60) as answer:
        found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.M)
    return float(found[1]) if found else 0.0


def test_readers_never_see_other_bytes(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, evict_high="0.05", evict_low="0.0", recall_timeout_s="20") as node:
        crowd = Crowd(node, seed)
        recycled = functools.partial(counted, node, "hiss_segment_recycled_total")
        evicted = functools.partial(counted, node, "hiss_evicted_objects_total")
        crowd.run(LOAD_S, lambda: crowd.reads > 50 and recycled() > 5 and evicted() > 2)
        assert not crowd.complaints, "\n".join([*crowd.complaints, node.tail(20)])
        assert not crowd.refused, crowd.refused
        print(f"{crowd.reads} reads, {recycled()} segments recycled, {evicted()} versions evicted")
