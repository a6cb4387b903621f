"""Keeps the archive's names and the catalogue's word for them the same, whoever died or was late.

In: the catalogue's tombstones, a publication the catalogue did not want, the records of archived versions. Out: files
removed or published anew, tombstones confirmed; every repair is counted and logged. Always true: the catalogue decides; a
file is removed only while its key is held and no version claims it; what cannot be repaired is named in the log.
"""

from __future__ import annotations

import asyncio
import logging

from archive.copier import Copier
from archive.keylocks import KeyLocks
from archive.pace import DrainLimits
from archive.targets.base import CopyMissing, FileRights, Target, TargetError, TargetLost
from ingest import bucket_settings, versioning
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import IngestError, NoSuchBucket, NoSuchKey, StaleVersion
from ingest.ports import Catalog
from ingest.records import ObjectRecord, ObjectState, Versioning

log = logging.getLogger(__name__)

_PAGE_OBJECTS = 250


def key_text(record: ObjectRecord) -> str:
    return f"{record.bucket}/{record.key.decode('utf-8', 'backslashreplace')}"


def _can_wait(error: BaseException) -> bool:
    """Trouble that is over some time, not what must end the process."""
    return isinstance(error, TargetError | IngestError) and not isinstance(error, TargetLost)


class Reconciler:
    def __init__(
        self,
        catalog: Catalog,
        target: Target,
        copier: Copier,
        keys: KeyLocks,
        counters: Counters,
        limits: DrainLimits,
    ) -> None:
        self._catalog = catalog
        self._target = target
        self._copier = copier
        self._keys = keys
        self._limits = limits
        self._repairs = counters.cell("hiss_reconciler_repairs_total")
        self._verify_failures = counters.cell("hiss_drain_verify_failures_total")

    async def withdraw(self, record: ObjectRecord, path: str) -> None:
        """The version was deleted or replaced while its copy was being published: take the copy back. The caller
        holds the key."""
        if await self._target.remove(path, record.object_id):
            self._repairs.add()
            log.info("took back %s, published after its version was deleted or replaced", path)
        await self._put_back(record.bucket, record.key, {path})

    async def carry_out_deletes(self) -> bool:
        """Remove the archive copies of a batch of deleted versions and confirm it to the catalogue; whether more may wait.

        Several at a time: in a cluster each asks the engine several times, and those that ask at the same time share a question
        and a commit. One that fails is left for the next batch and ends one of the workers, so that a target which fails
        whatever it is asked is not asked for the whole batch. Raises the worst of their errors."""
        batch = self._limits.tombstone_batch_objects
        found = await self._catalog.pending_archive_deletes(batch)
        if found:
            # A power cut, or a failover, must not bring back a version whose copy is gone.
            await self._catalog.barrier()
        waiting = iter(found)

        async def work() -> None:
            for tombstone, path, bucket, key, object_id in waiting:
                async with self._keys.hold(bucket, key):
                    await self._remove_copies(bucket, key, path, object_id)
                    await self._catalog.archive_deleted(tombstone)

        workers = min(self._limits.tombstones_at_once, len(found))
        ends = await asyncio.gather(*(work() for _ in range(workers)), return_exceptions=True)
        errors = [end for end in ends if end is not None]
        if errors:
            raise min(errors, key=_can_wait)
        return len(found) == batch

    async def _remove_copies(self, bucket: str, key: bytes, path: str, object_id: bytes | None) -> None:
        """Remove every name the copy may have that no version of the key claims."""
        # A delete during a drain does not know the path, so every path the copy may have is looked at.
        names = {path, *self._target.paths(bucket, key)} - {""}
        if object_id is not None:
            names.add(self._target.version_path(bucket, key, object_id))
        if await self._current(bucket, key) is None:
            await self.clear_names(bucket, key, b"")
        for version in await self._catalog.archived_versions_now(bucket, key):
            if version.archive is not None and version.archive.target == self._target.name:
                names.discard(version.archive.path)
        removed = {name for name in names if await self._target.remove(name, None)}
        if removed:
            await self._put_back(bucket, key, removed)

    async def _put_back(self, bucket: str, key: bytes, removed: set[str]) -> None:
        """Keys are held in one process. Where another node has published a version at one of these names meanwhile, it must
        be there: who records a copy looks afterwards, who removes one looks afterwards, so one of them sees it missing."""
        for version in await self._catalog.archived_versions_now(bucket, key):
            if version.archive is not None and version.archive.path in removed and not await self.shows(version):
                await self.settle(version)

    async def _current(self, bucket: str, key: bytes) -> ObjectRecord | None:
        try:
            return await self._catalog.head(bucket, key)
        except (NoSuchKey, NoSuchBucket):
            return None

    async def clear_names(self, bucket: str, key: bytes, object_id: bytes) -> None:
        """Before version ``object_id`` is published: copies of versions that are not current go to where those belong. The
        caller holds the key."""
        names = self._target.paths(bucket, key)
        for version in await self._catalog.archived_versions(bucket, key):
            copy = version.archive
            if copy is None or copy.path not in names or version.object_id == object_id:
                continue
            new = self._target.version_path(bucket, key, version.object_id)
            settings = bucket_settings.parse((await self._catalog.bucket(bucket)).tags)
            try:
                await self._target.move_aside(copy.path, new, version.object_id, FileRights.of(settings))
            except CopyMissing as error:
                # Nothing to move: the sweep publishes it anew from the buffer, or says that it is lost.
                log.error("the archive copy of version %s of %s: %s", version.version_id, key_text(version), error)
            crashpoint("aside-named")
            await self._catalog.archive_moved(version.object_id, copy.path, new)

    async def place_of(self, record: ObjectRecord) -> str | None:
        """Where a version is to be published that shares its key with others, its current place cleared; None: where its
        key belongs. The caller holds the key."""
        bucket = await self._catalog.bucket(record.bucket)
        if versioning.versioning_of_key(bucket, record.key) is Versioning.OFF:
            return None
        newest = await self._catalog.newest(record.bucket, record.key)
        if newest is None or newest.object_id != record.object_id:
            return self._target.version_path(record.bucket, record.key, record.object_id)
        await self.clear_names(record.bucket, record.key, record.object_id)
        return None

    async def sweep(self, stop: asyncio.Event) -> None:
        """Compare every archived version with what its path shows; repair what differs."""
        for bucket in await self._catalog.buckets():
            after, version, more = b"", "", True
            while more and not stop.is_set():
                try:
                    rows, more = await self._catalog.list_versions(
                        bucket.name, after=after, after_version=version, limit=_PAGE_OBJECTS
                    )
                except NoSuchBucket:
                    break
                for row in rows:
                    after, version = row.key, "" if row.record is None else row.record.version_id
                    if row.record is not None and row.record.archive is not None:
                        await self._look_at(row.record)
                # A sweep of millions of names must not be what the archive's metadata server is busy with.
                await asyncio.sleep(len(rows) / self._limits.sweep_objects_per_s)

    async def _look_at(self, listed: ObjectRecord) -> None:
        try:
            if await self.shows(listed):
                return
            async with self._keys.hold(listed.bucket, listed.key):
                record = await self._catalog.by_id(listed.object_id)
                if not await self.shows(record):
                    await self.settle(record)
        except (NoSuchKey, NoSuchBucket, StaleVersion):
            return
        except TargetLost:
            raise
        except (TargetError, IngestError, bucket_settings.BadSetting) as error:
            log.error("cannot compare or repair the archive copy of %s: %s", key_text(listed), error)

    async def shows(self, record: ObjectRecord) -> bool:
        """Whether the recorded path shows this version. Versions on other targets are not this one's business."""
        copy = record.archive
        if copy is None or copy.target != self._target.name:
            return True
        found = await self._target.find(copy.path)
        if found is None or found.length != record.stored_length:
            return False
        return found.object_id is None or found.object_id == record.object_id

    async def settle(self, record: ObjectRecord) -> None:
        """Publish the buffered copy once more where the catalogue says it is. The caller holds the key."""
        copy = record.archive
        if copy is None:
            return
        if record.state is not ObjectState.ARCHIVED or not (record.extents or record.length == 0):
            self._verify_failures.add()
            log.error(
                "the archive copy of %s at %s is missing or is another file, and no buffered copy is left",
                key_text(record), copy.path,
            )  # fmt: skip
            return
        bucket = await self._catalog.bucket(record.bucket)
        rights = FileRights.of(bucket_settings.parse(bucket.tags))
        await self._copier.copy(record, rights, only_at=copy.path)
        self._repairs.add()
        log.warning("published %s anew at %s, where it was missing or another file", key_text(record), copy.path)
