"""One arena batch for several kernels: claimed once, released once, and never held for the slowest.

In: a ``FrameBatch`` and how many kernels want it. Out: one share for each, a ``FrameBatch`` of its own. Once the first
kernel has claimed the batch, the arena can no longer take it back; so a kernel that has not begun with its share HOLD_S
after another is done loses it, and finds those frames on disk.
"""

from __future__ import annotations

import asyncio

from ingest.ports import FrameBatch

HOLD_S = 0.2


class Share:
    """One kernel's share. ``release`` may be called again without harm."""

    __slots__ = ("_claimed", "_over", "_parent", "count", "first_frame", "offset", "position", "region")

    def __init__(self, parent: SharedBatch, batch: FrameBatch) -> None:
        self.region = batch.region
        self.offset = batch.offset
        self.first_frame = batch.first_frame
        self.count = batch.count
        self.position = batch.position
        self._parent = parent
        self._claimed = False
        self._over = False

    @property
    def revoked(self) -> bool:
        return self._over or self._parent.batch.revoked

    def dispatched(self) -> bool:
        self._claimed = not self._over and self._parent.claim()
        return self._claimed

    def release(self) -> None:
        if not self._over:
            self._over = True
            self._parent.one_done()

    def expire(self) -> None:
        """Take the share away unless its kernel has begun."""
        if not self._claimed:
            self.release()


class SharedBatch:
    """``shares`` are handed out, one a kernel; the batch is released with the last."""

    __slots__ = ("_claimed", "_left", "batch", "shares")

    def __init__(self, batch: FrameBatch, kernels: int) -> None:
        self.batch = batch
        self._left = kernels
        self._claimed: bool | None = None
        self.shares = tuple(Share(self, batch) for _ in range(kernels))

    def claim(self) -> bool:
        if self._claimed is None:
            self._claimed = self.batch.dispatched()
        return self._claimed

    def one_done(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.batch.release()
        elif self._left == len(self.shares) - 1 and self._claimed:
            asyncio.get_running_loop().call_later(HOLD_S, self.expire)

    def expire(self) -> None:
        for share in self.shares:
            share.expire()
