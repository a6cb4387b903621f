"""Nodes come and go: what the operator sees of them, draining, taking back, removing."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.loopback import LoopbackNode, Nodes, hiss, until

MIB = 1 << 20


@pytest.fixture
def nodes(tmp_path: Path, database: str) -> Iterator[Nodes]:
    made = Nodes(tmp_path, database)
    try:
        yield made
    finally:
        made.end()


def put(node: LoopbackNode, path: str, body: bytes, query: str = "") -> int:
    return node.ask("PUT", path, query, body).status


def rows_of(node: LoopbackNode) -> dict[str, dict[str, Any]]:
    status, document = node.get("/v1/nodes")
    assert status == 200
    return {row["name"]: row for row in document["nodes"]}


def held(node: LoopbackNode, name: str) -> dict[str, Any]:
    status, document = node.get(f"/v1/nodes/{name}")
    assert status == 200
    return dict(document)


def test_a_node_is_drained_and_leaves(nodes: Nodes) -> None:
    a, b = nodes.start("a", "b")
    nodes.make_bucket("scan", drain_after_s="86400")
    bodies = {f"/scan/{size}": os.urandom(size) for size in (1, 1000, 3 * MIB)}
    for path, body in bodies.items():
        assert put(b, path, body) == 200
    started = b.ask("POST", "/scan/parts", "uploads=")
    upload = re.search(rb"<UploadId>(.+)</UploadId>", started.body)
    assert upload is not None
    of = f"uploadId={upload[1].decode()}"
    piece = os.urandom(5 * MIB)
    assert put(b, "/scan/parts", piece, f"partNumber=1&{of}") == 200

    listed = a.hiss("node", "list")
    rows = {row["name"]: row for row in listed["nodes"]}
    assert [(row["node"], row["state"], row["alive"]) for row in rows.values()] == [(0, "up", True), (1, "up", True)]
    assert rows["b"]["undrained_objects"] == 3
    assert rows["b"]["undrained_bytes"] == 3 * MIB + 1001
    assert rows["b"]["s3"] == f"http://127.0.0.1:{b.port()}"
    assert rows["a"]["me"]
    assert not rows["b"]["me"]
    refused = a.hiss("node", "remove", "b", code=2)
    assert "drain it first" in refused

    # Asked of the other node; the parts of the open upload stay, and hold it.
    changed = a.hiss("node", "drain", "b", code=1)
    assert changed["state"] == "draining"
    until(lambda: held(a, "b")["undrained_objects"] == 0, "what b held is archived")
    assert held(a, "b")["only_parts"] == 1
    refused = a.hiss("node", "remove", "b", code=2)
    assert "1 parts of open uploads" in refused
    for path, query in (("/scan/new", ""), ("/scan/parts", f"partNumber=2&{of}")):
        answer = b.ask("PUT", path, query, b"x")
        assert (answer.status, answer.code) == (503, "SlowDown")
        assert "retry-after" in answer.headers
    form = b.ask("POST", "/scan", body=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"})
    assert (form.status, form.code) == (503, "SlowDown")
    copied = b.ask("PUT", "/scan/copy", "", b"", {"x-amz-copy-source": "/scan/1000"})
    assert (copied.status, copied.code) == (503, "SlowDown")
    assert put(a, "/scan/new", b"other nodes do") == 200
    # Reads, and requests without bytes of their own, go on here.
    assert b.ask("GET", "/scan/1000").body == bodies["/scan/1000"]

    etag = a.ask("GET", "/scan/parts", of).body
    found = re.search(rb"<ETag>(.+)</ETag>", etag)
    assert found is not None
    document = b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>%b</ETag></Part>" % found[1]
    assert a.ask("POST", "/scan/parts", of, document + b"</CompleteMultipartUpload>").ok
    bodies["/scan/parts"] = piece
    done = a.hiss("node", "drain", "b", "--wait", "--timeout", "60")
    assert (done["undrained_objects"], done["only_objects"], done["only_parts"]) == (0, 0, 0)

    removed = a.hiss("node", "remove", "1")
    assert (removed["name"], removed["state"], removed["lost"]) == ("b", "removed", [])
    assert b.process is not None
    # Nothing it still takes could be committed, so it waits for nothing.
    assert b.process.wait(25) == 0
    b.process = None
    assert "was removed from the cluster" in b.tail(400)
    b.start()
    assert b.process is not None
    assert b.process.wait(60) != 0
    b.process = None
    assert "start it on an empty data folder" in b.tail()
    assert list(rows_of(a)) == ["a"]
    for path, body in bodies.items():
        until(lambda path=path, body=body: a.ask("GET", path).body == body, f"{path} comes from the archive")

    (c,) = nodes.start("c")
    assert {name: row["node"] for name, row in rows_of(c).items()} == {"a": 0, "c": 2}


class Hook(http.server.ThreadingHTTPServer):
    """A webhook that remembers the keys it was told of."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        super().__init__(("127.0.0.1", 0), _HookHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _HookHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert isinstance(self.server, Hook)
        self.server.keys += [record["s3"]["object"]["key"] for record in document.get("Records", ())]
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as made:
        yield made
        made.shutdown()


