"""A bucket's last events, rendered once, and where each subscriber is in them.

In: entries (a kind, JSON data, the kernel and key that filters look at), each with its source and that source's number. Out:
chunks of rendered events from a position on, in the form of a transport. What always holds: an event is in the ring once;
those of one source are in the order of their numbers, and numbers that never came are told as a gap; a subscriber is only a
position, so a slow one costs no memory here; subscribers at the same position with the same filter share one chunk.

A node alone is one source. In a cluster every node has the events of all nodes, in an order of its own; so an event's id says
of each source how far whoever has seen it is, ``SOURCE-NUMBER`` joined by ``~``, and is understood on every node.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
from collections.abc import Callable, Collection, Iterator

import msgspec

RING_EVENTS = 16_384
CHUNK_EVENTS = 256
"""Events rendered into one write to a subscriber."""
SCAN_EVENTS = 4096
"""Events a filtering subscriber passes over before it lets others run."""
CHUNKS_KEPT = 16
"""Chunks that are remembered for other subscribers until the next event comes."""
SOURCES_MAX = 128
"""In an id; a source is one life of one node's control process."""
ID_BYTES_MAX = 4096
GAP = b"gap"
_PART = re.compile(r"([0-9A-Za-z:]{1,40})-([0-9]{1,18})")


