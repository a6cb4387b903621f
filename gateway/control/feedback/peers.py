"""What other nodes' hubs tell: this node follows each of them, over a WebSocket to its control port.

In: members of the cluster; messages of exchange.py. Out: events into this node's hub, streams into its director, and to whom
which targets belong. Always holds: every node that lives has a task of its own, so one that is dead, slow or cut off holds up
nobody; a link that is silent for SILENCE_S is given up, and what ran at its other end counts as silent from then on; what was
missed is asked for when it is back, as far as the other node still has it, and otherwise told as a gap.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from gateway.control.feedback.director import ActionDirector
from gateway.control.feedback.exchange import (
    BEAT_S,
    ITEM,
    MESSAGE_BYTES_MAX,
    MESSAGES,
    Beat,
    Hello,
    Items,
    Kernels,
    Running,
)
from gateway.control.feedback.executors import Executors
from gateway.control.feedback.hub import FeedbackHub
from ingest.cluster.members import Member, Members
from ingest.cluster.signing import PeerKey, Sender

logger = logging.getLogger(__name__)

PATH = "/v1/internal/feedback"
SILENCE_S = 4 * BEAT_S
CONNECT_S = 3.0
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 2.0
LOOK_S = 0.5
SETTLE_LOOK_S = 0.02
QUEUE_MESSAGES = 16
"""Of one link, received and not yet looked at; then its other end waits."""


@dataclasses.dataclass(slots=True)
class _Known:
    """How far this node is with another one."""

    source: str = ""
    after: int = 0
    orphan: int = 0
    """Number of the last of its orphans that was heard of."""
    connected: bool = False
    complete: bool = False
    """What had happened there before this node heard of it is here."""
    kernels: Kernels = dataclasses.field(default_factory=Kernels)


class Peers:
    """Of one control process. ``ahead_ns``: by how much the cluster's clock is ahead of this machine's."""

    def __init__(
        self,
        members: Members,
        key: PeerKey,
        hub: FeedbackHub,
        director: ActionDirector,
        executors: Executors,
        *,
        tls: ssl.SSLContext | None = None,
        ahead_ns: Callable[[], int] = lambda: 0,
    ) -> None:
        self._members = members
        self._key = key
        self._hub = hub
        self._director = director
        self._executors = executors
        self._tls = tls
        self._ahead_ns = ahead_ns
        self._known: dict[int, _Known] = {}
        self._started_s = time.monotonic()

    def sources(self) -> set[str]:
        """Lives of other nodes' control processes that can be heard."""
        return {known.source for known in self._known.values() if known.connected}

    def links(self) -> dict[str, str]:
        """Node's name -> ``connected`` or ``away``, of those that live."""
        return {
            one.record.name: "connected" if (known := self._known.get(one.node)) and known.connected else "away"
            for one in self._members.others()
            if one.alive
        }

    def kernels(self) -> dict[str, Kernels]:
        """Node's name -> which kernels fail there, as it said last."""
        return {
            member.record.name: known.kernels
            for node, known in self._known.items()
            if (member := self._members.get(node)) is not None
        }

    async def settled(self) -> None:
        """Return once what the others know of the past is here, or some time after the start: whoever subscribes then gets what
        is new, and what it asks for."""
        while time.monotonic() - self._started_s < CONNECT_S:
            others = [one.node for one in self._members.others() if one.alive]
            if self._members.me is not None and all(self._known.get(node, _Known()).complete for node in others):
                return
            await asyncio.sleep(SETTLE_LOOK_S)

    async def run(self) -> None:
        """Forever: follow whoever lives."""
        tasks: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                living = {one.node for one in self._members.others() if one.alive and one.record.control}
                for node in living - tasks.keys():
                    tasks[node] = asyncio.create_task(self._keep(node), name=f"feedback of node {node}")
                for node in tasks.keys() - living:
                    tasks.pop(node).cancel()
                await asyncio.sleep(LOOK_S)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _keep(self, node: int) -> None:
        backoff_s = BACKOFF_FIRST_S
        known = self._known.setdefault(node, _Known())
        while True:
            try:
                member = self._members.get(node)
                if member is not None:
                    await self._follow(member, known)
            except (OSError, TimeoutError, WebSocketException, ValueError, msgspec.MsgspecError) as error:
                logger.debug("the feedback of node %d cannot be followed: %r", node, error)
            if known.connected:
                backoff_s = BACKOFF_FIRST_S
                logger.warning("the feedback of node %d is not heard any more", node)
            self._lost(node, known)
            await asyncio.sleep(backoff_s)
            backoff_s = min(BACKOFF_MAX_S, 2 * backoff_s)

    def _lost(self, node: int, known: _Known) -> None:
        if known.connected:
            known.connected = False
            self._director.node_lost(node)

    async def _follow(self, member: Member, known: _Known) -> None:
        """Until the link breaks: raises OSError, TimeoutError, WebSocketException, ValueError, MsgspecError."""
        me = self._members.me
        if me is None:
            return
        url = urlsplit(member.record.control)
        target = f"{PATH}?source={known.source}&after={known.after}"
        _, signature = self._key.sign(Sender(me.node, me.record.epoch), "GET", target, [], time.time())
        address = f"{'wss' if url.scheme == 'https' else 'ws'}://{url.netloc}{target}"
        try:
            async with connect(
                address,
                additional_headers={"Authorization": signature},
                ssl=self._tls if url.scheme == "https" else None,
                compression=None,
                open_timeout=CONNECT_S,
                ping_interval=None,
                close_timeout=1.0,
                max_size=MESSAGE_BYTES_MAX,
                max_queue=QUEUE_MESSAGES,
                proxy=None,
            ) as socket:
                await self._listen(member, known, socket)
        finally:
            self._lost(member.node, known)

    async def _listen(self, member: Member, known: _Known, socket: ClientConnection) -> None:
        hello = await self._next(socket)
        if not isinstance(hello, Hello) or hello.node != member.node:
            raise ValueError("another node answers at its address")
        # What came before this node had ever heard of it is history: it may be asked for, and moves nothing.
        new = not known.source
        history = hello.next - 1 if new else 0
        if hello.source != known.source:
            known.source, known.after, known.orphan = hello.source, 0, 0
        known.connected = True
        self._executors.told(member.node, hello.outlets)
        logger.info("following the feedback of node %s", member.record.name)
        while True:
            known.complete = known.complete or known.after >= history
            message = await self._next(socket)
            if isinstance(message, Items):
                await self._items(known, message, news=message.after > history)
            elif isinstance(message, Kernels):
                known.kernels = message
            elif isinstance(message, Running):
                fresh = [one for one in message.orphans if one[0] > known.orphan]
                known.orphan = max((known.orphan, *(one[0] for one in message.orphans)))
                # Those of before this node first heard of it are over.
                orphans = [] if new else [(bucket, kernel) for _, bucket, kernel in fresh]
                new = False
                await self._director.prepare({bucket for bucket, _ in (*message.running, *orphans)})
                self._director.streams_of(member.node, message.running, orphans)

    async def _next(self, socket: ClientConnection) -> Hello | Items | Running | Kernels | Beat:
        async with asyncio.timeout(SILENCE_S):
            message: Hello | Items | Running | Kernels | Beat = MESSAGES.decode(await socket.recv(decode=False))
            return message

    async def _items(self, known: _Known, message: Items, *, news: bool) -> None:
        items = [ITEM.decode(raw) for raw in message.items]
        if news:
            await self._director.prepare({item.bucket for item in items if item.event is not None})
        self._hub.heard(known.source, items, message.ahead_ns - self._ahead_ns() if news else None)
        known.after = message.after
