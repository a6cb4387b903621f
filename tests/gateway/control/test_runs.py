"""May the detector be cleared? Yes only when everything is there, archived and verified."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ingest.records import FrameLedger, UploadRecord
from kernels import notices as noted
from kernels.notices import Notices
from kernels.published import beside

RUN = "/v1/runs/status?bucket=scan&prefix=run1/"


async def ask(node: Any, extra: str = "") -> dict[str, Any]:
    async with node.client() as client:
        answer = await client.get(RUN + extra)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


@pytest.fixture
async def scan(node: Any) -> Any:
    await node.catalog.create_bucket("scan", "root")
    return node


async def test_a_run_becomes_safe_when_its_last_object_is_verified(scan: Any) -> None:
    records = [await scan.put("scan", b"run1/%d" % number, 10) for number in range(3)]
    await scan.put("scan", b"run2/other", 10)
    for number, record in enumerate(records):
        status = await ask(scan)
        assert (status["safe_to_clear"], status["verdict"]) == (False, "wait")
        assert status["archived_objects"] == number
        assert [missing["key"] for missing in status["missing"]] == [f"run1/{left}" for left in range(number, 3)]
        await scan.archive(record)
    status = await ask(scan)
    assert (status["safe_to_clear"], status["verdict"], status["reasons"]) == (True, "safe", [])
    assert (status["objects"], status["size_bytes"], status["archived_bytes"]) == (3, 30, 30)


async def test_nothing_is_not_safe(scan: Any) -> None:
    status = await ask(scan)
    assert (status["safe_to_clear"], status["verdict"]) == (False, "empty")


async def test_what_was_sent_and_is_not_there_is_incomplete(scan: Any) -> None:
    await scan.archive(await scan.put("scan", b"run1/a", 10))
    assert (await ask(scan, "&expect_objects=1&expect_bytes=10"))["safe_to_clear"]
    for extra in ("&expect_objects=2", "&expect_bytes=11"):
        status = await ask(scan, extra)
        assert (status["safe_to_clear"], status["verdict"]) == (False, "incomplete")
        assert "were sent" in status["reasons"][0]


async def test_ledgers_add_up_and_gaps_are_named(scan: Any) -> None:
    whole = FrameLedger(received=10, kept=4, dropped=6, stored=10)
    holed = FrameLedger(received=7, kept=7, stored=7, unreduced=1, gaps=((3, 2), (9, 1)), trailing_bytes=5)
    for key, ledger in ((b"run1/a", whole), (b"run1/b", holed)):
        await scan.archive(await scan.put("scan", key, 10, ledger))
    status = await ask(scan)
    assert (status["safe_to_clear"], status["verdict"]) == (False, "incomplete")
    assert status["frames"] == {
        "received": 17, "kept": 11, "dropped": 6, "replaced": 0, "stored": 17, "unreduced": 1, "after_stop": 0,
        "missing": 3, "trailing_bytes": 5,
    }  # fmt: skip
    assert status["gaps"] == [
        {"key": "run1/b", "first_frame": 3, "frames": 2}, {"key": "run1/b", "first_frame": 9, "frames": 1}
    ]  # fmt: skip


async def test_a_failed_drain_is_told_with_its_reason(scan: Any) -> None:
    record = await scan.put("scan", b"run1/a", 10)
    await scan.catalog.claim_drain(10, 60)
    await scan.catalog.drain_failed(record.object_id, "the archive is full", 3600)
    status = await ask(scan)
    assert (status["safe_to_clear"], status["verdict"]) == (False, "failing")
    assert status["missing"][0]["error"] == "the archive is full"
    assert status["missing"][0]["drain_attempts"] == 1


async def test_an_unfinished_upload_is_not_safe(scan: Any) -> None:
    await scan.archive(await scan.put("scan", b"run1/a", 10))
    await scan.catalog.create_upload(UploadRecord("scan", b"run1/big", "u1", "root", 1))
    status = await ask(scan)
    assert (status["safe_to_clear"], status["verdict"], status["unfinished_uploads"]) == (False, "wait", 1)
    await scan.catalog.abort_upload("scan", b"run1/big", "u1")
    assert (await ask(scan))["safe_to_clear"]


async def test_a_replaced_object_must_be_archived_anew(scan: Any) -> None:
    await scan.archive(await scan.put("scan", b"run1/a", 10))
    await scan.put("scan", b"run1/a", 11)
    assert not (await ask(scan))["safe_to_clear"]


async def test_a_key_that_is_not_utf8_is_named(scan: Any) -> None:
    await scan.put("scan", b"run1/\xff", 1)
    assert (await ask(scan))["missing"][0]["key"] == "run1/\\xff"


async def test_a_run_larger_than_the_limit_is_not_judged_safe(scan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.control.runs.OBJECTS_MAX", 4)
    monkeypatch.setattr("gateway.control.runs.PAGE_OBJECTS", 2)
    for number in range(5):
        await scan.archive(await scan.put("scan", b"run1/%d" % number, 1))
    status = await ask(scan)
    assert (status["complete"], status["safe_to_clear"], status["objects"]) == (False, False, 4)


async def test_what_kernels_could_not_do_is_named_with_its_object(scan: Any) -> None:
    """A kernel that has finished nothing yet is shown, too."""
    async with scan.client() as client:
        await scan.put("scan", b"run1/a", reductions=("hits", "total"))
        record = await scan.put("scan", b"run1/b", reductions=("hits",))
        await scan.put("scan", b"run1/deeper/c", reductions=("deep",))
        runs = {one["prefix"]: one for one in (await client.get("/v1/runs?bucket=scan")).json()["runs"]}
        shown = {one["kernel"]: (one["members"], one["pending"], one["failed"]) for one in runs["run1/"]["products"]}
        assert shown == {"hits": (0, 2, 0), "total": (0, 1, 0)}
        assert [one["kernel"] for one in runs["run1/deeper/"]["products"]] == ["deep"]
        await scan.catalog.reduction_failed(record.object_id, "hits", "crash: frame 3", give_up=True)
        status = await ask(scan)
        trouble = [(one["kernel"], one["key"], one["reason"], one["given_up"]) for one in status["kernel_errors"]]
        assert trouble == [("hits", "run1/b", "crash: frame 3", True)]
        (run,) = (await client.get("/v1/runs?bucket=scan&prefix=run1/&limit=1")).json()["runs"]
        hits = next(one for one in run["products"] if one["kernel"] == "hits")
        assert (hits["failed"], hits["error"], hits["error_key"]) == (1, "crash: frame 3", "run1/b")


async def test_an_array_that_does_not_fit_a_running_stream_is_shown(scan: Any) -> None:
    notices = Notices(beside(scan.paths.strikes_file(0), noted.FILE_PATTERN))
    notices.misfit("scan", "flat", "ab", "flat has the shape (8, 13)", b"run1/a", 1)
    notices.misfit("scan", "other", "ab", "mask is missing", b"run2/a", 1)

    async def errors() -> list[Any]:
        return [(one["kernel"], one["key"], one["reason"]) for one in (await ask(scan))["kernel_errors"]]

    async with asyncio.timeout(60):
        while not (found := await errors()):  # noqa: ASYNC110  # written by a thread: only asking tells
            await asyncio.sleep(0.01)
    assert found == [("flat", "run1/a", "flat has the shape (8, 13)")]
    notices.changed("scan", 2)
    async with asyncio.timeout(60):
        while await errors():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
