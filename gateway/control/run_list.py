"""``/v1/runs``: the runs of a bucket, their products, and closing one.

In: the catalogue. Out: for each run whether it is open, and for each kernel how much of it the product covers. What always
holds: a run whose product says ``complete`` is closed, and every member that has arrived is in the product or named as failed.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping

import msgspec

from gateway.control.elsewhere import Elsewhere, sentence
from ingest.ports import Catalog
from ingest.records import RunProductRecord, RunRecord
from kernels.runs.names import run_key

RUNS_MAX = 1000
OWED_MAX = 10_000
"""Members that wait are counted up to here."""


class Product(msgspec.Struct, frozen=True):
    kernel: str
    key: str
    members: int
    groups: int
    """More than one: the kernel or its parameters changed during the run."""
    pending: int
    failed: int
    complete: bool
    error: str = ""
    """Why members failed; the first reason."""
    error_key: str = ""
    """The member that it says it of."""
    waits: str = ""
    """Members that wait for a node of the cluster that is gone, and alone has them or what was made of them."""


class Run(msgspec.Struct, frozen=True):
    prefix: str
    state: str
    """``open`` or ``closed``."""
    last_member_ns: int
    closed_ns: int
    closed_by: str
    products: list[Product]


class Runs(msgspec.Struct, frozen=True):
    runs: list[Run]
    next_after: str = ""
    """Ask again with ``after`` set to this for what follows; empty at the end."""


async def list_runs(
    catalog: Catalog, bucket: str, prefix: bytes, after: bytes, limit: int, elsewhere: Elsewhere
) -> Runs:
    """Raises NoSuchBucket, CatalogUnavailable."""
    found, truncated = await catalog.runs(bucket, prefix=prefix, after=after, limit=min(limit, RUNS_MAX))
    runs = [await describe(catalog, record, elsewhere) for record in found]
    return Runs(runs, runs[-1].prefix if truncated and runs else "")


async def describe(catalog: Catalog, run: RunRecord, elsewhere: Elsewhere) -> Run:
    known = list(await catalog.run_products(run))
    named = {product.kernel for product in known}
    # A kernel that has finished nothing yet has no product, only debts.
    owing = [name for name in await catalog.kernels_owed_in_run(run.bucket, run.run) if name not in named]
    known += [RunProductRecord(name, 1, 0, run) for name in owing]
    waiting = await elsewhere.waiting(catalog, run.bucket, run.run) if known else {}
    products = [await _product(catalog, product, waiting.get(product.kernel, {}), elsewhere) for product in known]
    return Run(
        prefix=_text(run.run),
        state="closed" if run.closed_ns else "open",
        last_member_ns=run.member_ns,
        closed_ns=run.closed_ns,
        closed_by=run.closed_by,
        products=products,
    )


async def _product(
    catalog: Catalog, product: RunProductRecord, waiting: Mapping[str, int], elsewhere: Elsewhere
) -> Product:
    run = product.run
    partials = await catalog.partials(run.bucket, run.run, product.kernel)
    owed = await catalog.owed_in_run(run.bucket, run.run, product.kernel, OWED_MAX)
    unreachable = await elsewhere.unreachable(catalog, partials)
    return Product(
        kernel=product.kernel,
        key=_text(run_key(product.kernel, run.run)),
        members=sum(partial.members for partial in partials),
        groups=len({partial.group for partial in partials}),
        pending=owed.pending,
        failed=owed.failed,
        complete=bool(run.closed_ns) and owed.pending == 0 and product.stored >= product.changed,
        error=owed.failures[0][1] if owed.failures else "",
        error_key=_text(owed.failures[0][0]) if owed.failures else "",
        waits=sentence(collections.Counter(waiting) + collections.Counter(unreachable)),
    )


async def close_run(catalog: Catalog, bucket: str, run: bytes, elsewhere: Elsewhere) -> Run:
    """Raises NoSuchBucket, NoSuchKey (nothing under this prefix ever had a kernel), CatalogUnavailable."""
    await catalog.close_run(bucket, run, "request")
    return await describe(catalog, await catalog.run(bucket, run), elsewhere)


def _text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")
