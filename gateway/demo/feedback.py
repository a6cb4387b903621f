"""What the kernel says, followed live: a thread on the control API's stream of server-sent events.

In: ``/v1/feedback`` of one bucket. Out: every event to a callback, with the seconds it took from the kernel to here.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from gateway.demo.node import DemoFailed, DemoNode

CONNECT_TIMEOUT_S = 10.0


class Follower:
    """``with Follower(node, bucket, on_event):``; ``on_event(event, delay_s)`` is called in the thread."""

    def __init__(self, node: DemoNode, bucket: str, on_event: Callable[[dict[str, Any], float], None]) -> None:
        self._on_event = on_event
        self._connection = http.client.HTTPConnection(urlsplit(node.control_url).netloc, timeout=CONNECT_TIMEOUT_S)
        token = base64.b64encode(f"{node.keys.access_key}:{node.keys.secret_key}".encode()).decode()
        self._connection.request("GET", f"/v1/feedback?bucket={bucket}", headers={"Authorization": f"Basic {token}"})
        # The connection forgets its socket once an answer without an end has begun.
        assert self._connection.sock is not None
        self._socket: socket.socket = self._connection.sock
        self._answer = self._connection.getresponse()
        if self._answer.status != 200:
            raise DemoFailed(f"/v1/feedback: answered {self._answer.status}")
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._follow, name="feedback", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def _follow(self) -> None:
        kind = ""
        try:
            for line in self._answer:
                if line.startswith(b"event:"):
                    kind = line[6:].strip().decode()
                elif line.startswith(b"data:") and kind == "feedback":
                    event = json.loads(line[5:])
                    self._on_event(event, time.time() - event["time_ns"] / 1e9)
                elif not line.strip():
                    kind = ""
        except (OSError, http.client.HTTPException):
            return  # the stream was closed, from here or by the node's end
