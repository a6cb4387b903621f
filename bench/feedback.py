"""How long from a frame's last byte to its event at a subscriber: one PUT that streams frames at a steady rate.

The sender notes when the last byte of each frame left its hands; a kernel emits one event a frame; subscribers of every transport
(server-sent events, WebSocket, ZeroMQ) listen at the same time, each in a thread, and note when each event came. All clocks are
this process's, and so is some of the delay: sender and subscribers share its interpreter.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import json
import threading
import time

import zmq
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bench.node import Node
from bench.wire import Connection, head

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


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Frames of ``rows`` × ``columns`` uint16."""

    name: str
    rows: int
    columns: int
    frames: int
    frames_per_s: float

    @property
    def frame_bytes(self) -> int:
        return self.rows * self.columns * 2


CASES = (
    Case("2kB", 32, 32, 1000, 200),
    Case("2MB", 1000, 1000, 500, 100),
    Case("16MB", 2048, 4096, 300, 12.5),
)
"""As fast as the two larger ones go, they bring 200 MB/s: latency, not throughput, is the question. So many frames that the
99th percentile is not the slowest."""


class _Listener(threading.Thread):
    """Arrival times by frame number, of one key or of any."""

    transport = ""

    def __init__(self, node: Node, bucket: str) -> None:
        super().__init__(daemon=True)
        self.arrived: dict[int, float] = {}
        self._key = ""
        token = base64.b64encode(f"{node.endpoint.access_key}:{node.endpoint.secret_key}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}"}
        self._port = node.ports["control"]

    def expect(self, key: str) -> None:
        self._key, self.arrived = key, {}

    def heard(self, events: list[dict[str, object]], now: float) -> None:
        for event in events:
            if "frame" in event and self._key in ("", event["key"]):
                self.arrived.setdefault(int(str(event["frame"])), now)


class Subscriber(_Listener):
    """By server-sent events."""

    transport = "SSE"

    def __init__(self, node: Node, bucket: str) -> None:
        super().__init__(node, bucket)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("GET", f"/v1/feedback?bucket={bucket}", headers=self._headers)
        self._answer = connection.getresponse()
        if self._answer.status != 200:
            raise RuntimeError(f"feedback: {self._answer.status} {self._answer.read(300)!r}")

    def run(self) -> None:
        while line := self._answer.readline():
            if line.startswith(b"data:"):
                now = time.perf_counter()
                self.heard([json.loads(line[5:])], now)


class _WebSocket(_Listener):
    transport = "WebSocket"

    def __init__(self, node: Node, bucket: str) -> None:
        super().__init__(node, bucket)
        url = f"ws://127.0.0.1:{self._port}/v1/feedback?bucket={bucket}"
        self._socket = connect(url, additional_headers=self._headers)
        self._socket.recv()

    def run(self) -> None:
        try:
            while True:
                message = self._socket.recv()
                now = time.perf_counter()
                self.heard(json.loads(message), now)
        except ConnectionClosed:
            return


class _Zmq(_Listener):
    transport = "ZeroMQ"

    def __init__(self, node: Node, bucket: str) -> None:
        super().__init__(node, bucket)
        self._socket = zmq.Context().socket(zmq.SUB)
        self._socket.connect(self._endpoint())
        self._socket.subscribe(b"_heartbeat")
        self._socket.subscribe(f"{bucket}/".encode())
        if not self._socket.poll(10_000):
            raise RuntimeError("feedback: no heartbeat comes by ZeroMQ")

    def _endpoint(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("GET", "/v1/status", headers=self._headers)
        return str(json.loads(connection.getresponse().read())["feedback"]["zmq"]["endpoint"])

    def run(self) -> None:
        while True:
            _, body, _ = self._socket.recv_multipart()
            now = time.perf_counter()
            self.heard([json.loads(body)], now)


class Follower:
    """Subscribed to every transport; ``measure`` streams frames and says how late each was."""

    def __init__(self, node: Node, bucket: str) -> None:
        self._node = node
        self._bucket = bucket
        node.bucket(bucket, "memory")
        node.call("PUT", f"/{bucket}/_kernels/echo.py", KERNEL)
        self._subscribers: list[_Listener] = [Subscriber(node, bucket), _WebSocket(node, bucket), _Zmq(node, bucket)]
        for subscriber in self._subscribers:
            subscriber.start()

    def measure(self, case: Case) -> tuple[dict[str, list[float]], int]:
        """Transport -> sorted delays in ms, one for each frame; and how many frames were reduced from disk."""
        self._warm(case)
        from_disk = self._node.metric("hiss_kernel_catchup_frames_total")
        key = f"timed-{case.name}"
        for subscriber in self._subscribers:
            subscriber.expect(key)
        sent = _stream(self._node, self._bucket, key, case, case.frames)
        deadline = time.monotonic() + 20
        while any(len(one.arrived) < case.frames for one in self._subscribers) and time.monotonic() < deadline:
            time.sleep(0.01)
        delays = {}
        for one in self._subscribers:
            if len(one.arrived) < case.frames:
                raise RuntimeError(
                    f"{case.frames - len(one.arrived)} of {case.frames} events never came by {one.transport}"
                )
            delays[one.transport] = sorted((one.arrived[index] - sent[index]) * 1e3 for index in range(case.frames))
        return delays, int(self._node.metric("hiss_kernel_catchup_frames_total") - from_disk)

    def _warm(self, case: Case) -> None:
        """The first stream of a geometry starts and warms a sandbox in each worker."""
        workers = list(self._node.processes().values()).count("worker")
        sandboxes = self._node.metric("hiss_kernel_sandboxes") + workers
        deadline = time.monotonic() + 30
        number = 0
        while self._node.metric("hiss_kernel_sandboxes") < sandboxes and time.monotonic() < deadline:
            number += 1
            _stream(self._node, self._bucket, f"warm-{case.name}-{number}", case, 5)
        time.sleep(2)


def _stream(node: Node, bucket: str, key: str, case: Case, frames: int) -> list[float]:
    """One PUT, a frame every 1/``frames_per_s``; returns when each frame's last byte was handed to the system."""
    connection = Connection(node.endpoint)
    headers = {"x-amz-meta-frame-dtype": "<u2", "x-amz-meta-frame-shape": f"{case.rows},{case.columns}"}
    body = memoryview(bytes(range(256)) * (case.frame_bytes // 256 + 1))[: case.frame_bytes]
    connection.socket.sendall(head(node.endpoint, "PUT", f"/{bucket}/{key}", case.frame_bytes * frames, headers))
    sent = []
    start = time.perf_counter()
    for index in range(frames):
        time.sleep(max(0.0, start + index / case.frames_per_s - time.perf_counter()))
        connection.socket.sendall(body)
        sent.append(time.perf_counter())
    connection.answer()
    connection.close()
    return sent
