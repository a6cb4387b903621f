"""One batch for several kernels: claimed once, released once, not held for the slowest."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kernels import sharing
from kernels.sharing import SharedBatch


class Batch:
    region, offset, first_frame, count = 0, 4096, 10, 4

    position = 0

    def __init__(self, *, revoked: bool = False) -> None:
        self.revoked = revoked
        self.asked = self.releases = 0

    def dispatched(self) -> bool:
        self.asked += 1
        return not self.revoked

    def release(self) -> None:
        self.releases += 1


async def test_released_with_the_last_share() -> None:
    batch = Batch()
    one, two = SharedBatch(batch, 2).shares
    assert one.dispatched()
    assert two.dispatched()
    one.release()
    one.release()
    assert batch.releases == 0
    two.release()
    assert (batch.asked, batch.releases) == (1, 1)


async def test_revoked_for_one_is_revoked_for_all() -> None:
    batch = Batch(revoked=True)
    one, two = SharedBatch(batch, 2).shares
    assert not one.dispatched()
    batch.revoked = False
    assert not two.dispatched()


async def test_the_slow_kernel_loses_its_share(monkeypatch: pytest.MonkeyPatch, until: Callable[..., object]) -> None:
    monkeypatch.setattr(sharing, "HOLD_S", 0.0)
    batch = Batch()
    fast, slow, begun = SharedBatch(batch, 3).shares
    assert fast.dispatched()
    assert begun.dispatched()
    fast.release()
    await until(lambda: slow.revoked)
    assert not slow.dispatched()
    slow.release()
    assert batch.releases == 0, "the one that has begun still reads"
    begun.release()
    assert batch.releases == 1
