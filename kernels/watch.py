"""Notices soon that the kernels of a bucket in use have changed, and remembers which frames come to which bucket.

In: the catalogue's generation, looked at every WATCH_S (a read of shared memory); buckets that streams, owed products or
submissions are about. Out: ``changed(bucket)`` once the registry has read what is new. So a running stream learns of new
parameters without ever waiting, what was owed for want of an array is paid, and a sandbox can be ready before its first frame.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ingest.errors import IngestError, NoSuchBucket
from ingest.ports import Catalog
from ingest.records import FrameGeometry
from kernels.registry import Registry

log = logging.getLogger("hiss.kernels")

WATCH_S = 0.1
RETRY_S = 2.0
"""Between two attempts to read a bucket whose kernels could not be read."""
BUCKETS_MAX = 64
"""Buckets in use that are watched; the least recently used is left to its next stream."""
LAYOUTS_MAX = 2
"""Layouts of frames remembered for each bucket, the latest ones."""


class Watch:
    """Of one worker. ``changed`` must not raise."""

    def __init__(self, catalog: Catalog, registry: Registry, changed: Callable[[str], None]) -> None:
        self._catalog = catalog
        self._registry = registry
        self._changed = changed
        self._layouts: dict[str, tuple[FrameGeometry, ...]] = {}
        self._revisions: dict[str, int] = {}
        self._retry_s: dict[str, float] = {}

    def use(self, bucket: str, geometry: FrameGeometry | None = None) -> None:
        """The bucket is in use; ``geometry``: frames like these came."""
        layouts = self._layouts.pop(bucket, ())
        if geometry is not None:
            same = [one for one in layouts if (one.dtype, one.shape) != (geometry.dtype, geometry.shape)]
            layouts = (geometry, *same)[:LAYOUTS_MAX]
        self._layouts[bucket] = layouts
        self._revisions.setdefault(bucket, self._registry.revision(bucket))
        while len(self._layouts) > BUCKETS_MAX:
            oldest = next(iter(self._layouts))
            del self._layouts[oldest], self._revisions[oldest]

    @property
    def buckets(self) -> Sequence[str]:
        """In use."""
        return tuple(self._layouts)

    def layouts(self, bucket: str) -> tuple[FrameGeometry, ...]:
        return self._layouts.get(bucket, ())

    async def run(self) -> None:
        """Forever."""
        seen = -1
        while True:
            generation = self._catalog.generation()
            if generation != seen or self._retry_s:
                seen = generation
                for bucket in list(self._layouts):
                    await self._look(bucket)
            await asyncio.sleep(WATCH_S)

    async def _look(self, bucket: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._retry_s.get(bucket, 0.0):
            return
        self._retry_s.pop(bucket, None)
        try:
            await self._registry.refresh(bucket)
        except NoSuchBucket:
            self._layouts.pop(bucket, None)
            self._revisions.pop(bucket, None)
            return
        except IngestError as error:
            log.debug("the kernels of bucket %s were not read: %s", bucket, error)
        if not self._registry.fresh(bucket):
            self._retry_s[bucket] = now_s + RETRY_S
        revision = self._registry.revision(bucket)
        if bucket in self._revisions and self._revisions[bucket] != revision:
            self._revisions[bucket] = revision
            self._changed(bucket)
