"""``/v1/runs/status``: may the detector be cleared? One answer for everything under a key prefix.

In: the catalogue's records under a bucket and prefix, and, if the asker knows it, how much was sent. Out:
``RunStatus``: a verdict, counts, the sum of the frame ledgers, every gap by name, and what is still missing. What
always holds: ``safe_to_clear`` is true only when every object was seen, is on the archive and was verified there by
reading back, no frame gap is named, no upload is unfinished, and what was announced is there; in doubt it is false.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from gateway.control.elsewhere import sentence
from ingest.ports import Catalog
from ingest.records import FrameLedger, ObjectRecord
from kernels.notices import MISFIT, Notice

OBJECTS_MAX = 2_000_000
"""A run of more objects is not judged: ask for its parts."""
NAMED_MAX = 1000
"""Missing objects and gaps named in one answer; all of them are counted."""
PAGE_OBJECTS = 1000


class Missing(msgspec.Struct, frozen=True):
    """An object that is not on the archive yet."""

    key: str
    state: str
    size_bytes: int
    drain_attempts: int
    error: str


class Gap(msgspec.Struct, frozen=True):
    key: str
    first_frame: int
    frames: int


class Truncated(msgspec.Struct, frozen=True):
    """An object whose rest a kernel's STOP made unwanted: it holds what had arrived."""

    key: str
    stopped_at: int
    """The frame for which the kernel said STOP."""
    frames: int
    discarded_bytes: int


class Unfiltered(msgspec.Struct, frozen=True):
    """An object whose raw data stay as they were received, although a kernel was to filter them."""

    key: str
    reason: str


class KernelError(msgspec.Struct, frozen=True):
    """What a kernel could not do with an object (yet), or does with what was there before (a stream that runs)."""

    kernel: str
    key: str
    reason: str
    given_up: bool = False


class Frames(msgspec.Struct):
    """Sums over the frame ledgers (ingest.records.FrameLedger)."""

    received: int = 0
    kept: int = 0
    dropped: int = 0
    replaced: int = 0
    stored: int = 0
    unreduced: int = 0
    after_stop: int = 0
    missing: int = 0
    """Frames inside gaps."""
    trailing_bytes: int = 0


class RunStatus(msgspec.Struct):
    bucket: str
    prefix: str
    verdict: str = ""
    """``safe``, ``wait`` (time will do it), ``empty``, ``incomplete`` (something was never received) or ``failing``."""
    safe_to_clear: bool = False
    reasons: list[str] = []
    """Why not, one sentence each; empty when safe."""
    objects: int = 0
    size_bytes: int = 0
    archived_objects: int = 0
    archived_bytes: int = 0
    unsettled_objects: int = 0
    """Acknowledged at durability ``memory`` and not yet all on disk."""
    failing_objects: int = 0
    unfinished_uploads: int = 0
    frames: Frames = msgspec.field(default_factory=Frames)
    gap_count: int = 0
    gaps: list[Gap] = []
    truncated_objects: int = 0
    truncated: list[Truncated] = []
    unfiltered_objects: int = 0
    """At most NAMED_MAX are counted."""
    unfiltered: list[Unfiltered] = []
    kernel_errors: list[KernelError] = []
    """At most NAMED_MAX. They say nothing about whether the raw data are safe."""
    missing_objects: int = 0
    missing: list[Missing] = []
    complete: bool = True
    """False: the answer is about the first OBJECTS_MAX objects only."""


