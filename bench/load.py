"""A load of equal requests over some connections, in a process of its own: ``python -m bench.load`` with a JSON plan on stdin.

Out: JSON on stdout with the seconds from the first byte sent to the last answer, and the bytes. Threads with blocking sockets:
``sendall`` and ``recv_into`` leave the GIL, so the sender is never the reason for a low figure that its ceiling does not share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from bench.wire import Connection, Endpoint, head


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """``count`` requests of ``size_bytes`` in all, shared over ``connections``. ``keys``: distinct keys under ``prefix``."""

    endpoint: Endpoint
    method: str
    prefix: str
    size_bytes: int
    count: int
    connections: int = 1
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    keys: int = 0
    npy: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """``started_s``: when the first byte left, by ``time.perf_counter``, which is one clock for all processes of the machine."""

    started_s: float
    seconds: float
    bytes: int
    requests: int

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


def run(plan: Plan, timeout_s: float = 300.0) -> Outcome:
    """Run the plan in a child process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"],
        input=json.dumps(dataclasses.asdict(plan)),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the load failed: {done.stderr.strip().splitlines()[-1:]}")
    return Outcome(**json.loads(done.stdout))


@contextlib.contextmanager
def flooding(plan: Plan) -> Iterator[None]:
    """The plan in a child process while the context is open; it is to be longer than that."""
    # It stands for other hosts: it is not to take the processor from who is measured.
    command = ["nice", "-n", "10", sys.executable, "-m", "bench.load"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(dataclasses.asdict(plan)))
        process.stdin.close()
        try:
            yield
            if process.poll() is not None:
                said = process.stderr.read() if process.stderr is not None else ""
                raise RuntimeError(f"the flood ended too early: {said.strip().splitlines()[-1:]}")
        finally:
            process.kill()


def _body(size_bytes: int) -> memoryview:
    memory = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    noise = os.urandom(min(size_bytes, 1 << 20))
    for offset in range(0, size_bytes, len(noise) or 1):
        count = min(len(noise), size_bytes - offset)
        view[offset : offset + count] = noise[:count]
    return view[:size_bytes]


def _drive(plan: Plan) -> Outcome:
    sends = plan.method == "PUT"
    body = _body(plan.size_bytes) if sends else None
    keys = plan.keys or plan.count
    length = plan.size_bytes if sends else 0
    heads = [head(plan.endpoint, plan.method, f"{plan.prefix}{key:06d}", length, plan.headers) for key in range(keys)]
    connections = [Connection(plan.endpoint) for _ in range(plan.connections)]
    failures: list[BaseException] = []
    received = [0] * plan.connections
    go = threading.Barrier(plan.connections + 1)

    def work(number: int) -> None:
        try:
            go.wait()
            for index in range(number, plan.count, plan.connections):
                connections[number].send(heads[index % keys], body)
                received[number] += connections[number].answer()[2]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(plan.connections)]
    for thread in threads:
        thread.start()
    go.wait()
    started_s = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started_s
    for connection in connections:
        connection.close()
    if failures:
        raise failures[0]
    moved = plan.size_bytes * plan.count if sends else sum(received)
    return Outcome(started_s, seconds, moved, plan.count)


def main() -> None:
    values: dict[str, Any] = json.load(sys.stdin)
    values["endpoint"] = Endpoint(**values["endpoint"])
    print(json.dumps(dataclasses.asdict(_drive(Plan(**values)))))


if __name__ == "__main__":
    main()
