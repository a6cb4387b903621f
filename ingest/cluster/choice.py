"""Which other node gets the second copy of a body. Pure.

In: the members as they are believed to be, what this process sends to each already, whom it has failed with. Out: candidates, the
best first. Always holds: only a living member that is up, is not this one and has room by its own account is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ingest.cluster.members import Member

FAILURES_MAX = 2
"""A node that failed so often with one body is not asked again for it: once may have been the connection."""


def candidates(
    members: Sequence[Member],
    me: int,
    length: int | None,
    *,
    sending: Mapping[int, int] | None = None,
    failures: Mapping[int, int] | None = None,
    doubtful: Callable[[int], bool] = lambda _: False,
) -> list[Member]:
    """``sending``: bodies that this process sends to each node now, which their heartbeats may not tell yet; ``failures``:
    attempts with this body that came to nothing; ``doubtful``: whether others have lately failed with a node.

    A node of another failure domain goes before one of ours, one that has not failed before one that has; then the one with most
    free bytes for each body that it takes already.
    """
    sending, failures = sending or {}, failures or {}
    ours = next((member.record.domain for member in members if member.node == me), "")

    def rank(member: Member) -> tuple[int, bool, bool, float, int]:
        beside_us = bool(ours) and member.record.domain == ours
        bodies = max(member.load.bodies, sending.get(member.node, 0))
        doubt = doubtful(member.node)
        return failures.get(member.node, 0), doubt, beside_us, -member.free_bytes / (1 + bodies), member.node

    possible = (
        member
        for member in members
        if member.node != me
        and member.takes_bodies
        and member.record.s3
        and member.free_bytes > (length or 0)
        and failures.get(member.node, 0) < FAILURES_MAX
    )
    return sorted(possible, key=rank)
