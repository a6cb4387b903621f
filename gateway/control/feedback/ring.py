"""A bucket's last events, rendered once, and where each subscriber is in them.

In: entries (a kind, JSON data, the kernel and key that filters look at). Out: chunks of rendered events from a position on, in
the form of a transport. What always holds: numbers start at 1 and have no holes; a subscriber is only a position, so a slow one
costs no memory here; subscribers at the same position with the same filter share one chunk.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Iterator

import msgspec

RING_EVENTS = 16_384
CHUNK_EVENTS = 256
"""Events rendered into one write to a subscriber."""
SCAN_EVENTS = 4096
"""Events a filtering subscriber passes over before it lets others run."""
CHUNKS_KEPT = 16
"""Chunks that are remembered for other subscribers until the next event comes."""


class Gap(msgspec.Struct):
    reason: str
    """``slow``, ``expired`` (away too long) or ``restart``."""
    lost: int | None
    """Events of the bucket that were passed over; None after a restart, when nobody knows."""
    exact: bool
    """False where a filter is set: some of the lost ones may not have matched it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """``kind``: feedback, expired or failed. ``data``: a JSON object. Those of no stream have an empty key."""

    kind: bytes
    kernel: str
    key: bytes
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Filter:
    """Empty fields match everything. What no kernel or no key belongs to is shown to those without that filter, and what
    concerns every kernel to those of any."""

    kernel: str = ""
    key_prefix: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.kernel or self.key_prefix)

    def matches(self, entry: Entry) -> bool:
        return (not self.kernel or entry.kernel in (self.kernel, "")) and entry.key.startswith(self.key_prefix)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How a transport writes events: ``one`` renders (id, kind, data), ``many`` joins what it rendered."""

    name: str
    one: Callable[[bytes, bytes, bytes], bytes]
    many: Callable[[list[bytes]], bytes]


class Ring:
    def __init__(self, size: int = RING_EVENTS) -> None:
        self.epoch = secrets.token_hex(6)
        self.next = 1
        self.subscribers = 0
        self._size = size
        self._entries: list[Entry] = []
        self._waiters: set[asyncio.Future[None]] = set()
        self._chunks: dict[tuple[int, Filter, str], tuple[bytes, int]] = {}

    @property
    def oldest(self) -> int:
        """Number of the oldest event still held (``next`` when there is none)."""
        return self.next - len(self._entries)

    def append(self, entry: Entry) -> None:
        if len(self._entries) < self._size:
            self._entries.append(entry)
        else:
            self._entries[(self.next - 1) % self._size] = entry
        self.next += 1
        self._chunks.clear()

    def wake(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self, timeout_s: float) -> bool:
        """Wait for the next ``wake``; False when there was none in time."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
            return True
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)

    def since(self, number: int) -> Iterator[tuple[int, Entry]]:
        """From ``number`` on, which must not be older than ``oldest``."""
        for current in range(number, self.next):
            yield current, self._entries[(current - 1) % self._size]

    def id(self, number: int) -> bytes:
        return b"%b-%d" % (self.epoch.encode(), number)

    def chunk(self, position: int, wanted: Filter, form: Form) -> tuple[bytes, int]:
        """The next matching events (empty: none), and the position after the last one looked at."""
        known = self._chunks.get((position, wanted, form.name))
        if known is not None:
            return known
        pieces: list[bytes] = []
        end = position
        for number, entry in self.since(position):
            if len(pieces) == CHUNK_EVENTS or number - position == SCAN_EVENTS:
                break
            if wanted.matches(entry):
                pieces.append(form.one(self.id(number), entry.kind, entry.data))
            end = number + 1
        found = (form.many(pieces) if pieces else b""), end
        if len(self._chunks) < CHUNKS_KEPT:
            self._chunks[position, wanted, form.name] = found
        return found

    def position(self, last_event_id: str) -> tuple[int, Gap | None]:
        """Where a subscriber goes on that saw ``last_event_id`` last, and what it has lost. Without one: at the end."""
        if not last_event_id:
            return self.next, None
        epoch, _, number = last_event_id.rpartition("-")
        seen = int(number) if number.isascii() and number.isdigit() and len(number) < 19 else self.next
        if epoch != self.epoch or seen >= self.next:
            return self.oldest, Gap("restart", None, False)
        if seen + 1 < self.oldest:
            return self.oldest, Gap("expired", self.oldest - seen - 1, True)
        return seen + 1, None
