"""The processes of a node: one table, in the order they are started (stopping has an order of its own)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gateway.settings import Settings
from ingest import counters

DRAIN_SLOT = 31
"""Segment slot of the drain process: recalled bytes live there. Workers are 0..30."""
ZYGOTE_SLOT = 35


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """One kind of process."""

    name: str
    slots: tuple[int, ...]
    stop_stage: int
    """Stages stop one after the other, lowest first; the processes of a stage stop together."""
    essential: bool = True
    """The node's start fails if it cannot be started; others are retried in the background from the start."""
    barrier: bool = False
    """Nothing after it is started before it is ready."""
    listeners: frozenset[str] = frozenset()
    """Which of ``s3``, ``control``, ``dav`` it accepts on."""
    arena: bool = False
    """Whether each slot has arena regions and a span table."""
    holds_lock: bool = True
    """Whether it inherits the data folder's lock: no other node can start before this process is gone, too."""
    command: Callable[[str, int], list[str]] | None = None
    """Makes a command line of its own from (role, boot fd); without one the nursery forks it."""


def node_roles(settings: Settings) -> tuple[Role, ...]:
    """The node's table, in start order."""
    zygote = Role("zygote", (ZYGOTE_SLOT,), stop_stage=3, essential=False, holds_lock=False)
    slots = {"epics": counters.EPICS, "tango": counters.TANGO}
    # Stopped after the control process, whose last safe values they still write.
    bridges = (Role(name, (slots[name],), 3, essential=False, holds_lock=False) for name in settings.feedback_schemes)
    return (
        Role("catalogue", (counters.CATALOGUE,), stop_stage=4, barrier=True),
        *((zygote,) if settings.kernels != "off" else ()),
        Role("worker", tuple(range(settings.workers)), 0, listeners=frozenset({"s3", "dav"}), arena=True),
        Role("drain", (DRAIN_SLOT,), stop_stage=1, essential=False),
        *bridges,
        Role("control", (counters.CONTROL,), stop_stage=2, listeners=frozenset({"control"})),
    )
