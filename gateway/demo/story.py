"""The demonstration in its order, each step telling what it measured.

In: a folder, the size of the stream, a console. Out: ``Outcome``, also as the table at the end. Raises DemoFailed when
something does not come out as it must: a product that differs from numpy's, a byte that differs when read back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

from gateway.demo import frames, product, stream
from gateway.demo.feedback import Follower
from gateway.demo.node import DemoFailed, DemoNode, running
from gateway.demo.stream import Body, Plan, Sink

BUCKET = "beamtime"
KERNEL = Path(__file__).parent / "kernel" / "saxs.py"
KERNEL_NAME = "saxs"
DIM = 460_000_000
"""PARAMS["dim"] of the kernel: frames of fewer counts are dropped."""
POOL_FRAMES = 400
OBJECT_FRAMES = 660
"""Frames of one object of the stream: a quarter of a gigabyte."""
OBJECT_STEP_FRAMES = 37
"""How far in the pool an object begins after the one before it, so that no two are equal."""
CEILING_OBJECTS = 8
DISK_SAMPLE_BYTES = 1 << 30
SHOWN_EVENTS = 6
DRAIN_AFTER_S, DRAIN_AFTER_S_PER_GB = 2, 2
"""Objects stay in the buffer for so long first: the stream has the disk for itself, the drain comes after."""
PRODUCT_TIMEOUT_S, DRAIN_TIMEOUT_S = 60.0, 120.0
SPACE_FACTOR = 3
"""Disk space: the buffer's copy, the archive's, and one more as reserve."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What was measured. Rates are of payload bytes; one Gbps is 1e9 bits a second."""

    data: str = ""
    frames_sent: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0
    gbps: float = 0.0
    ceiling_gbps: float = 0.0
    """A bare receiver that keeps nothing, fed by the same sender."""
    disk_gbps: float | None = None
    """The disk by itself, O_DIRECT; None where that cannot be measured."""
    share_of_ceiling: float = 0.0
    frames_reduced: int = 0
    frames_kept: int = 0
    frames_dropped: int = 0
    frames_reduced_later: int = 0
    feedback_events: int = 0
    feedback_while_streaming: int = 0
    feedback_delay_ms_median: float | None = None
    drained_after_s: float = 0.0
    read_back_bytes: int = 0
    read_back_identical: bool = False
    total_s: float = 0.0
    folder: str = ""


