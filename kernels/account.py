"""The frame ledger of one version while its kernels judge it.

In: what was received, the verdicts as they come, where kernels stopped, what earlier kernels said of the same frames. Out: the
``FrameLedger`` as of now. What always holds: its parts add up to what was received.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ingest.records import FrameLedger
from kernels.verdicts import Verdicts


@dataclasses.dataclass(slots=True)
class Account:
    verdicts: Verdicts
    received: int = 0
    trailing_bytes: int = 0
    gaps: tuple[tuple[int, int], ...] = ()
    prior: FrameLedger | None = None
    """What other kernels made of these frames before."""
    discarded_bytes: int | None = None
    """Of a body that was cut off behind a STOP."""

    def ledger(self, declared: int | None, stopped_at: Sequence[int]) -> FrameLedger:
        """``declared``: the frames that the version says it has. ``stopped_at``: by each kernel that said STOP."""
        received, verdicts, prior = self.received, self.verdicts, self.prior
        stops = list(stopped_at)
        kept, dropped, replaced, after_stop = verdicts.kept, verdicts.dropped, verdicts.replaced, verdicts.after_stop
        if prior is not None:
            # What any kernel kept stays kept.
            kept, dropped = max(kept, prior.kept), min(dropped, prior.dropped)
            replaced = min(max(replaced, prior.replaced), received - kept - dropped)
            after_stop = min(max(after_stop, prior.after_stop), received - kept - dropped - replaced)
            stops += [prior.stopped_at] if prior.stopped_at is not None else []
        truncated = self.discarded_bytes is not None
        # What was cut off behind a STOP is no gap: it was sent, and was not wanted.
        missing = declared - received if declared is not None and not truncated else 0
        return FrameLedger(
            received=received,
            kept=kept,
            dropped=dropped,
            replaced=replaced,
            stored=received,
            unreduced=max(0, received - kept - dropped - replaced - after_stop),
            gaps=((received, missing),) if missing > 0 else self.gaps,
            trailing_bytes=self.trailing_bytes,
            stopped_at=min(stops, default=None),
            after_stop=after_stop,
            truncated=truncated,
            discarded_bytes=self.discarded_bytes or 0,
        )
