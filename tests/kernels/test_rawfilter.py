"""Raw filters on a real node: what is left of an object is what numpy leaves of it, whatever dies in between."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest

from ingest.catalog.client import CatalogClient
from ingest.records import ObjectRecord, ObjectState
from tests.crash.harness import ROOT, S3, Answer, Node, running, until

SHAPE = (16, 24)
BUCKET = "disk"
RNG = np.random.default_rng(3)

HITS = """
PARAMS = {"low": ("int64", 500)}
STATE = {"hits": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    hit = frame[0, 0] >= params.low
    state.hits[0] += hit
    return KEEP if hit else DROP
"""
HALVE = """
STATE = {"n": ("int64", (1,), "sum")}
OUT = ("uint8", (8, 12))

def frame(frame, params, state, index, out, feedback):
    state.n[0] += 1
    if frame[0, 0] < 500:
        return DROP
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x] = frame[2 * y, 2 * x] >> 2
    return REPLACE
"""
BAD = """
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.n[state.n[0] + 7 + index] += 1
    return DROP
"""


def frames(count: int) -> np.ndarray:
    return RNG.integers(0, 1000, (count, *SHAPE), np.uint16)


def npy(values: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, values)
    return target.getvalue()


def hits(values: np.ndarray) -> np.ndarray:
    return values[values[:, 0, 0] >= 500]


def halved(values: np.ndarray) -> np.ndarray:
    return (hits(values)[:, ::2, ::2] >> 2).astype(np.uint8)


class Scene:
    def __init__(self, node: Node) -> None:
        self.node = node
        self.client = S3(node)

    def kernel(self, name: str, source: str, **metadata: str) -> Answer:
        return self.client.put(BUCKET, f"_kernels/{name}.py", source.encode(), **metadata)

    def put(self, key: str, body: bytes, **metadata: str) -> ObjectRecord:
        answer = self.client.put(BUCKET, key, body, **metadata)
        assert answer.ok, answer
        return self.record(key)

    def record(self, key: str) -> ObjectRecord:
        return next(one for one in self.node.records() if one.bucket == BUCKET and one.key == key.encode())

    def filtered(self, key: str) -> tuple[ObjectRecord, bytes]:
        """The version that took the raw one's place, and its bytes."""

        def left() -> ObjectRecord | None:
            record = self.record(key)
            return record if record.raw is not None else None

        record = until(left, lambda: f"{key} is filtered\n{self.node.tail(25)}", 60)
        answer = self.client.get(BUCKET, key)
        assert answer.ok
        return record, answer.body

    def array(self, key: str) -> np.ndarray:
        return np.load(io.BytesIO(self.filtered(key)[1]))

    def reduced(self, key: str, kernel: str) -> None:
        until(
            lambda: self.client.get(BUCKET, f"_products/{kernel}/{key}.nxs").ok,
            lambda: f"the product of {key}\n{self.node.tail(25)}",
            60,
        )

    def stays(self, key: str, body: bytes) -> None:
        """Once nothing is owed any more, the raw data are what is stored."""
        until(lambda: not self.open_filters(), "no filter is due", 60)
        assert self.record(key).raw is None
        assert self.client.get(BUCKET, key).body == body

    def open_filters(self) -> list[Any]:
        with self.node.catalogue() as reader:
            query = "SELECT object_id FROM filters WHERE given_up = 0"
            return reader._db.execute(query).fetchall()

    def errors(self) -> list[str]:
        with self.node.catalogue() as reader:
            return [error for (error,) in reader._db.execute("SELECT error FROM filters WHERE given_up = 1").fetchall()]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("filter"), kernels="on", workers="2") as node:
        yield node


@pytest.fixture
def scene(node: Node) -> Iterator[Scene]:
    scene = Scene(node)
    scene.client.make_buckets()
    assert scene.client.tag(BUCKET, raw_filter="allow", raw_filter_wait_s="3600").ok
    yield scene
    for key in scene.client.listed(BUCKET):
        scene.client.delete(BUCKET, key)
    scene.client.close()


