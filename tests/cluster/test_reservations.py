"""Reservations of a cluster: shares on several nodes, one decision for all, capacity where the body lands."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.expect import status_before_body
from tests.cluster.loopback import LoopbackNode, Nodes, until
from tests.crash.node import ROOT

GIB = 1 << 30
MIB = 1 << 20
OFFERED = GIB * 9 // 10


@pytest.fixture
def nodes(tmp_path: Path, database: str) -> Iterator[Nodes]:
    made = Nodes(tmp_path, database, buffer_bytes="1GiB", segment_bytes="32MiB", ingest_bytes_per_s="100MB")
    try:
        made.start("a", "b", "c")
        yield made
    finally:
        made.end()


def ask(node: LoopbackNode, method: str, path: str, document: Any = None) -> httpx.Response:
    return httpx.request(
        method,
        f"http://{node.host}:{node.port('control')}/v1/reservations{path}",
        json=document,
        auth=(ROOT["HISS_ROOT_ACCESS_KEY"], ROOT["HISS_ROOT_SECRET_KEY"]),
        timeout=60,
    )


def at(hours: float) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=hours)).isoformat()


def test_a_slot_on_several_nodes_is_kept_by_each(nodes: Nodes) -> None:
    a, b, c = (nodes[name] for name in "abc")
    nodes.make_bucket("scan", drain_after_s="86400")
    nodes.make_bucket("other", drain_after_s="86400")
    until(lambda: ask(a, "GET", "").json()["free"][0]["capacity_bytes"] == 3 * OFFERED, "all three offer")
    # More than one node has, less than two.
    wanted = {"bucket": "scan", "capacity_bytes": OFFERED + 100 * MIB, "rate_bytes_per_s": 150_000_000, "until": at(2)}
    made = ask(b, "POST", "", wanted)
    assert made.status_code == 201, made.text
    shares = {share["node"]: share for share in made.json()["nodes"]}
    assert len(shares) == 2
    assert sum(share["capacity_bytes"] for share in shares.values()) == wanted["capacity_bytes"]
    assert sum(share["rate_bytes_per_s"] for share in shares.values()) == wanted["rate_bytes_per_s"]
    for node in (a, b, c):
        (listed,) = ask(node, "GET", "").json()["reservations"]
        assert (listed["id"], listed["state"]) == (made.json()["id"], "active")

    by_number = dict(enumerate((a, b, c)))
    inside = sorted(shares, key=lambda number: shares[number]["capacity_bytes"])
    small, full = (by_number[number] for number in inside)
    (outside,) = (node for number, node in by_number.items() if number not in shares)
    # On a node of the slot the bucket may take its share, and not more; elsewhere it is one of many.
    share = shares[inside[0]]
    body = os.urandom(64 * MIB)
    fit = share["capacity_bytes"] // (len(body) + MIB)
    assert fit >= 1, share
    for number in range(fit):
        assert small.ask("PUT", f"/scan/{number}", body=body).ok
    refused = small.ask("PUT", "/scan/over", body=body)
    assert (refused.status, refused.code) == (503, "SlowDown")
    assert int(refused.headers["retry-after"]) > 0
    assert full.ask("PUT", "/scan/elsewhere", body=body).ok
    assert outside.ask("PUT", "/scan/outside", body=body).ok
    # What is reserved and not used is left by others, on each node of the slot.
    for number in range(20):
        if not full.ask("PUT", f"/other/{number}", body=body).ok:
            break
    else:
        raise AssertionError("others took what is reserved")
    assert full.ask("PUT", "/scan/still", body=body).ok
    used = ask(c, "GET", f"/{made.json()['id']}").json()
    assert {one["node"]: one["used_bytes"] > 0 for one in used["nodes"]} == dict.fromkeys(shares, True)
    # Released through a node that has no part in it, it is over everywhere.
    assert ask(outside, "DELETE", f"/{made.json()['id']}").status_code == 200
    until(lambda: small.ask("PUT", "/scan/over", body=body).ok, "the slot is over")


def test_second_copies_leave_what_is_reserved(nodes: Nodes) -> None:
    a, b, c = (nodes[name] for name in "abc")
    nodes.make_bucket("scan", drain_after_s="86400")
    nodes.make_bucket("twice", drain_after_s="86400", durability="mirror")
    until(lambda: ask(a, "GET", "").json()["free"][0]["capacity_bytes"] == 3 * OFFERED, "all three offer")
    body = os.urandom(150 * MIB)  # more than a node offers nobody
    assert a.ask("PUT", "/twice/before", body=body).ok
    # All of two nodes, but for what lies there already.
    wanted = {"bucket": "scan", "capacity_bytes": 2 * OFFERED, "until": at(2)}
    made = ask(a, "POST", "", wanted)
    assert made.status_code == 201, made.text
    held = {share["node"] for share in made.json()["nodes"]}
    (left,) = (node for number, node in enumerate((a, b, c)) if number not in held)
    until(lambda: status_before_body(left, "twice", "over", len(body)) == 503, "there is no room for second copies")
    assert left.metric("hiss_mirror_refused_total") > 0

    def full() -> set[int]:
        return {row["node"] for row in left.hiss("node", "list")["nodes"] if row["free_bytes"] < len(body)}

    until(lambda: full() == held, "every node is told of the others' room")
    assert ask(a, "DELETE", f"/{made.json()['id']}").status_code == 200
    until(lambda: status_before_body(left, "twice", "over", len(body)) == 100, "the slot is over")
    assert left.ask("PUT", "/twice/over", body=body).ok


def test_of_requests_to_all_nodes_at_once_as_many_are_made_as_fit(nodes: Nodes) -> None:
    a, b, c = (nodes[name] for name in "abc")
    buckets = [f"beam-{number}" for number in range(9)]
    for bucket in buckets:
        nodes.make_bucket(bucket, drain_after_s="86400")
    until(lambda: ask(a, "GET", "").json()["free"][0]["capacity_bytes"] == 3 * OFFERED, "all three offer")
    start, end = at(24), at(26)

    def reserve(number: int) -> int:
        wanted = {"bucket": buckets[number], "capacity_bytes": OFFERED * 6 // 10, "from": start, "until": end}
        return ask((a, b, c)[number % 3], "POST", "", wanted).status_code

    with ThreadPoolExecutor(9) as pool:
        answers = sorted(pool.map(reserve, range(9)))
    # Five times six tenths are three nodes; a sixth does not fit, however it is cut.
    assert answers == [201] * 5 + [409] * 4
    for node in (a, b, c):
        assert len(ask(node, "GET", "").json()["reservations"]) == 5


def test_a_node_that_is_drained_gives_no_shares(nodes: Nodes) -> None:
    a, b, _ = (nodes[name] for name in "abc")
    nodes.make_bucket("scan", drain_after_s="86400")
    assert b.hiss("node", "drain", "b") is not None
    until(lambda: ask(a, "GET", "").json()["free"][0]["capacity_bytes"] == 2 * OFFERED, "two offer")
    wanted = {"bucket": "scan", "capacity_bytes": 2 * OFFERED + MIB, "until": at(2)}
    refused = ask(a, "POST", "", wanted)
    assert refused.status_code == 409
    assert "are free over the whole time" in refused.json()["detail"]
    made = ask(a, "POST", "", wanted | {"capacity_bytes": 2 * OFFERED})
    assert made.status_code == 201, made.text
    assert {share["node"] for share in made.json()["nodes"]} == {0, 2}
