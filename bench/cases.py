"""The figures: each a gateway measured in turn with its ceiling, over several rounds.

A case takes what it needs from ``Bench`` and returns a ``Figure``; ``CASES`` is the list that ``python -m bench`` runs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable

from bench import bare, load
from bench.feedback import CASES as FEEDBACK_CASES
from bench.feedback import Case, Follower
from bench.figure import MIB, Bench, Figure, Rounds
from bench.kernel_cases import KERNEL_CASES
from bench.load import Plan
from bench.reserved_case import RESERVED_CASES
from bench.run_cases import RUN_CASES
from bench.small_cases import SMALL_CASES
from bench.tls_case import put_tls
from bench.wire import Connection, Endpoint, head

LARGE_BYTES = 64 * MIB
ROUND_OBJECTS = 10
"""Objects of 64 MiB in a round: it has to fit the arena of one worker for ``memory`` to be what is measured."""


def put_large_memory(bench: Bench) -> Figure:
    rounds = Rounds()
    bench.put("memory", LARGE_BYTES, ROUND_OBJECTS)
    for _ in range(bench.rounds):
        bench.node.settle()
        rounds.ceilings.append(bench.bare_put(LARGE_BYTES, ROUND_OBJECTS).bytes_per_s)
        before = bench.node.cpu_s()
        outcome = bench.put("memory", LARGE_BYTES, ROUND_OBJECTS)
        rounds.cpu.append((bench.node.cpu_s() - before) / (outcome.bytes / 1e9))
        rounds.values.append(outcome.bytes_per_s)
    return rounds.figure("PUT 64 MiB, memory, CRC64NVME", "GB/s", 1e9, "bare receiver", 0.90, cpu_s_per_gb_wanted=0.45)


def put_large_disk(bench: Bench) -> Figure:
    rounds = Rounds()
    bench.put("disk", LARGE_BYTES, ROUND_OBJECTS)
    for _ in range(bench.rounds):
        bench.node.settle()
        disk = bare.disk_bytes_per_s(bench.folder, LARGE_BYTES * ROUND_OBJECTS, LARGE_BYTES)
        network = bench.bare_put(LARGE_BYTES, ROUND_OBJECTS).bytes_per_s
        rounds.ceilings.append(min(disk, network))
        before = bench.node.cpu_s()
        outcome = bench.put("disk", LARGE_BYTES, ROUND_OBJECTS)
        rounds.cpu.append((bench.node.cpu_s() - before) / (outcome.bytes / 1e9))
        rounds.values.append(outcome.bytes_per_s)
    return rounds.figure(
        "PUT 64 MiB, disk", "GB/s", 1e9, "O_DIRECT + fdatasync, or bare receiver", 0.85, cpu_s_per_gb_wanted=0.6
    )


def put_small(connections: int) -> Callable[[Bench], Figure]:
    def case(bench: Bench) -> Figure:
        rounds = Rounds()
        bench.put("memory", MIB, 100, connections)
        for _ in range(bench.rounds):
            bench.node.settle()
            rounds.ceilings.append(bench.bare_put(MIB, 400, connections).requests_per_s)
            rounds.values.append(bench.put("memory", MIB, 400, connections).requests_per_s)
        return rounds.figure(f"PUT 1 MiB, memory, {connections} connections", "requests/s", 1, "bare receiver", 0.5)

    return case


def get_large(bench: Bench) -> Figure:
    rounds = Rounds()
    prefix = bench.prefix("disk")
    load.run(Plan(bench.node.endpoint, "PUT", prefix, LARGE_BYTES, 1))
    with tempfile.NamedTemporaryFile(dir=bench.folder) as file:
        file.write(bytes(LARGE_BYTES))
        file.flush()
        with bare.serve("sendfile", file.name) as port:
            ceiling = Endpoint("127.0.0.1", port)
            for number in range(bench.rounds + 1):
                plan = Plan(ceiling, "GET", "/f", 0, ROUND_OBJECTS, keys=1)
                bare_rate = load.run(plan).bytes_per_s
                rate = load.run(Plan(bench.node.endpoint, "GET", prefix, 0, ROUND_OBJECTS, keys=1)).bytes_per_s
                if number:  # the first round warms the page cache
                    rounds.ceilings.append(bare_rate)
                    rounds.values.append(rate)
    return rounds.figure("GET 64 MiB, warm", "GB/s", 1e9, "bare sendfile server", 0.90)


def feedback(case: Case) -> Callable[[Bench], Figure]:
    def measured(bench: Bench) -> Figure:
        load_before = os.getloadavg()[0]
        delays, late = Follower(bench.node, f"feedback-{case.name.lower()}").measure(case)
        shown = ", ".join(
            f"{transport} {statistics.median(ms):.2f} and {ms[int(0.99 * len(ms))]:.2f}"
            for transport, ms in delays.items()
        )
        p99 = delays["SSE"][int(0.99 * case.frames)]
        return Figure(
            name=f"feedback after the last byte of {case.name}, p99",
            unit="ms",
            value=p99,
            ceiling=None,
            ceiling_name="",
            ratio=None,
            wanted=10.0,
            met=p99 <= 10.0,
            rounds=1,
            note=f"p50 and p99: {shown}; {case.frames_per_s:g} frames/s, {late} of {case.frames} reduced from disk, "
            f"load {load_before:.1f} before",
        )

    return measured


def resident(bench: Bench) -> Figure:
    """32 concurrent PUTs of 1 GiB: private memory of the worker that has most."""
    for bucket in ("disk", "memory"):
        bench.node.clear(bucket)  # 32 GiB must find room
    connections = [Connection(bench.node.endpoint) for _ in range(32)]
    prefix = bench.prefix("disk")
    # Where the disk has no room for 32 GiB, the bodies are shorter; they are concurrent all the same.
    room = 0.8 * bench.node.metric("hiss_buffer_capacity_bytes") / len(connections)
    size = min(1 << 30, int(room) // (64 * MIB) * 64 * MIB)
    chunk = memoryview(bytes(MIB))
    peak = 0
    for number, connection in enumerate(connections):
        connection.socket.sendall(head(bench.node.endpoint, "PUT", f"{prefix}{number}", size))
    for step in range(size // MIB):
        for connection in connections:
            connection.socket.sendall(chunk)
        if step % 32 == 0:
            peak = max(peak, *(private for private, _ in bench.node.resident_bytes().values()))
    for connection in connections:
        connection.answer()
        connection.close()
    return Figure(
        name=f"32 PUTs of {size / 2**30:.2g} GiB: private memory of a worker",
        unit="MB",
        value=peak / 1e6,
        ceiling=None,
        ceiling_name="",
        ratio=None,
        wanted=150.0,
        met=peak <= 150e6,
        rounds=1,
        note="beside its arena",
    )


CASES: dict[str, Callable[[Bench], Figure]] = {
    "put-memory": put_large_memory,
    "put-disk": put_large_disk,
    "put-tls": put_tls,
    "put-1m-1": put_small(1),
    "put-1m-8": put_small(8),
    "get-warm": get_large,
    **SMALL_CASES,
    **{f"feedback-{case.name.lower()}": feedback(case) for case in FEEDBACK_CASES},
    "resident": resident,
    **KERNEL_CASES,
    **RUN_CASES,
    **RESERVED_CASES,
}
