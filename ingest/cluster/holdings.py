"""What this node holds for the others: stored bytes that they ask for, second copies that they send.

In: requests that were found to come from a node of this cluster (s3api/peers.py). Out: readers of local segments; streams
that land in local segments and end in the catalogue's holding them.
Always holds: only bytes that lie on this node are served, in segments or as copies of kernels (a relay never relays a
relay); a second copy that was not held by the catalogue is free again, like any body that was not committed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ingest.bucket_settings import BucketSettings
from ingest.buffer import Buffer
from ingest.cluster.peer import SETTLE_S, MirrorAnswer, MirrorOf
from ingest.errors import NoSuchKey
from ingest.packing import PackedStream
from ingest.reader import SegmentReader, StaleExtent, lies_on
from ingest.records import BucketRecord, Extent
from ingest.stream import SpanStream
from ingest.stream_types import StreamDigest, StreamSpec


class NotHere(Exception):
    """This node does not hold these bytes (any more)."""


class Holdings:
    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    @property
    def node(self) -> int:
        return self._buffer.segments.node

    async def open(
        self, object_id: bytes, start: int, stop: int, base: int, extents: Sequence[Extent], *, settle: bool
    ) -> SegmentReader:
        """Open body bytes [start, stop) of a version. ``extents``: where the asker believes them to be, the first beginning at
        body offset ``base``; none: it does not know. ``settle``: the asker knows of no flush that covers them.

        Raises NotHere, DataLost, CatalogError.
        """
        buffer = self._buffer
        if settle:
            await buffer.catalog.settle(object_id, SETTLE_S)
        if extents and base <= start:
            try:
                return await SegmentReader.open(buffer.paths, buffer.executor, extents, start - base, stop - base)
            except StaleExtent:
                pass  # moved by our compaction, which our catalogue was told
        if buffer.copies is not None and (kept := buffer.copies.local(object_id, start, stop)) is not None:
            return kept
        try:
            record = await buffer.catalog.by_id(object_id)
        except NoSuchKey:
            raise NotHere(f"no version {object_id.hex()} is here") from None
        for copy in (record.extents, record.mirror):
            if lies_on(self.node, copy, start, stop):
                try:
                    return await SegmentReader.open(buffer.paths, buffer.executor, copy, start, stop)
                except StaleExtent:
                    continue
        raise NotHere(f"these bytes of version {record.object_id.hex()} are not here")

    def receive(self, body: MirrorOf) -> SpanStream | PackedStream:
        """Admit a second copy; raises BufferFull."""
        spec = StreamSpec(
            bucket=BucketRecord(body.bucket, owner="", created_ns=0),
            settings=BucketSettings(),
            key=body.key,
            length=body.length,
            lifetime=body.lifetime,
        )
        return self._buffer.open_copy(spec, body.object_id)

    async def keep(self, stream: SpanStream | PackedStream, digest: StreamDigest) -> MirrorAnswer:
        """The copy is durable: hold it until the catalogue knows of the version it belongs to. Raises CatalogError."""
        await stream.hold()
        return MirrorAnswer(self.node, digest.length, f"{digest.crc64nvme:016x}")
