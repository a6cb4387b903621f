"""``/v1/status``: the node in numbers. What the console, ``hiss status`` and a quick look with curl show.

In: shared-memory counters sampled once a second, DATA/run/processes.json, the catalogue's drain counts, the settings.
Out: one JSON document of plain numbers with their units in their names. What always holds: it answers even when the
catalogue does not (``catalogue`` then says so); it holds no secret.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from gateway.metrics import ProcessRow, Reader
from ingest.errors import IngestError
from ingest.ports import Catalog
from kernels.standing import Standing

logger = logging.getLogger(__name__)

SAMPLE_PERIOD_S = 1.0
WINDOW_SAMPLES = 5
"""Rates are means over this many periods."""
CATALOGUE_TIMEOUT_S = 2.0

_RATES = {
    "received_bytes_per_s": "hiss_ingest_received_bytes_total",
    "committed_objects_per_s": "hiss_ingest_committed_objects_total",
    "sent_bytes_per_s": "hiss_http_sent_bytes_total",
    "requests_per_s": "hiss_http_requests_total",
    "frames_per_s": "hiss_kernel_frames_total",
    "feedback_events_per_s": "hiss_feedback_events_total",
    "drained_bytes_per_s": "hiss_drain_bytes_total",
}


class Rates:
    """Keeps the last samples of a few counters. ``sample`` once a period; the clock is the caller's."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._samples: collections.deque[tuple[float, dict[str, float]]] = collections.deque(maxlen=WINDOW_SAMPLES + 1)

    def sample(self, now_s: float) -> None:
        self._samples.append((now_s, {name: self._reader.total(metric) for name, metric in _RATES.items()}))

    def rates(self) -> dict[str, float]:
        """Means over the window; zeros until there are two samples."""
        if len(self._samples) < 2:
            return {"window_s": 0.0, **dict.fromkeys(_RATES, 0.0)}
        (then_s, then), (now_s, now) = self._samples[0], self._samples[-1]
        window_s = max(now_s - then_s, 1e-9)
        return {
            "window_s": round(window_s, 3),
            **{name: round((now[name] - then[name]) / window_s, 3) for name in _RATES},
        }

    async def run(self) -> None:
        """Sample for ever."""
        while True:
            self.sample(time.monotonic())
            await asyncio.sleep(SAMPLE_PERIOD_S)


