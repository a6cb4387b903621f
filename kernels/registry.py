"""The kernels of every bucket a worker was asked about: read from the catalogue, cached until its generation moves.

In: the catalogue's rows under ``_kernels/``, the stored sources and arrays. Out: ``Attachment``s. What always holds: what
an object id names is read and parsed once; a stored kernel that no longer passes the gate is left out and logged, and costs
nobody else anything; parameter arrays kept in memory are bounded, those of the buckets least recently asked for go first.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence

from ingest.errors import BufferFull, IngestError
from ingest.ports import Catalog, Domain, KernelRefused, LandingPad
from ingest.records import ObjectRecord
from kernels import uploads
from kernels.attach import KERNEL_PREFIX, Attachment, attach, chained, kernel_name, pattern_of, with_arrays
from kernels.gate import admit
from kernels.lineage import ArrayUse

log = logging.getLogger("hiss.kernels")

KERNELS_MAX = 64
"""Kernels of one bucket; another is refused, and what two workers admit at the same moment is left out, with a warning."""
OBJECTS_MAX = 2000
"""Kernels and arrays of one bucket."""
KERNELS_KEPT_MAX = 4096
"""Parsed kernels remembered over all buckets."""
SOURCE_BYTES_MAX = 1 << 20
BUCKETS_MAX = 4096
"""Buckets whose kernels are remembered; beyond that the least recently asked for is read again."""
READS_MAX = 5
"""Attempts to read a bucket whose kernels are put anew meanwhile."""
ARRAYS_BYTES_MAX = 1 << 30
"""Parameter arrays of one bucket, and of all remembered buckets but the last one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unread:
    """A kernel whose source could not be read yet: it is known to be there, and over which keys."""

    name: str
    pattern: re.Pattern[str]

    def matches(self, key: bytes) -> bool:
        return self.pattern.match(key.decode("utf-8", "surrogateescape")) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    generation: int
    revision: int = 0
    """Changes whenever anything but the generation does."""
    attachments: tuple[Attachment, ...] = ()
    unread: tuple[Unread, ...] = ()
    objects: frozenset[bytes] = frozenset()
    """object_ids it was made of."""
    arrays: Mapping[bytes, ArrayUse] = dataclasses.field(default_factory=dict)
    """By object_id."""

    @property
    def arrays_bytes(self) -> int:
        return sum(use.values.nbytes for use in self.arrays.values())


