"""The frame ledger of an object of one frame, while its kernels judge it at different times. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ingest.records import FrameLedger, ObjectRecord
from kernels.contract import DROP, REPLACE


class OneFrame:
    """Kept if any kernel keeps it, dropped if all drop it, unreduced otherwise (as kernels/verdicts.py counts)."""

    __slots__ = ("_prior", "_trailing_bytes", "_verdicts")

    def __init__(self, kernels: Iterable[str], trailing_bytes: int, prior: FrameLedger | None) -> None:
        """``prior``: what kernels that are not among ``kernels`` said before."""
        self._verdicts: dict[str, int | None] = dict.fromkeys(kernels)
        self._trailing_bytes = trailing_bytes
        self._prior = prior

    def record(self, kernel: str, verdict: int | None) -> None:
        """None: it must be judged again."""
        self._verdicts[kernel] = verdict

    def ledger(self) -> FrameLedger:
        said = self._verdicts.values()
        kept = int(any(verdict not in (None, DROP) for verdict in said))
        dropped = int(all(verdict == DROP for verdict in said))
        if self._prior is not None:
            kept, dropped = max(kept, self._prior.kept), min(dropped, self._prior.dropped)
        return FrameLedger(
            received=1,
            kept=kept,
            dropped=dropped,
            replaced=int(REPLACE in said),
            stored=1,
            unreduced=1 - kept - dropped,
            trailing_bytes=self._trailing_bytes,
        )


def prior_of(record: ObjectRecord, complete: bool) -> FrameLedger | None:
    """The stored ledger, where it holds verdicts of kernels that are not asked now (``complete`` is False)."""
    ledger = record.ledger
    return ledger if not complete and ledger is not None and ledger.kept + ledger.dropped > 0 else None
