"""Whether the kernels of a bucket keep up with what it has reserved, as this node's and the other nodes' workers measured them.

In: the workers' files of paces, what other nodes tell, the bucket's kernels and reservations. Out: ``Demand``s for one
reservation; for each kernel its pace and the slots it is too slow for. Nodes are taken to be alike: a share on another node is
weighed against this one's cores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ingest import bucket_settings
from ingest.ports import Catalog
from ingest.records import ObjectRecord, Reservation
from kernels import pace
from kernels.admission import WARN, Demand, Room, rate_on, too_slow, weigh
from kernels.attach import KERNEL_PREFIX, kernel_name
from kernels.pace import Pace

OBJECTS_MAX = 2000


class KernelPaces:
    """``elsewhere``: what the workers of other nodes measured."""

    def __init__(self, run_folder: Path, room: Room, elsewhere: Callable[[], Sequence[Pace]] = lambda: ()) -> None:
        self._run_folder = run_folder
        self._room = room
        self._elsewhere = elsewhere

    async def of(self, bucket: str, sources: Sequence[ObjectRecord]) -> dict[str, Pace | None]:
        """By kernel; None: not measured yet. ``sources``: the objects of the bucket's kernels."""
        found: dict[str, Pace | None] = {}
        submitted = {}
        for record in sources:
            name = kernel_name(record.key)
            if name is not None:
                found[name], submitted[name] = None, record.modified_ns
        for one in sorted([*self._elsewhere(), *await here(self._run_folder)], key=lambda one: (one.live, one.time_ns)):
            if one.bucket == bucket and submitted.get(one.kernel) == one.submitted_ns:
                found[one.kernel] = one
        return found

    async def weighed(self, catalog: Catalog, reservation: Reservation) -> list[Demand]:
        """What the bucket's kernels take of its largest share; none where it reserves no rate."""
        rate = rate_on(reservation, None)
        if not rate:
            return []
        rows, _ = await catalog.list_objects(reservation.bucket, prefix=KERNEL_PREFIX, limit=OBJECTS_MAX)
        sources = [row.record for row in rows if row.record is not None]
        return weigh(await self.of(reservation.bucket, sources), rate, self._room)

    def slow(
        self, bucket: str, paces: Mapping[str, Pace | None], reservations: Sequence[Reservation]
    ) -> dict[str, str]:
        """As ``too_slow``. ``reservations``: of all buckets, that have not ended."""
        return too_slow(paces, (one for one in reservations if one.bucket == bucket), self._room)


async def policy_of(catalog: Catalog, bucket: str) -> str:
    """``hiss.kernel-admission``. Raises NoSuchBucket."""
    return bucket_settings.parse((await catalog.bucket(bucket)).tags).kernel_admission


def refusal(demands: Sequence[Demand]) -> str:
    """Why a reservation is not made where the bucket wants none that its kernels are too slow for; empty where it may be."""
    slow = [demand.said for demand in demands if not demand.fits]
    if not slow:
        return ""
    return (
        f"kernels of the bucket are too slow for it ({'; '.join(slow)}): remove them, ask for less, or set the bucket's tag "
        "hiss.kernel-admission to catch-up or warn"
    )


def consequence(policy: str) -> str:
    """What becomes of a kernel that is too slow."""
    if policy == WARN:
        return "it runs, and what it has not judged when its memory is needed is reduced from disk"
    return "in the slot it reduces what is stored already, not what arrives"


async def here(run_folder: Path) -> list[Pace]:
    """What all workers of this node say."""
    return await asyncio.to_thread(lambda: pace.read(sorted(run_folder.glob(pace.FILE_PATTERN))))