class Gap(msgspec.Struct):
    reason: str
    """``slow``, ``expired`` (away too long), ``link`` (another node's events did not come) or ``restart``."""
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
        if entry.kind == GAP:
            return True
        return (not self.kernel or entry.kernel in (self.kernel, "")) and entry.key.startswith(self.key_prefix)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How a transport writes events: ``one`` renders (id, kind, data), ``many`` joins what it rendered."""

    name: str
    one: Callable[[bytes, bytes, bytes], bytes]
    many: Callable[[list[bytes]], bytes]


@dataclasses.dataclass(slots=True)
class Cursor:
    """Where a subscriber is. ``seen``: numbers by source, of one that came with an id and has seen some of what follows."""

    position: int
    seen: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    entry: Entry
    source: str
    number: int
    id: bytes
    """What whoever has seen everything up to here has seen."""


class Ring:
    def __init__(self, size: int = RING_EVENTS, source: str = "", last: int = 0) -> None:
        """``source``: of the events that are appended without one; ``last``: the number of its last event so far."""
        self.source = source or secrets.token_hex(6)
        self.next = 1
        self.subscribers = 0
        self._size = size
        self._held: list[_Held] = []
        self._last = {self.source: last}
        """Number of the last event of each source."""
        self._gone = {self.source: last}
        """Number of the last event of each source that is not here any more, or never was."""
        self._id = self._floor = render(self._last)
        self._waiters: set[asyncio.Future[None]] = set()
        self._chunks: dict[tuple[int, Filter, str], tuple[bytes, int]] = {}

    @property
    def oldest(self) -> int:
        """Position of the oldest event still held (``next`` when there is none)."""
        return self.next - len(self._held)

    @property
    def last(self) -> int:
        """Number of this node's own last event."""
        return self._last[self.source]

    def append(self, entry: Entry) -> int:
        """One of this node's own; its number."""
        number = self._last[self.source] + 1
        self._append(entry, self.source, number)
        return number

    def append_of(self, source: str, number: int, entry: Entry) -> bool:
        """One of another node; False: it was here before."""
        last = self._last.get(source)
        if last is None:
            self._forget_lives(source)
            self._last[source] = self._gone[source] = last = number - 1
        if number <= last:
            return False
        if number > last + 1:
            gap = Gap("link", number - last - 1, False)
            self._append(Entry(GAP, "", b"", msgspec.json.encode(gap)), source, number - 1)
        self._append(entry, source, number)
        return True

    def _append(self, entry: Entry, source: str, number: int) -> None:
        self._last[source] = number
        self._id = render(self._last)
        held = _Held(entry, source, number, self._id)
        if len(self._held) < self._size:
            self._held.append(held)
        else:
            place = (self.next - 1) % self._size
            over = self._held[place]
            self._gone[over.source], self._floor = over.number, over.id
            self._held[place] = held
        self.next += 1
        self._chunks.clear()

    def _forget_lives(self, source: str) -> None:
        """Earlier lives of a node that comes anew, of which nothing is left here: an id must not grow for ever."""
        node = source.partition(":")[0]
        for known in [one for one in self._last if one.partition(":")[0] == node and one != self.source]:
            if self._gone[known] >= self._last[known] or len(self._last) >= SOURCES_MAX:
                del self._last[known], self._gone[known]

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

    def since(self, position: int) -> Iterator[tuple[int, Entry]]:
        """From ``position`` on, which must not be older than ``oldest``."""
        for current in range(position, self.next):
            yield current, self._at(current).entry

    def _at(self, position: int) -> _Held:
        return self._held[(position - 1) % self._size]

    def id(self, cursor: Cursor) -> bytes:
        """What a subscriber at ``cursor`` has seen."""
        if cursor.seen:
            return render(cursor.seen)
        if cursor.position == self.next:
            return self._id
        return self._at(cursor.position - 1).id if cursor.position > self.oldest else self._floor

    def chunk(self, position: int, wanted: Filter, form: Form) -> tuple[bytes, int]:
        """The next matching events (empty: none), and the position after the last one looked at."""
        known = self._chunks.get((position, wanted, form.name))
        if known is not None:
            return known
        pieces: list[bytes] = []
        end = position
        for current in range(position, self.next):
            if len(pieces) == CHUNK_EVENTS or current - position == SCAN_EVENTS:
                break
            held = self._at(current)
            if wanted.matches(held.entry):
                pieces.append(form.one(held.id, held.entry.kind, held.entry.data))
            end = current + 1
        found = (form.many(pieces) if pieces else b""), end
        if len(self._chunks) < CHUNKS_KEPT:
            self._chunks[position, wanted, form.name] = found
        return found

    def follow(self, cursor: Cursor, wanted: Filter, form: Form) -> bytes:
        """The next matching events for a subscriber, which moves on."""
        if not cursor.seen:
            chunk, cursor.position = self.chunk(cursor.position, wanted, form)
            return chunk
        pieces: list[bytes] = []
        first = cursor.position
        while cursor.position < self.next and len(pieces) < CHUNK_EVENTS and cursor.position - first < SCAN_EVENTS:
            held = self._at(cursor.position)
            cursor.position += 1
            if held.number <= cursor.seen.get(held.source, 0):
                continue
            cursor.seen[held.source] = held.number
            if wanted.matches(held.entry):
                pieces.append(form.one(render(cursor.seen), held.entry.kind, held.entry.data))
        if cursor.position == self.next and all(
            number <= self._last.get(source, 0) for source, number in cursor.seen.items()
        ):
            # It has seen what is here, and nothing else: as everybody from now on.
            cursor.seen = {}
        return form.many(pieces) if pieces else b""

    def resume(self, last_event_id: str, living: Collection[str] = ()) -> tuple[Cursor, Gap | None]:
        """Where a subscriber goes on that saw ``last_event_id`` last, on this node or another, and what it has lost. Without
        one: at the end. ``living``: sources that exist, of which nothing need be here."""
        if not last_event_id:
            return Cursor(self.next), None
        said = parse(last_event_id)
        seen = {
            source: number
            for source, number in said.items()
            if (source in self._last or source in living) and not (source == self.source and number > self.last)
        }
        if not said or len(seen) < len(said):
            return Cursor(self.oldest, seen), Gap("restart", None, False)
        lost = sum(max(0, self._gone.get(source, 0) - number) for source, number in seen.items())
        position = self.oldest
        while position < self.next and (held := self._at(position)).number <= seen.get(held.source, 0):
            position += 1
        gap = Gap("expired", lost, all(source in seen or not gone for source, gone in self._gone.items()))
        return Cursor(position, seen), gap if lost else None


def render(numbers: dict[str, int]) -> bytes:
    """An id."""
    return "~".join(f"{source}-{number}" for source, number in numbers.items()).encode()


def parse(last_event_id: str) -> dict[str, int]:
    """Numbers by source; empty for what is no id."""
    parts = last_event_id.split("~", SOURCES_MAX)
    found = [_PART.fullmatch(part) for part in parts]
    if len(parts) > SOURCES_MAX or not all(found):
        return {}
    return {part[1]: int(part[2]) for part in found if part is not None}
