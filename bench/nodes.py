"""``python -m bench.nodes [CASE …] [--mb-per-s N] [--rounds N] [--folder DIR] [--json FILE]``: what more nodes give.

Each node has a network namespace, an address and a link of its own, shaped so that the wire is the limit and not the cores of
this one machine; the engine and the clients have links as fast as the machine. Needs root, iproute2 and PostgreSQL.

In: the same nodes as an operator starts. Out: the table and JSON of ``bench.__main__``, each figure beside its ceiling on the
same links in the same run. Always holds: namespaces, nodes and folders are gone afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import bare, detector, load
from bench.__main__ import clean_up_when_told, row, write_report
from bench.engine import Engine, serving
from bench.figure import MIB, Figure, Rounds
from bench.load import Outcome, Plan
from bench.netns import Host, Network
from bench.node import Node, running
from bench.reserved_case import ask, reserve
from bench.wire import Endpoint

OBJECT_BYTES = 16 * MIB
CONNECTIONS = 2
"""A node's link is never idle while an answer is on its way."""
ROUND_S = 4.0
SMALL_BYTES = 1024
SMALL_CONNECTIONS = 12
SMALL_REQUESTS = 1500
LEASE_S = 10.0
FLOOD_AFTER_S, FLOOD_S = 3.0, 8.0
FLOOD_CONNECTIONS = 8
LINK_SHARE = 0.9
"""Of a link's rate: what is left of it for bodies beside their heads and a queue that drains."""
SETTLES_S = 1.0
"""Longer than it takes every node to hear of a reservation."""
MIRRORED = 24
NODES = ("n1", "n2", "n3", "n4")
_SETTINGS = ("workers=1", "kernels=off", "arena_bytes=256MiB", "arena_region_bytes=64MiB", "buffer_bytes=8GiB")


