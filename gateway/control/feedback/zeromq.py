"""Feedback as a ZeroMQ PUB socket: every event of every bucket, for programs on the beamline's own machines.

Messages have three parts: the topic ``BUCKET/KERNEL`` (a subscription is a prefix of it), the event as a JSON object (with
``event``: feedback, expired or failed), and its number in this topic, 8 bytes big-endian. PUB drops for a subscriber whose queue
(QUEUE_MESSAGES) is full and tells nobody, so whoever sees a number that is not the last plus 1 knows what it lost; a number that
does not grow means that the node's control process is new. Every HEARTBEAT_S a message of the topic ``_heartbeat`` (no bucket
can have that name) says the last number of each topic, so that a lost last event shows, too.

What always holds: ``send`` never waits (a PUB socket drops instead; its own thread does the network); without CURVE keys nobody
is asked who they are, so the setting takes loopback addresses only; with keys only clients of the folder are let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from pathlib import Path

import msgspec
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from gateway.control.feedback.ring import Entry
from ingest.counters import Counters

logger = logging.getLogger(__name__)

QUEUE_MESSAGES = 10_000
"""Most messages that wait for one subscriber."""
HEARTBEAT_S = 1.0
HEARTBEAT_TOPIC = b"_heartbeat"
TOPICS_MAX = 4096
RETRY_S = 5.0
_INCOMING_BYTES_MAX = 1024
_PEER_TIMEOUT_MS = 30_000


class _Heartbeat(msgspec.Struct):
    epoch: str
    """New with every start of the control process, when numbers begin at 1 again."""
    time_ns: int
    last: dict[str, int]
    """Topic -> number of its last message."""
    event: str = "heartbeat"


class ZmqPublisher:
    """Implements ``hub.Publisher``. ``run`` binds, and beats until it is cancelled."""

    def __init__(
        self,
        endpoint: str,
        counters: Counters,
        *,
        key_file: Path | None = None,
        clients: Path | None = None,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self.endpoint = ""
        """Where it is bound; empty before."""
        self.error = ""
        self._wanted = endpoint
        self._key_file = key_file
        self._clients = clients
        self._heartbeat_s = heartbeat_s
        self._epoch = secrets.token_hex(6)
        self._numbers: dict[bytes, int] = {}
        self._beats = 0
        self._sent = counters.cell("hiss_feedback_zmq_messages_total")
        self._socket: zmq.Socket[bytes] | None = None

    def send(self, bucket: str, entry: Entry) -> None:
        topic = f"{bucket}/{entry.kernel}".encode()
        number = self._numbers.pop(topic, 0) + 1
        if len(self._numbers) >= TOPICS_MAX:
            del self._numbers[next(iter(self._numbers))]
        self._numbers[topic] = number
        body = b'{"event":"%b",%b' % (entry.kind, entry.data[1:])
        self._send(topic, body, number)

    def _send(self, topic: bytes, body: bytes, number: int) -> None:
        if self._socket is None:
            return
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart([topic, body, number.to_bytes(8, "big")], zmq.DONTWAIT)
            self._sent.add()

    async def run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        authenticator: ThreadAuthenticator | None = None
        try:
            if self._clients is not None:
                authenticator = ThreadAuthenticator(context)
                authenticator.start()
                authenticator.configure_curve(domain="*", location=str(self._clients))
            while True:
                try:
                    self._socket = self._bound(context)
                    break
                except (zmq.ZMQError, OSError, ValueError) as error:
                    self.error = str(error)
                    logger.error("feedback cannot be published at %s: %s; trying again", self._wanted, error)
                    await asyncio.sleep(RETRY_S)
            self.error = ""
            while True:
                self._beat()
                await asyncio.sleep(self._heartbeat_s)
        finally:
            if self._socket is not None:
                self._socket.close(linger=0)
                self._socket = None
            if authenticator is not None:
                await asyncio.to_thread(authenticator.stop)
            context.destroy(linger=0)

    def _bound(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.PUB)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
            socket.setsockopt(zmq.MAXMSGSIZE, _INCOMING_BYTES_MAX)
            socket.setsockopt(zmq.HEARTBEAT_IVL, _PEER_TIMEOUT_MS // 3)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _PEER_TIMEOUT_MS)
            socket.setsockopt(zmq.IPV6, int(self._wanted.startswith("tcp://[")))
            if self._key_file is not None:
                public, secret = zmq.auth.load_certificate(self._key_file)
                if secret is None:
                    raise ValueError(f"{self._key_file} holds no secret key")
                socket.curve_publickey, socket.curve_secretkey = public, secret
                socket.curve_server = True
            socket.bind(self._wanted)
        except BaseException:
            socket.close(linger=0)
            raise
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        logger.info("feedback is published at %s", self.endpoint)
        return socket

    def _beat(self) -> None:
        self._beats += 1
        last = {topic.decode(): number for topic, number in self._numbers.items()}
        self._send(HEARTBEAT_TOPIC, msgspec.json.encode(_Heartbeat(self._epoch, time.time_ns(), last)), self._beats)
