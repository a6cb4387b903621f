"""What the cases share: the row of a figure, the things measured with, and the median of pairs."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

from bench import load
from bench.load import Outcome, Plan
from bench.node import Node
from bench.wire import Endpoint

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table. ``value`` and ``ceiling`` in ``unit``; ``wanted`` is the least (or most) ratio or value."""

    name: str
    unit: str
    value: float
    ceiling: float | None
    ceiling_name: str
    ratio: float | None
    wanted: float
    met: bool
    rounds: int
    cpu_s_per_gb: float | None = None
    cpu_s_per_gb_wanted: float | None = None
    note: str = ""


@dataclasses.dataclass(slots=True)
class Bench:
    """What the cases share: one node, the bare servers, a folder on the disk under test."""

    node: Node
    receiver: Endpoint
    folder: Path
    rounds: int
    serial: int = 0

    def prefix(self, bucket: str) -> str:
        """Keys nobody used before; a path that starts with the bucket."""
        self.serial += 1
        return f"/{bucket}/{self.serial:04d}-"

    def put(self, bucket: str, size_bytes: int, count: int, connections: int = 1, **more: object) -> Outcome:
        prefix = self.prefix(bucket)
        return load.run(Plan(self.node.endpoint, "PUT", prefix, size_bytes, count, connections, **more))  # type: ignore[arg-type]

    def bare_put(self, size_bytes: int, count: int, connections: int = 1) -> Outcome:
        return load.run(Plan(self.receiver, "PUT", "/bare/", size_bytes, count, connections))


@dataclasses.dataclass(slots=True)
class Rounds:
    values: list[float] = dataclasses.field(default_factory=list)
    ceilings: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def figure(self, name: str, unit: str, scale: float, ceiling_name: str, wanted: float, **more: object) -> Figure:
        """Median of the ratios pair by pair: the machine's speed drifts, a pair drifts together."""
        ratio = statistics.median(value / ceiling for value, ceiling in zip(self.values, self.ceilings, strict=True))
        cpu = statistics.median(self.cpu) if self.cpu else None
        cpu_wanted = more.get("cpu_s_per_gb_wanted")
        met = ratio >= wanted and (cpu is None or cpu_wanted is None or cpu <= float(str(cpu_wanted)))
        return Figure(
            name=name,
            unit=unit,
            value=statistics.median(self.values) / scale,
            ceiling=statistics.median(self.ceilings) / scale,
            ceiling_name=ceiling_name,
            ratio=ratio,
            wanted=wanted,
            met=met,
            rounds=len(self.values),
            cpu_s_per_gb=cpu,
            **more,  # type: ignore[arg-type]
        )
