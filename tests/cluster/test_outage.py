"""The engine is away: new bodies are refused before they come, reads go on, what is in flight is decided, and all of it ends by
itself when the engine is there again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gateway.cli import s3put
from gateway.users import KeyPair
from ingest.cluster.members import LEASE_S, Members
from tests.cluster.loopback import LoopbackNode, Nodes, until
from tests.crash.client import sign
from tests.crash.node import ROOT
from tests.engine import Engine

ROOT_KEYS = (ROOT["HISS_ROOT_ACCESS_KEY"], ROOT["HISS_ROOT_SECRET_KEY"])


@pytest.fixture
def node(tmp_path: Path, own_postgres: Engine) -> Iterator[LoopbackNode]:
    nodes = Nodes(tmp_path, own_postgres.fresh())
    try:
        (node,) = nodes.start("a")
        assert node.ask("PUT", "/scan").ok
        yield node
    finally:
        nodes.end()
        if not own_postgres.running:
            own_postgres.start()


def health(node: LoopbackNode, wanted: str) -> tuple[int, str]:
    answer = httpx.get(f"http://127.0.0.1:{node.port('control')}/v1/health?for={wanted}", timeout=60)
    return answer.status_code, answer.json()["status"]


def before_its_body(node: LoopbackNode, path: str, query: str = "") -> tuple[int, bytes, bool]:
    """A PUT that waits for 100 Continue: (status, what was answered, whether it was told to send)."""
    connection = node.connection(40)
    connection.connect()
    headers = {"host": f"{node.host}:{connection.port}", "expect": "100-continue", "content-length": str(1 << 30)}
    signed = sign("PUT", path, query, headers)
    lines = [
        f"PUT {path}{'?' + query if query else ''} HTTP/1.1",
        *(f"{name}: {value}" for name, value in signed.items()),
    ]
    if "content-length" not in signed:
        lines.append(f"content-length: {1 << 30}")
    try:
        connection.sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = b""
        while b"</Error>" not in answer and b"100 Continue" not in answer:
            piece = connection.sock.recv(65536)
            if not piece:
                break
            answer += piece
        return int(answer.split(b" ", 2)[1]), answer, b"100 Continue" in answer
    finally:
        connection.close()


def test_writes_are_refused_at_their_head_and_reads_go_on(node: LoopbackNode, own_postgres: Engine) -> None:
    body = os.urandom(1 << 20)
    assert node.ask("PUT", "/scan/before", "", body).ok
    started = node.ask("POST", "/scan/parts", "uploads=")
    upload = "uploadId=" + started.body.partition(b"<UploadId>")[2].partition(b"<")[0].decode()
    assert health(node, "write") == (200, "ok")
    own_postgres.stop()
    until(lambda: health(node, "write")[0] == 503, "the node says that it takes nothing")
    assert health(node, "read") == (200, "degraded")
    for path, query in (("/scan/new", ""), ("/scan/parts", f"partNumber=1&{upload}")):
        status, answer, told = before_its_body(node, path, query)
        assert (status, told) == (503, False)
        assert b"<Code>ServiceUnavailable</Code>" in answer
        assert b"retry-after" in answer.lower()
    form = node.ask("POST", "/scan", "", b"--x\r\n", {"content-type": "multipart/form-data; boundary=x"})
    copied = node.ask("PUT", "/scan/copy", "", b"", {"x-amz-copy-source": "/scan/before"})
    assert [(one.status, one.code) for one in (form, copied)] == [(503, "ServiceUnavailable")] * 2
    assert node.ask("GET", "/scan/before").body == body
    assert node.ask("GET", "/scan", "list-type=2").body.count(b"<Key>") == 1
    until(lambda: node.metric("hiss_cluster_engine_away_seconds") > 1, "the metric says so")
    cluster = node.get("/v1/status")[1]["cluster"]
    assert (cluster["engine"], cluster["nodes"]["up"]) == ("away", 1)
    own_postgres.start()
    until(lambda: health(node, "write") == (200, "ok"), "the node takes bodies again")
    assert node.ask("PUT", "/scan/after", "", body).ok
    assert node.get("/v1/status")[1]["cluster"]["engine"] == "ok"


def test_an_engine_that_takes_no_commits_gets_no_bodies(node: LoopbackNode, own_postgres: Engine) -> None:
    """Its synchronous standby is gone: it answers, so reads are as fresh as ever."""
    body = os.urandom(1 << 20)
    assert node.ask("PUT", "/scan/before", "", body).ok
    with own_postgres.without_standby():
        assert node.ask("PUT", "/scan/refused", "", body).status == 503
        until(lambda: health(node, "write")[0] == 503, "the node says that it takes nothing")
        status, answer, told = before_its_body(node, "/scan/new")
        assert (status, told) == (503, False)
        assert b"<Code>ServiceUnavailable</Code>" in answer
        assert health(node, "read") == (200, "degraded")
        assert node.ask("GET", "/scan/before").body == body
        until(lambda: node.ask("GET", "/scan/new").status == 404, "it sees everything, so it knows")
        until(lambda: node.metric("hiss_cluster_commits_stuck_seconds") > 1, "the metric says so")
        assert node.get("/v1/status")[1]["cluster"]["engine"] == "takes no commits"
    until(lambda: health(node, "write") == (200, "ok"), "the node takes bodies again")
    assert node.ask("PUT", "/scan/after", "", body).ok


def test_nobody_is_dead_for_having_been_without_the_engine(tmp_path: Path, own_postgres: Engine) -> None:
    """It was away for longer than a lease. The first heartbeat afterwards is somebody's: the others' come a moment later."""
    nodes = Nodes(tmp_path, own_postgres.fresh())
    try:
        a, b = nodes.start("a", "b")
        nodes.make_bucket("scan", drain_after_s="86400")
        assert b.ask("PUT", "/scan/of-b", "", b"body").ok
        own_postgres.stop()
        time.sleep(LEASE_S + 3)
        # The heartbeats of b come late.
        (keeper,) = b.rows("catalogue")
        os.kill(keeper["pid"], signal.SIGSTOP)
        own_postgres.start()
        until(lambda: health(a, "write") == (200, "ok"), "a takes bodies again")
        until(lambda: time.monotonic() - Members(a.paths).look().as_of_s < 1, "a has heard of the engine")
        assert a.ask("GET", "/scan/of-b").body == b"body"
        assert Members(a.paths).get(1).alive  # type: ignore[union-attr]
        os.kill(keeper["pid"], signal.SIGCONT)
        until(lambda: health(b, "write") == (200, "ok"), "so does b")
        b.kill_all()
        until(lambda: not Members(a.paths).get(1).alive, "who is silent now is dead, if later", 40)
    finally:
        nodes.end()
        if not own_postgres.running:
            own_postgres.start()


def as_a_stranger(node: LoopbackNode) -> int:
    """What a request is answered that is signed with a key pair nobody has heard of."""
    headers = {"host": f"{node.host}:{node.port()}"}
    signed = s3put.sign("GET", "/scan/known/frame", headers, KeyPair("NOBODYKNOWSTHISKEY01", "its secret"), "us-east-1")
    return httpx.get(f"http://{headers['host']}/scan/known/frame", headers=signed, timeout=60).status_code


def test_what_a_node_has_not_heard_of_is_not_known_rather_than_not_there(
    node: LoopbackNode, own_postgres: Engine
) -> None:
    """While it cannot ask, 404 would be a guess: whoever believes it writes anew, or deletes, what another node has."""
    body = os.urandom(100_000)
    assert node.ask("PUT", "/scan/known/frame", "", body).ok
    started = node.ask("POST", "/scan/parts", "uploads=")
    upload = "uploadId=" + started.body.partition(b"<UploadId>")[2].partition(b"<")[0].decode()
    part = b"<Part><PartNumber>1</PartNumber><ETag>x</ETag></Part>"
    complete = b"<CompleteMultipartUpload>%s</CompleteMultipartUpload>" % part
    unknown = (
        ("HEAD", "/scan/unknown", "", b""),
        ("GET", "/scan/unknown", "", b""),
        ("GET", "/scan/known/frame", "versionId=" + "0" * 32, b""),
        ("GET", "/unknown", "list-type=2", b""),
        ("GET", "/unknown/frame", "", b""),
        ("GET", "/unknown", "versioning=", b""),
        ("GET", "/scan/parts", "uploadId=unknown", b""),
        ("PUT", "/scan/parts", "partNumber=1&uploadId=unknown", b"part"),
        ("POST", "/scan/parts", "uploadId=unknown", complete),
        ("POST", "/scan/parts", upload, complete),
        ("DELETE", "/unknown/frame", "", b""),
    )
    webdav = f"http://127.0.0.1:{node.port('dav')}"
    own_postgres.stop()
    until(lambda: health(node, "write")[0] == 503, "the node says that it takes nothing")
    for method, path, query, sent in unknown:
        answer = node.ask(method, path, query, sent)
        assert answer.status == 503, (method, path, query, answer)
        assert "retry-after" in answer.headers
    copied = node.ask("PUT", "/scan/copy", "", b"", {"x-amz-copy-source": "/scan/unknown"})
    assert copied.status == 503
    assert as_a_stranger(node) == 503, "another node may have made the key"
    with httpx.Client(auth=ROOT_KEYS, timeout=60) as client:
        for path in ("/scan/unknown", "/scan/unknown/", "/unknown/", "/unknown/frame"):
            assert client.get(webdav + path).status_code == 503, path
            assert client.request("PROPFIND", webdav + path, headers={"depth": "0"}).status_code == 503, path
        # What it knows it serves.
        assert client.get(f"{webdav}/scan/known/frame").content == body
        for path in ("/scan/", "/scan/known", "/scan/known/"):
            assert client.request("PROPFIND", webdav + path, headers={"depth": "1"}).status_code == 207, path
    assert node.ask("GET", "/scan/known/frame").body == body
    assert node.ask("GET", "/scan", "list-type=2").body.count(b"<Key>") == 1
    assert node.ask("GET", "/scan/parts", upload).ok
    own_postgres.start()
    until(lambda: health(node, "write") == (200, "ok"), "the node takes bodies again")
    assert as_a_stranger(node) == 403
    wrong = {node.ask(*one).status for one in unknown}
    assert wrong == {404, 400}, "not there is not there, once it is known"


def test_an_engine_that_hangs_is_noticed_in_seconds(node: LoopbackNode, own_postgres: Engine) -> None:
    """Its connections stay and nothing answers: nobody waits for the end of a statement's time."""
    body = os.urandom(100_000)
    assert node.ask("PUT", "/scan/known", "", body).ok
    own_postgres.freeze()
    try:
        began = time.monotonic()
        until(
            lambda: b"ServiceUnavailable" in before_its_body(node, "/scan/new")[1], "a PUT is refused before its body"
        )
        assert time.monotonic() - began < 8
        began = time.monotonic()
        assert node.ask("GET", "/scan/known").body == body
        assert node.ask("GET", "/scan/unknown").status == 503
        assert time.monotonic() - began < 4
    finally:
        own_postgres.thaw()
    until(lambda: node.ask("PUT", "/scan/after", "", body).ok, "the node takes bodies again")
    assert node.ask("GET", "/scan/unknown").status == 404


