"""The figures of small requests: what one costs, in CPU and in time.

CPU time a request is what a machine's number of instruments depends on, and it moves less than requests a second do when other
programs run beside; so that is the figure, and requests/s stand in its note.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import load
from bench.figure import Bench, Figure
from bench.load import Plan
from bench.node import Node, started
from bench.wire import Connection, head

SMALL_BYTES = 4096
CONNECTIONS = 16
REQUESTS = 4000
LISTED_KEYS = 1_000_000
PAGE_KEYS = 1000


def _measured(bench: Bench, plan: Callable[[], Plan]) -> tuple[float, float]:
    """(CPU milliseconds of the whole node a request, requests/s), medians."""
    load.run(plan())
    cpu_ms, rates = [], []
    for _ in range(bench.rounds):
        bench.node.settle()
        before_s = bench.node.cpu_s()
        outcome = load.run(plan())
        cpu_ms.append((bench.node.cpu_s() - before_s) * 1000 / outcome.requests)
        rates.append(outcome.requests_per_s)
    return statistics.median(cpu_ms), statistics.median(rates)


def _figure(name: str, value_ms: float, wanted_ms: float, rounds: int, note: str) -> Figure:
    return Figure(
        name=name, unit="ms", value=value_ms, ceiling=None, ceiling_name="", ratio=None, wanted=wanted_ms,
        met=value_ms <= wanted_ms, rounds=rounds, note=note,
    )  # fmt: skip


def put_small(bench: Bench) -> Figure:
    cpu_ms, rate = _measured(
        bench, lambda: Plan(bench.node.endpoint, "PUT", bench.prefix("disk"), SMALL_BYTES, REQUESTS, CONNECTIONS)
    )
    ceiling = bench.bare_put(SMALL_BYTES, REQUESTS, CONNECTIONS).requests_per_s
    note = f"{rate:.0f} requests/s; bare receiver {ceiling:.0f}"
    return _figure("PUT 4 KiB, disk, 16 connections: CPU each", cpu_ms, 1.0, bench.rounds, note)


def get_small(bench: Bench) -> Figure:
    prefix = bench.prefix("disk")
    load.run(Plan(bench.node.endpoint, "PUT", prefix, SMALL_BYTES, REQUESTS, CONNECTIONS))
    plan = Plan(bench.node.endpoint, "GET", prefix, 0, REQUESTS, CONNECTIONS)
    cpu_ms, rate = _measured(bench, lambda: plan)
    note = f"{rate:.0f} requests/s"
    return _figure("GET 4 KiB, 16 connections: CPU each", cpu_ms, 0.3, bench.rounds, note)


def delete_many(bench: Bench) -> Figure:
    """DeleteObjects of 1,000 keys, from the request to its answer."""
    times_ms = []
    for _ in range(bench.rounds):
        prefix = bench.prefix("disk")
        load.run(Plan(bench.node.endpoint, "PUT", prefix, 0, PAGE_KEYS, CONNECTIONS))
        start = prefix.removeprefix("/disk/")
        rows = "".join(f"<Object><Key>{start}{number:06d}</Key></Object>" for number in range(PAGE_KEYS))
        document = f"<Delete>{rows}</Delete>".encode()
        digest = base64.b64encode(hashlib.md5(document, usedforsecurity=False).digest()).decode()
        connection = Connection(bench.node.endpoint)
        request = head(bench.node.endpoint, "POST", "/disk?delete=", len(document), {"Content-MD5": digest})
        started_s = time.perf_counter()
        connection.send(request, memoryview(document))
        answer = connection.answer_body()
        times_ms.append((time.perf_counter() - started_s) * 1000)
        connection.close()
        if answer.count(b"<Deleted>") != PAGE_KEYS:
            raise RuntimeError(f"not all were deleted: {answer[:300]!r}")
    return _figure("DeleteObjects of 1,000", statistics.median(times_ms), 300.0, bench.rounds, "")


def list_many(bench: Bench) -> Figure:
    """A page of 1,000 keys anywhere among 1,000,000, on a node of its own."""
    with tempfile.TemporaryDirectory(prefix="hiss-bench-list-", dir=bench.folder) as folder:
        data, secret = Path(folder), secrets.token_urlsafe(24)
        with started(data, secret, "kernels=off") as node:
            node.bucket("many", "disk")
            node.call("PUT", "/many/template")
        _multiply(data, LISTED_KEYS)
        with started(data, secret, "kernels=off") as node:
            pages = 4 * bench.rounds
            times_ms = [_page_ms(node, number * LISTED_KEYS // pages) for number in range(pages)]
    median = statistics.median(times_ms)
    return _figure("LIST 1,000 of 1,000,000 keys", median, 40.0, len(times_ms), f"slowest {max(times_ms):.1f} ms")


def _page_ms(node: Node, first: int) -> float:
    path = f"/many?list-type=2&start-after=run%2F{first:09d}"
    connection = Connection(node.endpoint)
    request = head(node.endpoint, "GET", path, 0)
    started_s = time.perf_counter()
    connection.send(request)
    page = connection.answer_body()
    elapsed_ms = (time.perf_counter() - started_s) * 1000
    connection.close()
    if page.count(b"<Key>") != min(PAGE_KEYS, LISTED_KEYS - first - 1):
        raise RuntimeError(f"not a full page: {page[:300]!r}")
    return elapsed_ms


def _multiply(data: Path, count: int) -> None:
    """Copies the one object's row in the stopped node's index: a million acknowledged PUTs would take a quarter of an hour."""
    with sqlite3.connect(data / "catalogue" / "catalogue.sqlite") as database:
        names = [row[1] for row in database.execute("PRAGMA table_info(objects)")]
        other = {
            "sequence": "-1 - n",  # below every sequence of the journal
            "key": "CAST(printf('run/%09d', n) AS BLOB)",
            "object_id": "CAST(printf('%016d', n) AS BLOB)",
        }
        database.execute(
            f"WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < {count}) "
            f"INSERT INTO objects ({', '.join(names)}) "
            f"SELECT {', '.join(other.get(name, name) for name in names)} FROM numbers, objects WHERE sequence > 0"
        )
    database.close()


SMALL_CASES: dict[str, Callable[[Bench], Figure]] = {
    "put-4k": put_small,
    "get-4k": get_small,
    "list-1m": list_many,
    "delete-1000": delete_many,
}