class Events:
    """What the kernel says, counted; the first few and then some are shown as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_s = 0.0
        self._lock = threading.Lock()
        self._delays_s: list[float] = []
        self.shown_left = 0

    @property
    def count(self) -> int:
        return len(self._delays_s)

    def delay_ms(self) -> float | None:
        with self._lock:
            return statistics.median(self._delays_s) * 1e3 if self._delays_s else None

    def __call__(self, event: dict[str, Any], delay_s: float) -> None:
        with self._lock:
            self._delays_s.append(delay_s)
        if self.shown_left and time.monotonic() - self._shown_s > 0.3:
            self.shown_left -= 1
            self._shown_s = time.monotonic()
            self._console.print(
                f"   feedback  {event['key']} frame {event['frame']}: {event['value']:,.0f} counts, the beam dipped "
                f"[dim]({delay_s * 1e3:.0f} ms after the kernel saw it)[/dim]"
            )


class Story:
    def __init__(self, folder: Path, gigabytes: float, console: Console) -> None:
        self._folder = folder
        self._console = console
        self._objects = max(1, round(gigabytes * 1e9 / (OBJECT_FRAMES * frames.FRAME_BYTES)))
        self._drain_after_s = round(DRAIN_AFTER_S + DRAIN_AFTER_S_PER_GB * gigabytes)
        self._outcome = Outcome(folder=str(folder))
        self._pool: frames.Pool | None = None

    def tell(self) -> Outcome:
        """All of it. Raises DemoFailed, stream.StreamFailed."""
        started = time.monotonic()
        self._fit_to_disk()
        try:
            self._say("a node starts", f"data, archive and log under {self._folder}")
            with running(self._folder) as node:
                self._done(f"S3 {node.s3_url}   control {node.control_url}   WebDAV {node.dav_url}", started)
                self._with_node(node)
            self._outcome.total_s = time.monotonic() - started
        finally:
            if self._pool is not None:
                self._pool.close()
        self._table()
        return self._outcome

    def _fit_to_disk(self) -> None:
        free = shutil.disk_usage(self._folder).free
        most = int(free / SPACE_FACTOR / (OBJECT_FRAMES * frames.FRAME_BYTES))
        if most < 1:
            raise DemoFailed(f"{self._folder} has {free / 1e9:.1f} GB free: too little; give another --folder")
        if most < self._objects:
            self._console.print(f"[yellow]The disk has {free / 1e9:.1f} GB free: the stream is shortened.[/yellow]")
            self._objects = most

    # -- the steps

    def _with_node(self, node: DemoNode) -> None:
        measured = frames.load(frames.data_folder())
        self._outcome.data = measured.origin
        pool = self._resample(measured)
        connections = max(1, min(4, sum(row["role"] == "worker" for row in node.ask("/v1/status")["processes"])))
        self._ceiling(pool, connections)
        self._attach(node)
        events = Events(self._console)
        with Follower(node, BUCKET, events):
            self._measured(node, measured, events)
            keys = self._stream(node, pool, connections, events)
            self._reduction(node, pool, keys, events)
        self._drain(node)
        self._read_back(node, pool, measured, keys)

    def _resample(self, measured: frames.Measured) -> frames.Pool:
        self._say("frames", measured.origin)
        with self._progress("resampling", POOL_FRAMES, unit="frames") as advance:
            self._pool = frames.resample(measured.frames, POOL_FRAMES, advance)
        self._done(
            f"the stream goes round a pool of {POOL_FRAMES} frames, each drawn from a Poisson distribution around one of "
            f"the {'synthetic' if measured.synthetic else 'measured'} ten; made beforehand, so that only sending is timed"
        )
        return self._pool

    def _ceiling(self, pool: frames.Pool, connections: int) -> None:
        self._say("ceiling", f"the same sender, {connections} connections, to a receiver that forgets everything")
        length = OBJECT_FRAMES * frames.FRAME_BYTES
        head = f"PUT /nowhere HTTP/1.1\r\nHost: nowhere\r\nContent-Length: {length}\r\n\r\n"
        bodies = [Body(head, self._start_byte(number), length) for number in range(CEILING_OBJECTS)]
        with Sink() as port:
            seconds = stream.send(self._plan(f"127.0.0.1:{port}", connections, bodies), lambda _: None)
        outcome = self._outcome
        outcome.ceiling_gbps = CEILING_OBJECTS * length * 8 / seconds / 1e9
        text = f"{outcome.ceiling_gbps:.1f} Gbps: no server on this machine can take more"
        with contextlib.suppress(OSError):  # not every filesystem writes past the page cache
            outcome.disk_gbps = stream.disk_bytes_per_s(self._folder, DISK_SAMPLE_BYTES) * 8 / 1e9
            text += f"; the disk by itself writes {outcome.disk_gbps:.1f} Gbps"
        self._done(text)

    def _attach(self, node: DemoNode) -> None:
        self._say("kernel", f"{KERNEL.name}: intensity over distance from the beam, summed image, dips of the beam")
        node.put(BUCKET)
        node.tag(BUCKET, drain_after_s=str(self._drain_after_s))
        began = time.monotonic()
        node.put(BUCKET, f"_kernels/{KERNEL_NAME}.py", KERNEL.read_bytes())
        self._done(f"PUT s3://{BUCKET}/_kernels/{KERNEL_NAME}.py: checked, compiled in its sandbox, attached", began)
        self._done(
            f"bucket tag hiss.drain-after-s={self._drain_after_s}: the stream has the disk for itself, the archive comes after"
        )

    def _measured(self, node: DemoNode, measured: frames.Measured, events: Events) -> None:
        """The ten as they are: a .npy stack, raw frames with their geometry in the metadata, and both products checked."""
        self._say("ten frames as they are", "as one .npy, and as raw bytes with dtype and shape in the metadata")
        events.shown_left = 2
        stack = BytesIO()
        np.save(stack, measured.frames)
        node.put(BUCKET, "measured/frames.npy", stack.getbuffer())
        shape = ",".join(str(size) for size in frames.SHAPE)
        raw = measured.frames.data.cast("B")
        node.put(BUCKET, "measured/frames.raw", raw, frame_dtype=frames.DTYPE.str, frame_shape=shape)
        expected = product.by_numpy(measured.frames, DIM)
        for name in ("frames.npy", "frames.raw"):
            found = self._product(node, f"measured/{name}")
            if not found.same_state(expected) or (found.kept, found.dropped) != (expected.kept, expected.dropped):
                raise DemoFailed(f"the product of measured/{name} differs from what numpy computes")
        self._done(f"both products equal numpy's, bit for bit; {expected.dropped} of 10 frames dropped as dim")

    def _stream(self, node: DemoNode, pool: frames.Pool, connections: int, events: Events) -> list[str]:
        length = OBJECT_FRAMES * frames.FRAME_BYTES
        total = self._objects * length
        self._say(
            "stream", f"{self._objects * OBJECT_FRAMES:,} resampled frames, {total / 1e9:.2f} GB in {self._objects} PUTs "
            f"over {connections} connections; a 200 means: on disk"
        )  # fmt: skip
        keys = [f"stream/{number:03}.raw" for number in range(self._objects)]
        geometry = {
            "x-amz-meta-frame-dtype": frames.DTYPE.str,
            "x-amz-meta-frame-shape": ",".join(map(str, frames.SHAPE)),
        }
        bodies = [
            Body(node.head("PUT", BUCKET, key, length, geometry), self._start_byte(number), length)
            for number, key in enumerate(keys)
        ]
        before = events.count
        events.shown_left = SHOWN_EVENTS
        with self._progress("streaming", total) as advance:
            seconds = stream.send(self._plan(node.s3_url.removeprefix("http://"), connections, bodies), advance)
        outcome = self._outcome
        outcome.feedback_while_streaming = events.count - before
        outcome.frames_sent = self._objects * OBJECT_FRAMES
        outcome.bytes_sent, outcome.seconds, outcome.gbps = total, seconds, total * 8 / seconds / 1e9
        outcome.share_of_ceiling = outcome.gbps / outcome.ceiling_gbps
        self._done(
            f"{outcome.gbps:.1f} Gbps into durable storage, {outcome.share_of_ceiling:.0%} of the bare receiver; "
            f"{outcome.feedback_while_streaming} feedback events before the last byte"
        )
        return keys

    def _reduction(self, node: DemoNode, pool: frames.Pool, keys: list[str], events: Events) -> None:
        self._say("reduction", f"the products of the {len(keys)} objects, read over S3 and added up")
        began = time.monotonic()
        parts = []
        expected = []
        for number, key in enumerate(keys):
            parts.append(self._product(node, key))
            chosen = (self._start_frame(number) + np.arange(OBJECT_FRAMES)) % pool.count
            expected.append(np.bincount(chosen, minlength=pool.count))
        total = product.merged(parts)
        outcome = self._outcome
        outcome.frames_reduced = total.kept + total.dropped
        outcome.frames_kept, outcome.frames_dropped = total.kept, total.dropped
        outcome.frames_reduced_later = round(node.metric("hiss_kernel_catchup_frames_total"))
        outcome.feedback_events, outcome.feedback_delay_ms_median = events.count, events.delay_ms()
        times_sent = np.sum(expected, axis=0)
        image = np.zeros(frames.SHAPE, np.int64)
        for frame, times in zip(pool.frames, times_sent, strict=True):
            image += frame.astype(np.int64) * int(times)
        if outcome.frames_reduced != outcome.frames_sent or not np.array_equal(total.image, image):
            raise DemoFailed(
                f"{outcome.frames_reduced} of {outcome.frames_sent} frames were reduced, or their summed image is wrong"
            )
        self._console.print(
            product.plot(*product.curve(total), "momentum transfer, 1/nm", "mean counts a pixel"), highlight=False
        )
        self._done(
            f"{outcome.frames_reduced:,} frames: {total.kept:,} kept, {total.dropped:,} dropped as dim (recorded; every "
            "frame is stored); the summed image equals numpy's",
            began,
        )

    def _drain(self, node: DemoNode) -> None:
        self._say(
            "drain",
            f"{self._drain_after_s} s after an object came: to the archive, verified there by reading back past the page cache",
        )
        began = time.monotonic()
        # All of the bucket: frames, their products, and the kernel.
        expected = {"bucket": BUCKET, "expect_objects": str(2 * self._objects + 5)}
        with self._progress("archived", node.ask("/v1/runs/status", **expected)["size_bytes"]) as advance:
            done = 0
            while True:
                status = node.ask("/v1/runs/status", **expected)
                advance(status["archived_bytes"] - done)
                done = status["archived_bytes"]
                if status["safe_to_clear"]:
                    break
                if time.monotonic() - began > DRAIN_TIMEOUT_S:
                    raise DemoFailed(f"not archived after {DRAIN_TIMEOUT_S:.0f} s: {'; '.join(status['reasons'])}")
                time.sleep(0.1)
        self._outcome.drained_after_s = time.monotonic() - began
        self._done(
            f"safe to clear the detector: all {status['objects']} objects (frames, products, the kernel) are archived "
            "and verified",
            began,
        )

    def _read_back(self, node: DemoNode, pool: frames.Pool, measured: frames.Measured, keys: list[str]) -> None:
        self._say("read back", "every object over WebDAV, each byte compared with what was sent")
        began = time.monotonic()
        length = OBJECT_FRAMES * frames.FRAME_BYTES
        first = measured.frames.data.cast("B")
        total = length * len(keys) + len(first)
        with self._progress("comparing", total) as advance:
            self._compare(node, "measured/frames.raw", iter([first]), advance)
            for number, key in enumerate(keys):
                runs = frames.pieces(self._start_byte(number), length, pool.size_bytes)
                sent = (pool.view[offset : offset + count] for offset, count in runs)
                self._compare(node, key, sent, advance)
        self._outcome.read_back_bytes, self._outcome.read_back_identical = total, True
        self._done(f"{total / 1e9:.2f} GB, identical", began)

    def _compare(self, node: DemoNode, key: str, sent: Iterator[memoryview], advance: Callable[[int], None]) -> None:
        differs = node.dav_differs_at(BUCKET, key, sent, advance)
        if differs is not None:
            raise DemoFailed(f"{key}: what WebDAV gives differs from what was sent, from byte {differs} on")

    # -- helpers

    def _product(self, node: DemoNode, key: str) -> product.Reduction:
        data = node.product(BUCKET, f"_products/{KERNEL_NAME}/{key}.nxs", PRODUCT_TIMEOUT_S)
        try:
            return product.read(data)
        except KeyError:
            raise DemoFailed(f"the product of {key} has no state: the kernel failed") from None

    def _start_frame(self, number: int) -> int:
        return number * OBJECT_STEP_FRAMES

    def _start_byte(self, number: int) -> int:
        return self._start_frame(number) * frames.FRAME_BYTES

    def _plan(self, place: str, connections: int, bodies: list[Body]) -> Plan:
        assert self._pool is not None
        host, _, port = place.partition(":")
        return Plan(host, int(port), connections, self._pool.fd, self._pool.size_bytes, bodies)

    def _say(self, title: str, text: str) -> None:
        self._console.print(f"\n[bold cyan]{title}[/bold cyan]  {text}", highlight=False)

    def _done(self, text: str, began: float | None = None) -> None:
        took = "" if began is None else f" [dim]({time.monotonic() - began:.1f} s)[/dim]"
        self._console.print(f"   [green]✓[/green] {text}{took}", highlight=False)

    @contextlib.contextmanager
    def _progress(self, title: str, total: float, *, unit: str = "") -> Iterator[Callable[[float], None]]:
        counted = [TextColumn("{task.completed:.0f} of {task.total:.0f} " + unit)]
        columns = counted if unit else [DownloadColumn(), TransferSpeedColumn()]
        shown = Progress(
            TextColumn("   {task.description}"), BarColumn(40), *columns, TimeElapsedColumn(),
            console=self._console, transient=not self._console.is_terminal, speed_estimate_period=2,
        )  # fmt: skip
        with shown as progress:
            task = progress.add_task(title, total=total)
            yield lambda amount: progress.advance(task, amount)

    def _table(self) -> None:
        outcome = self._outcome
        delay, disk = outcome.feedback_delay_ms_median, outcome.disk_gbps
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
        for row in (
            ("data", outcome.data + ", then resampled"),
            ("in", f"{outcome.gbps:.1f} Gbps ({outcome.bytes_sent / 1e9:.2f} GB in {outcome.seconds:.1f} s, durable)"),
            ("ceiling", f"{outcome.ceiling_gbps:.1f} Gbps to a receiver that keeps nothing: {outcome.share_of_ceiling:.0%} of it"
                        + (f"; the disk by itself {disk:.1f} Gbps" if disk is not None else "")),
            ("frames", f"{outcome.frames_sent:,} sent, {outcome.frames_reduced:,} reduced, "
                       f"{outcome.frames_reduced_later:,} of them from disk afterwards"),
            ("feedback", f"{outcome.feedback_events} events, {outcome.feedback_while_streaming} while the stream arrived"
                         + (f", median {delay:.1f} ms to here" if delay is not None else "")),
            ("archive", f"all verified {outcome.drained_after_s:.1f} s after the last product was read"),
            ("WebDAV", f"{outcome.read_back_bytes / 1e9:.2f} GB read back, identical"),
            ("took", f"{outcome.total_s:.0f} s in all"),
        ):  # fmt: skip
            table.add_row(f"[bold]{row[0]}[/bold]", row[1])
        self._console.print()
        self._console.print(table, highlight=False)