def test_a_stack_keeps_its_hits(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    values = frames(2000)
    raw = scene.put("run/a.npy", npy(values), proposal="4711")
    assert raw.ledger is not None
    record, body = scene.filtered("run/a.npy")
    kept = hits(values)
    assert body == npy(kept)
    assert record.raw is not None
    assert (record.raw.object_id, record.raw.length, record.raw.crc64nvme) == (raw.object_id, raw.length, raw.crc64nvme)
    assert record.etag != raw.etag
    assert record.metadata["proposal"] == "4711"
    assert record.metadata["hiss-raw-filter"] == "hits=kept"
    assert record.ledger is not None
    assert (record.ledger.received, record.ledger.kept, record.ledger.stored) == (2000, len(kept), len(kept))
    scene.reduced("run/a.npy", "hits")


def test_a_raw_body_of_frames_keeps_its_hits(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    values = frames(300)
    scene.put("run/a.raw", values.tobytes(), frame_dtype="uint16", frame_shape="16,24")
    record, body = scene.filtered("run/a.raw")
    assert body == hits(values).tobytes()
    assert record.ledger is not None
    assert record.ledger.dropped == 300 - len(hits(values))


def test_replaced_frames_are_stored_as_what_replaces_them(scene: Scene) -> None:
    assert scene.kernel("halve", HALVE, raw="kept").ok
    values = frames(500)
    scene.put("run/a.npy", npy(values))
    assert np.array_equal(scene.array("run/a.npy"), halved(values))
    scene.put("run/a.raw", values.tobytes(), frame_dtype="uint16", frame_shape="16,24")
    record, body = scene.filtered("run/a.raw")
    assert body == halved(values).tobytes()
    assert (record.metadata["frame-dtype"], record.metadata["frame-shape"]) == ("|u1", "8,12")


def test_none_leaves_an_empty_object_of_its_format(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="none").ok
    scene.put("run/a.npy", npy(frames(20)))
    assert scene.array("run/a.npy").shape == (0, *SHAPE)
    scene.reduced("run/a.npy", "hits")


def test_what_one_kernel_keeps_stays(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    assert scene.kernel(
        "dim", HITS.replace("frame[0, 0] >=", "frame[0, 0] <= 200 or frame[0, 0] >= 300 +"), raw="kept"
    ).ok
    assert scene.kernel("watch", HITS).ok
    values = frames(400)
    scene.put("run/a.npy", npy(values))
    corner = values[:, 0, 0]
    assert np.array_equal(scene.array("run/a.npy"), values[(corner >= 500) | (corner <= 200)])


def test_an_object_of_one_frame(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    hit, miss = frames(2)
    hit[0, 0], miss[0, 0] = 700, 100
    scene.put("run/hit.npy", npy(hit))
    scene.put("run/miss.npy", npy(miss))
    assert scene.array("run/miss.npy").shape == (0, *SHAPE)
    scene.stays("run/hit.npy", npy(hit))


def test_nothing_to_filter_leaves_the_version_alone(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    values = np.full((10, *SHAPE), 900, np.uint16)
    raw = scene.put("run/a.npy", npy(values))
    scene.reduced("run/a.npy", "hits")
    scene.stays("run/a.npy", npy(values))
    assert scene.record("run/a.npy").object_id == raw.object_id


def test_the_bucket_must_allow_it(scene: Scene) -> None:
    assert scene.client.tag(BUCKET, raw_filter="refuse").ok
    refused = scene.kernel("hits", HITS, raw="kept")
    assert refused.status == 400
    assert b"hiss.raw-filter=allow" in refused.body
    assert scene.client.tag(BUCKET, raw_filter="allow").ok
    assert scene.kernel("hits", HITS, raw="kept").ok
    assert scene.client.tag(BUCKET, raw_filter="refuse").ok
    body = npy(frames(50))
    scene.put("run/a.npy", body)
    scene.reduced("run/a.npy", "hits")
    scene.stays("run/a.npy", body)


def test_a_kernel_that_fails_costs_no_frame(scene: Scene) -> None:
    assert scene.kernel("bad", BAD, raw="kept").ok
    assert scene.kernel("hits", HITS, raw="kept").ok
    body = npy(frames(50))
    scene.put("run/a.npy", body)
    scene.stays("run/a.npy", body)
    assert any("bad" in error for error in scene.errors())
    query = f"bucket={BUCKET}&prefix=run/"
    url = f"http://127.0.0.1:{scene.node.port('control')}/v1/runs/status?{query}"
    status = httpx.get(url, auth=(ROOT["HISS_ROOT_ACCESS_KEY"], ROOT["HISS_ROOT_SECRET_KEY"])).json()
    assert [one["key"] for one in status["unfiltered"]] == ["run/a.npy"]
    assert "bad" in status["unfiltered"][0]["reason"]


def test_one_frame_that_a_kernel_never_judged_stays(scene: Scene) -> None:
    waits = HITS.replace("500)}", '500), "mask": ("uint8", "frame")}')
    assert scene.kernel("hits", HITS, raw="kept").ok
    assert scene.kernel("waits", waits, raw="kept").ok
    miss = np.zeros(SHAPE, np.uint16)
    scene.put("run/miss.npy", npy(miss))
    until(lambda: scene.record("run/miss.npy").ledger is not None, "one of them has judged it", 60)
    assert scene.client.delete(BUCKET, "_kernels/waits.py").ok
    scene.stays("run/miss.npy", npy(miss))


def test_an_overwritten_object_is_not_touched_by_the_filter_of_the_old_one(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    last = frames(40)
    for values in (frames(4000), frames(3000), last):
        scene.put("run/a.npy", npy(values))
    assert np.array_equal(scene.array("run/a.npy"), hits(last))


def test_the_drain_waits_for_the_filter(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    values = frames(3000)
    scene.put("run/a.npy", npy(values))
    assert np.array_equal(scene.array("run/a.npy"), hits(values))
    archived = until(lambda: scene.record("run/a.npy").archive, "the new version is archived", 60)
    assert archived.crc64nvme == scene.record("run/a.npy").crc64nvme
    file = scene.node.paths.archive / archived.path
    assert np.array_equal(np.load(file), hits(values))


GATED = """
PARAMS = {"gate": ("int64", (1,))}
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.n[0] += params.gate[0]
    return KEEP
"""


def evicted(scene: Scene, key: str) -> ObjectRecord:
    """The version is in the archive only."""

    async def evict(record: ObjectRecord) -> None:
        async with CatalogClient(scene.node.paths) as catalog:
            await catalog.evicted(record.object_id)

    until(lambda: scene.record(key).archive is not None, "the raw data are archived", 60)
    asyncio.run(evict(scene.record(key)))
    record = scene.record(key)
    assert record.state is ObjectState.EVICTED
    return record


def test_raw_data_that_were_drained_at_the_deadline_and_evicted_are_filtered_later(scene: Scene) -> None:
    assert scene.client.tag(BUCKET, raw_filter_wait_s="0").ok
    assert scene.kernel("gated", GATED, raw="none").ok
    values = frames(500)
    scene.put("run/a.npy", npy(values))
    raw = evicted(scene, "run/a.npy")
    assert scene.client.put(BUCKET, "_kernels/gated/gate.npy", npy(np.ones(1, np.int64))).ok
    record, body = scene.filtered("run/a.npy")
    assert np.array_equal(np.load(io.BytesIO(body)), values[:0])
    assert record.raw is not None
    assert record.raw.object_id == raw.object_id
    with h5py.File(io.BytesIO(scene.client.get(BUCKET, "_products/gated/run/a.npy.nxs").body)) as file:
        assert file["entry/state/n"][0] == 500
    archived = until(lambda: scene.record("run/a.npy").archive, "what is left is archived", 60)
    assert (scene.node.paths.archive / archived.path).read_bytes() == body


def test_what_was_evicted_before_its_filter_is_recalled(scene: Scene) -> None:
    assert scene.client.tag(BUCKET, raw_filter_wait_s="0", recall="never").ok
    assert scene.kernel("hits", HITS, raw="kept").ok
    assert scene.kernel("gated", GATED).ok  # as long as it owes its product, nothing is filtered
    values = frames(500)
    scene.put("run/a.npy", npy(values))
    scene.reduced("run/a.npy", "hits")
    evicted(scene, "run/a.npy")
    assert scene.client.delete(BUCKET, "_kernels/gated.py").ok
    assert scene.record("run/a.npy").raw is None
    assert np.array_equal(scene.array("run/a.npy"), hits(values))
    assert scene.client.tag(BUCKET, recall="default").ok


@pytest.mark.parametrize("point", ["filter-before", "product-before"])
def test_a_worker_that_dies_loses_no_frame_and_filters_once(point: str, tmp_path: Path) -> None:
    with running(tmp_path, {"HISS_CRASHPOINT": point}, kernels="on", workers="1") as node:
        scene = Scene(node)
        scene.client.make_buckets()
        assert scene.client.tag(BUCKET, raw_filter="allow").ok
        assert scene.kernel("hits", HITS, raw="kept").ok
        values = frames(1000)
        body = npy(values)
        assert scene.client.put(BUCKET, "run/a.npy", body).ok
        scene.client.close()

        def back() -> bool:
            row = node.rows("worker")[0]
            return row["restarts"] == 1 and row["state"] == "ready"

        until(back, "the worker died and is back", 60)
        scene = Scene(node)
        assert np.array_equal(scene.array("run/a.npy"), hits(values))
        scene.client.close()


def test_a_run_goes_on_when_its_members_are_filtered(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    values = frames(300)
    scene.put("run/a.npy", npy(values))
    for number in range(20):
        scene.put(f"run/b{number:02}.npy", npy(values[number]))
    scene.filtered("run/a.npy")
    until(lambda: not scene.open_filters(), "all are filtered", 60)
    want = int((values[:, 0, 0] >= 500).sum() + (values[:20, 0, 0] >= 500).sum())
    until(
        lambda: _run_hits(scene) == want,
        lambda: f"the run counts {want}, not {_run_hits(scene)}\n{scene.node.tail(20)}",
        60,
    )


def test_a_run_whose_members_were_filtered_is_read_again_by_the_next_worker(scene: Scene) -> None:
    assert scene.kernel("hits", HITS, raw="kept").ok
    values = frames(300)
    scene.put("run/a.npy", npy(values))
    scene.filtered("run/a.npy")
    before = scene.node.rows("worker")
    for row in before:
        os.kill(row["pid"], signal.SIGKILL)
    until(
        lambda: all(
            now["state"] == "ready" and now["pid"] != was["pid"]
            for now, was in zip(scene.node.rows("worker"), before, strict=True)
        ),
        "the workers are back",
        60,
    )
    client, scene.client = scene.client, S3(scene.node)
    client.close()
    scene.put("run/b.npy", npy(values[:100]))
    want = int((values[:, 0, 0] >= 500).sum() + (values[:100, 0, 0] >= 500).sum())
    until(
        lambda: _run_hits(scene) == want,
        lambda: f"the run counts {want}, not {_run_hits(scene)}\n{scene.node.tail(20)}",
        60,
    )


def _judged_and_failed(scene: Scene, kernel: str = "halve") -> tuple[int, int]:
    answer = scene.client.get(BUCKET, f"_products/{kernel}/run/_run.nxs")
    if not answer.ok:
        return 0, 0
    with h5py.File(io.BytesIO(answer.body)) as file:
        judged = int(file["entry/state/n"][0]) if "entry/state/n" in file else 0
        return judged, int(file["entry/run/failed"][()])


def _filtered_run(scene: Scene, source: str) -> np.ndarray:
    assert scene.kernel("halve", source, raw="kept").ok
    values = frames(8)
    values[:, 0, 0] = 700
    for number in range(8):
        scene.put(f"run/{number}.npy", npy(values[number]))
    for number in range(8):
        scene.filtered(f"run/{number}.npy")
    return values


def test_a_filtered_member_that_goes_leaves_the_others_exact(scene: Scene) -> None:
    values = _filtered_run(scene, HALVE.replace("state.n[0] += 1", "state.n[0] += 1 + frame[1, 1]"))
    worth = [1 + int(value[1, 1]) for value in values]

    def comes_to(want: int, what: str) -> None:
        last: list[tuple[int, int]] = []

        def looks() -> bool:
            last[:] = [_judged_and_failed(scene)]
            return last == [(want, 0)]

        until(looks, lambda: f"{what}: {want}, not {last}\n{scene.node.tail(20)}", 60)

    comes_to(sum(worth), "all")
    assert scene.client.delete(BUCKET, "run/0.npy").ok
    comes_to(sum(worth[1:]), "one was deleted")
    other = frames(1)[0]
    other[0, 0] = 700
    scene.put("run/1.npy", npy(other))
    comes_to(sum(worth[2:]) + 1 + int(other[1, 1]), "one was overwritten")
    # A closed run's partials are joined; what is cut out of the joined one is exact, too.
    assert scene.client.put(BUCKET, "run/_SUCCESS", b"").ok
    until(lambda: len(_partials(scene)) == 1, lambda: f"they are joined: {_partials(scene)}", 60)
    assert scene.client.delete(BUCKET, "run/5.npy").ok
    comes_to(sum(worth[2:]) - worth[5] + 1 + int(other[1, 1]), "one went after the end")


def _partials(scene: Scene) -> list[str]:
    return [key for key in scene.client.listed(BUCKET) if "/.partials/" in key]


def test_filtered_members_of_a_lost_batch_with_a_large_state_are_named(scene: Scene) -> None:
    """They are not judged as they are now."""
    _filtered_run(scene, HALVE.replace('"n": (', '"large": ("int64", (1 << 18,), "sum"), "n": ('))
    assert scene.client.delete(BUCKET, "run/0.npy").ok

    def settled() -> bool:
        # The members were judged in one batch or in several; those of the deleted one's are named.
        judged, failed = _judged_and_failed(scene)
        return failed > 0 and judged + failed == 7

    until(settled, lambda: f"7 are judged or named, not {_judged_and_failed(scene)}\n{scene.node.tail(20)}", 60)


def test_two_filters_over_one_frame_each_have_their_say(scene: Scene) -> None:
    """What one replaces and the other drops is replaced; that the other may replace, too, is no conflict."""
    assert scene.kernel("halve", HALVE, raw="kept").ok
    assert scene.kernel("other", HALVE.replace("< 500", ">= 500"), raw="kept").ok
    value = frames(1)
    value[0, 0, 0] = 700
    scene.put("run/a.npy", npy(value[0]))
    np.testing.assert_array_equal(scene.array("run/a.npy"), halved(value))
    assert scene.errors() == []


def test_an_object_of_one_frame_leaves_no_product_of_what_it_overwrote(scene: Scene) -> None:
    assert scene.kernel("hits", HITS).ok
    scene.put("run/a.npy", npy(frames(40)))
    scene.put("run/b.npy", npy(frames(40)))
    for key in ("run/a.npy", "run/b.npy"):
        scene.reduced(key, "hits")
    value = frames(1)[0]
    scene.put("run/a.npy", npy(value))
    until(
        lambda: not scene.client.get(BUCKET, "_products/hits/run/a.npy.nxs").ok,
        lambda: f"the stale product goes\n{scene.node.tail(20)}",
        60,
    )
    assert scene.client.get(BUCKET, "_products/hits/run/b.npy.nxs").ok


def _run_hits(scene: Scene) -> int | None:
    answer = scene.client.get(BUCKET, "_products/hits/run/_run.nxs")
    if not answer.ok:
        return None
    with h5py.File(io.BytesIO(answer.body)) as file:
        return int(file["entry/state/hits"][0]) if "entry/state/hits" in file else None
