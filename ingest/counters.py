"""Counters in shared memory: every process adds to cells of its own, one exporter reads them all.

In: increments from any room, without locks (a cell has one writer). Out: cells by metric, label values and process slot.
The table METRICS below is the complete list of what the gateway measures; label values are a closed set, so that the
layout is fixed when the node starts and a restarted process goes on with the cells of its predecessor.
Names follow the Prometheus conventions (base units, ``_total`` on counters only).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import mmap
import os
from collections.abc import Iterator

SLOTS = 40
"""Process slots: workers use their slot number (0..31); the others have the names below."""
EPICS, TANGO = 33, 34
SUPERVISOR, CATALOGUE, DRAIN, CONTROL = 36, 37, 38, 39

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: str
    """counter, gauge or histogram."""
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    buckets: tuple[float, ...] = ()
    merge: str = "sum"
    """How gauges of several processes combine: sum or max."""

    @property
    def cells_per_series(self) -> int:
        # A histogram keeps one cell a bucket, one for +Inf and one for the sum.
        return len(self.buckets) + 2 if self.kind == "histogram" else 1

    def series(self) -> Iterator[tuple[str, ...]]:
        yield from itertools.product(*(values for _, values in self.labels))


S3_OPERATIONS = (
    "PutObject", "GetObject", "HeadObject", "DeleteObject", "DeleteObjects", "ListObjectsV2", "CopyObject",
    "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload", "ListParts",
    "CreateBucket", "HeadBucket", "DeleteBucket", "ListBuckets", "GetBucketLocation", "PutBucketTagging",
    "GetBucketTagging", "DeleteBucketTagging", "ListObjectVersions", "GetObjectAttributes", "WebDAV",
    "NodeRead", "NodeMirror", "Other",
)  # fmt: skip
ERROR_CLASSES = ("client", "auth", "not_found", "precondition", "slow_down", "server")
ROLES = ("catalogue", "worker", "drain", "zygote", "control", "epics", "tango")
TRANSPORTS = ("sse", "websocket")
ACTION_OUTCOMES = (
    "sent",
    "range",
    "rate",
    "late",
    "target",
    "unavailable",
    "failed",
    "superseded",
    "expired",
    "forwarded",
)
VERDICTS = ("keep", "drop", "replace", "unreduced")

METRICS: tuple[Metric, ...] = (
    Metric("hiss_ingest_received_bytes_total", "counter", "Payload bytes received into the arena."),
    Metric("hiss_ingest_committed_objects_total", "counter", "Object versions acknowledged."),
    Metric("hiss_ingest_committed_bytes_total", "counter", "Payload bytes of acknowledged versions."),
    Metric("hiss_ingest_aborted_streams_total", "counter", "Streams that ended without a commit."),
    Metric("hiss_ingest_backpressure_total", "counter", "Times reading paused because no span was free."),
    Metric("hiss_ingest_slow_down_total", "counter", "PUTs refused with SlowDown before their body."),
    Metric("hiss_reservations_active", "gauge", "Reservations in force on this node.", merge="max"),
    Metric("hiss_reserved_capacity_bytes", "gauge", "Capacity of this node that they have.", merge="max"),
    Metric("hiss_reserved_used_bytes", "gauge", "What is used of it.", merge="max"),
    Metric("hiss_reserved_held_bytes", "gauge", "What others leave free for them.", merge="max"),
    Metric("hiss_reserved_rate_bytes_per_second", "gauge", "Rate of this node that they have.", merge="max"),
    Metric("hiss_reserved_received_bytes_total", "counter", "Payload bytes received in reserved slots."),
    Metric("hiss_reservation_refused_total", "counter",
           "PUTs refused before their body: their reservation is full, or their bucket takes data in its slots only."),
    Metric("hiss_reservation_holds_total", "counter", "Times others were held back for a reserved stream."),
    Metric("hiss_ingest_discarded_bytes_total", "counter", "Payload bytes read and dropped behind a kernel's STOP."),
    Metric("hiss_ingest_active_streams", "gauge", "Bodies arriving now."),
    Metric("hiss_mirror_sent_bytes_total", "counter", "Bytes of second copies that other nodes have taken."),
    Metric("hiss_mirror_lost_total", "counter", "Second copies whose node was lost while the body arrived."),
    Metric("hiss_mirror_degraded_total", "counter",
           "Bodies stored on this node only because no other could take a copy (hiss.mirror-loss=degrade)."),
    Metric("hiss_mirror_refused_total", "counter", "Bodies refused because no other node could take a copy."),
    Metric("hiss_under_mirrored_objects", "gauge", "Versions that are to have a second copy on another node and have none."),
    Metric("hiss_under_mirrored_bytes", "gauge", "Bytes of such versions."),
    Metric("hiss_remirrored_objects_total", "counter", "Versions that were given their second copy afterwards."),
    Metric("hiss_remirrored_bytes_total", "counter", "Bytes of such copies."),
    Metric("hiss_arena_bytes", "gauge", "Arena memory of the worker."),
    Metric("hiss_arena_used_bytes", "gauge", "Arena memory held by spans."),
    Metric("hiss_buffer_capacity_bytes", "gauge", "Segment space the node may use.", merge="max"),
    Metric("hiss_buffer_used_bytes", "gauge", "Segment space that holds live extents."),
    Metric("hiss_segment_files", "gauge", "Segment files that exist."),
    Metric("hiss_segment_recycled_total", "counter", "Segments reused after their last extent died."),
    Metric("hiss_segment_compacted_bytes_total", "counter", "Bytes moved out of nearly empty segments."),
    Metric("hiss_segment_retired_total", "counter", "Segments given up after a write or flush error."),
    Metric("hiss_segment_short_total", "counter", "Times a body found no room because every segment held live data."),
    Metric("hiss_storage_errors_total", "counter", "Failed reads, writes and flushes, by kind; segment: of a file without data.",
           (("kind", ("write", "flush", "journal", "read", "segment")),)),
    Metric("hiss_flush_seconds", "histogram", "fdatasync of a segment.", (), LATENCY_BUCKETS_S),
    Metric("hiss_journal_commit_seconds", "histogram", "One journal batch: append and flush.", (), LATENCY_BUCKETS_S),
    Metric("hiss_journal_mutations_total", "counter", "Mutations in the journal."),
    Metric("hiss_journal_bytes_total", "counter", "Bytes appended to the journal."),
    Metric("hiss_http_requests_total", "counter", "Requests answered.", (("operation", S3_OPERATIONS),)),
    Metric("hiss_http_errors_total", "counter", "Requests answered with an error, by class.",
           (("error_class", ERROR_CLASSES),)),
    Metric("hiss_http_request_seconds", "histogram", "Head received to last byte of the answer.",
           (("operation", S3_OPERATIONS),), LATENCY_BUCKETS_S),
    Metric("hiss_http_connections", "gauge", "Open S3 and WebDAV connections."),
    Metric("hiss_http_sent_bytes_total", "counter", "Response body bytes sent."),
    Metric("hiss_kernel_frames_total", "counter", "Frames judged, by verdict.", (("verdict", VERDICTS),)),
    Metric("hiss_kernel_bytes_total", "counter", "Frame bytes reduced."),
    Metric("hiss_kernel_cpu_seconds_total", "counter", "CPU time of sandboxes over the frames they judged."),
    Metric("hiss_kernel_errors_total", "counter", "Kernel failures by kind.",
           (("kind", ("crash", "timeout", "lie", "format", "compile", "refused", "offload", "misfit")),)),
    Metric("hiss_kernel_offload_compared_total", "counter",
           "Frames on which an offloaded kernel and the plain one agreed."),
    Metric("hiss_kernels_refused", "gauge", "1 while no kernel runs because the machine cannot confine them.",
           merge="max"),
    Metric("hiss_kernel_offload_fallbacks", "gauge",
           "Kernels on the cpu because their core was wrong, until they are submitted again.", merge="max"),
    Metric("hiss_kernels_disabled", "gauge", "Kernels that failed too often, off until another source is put.",
           merge="max"),
    Metric("hiss_kernels_too_slow", "gauge", "Kernels too slow for the slot that their bucket is in.", merge="max"),
    Metric("hiss_kernel_sandboxes", "gauge", "Sandbox processes alive."),
    Metric("hiss_kernel_lag_frames", "gauge", "Frames received and not yet judged."),
    Metric("hiss_kernel_catchup_frames_total", "counter", "Frames reduced from disk after the fact."),
    Metric("hiss_kernel_batch_seconds", "histogram", "One batch through a sandbox.", (), LATENCY_BUCKETS_S),
    Metric("hiss_kernel_products_total", "counter", "Products stored."),
    Metric("hiss_raw_filtered_objects_total", "counter", "Versions of which a raw filter left a smaller one."),
    Metric("hiss_raw_filter_saved_bytes_total", "counter", "Bytes that raw filters took away."),
    Metric("hiss_feedback_events_total", "counter", "Feedback events taken from kernels."),
    Metric("hiss_feedback_dropped_total", "counter", "Feedback events dropped over the rate limit or a full queue."),
    Metric("hiss_feedback_subscribers", "gauge", "Open feedback subscriptions.", (("transport", TRANSPORTS),)),
    Metric("hiss_feedback_lost_total", "counter", "Feedback events that slow subscribers were told they lost.",
           (("transport", TRANSPORTS),)),
    Metric("hiss_feedback_zmq_messages_total", "counter", "Messages handed to the ZeroMQ publisher."),
    Metric("hiss_feedback_actions_total", "counter",
           "Values for named actions, by what became of them (docs/OPERATIONS.md, Feedback); expired: dead-man times fired.",
           (("outcome", ACTION_OUTCOMES),)),
    Metric("hiss_drain_objects_total", "counter", "Versions archived and verified."),
    Metric("hiss_drain_bytes_total", "counter", "Bytes archived and verified."),
    Metric("hiss_drain_failures_total", "counter", "Drain attempts that failed."),
    Metric("hiss_drain_verify_failures_total", "counter", "Archive copies that did not read back as written."),
    Metric("hiss_drain_queue_objects", "gauge", "Versions waiting for the archive."),
    Metric("hiss_drain_queue_bytes", "gauge", "Bytes waiting for the archive."),
    Metric("hiss_drain_oldest_undrained_age_seconds", "gauge", "Age of the oldest version without a verified copy.",
           merge="max"),
    Metric("hiss_drain_failing_objects", "gauge", "Versions whose last drain attempt failed."),
    Metric("hiss_evicted_objects_total", "counter", "Buffered copies dropped after verification."),
    Metric("hiss_evicted_bytes_total", "counter", "Buffered bytes dropped after verification."),
    Metric("hiss_evict_stalled", "gauge", "1 while the buffer is above its high mark and nothing may be evicted.",
           merge="max"),
    Metric("hiss_recall_objects_total", "counter", "Versions recalled from the archive."),
    Metric("hiss_recall_failures_total", "counter", "Recalls that failed."),
    Metric("hiss_lifecycle_actions_total", "counter", "What lifecycle rules did: versions expired or moved, uploads aborted.",
           (("action", ("expire", "move", "abort")),)),
    Metric("hiss_lifecycle_scanned_versions_total", "counter", "Versions that lifecycle rules were asked about."),
    Metric("hiss_lifecycle_failures_total", "counter", "Versions that a rule would have changed and that stay (locked, "
           "replaced meanwhile), and buckets whose rules cannot be read."),
    Metric("hiss_lifecycle_passes_total", "counter", "Passes of the lifecycle scanner over all buckets with rules."),
    Metric("hiss_notifications_delivered_total", "counter", "Events that an endpoint took."),
    Metric("hiss_notifications_failures_total", "counter", "Attempts to deliver an event that failed."),
    Metric("hiss_notifications_dropped_total", "counter", "Events given up: too many waited, too old, or refused for good."),
    Metric("hiss_notifications_waiting", "gauge", "Events that wait for their endpoint.", merge="max"),
    Metric("hiss_notifications_failing_endpoints", "gauge", "Endpoints whose last attempt failed.", merge="max"),
    Metric("hiss_cluster_engine_away_seconds", "gauge",
           "How long the cluster's engine has not answered this node; 0 while it does."),
    Metric("hiss_cluster_commits_stuck_seconds", "gauge",
           "How long the cluster's engine has answered this node and taken no commit; 0 while it takes them."),
    Metric("hiss_cluster_nodes", "gauge", "Members of the cluster as this node sees them; none on a node alone.",
           (("state", ("up", "draining", "gone")),)),
    Metric("hiss_cluster_log_lag_entries", "gauge", "Entries of the cluster's log that this node has not applied."),
    Metric("hiss_cluster_unreachable_objects", "gauge",
           "Undrained versions of which only nodes that are gone or have left hold the bytes."),
    Metric("hiss_reconciler_repairs_total", "counter", "Published names put right after the fact."),
    Metric("hiss_process_restarts_total", "counter", "Processes the supervisor restarted.", (("role", ROLES),)),
    Metric("hiss_lost_objects", "gauge", "Acknowledged memory-durable versions lost with the host, by name in the log.",
           merge="max"),
)  # fmt: skip


def _layout() -> tuple[dict[tuple[str, tuple[str, ...]], int], int]:
    cells: dict[tuple[str, tuple[str, ...]], int] = {}
    position = 0
    for metric in METRICS:
        for labels in metric.series():
            cells[metric.name, labels] = position
            position += metric.cells_per_series
    return cells, position


CELLS, CELLS_PER_SLOT = _layout()
BUCKETS = {metric.name: metric.buckets for metric in METRICS}


class Cell:
    """A counter or gauge of this process."""

    __slots__ = ("_index", "_view")

    def __init__(self, view: memoryview[float], index: int) -> None:
        self._view = view
        self._index = index

    def add(self, amount: float = 1.0) -> None:
        self._view[self._index] += amount

    def set(self, value: float) -> None:
        self._view[self._index] = value

    def value(self) -> float:
        return float(self._view[self._index])


class Histogram:
    """A histogram of this process; cells are per-bucket counts (not cumulative), then the sum."""

    __slots__ = ("_buckets", "_index", "_view")

    def __init__(self, view: memoryview[float], index: int, buckets: tuple[float, ...]) -> None:
        self._view = view
        self._index = index
        self._buckets = buckets

    def observe(self, value: float) -> None:
        self._view[self._index + bisect.bisect_left(self._buckets, value)] += 1.0
        self._view[self._index + len(self._buckets) + 1] += value


class Counters:
    """The cells of one process slot. ``fd`` is the node's memfd (``create``); None makes private cells (tests, tools)."""

    def __init__(self, fd: int | None, slot: int) -> None:
        size = SLOTS * CELLS_PER_SLOT * 8
        self._map = mmap.mmap(-1 if fd is None else fd, size)
        cells: memoryview[float] = memoryview(self._map).cast("d")
        self._all = cells
        self._view = cells[slot * CELLS_PER_SLOT : (slot + 1) * CELLS_PER_SLOT]

    @staticmethod
    def create() -> int:
        """A memfd large enough for every slot; the supervisor makes it and hands it down."""
        fd = os.memfd_create("hiss-counters", os.MFD_CLOEXEC)
        os.ftruncate(fd, SLOTS * CELLS_PER_SLOT * 8)
        return fd

    def cell(self, name: str, *labels: str) -> Cell:
        """KeyError for a metric or label value that is not in METRICS."""
        return Cell(self._view, CELLS[name, labels])

    def histogram(self, name: str, *labels: str) -> Histogram:
        return Histogram(self._view, CELLS[name, labels], BUCKETS[name])

    def read(self, slot: int, name: str, labels: tuple[str, ...], cells: int) -> list[float]:
        """Raw cells of any process, for the exporter."""
        start = slot * CELLS_PER_SLOT + CELLS[name, labels]
        return [self._all[index] for index in range(start, start + cells)]
