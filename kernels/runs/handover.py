"""What this worker just stored for runs that it keeps itself: handed to the keeper in memory.

In: a partial, under the object id with which it is about to be stored. Out: the same partial, once, when the keeper finds that id
in the catalogue. What always holds: the catalogue decides what counts, this only spares reading it; what is not here (of
another worker, of an earlier process, too much at once) is read from storage, and is the same bit for bit.
"""

from __future__ import annotations

from kernels.runs.keeping import Keeping
from kernels.runs.partial import Partial

BYTES_MAX = 64 << 20
"""Of states and members that wait for the keeper; the oldest give way."""


class Handover:
    """Of one worker. Belongs to its event loop."""

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping
        self._waiting: dict[bytes, Partial] = {}
        self._size_bytes = 0

    def keeps(self, bucket: str, run: bytes, kernel: str) -> bool:
        """Whether this worker's keeper makes the product of the run."""
        return self._keeping.keeps(bucket, run, kernel)

    def give(self, object_id: bytes, partial: Partial) -> None:
        """Before it is stored: the keeper may look at once."""
        self._waiting[object_id] = partial
        self._size_bytes += partial.size_bytes
        while self._size_bytes > BYTES_MAX:
            self.take(next(iter(self._waiting)))

    def take(self, object_id: bytes) -> Partial | None:
        """Also for what was not stored after all."""
        partial = self._waiting.pop(object_id, None)
        if partial is not None:
            self._size_bytes -= partial.size_bytes
        return partial
