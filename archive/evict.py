"""Makes room in the buffer: drops buffered copies of archived versions between two watermarks.

In: ``usage()`` -> (used bytes, capacity bytes) of the segments. Out: ``evicted`` mutations, oldest stored first. Always
true: only versions the catalogue calls evictable go (archived, verified, past ``hiss.evict-after-s``); the catalogue
checks again and refuses any other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from archive.pace import DrainLimits
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import NoSuchKey, StaleVersion
from ingest.ports import Catalog
from ingest.records import ObjectRecord

log = logging.getLogger(__name__)

_SAY_AGAIN_S = 60.0


def bytes_to_free(used_bytes: int, capacity_bytes: int, high: float, low: float) -> int:
    """How much has to go; 0 up to the high mark."""
    if capacity_bytes <= 0 or used_bytes <= capacity_bytes * high:
        return 0
    return used_bytes - int(capacity_bytes * low)


def buffered_bytes(record: ObjectRecord) -> int:
    """Segment bytes that dropping the buffered copy frees."""
    return sum(extent.stored_bytes for extent in record.extents)


class Evictor:
    def __init__(
        self,
        catalog: Catalog,
        usage: Callable[[], tuple[int, int]],
        counters: Counters,
        limits: DrainLimits,
        *,
        everything: Callable[[], bool] = lambda: False,
    ) -> None:
        """``everything``: the node is being emptied, whatever the watermarks say."""
        self._everything = everything
        self._catalog = catalog
        self._usage = usage
        self._limits = limits
        self._objects = counters.cell("hiss_evicted_objects_total")
        self._bytes = counters.cell("hiss_evicted_bytes_total")
        self._stalled = counters.cell("hiss_evict_stalled")
        self._said_at = -_SAY_AGAIN_S

    async def step(self) -> None:
        """What goes by time, then one look at the watermarks; evicts until enough is freed or nothing more may go."""
        for record in await self._catalog.evictions_due(self._limits.evict_batch_objects):
            await self._evict(record)
        used_bytes, capacity_bytes = self._usage()
        high, low = (0.0, 0.0) if self._everything() else (self._limits.evict_high, self._limits.evict_low)
        wanted = bytes_to_free(used_bytes, capacity_bytes, high, low)
        while wanted > 0:
            records = await self._catalog.evictable(self._limits.evict_batch_objects)
            freed = 0
            for record in records:
                if freed < wanted:
                    freed += await self._evict(record)
            if not freed:
                break
            wanted -= freed
        # Not reaching the low mark is no trouble; being still above the high one is.
        above_low = capacity_bytes * (self._limits.evict_high - self._limits.evict_low)
        self._tell(used_bytes, capacity_bytes, stalled=wanted > above_low)

    async def _evict(self, record: ObjectRecord) -> int:
        crashpoint("evict-before")
        try:
            await self._catalog.evicted(record.object_id)
        except (StaleVersion, NoSuchKey):
            return 0
        crashpoint("evict-recorded")
        self._objects.add()
        self._bytes.add(record.length)
        return buffered_bytes(record)

    def _tell(self, used_bytes: int, capacity_bytes: int, *, stalled: bool) -> None:
        self._stalled.set(float(stalled))
        now = time.monotonic()
        if stalled and now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            log.warning(
                "the buffer is %.0f %% full and nothing may be evicted: the archive is behind, or hiss.evict-after-s holds "
                "versions back",
                100 * used_bytes / capacity_bytes,
            )
