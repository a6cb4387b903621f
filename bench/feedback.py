"""How long from a frame's last byte to the event at a subscriber: one PUT that streams frames at a steady rate.

The sender notes when the last byte of each frame left its hands; a kernel emits one event a frame; a subscriber reads the SSE
stream in another thread and notes when each event came. Both clocks are this process's.
"""

from __future__ import annotations

import base64
import http.client
import json
import statistics
import threading
import time

from bench.node import Node
from bench.wire import Connection, head

SIDE = 1000
FRAME_BYTES = SIDE * SIDE * 2

KERNEL = b"""
STATE = {"total": ("uint64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    total = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            total += frame[y, x]
    state.total[0] += total
    emit(feedback, 1, total)
    return KEEP
"""


class Subscriber(threading.Thread):
    """Arrival times by frame number."""

    def __init__(self, node: Node, bucket: str) -> None:
        super().__init__(daemon=True)
        self.arrived: dict[int, float] = {}
        self._connection = http.client.HTTPConnection("127.0.0.1", node.ports["control"], timeout=30)
        token = base64.b64encode(f"{node.endpoint.access_key}:{node.endpoint.secret_key}".encode()).decode()
        self._connection.request("GET", f"/v1/feedback?bucket={bucket}", headers={"Authorization": f"Basic {token}"})
        self._answer = self._connection.getresponse()
        if self._answer.status != 200:
            raise RuntimeError(f"feedback: {self._answer.status} {self._answer.read(300)!r}")

    def run(self) -> None:
        while line := self._answer.readline():
            if line.startswith(b"data:"):
                now = time.perf_counter()
                event = json.loads(line[5:])
                if "frame" in event:
                    self.arrived.setdefault(int(event["frame"]), now)


def feedback_latency_ms(node: Node, *, frames: int, frames_per_s: float) -> tuple[float, float]:
    """(median, p99) in ms."""
    node.bucket("feedback", "memory")
    node.call("PUT", "/feedback/_kernels/echo.py", KERNEL)
    headers = {"x-amz-meta-frame-dtype": "<u2", "x-amz-meta-frame-shape": f"{SIDE},{SIDE}"}
    # The first stream of each worker starts and warms its sandbox.
    workers = list(node.processes().values()).count("worker")
    sandboxes = node.metric("hiss_kernel_sandboxes") + workers
    deadline = time.monotonic() + 30
    while node.metric("hiss_kernel_sandboxes") < sandboxes and time.monotonic() < deadline:
        _stream(node, "warm", 5, frames_per_s, headers)
    time.sleep(2)
    subscriber = Subscriber(node, "feedback")
    subscriber.start()
    sent = _stream(node, "timed", frames, frames_per_s, headers)
    deadline = time.monotonic() + 10
    while len(subscriber.arrived) < frames and time.monotonic() < deadline:
        time.sleep(0.01)
    missing = frames - len(subscriber.arrived)
    if missing:
        raise RuntimeError(f"{missing} of {frames} feedback events never came")
    waits = sorted((subscriber.arrived[index] - sent[index]) * 1e3 for index in range(frames))
    return statistics.median(waits), waits[int(0.99 * frames)]


def _stream(node: Node, key: str, frames: int, frames_per_s: float, headers: dict[str, str]) -> list[float]:
    """One PUT, a frame every 1/``frames_per_s``; returns when each frame's last byte was handed to the system."""
    connection = Connection(node.endpoint)
    body = memoryview(bytes(range(256)) * (FRAME_BYTES // 256 + 1))[:FRAME_BYTES]
    connection.socket.sendall(head(node.endpoint, "PUT", f"/feedback/{key}", FRAME_BYTES * frames, headers))
    sent = []
    start = time.perf_counter()
    for index in range(frames):
        time.sleep(max(0.0, start + index / frames_per_s - time.perf_counter()))
        connection.socket.sendall(body)
        sent.append(time.perf_counter())
    connection.answer()
    connection.close()
    return sent
