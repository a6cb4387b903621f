"""What is known of a machine's ability to confine kernels: a value that workers write down and others show."""

from __future__ import annotations

import enum

import msgspec


class Verdict(enum.StrEnum):
    TESTING = "testing"
    CONFINED = "confined"
    """Kernels run, and cannot leave their process."""
    REFUSED = "refused"
    """The machine cannot confine kernels: none runs."""
    ACCEPTED = "unconfined"
    """The machine cannot confine kernels, and the operator lets them run all the same."""


class Standing(msgspec.Struct, frozen=True):
    """``failures``: what the self-test found wrong, one line each; empty while it is under way or holds."""

    verdict: Verdict = Verdict.TESTING
    landlock_abi: int = 0
    failures: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return self.verdict in (Verdict.CONFINED, Verdict.ACCEPTED)

    @property
    def reason(self) -> str:
        """Why no kernel runs, for operators and scientists."""
        if self.verdict is Verdict.TESTING:
            return "whether this machine can confine kernels is being tested"
        return f"this machine cannot confine kernels ({'; '.join(self.failures)})"