@dataclasses.dataclass(slots=True)
class Rack:
    """Nodes of one cluster, each on its link."""

    network: Network
    folder: Path
    rate: float
    rounds: int
    hosts: list[Host]
    nodes: list[Node] = dataclasses.field(default_factory=list)
    serial: int = 0

    def plan(
        self, node: Node | Endpoint, method: str, prefix: str, size_bytes: int, count: int, connections: int
    ) -> Plan:
        endpoint = node if isinstance(node, Endpoint) else node.endpoint
        return Plan(endpoint, method, prefix, size_bytes, count, connections)

    def prefix(self, bucket: str) -> str:
        self.serial += 1
        return f"/{bucket}/{self.serial:04d}-"

    @property
    def objects(self) -> int:
        """As many as fill a link for a round."""
        return max(CONNECTIONS, round(self.rate * ROUND_S / OBJECT_BYTES))

    def put(self, targets: Sequence[Node | Endpoint], bucket: str) -> Together:
        return together(
            [self.plan(node, "PUT", self.prefix(bucket), OBJECT_BYTES, self.objects, CONNECTIONS) for node in targets]
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Together:
    """Loads that ran at the same time, from the first byte of any to the last answer of all."""

    outcomes: list[Outcome]

    @property
    def seconds(self) -> float:
        begun = min(outcome.started_s for outcome in self.outcomes)
        return max(outcome.started_s + outcome.seconds for outcome in self.outcomes) - begun

    @property
    def bytes_per_s(self) -> float:
        """Of each over its own time: senders do not begin in the same instant, and each fills a link of its own."""
        return sum(outcome.bytes_per_s for outcome in self.outcomes)

    @property
    def requests_per_s(self) -> float:
        return sum(outcome.requests for outcome in self.outcomes) / self.seconds


def together(plans: Sequence[Plan]) -> Together:
    with ThreadPoolExecutor(len(plans)) as pool:
        return Together(list(pool.map(load.run, plans)))


@contextlib.contextmanager
def nodes_running(
    rack: Rack, engine: Engine | None, count: int, more: Sequence[tuple[str, ...]] = ()
) -> Iterator[list[Node]]:
    """The first ``count`` hosts' nodes, of a cluster of their own in ``engine``, or alone without one."""
    secret, key = secrets.token_urlsafe(24), os.urandom(32)
    archive = Path(tempfile.mkdtemp(prefix="archive-", dir=rack.folder))
    with contextlib.ExitStack() as stack:
        catalog = engine.fresh() if engine is not None else ""
        nodes = []
        for number, host in enumerate(rack.hosts[:count]):
            settings = [*_SETTINGS, f"archive_dir={archive}"]
            if catalog:
                settings += [f"catalog={catalog}", f"node_name={host.name}"]
            settings += more[number] if number < len(more) else ()
            started = running(
                rack.folder, *settings, host=host.address, launcher=host.launcher, secret=secret, node_key=key
            )
            nodes.append(stack.enter_context(started))
        nodes[0].bucket("disk", "disk")
        if catalog:
            nodes[0].bucket("mirror", "mirror")
        yield nodes
    shutil.rmtree(archive, ignore_errors=True)


# -- the cases


def put_scales(rack: Rack, engine: Engine) -> Iterator[Figure]:
    """Aggregate PUT of 1, 2 and 4 nodes, beside as many times the rate of one; the first beside bare receivers."""
    totals: dict[int, list[float]] = {1: [], 2: [], 4: []}
    first = Rounds()
    with contextlib.ExitStack() as stack:
        receivers = []
        for host in rack.hosts[:4]:
            port = stack.enter_context(bare.serve("small-receiver", host=host.address, launcher=host.launcher))
            receivers.append(Endpoint(host.address, port))
        nodes = stack.enter_context(nodes_running(rack, engine, 4))
        rack.put(nodes, "disk")  # the arenas' pages are touched once
        bare_four = []
        for _ in range(rack.rounds):
            first.ceilings.append(rack.put(receivers[:1], "bare").bytes_per_s)
            for count, rates in totals.items():
                rates.append(rack.put(nodes[:count], "disk").bytes_per_s)
            first.values.append(totals[1][-1])
            bare_four.append(rack.put(receivers, "bare").bytes_per_s)
    yield first.figure("put, 1 node", "MB/s", 1e6, "a receiver that discards, same link", 0.95)
    for count in (2, 4):
        rounds = Rounds(totals[count], [count * one for one in totals[1]])
        note = f"{count} links of {rack.rate / 1e6:.0f} MB/s"
        if count == 4:
            note += f"; four bare receivers: {statistics.median(bare_four) / 1e6:.1f} MB/s"
        yield rounds.figure(f"put, {count} nodes", "MB/s", 1e6, f"{count} times one node", 0.95, note=note)


def mirror_keeps_up(rack: Rack, engine: Engine) -> Iterator[Figure]:
    """PUT into a bucket with a second copy on the other node, beside PUT on disk only; the links have room for it."""
    rounds = Rounds()
    with nodes_running(rack, engine, 2) as nodes:
        rack.put(nodes, "mirror")
        for _ in range(rack.rounds):
            rounds.ceilings.append(rack.put(nodes[:1], "disk").bytes_per_s)
            rounds.values.append(rack.put(nodes[:1], "mirror").bytes_per_s)
    yield rounds.figure("put, mirror", "MB/s", 1e6, "put, disk, same link", 0.9)


def relay_keeps_up(rack: Rack, engine: Engine) -> Iterator[Figure]:
    """GET of one node's objects from the other, beside GET from the holder."""
    rounds = Rounds()
    with nodes_running(rack, engine, 2) as nodes:
        prefix = rack.prefix("disk")
        together([rack.plan(nodes[0], "PUT", prefix, OBJECT_BYTES, rack.objects, CONNECTIONS)])
        for _ in range(rack.rounds):
            for node, rates in ((nodes[0], rounds.ceilings), (nodes[1], rounds.values)):
                read = rack.plan(node, "GET", prefix, OBJECT_BYTES, rack.objects, CONNECTIONS)
                rates.append(together([read]).bytes_per_s)
    yield rounds.figure("get, relayed", "MB/s", 1e6, "get from the holder, same link", 0.9)


def reserved_beside_a_flood(rack: Rack, engine: Engine) -> Iterator[Figure]:
    """A stream at the reserved half of a node's link, beside a flood of the same node: its worst second."""
    yield from _reserved(rack, engine, "a flood", "disk", "hiss_ingest_received_bytes_total")


def reserved_beside_copies(rack: Rack, engine: Engine) -> Iterator[Figure]:
    """The same beside the second copies of what floods the other node."""
    yield from _reserved(rack, engine, "second copies", "mirror", "hiss_mirror_sent_bytes_total")


def _reserved(rack: Rack, engine: Engine, beside: str, bucket: str, counter: str) -> Iterator[Figure]:
    """``counter``: of the node that is flooded."""
    rate = rack.rate / 2
    least: dict[bool, list[float]] = {True: [], False: []}
    others: dict[bool, list[float]] = {True: [], False: []}
    lost = dict.fromkeys(least, 0)
    # No node sees what waits in the network: where that is the limit, it has to be told.
    known = (f"ingest_bytes_per_s={round(LINK_SHARE * rack.rate)}",)
    with nodes_running(rack, engine, 2, [known, known]) as nodes:
        nodes[0].bucket("reserved", "disk")
        for number in range(rack.rounds):
            for is_reserved in (True, False):
                slot = reserve(nodes[0], "reserved", rate)
                (share,) = slot["nodes"]
                inside = nodes[share["node"]]
                flooded = inside if bucket == "disk" else nodes[1 - share["node"]]
                if not is_reserved:
                    ask(nodes[0], "DELETE", f"/v1/reservations/{slot['id']}")
                time.sleep(SETTLES_S)
                process = _detector(inside, f"/reserved/{number}-{is_reserved}/", rate)
                time.sleep(FLOOD_AFTER_S)
                flood = rack.plan(flooded, "PUT", rack.prefix(bucket), OBJECT_BYTES, 1 << 20, FLOOD_CONNECTIONS)
                at = time.perf_counter()
                with load.flooding(dataclasses.replace(flood, keys=4 * FLOOD_CONNECTIONS)):
                    before = flooded.metric(counter)
                    time.sleep(FLOOD_S)
                    came = (flooded.metric(counter) - before) / (time.perf_counter() - at)
                report = detector.report(process)
                begun_s = at - report.started_s
                least[is_reserved].append(report.least_share(rate, begun_s, begun_s + FLOOD_S))
                others[is_reserved].append(came - rate if flooded is inside else came)
                lost[is_reserved] += len(report.lost)
                if is_reserved:
                    ask(nodes[0], "DELETE", f"/v1/reservations/{slot['id']}")
    value = min(least[True])
    note = (
        f"{lost[True]} frames lost, {beside} {statistics.median(others[True]) / 1e6:.1f} MB/s. Without the reservation "
    )
    note += f"{min(least[False]):.2f}, {lost[False]} lost, {beside} {statistics.median(others[False]) / 1e6:.1f} MB/s"
    name, wanted = f"reserved {rate / 1e6:.0f} MB/s beside {beside}, worst second", 0.98
    met = value >= wanted and not lost[True]
    yield Figure(name, "of its rate", value, 1.0, "its rate", value, wanted, met, rack.rounds, note=note)


def _detector(node: Node, prefix: str, rate: float) -> subprocess.Popen[str]:
    """Frames of 128 KiB, two objects a second, a ring of a second; until some seconds after the flood."""
    side = 256
    frames_per_s = rate / (2 * side * side)
    per_object = round(frames_per_s / 2)
    frames = per_object * round(2 * (FLOOD_AFTER_S + FLOOD_S + 3))
    return detector.start(
        detector.Plan(node.endpoint, prefix, side, frames_per_s, frames, per_object, round(frames_per_s))
    )


def commits(rack: Rack, engine: Engine) -> Iterator[Figure]:
    """PUTs of 1 KiB on four nodes at once, beside one node alone with as many connections."""
    rounds = Rounds()
    with nodes_running(rack, None, 1) as alone:
        rounds.ceilings = [_small(rack, alone, 4 * SMALL_CONNECTIONS) for _ in range(rack.rounds + 1)][1:]
    with nodes_running(rack, engine, 4) as nodes:
        rounds.values = [_small(rack, nodes, SMALL_CONNECTIONS) for _ in range(rack.rounds + 1)][1:]
    note = "all on this machine's cores, the engine among them"
    yield rounds.figure("commits, 4 nodes", "/s", 1.0, "one node alone, same machine", 0.0, note=note)


def _small(rack: Rack, nodes: Sequence[Node], connections: int) -> float:
    plans = [rack.plan(node, "PUT", rack.prefix("disk"), SMALL_BYTES, SMALL_REQUESTS, connections) for node in nodes]
    return together(plans).requests_per_s


def death_to_drain(rack: Rack, engine: Engine) -> Iterator[Figure]:
    """From a node's death until every object it had mirrored and not drained is in the archive."""
    times = []
    for _ in range(rack.rounds):
        # The first node's drain is too slow to matter: what is archived in the end, the other has drained.
        with nodes_running(rack, engine, 2, [("drain_bytes_per_s=1",)]) as nodes:
            nodes[0].call("PUT", "/owed")
            tags = b"<Tagging><TagSet><Tag><Key>hiss.durability</Key><Value>mirror</Value></Tag></TagSet></Tagging>"
            nodes[0].call("PUT", "/owed?tagging=", tags)
            archive = next(rack.folder.glob("archive-*"))
            together([rack.plan(nodes[0], "PUT", rack.prefix("owed"), MIB, MIRRORED, CONNECTIONS)])
            before = _archived(archive)
            nodes[0].kill()
            died = time.monotonic()
            while _archived(archive) < MIRRORED:
                if time.monotonic() > died + 12 * LEASE_S:
                    raise RuntimeError(f"{_archived(archive)} of {MIRRORED} objects were drained elsewhere")
                time.sleep(0.02)
            times.append(time.monotonic() - died)
    value = statistics.median(times)
    wanted = 2 * LEASE_S
    note = f"{MIRRORED} objects, {MIRRORED - before} of them drained elsewhere; a lease is {LEASE_S:g} s"
    name = "death of a node to its mirrored objects drained"
    yield Figure(name, "s", value, None, "", None, wanted, value <= wanted, len(times), note=note)


def _archived(archive: Path) -> int:
    kept = (".hiss", ".hiss-tmp")
    return sum(
        len(names) for folder, _, names in os.walk(archive) if not {*Path(folder).relative_to(archive).parts} & {*kept}
    )


CASES: dict[str, Callable[[Rack, Engine], Iterator[Figure]]] = {
    "put": put_scales,
    "mirror": mirror_keeps_up,
    "relay": relay_keeps_up,
    "reserved": reserved_beside_a_flood,
    "copies": reserved_beside_copies,
    "commits": commits,
    "death": death_to_drain,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.nodes", description="Measure nodes beside one node.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--mb-per-s", type=float, default=50.0, help="of each node's link, each way [50]")
    parser.add_argument("--rounds", type=int, default=3, help="of ceiling and gateway a case [3]")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    unknown = set(options.cases) - CASES.keys()
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    figures = []
    clean_up_when_told()
    folder = Path(tempfile.mkdtemp(prefix="hiss-bench-nodes-", dir=options.folder))
    network = Network()
    try:
        rate = options.mb_per_s * 1e6
        hosts = [network.host(name, rate) for name in NODES]
        rack = Rack(network, folder, rate, options.rounds, hosts)
        place = network.host("engine")
        # This process and the loads it starts are the clients; whatever has another place has a launcher.
        with network.host("clients").entered(), serving(Engine(place.address, 5432, place.launcher)) as engine:
            for name in options.cases or CASES:
                for figure in CASES[name](rack, engine):
                    figures.append(figure)
                    print(row(figure), flush=True)
    finally:
        network.end()
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        write_report(options.json, figures)
    missed = sum(not figure.met for figure in figures)
    print(f"{len(figures) - missed} of {len(figures)} figures met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
