"""The feedback hub: takes events from the workers' connections, has actions decided, and wakes the subscribers.

In: messages of kernels/feedback.py on ``run/feedback.sock``; notices of actions (expired, failed); what other nodes' hubs
tell (peers.py). Out: entries in the bucket's ring, messages to the ZeroMQ publisher, what this node tells the others
(exchange.py), and for each subscriber an endless stream of chunks. What always holds: ``publish`` never waits; an event is
rendered once, whoever listens; what comes from another node is never passed on to a third.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import logging
import os
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from gateway.control.feedback.exchange import Exchange, Item, Notice
from gateway.control.feedback.ring import RING_EVENTS, Entry, Filter, Form, Gap, Ring
from ingest.counters import TRANSPORTS, Counters
from ingest.paths import socket_address
from ingest.ports import FeedbackEvent
from kernels.feedback import DECODER, Events

logger = logging.getLogger(__name__)

RINGS_MAX = 512
SUBSCRIBERS_MAX = 256
HEARTBEAT_S = 10.0
MESSAGE_BYTES_MAX = 4 << 20
KEY_BYTES_SHOWN_MAX = 1024
RECEIVE_BYTES = 1 << 20


class TooManySubscribers(Exception):
    """SUBSCRIBERS_MAX streams are open."""


class Director(Protocol):
    """Named actions, as the hub sees them (director.py)."""

    async def prepare(self, buckets: Iterable[str]) -> None:
        """Know the actions of these buckets as of now."""
        ...

    def take(self, event: FeedbackEvent, *, remote: bool = False) -> Mapping[str, str] | None:
        """Decide and act; never waits. Action's name -> what became of the value; None: no action has this code.
        ``remote``: it was emitted on another node."""
        ...

    def streams(self, worker: object, running: Sequence[tuple[str, str]]) -> None:
        """Which (bucket, kernel) arrive through this worker now."""
        ...

    def lost(self, worker: object) -> None:
        """The worker's connection ended; its streams with it, for better or worse."""
        ...


class Followed(Protocol):
    """The other nodes, as the hub sees them (peers.py)."""

    async def settled(self) -> None:
        """What they know of the past is here."""
        ...

    def sources(self) -> Collection[str]:
        """Which of them can be heard."""
        ...


class Publisher(Protocol):
    """A transport that has no subscribers here: ZeroMQ (zeromq.py)."""

    def send(self, bucket: str, entry: Entry) -> None: ...


class _Shown(msgspec.Struct, omit_defaults=True):
    """An event as subscribers see it."""

    bucket: str
    key: str
    kernel: str
    frame: int
    code: int
    value: float
    time_ns: int
    key_base64: str = ""
    """Only for a key that is not UTF-8."""
    late: bool = False
    """The frame was judged from disk, after the fact."""
    actions: Mapping[str, str] | None = None
    """Action's name -> outcome."""


def entry_of(event: FeedbackEvent, actions: Mapping[str, str] | None) -> Entry:
    key = event.key[:KEY_BYTES_SHOWN_MAX]
    try:
        text, encoded = key.decode(), ""
    except UnicodeDecodeError:
        text, encoded = key.decode("utf-8", "replace"), base64.b64encode(event.key).decode()
    shown = _Shown(
        event.bucket, text, event.kernel, event.frame, event.code, event.value, event.time_ns, encoded, not event.live,
        actions,
    )  # fmt: skip
    return Entry(b"feedback", event.kernel, event.key, msgspec.json.encode(shown))


def entry_of_notice(notice: Notice) -> Entry:
    """It has no key: it is for those who may read the whole bucket."""
    return Entry(notice.kind.encode(), notice.kernel, b"", msgspec.json.encode(notice))


