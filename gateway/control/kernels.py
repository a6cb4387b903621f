"""``/v1/kernels``: which kernels were submitted to a bucket, what they still owe, and how they fail.

In: the objects under ``_kernels/``, the catalogue's owed reductions, the workers' files about failing kernels. Out: one
``Kernel`` for each ``_kernels/NAME.py``. What always holds: only what the submitter wrote and what happened is shown;
whether a kernel compiles was decided when it was submitted. Sources are not read here: a failure names the SHA-256 of the
source that failed, so whoever has the source knows whether it is this one.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from gateway.control.elsewhere import Elsewhere, sentence
from gateway.control.paces import KernelPaces
from ingest.ports import Catalog
from ingest.records import ObjectRecord, ReductionCount
from kernels import notices
from kernels.pace import Pace
from kernels.strikes import FILE_PATTERN, Strike, read_all

PREFIX = b"_kernels/"
OBJECTS_MAX = 2000


class Failure(msgspec.Struct, frozen=True):
    """A source that failed ``count`` times in a row in some worker; ``disabled``: until another source is put."""

    sha256: str
    count: int
    disabled: bool
    error: str
    time_ns: int
    node: str = ""
    """Of a cluster, where it is another one than this."""


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
    after: str
    """The kernel before it in a chain; empty when it sees the frames themselves."""
    arrays: tuple[str, ...]
    """Names of the parameter arrays that are there."""
    owed_products: int
    failed_products: int
    """Given up; their versions stay unreduced."""
    last_error: str
    """Of an owed or failed product; it begins with the key of the object."""
    failures: tuple[Failure, ...]
    notices: tuple[str, ...] = ()
    """What does not go as its submitter wanted, and disables nothing (kernels/notices.py)."""
    bytes_per_s_per_core: float | None = None
    """Of a stream that one core reduces; None: not measured yet."""
    paced_on: str = ""
    """What that was measured on."""
    slow: str = ""
    """The reserved slot that it is too slow for, and why."""
    waits: str = ""
    """Owed products that wait for a node of the cluster that is gone, and alone has their objects."""


async def kernels(
    catalog: Catalog, bucket: str, run_folder: Path, elsewhere: Elsewhere, measured: KernelPaces
) -> list[Kernel]:
    """As all nodes have them. Raises NoSuchBucket, CatalogUnavailable."""
    rows, _ = await catalog.list_objects(bucket, prefix=PREFIX, limit=OBJECTS_MAX)
    counts = {count.kernel: count for count in await catalog.reduction_counts(bucket)}
    strikes, noticed = await failing_in(run_folder)
    failures = [(strike, "") for strike in strikes]
    notes = [(notice, "") for notice in noticed]
    for node, said in elsewhere.kernels().items():
        failures += [(strike, node) for strike in said.strikes]
        notes += [(notice, node) for notice in said.notices]
    waiting = await elsewhere.waiting(catalog, bucket)
    arrays: dict[str, list[str]] = {}
    sources: dict[str, ObjectRecord] = {}
    for row in rows:
        if row.record is None:
            continue
        name, slash, rest = row.key[len(PREFIX) :].decode("utf-8", "backslashreplace").partition("/")
        if slash and rest.endswith(".npy"):
            arrays.setdefault(name, []).append(rest.removesuffix(".npy"))
        elif name.endswith(".py"):
            sources[name.removesuffix(".py")] = row.record
    paces = await measured.of(bucket, list(sources.values()))
    slow = measured.slow(bucket, paces, catalog.reserved())
    return [
        _kernel(
            name,
            record,
            tuple(arrays.get(name, ())),
            counts.get(name, ReductionCount(name, 0, 0, "")),
            tuple(_failure(one, node) for one, node in failures if (one.bucket, one.kernel) == (bucket, name)),
            tuple(_noticed(one, node) for one, node in notes if (one.bucket, one.kernel) == (bucket, name)),
            sentence(waiting.get(name, {})),
            paces.get(name),
            slow.get(name, ""),
        )
        for name, record in sources.items()
    ]


def _kernel(
    name: str,
    record: ObjectRecord,
    arrays: tuple[str, ...],
    count: ReductionCount,
    failures: tuple[Failure, ...],
    notices: tuple[str, ...],
    waits: str,
    pace: Pace | None,
    slow: str,
) -> Kernel:
    metadata = record.metadata
    return Kernel(
        name=name,
        etag=record.etag,
        size_bytes=record.length,
        modified_ns=record.modified_ns,
        match=metadata.get("match", "*"),
        params=metadata.get("params", "{}"),
        raw=metadata.get("raw", "all"),
        device=metadata.get("device", "cpu"),
        after=metadata.get("after", ""),
        arrays=arrays,
        owed_products=count.owed,
        failed_products=count.failed,
        last_error=f"{count.key.decode('utf-8', 'backslashreplace')}: {count.error}" if count.error else "",
        failures=failures,
        notices=notices,
        waits=waits,
        bytes_per_s_per_core=None if pace is None else pace.bytes_per_s,
        paced_on="" if pace is None else pace.on,
        slow=slow,
    )


async def failing_in(run_folder: Path) -> tuple[list[Strike], list[notices.Notice]]:
    """What all workers of this node say."""
    return await asyncio.to_thread(lambda: read_all(sorted(run_folder.glob(FILE_PATTERN)))), await notices_in(
        run_folder
    )


async def notices_in(run_folder: Path) -> list[notices.Notice]:
    """Of all workers."""
    return await asyncio.to_thread(lambda: notices.read(sorted(run_folder.glob(notices.FILE_PATTERN))))


def _noticed(notice: notices.Notice, node: str) -> str:
    return (f"on node {node}: " if node else "") + _said(notice)


def _said(notice: notices.Notice) -> str:
    return f"{notice.key}: {notice.error}" if notice.key else f"on the cpu, its core was wrong: {notice.error}"


def _failure(strike: Strike, node: str) -> Failure:
    return Failure(strike.sha256, strike.count, strike.disabled, strike.error, strike.time_ns, node)
