"""The figure of a reservation: a detector at its reserved rate, and a flood of others beside it."""

from __future__ import annotations

import base64
import datetime
import json
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from bench import detector, load
from bench.detector import Report
from bench.figure import MIB, Bench, Figure
from bench.kernel_cases import FAST, attach
from bench.load import Plan
from bench.node import Node

SIDE = 512
RATE_BYTES_PER_S = 300e6
"""What two cores carry beside the sender, the flood and the kernel."""
SECONDS = 16
FLOOD_FROM_S, FLOOD_UNTIL_S = 4.0, 13.0
OBJECT_S = 0.5
RING_S = 1.0
"""What the detector can hold back before it loses frames."""
FLOOD_CONNECTIONS = 8


def reserved(bench: Bench) -> Figure:
    """The least share of its rate that left the detector in any window of a second while others pushed as hard as they could."""
    attach(bench, "reserved", FAST)
    bench.node.bucket("flood", "disk")
    rounds: dict[bool, list[tuple[Report, float, float]]] = {True: [], False: []}
    for number in range(bench.rounds):
        for is_reserved in (False, True):
            bench.node.settle()
            rounds[is_reserved].append(_round(bench, f"/reserved/{number}-{is_reserved}/", is_reserved))
    least = [share for _, share, _ in rounds[True]]
    lost = sum(len(report.lost) for report, _, _ in rounds[True])
    behind_ms = [1000 * report.behind_frames / _plan(bench, "").frames_per_s for report, _, _ in rounds[True]]
    value = min(least)
    flood, flood_alone = (statistics.median(one[2] for one in rounds[kind]) / 1e9 for kind in (True, False))
    shares = statistics.median(share for _, share, _ in rounds[False])
    return Figure(
        name=f"reserved {RATE_BYTES_PER_S * 8 / 1e9:g} Gbps beside a flood, worst second",
        unit="of its rate",
        value=value,
        ceiling=1.0,
        ceiling_name="its rate",
        ratio=value,
        wanted=0.98,
        met=value >= 0.98 and not lost,
        rounds=len(least),
        note=f"{lost} frames lost, at most {max(behind_ms):.0f} ms behind, ledgers equal; flood {flood:.2f} GB/s. Without the "
        f"reservation {shares:.2f}, {sum(len(one[0].lost) for one in rounds[False])} lost, flood {flood_alone:.2f} GB/s",
    )


def _plan(bench: Bench, prefix: str) -> detector.Plan:
    frames_per_s = RATE_BYTES_PER_S / (2 * SIDE * SIDE)
    per_object = round(frames_per_s * OBJECT_S)
    return detector.Plan(
        bench.node.endpoint,
        prefix,
        SIDE,
        frames_per_s,
        round(SECONDS / OBJECT_S) * per_object,
        per_object,
        round(frames_per_s * RING_S),
    )


def _round(bench: Bench, prefix: str, is_reserved: bool) -> tuple[Report, float, float]:
    """(what the detector says, its worst second under the flood, bytes per second of the flood)."""
    # What an earlier round left alive keeps the segments that its flood has filled: a fast disk fills the buffer so.
    for bucket in ("flood", "reserved"):
        bench.node.clear(bucket)
    plan = _plan(bench, prefix)
    reservation = reserve(bench.node, "reserved", plan.bytes_per_s) if is_reserved else None
    process = detector.start(plan)
    time.sleep(FLOOD_FROM_S)
    # Its bytes are replaced again and again: the flood is as long as one likes and the buffer does not fill.
    flood = Plan(
        bench.node.endpoint, "PUT", "/flood/", 16 * MIB, 1 << 20, FLOOD_CONNECTIONS, keys=4 * FLOOD_CONNECTIONS
    )
    with load.flooding(flood):
        before, at = bench.node.metric("hiss_ingest_received_bytes_total"), time.perf_counter()
        time.sleep(FLOOD_UNTIL_S - FLOOD_FROM_S)
        came = bench.node.metric("hiss_ingest_received_bytes_total") - before
        seconds = time.perf_counter() - at
    report = detector.report(process)
    share = report.least_share(plan.bytes_per_s, at - report.started_s - 1.0, at + seconds - report.started_s)
    _check_ledger(bench, prefix.removeprefix("/reserved/"), report)
    if reservation:
        ask(bench.node, "DELETE", f"/v1/reservations/{reservation['id']}")
    return report, share, came / seconds - plan.bytes_per_s


def reserve(node: Node, bucket: str, bytes_per_s: float) -> Any:
    """An hour from now on; the answer's document."""
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    wanted = {"bucket": bucket, "rate_bytes_per_s": round(bytes_per_s), "until": until.isoformat()}
    return ask(node, "POST", "/v1/reservations", wanted)


def _check_ledger(bench: Bench, prefix: str, report: Report) -> None:
    """The gateway has, and has judged, exactly the frames that left the detector. Raises RuntimeError."""
    deadline = time.monotonic() + 120
    query = urllib.parse.urlencode({"bucket": "reserved", "prefix": prefix})
    total = report.sent_frames + len(report.lost)
    while True:
        frames = ask(bench.node, "GET", f"/v1/runs/status?{query}")["frames"]
        if frames["received"] == frames["kept"] == total and not frames["missing"]:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{total} frames were sent and the ledger says {frames}")
        time.sleep(0.2)


def ask(node: Node, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Of the control API; the answer's document, None where it has none. Raises OSError for an error."""
    endpoint = node.endpoint
    request = urllib.request.Request(
        f"http://{endpoint.host}:{node.ports['control']}{path}",
        data=None if body is None else json.dumps(body).encode(),
        method=method,
        headers={"Content-Type": "application/json"},
    )
    pair = base64.b64encode(f"{endpoint.access_key}:{endpoint.secret_key}".encode()).decode()
    request.add_header("Authorization", f"Basic {pair}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or "null")


RESERVED_CASES: dict[str, Callable[[Bench], Figure]] = {"reserved": reserved}
