"""Carries lifecycle rules out: walks through the versions and uploads of buckets that have rules, a slice at a time.

In: buckets with a document ``lifecycle``. Out: deletes, moves to another storage class (which drain and evictor follow) and
aborted uploads, each decided again by the catalogue: locked versions stay, and so does what was replaced since it was looked
at. Where a pass is, lies in a file, so that a process that is started again goes on there.
Always true: a slice looks at a bounded number of versions; trouble with one version or bucket is counted and logged and stops
nothing; a pass over the node ends, and the next begins ``every_s`` later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import CatalogUnavailable, IngestError, NoSuchBucket, NoSuchUpload
from ingest.lifecycle import LIFECYCLE, Expire, Lifecycle, Move, Place, abortion, due
from ingest.origin import ORIGIN, Origin
from ingest.ports import Catalog
from ingest.records import BucketRecord, Deleted, DeleteObject, ObjectRecord

log = logging.getLogger(__name__)

SLICE_VERSIONS = 1000
_TOGETHER = 64
"""Mutations under way at a time: they share the catalogue's batches with those of instruments."""
_BETWEEN_SLICES_S = 0.05
_LOOK_AGAIN_S = 10.0
"""On a node of a cluster where another one carries rules out."""


class Position(msgspec.Struct):
    """Where a pass is: behind this version (sequence descends within a key)."""

    bucket: str = ""
    key: bytes = b""
    sequence: int = 0
    """0: behind the whole key."""
    since_ns: int = 0
    """When that version was committed: since then the next of the key is noncurrent."""
    noncurrent: int = 0
    """Noncurrent versions of the key seen so far."""


