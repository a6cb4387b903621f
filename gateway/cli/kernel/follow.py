"""A kernel's feedback, followed from outside: server-sent events with reconnection.

In: a ``Node``, bucket and kernel. Out: events in a bounded queue, filled by a thread. What always holds: after a broken
connection the stream goes on where it was (``Last-Event-ID``); what was lost is counted; nothing here ends before ``close``
except by a refusal, which ``error`` then names.
"""

from __future__ import annotations

import collections
import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from gateway.cli.node import Node
from gateway.cli.s3put import delay_s

READ_TIMEOUT_S = 30.0
"""The node says something every ten seconds."""
QUEUE_MAX = 65_536
_ATTEMPT_MAX = 6
"""Back-off stops growing there."""


class Follower:
    """``start`` it, then ``take`` what came since the last time."""

    def __init__(self, found: Node, bucket: str, kernel: str, key_prefix: str = "") -> None:
        self._node = found
        self._arguments = {"bucket": bucket, "kernel": kernel, "key_prefix": key_prefix}
        self._events: queue.Queue[dict[str, Any]] = queue.Queue(QUEUE_MAX)
        self._last_id = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feedback", daemon=True)
        self.connected = threading.Event()
        self.lost = 0
        """Events that a gap told of, or that found no room here."""
        self.reconnections = 0
        self.error = ""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """The thread ends at its next word from the node; the process does not wait for it."""
        self._closed.set()

    def take(self) -> list[dict[str, Any]]:
        """What came since, oldest first."""
        found: list[dict[str, Any]] = []
        while len(found) < QUEUE_MAX:
            try:
                found.append(self._events.get_nowait())
            except queue.Empty:
                break
        return found

    def _run(self) -> None:
        import httpx

        attempt = 0
        while not self._closed.is_set():
            try:
                with self._node.control() as client:
                    client.timeout = httpx.Timeout(READ_TIMEOUT_S, connect=5.0)
                    headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
                    with client.stream("GET", "/v1/feedback", params=self._arguments, headers=headers) as answer:
                        if answer.status_code in (401, 403, 404):
                            answer.read()
                            self.error = f"/v1/feedback: answered {answer.status_code}: {_detail(answer.text)}"
                            return
                        if answer.status_code == 200:
                            attempt = 0
                            self.connected.set()
                            self._listen(answer.iter_lines())
            except httpx.TransportError:
                pass  # a node that starts anew, a network that was away: go on below
            self.connected.clear()
            if self._closed.is_set():
                return
            attempt = min(attempt + 1, _ATTEMPT_MAX)
            self.reconnections += 1
            self._closed.wait(delay_s(attempt, None))

    def _listen(self, lines: Iterable[str]) -> None:
        for name, event_id, data in server_sent(lines):
            if self._closed.is_set():
                return
            if event_id:
                self._last_id = event_id
            if name == "feedback":
                try:
                    self._events.put_nowait(json.loads(data))
                except queue.Full:
                    self.lost += 1
            elif name == "gap":
                self.lost += json.loads(data)["lost"] or 0


def server_sent(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(event, id, data) of each message: WHATWG HTML section 9.2.6. A message that only moves the id on has no data."""
    name, event_id = "", ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data or event_id:
                yield name or "message", event_id, "\n".join(data)
            name, event_id, data = "", "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "id":
            event_id = value
        elif field == "data":
            data.append(value)


def _detail(text: str) -> str:
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


class Pulse:
    """Events a second, for a rate and a sparkline. The clock is the caller's."""

    BARS = "▁▂▃▄▅▆▇█"

    def __init__(self, seconds: int = 60) -> None:
        self._counts: collections.deque[tuple[int, int]] = collections.deque(maxlen=seconds)
        self._seconds = seconds

    def add(self, count: int, now_s: float) -> None:
        second = int(now_s)
        if self._counts and self._counts[-1][0] == second:
            self._counts[-1] = (second, self._counts[-1][1] + count)
        else:
            self._counts.append((second, count))

    def rate(self, now_s: float, window_s: int = 5) -> float:
        """Mean over the last whole seconds."""
        recent = [count for second, count in self._counts if int(now_s) - window_s <= second < int(now_s)]
        return sum(recent) / window_s

    def sparkline(self, now_s: float) -> str:
        by_second = dict(self._counts)
        values = [by_second.get(second, 0) for second in range(int(now_s) - self._seconds + 1, int(now_s) + 1)]
        most = max(values)
        top = len(self.BARS) - 1
        return "".join(self.BARS[-(-value * top // most)] if most else self.BARS[0] for value in values)


def clock_text(time_ns: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_ns / 1e9)) + f".{time_ns // 1_000_000 % 1000:03d}"
