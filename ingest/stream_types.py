"""What the protocol rooms and the buffer say to each other about one body: its specification, its digest, the data plane."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Protocol

from ingest.bucket_settings import BucketSettings
from ingest.ports import BodySink, Catalog, ObjectReader
from ingest.records import (
    BucketRecord,
    CommitObject,
    CommitPart,
    Extent,
    LifetimeClass,
    ObjectRecord,
    PartRecord,
)


@dataclasses.dataclass(frozen=True, slots=True)
class StreamSpec:
    """A body that wants to be stored."""

    bucket: BucketRecord
    settings: BucketSettings
    key: bytes
    length: int | None
    """Payload bytes; None when only the end of the body will tell."""
    algorithms: frozenset[str] = frozenset()
    """Digests to compute beside CRC64NVME, of ingest/digests.py."""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    content_type: str = ""
    lifetime: LifetimeClass = LifetimeClass.STREAM
    part: bool = False
    """A part of a multipart upload: kernels see it at Complete."""
    stoppable: bool = False
    """A kernel's STOP may end it early, as ``settings.stop`` says: a body that an instrument sends, not a copy."""


@dataclasses.dataclass(frozen=True, slots=True)
class BodyDigest:
    """Bytes as they were received: what the client's own checksums are about."""

    length: int
    crc64nvme: int
    digests: dict[str, bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class StreamDigest:
    """A body that is stored at its bucket's durability level and not yet committed."""

    object_id: bytes
    length: int
    extents: tuple[Extent, ...]
    crc64nvme: int
    digests: dict[str, bytes]
    """Algorithm -> raw digest, big-endian for the CRCs."""
    settled: bool
    whole: BodyDigest | None = None
    """Where a STOP cut the body short: everything that was received. The fields above are about what is stored."""


class Sender(Protocol):
    """Who sends a body, as it is kept from sending too much (``s3api.http.message.Body``)."""

    def backlog(self) -> int:
        """Bytes that have come and were not read yet."""
        ...

    def set_window(self, size_bytes: int) -> None:
        """Most that may be on its way beyond what was read; 0: as the system likes."""
        ...


class Stream(BodySink, Protocol):
    """One body on its way in. ``abort`` is idempotent and does nothing after a commit."""

    object_id: bytes
    cut: asyncio.Event | None
    """Set when the rest of the body is of no use and need not even be read (``hiss.stop=answer``)."""

    sender: Sender | None
    """Set by whoever receives the body."""

    async def ready(self) -> None:
        """To be awaited before the first byte: a second copy that the bucket asks for can be made. Raises MirrorUnavailable."""
        ...

    async def finish(self) -> StreamDigest: ...
    async def commit(self, request: CommitObject) -> ObjectRecord: ...
    async def commit_part(self, request: CommitPart) -> PartRecord: ...
    async def abort(self) -> None: ...


class DataPlane(Protocol):
    """The buffer as the protocol rooms see it (implemented by ingest.buffer.Buffer)."""

    catalog: Catalog

    def admit(self) -> None:
        """Whether any body may come now; raises NodeDraining, CatalogUnavailable. ``open_stream`` asks it, too."""
        ...

    def open_stream(self, spec: StreamSpec) -> Stream:
        """Admit a body; raises BufferFull. No memory is held before its first byte."""
        ...

    async def open_reader(self, record: ObjectRecord, start: int, stop: int) -> ObjectReader:
        """Open bytes [start, stop) of a version; recalls it if its bucket says so. Raises ObjectOffline, DataLost."""
        ...
