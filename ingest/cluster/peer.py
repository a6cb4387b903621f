"""The other nodes as this process reaches them: reading bytes that they hold, giving them second copies of ours.

In: a member to ask, an object id, a range, or views of memory as a body arrives. Out: ``Fetched``, whose ``chunks`` are
views of a few buffers; ``MirrorStream``, which ends when the other node has written, flushed and held what it was sent.
Always holds: every request is signed and every wait bounded; what goes wrong is ``NodeAway``, which names the node; a
connection of which the state is not known for certain is closed, never used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol
from urllib.parse import quote, urlsplit

import msgspec

from ingest.cluster.signing import PeerKey, Sender
from ingest.cluster.wire import Answer, Ring, Wire, WireError
from ingest.errors import BufferFull, NodeAway
from ingest.records import Extent, LifetimeClass

PREFIX = "/-/"
OBJECT_FIELD = "x-hiss-extents"
SETTLE_FIELD = "x-hiss-settle"
BUCKET_FIELD, KEY_FIELD, LIFETIME_FIELD = "x-hiss-bucket", "x-hiss-key", "x-hiss-lifetime"
EXTENTS_PER_FETCH = 256
"""Extents named in one request: what a head has room for."""
BUFFER_BYTES = 512 << 10
SEND_BYTES_MAX = 1 << 20
"""Most bytes on their way at a time: how finely it is known what memory is free again."""
DOCUMENT_BYTES_MAX = 64 << 10
SETTLE_S = 20.0


class PeerAddress(Protocol):
    """What must be known of a member to speak to it (``ingest.cluster.members.Member``)."""

    @property
    def node(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def s3(self) -> str:
        """URL of its S3 port: ``http://HOST:PORT`` or ``https://…``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class PeerLimits:
    connect_s: float = 3.0
    answer_s: float = 10.0
    """From the head of a read to its answer's; SETTLE_S more where the bytes must be written first."""
    ask_s: float = 5.0
    """To the word whether there is room for a body."""
    durable_s: float = 30.0
    """From the last byte of a mirrored body to the word that it is on the disk."""
    stall_s: float = 10.0
    """Longest time without a byte taken or given, in the middle of a body."""
    idle_s: float = 20.0
    """An idle connection is used again for so long: the other side closes it later."""
    idle_connections: int = 8
    """Kept for each member."""
    fetches: int = 192
    """At the same time; the others wait. Each has RING_BUFFERS × BUFFER_BYTES at most."""


class MirrorAnswer(msgspec.Struct, frozen=True):
    """What a node says of a body that it has stored, and that the catalogue holds as a second copy by now."""

    node: int
    length: int
    crc64nvme: str
    """16 hex digits."""


@dataclasses.dataclass(frozen=True, slots=True)
class MirrorOf:
    """What a node is told of a body before it comes: what its labels say, and which segments it goes to."""

    object_id: bytes
    bucket: str
    key: bytes
    length: int | None
    lifetime: LifetimeClass = LifetimeClass.STREAM


