"""Runs on a real node: whatever happens to the members, the product of a run equals numpy over what is finally stored."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.crash.harness import S3, Node, running, sign, until

SHAPE = (24, 32)
BUCKET = "disk"
RUN = "scan/7/"

COUNT = """
PARAMS = {"low": ("int64", 500)}
STATE = {"total": ("int64", (24, 32), "sum"), "hits": ("int64", (1,), "sum"), "most": ("int64", (1,), "max"),
         "index": ("int64", (1,), "max")}

def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = np.int64(frame[y, x])
            state.total[y, x] += value
            state.most[0] = max(state.most[0], value)
            n += value >= params.low
    state.hits[0] += n
    state.index[0] = max(state.index[0], index)
    return KEEP if n > 380 else DROP
"""


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, SHAPE, np.uint16)


def npy(values: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, values)
    return target.getvalue()


class Scene:
    """A node, a client, and what should be stored: key -> frames (n, y, x)."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.client = S3(node)
        self.stored: dict[str, np.ndarray] = {}

    def kernel(self, name: str, source: str) -> None:
        answer = self.client.put(BUCKET, f"_kernels/{name}.py", source.encode())
        assert answer.ok, answer

    def put(self, key: str, values: np.ndarray) -> None:
        answer = self.client.put(BUCKET, key, npy(values))
        assert answer.ok, f"{answer.status} {answer.code}: {self.node.tail(30)}"
        self.stored[key] = values.reshape(-1, *values.shape[-2:])

    def delete(self, key: str) -> None:
        assert self.client.delete(BUCKET, key).ok
        del self.stored[key]

    def members(self, run: str = RUN) -> list[str]:
        return sorted(key for key in self.stored if key.rpartition("/")[0] + "/" == run)

    def product(self, name: str, run: str = RUN, key: str = "_run.nxs") -> h5py.File | None:
        answer = self.client.get(BUCKET, f"_products/{name}/{run}{key}")
        return h5py.File(io.BytesIO(answer.body), "r") if answer.status == 200 else None

    def wait(self, name: str, good: Callable[[h5py.File], Any], what: str, run: str = RUN) -> h5py.File:
        found: list[h5py.File] = []

        def look() -> bool:
            file = self.product(name, run)
            if file is not None and good(file):
                found.append(file)
                return True
            time.sleep(0.1)
            return False

        until(look, lambda: f"{what}: {self.seen(name, run)}\n{self.node.tail(25)}", 60)
        return found[0]

    def seen(self, name: str, run: str) -> str:
        file = self.product(name, run)
        if file is None:
            return "no product"
        said = {key: value[()] for key, value in file["entry/run"].items() if isinstance(value, h5py.Dataset)}
        return f"{said}, members {list(file['entry/members/key'].asstr()) if 'entry/members' in file else None}"

    def complete(self, name: str, run: str = RUN) -> h5py.File:
        """Wait until the product names exactly the stored versions, and is what numpy makes of them."""

        def right(file: h5py.File) -> bool:
            return "entry/members" in file and self._named(file) == self._wanted(run)

        file = self.wait(name, right, f"the product names {len(self.members(run))} members", run)
        check_count(file, self.frames(run))
        return file

    def frames(self, run: str = RUN) -> np.ndarray:
        return np.concatenate([self.stored[key] for key in self.members(run)])

    def _named(self, file: h5py.File) -> list[tuple[str, str]]:
        group = file["entry/members"]
        return list(zip(group["key"].asstr(), group["object_id"].asstr(), strict=True))

    def _wanted(self, run: str) -> list[tuple[str, str]]:
        ids = {record.key.decode(): record.object_id.hex() for record in self.node.records() if record.bucket == BUCKET}
        return [(key, ids[key]) for key in self.members(run)]

    def partials(self, name: str, run: str = RUN) -> list[str]:
        prefix = f"_products/{name}/{run}.partials/"
        return [key for key in self.client.listed(BUCKET) if key.startswith(prefix)]


