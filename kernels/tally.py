"""What the kernel room counts: one place that knows the names of its metrics (ingest/counters.py)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ingest.counters import Counters
from kernels.contract import DROP, KEEP, REPLACE, STOP

ERROR_KINDS = ("crash", "timeout", "lie", "format", "compile", "refused", "offload", "misfit")


class Tally:
    """Cells of this worker; every method costs a few additions."""

    def __init__(self, counters: Counters) -> None:
        self._keep = counters.cell("hiss_kernel_frames_total", "keep")
        self._drop = counters.cell("hiss_kernel_frames_total", "drop")
        self._replace = counters.cell("hiss_kernel_frames_total", "replace")
        self._unreduced = counters.cell("hiss_kernel_frames_total", "unreduced")
        self._caught_up = counters.cell("hiss_kernel_catchup_frames_total")
        self._compared = counters.cell("hiss_kernel_offload_compared_total")
        self._products = counters.cell("hiss_kernel_products_total")
        self._filtered = counters.cell("hiss_raw_filtered_objects_total")
        self._saved_bytes = counters.cell("hiss_raw_filter_saved_bytes_total")
        self._feedback_dropped = counters.cell("hiss_feedback_dropped_total")
        self._errors = {kind: counters.cell("hiss_kernel_errors_total", kind) for kind in ERROR_KINDS}
        self.sandboxes = counters.cell("hiss_kernel_sandboxes")
        self.disabled = counters.cell("hiss_kernels_disabled")
        self.too_slow = counters.cell("hiss_kernels_too_slow")
        self.cores_failed = counters.cell("hiss_kernel_offload_fallbacks")
        self.lag = counters.cell("hiss_kernel_lag_frames")

    def judged(self, verdicts: npt.NDArray[np.uint8], *, live: bool) -> None:
        kept = int(np.count_nonzero((verdicts == KEEP) | (verdicts == STOP)))
        dropped = int(np.count_nonzero(verdicts == DROP))
        replaced = int(np.count_nonzero(verdicts == REPLACE))
        self._keep.add(kept)
        self._drop.add(dropped)
        self._replace.add(replaced)
        self._unreduced.add(len(verdicts) - kept - dropped - replaced)
        if not live:
            self._caught_up.add(len(verdicts))

    def given_up(self, frames: int) -> None:
        self._unreduced.add(frames)

    def error(self, kind: str) -> None:
        """A kind that is not in the table counts as a crash."""
        self._errors.get(kind, self._errors["crash"]).add()

    def compared(self) -> None:
        """A frame of an offloaded kernel was judged again by the plain one, with the same result."""
        self._compared.add()

    def product(self) -> None:
        self._products.add()

    def filtered(self, raw_bytes: int, left_bytes: int) -> None:
        self._filtered.add(raw_bytes != left_bytes)
        self._saved_bytes.add(max(0, raw_bytes - left_bytes))

    def feedback_dropped(self, events: int) -> None:
        self._feedback_dropped.add(events)