def test_under_load_nothing_acknowledged_is_lost(node: LoopbackNode, own_postgres: Engine) -> None:
    said: dict[str, list[int]] = {}
    stop = threading.Event()

    def client(number: int) -> None:
        count = 0
        while not stop.is_set():
            path = f"/scan/{number}-{count}"
            try:
                status = node.ask("PUT", path, "", path.encode()).status
            except OSError:
                status = 0
            said.setdefault(path, []).append(status)
            count += 1
            if status != 200:
                stop.wait(0.05)

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(client, number) for number in range(4)]
        until(lambda: sum(answers == [200] for answers in list(said.values())) > 20, "the load runs")
        for absence_s in (0.5, 2.5):
            own_postgres.stop()
            # How long it is away is what is tested; nothing else is waited for here.
            threading.Event().wait(absence_s)
            own_postgres.start()
            back_at = time.monotonic()
            known = len(said)
            until(
                lambda known=known: any(answers == [200] for answers in list(said.values())[known:]),
                "bodies are taken again",
            )
            assert time.monotonic() - back_at < 30
        stop.set()
        for one in working:
            one.result()
    answers = {status for all_of_it in said.values() for status in all_of_it}
    assert answers <= {200, 503}
    for path, statuses in said.items():
        found = node.ask("GET", path)
        if statuses == [200]:
            assert found.body == path.encode()
        else:
            assert found.status in (200, 404)
