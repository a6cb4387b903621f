"""May kernels run on this machine? Decided by trying, before the first frame goes to a sandbox.

In: the zygote's socket, and whether the operator accepted a machine that cannot confine kernels. Out: ``Standing``, told to
whoever asks and at every change to ``tell``. What always holds: nothing is granted before a self-test has passed, or has
failed and been accepted; a refusal is looked at again, because a machine short of memory fails a test it would pass later.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable

from kernels.selftest import self_test
from kernels.standing import Standing, Verdict

log = logging.getLogger("hiss.kernels")

AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0)
"""Waits between self-tests while they fail; the last for ever after."""
UNREACHABLE = "the fork server does not answer"


class Clearance:
    """One for each process that hands frames to sandboxes: it has seen for itself that they hold."""

    def __init__(
        self,
        zygote_socket: str,
        *,
        accept_unconfined: bool = False,
        tell: Callable[[Standing], None] | None = None,
        standing: Standing | None = None,
    ) -> None:
        """``standing``: what is known already; ``tell`` hears of every change."""
        self.standing = standing or Standing()
        self._zygote_socket = zygote_socket
        self._accept_unconfined = accept_unconfined
        self._tell = tell
        self._granted = asyncio.Event()
        self._decided = asyncio.Event()
        if self.standing.runs:
            self._grant()

    async def granted(self) -> None:
        """Returns once kernels may run; never where they may not."""
        await self._granted.wait()

    async def decided(self, timeout_s: float) -> Standing:
        """The standing as soon as kernels may run, or were refused twice, else as it is after ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._decided.wait()
        return self.standing

    async def obtain(self) -> None:
        """Test until kernels may run."""
        for attempt in itertools.count():
            if self.standing.runs:
                self._grant()
                return
            if attempt:
                await asyncio.sleep(AGAIN_S[min(attempt, len(AGAIN_S)) - 1])
            before = self.standing
            self._stand(await self._test())
            if before.verdict is self.standing.verdict is Verdict.REFUSED:
                self._decided.set()

    def _grant(self) -> None:
        self._granted.set()
        self._decided.set()

    async def _test(self) -> Standing:
        report = await self_test(self._zygote_socket)
        if report.holds:
            return Standing(Verdict.CONFINED, report.landlock_abi)
        if not report.answered:
            return Standing(Verdict.TESTING, report.landlock_abi, (UNREACHABLE,))
        verdict = Verdict.ACCEPTED if self._accept_unconfined and report.computes else Verdict.REFUSED
        return Standing(verdict, report.landlock_abi, report.failures)

    def _stand(self, standing: Standing) -> None:
        if standing == self.standing:
            return
        self.standing = standing
        if standing.verdict is Verdict.REFUSED:
            log.error("kernels do not run: %s", standing.reason)
        elif standing.verdict is Verdict.ACCEPTED:
            log.warning("kernels run although %s: the operator accepted that", standing.reason)
        if self._tell is not None:
            self._tell(standing)
