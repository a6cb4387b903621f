"""Which kernels a bucket has, and over which keys each runs.

A kernel is attached by putting it at ``_kernels/NAME.py``; its own object metadata says the rest: ``match`` (glob over
keys, ``*`` crosses ``/``; default all), ``params`` (JSON object of numbers), ``raw`` (``all``), ``device`` (``cpu``).
In: the catalogue's rows and the stored sources. Out: ``Attachment``s, cached under the catalogue's generation, each made
once an object id. A stored kernel that no longer passes the gate is left out and logged; it costs nobody else anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fnmatch
import logging
import os
import re
from collections.abc import Mapping, Sequence

import msgspec

from ingest.errors import BufferFull, IngestError
from ingest.ports import Catalog, Domain, KernelRefused, LandingPad
from ingest.records import ObjectRecord
from ingest.runs import is_marker
from kernels.contract import Kernel, resolve_params
from kernels.gate import admit

log = logging.getLogger("hiss.kernels")

KERNEL_PREFIX = b"_kernels/"
PRODUCT_PREFIX = b"_products/"
KERNELS_MAX = 64
"""Kernels of one bucket; more are left out, with a warning."""
KERNELS_KEPT_MAX = 4096
"""Parsed kernels remembered over all buckets."""
SOURCE_BYTES_MAX = 1 << 20
MATCH_BYTES_MAX = 1024
PARAMS_BYTES_MAX = 8192
BUCKETS_MAX = 4096
"""Buckets whose kernels are remembered; beyond that the least recently asked for is read again."""

_NAME = re.compile(rb"_kernels/([A-Za-z_][A-Za-z0-9_-]{0,63})\.py\Z")


def is_internal(key: bytes) -> bool:
    """Kernels, products and the markers of runs are never kernel input."""
    return key.startswith((KERNEL_PREFIX, PRODUCT_PREFIX)) or is_marker(key)


def kernel_name(key: bytes) -> str | None:
    """``hits`` of ``_kernels/hits.py``; None for any other key."""
    found = _NAME.match(key)
    return found[1].decode("ascii") if found else None


@dataclasses.dataclass(frozen=True, slots=True)
class Attachment:
    """A kernel as attached to a bucket. ``params`` has a value for every parameter it declares."""

    kernel: Kernel
    match: str
    params: Mapping[str, int | float]
    pattern: re.Pattern[str]

    def matches(self, key: bytes) -> bool:
        return self.pattern.match(key.decode("utf-8", "surrogateescape")) is not None


def attach(kernel: Kernel, metadata: Mapping[str, str]) -> Attachment:
    """Read the kernel object's metadata (lower-case names, no ``x-amz-meta-``). KernelRefused for what cannot be."""

    def refuse(reason: str) -> KernelRefused:
        return KernelRefused(kernel.file, 1, reason)

    match = metadata.get("match", "*")
    if not 0 < len(match.encode()) <= MATCH_BYTES_MAX:
        raise refuse(f"x-amz-meta-match: a glob of 1 to {MATCH_BYTES_MAX} bytes")
    if metadata.get("raw", "all") != "all":
        raise refuse(f"x-amz-meta-raw: {metadata['raw']!r:.40} is not available; allowed is all")
    if metadata.get("device", "cpu") != "cpu":
        raise refuse(f"x-amz-meta-device: {metadata['device']!r:.40} is not available; allowed is cpu")
    params = metadata.get("params", "{}")
    if len(params) > PARAMS_BYTES_MAX:
        raise refuse(f"x-amz-meta-params: more than {PARAMS_BYTES_MAX} bytes")
    try:
        given = msgspec.json.decode(params.encode(), type=dict[str, int | float])
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise refuse(f'x-amz-meta-params: a JSON object of numbers, e.g. {{"low": 12}} ({error})') from None
    return Attachment(kernel, match, resolve_params(kernel, given), _pattern(metadata))


def _pattern(metadata: Mapping[str, str]) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(metadata.get("match", "*")))


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
    attachments: tuple[Attachment, ...] = ()
    unread: tuple[Unread, ...] = ()


class Registry:
    """The attachments of every bucket this worker was asked about."""

    def __init__(self, catalog: Catalog, pad: LandingPad) -> None:
        self._catalog = catalog
        self._pad = pad
        self._entries: dict[str, _Entry] = {}
        self._made: dict[bytes, Attachment | None] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def fresh(self, bucket: str) -> bool:
        entry = self._entries.get(bucket)
        return entry is not None and not entry.unread and entry.generation == self._catalog.generation()

    def known(self, bucket: str) -> tuple[Attachment, ...]:
        """What was attached when the bucket was last read."""
        entry = self._entries.get(bucket)
        return entry.attachments if entry is not None else ()

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
                if not self.fresh(bucket):
                    await self._read(bucket)
        finally:
            if not lock.locked():
                self._locks.pop(bucket, None)

    async def _read(self, bucket: str) -> None:
        # Taken before the listing: a kernel put meanwhile makes the entry stale, never silently missing.
        generation = self._catalog.generation()
        rows, truncated = await self._catalog.list_objects(bucket, prefix=KERNEL_PREFIX, limit=KERNELS_MAX)
        if truncated:
            log.warning("bucket %s has more than %d kernels; the rest does not run", bucket, KERNELS_MAX)
        records = [row.record for row in rows if row.record is not None and kernel_name(row.key) is not None]
        entry = await self._entry(bucket, generation, records)
        self._entries.pop(bucket, None)
        self._entries[bucket] = entry
        while len(self._entries) > BUCKETS_MAX:
            del self._entries[next(iter(self._entries))]
        while len(self._made) > KERNELS_KEPT_MAX:
            del self._made[next(iter(self._made))]

    async def _entry(self, bucket: str, generation: int, records: Sequence[ObjectRecord]) -> _Entry:
        attachments, unread = [], []
        with contextlib.ExitStack() as stack:
            # Held over all of them: regions given back after each source are scrubbed before anybody gets them again, so
            # that a few kernels would use up the worker's regions.
            if any(record.object_id not in self._made for record in records) and (domain := self._pad.domain(bucket)):
                domain.hold()
                stack.callback(domain.drop)
            for record in records:
                try:
                    attachment = await self._attachment(record)
                except IngestError as error:
                    log.warning("kernel %r of bucket %s could not be read: %s", record.key, bucket, error)
                    name = kernel_name(record.key)
                    assert name is not None
                    unread.append(Unread(name, _pattern(record.metadata)))
                else:
                    if attachment is not None:
                        attachments.append(attachment)
        return _Entry(generation, tuple(attachments), tuple(unread))

    async def _attachment(self, record: ObjectRecord) -> Attachment | None:
        if record.object_id not in self._made:
            domain = self._pad.domain(record.bucket)
            if domain is None:
                raise BufferFull("no memory region is free")
            self._made[record.object_id] = await self._make(record, domain)
        return self._made[record.object_id]

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
            return attach(await asyncio.to_thread(admit, name, source), record.metadata)
        except KernelRefused as refusal:
            log.warning("kernel of bucket %s does not run: %s", record.bucket, refusal)
            return None