def test_a_node_is_taken_back_and_one_does_the_chores(nodes: Nodes, hook: Hook) -> None:
    for name in ("a", "b"):
        nodes.add(name, notification_endpoints=f"hook=http://127.0.0.1:{hook.server_port}/")
    a, b = nodes.start("a", "b")
    nodes.make_bucket("scan", drain_after_s="86400")
    wanted = b"<Queue>arn:hiss:sqs:::hook</Queue><Event>s3:ObjectCreated:*</Event>"
    reports = (
        b"<NotificationConfiguration><QueueConfiguration>%b</QueueConfiguration></NotificationConfiguration>" % wanted
    )
    assert a.ask("PUT", "/scan", "notification=", reports).ok
    keys = [f"{number}-{node.name}" for number in range(4) for node in (a, b)]
    for key in keys:
        assert put(nodes[key[-1]], f"/scan/{key}", b"told once") == 200
    until(lambda: len(hook.keys) >= len(keys), "the hook was told")
    until(lambda: b.metric("hiss_notifications_waiting") == 0, "nothing waits for the hook")
    assert sorted(hook.keys) == sorted(keys)
    # One more: S3 tells a hook at once that it will be told.
    assert (a.metric("hiss_notifications_delivered_total"), b.metric("hiss_notifications_delivered_total")) == (9, 0)
    assert a.hiss("node", "drain", "b", code=1)["state"] == "draining"
    until(lambda: put(b, "/scan/one", b"x") == 503, "b takes nothing")
    # It is kept through a restart.
    b.stop()
    b.start()
    b.ready()
    assert put(b, "/scan/one", b"x") == 503
    assert b.hiss("node", "undrain", "b")["state"] == "up"
    until(lambda: put(b, "/scan/one", b"x") == 200, "b takes bodies again")
    assert "there is no node nobody" in a.hiss("node", "show", "nobody", code=2)
    assert "has no node nobody" in a.hiss("node", "drain", "nobody", code=2)


def test_a_dead_node_goes_only_with_what_it_held(nodes: Nodes) -> None:
    a, b = nodes.start("a", "b")
    nodes.make_bucket("scan", drain_after_s="86400")
    assert put(b, "/scan/only%20there", b"lost") == 200
    assert put(b, "/scan/empty", b"") == 200
    assert put(a, "/safe", b"") == 200
    assert put(b, "/safe/archived", b"in the archive") == 200
    until(lambda: rows_of(a)["b"]["undrained_objects"] == 1, "one is archived")
    b.end()
    until(lambda: not rows_of(a)["b"]["alive"], "the lease of b is over")
    # What the archive has can be had, although its buffered copy cannot.
    assert a.ask("GET", "/safe/archived").body == b"in the archive"
    listed = hiss("node", "list", "--data", str(a.paths.root))
    assert listed.returncode == 1
    assert "GONE" in listed.stdout
    assert "1 objects (4 bytes)" in a.hiss("node", "remove", "b", code=2)
    forced = a.hiss("node", "remove", "b", "--force")
    assert forced["lost"] == ["scan/only there"]
    assert "lost with node b: scan/only there" in a.tail()
    assert list(rows_of(a)) == ["a"]
    assert "no other node" in a.hiss("node", "remove", "a", "--force", code=2)


def test_settings_changed_on_two_nodes_at_once_are_both_kept(nodes: Nodes) -> None:
    a, b = nodes.start("a", "b")
    nodes.make_bucket("scan")
    for turn, (node, setting) in enumerate([(a, "drain-after-s"), (b, "evict-after-s"), (a, "run-timeout-s")] * 5):
        tag = f"<Tag><Key>hiss.{setting}</Key><Value>{1000 + turn}</Value></Tag>"
        assert node.ask("PUT", "/scan", "tagging=", f"<Tagging><TagSet>{tag}</TagSet></Tagging>".encode()).ok
    last = {b"1012", b"1013", b"1014"}
    for node in (a, b):
        until(
            lambda node=node: last == set(re.findall(rb"<Value>(.+?)<", node.ask("GET", "/scan", "tagging=").body)),
            "all three",
        )


def test_only_root_changes_what_a_node_is_for(nodes: Nodes) -> None:
    (a,) = nodes.start("a")
    keys = a.hiss("user", "add", "eve", "--grant", "read:scan*")
    environ = {"HISS_ACCESS_KEY": keys["access_key"], "HISS_SECRET_KEY": keys["secret_key"]}
    control = f"http://127.0.0.1:{a.port('control')}"
    refused = hiss("node", "drain", "a", "--control", control, environ=environ)
    assert refused.returncode == 2
    assert hiss("node", "list", "--control", control, environ=environ).returncode == 0


def test_a_node_alone_is_one_row(tmp_path: Path) -> None:
    node = LoopbackNode(tmp_path, "lab", {})
    node.start()
    try:
        node.ready()
        (row,) = node.hiss("node", "list")["nodes"]
        assert (row["node"], row["name"], row["state"], row["me"], row["alive"]) == (0, "lab", "up", True, True)
        assert row["capacity_bytes"] == 1 << 30
        assert "this node is alone" in node.hiss("node", "drain", "lab", code=2)
    finally:
        node.end()