class ProcessFile:
    """DATA/run/processes.json, written by the supervisor: who runs, since when, how often restarted."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        """The document; one without processes while there is no file."""
        try:
            return dict(json.loads(self._path.read_bytes()))
        except (OSError, ValueError):
            return {"state": "unknown", "pid": None, "since_ns": None, "processes": []}

    def rows(self) -> list[ProcessRow]:
        """What the metrics need of it, the supervisor included."""
        document = self.read()
        rows = [ProcessRow(row["role"], row["slot"], row["pid"]) for row in document["processes"]]
        return [ProcessRow("supervisor", 0, document["pid"]), *rows]


class SandboxFile:
    """DATA/run/sandbox.json, written by the workers: whether this machine can confine kernels, and so runs them."""

    def __init__(self, path: Path, setting: str) -> None:
        self._path = path
        self._setting = setting

    def read(self) -> dict[str, Any]:
        """``state``: confined, unconfined (accepted by the operator), refused, testing or off; ``reason``: what failed."""
        if self._setting == "off":
            return {"state": "off", "reason": ""}
        try:
            standing = msgspec.json.decode(self._path.read_bytes(), type=Standing)
        except (OSError, msgspec.MsgspecError):
            standing = Standing()
        return {"state": standing.verdict.value, "reason": "; ".join(standing.failures)}


class StatusSource:
    """Makes the document. ``settings``: every setting that may be shown, by name."""

    def __init__(
        self,
        reader: Reader,
        rates: Rates,
        processes: ProcessFile,
        catalog: Catalog,
        settings: Mapping[str, object],
        version: str,
        sandbox: SandboxFile,
        outlets: Callable[[], Mapping[str, Any]] = dict,
        cluster: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        """``outlets``: where feedback leaves the node, as the control process knows it. ``cluster``: what it is part of."""
        self._cluster = cluster
        self._outlets = outlets
        self._reader = reader
        self._rates = rates
        self._processes = processes
        self._catalog = catalog
        self._settings = dict(settings)
        self._version = version
        self._sandbox = sandbox

    async def document(self) -> dict[str, Any]:
        processes = await asyncio.to_thread(self._processes.read)
        since_ns = processes.get("since_ns")
        return {
            "version": self._version,
            "state": processes["state"],
            "uptime_s": round(max(0, time.time_ns() - since_ns) / 1e9, 3) if since_ns else None,
            "processes": processes["processes"],
            "sandbox": await asyncio.to_thread(self._sandbox.read),
            "cluster": self._cluster(),
            "rates": self._rates.rates(),
            **self._counted(),
            **await self._drain(),
            "settings": self._settings,
        }

    def _counted(self) -> dict[str, Any]:
        def number(name: str) -> int:
            return round(self._reader.total(name))

        def numbers(name: str) -> dict[str, int]:
            return {label: round(value) for label, value in self._reader.by_label(name).items()}

        def fill(used: str, whole: str) -> dict[str, Any]:
            used_bytes, whole_bytes = number(used), number(whole)
            share = round(used_bytes / whole_bytes, 4) if whole_bytes else 0.0
            return {"used_bytes": used_bytes, "capacity_bytes": whole_bytes, "fill": share}

        return {
            "ingest": {
                "active_streams": number("hiss_ingest_active_streams"),
                "received_bytes": number("hiss_ingest_received_bytes_total"),
                "committed_objects": number("hiss_ingest_committed_objects_total"),
                "committed_bytes": number("hiss_ingest_committed_bytes_total"),
                "aborted_streams": number("hiss_ingest_aborted_streams_total"),
                "refused_slow_down": number("hiss_ingest_slow_down_total"),
                "lost_objects": number("hiss_lost_objects"),
            },
            "buffer": fill("hiss_buffer_used_bytes", "hiss_buffer_capacity_bytes"),
            "arena": fill("hiss_arena_used_bytes", "hiss_arena_bytes"),
            "kernels": {
                "sandboxes": number("hiss_kernel_sandboxes"),
                "frames": numbers("hiss_kernel_frames_total"),
                "lag_frames": number("hiss_kernel_lag_frames"),
                "products": number("hiss_kernel_products_total"),
                "errors": numbers("hiss_kernel_errors_total"),
                "feedback_events": number("hiss_feedback_events_total"),
                "feedback_dropped": number("hiss_feedback_dropped_total"),
            },
            "feedback": {
                "subscribers": numbers("hiss_feedback_subscribers"),
                "lost_by_slow_subscribers": numbers("hiss_feedback_lost_total"),
                "actions": numbers("hiss_feedback_actions_total"),
                **self._outlets(),
            },
            "notifications": {
                "waiting": number("hiss_notifications_waiting"),
                "delivered": number("hiss_notifications_delivered_total"),
                "failed_attempts": number("hiss_notifications_failures_total"),
                "dropped": number("hiss_notifications_dropped_total"),
                "failing_endpoints": number("hiss_notifications_failing_endpoints"),
            },
            "errors": {
                "http": numbers("hiss_http_errors_total"),
                "storage": numbers("hiss_storage_errors_total"),
                "archive_verify_failures": number("hiss_drain_verify_failures_total"),
                "drain_failures": number("hiss_drain_failures_total"),
                "recall_failures": number("hiss_recall_failures_total"),
            },
        }

    async def _drain(self) -> dict[str, Any]:
        try:
            async with asyncio.timeout(CATALOGUE_TIMEOUT_S):
                counts = await self._catalog.drain_counts()
        except (IngestError, TimeoutError):
            return {"catalogue": "unavailable", "drain": None}
        oldest_ns = counts.oldest_undrained_ns
        return {
            "catalogue": "ok",
            "drain": {
                "queued_objects": counts.queued_objects,
                "queued_bytes": counts.queued_bytes,
                "failing_objects": counts.failing_objects,
                "oldest_undrained_age_s": None if oldest_ns is None else max(0, time.time_ns() - oldest_ns) / 1e9,
                "buffered_bytes": counts.buffered_bytes,
                "evictable_bytes": counts.evictable_bytes,
                "drained_objects": round(self._reader.total("hiss_drain_objects_total")),
                "drained_bytes": round(self._reader.total("hiss_drain_bytes_total")),
                "evicted_bytes": round(self._reader.total("hiss_evicted_bytes_total")),
            },
        }