class PeerClient:
    """Connections from this process to all others. One event loop."""

    def __init__(
        self,
        key: PeerKey,
        sender: Callable[[], Sender],
        *,
        tls: ssl.SSLContext | None = None,
        limits: PeerLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``sender``: this node, in its present life. ``tls``: for members whose address is https."""
        self.limits = limits or PeerLimits()
        self._key = key
        self._sender = sender
        self._tls = tls
        self._clock = clock
        self._idle: dict[str, list[tuple[Wire, float]]] = {}
        self._fetching = asyncio.Semaphore(self.limits.fetches)
        self._closed = False

    # -- reading

    async def fetch(
        self,
        member: PeerAddress,
        object_id: bytes,
        start: int,
        stop: int,
        *,
        base: int = 0,
        extents: Sequence[Extent] = (),
        settle: bool = False,
    ) -> Fetched:
        """Open bytes [start, stop) of a version of which ``member`` holds them all. ``extents`` (of which the first begins
        at body offset ``base``): where they are, as far as is known here; the member knows better. ``settle``: they may be in its
        memory only. Raises NodeAway, also where it does not have them."""
        fields = [("range", f"bytes={start}-{stop - 1}")]
        if extents:
            fields.append((OBJECT_FIELD, encode_extents(base, extents)))
        if settle:
            fields.append((SETTLE_FIELD, "1"))
        try:
            async with asyncio.timeout(self.limits.answer_s):
                await self._fetching.acquire()
        except TimeoutError:
            raise NodeAway(member.name, "too many reads from other nodes are waiting") from None
        try:
            path = f"{PREFIX}object/{object_id.hex()}"
            wire, answer = await self._asked(member, "GET", path, fields, self.limits.answer_s + settle * SETTLE_S)
            if answer.status != 206 or answer.length != stop - start:
                raise await self._refusal(member, wire, answer)
            ring = Ring(min(BUFFER_BYTES, max(4096, stop - start)))
            wire.receive(answer.length, ring)
            return Fetched(self, member, wire, answer)
        except BaseException:
            self._fetching.release()
            raise

    async def fetched(self, member: PeerAddress, wire: Wire, *, clean: bool) -> None:
        self._fetching.release()
        self.give_back(member, wire, clean=clean)

    # -- writing

    async def mirror(self, member: PeerAddress, body: MirrorOf, *, ask: bool = True) -> MirrorStream:
        """Begin to store a body's second copy at ``member``. ``ask``: wait until it says that it has room. Raises NodeAway,
        BufferFull."""
        fields = [
            (BUCKET_FIELD, body.bucket),
            (KEY_FIELD, quote(body.key, safe="")),
            (LIFETIME_FIELD, body.lifetime.value),
        ]
        chunked = body.length is None
        fields.append(("transfer-encoding", "chunked") if chunked else ("content-length", str(body.length)))
        path = f"{PREFIX}mirror/{body.object_id.hex()}"
        if not ask:
            wire = await self._connected(member)
            try:
                self._send_head(member, wire, "PUT", path, fields)
            except WireError as error:
                raise NodeAway(member.name, str(error)) from None
            return MirrorStream(self, member, wire, chunked=chunked)
        wire, answer = await self._asked(member, "PUT", path, [*fields, ("expect", "100-continue")], self.limits.ask_s)
        if answer.status != 100:
            raise await self._refusal(member, wire, answer)
        return MirrorStream(self, member, wire, chunked=chunked)

    # -- connections

    async def _asked(
        self, member: PeerAddress, method: str, path: str, fields: list[tuple[str, str]], timeout_s: float
    ) -> tuple[Wire, Answer]:
        """Send a head, wait for the answer's. A connection that was idle may have been closed meanwhile: then once more."""
        for fresh in (False, True):
            wire = None if fresh else self._take_idle(member)
            reused = wire is not None
            if wire is None:
                wire = await self._connect(member)
            try:
                self._send_head(member, wire, method, path, fields)
                return wire, await wire.answer(timeout_s)
            except WireError as error:
                wire.fail(str(error))
                if not reused:
                    raise NodeAway(member.name, str(error)) from None
            except BaseException:
                wire.fail("given up")
                raise
        raise AssertionError("unreachable")

    def _send_head(
        self, member: PeerAddress, wire: Wire, method: str, path: str, fields: list[tuple[str, str]]
    ) -> None:
        signature = self._key.sign(self._sender(), method, path, fields, self._clock())
        lines = [f"{method} {path} HTTP/1.1", f"host: {urlsplit(member.s3).netloc}"]
        lines += [f"{name}: {value}" for name, value in (*fields, signature)]
        wire.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    async def _connected(self, member: PeerAddress) -> Wire:
        return self._take_idle(member) or await self._connect(member)

    def _take_idle(self, member: PeerAddress) -> Wire | None:
        idle = self._idle.get(member.s3, [])
        now = time.monotonic()
        while idle:
            wire, since = idle.pop()
            if wire.alive and now - since < self.limits.idle_s:
                return wire
            wire.fail("idle for too long")
        return None

    async def _connect(self, member: PeerAddress) -> Wire:
        parts = urlsplit(member.s3)
        tls = None
        if parts.scheme == "https":
            tls = self._tls
            if tls is None:
                raise NodeAway(member.name, "speaks TLS, and this node has no certificate to know it by")
        try:
            async with asyncio.timeout(self.limits.connect_s):
                _, wire = await asyncio.get_running_loop().create_connection(
                    lambda: Wire(self.limits.stall_s),
                    parts.hostname or "",
                    parts.port or (443 if tls else 80),
                    ssl=tls,
                )
        except TimeoutError:
            raise NodeAway(member.name, f"cannot be reached within {self.limits.connect_s:g} seconds") from None
        except OSError as error:
            raise NodeAway(member.name, f"cannot be reached: {error.strerror or error}") from None
        return wire

    def give_back(self, member: PeerAddress, wire: Wire, *, clean: bool) -> None:
        """``clean``: the connection is between two requests."""
        idle = self._idle.setdefault(member.s3, [])
        if clean and not self._closed and len(idle) < self.limits.idle_connections and wire.rest():
            idle.append((wire, time.monotonic()))
        else:
            wire.fail("not needed any more")

    async def _refusal(self, member: PeerAddress, wire: Wire, answer: Answer) -> NodeAway | BufferFull:
        """Read the rest of a refusal. The connection is closed: a body may be due on it."""
        document = b""
        try:
            with contextlib.suppress(WireError):
                document = await wire.document(answer.length, DOCUMENT_BYTES_MAX)
        finally:
            wire.fail("refused")
        return refusal(member, answer, document)

    async def close(self) -> None:
        self._closed = True
        for idle in self._idle.values():
            for wire, _ in idle:
                wire.fail("closing")
        self._idle.clear()


class Fetched:
    """An opened range on another node. Read it once, to the end or to ``close``."""

    def __init__(self, client: PeerClient, member: PeerAddress, wire: Wire, answer: Answer) -> None:
        self._client = client
        self._member = member
        self._wire: Wire | None = wire
        self._answer = answer

    async def __aenter__(self) -> Fetched:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def chunks(self, size_bytes: int = BUFFER_BYTES) -> AsyncGenerator[memoryview, None]:
        """The bytes in order, as they come (``size_bytes`` is for readers of files); each view is valid until the next is asked
        for. Raises NodeAway."""
        wire = self._wire
        assert wire is not None
        try:
            while (view := await wire.take()) is not None:
                yield view
            await self._done(clean=self._answer.keep)
        except WireError as error:
            raise NodeAway(self._member.name, str(error)) from None
        finally:
            await self.close()

    async def close(self) -> None:
        """Give up what was not read; idempotent."""
        await self._done(clean=False)

    async def _done(self, *, clean: bool) -> None:
        if self._wire is not None:
            wire, self._wire = self._wire, None
            await self._client.fetched(self._member, wire, clean=clean)


class MirrorStream:
    """A body on its way to another node. In order: ``send`` …, ``finish``; or ``abort`` at any time."""

    def __init__(self, client: PeerClient, member: PeerAddress, wire: Wire, *, chunked: bool) -> None:
        self.member = member
        self._client = client
        self._wire: Wire | None = wire
        self._chunked = chunked

    async def send(self, view: memoryview) -> int:
        """Send some of ``view``; the count's memory is free again on return. Raises NodeAway: what it took is of no use."""
        wire = self._alive()
        try:
            if wire.answered:
                await self._answered(wire)
            view = view[:SEND_BYTES_MAX]
            if self._chunked:
                wire.write(b"%x\r\n" % len(view))
            await wire.send(view)
            if self._chunked:
                wire.write(b"\r\n")
            return len(view)
        except WireError as error:
            self.abort()
            raise NodeAway(self.member.name, str(error)) from None
        except BaseException:
            # Cancelled: the transport may still read from the view, and only the end of the connection ends that.
            self.abort()
            raise

    async def finish(self) -> MirrorAnswer:
        """Everything was sent: wait until it is durable there and held. Raises NodeAway, BufferFull."""
        wire = self._alive()
        try:
            if self._chunked:
                wire.write(b"0\r\n\r\n")
            answer, document = await self._answered(wire)
            said = msgspec.json.decode(document, type=MirrorAnswer)
        except (WireError, msgspec.MsgspecError) as error:
            self.abort()
            raise NodeAway(self.member.name, str(error)) from None
        except BaseException:
            self.abort()
            raise
        self._wire = None
        self._client.give_back(self.member, wire, clean=answer.keep)
        return said

    def lost(self, reason: str) -> None:
        """The node is known to have gone: whoever waits for it fails with this."""
        if self._wire is not None:
            self._wire.fail(reason)

    def abort(self) -> None:
        """Give the copy up; what has arrived of it is dropped there. Idempotent."""
        if self._wire is not None:
            wire, self._wire = self._wire, None
            wire.fail("given up")

    def _alive(self) -> Wire:
        if self._wire is None:
            raise NodeAway(self.member.name, "the copy was given up")
        return self._wire

    async def _answered(self, wire: Wire) -> tuple[Answer, bytes]:
        """The answer to the body, which is final. Raises NodeAway or BufferFull unless it is the one hoped for."""
        answer = await wire.answer(self._client.limits.durable_s)
        while answer.status < 200:
            answer = await wire.answer(self._client.limits.durable_s)
        document = await wire.document(answer.length, DOCUMENT_BYTES_MAX)
        if answer.status != 200:
            raise refusal(self.member, answer, document)
        return answer, document


class NotThere(NodeAway):
    """The node is there, and does not hold these bytes (any more)."""


def refusal(member: PeerAddress, answer: Answer, document: bytes) -> NodeAway | BufferFull:
    """What an answer that is not the one hoped for means."""
    said = error_message(document)
    if answer.status == 503 and said.startswith("SlowDown"):
        return BufferFull(f"node {member.name} has no room for another copy")
    return (NotThere if answer.status == 404 else NodeAway)(member.name, f"answered {answer.status} {said}".strip())


def error_message(document: bytes) -> str:
    """Code and message of an S3 error document, as plain text."""
    found = []
    for tag in (b"Code", b"Message"):
        _, opened, rest = document.partition(b"<%b>" % tag)
        text, closed, _ = rest.partition(b"</%b>" % tag)
        if opened and closed:
            found.append(text[:500].decode("utf-8", "replace"))
    return ": ".join(found)


def encode_extents(base: int, extents: Sequence[Extent]) -> str:
    """For OBJECT_FIELD: where the first extent begins in the body, then slot, segment, generation, offset, length of each."""
    places = (f"{e.slot}.{e.segment}.{e.generation}.{e.offset}.{e.length}" for e in extents)
    return f"{base};" + ",".join(places)


def decode_extents(text: str, node: int) -> tuple[int, tuple[Extent, ...]]:
    """Raises ValueError for what ``encode_extents`` does not make."""
    base, _, places = text.partition(";")
    extents = []
    for place in places.split(","):
        slot, segment, generation, offset, length = (_whole(number) for number in place.split("."))
        extents.append(Extent(node, slot, segment, generation, offset, length))
    if len(extents) > EXTENTS_PER_FETCH:
        raise ValueError(f"more than {EXTENTS_PER_FETCH} extents")
    return _whole(base), tuple(extents)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{text[:30]!r} is no whole number")
    return int(text)
