"""Health, status, kernels, signing in, and the answers to bad requests."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import time
from typing import Any

import httpx
import pytest

from gateway.control.shares import rebalancing
from ingest.counters import CONTROL
from ingest.errors import CatalogUnavailable, StorageFailed
from ingest.records import CommitObject, Grant
from ingest.share_table import TICKED_NS, ShareTable
from kernels.strikes import Strikes

PROTECTED = [
    "/v1/status",
    "/v1/runs/status?bucket=scan",
    "/v1/kernels?bucket=scan",
    "/v1/feedback?bucket=scan",
    "/openapi.json",
]


async def test_health_says_whether_the_node_can_take_a_put(node: Any) -> None:
    async with node.client(None) as client:
        answer = await client.get("/v1/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "workers_ready": 2})
        assert (await client.head("/v1/health")).status_code == 200
        node.health = (False, {"reasons": ["no worker is ready"]})
        answer = await client.get("/v1/health")
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["no worker is ready"])
        node.health = CatalogUnavailable("secret inside")
        answer = await client.get("/v1/health")
        assert answer.status_code == 503
        assert "secret" not in answer.text


async def test_a_health_check_that_hangs_is_a_no(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.control.health.CHECK_TIMEOUT_S", 0.05)
    node.health = asyncio.Event()
    async with node.client(None) as client:
        answer = await client.get("/v1/health")
    assert answer.status_code == 503
    assert "longer than" in answer.json()["reason"]


@pytest.mark.parametrize("path", PROTECTED)
async def test_everything_but_health_and_metrics_asks_who_it_is(node: Any, path: str) -> None:
    await node.catalog.create_bucket("scan", "root")
    for auth in (None, ("ROOTKEY", "wrong"), ("NOBODY", "x"), ("ROOTKEY", "é")):
        async with node.client(auth) as client:
            answer = await client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Basic")


async def test_a_disabled_user_is_refused_at_once(node: Any) -> None:
    await node.add_user(("ADA", "ada-secret"), Grant())
    async with node.client(("ADA", "ada-secret")) as client:
        assert (await client.get("/v1/status")).status_code == 200
        await node.add_user(("ADA", "ada-secret"), Grant(), enabled=False)
        assert (await client.get("/v1/status")).status_code == 401


async def test_a_user_asks_about_granted_buckets_only(node: Any) -> None:
    for bucket in ("scan", "other"):
        await node.catalog.create_bucket(bucket, "root")
    ada = await node.add_user(
        ("ADA", "ada-secret"), Grant("scan", "run1/", "read"), Grant("scan", "_kernels/", "write")
    )
    async with node.client(ada) as client:
        for path, status in {
            "/v1/runs/status?bucket=scan&prefix=run1/": 200,
            "/v1/runs/status?bucket=scan&prefix=run2/": 403,
            "/v1/runs/status?bucket=scan": 403,
            "/v1/runs/status?bucket=other&prefix=run1/": 403,
            "/v1/kernels?bucket=scan": 200,
            "/v1/kernels?bucket=other": 403,
            "/v1/feedback?bucket=scan": 403,
            "/v1/feedback?bucket=other&key_prefix=run1/": 403,
        }.items():
            assert (await client.get(path)).status_code == status, path


async def test_bad_parameters_are_named(node: Any) -> None:
    async with node.client() as client:
        for path in ("/v1/runs/status", "/v1/runs/status?bucket=x", "/v1/runs/status?bucket=scan&expect_objects=-1"):
            answer = await client.get(path)
            assert answer.status_code == 422
            assert answer.json()["detail"][0]["loc"][0] == "query"
        for path in ("/v1/runs/status?bucket=absent", "/v1/kernels?bucket=absent", "/v1/feedback?bucket=absent"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()) == (404, {"detail": "there is no such bucket"})
        assert (await client.get("/v1/nothing")).status_code == 404
        assert (await client.post("/v1/status")).status_code == 405


async def test_status_is_the_node_in_numbers(node: Any, write_processes: Any) -> None:
    row = {"role": "worker", "slot": 0, "state": "ready", "pid": os.getpid(), "restarts": 1}
    write_processes(node, [row])
    one, two = node.counters(0), node.counters(1)
    node.rates.sample(time.monotonic() - 2)
    for counters in (one, two):
        counters.cell("hiss_ingest_received_bytes_total").add(1000)
        counters.cell("hiss_arena_bytes").set(400)
        counters.cell("hiss_arena_used_bytes").set(100)
        counters.cell("hiss_kernel_frames_total", "keep").add(3)
    node.rates.sample(time.monotonic())
    one.cell("hiss_lost_objects").set(2)
    one.cell("hiss_http_errors_total", "slow_down").add(4)
    await node.catalog.create_bucket("scan", "root")
    await node.put("scan", b"a", 500)
    async with node.client() as client:
        status = (await client.get("/v1/status")).json()
    assert status["version"] == "1.2.3"
    assert status["state"] == "serving"
    assert status["processes"] == [row]
    assert status["rates"]["received_bytes_per_s"] == pytest.approx(1000, rel=0.1)
    assert status["arena"] == {"used_bytes": 200, "capacity_bytes": 800, "fill": 0.25}
    assert status["kernels"]["frames"] == {"keep": 6, "drop": 0, "replace": 0, "unreduced": 0}
    assert status["ingest"]["lost_objects"] == 2
    assert status["errors"]["http"]["slow_down"] == 4
    assert status["catalogue"] == "ok"
    assert status["drain"]["queued_objects"] == 1
    assert 0 <= status["drain"]["oldest_undrained_age_s"] < 60
    assert status["settings"]["workers"] == 2


async def test_status_answers_before_the_first_sample_and_without_a_process_file(node: Any) -> None:
    async with node.client() as client:
        status = (await client.get("/v1/status")).json()
    assert (status["state"], status["processes"], status["uptime_s"]) == ("unknown", [], None)
    assert status["rates"]["received_bytes_per_s"] == 0
    assert status["drain"]["oldest_undrained_age_s"] is None


async def test_metrics_are_open_and_name_nobody(node: Any) -> None:
    await node.catalog.create_bucket("scan-of-ada", "root")
    await node.put("scan-of-ada", b"run1/a")
    node.counters(0).cell("hiss_ingest_committed_objects_total").add(5)
    async with node.client(None) as client:
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "hiss_ingest_committed_objects_total 5.0\n" in answer.text
    assert "ada" not in answer.text


async def test_kernels_of_a_bucket(node: Any) -> None:
    await node.catalog.create_bucket("scan", "root")

    async def commit(key: bytes, metadata: dict[str, str], reductions: tuple[str, ...] = ()) -> bytes:
        object_id = secrets.token_bytes(16)
        await node.catalog.commit(
            CommitObject(
                bucket="scan", key=key, object_id=object_id, length=0, etag="e", crc64nvme=0,
                owner="root", extents=(), metadata=metadata, reductions=reductions,
            )
        )  # fmt: skip
        return object_id

    await commit(b"_kernels/hits.py", {"match": "run*", "after": "flat"})
    await commit(b"_kernels/readme", {})
    await commit(b"_kernels/hits/mask.npy", {})
    await commit(b"run/a", {}, ("hits", "other"))
    await commit(b"run/b", {}, ("hits",))
    failed = await commit(b"run/c", {}, ("hits",))
    await node.catalog.reduction_failed(failed, "hits", "crash: frame 3", give_up=True)
    strikes = Strikes(3, node.paths.strikes_file(1))
    for _ in range(3):
        strikes.failed("scan", "hits", "ab" * 32, "timeout: frame 3")
    strikes.failed("other", "hits", "ab" * 32, "timeout")

    async def hits() -> Any:
        async with node.client() as client:
            (kernel,) = (await client.get("/v1/kernels?bucket=scan")).json()
        return kernel

    async with asyncio.timeout(60):
        while not (kernel := await hits())["failures"]:  # noqa: ASYNC110  # written by a thread: only asking tells
            await asyncio.sleep(0.01)
    assert {name: kernel[name] for name in ("name", "match", "raw", "after", "arrays")} == {
        "name": "hits", "match": "run*", "raw": "all", "after": "flat", "arrays": ["mask"],
    }  # fmt: skip
    assert (kernel["owed_products"], kernel["failed_products"], kernel["last_error"]) == (2, 1, "run/c: crash: frame 3")
    (failure,) = kernel["failures"]
    assert (failure["sha256"], failure["count"], failure["disabled"]) == ("ab" * 32, 3, True)
    assert failure["error"] == "timeout: frame 3"


async def test_the_api_describes_itself(node: Any) -> None:
    async with node.client() as client:
        document = (await client.get("/openapi.json")).json()
        assert {"/v1/health", "/v1/status", "/v1/runs/status", "/v1/feedback", "/metrics"} <= document["paths"].keys()
        assert document["components"]["securitySchemes"]
        assert (await client.get("/docs")).status_code == 404


async def test_tls_and_an_answer_to_plain_http(start: Any, certificate: Any) -> None:
    node = await start(tls=certificate)
    async with node.client() as client:
        answers = await asyncio.gather(*(client.get("/v1/status") for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5
    async with httpx.AsyncClient() as plain:
        answer = await plain.get(f"http://127.0.0.1:{node.port}/v1/health")
        assert answer.status_code == 400
        assert "https" in answer.json()["detail"]
    # Neither a peer that says nothing nor one that leaves is in the way of the next.
    silent = await asyncio.open_connection("127.0.0.1", node.port)
    gone = await asyncio.open_connection("127.0.0.1", node.port)
    gone[1].close()
    await gone[1].wait_closed()
    async with node.client(None) as client:
        assert (await client.get("/v1/health")).status_code == 200
    silent[1].close()
    await silent[1].wait_closed()


async def test_an_authorization_field_that_is_no_basic_is_refused(node: Any) -> None:
    async with node.client(None) as client:
        for field in ("Bearer x", "Basic %%%", "Basic " + base64.b64encode(b"no colon").decode()):
            assert (await client.get("/v1/status", headers={"Authorization": field})).status_code == 401


async def test_a_catalogue_whose_disk_fails_is_503_and_said(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise StorageFailed("catalogue: disk I/O error")

    for name in ("bucket", "drain_counts"):
        monkeypatch.setattr(node.catalog, name, fail)
    async with node.client() as client:
        answer = await client.get("/v1/feedback/actions?bucket=scan")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        status = await client.get("/v1/status")
        assert (status.status_code, status.json()["catalogue"]) == (200, "unavailable")


async def test_shares_are_kept_again_once_reservations_can_be_read(
    node: Any, poll: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ill, read = 0, True, node.catalog.reserved

    def reserved() -> Any:
        nonlocal asked
        asked += 1
        if ill:
            raise StorageFailed("catalogue: disk I/O error")
        return read()

    monkeypatch.setattr(node.catalog, "reserved", reserved)
    table = ShareTable(None)
    with rebalancing(node.catalog, table, 0, node.counters(CONTROL)):
        await asyncio.to_thread(poll, lambda: asked >= 2, "reservations are asked for again")
        assert not table.words[TICKED_NS]
        ill = False
        await asyncio.to_thread(poll, lambda: table.words[TICKED_NS], "a tick")
