"""A detector that cannot wait: ``python -m bench.detector`` with a JSON plan on stdin; a JSON report on stdout.

Frames are made on a schedule, whatever the network does, and wait in a ring of bounded size; one that finds it full is lost and
counted by its number. Frames go out in objects of ``frames_per_object`` as they are made: the head of an object is sent with its
first frame, so an object lasts as long as the detector takes for it. While one waits for its answer the next is being sent.

The report says what left and when, so that whoever measures can look at every window of time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

from bench.wire import Connection, Endpoint, head

CHUNK_BYTES = 1 << 18
"""Sent at a time: how finely the report knows when bytes left."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """``side``: pixels of a square uint16 frame."""

    endpoint: Endpoint
    prefix: str
    side: int
    frames_per_s: float
    frames: int
    frames_per_object: int
    ring_frames: int
    connections: int = 3

    @property
    def frame_bytes(self) -> int:
        return self.side * self.side * 2

    @property
    def bytes_per_s(self) -> float:
        return self.frame_bytes * self.frames_per_s


@dataclasses.dataclass(slots=True)
class Report:
    """``left``: (seconds since the start, bytes that had left by then), in order. Times are of ``time.perf_counter``."""

    started_s: float
    sent_frames: int
    sent_bytes: int
    lost: list[int]
    behind_frames: int
    """Most frames that waited in the ring at a time."""
    objects: int
    answer_s: float
    """The longest time an object's answer took after its last byte."""
    left: list[tuple[float, int]]

    def least_share(self, bytes_per_s: float, since_s: float, until_s: float, window_s: float = 1.0) -> float:
        """The worst window between two moments, whichever it is: bytes that left in it, of those at ``bytes_per_s``."""
        shares = []
        last = 0
        for at_s, total in self.left:
            if at_s < since_s + window_s or at_s > until_s:
                continue
            while last + 1 < len(self.left) and self.left[last + 1][0] <= at_s - window_s:
                last += 1
            shares.append((total - self.left[last][1]) / (bytes_per_s * (at_s - self.left[last][0])))
        return min(shares)


def start(plan: Plan) -> subprocess.Popen[str]:
    """In a process of its own; ``report`` waits for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.detector"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(dataclasses.asdict(plan)))
    process.stdin.close()
    process.stdin = None
    return process


def report(process: subprocess.Popen[str], timeout_s: float = 300.0) -> Report:
    out, err = process.communicate(timeout=timeout_s)
    if process.returncode:
        raise RuntimeError(f"the detector failed: {err.strip().splitlines()[-1:]}")
    return Report(**json.loads(out))


class _Detector:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        memory = memoryview(bytearray(os.urandom(1 << 20) * (plan.frame_bytes // (1 << 20) + 1)))
        self._frame = memory[: plan.frame_bytes]
        self._made = threading.Condition()
        self._next = 0
        """Of the schedule: the next frame that is to be made."""
        self._taken = 0
        self._ring = 0
        self._behind = 0
        self._lost: set[int] = set()
        self._left: list[tuple[float, int]] = []
        self._bytes = 0
        self._answer_s = 0.0
        self._turn = 0
        self._turns = threading.Condition()
        self._failures: list[BaseException] = []

    def run(self) -> Report:
        plan = self._plan
        objects = plan.frames // plan.frames_per_object
        metadata = {"x-amz-meta-frame-dtype": "<u2", "x-amz-meta-frame-shape": f"{plan.side},{plan.side}"}
        length = plan.frames_per_object * plan.frame_bytes
        heads = [
            head(plan.endpoint, "PUT", f"{plan.prefix}{number:06d}", length, metadata) for number in range(objects)
        ]
        connections = [Connection(plan.endpoint) for _ in range(plan.connections)]
        threads = [
            threading.Thread(target=self._send, args=(number, connection, heads))
            for number, connection in enumerate(connections)
        ]
        self._started_s = time.perf_counter()
        self._left.append((0.0, 0))
        for thread in threads:
            thread.start()
        self._make(objects * plan.frames_per_object)
        for thread in threads:
            thread.join()
        for connection in connections:
            connection.close()
        if self._failures:
            raise self._failures[0]
        sent = objects * plan.frames_per_object - len(self._lost)
        return Report(
            self._started_s,
            sent,
            self._bytes,
            sorted(self._lost),
            self._behind,
            objects,
            self._answer_s,
            self._left,
        )

    def _make(self, frames: int) -> None:
        """The schedule. A lost frame's place in its object is filled with the one after it: the object stays whole."""
        for number in range(frames):
            due_s = self._started_s + number / self._plan.frames_per_s
            while (wait_s := due_s - time.perf_counter()) > 0:
                time.sleep(wait_s)
            with self._made:
                if self._failures:
                    return
                if self._ring < self._plan.ring_frames:
                    self._ring += 1
                else:
                    self._lost.add(number)
                self._behind = max(self._behind, self._ring)
                self._next = number + 1
                self._made.notify_all()

    def _send(self, number: int, connection: Connection, heads: list[bytes]) -> None:
        try:
            for index in range(number, len(heads), self._plan.connections):
                with self._turns:
                    while self._turn != index:
                        if self._failures:
                            return
                        self._turns.wait(1.0)
                connection.send(heads[index])
                for _ in range(self._plan.frames_per_object):
                    self._take()
                    self._out(connection)
                with self._turns:
                    self._turn += 1
                    self._turns.notify_all()
                ended_s = time.perf_counter()
                connection.answer()
                self._answer_s = max(self._answer_s, time.perf_counter() - ended_s)
        except BaseException as error:
            self._failures.append(error)

    def _take(self) -> None:
        with self._made:
            while self._taken == self._next:
                if not self._made.wait(30.0):
                    raise TimeoutError("no frame was made in 30 s")
            self._taken += 1

    def _out(self, connection: Connection) -> None:
        for offset in range(0, len(self._frame), CHUNK_BYTES):
            piece = self._frame[offset : offset + CHUNK_BYTES]
            connection.socket.sendall(piece)
            self._bytes += len(piece)
            self._left.append((time.perf_counter() - self._started_s, self._bytes))
        with self._made:
            self._ring = max(0, self._ring - 1)


def main() -> None:
    values: dict[str, Any] = json.load(sys.stdin)
    values["endpoint"] = Endpoint(**values["endpoint"])
    print(json.dumps(dataclasses.asdict(_Detector(Plan(**values)).run())))


if __name__ == "__main__":
    main()
