"""``/v1/kernels``: which kernels were submitted to a bucket, as their objects say.

In: the objects under ``_kernels/``. Out: their names, versions and attachment. What always holds: only what the
submitter wrote is shown; whether a kernel compiles was decided when it was submitted.
"""

from __future__ import annotations

import msgspec

from ingest.ports import Catalog

PREFIX = b"_kernels/"
KERNELS_MAX = 1000


class Kernel(msgspec.Struct, frozen=True):
    name: str
    etag: str
    size_bytes: int
    modified_ns: int
    match: str
    """Glob over the keys it reduces."""
    params: str
    """Its parameters, JSON as submitted."""
    raw: str
    device: str


async def kernels(catalog: Catalog, bucket: str) -> list[Kernel]:
    """At most KERNELS_MAX. Raises NoSuchBucket, CatalogUnavailable."""
    rows, _ = await catalog.list_objects(bucket, prefix=PREFIX, limit=KERNELS_MAX)
    return [
        Kernel(
            name=row.key[len(PREFIX) :].decode("utf-8", "backslashreplace").removesuffix(".py"),
            etag=row.record.etag,
            size_bytes=row.record.length,
            modified_ns=row.record.modified_ns,
            match=row.record.metadata.get("match", "*"),
            params=row.record.metadata.get("params", "{}"),
            raw=row.record.metadata.get("raw", "all"),
            device=row.record.metadata.get("device", "cpu"),
        )
        for row in rows
        if row.record is not None and row.key.endswith(b".py")
    ]
