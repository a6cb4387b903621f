"""The life of a committed version: the one table of ObjectState transitions.

In: a state and what happened. Out: the next state, or StaleVersion when that cannot happen to a version in this state
(it was deleted, replaced, or somebody else was quicker). Nothing else in the project changes a state. Pure.

    receiving ─commit─▶ buffered ─claim─▶ draining ─drained─▶ archived ─evict─▶ evicted ─recall─▶ recalling ─recalled─▶ archived

Two invariants the table carries: only ``drained`` leads to ``archived`` for the first time, and only from ``archived``
can a buffered copy be dropped, so nothing is evicted that the archive has not confirmed.
"""

from __future__ import annotations

import enum

from ingest.errors import StaleVersion
from ingest.records import ObjectState


class Event(enum.StrEnum):
    """What happens to a version."""

    COMMIT = "commit"
    CLAIM = "claim"
    DRAINED = "drained"
    DRAIN_FAILED = "drain-failed"
    EVICT = "evict"
    REQUEST_RECALL = "request-recall"
    RECALLED = "recalled"
    RECALL_FAILED = "recall-failed"
    DELETE = "delete"
    MARK = "mark"


_S = ObjectState
TRANSITIONS: dict[tuple[ObjectState, Event], ObjectState] = {
    (_S.RECEIVING, Event.COMMIT): _S.BUFFERED,
    (_S.BUFFERED, Event.CLAIM): _S.DRAINING,
    (_S.DRAINING, Event.CLAIM): _S.DRAINING,  # the lease ran out: another attempt takes over
    (_S.DRAINING, Event.DRAINED): _S.ARCHIVED,
    # The attempt was given up (lease, restart) and yet its copy turned out published and verified.
    (_S.BUFFERED, Event.DRAINED): _S.ARCHIVED,
    (_S.DRAINING, Event.DRAIN_FAILED): _S.BUFFERED,
    (_S.ARCHIVED, Event.EVICT): _S.EVICTED,
    (_S.EVICTED, Event.REQUEST_RECALL): _S.RECALLING,
    (_S.RECALLING, Event.REQUEST_RECALL): _S.RECALLING,  # the node that was at it is gone: another takes over
    (_S.RECALLING, Event.RECALLED): _S.ARCHIVED,
    (_S.RECALLING, Event.RECALL_FAILED): _S.EVICTED,
    (_S.RECEIVING, Event.MARK): _S.MARKER,
} | {
    (state, Event.DELETE): _S.DELETED
    for state in (_S.BUFFERED, _S.DRAINING, _S.ARCHIVED, _S.EVICTED, _S.RECALLING, _S.MARKER)
}  # fmt: skip


def transition(state: ObjectState, event: Event) -> ObjectState:
    """The state after ``event``; raises StaleVersion when the table has no such transition."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise StaleVersion(f"{event} cannot happen to a version that is {state}") from None


def possible(state: ObjectState, event: Event) -> bool:
    return (state, event) in TRANSITIONS
