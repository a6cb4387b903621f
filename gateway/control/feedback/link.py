"""The control process's end of a bridge (gateway/bridge): hands it orders, and says what became of each.

In: ``Order``s of actions. Out: ``done(order, outcome, error)`` for each, outcome sent, failed, late or superseded. What always
holds: a target has one write under way, and behind it only the newest order waits, so a target that hangs costs no memory and no
other target's time; an order that grew old while it waited is not written; a safe value is tried again until it is written, a
newer order takes its place, or SAFE_RETRY_S are over; ``send`` never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from gateway.bridge import wire
from gateway.control.feedback.actions import Order
from ingest.paths import socket_address

logger = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 3.0
ANSWER_GRACE_S = 1.0
"""The bridge answers for a target that hangs; if the bridge hangs, the order counts as failed this much later."""
TARGETS_MAX = 512
SAFE_RETRY_S = 60.0
SAFE_RETRY_PAUSE_S = 0.5
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 2.0

Done = Callable[[Order, str, str], None]


@dataclasses.dataclass(slots=True)
class _UnderWay:
    number: int
    order: Order
    timer: asyncio.TimerHandle


class Link:
    """``run`` on the loop that sends; it ends when cancelled."""

    def __init__(self, scheme: str, path: Path, done: Done) -> None:
        self._scheme = scheme
        self._path = path
        self._done = done
        self._numbers = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._under_way: dict[str, _UnderWay] = {}
        self._waiting: dict[str, Order] = {}
        self._told: set[Order] = set()
        """Safe orders whose first failure was reported."""

    @property
    def connected(self) -> bool:
        return self._writer is not None

    def send(self, order: Order) -> bool:
        """False: nothing is there to take it. A safe order is always taken, and waits."""
        target = order.target.partition(":")[2]
        known = target in self._under_way or target in self._waiting
        if (not known and len(self._under_way) + len(self._waiting) >= TARGETS_MAX) or (
            not self.connected and not order.safe
        ):
            return False
        self._wait(target, order)
        self._next(target)
        return True

    def _wait(self, target: str, order: Order) -> None:
        older = self._waiting.get(target)
        if older is not None:
            self._finish(older, "superseded")
        self._waiting[target] = order

    def _next(self, target: str) -> None:
        """Hand the waiting order on, if its target is free."""
        if self._writer is None or target in self._under_way or target not in self._waiting:
            return
        order = self._waiting.pop(target)
        now_s = time.monotonic()
        if order.is_late(now_s):
            self._finish(order, "late")
            return
        if now_s - order.born_s > SAFE_RETRY_S:
            self._finish(order, "failed", f"not written within {SAFE_RETRY_S:g} s")
            return
        number = next(self._numbers)
        timer = asyncio.get_running_loop().call_later(
            WRITE_TIMEOUT_S + ANSWER_GRACE_S, self._answered, target, number, "the bridge process does not answer"
        )
        self._under_way[target] = _UnderWay(number, order, timer)
        self._writer.write(
            wire.encode(wire.Write(number, target, order.value, WRITE_TIMEOUT_S, now_s + WRITE_TIMEOUT_S))
        )

    def _answered(self, target: str, number: int, error: str) -> None:
        held = self._under_way.get(target)
        if held is None or held.number != number:
            return  # an answer after its time
        del self._under_way[target]
        held.timer.cancel()
        if not error:
            self._finish(held.order, "sent")
        elif held.order.safe and time.monotonic() - held.order.born_s < SAFE_RETRY_S:
            self._again(target, held.order, error)
        else:
            self._finish(held.order, "failed", error)
        self._next(target)

    def _again(self, target: str, order: Order, error: str) -> None:
        if target in self._waiting:
            self._finish(order, "superseded")
            return
        if order not in self._told:
            self._told.add(order)
            self._done(order, "failed", f"{error}; the safe value is tried again")
        # Under way until then: a newer order waits behind it no longer than that.
        timer = asyncio.get_running_loop().call_later(SAFE_RETRY_PAUSE_S, self._retry, target, order)
        self._under_way[target] = _UnderWay(0, order, timer)

    def _retry(self, target: str, order: Order) -> None:
        del self._under_way[target]
        if target in self._waiting:
            self._finish(order, "superseded")
        else:
            self._waiting[target] = order
        self._next(target)

    def _finish(self, order: Order, outcome: str, error: str = "") -> None:
        self._told.discard(order)
        self._done(order, outcome, error)

    async def run(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(socket_address(self._path))
            except OSError:
                await asyncio.sleep(backoff_s)
                backoff_s = min(BACKOFF_MAX_S, 2 * backoff_s)
                continue
            backoff_s = BACKOFF_FIRST_S
            try:
                for target in list(self._waiting):
                    self._next(target)
                await self._read(reader)
            finally:
                self._writer.close()
                self._writer = None
                self._lost()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            try:
                while True:
                    answer = wire.WRITTEN.decode(await wire.read(reader))
                    for target, held in self._under_way.items():
                        if held.number == answer.number:
                            self._answered(target, answer.number, answer.error)
                            break
            except (ValueError, msgspec.MsgspecError) as error:
                logger.warning("the %s bridge talks nonsense: %s", self._scheme, error)

    def _lost(self) -> None:
        logger.info("the %s bridge closed the connection; connecting again", self._scheme)
        for target, held in list(self._under_way.items()):
            if held.number:
                self._answered(target, held.number, "the bridge process ended")
