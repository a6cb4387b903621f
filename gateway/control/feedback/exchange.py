"""What this node tells the other nodes' control processes: its own events, which streams arrive here, where it may act.

In: own events and notices with their numbers, running streams. Out: for each node that follows an endless stream of messages.
What always holds: the last ITEMS_KEPT events are kept once, whoever follows; a node that follows is only a position, so one
that is slow, or gone, costs nothing and holds up nobody: it loses the oldest, and the numbers tell it so.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

import msgspec

from ingest.ports import FeedbackEvent
from kernels.notices import Notice as KernelNotice
from kernels.pace import Pace
from kernels.strikes import Strike

ITEMS_KEPT = 65_536
ORPHANS_KEPT = 256
KERNELS_TOLD_MAX = 1000
BATCH_ITEMS = 512
BEAT_S = 1.0
"""A node that says nothing for several of these is not there."""
MESSAGE_BYTES_MAX = 8 << 20

Pair = tuple[str, str]


class Notice(msgspec.Struct, omit_defaults=True):
    """Something happened to an action without an event: its dead-man time is over, or its target did not take a value."""

    kind: str
    """``expired`` or ``failed``."""
    bucket: str
    action: str
    time_ns: int
    value: float | None = None
    """What was, or was to be, written; None: nothing."""
    reason: str = ""
    kernel: str = ""


class Outlets(msgspec.Struct, frozen=True):
    """Which targets of named actions a node may write to."""

    globs: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()


class Item(msgspec.Struct, array_like=True):
    """``number``: of the bucket's events of this node. One of ``event`` and ``notice`` is there."""

    bucket: str
    number: int
    event: FeedbackEvent | None = None
    actions: Mapping[str, str] | None = None
    notice: Notice | None = None


class Hello(msgspec.Struct, tag="hello"):
    """The first message. ``source``: this life of the control process; ``next``: the position of what is still to come."""

    node: int
    source: str
    next: int
    outlets: Outlets


class Items(msgspec.Struct, tag="items"):
    """``after``: the position behind the last of them. ``ahead_ns``: by how much the cluster's clock is ahead of the one that the
    events' times are of."""

    after: int
    ahead_ns: int
    items: list[msgspec.Raw]


class Running(msgspec.Struct, tag="running"):
    """(bucket, kernel) of every stream that arrives at the node. ``orphans``: of streams that a worker took with it when it
    died, whose silence counts, each with a number that grows."""

    running: list[Pair]
    orphans: list[tuple[int, str, str]] = []


class Kernels(msgspec.Struct, tag="kernels"):
    """Kernels that fail at the node, or do not go as they were wanted; how fast they were found to be."""

    strikes: list[Strike] = []
    notices: list[KernelNotice] = []
    paces: list[Pace] = []


class Beat(msgspec.Struct, tag="beat"):
    """It lives, and nothing happened."""


MESSAGES = msgspec.msgpack.Decoder(Hello | Items | Running | Kernels | Beat)
ITEM = msgspec.msgpack.Decoder(Item)
_encode = msgspec.msgpack.Encoder().encode


class Exchange:
    """Of one control process. ``ahead_ns``: see ``Items``."""

    def __init__(self, node: int, source: str, outlets: Outlets, ahead_ns: Callable[[], int] = lambda: 0) -> None:
        self._ahead_ns = ahead_ns
        self.node = node
        self.source = source
        self.outlets = outlets
        self.next = 1
        self._items: collections.deque[bytes] = collections.deque(maxlen=ITEMS_KEPT)
        self._running: dict[object, tuple[Pair, ...]] = {}
        self._orphans: collections.deque[tuple[int, str, str]] = collections.deque(maxlen=ORPHANS_KEPT)
        self._changes = 1
        self._kernels = Kernels()
        self._waiters: set[asyncio.Future[None]] = set()
        self._closed = False

    def tell(self, items: Iterable[Item]) -> None:
        """Never waits."""
        for item in items:
            self._items.append(_encode(item))
            self.next += 1
        self._wake()

    def streams(self, worker: object, running: Sequence[Pair]) -> None:
        self._running[worker] = tuple(running)
        self._changes += 1
        self._wake()

    def lost(self, worker: object) -> None:
        """Its streams end unheard."""
        for bucket, kernel in self._running.pop(worker, ()):
            self._orphans.append((self._changes, bucket, kernel))
            self._changes += 1
        self._wake()

    def kernels(self, strikes: Sequence[Strike], notices: Sequence[KernelNotice], paces: Sequence[Pace]) -> None:
        most = KERNELS_TOLD_MAX
        state = Kernels(list(strikes[:most]), list(notices[:most]), list(paces[:most]))
        if state != self._kernels:
            self._kernels = state
            self._wake()

    def close(self) -> None:
        self._closed = True
        self._wake()

    async def follow(self, source: str, after: int) -> AsyncIterator[bytes]:
        """Messages for a node that has everything of this ``source`` up to position ``after``."""
        position = after if source == self.source and after < self.next else 0
        told = -1
        kernels = Kernels()
        yield _encode(Hello(self.node, self.source, self.next, self.outlets))
        while not self._closed:
            if told != self._changes:
                told = self._changes
                running = sorted({pair for pairs in self._running.values() for pair in pairs})
                yield _encode(Running(running, list(self._orphans)))
                continue
            if kernels is not self._kernels:
                kernels = self._kernels
                yield _encode(kernels)
            position = max(position, self.next - 1 - len(self._items))
            if position < self.next - 1:
                first = len(self._items) - (self.next - 1 - position)
                count = min(BATCH_ITEMS, len(self._items) - first)
                batch = [msgspec.Raw(self._items[first + number]) for number in range(count)]
                position += count
                yield _encode(Items(position, self._ahead_ns(), batch))
            elif not await self._changed():
                yield _encode(Beat())

    async def _changed(self) -> bool:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(BEAT_S):
                await waiter
            return True
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
