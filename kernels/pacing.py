"""What a worker's host knows of how fast its kernels are: measured while they run, tried out when they are submitted.

In: what lanes measure, submissions, changes of a bucket's kernels. Out: which kernels of a bucket are late (do not run live in
the slot that it is in), how many are too slow, and a verdict on one that is submitted. What always holds: nothing here delays a
stream; a bucket that has reserved no rate costs a look into a dictionary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from ingest.errors import IngestError, KernelsUnavailable
from ingest.ports import KernelRefused
from ingest.records import FrameGeometry
from kernels.admission import REFUSE, SlotAdmission
from kernels.attach import Attachment
from kernels.dryrun import DryRuns
from kernels.pace import Paces

WITHIN_S = 60.0
"""A change of kernels within so long of a submission is that submission."""
AFTER_S = 1.5
"""How long a dry run waits that nobody waits for: frames that come at once find the cores free, and show the pace themselves."""
WAIT_S = 60.0
"""How long a submission waits for its dry run, those before it included."""
BUCKETS_MAX = 64


class Pacing:
    """``seen``: layouts of frames that came to a bucket, the latest first."""

    def __init__(
        self, paces: Paces, dry_runs: DryRuns, admission: SlotAdmission, seen: Callable[[str], Sequence[FrameGeometry]]
    ) -> None:
        self._paces = paces
        self._dry_runs = dry_runs
        self._admission = admission
        self._seen = seen
        self._submitted: dict[str, float] = {}
        """Bucket -> when something was submitted to it in this worker, by the loop's clock."""

    async def prepare(self, bucket: str) -> None:
        """To be awaited before ``late``; never raises."""
        await self._admission.prepare(bucket)

    def late(self, bucket: str, attached: Iterable[Attachment]) -> frozenset[str]:
        """Kernels that do not run live now: too slow for the slot that the bucket is in on this node."""
        return self._admission.late(bucket, attached)

    def too_slow(self, bucket: str, attached: Iterable[Attachment]) -> int:
        """How many are, whatever the bucket makes of it."""
        return sum(not demand.fits for demand in self._admission.demands(bucket, attached))

    def live(self, bucket: str, attachment: Attachment, geometry: FrameGeometry, bytes_per_s: float) -> None:
        """A lane measured it on frames that came."""
        self._paces.live(bucket, attachment, geometry, bytes_per_s)

    async def look_around(self) -> None:
        """Learn what the node's other workers found."""
        await self._paces.look_around()

    def submitting(self, bucket: str) -> None:
        """Something is being submitted to the bucket here: this worker makes its dry runs."""
        self._submitted.pop(bucket, None)
        self._submitted[bucket] = asyncio.get_running_loop().time()
        while len(self._submitted) > BUCKETS_MAX:
            del self._submitted[next(iter(self._submitted))]

    def was_submitted(self, bucket: str) -> bool:
        """Whether a change of its kernels is that submission."""
        since_s = self._submitted.get(bucket)
        return since_s is not None and asyncio.get_running_loop().time() < since_s + WITHIN_S

    async def measure(self, bucket: str, known: Callable[[], Iterable[Attachment]]) -> None:
        """Know the pace of each of the bucket's kernels, once their first frames have had their sandboxes."""
        await asyncio.sleep(AFTER_S)
        await self._paces.look_around()
        for attachment in list(known()):
            await self._dry_runs.measure(bucket, attachment, self._seen(bucket))

    async def judge(self, bucket: str, submitted: Attachment, others: Sequence[Attachment]) -> None:
        """Where the bucket has reserved a rate and wants no kernel that is too slow for it: measure it now. Raises KernelRefused,
        or KernelsUnavailable where it could not be tried."""
        if not self._admission.reserved(bucket):
            return
        try:
            policy = await self._admission.learn(bucket)
        except IngestError as error:
            raise KernelsUnavailable(f"the bucket's settings cannot be read at the moment: {error}") from None
        if policy != REFUSE:
            return  # measured soon, once it is attached
        self._dry_runs.forget(bucket, submitted)
        try:
            async with asyncio.timeout(WAIT_S):
                await self._dry_runs.measure(bucket, submitted, self._seen(bucket))
        except TimeoutError:
            raise KernelsUnavailable("other kernels are being tried at the moment") from None
        if failed := self._dry_runs.failure(bucket, submitted):
            raise KernelRefused(
                submitted.kernel.file, 1, f"its dry run over noise failed, so its pace is not known: {failed}"
            )
        if reason := self._admission.refusal(bucket, submitted, others):
            raise KernelRefused(
                submitted.kernel.file,
                1,
                f"{reason}; it is refused by the bucket's tag hiss.kernel-admission=refuse: with catch-up it is admitted, and "
                "reduces in the slot what is stored already",
            )
