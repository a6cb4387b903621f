"""The figures of kernels: what running one costs a stream, and what the gateway costs a kernel."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import alone
from bench.feedback import Subscriber
from bench.figure import MIB, Bench, Figure, Rounds
from bench.wire import Connection, head

OBJECT_BYTES = 64 * MIB
OBJECTS = 10
BURSTS = 5
SIDE = alone.SIDE
FRAME_BYTES = SIDE * SIDE * 2
FRAME_HEADERS = {"x-amz-meta-frame-dtype": "<u2", "x-amz-meta-frame-shape": f"{SIDE},{SIDE}"}

FAST = b"""
PARAMS = {"threshold": ("uint16", 1000)}
STATE = {"total": ("uint64", (1,), "sum"), "above": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    total = 0
    above = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = frame[y, x]
            total += value
            above += value >= params.threshold
    state.total[0] += total
    state.above[0] += above
    return KEEP
"""
HEAVY = b"""
STATE = {"logarithms": ("float64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    total = 0.0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            total += np.log1p(np.sqrt(np.float64(frame[y, x]) + total * 1e-9))
    state.logarithms[0] += total
    return KEEP
"""
"""Each pixel waits for the one before: about 30 ms a megapixel, nothing that a wider core would hide."""
ECHO = b"""
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.n[0] += 1
    emit(feedback, 1, frame[0, 0])
    return KEEP
"""
ENDLESS = b"""
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    while state.n[0] >= 0:
        state.n[0] += 1
    return KEEP
"""


def attach(bench: Bench, bucket: str, kernel: bytes, durability: str = "disk") -> None:
    """Its sandboxes are started and warm on return."""
    bench.node.bucket(bucket, durability)
    bench.node.call("PUT", f"/{bucket}/_kernels/kernel.py", kernel)
    workers = list(bench.node.processes().values()).count("worker")
    deadline = time.monotonic() + 30
    wanted = bench.node.metric("hiss_kernel_sandboxes") + workers
    while bench.node.metric("hiss_kernel_sandboxes") < wanted and time.monotonic() < deadline:
        bench.put(bucket, 2 * FRAME_BYTES, workers, workers, headers=FRAME_HEADERS)
        time.sleep(0.2)


def put_with_kernel(bench: Bench) -> Figure:
    """One stream of megapixel frames with a 10 GB/s-class kernel, against the same stream without."""
    rounds = Rounds()
    plain_cpu: list[float] = []
    attach(bench, "kernel", FAST)
    for _ in range(bench.rounds):
        for bucket, rates, cpu in (("disk", rounds.ceilings, plain_cpu), ("kernel", rounds.values, rounds.cpu)):
            bench.node.settle()
            before_s = bench.node.cpu_s()
            outcome = bench.put(bucket, OBJECT_BYTES, OBJECTS, headers=FRAME_HEADERS)
            rates.append(outcome.bytes_per_s)
            cpu.append((bench.node.cpu_s() - before_s) / (outcome.bytes / 1e9))
    judged = bench.node.metric("hiss_kernel_frames_total")
    caught_up = bench.node.metric("hiss_kernel_catchup_frames_total")
    note = (
        f"without a kernel {statistics.median(plain_cpu):.2f} CPU-s/GB; {judged:.0f} frames judged, "
        f"{caught_up:.0f} of them from disk"
    )
    return rounds.figure(
        "PUT with a threshold-and-sum kernel", "GB/s", 1e9, "the same without", 0.80, note=note, cpu_s_per_gb_wanted=1.0
    )


def compute_bound(bench: Bench) -> Figure:
    """Frames/s of a kernel that is slower than the stream, from the first byte sent until the last frame is judged, against the
    kernel alone: one stream, so one sandbox, against one core. The other cores receive, and play the instrument."""
    rounds = Rounds()
    attach(bench, "heavy", HEAVY)
    frames = OBJECT_BYTES // FRAME_BYTES * 8
    for _ in range(bench.rounds):
        rounds.ceilings.append(alone.frames_per_s(HEAVY, frames, 1))
        bench.node.settle()
        done = bench.node.metric("hiss_kernel_frames_total") + frames
        # Not from here: the sender first fills the memory it sends from, 2 s for half a gigabyte on a virtual machine.
        started_s = bench.put("heavy", frames * FRAME_BYTES, 1, 1, headers=FRAME_HEADERS).started_s
        while bench.node.metric("hiss_kernel_frames_total") < done:
            if time.perf_counter() - started_s > 300:
                raise RuntimeError("frames are left that no kernel judged")
            # Asking costs the node some 15 ms of a core.
            time.sleep(0.1)
        rounds.values.append(frames / (time.perf_counter() - started_s))
    return rounds.figure("compute-bound kernel", "frames/s", 1, "the kernel alone on one core", 0.90)


def acknowledgement(bench: Bench) -> Figure:
    """From the last byte of an object of eight frames to its answer, ten objects a second: with a kernel less without."""
    attach(bench, "kernel-ack", FAST, "memory")
    added_ms, plain_ms = [], []
    for _ in range(bench.rounds):
        bench.node.settle()
        plain = _acknowledged_ms(bench, "memory")
        bench.node.settle()
        added_ms.append(statistics.median(_acknowledged_ms(bench, "kernel-ack")) - statistics.median(plain))
        plain_ms += plain
    quartiles = statistics.quantiles(plain_ms, n=4)
    noise_ms = quartiles[2] - quartiles[0]
    value = statistics.median(added_ms)
    return Figure(
        name="what a kernel adds to an object's answer",
        unit="ms",
        value=value,
        ceiling=None,
        ceiling_name="",
        ratio=None,
        wanted=noise_ms,
        met=value <= noise_ms,
        rounds=len(added_ms),
        note=f"without one {quartiles[1]:.1f} ms; wanted: within the spread (quartiles) of that",
    )


def _acknowledged_ms(bench: Bench, bucket: str) -> list[float]:
    waits = []
    body = memoryview(bytes(8 * FRAME_BYTES))
    connection = Connection(bench.node.endpoint)
    for _ in range(30):
        request = head(bench.node.endpoint, "PUT", bench.prefix(bucket), len(body), FRAME_HEADERS)
        connection.send(request, body)
        sent_s = time.perf_counter()
        connection.answer()
        waits.append((time.perf_counter() - sent_s) * 1e3)
        time.sleep(0.1)
    connection.close()
    return waits


def first_frame(bench: Bench) -> Figure:
    """From the PUT of a new kernel to the first event of a frame, while objects arrive twenty times a second."""
    waits = []
    for number in range(bench.rounds):
        bucket = f"attach-{number}"
        bench.node.bucket(bucket, "memory")
        bench.put(bucket, 2 * FRAME_BYTES, 2, headers=FRAME_HEADERS)
        subscriber = Subscriber(bench.node, bucket)
        subscriber.start()
        started_s = time.perf_counter()
        bench.node.call("PUT", f"/{bucket}/_kernels/echo.py", ECHO)
        while not subscriber.arrived and time.perf_counter() - started_s < 30:
            bench.put(bucket, 2 * FRAME_BYTES, 4, headers=FRAME_HEADERS)
        waits.append(min(subscriber.arrived.values(), default=float("inf")) - started_s)
    value = statistics.median(waits)
    return Figure(
        name="a new kernel's PUT to its first judged frame",
        unit="s",
        value=value,
        ceiling=None,
        ceiling_name="",
        ratio=None,
        wanted=1.5,
        met=value <= 1.5,
        rounds=len(waits),
        note=f"longest {max(waits):.2f} s",
    )


def idle_memory(bench: Bench) -> Figure:
    """Private memory of a sandbox that has judged frames and waits for more."""
    before = set(bench.node.sandboxes())
    attach(bench, "kernel-idle", FAST)
    sizes = [_private_bytes(pid) for pid in set(bench.node.sandboxes()) - before]
    peak = max(sizes)
    return Figure(
        name="idle attached kernel: private memory",
        unit="MB",
        value=peak / 1e6,
        ceiling=None,
        ceiling_name="",
        ratio=None,
        wanted=60.0,
        met=peak <= 60e6,
        rounds=len(sizes),
    )


def _private_bytes(pid: int) -> int:
    rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(row[1]) * 1024 for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:"))


def hostile(bench: Bench) -> Figure:
    """A stream without kernels, while frames of another bucket go to a kernel that loops for ever, or to none. In the note, the
    same beside as many loops at the lowest priority that are none of ours: what any computation costs on this machine."""
    rounds = Rounds()
    beside_loops: list[float] = []
    workers = list(bench.node.processes().values()).count("worker")
    for bucket in ("hostile", "harmless"):
        bench.node.bucket(bucket, "disk")
    for number in range(bench.rounds):
        # New text every round: a kernel that failed three times is disabled for good.
        bench.node.call("PUT", "/hostile/_kernels/endless.py", b"# round %d\n" % number + ENDLESS)
        for bucket, rates in (("harmless", rounds.ceilings), ("hostile", rounds.values)):
            with _fed(bench, bucket):
                rates.append(statistics.median(_burst(bench) for _ in range(BURSTS)))
        with _fed(bench, "harmless"), _idle_loops(workers):
            beside_loops.append(statistics.median(_burst(bench) for _ in range(BURSTS)))
    loops = statistics.median(there / without for there, without in zip(beside_loops, rounds.ceilings, strict=True))
    note = f"beside {workers} plain loops of class SCHED_IDLE {loops:.2f}"
    return rounds.figure(
        "PUT beside a kernel that loops for ever", "GB/s", 1e9, "beside the same stream without", 0.90, note=note
    )


@contextlib.contextmanager
def _fed(bench: Bench, bucket: str) -> Iterator[None]:
    """Two frames twice a second go there."""
    stop = threading.Event()
    feeder = threading.Thread(target=_feed, args=(bench, bucket, stop))
    feeder.start()
    try:
        time.sleep(1.5)
        yield
    finally:
        stop.set()
        feeder.join()


@contextlib.contextmanager
def _idle_loops(count: int) -> Iterator[None]:
    loop = "import os\nos.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _burst(bench: Bench) -> float:
    """Bytes/s of what the arena holds: no disk's spread, which is larger than what is looked for."""
    bench.node.settle()
    return bench.put("memory", OBJECT_BYTES, OBJECTS // 2).bytes_per_s


def _feed(bench: Bench, bucket: str, stop: threading.Event) -> None:
    """To whichever worker takes the connection."""
    body = memoryview(bytes(2 * FRAME_BYTES))
    while not stop.is_set():
        connection = Connection(bench.node.endpoint)
        connection.call(head(bench.node.endpoint, "PUT", bench.prefix(bucket), len(body), FRAME_HEADERS), body)
        connection.close()
        stop.wait(0.5)


KERNEL_CASES: dict[str, Callable[[Bench], Figure]] = {
    "kernel": put_with_kernel,
    "kernel-compute": compute_bound,
    "kernel-ack": acknowledgement,
    "kernel-attach": first_frame,
    "kernel-memory": idle_memory,
    "kernel-hostile": hostile,
}
