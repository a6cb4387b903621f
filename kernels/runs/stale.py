"""Products of objects whose place an object of one frame took: those have no product of their own that would replace them.

In: members of a batch that is about to be stored. Out: the products beside their run that are of other versions of their keys
are deleted. It is done before the members are paid for, so that a crash between the two leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from ingest.errors import IngestError, NoSuchKey
from ingest.ports import Catalog
from ingest.records import DeleteObject, ObjectRecord
from kernels.attach import PRODUCT_PREFIX
from kernels.runs.names import product_key

log = logging.getLogger("hiss.kernels")

LISTED_MAX = 100
"""Products beside a run that are listed; where there are more, each member's is looked up."""


async def drop_stale(catalog: Catalog, kernel: str, run: bytes, members: Sequence[ObjectRecord]) -> None:
    bucket = members[0].bucket
    keys = {product_key(kernel, member.key) for member in members}
    place = PRODUCT_PREFIX + kernel.encode() + b"/" + run
    try:
        rows, more = await catalog.list_objects(bucket, prefix=place, delimiter=b"/", limit=LISTED_MAX)
        found = [row.record for row in rows if row.record is not None and row.key in keys]
        for key in (key for key in keys if more or not key.startswith(place)):
            with contextlib.suppress(NoSuchKey):
                found.append(await catalog.head(bucket, key))
        stale = {one.object_id: one for one in found}.values()
        if stale:
            log.info("%d products of %r in bucket %s are of objects that were overwritten", len(stale), run, bucket)
            await catalog.delete([DeleteObject(bucket, one.key, object_id=one.object_id) for one in stale])
    except IngestError as error:
        log.warning("stale products of run %r were not looked for: %s", run, error)