async def run_status(
    catalog: Catalog,
    bucket: str,
    prefix: bytes,
    *,
    expect_objects: int | None,
    expect_bytes: int | None,
    notices: Sequence[Notice] = (),
    waiting: Mapping[str, Mapping[str, int]] | None = None,
) -> RunStatus:
    """``waiting``: by kernel, see Elsewhere.waiting. Raises NoSuchBucket, CatalogUnavailable."""
    await catalog.bucket(bucket)
    status = RunStatus(bucket, _text(prefix))
    after, truncated = b"", True
    while truncated:
        if status.objects >= OBJECTS_MAX:
            status.complete = False
            break
        rows, truncated = await catalog.list_objects(bucket, prefix=prefix, after=after, limit=PAGE_OBJECTS)
        for row in rows:
            if row.record is not None:
                _count(status, row.record)
        truncated = truncated and bool(rows)
        after = rows[-1].key if rows else after
    uploads, more = await catalog.uploads(bucket, prefix=prefix, limit=NAMED_MAX)
    status.unfinished_uploads = len(uploads) + more
    status.unfiltered = [
        Unfiltered(_text(key), reason) for key, reason in await catalog.filters_failed(bucket, prefix, NAMED_MAX)
    ]
    status.unfiltered_objects = len(status.unfiltered)
    status.kernel_errors = [
        KernelError(one.kernel, one.key, one.error)
        for one in notices
        if one.bucket == bucket and one.kind == MISFIT and one.key.startswith(_text(prefix))
    ]
    status.kernel_errors += [
        KernelError(kernel, "", sentence(nodes)) for kernel, nodes in sorted((waiting or {}).items())
    ]
    status.kernel_errors += [
        KernelError(one.kernel, _text(one.key), one.error, one.given_up)
        for one in await catalog.owed_with_reason(bucket, prefix, NAMED_MAX)
    ]
    _judge(status, expect_objects, expect_bytes)
    return status


def _count(status: RunStatus, record: ObjectRecord) -> None:
    status.objects += 1
    status.size_bytes += record.length
    status.unsettled_objects += not record.settled
    if record.ledger is not None:
        _count_frames(status, record.key, record.ledger)
    if record.archive is not None:
        status.archived_objects += 1
        status.archived_bytes += record.length
        return
    status.missing_objects += 1
    status.failing_objects += bool(record.drain_error)
    if len(status.missing) < NAMED_MAX:
        error = record.drain_error
        missing = Missing(_text(record.key), record.state.value, record.length, record.drain_attempts, error)
        status.missing.append(missing)


def _count_frames(status: RunStatus, key: bytes, ledger: FrameLedger) -> None:
    frames = status.frames
    frames.received += ledger.received
    frames.kept += ledger.kept
    frames.dropped += ledger.dropped
    frames.replaced += ledger.replaced
    frames.stored += ledger.stored
    frames.unreduced += ledger.unreduced
    frames.after_stop += ledger.after_stop
    frames.trailing_bytes += ledger.trailing_bytes
    if ledger.truncated:
        status.truncated_objects += 1
        if len(status.truncated) < NAMED_MAX:
            stopped_at = ledger.stopped_at if ledger.stopped_at is not None else -1
            cut = Truncated(_text(key), stopped_at, ledger.received, ledger.discarded_bytes)
            status.truncated.append(cut)
    for first, count in ledger.gaps:
        frames.missing += count
        status.gap_count += 1
        if len(status.gaps) < NAMED_MAX:
            status.gaps.append(Gap(_text(key), first, count))


def _judge(status: RunStatus, expect_objects: int | None, expect_bytes: int | None) -> None:
    """The verdict: the gravest of the reasons, in the order incomplete, failing, wait."""
    absent, stuck, pending = [], [], []
    if status.gap_count:
        absent.append(f"{status.frames.missing} frames in {status.gap_count} gaps were never received")
    if expect_objects is not None and status.objects < expect_objects:
        absent.append(f"{expect_objects} objects were sent and {status.objects} are there")
    if expect_bytes is not None and status.size_bytes < expect_bytes:
        absent.append(f"{expect_bytes} bytes were sent and {status.size_bytes} are there")
    if not status.complete:
        absent.append(f"there are more than {OBJECTS_MAX} objects: ask for parts of the run")
    if status.failing_objects:
        stuck.append(f"{status.failing_objects} objects could not be archived at the last attempt and are tried again")
    if status.unfinished_uploads:
        pending.append(f"{status.unfinished_uploads} multipart uploads are neither completed nor aborted")
    if status.missing_objects > status.failing_objects:
        waiting = status.missing_objects - status.failing_objects
        pending.append(f"{waiting} objects wait to be archived and verified")
    status.reasons = absent + stuck + pending
    if not status.objects and not absent and not pending:
        status.verdict, status.reasons = "empty", ["nothing is stored under this prefix"]
        return
    status.safe_to_clear = not status.reasons
    status.verdict = "incomplete" if absent else "failing" if stuck else "wait" if pending else "safe"


def _text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")