class FeedbackHub:
    """One for the node, in the control process. ``listen`` then ``close`` on its loop."""

    def __init__(
        self,
        counters: Counters,
        *,
        director: Director | None = None,
        publisher: Publisher | None = None,
        ring_events: int = RING_EVENTS,
        heartbeat_s: float = HEARTBEAT_S,
        exchange: Exchange | None = None,
    ) -> None:
        """``exchange``: on a node of a cluster, what it tells the others."""
        self.exchange = exchange
        self.peers: Followed | None = None
        """On a node of a cluster."""
        self._source = secrets.token_hex(6) if exchange is None else exchange.source
        self._numbers: dict[str, int] = {}
        """Of each bucket whose ring was given up: the number of its last event of this node."""
        self._ring_events = ring_events
        self._heartbeat_s = heartbeat_s
        self._director = director
        self._publisher = publisher
        self._rings: dict[str, Ring] = {}
        self._open = dict.fromkeys(TRANSPORTS, 0)
        self._subscribers = {name: counters.cell("hiss_feedback_subscribers", name) for name in TRANSPORTS}
        self._lost = {name: counters.cell("hiss_feedback_lost_total", name) for name in TRANSPORTS}
        for cell in self._subscribers.values():
            cell.set(0)
        self._closed = False
        self._server: asyncio.Server | None = None
        self._workers: set[asyncio.Task[None]] = set()

    # -- from the workers

    async def listen(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._server = await asyncio.start_unix_server(self._worker, socket_address(path), limit=RECEIVE_BYTES)

    async def _worker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._workers.add(task)
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(4), "little")
                if length > MESSAGE_BYTES_MAX:
                    raise ValueError(f"a feedback message of {length} bytes")
                message = DECODER.decode(await reader.readexactly(length))
                if isinstance(message, Events):
                    if self._director is not None:
                        await self._director.prepare({event.bucket for event in message.events})
                    self.publish(message.events)
                else:
                    await self._streams(task, message.running)
        except (asyncio.IncompleteReadError, ConnectionError):
            logger.debug("a worker closed its feedback connection")
        except (ValueError, msgspec.MsgspecError) as error:
            logger.warning("closed a feedback connection: %s", error)
        finally:
            self._workers.discard(task)
            if self._director is not None:
                self._director.lost(task)
            if self.exchange is not None:
                self.exchange.lost(task)
            writer.close()

    async def _streams(self, worker: object, running: Sequence[tuple[str, str]]) -> None:
        if self.exchange is not None:
            self.exchange.streams(worker, running)
        if self._director is not None:
            await self._director.prepare({bucket for bucket, _ in running})
            self._director.streams(worker, running)

    def publish(self, events: Iterable[FeedbackEvent]) -> None:
        """Hand events to actions and subscribers; never waits."""
        # Actions first: an instrument must not wait until the events of a whole batch are rendered.
        director = self._director
        decided = [(event, director.take(event) if director is not None else None) for event in events]
        numbers = self._append([(event.bucket, entry_of(event, actions)) for event, actions in decided])
        if self.exchange is not None:
            self.exchange.tell(
                Item(event.bucket, number, event, actions)
                for number, (event, actions) in zip(numbers, decided, strict=True)
            )

    def notice(self, notice: Notice) -> None:
        """Tell the bucket's subscribers about an action."""
        (number,) = self._append([(notice.bucket, entry_of_notice(notice))])
        if self.exchange is not None:
            self.exchange.tell([Item(notice.bucket, number, notice=notice)])

    def _append(self, entries: Sequence[tuple[str, Entry]]) -> list[int]:
        """The events' numbers."""
        numbers = []
        touched = {}
        for bucket, entry in entries:
            ring = self._ring(bucket)
            numbers.append(ring.append(entry))
            touched[id(ring)] = ring
            if self._publisher is not None:
                self._publisher.send(bucket, entry)
        for ring in touched.values():
            ring.wake()
        return numbers

    # -- from other nodes

    def heard(self, source: str, items: Iterable[Item], shift_ns: int | None) -> None:
        """What another node's hub told; never waits. ``shift_ns``: what its times are behind this machine's clock; None: it is
        old, kept for those who ask for it."""
        touched = {}
        for item in items:
            if item.event is not None:
                entry = entry_of(item.event, item.actions)
            elif item.notice is not None:
                entry = entry_of_notice(item.notice)
            else:
                continue
            ring = self._ring(item.bucket)
            if not ring.append_of(source, item.number, entry):
                continue
            touched[id(ring)] = ring
            if shift_ns is None:
                continue
            if self._director is not None and item.event is not None:
                event = dataclasses.replace(item.event, time_ns=item.event.time_ns + shift_ns)
                self._director.take(event, remote=True)
            if self._publisher is not None:
                self._publisher.send(item.bucket, entry)
        for ring in touched.values():
            ring.wake()

    def _ring(self, bucket: str) -> Ring:
        ring = self._rings.pop(bucket, None)
        if ring is None:
            if len(self._rings) >= RINGS_MAX:
                # The bucket that was quiet for longest; one somebody listens to is kept (there are at most SUBSCRIBERS_MAX).
                quiet = next(name for name, held in self._rings.items() if not held.subscribers)
                self._numbers[quiet] = self._rings.pop(quiet).last
            ring = Ring(self._ring_events, self._source, self._numbers.pop(bucket, 0))
        self._rings[bucket] = ring
        return ring

    # -- to the subscribers

    def subscribe(self, bucket: str, wanted: Filter, form: Form, *, last_event_id: str) -> AsyncIterator[bytes]:
        """An endless stream of chunks in ``form``. Raises TooManySubscribers."""
        if self._closed or sum(self._open.values()) >= SUBSCRIBERS_MAX:
            raise TooManySubscribers
        return self._stream(bucket, wanted, form, last_event_id)

    async def _stream(self, bucket: str, wanted: Filter, form: Form, last_event_id: str) -> AsyncIterator[bytes]:
        ring = self._ring(bucket)
        self._count(ring, form, 1)
        try:
            if self.peers is not None:
                await self.peers.settled()
            cursor, gap = ring.resume(last_event_id, () if self.peers is None else self.peers.sources())

            def single(kind: bytes, data: bytes) -> bytes:
                return form.many([form.one(ring.id(cursor), kind, data)])

            yield single(b"ready", b"{}")
            while not self._closed:
                if cursor.position < ring.oldest:
                    gap = Gap("slow", ring.oldest - cursor.position, not cursor.seen)
                    cursor.position = ring.oldest
                if gap is not None:
                    gap.exact = gap.exact and not wanted
                    self._lost[form.name].add(gap.lost or 0)
                    yield single(b"gap", msgspec.json.encode(gap))
                    gap = None
                    continue
                chunk = ring.follow(cursor, wanted, form)
                if chunk:
                    yield chunk
                elif cursor.position < ring.next:
                    await asyncio.sleep(0)
                elif not await ring.changed(self._heartbeat_s):
                    yield single(b"heartbeat", b"{}")
        finally:
            self._count(ring, form, -1)

    def _count(self, ring: Ring, form: Form, step: int) -> None:
        ring.subscribers += step
        self._open[form.name] += step
        self._subscribers[form.name].set(self._open[form.name])

    async def close(self) -> None:
        """End every stream and every worker's connection."""
        self._closed = True
        if self.exchange is not None:
            self.exchange.close()
        for ring in self._rings.values():
            ring.wake()
        if self._server is not None:
            self._server.close()
        workers = list(self._workers)
        for task in workers:
            task.cancel()
        for task in workers:
            with contextlib.suppress(asyncio.CancelledError):
                await task
