"""What nodes that left the cluster leave in the index: buffered copies of archived versions that nobody can read any more.

In: members that were removed. Out: ``evicted`` mutations, so that readers have these versions recalled from the archive instead
of asking a node that is not there. Always true: only archived and verified versions are given up; the catalogue checks again.
"""

from __future__ import annotations

import asyncio
import logging

from ingest.counters import Counters
from ingest.errors import NoSuchKey, StaleVersion
from ingest.ports import Catalog
from ingest.records import NodeState

log = logging.getLogger(__name__)

_BATCH = 256


class Remains:
    def __init__(self, catalog: Catalog, counters: Counters) -> None:
        self._catalog = catalog
        self._objects = counters.cell("hiss_evicted_objects_total")

    async def step(self) -> None:
        for node in await self._catalog.nodes():
            if node.state is NodeState.REMOVED:
                await self._give_up(node.node, node.name)

    async def _give_up(self, node: int, name: str) -> None:
        count = 0
        while object_ids := await self._catalog.copies_on(node, _BATCH):
            # Together: each alone would be a batch of its own in the log.
            gone = sum(await asyncio.gather(*map(self._evicted, object_ids)))
            if not gone:
                break  # restored ones, which are kept until their time is over
            count += gone
        if count:
            log.info("%d archived versions had their buffered copy on node %s, which left", count, name)

    async def _evicted(self, object_id: bytes) -> bool:
        try:
            await self._catalog.evicted(object_id)
        except (StaleVersion, NoSuchKey):
            return False
        self._objects.add()
        return True
