"""The frame ledger of an object of one frame, while its kernels judge it at different times. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ingest.records import FrameLedger, ObjectRecord
from kernels.contract import DROP, KEEP, REPLACE, STOP


class OneFrame:
    """Kept if any kernel keeps it, else replaced if any replaces it, dropped if all drop it, else unreduced: as
    kernels/verdicts.py counts."""

    __slots__ = ("_prior", "_ruling", "_trailing_bytes", "_verdicts")

    def __init__(
        self, kernels: Iterable[str], trailing_bytes: int, prior: FrameLedger | None, ruling: Iterable[str] = ()
    ) -> None:
        """``prior``: what kernels that are not among ``kernels`` said before. ``ruling``: kernels that filter raw data
        decide alone."""
        self._verdicts: dict[str, int | None] = dict.fromkeys(kernels)
        self._ruling = frozenset(ruling)
        self._trailing_bytes = trailing_bytes
        self._prior = prior

    def record(self, kernel: str, verdict: int | None) -> None:
        """None: it must be judged again."""
        self._verdicts[kernel] = verdict

    def ledger(self) -> FrameLedger:
        said = [verdict for name, verdict in self._verdicts.items() if not self._ruling or name in self._ruling]
        kept = int(any(verdict in (KEEP, STOP) for verdict in said))
        replaced = int(REPLACE in said and not kept)
        dropped = int(bool(said) and all(verdict == DROP for verdict in said))
        if self._prior is not None:
            kept = max(kept, self._prior.kept)
            replaced = 0 if kept else max(replaced, self._prior.replaced)
            dropped = 0 if kept or replaced else min(dropped, self._prior.dropped)
        return FrameLedger(
            received=1,
            kept=kept,
            dropped=dropped,
            replaced=replaced,
            stored=1,
            unreduced=1 - kept - replaced - dropped,
            trailing_bytes=self._trailing_bytes,
        )


def prior_of(record: ObjectRecord, complete: bool) -> FrameLedger | None:
    """The stored ledger, where it holds verdicts of kernels that are not asked now (``complete`` is False)."""
    ledger = record.ledger
    judged = 0 if ledger is None else ledger.kept + ledger.dropped + ledger.replaced
    return ledger if not complete and judged else None
