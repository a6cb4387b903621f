"""Prometheus exposition of the node: every process's shared-memory counters, read when somebody scrapes.

In: the node's ``Counters``, its version, and the rows of its processes. Out: metric families, and the text that
``/metrics`` answers. What always holds: counters and histograms are sums over process slots and never go back while
the node runs, for a restarted process goes on with the cells of its predecessor; no label carries a key, a bucket or
a user.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ingest import counters as shared
from ingest.counters import METRICS, SLOTS, Counters

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_BY_NAME = {metric.name: metric for metric in METRICS}


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessRow:
    """One process of the node, as DATA/run/processes.json tells it."""

    role: str
    slot: int
    pid: int | None


class Reader:
    """Sums over the process slots. Values are as fresh as the moment they are read."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def cells(self, metric: shared.Metric, labels: tuple[str, ...]) -> list[list[float]]:
        """One list of raw cells for each process slot."""
        count = metric.cells_per_series
        return [self._counters.read(slot, metric.name, labels, count) for slot in range(SLOTS)]

    def value(self, name: str, *labels: str) -> float:
        """A counter or gauge, merged as its row in METRICS says. KeyError for an unknown name or label value."""
        metric = _BY_NAME[name]
        values = [cells[0] for cells in self.cells(metric, labels)]
        return max(values) if metric.merge == "max" else sum(values)

    def total(self, name: str) -> float:
        """A counter, summed over its label values, too."""
        return sum(self.value(name, *labels) for labels in _BY_NAME[name].series())

    def by_label(self, name: str) -> dict[str, float]:
        """A counter with one label: label value -> count."""
        return {labels[0]: self.value(name, *labels) for labels in _BY_NAME[name].series()}

    def histogram(self, metric: shared.Metric, labels: tuple[str, ...]) -> tuple[list[tuple[str, float]], float]:
        """(cumulative buckets as (le, count), sum)."""
        columns = [sum(column) for column in zip(*self.cells(metric, labels), strict=True)]
        bounds = [*(repr(bound) for bound in metric.buckets), "+Inf"]
        cumulative, running = [], 0.0
        for bound, count in zip(bounds, columns, strict=False):
            running += count
            cumulative.append((bound, running))
        return cumulative, columns[-1]


class NodeCollector(Collector):
    def __init__(
        self, counters: Counters, version: str, processes: Callable[[], Sequence[ProcessRow]] = lambda: ()
    ) -> None:
        self._reader = Reader(counters)
        self._version = version
        self._processes = processes

    def collect(self) -> Iterator[Metric]:
        for metric in METRICS:
            yield self._family(metric)
        info = GaugeMetricFamily("hiss_build_info", "Always 1; says which version runs.", labels=["version"])
        info.add_metric([self._version], 1)
        yield info
        yield from process_families(self._processes())

    def _family(self, metric: shared.Metric) -> Metric:
        names = [name for name, _ in metric.labels]
        if metric.kind == "histogram":
            family = HistogramMetricFamily(metric.name, metric.help, labels=names)
            for labels in metric.series():
                buckets, total = self._reader.histogram(metric, labels)
                family.add_metric(labels, buckets, total)
            return family
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        single = kind(metric.name, metric.help, labels=names)
        for labels in metric.series():
            single.add_metric(labels, self._reader.value(metric.name, *labels))
        return single


def process_families(rows: Iterable[ProcessRow]) -> Iterator[Metric]:
    """Memory, processor time and descriptors by role and slot, from /proc (proc(5)); dead processes are left out."""
    labels = ["role", "slot"]
    memory = GaugeMetricFamily(
        "hiss_process_resident_memory_bytes", "Resident memory, shared pages too.", labels=labels
    )
    busy = CounterMetricFamily("hiss_process_cpu_seconds_total", "User and system time of the process.", labels=labels)
    files = GaugeMetricFamily("hiss_process_open_fds", "Open file descriptors.", labels=labels)
    for row in rows:
        folder = Path(f"/proc/{row.pid}")
        try:
            # The command in parentheses may hold spaces; utime and stime are fields 14 and 15 of the line.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            resident = int((folder / "statm").read_text().split()[1]) * _PAGE_BYTES
            open_fds = len(os.listdir(folder / "fd"))
        except (OSError, IndexError):
            continue
        values = [row.role, str(row.slot)]
        memory.add_metric(values, resident)
        busy.add_metric(values, (int(fields[11]) + int(fields[12])) / _TICKS_PER_S)
        files.add_metric(values, open_fds)
    yield from (memory, busy, files)


class Exposition:
    """What ``/metrics`` answers."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)

    def render(self, accept: str) -> tuple[bytes, str]:
        """(body, content type) in the newest format the scraper's Accept field takes."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
