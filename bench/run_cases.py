"""The figures of runs: a frame an object through a kernel, against the same objects without one."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

from bench.figure import Bench, Figure, Rounds
from bench.kernel_cases import FAST, attach

CONNECTIONS = 8
JUDGED_TIMEOUT_S = 300.0


def one_frame_objects(bench: Bench, *, side: int, count: int, size_name: str) -> Figure:
    """PUTs/s of objects of one frame; and until the last of them is judged."""
    rounds = Rounds()
    until_judged: list[float] = []
    cpu_ms: list[list[float]] = [[], []]
    headers = {"x-amz-meta-frame-dtype": "<u2", "x-amz-meta-frame-shape": f"{side},{side}"}
    with_kernel = f"runs-{side}"
    attach(bench, with_kernel, FAST)
    for _ in range(bench.rounds):
        for bucket, rates, cpu in (("disk", rounds.ceilings, cpu_ms[0]), (with_kernel, rounds.values, cpu_ms[1])):
            bench.node.settle()
            done = bench.node.metric("hiss_kernel_frames_total") + count
            before_s, started_s = bench.node.cpu_s(), time.perf_counter()
            rates.append(bench.put(bucket, side * side * 2, count, CONNECTIONS, headers=headers).requests_per_s)
            if bucket == with_kernel:
                while bench.node.metric("hiss_kernel_frames_total") < done:
                    if time.perf_counter() - started_s > JUDGED_TIMEOUT_S:
                        raise RuntimeError("objects are left that no kernel judged")
                    time.sleep(0.02)
                until_judged.append(count / (time.perf_counter() - started_s))
            cpu.append((bench.node.cpu_s() - before_s) * 1000 / count)
    note = (
        f"all judged: {statistics.median(until_judged):.0f}/s; CPU an object "
        f"{statistics.median(cpu_ms[1]):.2f} ms, without a kernel {statistics.median(cpu_ms[0]):.2f} ms"
    )
    return rounds.figure(
        f"objects of one {size_name} frame with a kernel", "PUT/s", 1, "the same without", 0.7, note=note
    )


RUN_CASES: dict[str, Callable[[Bench], Figure]] = {
    "one-frame-64k": functools.partial(one_frame_objects, side=181, count=3000, size_name="64 kB"),
    "one-frame-2m": functools.partial(one_frame_objects, side=1024, count=600, size_name="2 MB"),
}