class LifecycleScanner:
    def __init__(
        self,
        catalog: Catalog,
        counters: Counters,
        file: Path,
        *,
        day_s: int,
        every_s: float,
        slice_versions: int = SLICE_VERSIONS,
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        """``leads``: whether rules are for this node of a cluster to carry out."""
        self._leads = leads
        self._catalog = catalog
        self._file = file
        self._day_s = day_s
        self._every_s = every_s
        self._slice = slice_versions
        self._at: Position | None = _read(file)
        self._actions = {
            name: counters.cell("hiss_lifecycle_actions_total", name) for name in ("expire", "move", "abort")
        }
        self._scanned = counters.cell("hiss_lifecycle_scanned_versions_total")
        self._failures = counters.cell("hiss_lifecycle_failures_total")
        self._passes = counters.cell("hiss_lifecycle_passes_total")

    async def run(self, stop: asyncio.Event) -> None:
        ORIGIN.set(Origin("s3.amazonaws.com", lifecycle=True))
        leads = True
        while not stop.is_set():
            try:
                leads = self._leads()
                more = leads and await self.step()
            except (IngestError, OSError) as error:
                log.warning("lifecycle rules: %s", error)
                more = False
            with contextlib.suppress(TimeoutError):
                pause_s = self._every_s if leads else min(self._every_s, _LOOK_AGAIN_S)
                async with asyncio.timeout(_BETWEEN_SLICES_S if more else pause_s):
                    await stop.wait()

    async def step(self) -> bool:
        """One slice; False when that was the end of a pass."""
        at = self._at or Position()
        bucket = await self._bucket_from(at.bucket)
        if bucket is None:
            self._keep(None)
            self._passes.add()
            return False
        if bucket.name != at.bucket:
            at = Position(bucket.name)
            await self._abort_uploads(bucket, _rules(bucket))
        await self._versions(bucket, _rules(bucket), at)
        return True

    async def _bucket_from(self, name: str) -> BucketRecord | None:
        """The first bucket with rules that are readable, from this name on."""
        for bucket in sorted(await self._catalog.buckets(), key=lambda bucket: bucket.name):
            if bucket.name >= name and "lifecycle" in bucket.documents:
                try:
                    _rules(bucket)
                except ValueError as error:
                    self._failures.add()
                    log.error("the lifecycle rules of %s cannot be read: %s", bucket.name, error)
                    continue
                return bucket
        return None

    async def _versions(self, bucket: BucketRecord, rules: Lifecycle, at: Position) -> None:
        page = await self._catalog.scan_versions(bucket.name, at.key, at.sequence, self._slice)
        if not page:
            # The next bucket in order; a name is at least three characters, so nothing lies between.
            self._keep(Position(bucket.name + "\0"))
            return
        now_ns = self._catalog.now_ns()
        work = []
        for position, record in enumerate(page):
            following = page[position + 1] if position + 1 < len(page) else None
            place = await self._place(record, at, following)
            action = due(rules, record, place, now_ns, self._day_s)
            if action is not None:
                work.append((record, place, action))
        self._scanned.add(len(page))
        for start in range(0, len(work), _TOGETHER):
            await asyncio.gather(*(self._carry_out(*one) for one in work[start : start + _TOGETHER]))
        self._keep(at)

    async def _place(self, record: ObjectRecord, at: Position, following: ObjectRecord | None) -> Place:
        """Where the version stands, and step behind it."""
        if record.key != at.key or not at.sequence:
            at.key, at.noncurrent = record.key, 0
            place = Place(current=True, alone=await self._alone(record, following))
        else:
            place = Place(current=False, since_ns=at.since_ns, newer=at.noncurrent)
            at.noncurrent += 1
        at.sequence, at.since_ns = record.sequence, record.modified_ns
        return place

    async def _alone(self, record: ObjectRecord, following: ObjectRecord | None) -> bool:
        if not record.delete_marker:
            return False  # nobody asks
        if following is None:
            page = await self._catalog.scan_versions(record.bucket, record.key, record.sequence, 1)
            following = page[0] if page else None
        return following is None or following.key != record.key

    async def _carry_out(self, record: ObjectRecord, place: Place, action: Expire | Move) -> None:
        crashpoint("lifecycle-before")
        try:
            if isinstance(action, Move):
                await self._catalog.amend_object(record.object_id, storage_class=action.storage_class)
                self._actions["move"].add()
                return
            # The current version of a key goes as a client's delete does it; any other, and a marker, is named.
            named = None if place.current and not record.delete_marker else record.version_id
            request = DeleteObject(
                record.bucket, record.key, named, object_id=record.object_id, if_noncurrent=not place.current
            )
            (outcome,) = await self._catalog.delete([request])
        except CatalogUnavailable:
            raise
        except IngestError as error:
            outcome = error
        if isinstance(outcome, CatalogUnavailable):
            raise outcome
        if isinstance(outcome, Deleted):
            self._actions["expire"].add(float(outcome.existed))
            return
        # Locked, replaced or gone meanwhile: the next pass looks again.
        self._failures.add()
        log.info("%s stays: %s", record.bucket, outcome)

    async def _abort_uploads(self, bucket: BucketRecord, rules: Lifecycle) -> None:
        if all(rule.abort_days is None for rule in rules.rules):
            return
        after, more = (b"", ""), True
        while more:
            page, more = await self._catalog.uploads(bucket.name, after=after, limit=self._slice)
            for upload in page:
                after = upload.key, upload.upload_id
                found = abortion(rules, upload, self._day_s)
                if found is None or found[0] > self._catalog.now_ns():
                    continue
                with contextlib.suppress(NoSuchUpload, NoSuchBucket):
                    await self._catalog.abort_upload(upload.bucket, upload.key, upload.upload_id)
                    self._actions["abort"].add()

    def _keep(self, at: Position | None) -> None:
        self._at = at
        made = self._file.with_name(self._file.name + ".new")
        made.write_bytes(msgspec.msgpack.encode(at or Position()))
        os.replace(made, self._file)


def _rules(bucket: BucketRecord) -> Lifecycle:
    rules = LIFECYCLE.of(bucket)
    return rules if rules is not None else Lifecycle(())


def _read(file: Path) -> Position | None:
    """What the last process kept; a pass begins anew where that cannot be read."""
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Position)
    except (OSError, msgspec.MsgspecError):
        return None