class Registry:
    """The attachments of every bucket this worker was asked about."""

    def __init__(self, catalog: Catalog, pad: LandingPad) -> None:
        self._catalog = catalog
        self._pad = pad
        self._entries: dict[str, _Entry] = {}
        self._made: dict[bytes, Attachment | None] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._revisions = itertools.count(1)

    def fresh(self, bucket: str) -> bool:
        entry = self._entries.get(bucket)
        return entry is not None and not entry.unread and entry.generation == self._catalog.generation()

    def known(self, bucket: str) -> tuple[Attachment, ...]:
        """What was attached when the bucket was last read."""
        entry = self._entries.get(bucket)
        return entry.attachments if entry is not None else ()

    def revision(self, bucket: str) -> int:
        """Changes when ``known`` does."""
        entry = self._entries.get(bucket)
        return entry.revision if entry is not None else 0

    def unread(self, bucket: str) -> tuple[Unread, ...]:
        """Kernels that are there but whose source could not be read."""
        entry = self._entries.get(bucket)
        return entry.unread if entry is not None else ()

    async def refresh(self, bucket: str) -> None:
        """Read the bucket's kernels unless what is known is fresh. Raises IngestError if they cannot even be listed;
        what was known then stays."""
        if self.fresh(bucket):
            return
        lock = self._locks.setdefault(bucket, asyncio.Lock())
        try:
            async with lock:
                for _ in range(READS_MAX):
                    if self.fresh(bucket):
                        break
                    generation = self._catalog.generation()
                    await self._read(bucket)
                    if generation == self._catalog.generation():
                        # What could not be read is not gone: a look at once would find the same.
                        break
        finally:
            if not lock.locked():
                self._locks.pop(bucket, None)

    async def _read(self, bucket: str) -> None:
        # Taken before the listing: a kernel put meanwhile makes the entry stale, never silently missing.
        generation = self._catalog.generation()
        rows, truncated = await self._catalog.list_objects(bucket, prefix=KERNEL_PREFIX, limit=OBJECTS_MAX)
        records = [row.record for row in rows if row.record is not None]
        sources = [record for record in records if kernel_name(record.key) is not None]
        if truncated or len(sources) > KERNELS_MAX:
            log.warning("bucket %s has more than %d kernels; the rest does not run", bucket, KERNELS_MAX)
        arrays = [record for record in records if uploads.array_name(record.key) is not None]
        before = self._entries.get(bucket)
        objects = frozenset(record.object_id for record in (*sources, *arrays))
        if before is not None and before.objects == objects and not before.unread:
            self._keep(bucket, dataclasses.replace(before, generation=generation))
            return
        entry = await self._entry(bucket, generation, sources[:KERNELS_MAX], arrays, before)
        if not entry.unread or generation == self._catalog.generation():
            self._keep(bucket, dataclasses.replace(entry, objects=objects))

    def _keep(self, bucket: str, entry: _Entry) -> None:
        """As the bucket asked for last; others are forgotten where there are too many."""
        self._entries.pop(bucket, None)
        self._entries[bucket] = entry
        arrays_bytes = sum(entry.arrays_bytes for entry in self._entries.values())
        while len(self._entries) > 1 and (len(self._entries) > BUCKETS_MAX or arrays_bytes > ARRAYS_BYTES_MAX):
            arrays_bytes -= self._entries.pop(next(iter(self._entries))).arrays_bytes
        while len(self._made) > KERNELS_KEPT_MAX:
            del self._made[next(iter(self._made))]

    async def _entry(
        self,
        bucket: str,
        generation: int,
        sources: Sequence[ObjectRecord],
        arrays: Sequence[ObjectRecord],
        before: _Entry | None,
    ) -> _Entry:
        unread = []
        with contextlib.ExitStack() as stack:
            # Held over all of them: regions given back after each source are scrubbed before anybody gets them again, so
            # that a few kernels would use up the worker's regions.
            if any(record.object_id not in self._made for record in sources) and (domain := self._pad.domain(bucket)):
                domain.hold()
                stack.callback(domain.drop)
            attached: dict[str, Attachment] = {}
            known = dict(before.arrays) if before is not None else {}
            used: dict[bytes, ArrayUse] = {}
            for record in sources:
                name = kernel_name(record.key)
                assert name is not None
                try:
                    attachment = await self._attachment(record)
                    if attachment is not None:
                        attached[name] = await self._with_arrays(attachment, arrays, known, used)
                except IngestError as error:
                    log.warning("kernel %r of bucket %s could not be read: %s", record.key, bucket, error)
                    unread.append(Unread(name, pattern_of(record.metadata)))
        attachments = []
        for attachment in attached.values():
            try:
                found = chained(attachment, attached)
            except KernelRefused as refusal:
                # Each was put when the others were not there, or otherwise.
                found = dataclasses.replace(attachment, owed=refusal.reason)
            if found.owed:
                log.info("kernel %s of bucket %s waits: %s", found.name, bucket, found.owed)
            attachments.append(found)
        return _Entry(generation, next(self._revisions), tuple(attachments), tuple(unread), arrays=used)

    async def _attachment(self, record: ObjectRecord) -> Attachment | None:
        if record.object_id not in self._made:
            self._made[record.object_id] = await self._make(record, self._domain(record.bucket))
        return self._made[record.object_id]

    def _domain(self, bucket: str) -> Domain:
        domain = self._pad.domain(bucket)
        if domain is None:
            raise BufferFull("no memory region is free")
        return domain

    async def _make(self, record: ObjectRecord, domain: Domain) -> Attachment | None:
        name = kernel_name(record.key)
        assert name is not None
        if not 0 < record.length <= SOURCE_BYTES_MAX:
            return None
        with contextlib.ExitStack() as stack:
            domain.hold()
            stack.callback(domain.drop)
            loaded = await self._pad.load(record, 0, record.length, domain)
            stack.callback(loaded.release)
            source = os.pread(domain.region_fds[loaded.region], loaded.length, loaded.offset)
        try:
            # Parsing a long source takes milliseconds: not on the loop that receives frames.
            attachment = attach(await asyncio.to_thread(admit, name, source), record.metadata)
            return dataclasses.replace(attachment, submitted_ns=record.modified_ns)
        except KernelRefused as refusal:
            log.warning("kernel of bucket %s does not run: %s", record.bucket, refusal)
            return None

    async def _with_arrays(
        self,
        attachment: Attachment,
        records: Sequence[ObjectRecord],
        known: Mapping[bytes, ArrayUse],
        used: dict[bytes, ArrayUse],
    ) -> Attachment:
        wanted = {spec.name for spec in attachment.kernel.arrays}
        arrays: dict[str, ArrayUse] = {}
        bad: dict[str, str] = {}
        for record in records:
            kernel, name = uploads.array_name(record.key) or ("", "")
            if kernel != attachment.name or name not in wanted:
                continue
            use = known.get(record.object_id)
            if sum(each.values.nbytes for each in used.values()) + record.length > ARRAYS_BYTES_MAX:
                bad[name] = f"the arrays of the bucket's kernels hold more than {ARRAYS_BYTES_MAX >> 20} MiB together"
                continue
            if use is None:
                domain = self._domain(record.bucket)
                domain.hold()
                try:
                    use = await uploads.read(self._pad, record, domain)
                except uploads.BadArray as error:
                    bad[name] = str(error)
                    continue
                finally:
                    domain.drop()
            arrays[name] = used[record.object_id] = use
        return with_arrays(attachment, arrays, bad)
