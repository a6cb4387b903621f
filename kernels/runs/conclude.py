"""``finish()`` over the merged state of a run, in a sandbox of the kernel.

In: a state and the layout of some member's frames (a lane is for one layout). Out: the state after ``finish()``, or None where
the group's kernel is not the bucket's any more or no sandbox can be had: the product is then without a result.
"""

from __future__ import annotations

from ingest.records import FrameGeometry
from kernels.lane import LaneRefused, StateArrays
from kernels.runs.gather import RunHost
from kernels.runs.names import group_of
from kernels.sandbox import Reply
from kernels.scheduler import Run


class _Guest:
    """A stream without frames (``LaneClient``)."""

    def table(self, run: Run) -> bytes:
        return b""

    def judged(self, run: Run, reply: Reply) -> None: ...
    def stopped(self, frame: int) -> None: ...
    def restarted(self) -> None: ...
    def voided(self, first: int, count: int) -> None: ...
    def merge(self, state: StateArrays) -> None: ...
    def banked(self, final: bool) -> None: ...
    def lagged(self) -> None: ...
    def refused(self, kind: str, reason: str) -> None: ...


async def conclude(
    host: RunHost, bucket: str, kernel: str, group: str, geometry: FrameGeometry, state: StateArrays
) -> StateArrays | None:
    attachment = await host.attachment(bucket, kernel)
    domain = host.pad.domain(bucket)
    if attachment is None or domain is None or group_of(attachment) != group or not attachment.kernel.has_finish:
        return None
    lane = host.lane(bucket, attachment, geometry, domain)
    stream = lane.join(_Guest())
    try:
        return await lane.conclude(stream, state)
    except LaneRefused:
        return None
    finally:
        lane.leave(stream)