def check_count(file: h5py.File, frames: np.ndarray) -> None:
    """COUNT's state over ``frames``, bit for bit."""
    state = file["entry/state"]
    hits = (frames >= 500).sum(axis=(1, 2))
    assert np.array_equal(state["total"][()], frames.sum(axis=0, dtype=np.int64))
    assert state["hits"][0] == hits.sum()
    assert state["most"][0] == frames.max()
    counts = file["entry/frames"]
    assert counts["received"][()] == len(frames)
    assert counts["kept"][()] == (hits > 380).sum()
    assert counts["dropped"][()] == (hits <= 380).sum()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("runs"), kernels="on", workers="2") as node:
        yield node


@pytest.fixture
def scene(node: Node) -> Iterator[Scene]:
    scene = Scene(node)
    scene.client.make_buckets()
    yield scene
    for key in scene.client.listed(BUCKET):
        scene.client.delete(BUCKET, key)
    until(
        lambda: not hiss(node, "run", "list", f"s3://{BUCKET}")["runs"],
        lambda: f"runs without members are gone: {hiss(node, 'run', 'list', f's3://{BUCKET}')}",
    )
    scene.client.close()


def test_frames_of_their_own_objects_have_one_product(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    for number in range(60):
        scene.put(f"{RUN}{number:04}.npy", frame(number))
    file = scene.complete("count")
    assert file["entry/state/index"][0] == 0, "each is frame 0 of its object"
    assert file["entry/run/status"].asstr()[()] == "open"
    named = scene.client.listed(BUCKET)
    assert not [key for key in named if key.startswith("_products/") and key.endswith(".npy.nxs")]
    ledgers = [record.ledger for record in scene.node.records() if record.key.startswith(RUN.encode())]
    assert all(ledger and (ledger.received, ledger.unreduced) == (1, 0) for ledger in ledgers)
    hits = (scene.frames() >= 500).sum(axis=(1, 2))
    assert sum(ledger.kept for ledger in ledgers if ledger) == (hits > 380).sum()


def test_stacks_and_single_frames_are_merged(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    scene.put(f"{RUN}a.npy", np.stack([frame(number) for number in range(5)]))
    for number in range(10, 20):
        scene.put(f"{RUN}b{number}.npy", frame(number))
    scene.put(f"{RUN}c.npy", np.stack([frame(number) for number in range(30, 33)]))
    scene.put("scan/8/a.npy", frame(99))
    scene.put("scan/7/deeper/a.npy", frame(98))
    scene.complete("count")
    scene.complete("count", "scan/8/")
    scene.complete("count", "scan/7/deeper/")


def test_overwritten_and_deleted_members_are_merged_anew(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    scene.put(f"{RUN}stack.npy", np.stack([frame(number) for number in range(4)]))
    for number in range(30):
        scene.put(f"{RUN}{number:04}.npy", frame(100 + number))
    scene.complete("count")
    # The maximum must go down again, which nothing but a new merge can do.
    scene.put(f"{RUN}0007.npy", frame(100 + 7) // 2)
    scene.delete(f"{RUN}0003.npy")
    scene.put(f"{RUN}stack.npy", np.stack([frame(7), frame(8)]))
    scene.complete("count")
    scene.delete(f"{RUN}stack.npy")
    scene.complete("count")
    for key in scene.members():
        scene.delete(key)
    until(lambda: scene.product("count") is None, "a run without members has no product", 60)
    until(lambda: not scene.partials("count"), "nor partials")


def test_a_client_that_sends_a_frame_again_counts_once(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    for number in range(12):
        for _ in range(3):
            scene.put(f"{RUN}{number:04}.npy", frame(number))
    file = scene.complete("count")
    assert file["entry/frames/received"][()] == 12


def test_uploads_that_break_off_leave_nothing(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    body = npy(frame(1))
    for number in range(5):
        with contextlib.suppress(OSError):
            _put_half(scene.node, f"/{BUCKET}/{RUN}half{number}.npy", body)
    for number in range(5):
        scene.put(f"{RUN}{number}.npy", frame(number))
    scene.complete("count")


def _put_half(node: Node, path: str, body: bytes) -> None:
    with socket.create_connection(("127.0.0.1", node.port()), timeout=60) as wire:
        headers = sign("PUT", path, "", {"host": f"127.0.0.1:{node.port()}"}) | {"content-length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        wire.sendall(f"PUT {path} HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) // 2])


def test_other_parameters_are_another_group(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    for number in range(6):
        scene.put(f"{RUN}{number}.npy", frame(number))
    first = scene.complete("count")
    old = first["entry/run/group"].asstr()[()]
    scene.kernel("count", COUNT.replace("500", "501"))
    for number in range(6, 10):
        scene.put(f"{RUN}{number}.npy", frame(number))
    file = scene.wait("count", lambda f: f["entry/run/members"][()] == 4, "the new group's product")
    assert file["entry/run/members_in_other_groups"][()] == 6
    newer = np.stack([frame(number) for number in range(6, 10)])
    assert file["entry/state/hits"][0] == (newer >= 501).sum()
    older = scene.product("count", key=f"_run.{old[:8]}.nxs")
    assert older is not None
    check_count(older, np.stack([frame(number) for number in range(6)]))
    assert older["entry/run/members_in_other_groups"][()] == 4
    # Sent again, the old members are judged by what the kernel is now, and the old group is gone.
    for number in range(6):
        scene.put(f"{RUN}{number}.npy", frame(number))
    scene.wait("count", lambda f: f["entry/run/members"][()] == 10, "all members in one group")
    until(lambda: scene.product("count", key=f"_run.{old[:8]}.nxs") is None, "the old group's product is deleted")


def test_a_marker_closes_a_run_and_a_late_member_opens_it(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    for number in range(8):
        scene.put(f"{RUN}{number}.npy", frame(number))
    assert scene.client.put(BUCKET, f"{RUN}_SUCCESS", b"").ok
    file = scene.wait("count", lambda f: status(f) == "closed", "the run is closed")
    check_count(file, scene.frames())
    assert file["entry/run/closed_by"].asstr()[()] == "marker"
    assert file["entry/run/pending"][()] == 0
    scene.put(f"{RUN}9.npy", frame(9))
    scene.wait("count", lambda f: status(f) == "open", "a late member opens the run")
    assert status(scene.complete("count")) == "open"
    assert scene.client.put(BUCKET, f"{RUN}_SUCCESS", b"done").ok
    scene.wait("count", lambda f: status(f) == "closed" and f["entry/run/members"][()] == 9, "it is closed again")
    assert scene.client.get(BUCKET, f"_products/count/{RUN}_SUCCESS.nxs").status == 404, "a marker is no member"


def status(file: h5py.File) -> str:
    return str(file["entry/run/status"].asstr()[()])


def test_a_run_is_closed_by_request_and_listed(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    for number in range(4):
        scene.put(f"{RUN}{number}.npy", frame(number))
    scene.complete("count")
    (run,) = hiss(scene.node, "run", "list", f"s3://{BUCKET}/scan/7")["runs"]
    assert (run["prefix"], run["state"], run["products"][0]["members"]) == (RUN, "open", 4)
    answer = hiss(scene.node, "run", "close", f"s3://{BUCKET}/{RUN}")
    assert (answer["state"], answer["closed_by"]) == ("closed", "request")
    scene.wait("count", lambda f: status(f) == "closed", "the run is closed")
    until(
        lambda: hiss(scene.node, "run", "list", f"s3://{BUCKET}/{RUN}")["runs"][0]["products"][0]["complete"],
        "the product is complete",
    )
    until(lambda: len(scene.partials("count")) <= 1, "what it was made of is joined")
    check_count(scene.complete("count"), scene.frames())


def hiss(node: Node, *arguments: str) -> Any:
    command = [sys.executable, "-m", "gateway.cli", *arguments, "--data", str(node.paths.root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_without_new_members_is_closed_after_its_timeout(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    tags = "<Tagging><TagSet><Tag><Key>hiss.run-timeout-s</Key><Value>{}</Value></Tag></TagSet></Tagging>"
    assert scene.client.request("PUT", f"/{BUCKET}", "tagging=", tags.format(2).encode()).ok
    try:
        for number in range(4):
            scene.put(f"{RUN}{number}.npy", frame(number))
        file = scene.wait("count", lambda f: status(f) == "closed", "the run is closed")
        assert file["entry/run/closed_by"].asstr()[()] == "timeout"
        check_count(file, scene.frames())
    finally:
        assert scene.client.request("PUT", f"/{BUCKET}", "tagging=", tags.format("default").encode()).ok


PROFILE = """
STATE = {"profile": ("float32", (32,), "sum"), "n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.profile[x] += np.float32(frame[y, x]) * np.float32(0.1)
    state.n[0] += 1
    return KEEP
"""


def profile(values: np.ndarray) -> np.ndarray:
    """PROFILE's state over one frame, in the kernel's own order of additions."""
    total = np.zeros(32, np.float32)
    for row in values:
        total += row.astype(np.float32) * np.float32(0.1)
    return total


def test_float_sums_are_merged_in_the_order_of_keys(scene: Scene) -> None:
    scene.kernel("profile", PROFILE)
    numbers = list(range(30))
    np.random.default_rng(5).shuffle(numbers)
    for number in numbers:
        scene.put(f"{RUN}{number:04}.npy", frame(number))
    scene.put(f"{RUN}0011.npy", frame(111))
    assert scene.client.put(BUCKET, f"{RUN}_SUCCESS", b"").ok
    file = scene.wait("profile", lambda f: status(f) == "closed" and f["entry/run/members"][()] == 30, "closed")
    wanted = np.zeros(32, np.float32)
    for key in scene.members():
        wanted += profile(scene.stored[key][0])
    assert file["entry/state/profile"][()].tobytes() == wanted.tobytes()
    assert file["entry/state/n"][0] == 30


PEAKS = """
STATE = {"n": ("int64", (2,), "sum"), "mean": ("float64", (1,), "max")}
ROWS = {"x": "float32", "value": "uint16"}

def finish(state, params):
    state.mean[0] = state.n[1] / max(state.n[0], 1)

def frame(frame, params, state, index, out, feedback):
    for x in range(frame.shape[1]):
        if frame[0, x] >= 900:
            append(feedback, x, frame[0, x])
            state.n[1] += 1
    state.n[0] += 1
    return KEEP
"""


def test_rows_and_results_of_a_run(scene: Scene) -> None:
    scene.kernel("peaks", PEAKS)
    for number in (5, 3, 9, 1):
        scene.put(f"{RUN}{number}.npy", frame(number))
    scene.put(f"{RUN}4.npy", np.stack([frame(40), frame(41)]))
    file = scene.wait("peaks", lambda f: f["entry/run/members"][()] == 5, "five members")
    wanted = [
        (place, number, x, values[0, x])
        for place, key in enumerate(scene.members())
        for number, values in enumerate(scene.stored[key])
        for x in range(32)
        if values[0, x] >= 900
    ]
    rows = file["entry/rows"]
    seen = zip(*(rows[name][()].tolist() for name in ("object", "frame", "x", "value")), strict=True)
    assert [tuple(map(int, row)) for row in seen] == [tuple(map(int, row)) for row in wanted]
    assert file["entry/result/mean"][0] == len(wanted) / 6
    assert not np.isfinite(file["entry/state/mean"][0]), "the state is as it was merged"


ORDER = """
ORDERED = True
STATE = {"last": ("int64", (1,), "max"), "chain": ("int64", (1,), "max"), "n": ("int64", (1,), "max")}

def frame(frame, params, state, index, out, feedback):
    if state.n[0] < 0:
        state.n[0] = 0
        state.chain[0] = 7
    state.chain[0] = (state.chain[0] * 31 + np.int64(frame[0, 0]) + index) % 1000003
    state.n[0] += 1
    return KEEP
"""


def chain(frames: np.ndarray) -> int:
    value = 7
    for one in frames:
        value = (value * 31 + int(one[0, 0])) % 1000003
    return value


def test_an_ordered_kernel_sees_a_run_in_the_order_of_its_keys(scene: Scene) -> None:
    scene.kernel("order", ORDER)
    for number in (4, 2, 9, 7, 1, 8):
        scene.put(f"{RUN}{number}.npy", frame(number))
    until(
        lambda: (
            [p["pending"] for r in hiss(scene.node, "run", "list", f"s3://{BUCKET}")["runs"] for p in r["products"]]
            == [6]
        ),
        "the members wait for the run to close",
    )
    assert scene.product("order") is None
    assert scene.client.put(BUCKET, f"{RUN}_SUCCESS", b"").ok
    file = scene.wait("order", lambda f: status(f) == "closed", "the run is closed")
    assert (file["entry/state/n"][0], file["entry/state/chain"][0]) == (6, chain(scene.frames()))
    # Out of order and late: judged from the beginning, once the run is closed again.
    scene.put(f"{RUN}3.npy", frame(33))
    scene.put(f"{RUN}7.npy", frame(77))
    assert scene.client.put(BUCKET, f"{RUN}_SUCCESS", b"").ok
    file = scene.wait("order", lambda f: status(f) == "closed" and f["entry/run/members"][()] == 7, "closed again")
    assert (file["entry/state/n"][0], file["entry/state/chain"][0]) == (7, chain(scene.frames()))
    assert [key.rpartition("/")[2] for key in file["entry/members/key"].asstr()] == [
        f"{n}.npy" for n in (1, 2, 3, 4, 7, 8, 9)
    ]


def test_members_that_fail_are_named(scene: Scene) -> None:
    source = COUNT.replace("    n = 0\n", "    n = 0\n    frame[40, 0]\n", 1).replace(
        "frame[40, 0]", "state.hits[0] += frame[index + 40, 0]"
    )
    scene.kernel("count", source)
    for number in range(3):
        scene.put(f"{RUN}{number}.npy", frame(number))
    file = scene.wait("count", lambda f: f["entry/run/failed"][()] == 3, "a product that says why")
    assert "index" in file["entry/error"].asstr()[()]
    scene.kernel("count", COUNT)
    for number in range(3):
        scene.put(f"{RUN}{number}.npy", frame(number))
    scene.complete("count")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", ["partial-before", "run-product-before"])
def test_a_worker_dies_while_it_stores(tmp_path: Path, point: str) -> None:
    """What was not stored is owed, and counts once in the end."""
    flag = tmp_path / "crashpoint"
    with running(tmp_path, {"HISS_CRASHPOINT_ONCE": str(flag)}, kernels="on", workers="2") as node:
        scene = Scene(node)
        scene.kernel("count", COUNT)
        for number in range(10):
            scene.put(f"{RUN}{number:04}.npy", frame(number))
        scene.complete("count")
        flag.write_text(point)
        for number in range(10, 25):
            scene.put(f"{RUN}{number:04}.npy", frame(number))
        until(lambda: not flag.exists(), f"a worker died at {point}")
        scene.client.close()
        node.ready()
        scene.put(f"{RUN}0003.npy", frame(333))
        scene.complete("count")
        scene.client.close()


@pytest.mark.timeout(300)
def test_workers_are_killed_and_the_node_starts_again(tmp_path: Path) -> None:
    with running(tmp_path, kernels="on", workers="2") as node:
        scene = Scene(node)
        scene.kernel("count", COUNT)

        def put(numbers: range) -> None:
            for number in numbers:
                with contextlib.suppress(OSError):
                    scene.put(f"{RUN}{number % 40:04}.npy", frame(number))
                    continue
                time.sleep(0.05)
                put(range(number, number + 1))

        for attempt in range(3):
            killer = threading.Timer(0.3, node.kill, ("worker", attempt))
            killer.start()
            put(range(attempt * 25, attempt * 25 + 30))
            killer.join()
        node.ready()
        scene.client.close()
        scene.complete("count")
        scene.client.close()
        node.kill_all()
        node.start()
        node.ready()
        scene.put(f"{RUN}0001.npy", frame(1001))
        assert scene.client.put(BUCKET, f"{RUN}_SUCCESS", b"").ok
        file = scene.wait("count", lambda f: status(f) == "closed", "the run is closed")
        check_count(file, scene.frames())
        scene.client.close()


def test_many_small_partials_are_joined(scene: Scene) -> None:
    scene.kernel("count", COUNT)
    deadline = time.monotonic() + 60
    number = 0
    seen = 0
    while time.monotonic() < deadline and not seen > len(scene.partials("count")):
        scene.put(f"{RUN}{number:05}.npy", frame(number))
        number += 1
        seen = max(seen, len(scene.partials("count")))
        time.sleep(0.25)
    assert seen > len(scene.partials("count")), f"{seen} partials, none joined"
    scene.complete("count")
    scene.delete(f"{RUN}00001.npy")
    scene.complete("count")
