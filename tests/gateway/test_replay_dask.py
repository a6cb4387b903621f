"""``hiss replay``: what a real node stored, reduced again on real Dask clusters, has the bits of the live products."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import psutil
import pytest

from gateway.boot import die_with_parent
from gateway.cli.s3put import sign
from gateway.users import KeyPair
from kernels.recorded import Recorded, read

pytest.importorskip("distributed")

Hiss = Callable[..., Any]
Poll = Callable[..., Any]

COUNTS = """\
from hiss import DROP, KEEP, STOP, append

PARAMS = {"low": ("uint16", 9), "last": ("uint16", 60000)}
STATE = {"hits": ("int64", (1,), "sum"), "most": ("uint16", (4, 6), "max"), "sum": ("int64", (4, 6), "sum")}
ROWS = {"pixels": "int32"}


def finish(state, params):
    state.hits[0] *= params.low


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            n += frame[y, x] >= params.low
            state.most[y, x] = max(state.most[y, x], frame[y, x])
            state.sum[y, x] += frame[y, x]
    state.hits[0] += n
    append(feedback, n)
    if frame[0, 0] == params.last:
        return STOP
    return KEEP if n >= 8 else DROP
"""
SCALED = """\
PARAMS = {"gain": ("float32", "frame")}
OUT = ("float32", "same")


def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            out[y, x] = frame[y, x] * params.gain[y, x]
    return REPLACE
"""
MEANS = """\
STATE = {"mean": ("float64", (4, 6), "sum"), "single": ("float32", (4, 6), "sum")}


def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.mean[y, x] += frame[y, x] / 3.0
            state.single[y, x] += np.float32(frame[y, x]) * np.float32(0.1)
    return KEEP
"""
SEQUENCE = """\
ORDERED = True
STATE = {"last": ("float64", (1,), "sum"), "turns": ("int64", (1,), "sum"), "trace": ("float64", (1,), "sum")}
ROWS = {"trace": "float64"}


def frame(frame, params, state, index, out, feedback):
    total = np.float64(frame.sum())
    state.turns[0] += total < state.last[0]
    state.trace[0] = state.trace[0] * 0.75 + total / 3.0
    state.last[0] = total
    append(feedback, state.trace[0])
    return KEEP
"""
SHAPE = (4, 6)
HALF = 100_000
GEOMETRY = {"x-amz-meta-frame-dtype": "uint16", "x-amz-meta-frame-shape": "4,6"}


def frames(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (count, *SHAPE)).astype(np.uint16)


class Bucket:
    """A bucket of a node."""

    def __init__(self, node: Any, name: str) -> None:
        self.node = node
        self.name = name
        self._keys = KeyPair(**node.keys())

    def call(self, method: str, path: str = "", body: bytes | Iterator[bytes] = b"", **headers: str) -> httpx.Response:
        url = self.node.url("s3")
        path = f"/{self.name}" + (f"/{path}" if path else "")
        signed = sign(method, path, {"host": url.split("://")[1], **headers}, self._keys, "us-east-1")
        return httpx.request(method, url + path, content=body, headers=signed, timeout=60)

    def put(self, key: str, data: np.ndarray) -> None:
        answer = self.call("PUT", key, data.tobytes(), **GEOMETRY)
        assert answer.status_code == 200, answer.text

    def product(self, kernel: str, key: str) -> Recorded | None:
        answer = self.call("GET", f"_products/{kernel}/{key}")
        return read(answer.content) if answer.status_code == 200 else None


@pytest.fixture
def bucket(real_node: Any, request: pytest.FixtureRequest, poll: Poll) -> Bucket:
    made = Bucket(real_node, request.node.name.replace("_", "-")[-40:].strip("-"))
    assert made.call("PUT").status_code == 200
    return made


def submit(bucket: Bucket, poll: Poll, name: str, source: str, **metadata: str) -> None:
    headers = {f"x-amz-meta-{key}": value for key, value in metadata.items()}
    # A node that has just started may say SlowDown: its fork server is still warming up.
    poll(lambda: bucket.call("PUT", f"_kernels/{name}.py", source.encode(), **headers).status_code == 200, name)


def run_is_whole(bucket: Bucket, poll: Poll, kernel: str, run: str, members: int) -> Recorded:
    def whole() -> Recorded | None:
        found = bucket.product(kernel, f"{run}_run.nxs")
        return found if found is not None and not found.error and found.about_run["members"] == members else None

    return poll(whole, f"the run's product of {kernel}")


CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    workers, folder = int(sys.argv[1]), sys.argv[2]
    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None, local_directory=folder
    )
    print(cluster.scheduler_address, *(nanny.pid for nanny in cluster.workers.values()), flush=True)
    sys.stdin.read()
    cluster.close()
"""


class Dask:
    """A cluster in processes of its own."""

    def __init__(self, folder: Path, workers: int) -> None:
        program = folder / "cluster.py"
        program.write_text(CLUSTER)
        ends_with_us = functools.partial(die_with_parent, os.getpid())
        self.process = subprocess.Popen(
            [sys.executable, str(program), str(workers), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=ends_with_us,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address, *pids = self.process.stdout.readline().split()
        self.pids = [int(pid) for pid in pids]

    def sandboxes(self, worker: int) -> list[int]:
        """Processes that judge for a worker."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [
                child.pid
                for zygote in psutil.Process(worker).children()
                if "kernels.zygote" in zygote.cmdline()
                for child in zygote.children()
            ]
        return []

    def below(self) -> set[int]:
        """Every process of the workers."""
        return {child.pid for pid in self.pids for child in psutil.Process(pid).children(recursive=True)}

    def close(self) -> None:
        self.process.communicate("", timeout=60)


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    cluster = Dask(tmp_path_factory.mktemp("dask"), 1)
    yield cluster
    cluster.close()


@dataclasses.dataclass
class Replayed:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out, self.err
        return json.loads(self.out.splitlines()[-1])

    def same(self, compared: int) -> None:
        """As many live products were compared, and nothing failed or differed."""
        document = self.json
        assert (self.code, document["failures"], document["differences"]) == (0, [], []), document
        assert document["compared"] == compared


def start(node: Any, kernel: str, prefix: str, *arguments: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HISS_")}
    command = [sys.executable, "-m", "gateway.cli", "replay", "--kernel", kernel, "--prefix", prefix]
    command += ["--data", str(node.data_dir), "--json", *arguments]
    return subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def replay(real_node: Any, dask: Dask) -> Callable[..., Replayed]:
    def run(kernel: str, prefix: str, *arguments: str) -> Replayed:
        process = start(real_node, kernel, prefix, "--scheduler", dask.address, *arguments)
        out, err = process.communicate(timeout=240)
        return Replayed(process.returncode, out, err)

    return run


def test_integers_have_the_bits_of_the_live_products(
    bucket: Bucket, poll: Poll, replay: Callable[..., Replayed], tmp_path: Path
) -> None:
    submit(bucket, poll, "counts", COUNTS, params='{"low": 7}')
    for number in range(3):
        bucket.put(f"run/{number}.raw", frames(1, seed=number))
    bucket.put("run/many.raw", frames(500, seed=8))
    stopping = frames(300, seed=9)
    stopping[120, 0, 0] = 60000
    bucket.put("run/stopped.raw", stopping)
    first = run_is_whole(bucket, poll, "counts", "run/", 5)

    def two_groups() -> bool:
        found = bucket.product("counts", "run/_run.nxs")
        return found is not None and (found.about_run["members"], found.about_run["members_in_other_groups"]) == (3, 5)

    def halves() -> Iterator[bytes]:
        """A span is full after the first; then the parameters change, which makes another group of the run, too."""
        yield streamed[:HALF].tobytes()
        submit(bucket, poll, "counts", COUNTS, params='{"low": 11}')
        for number in range(3, 6):
            bucket.put(f"run/{number}.raw", frames(1, seed=number))
        poll(two_groups, "the group of the new parameters")
        yield streamed[HALF:].tobytes()

    streamed = frames(2 * HALF, seed=10)
    answer = bucket.call(
        "PUT", "run/later/stream.raw", halves(), **GEOMETRY, **{"content-length": str(streamed.nbytes)}
    )
    assert answer.status_code == 200, answer.text
    run_is_whole(bucket, poll, "counts", "run/later/", 1)
    later = poll(lambda: bucket.product("counts", "run/later/stream.raw.nxs"), "the product of the stream")
    assert len(later.inputs[0].epochs) == 2

    out = tmp_path / "out"
    # The stream is several tasks, which end where an epoch does.
    done = replay(
        "counts", f"s3://{bucket.name}/run/", "--compare", "--output", str(out), "--split-bytes", "3000000"
    )  # fmt: skip
    done.same(6)
    assert done.json["frames"] == 6 + 500 + 300 + 2 * HALF
    older = next((out / "counts/run").glob("_run.*.nxs"), None)
    assert older is not None
    stored = {path.name for path in (out / "counts/run").iterdir()}
    assert stored == {"many.raw.nxs", "stopped.raw.nxs", "_run.nxs", older.name, "later"}
    found = read(older.read_bytes())
    assert found.state is not None
    assert first.state is not None
    assert found.state["hits"].tolist() == first.state["hits"].tolist()
    assert sorted(path.name for path in out.iterdir()) == ["counts"], "nothing staged is left"


def test_floats_have_the_bits_of_the_live_products(
    bucket: Bucket, poll: Poll, replay: Callable[..., Replayed], tmp_path: Path
) -> None:
    submit(bucket, poll, "scaled", SCALED)
    np.save(tmp_path / "gain.npy", np.linspace(0.3, 1.7, 24, dtype=np.float32).reshape(SHAPE))
    assert bucket.call("PUT", "_kernels/scaled/gain.npy", (tmp_path / "gain.npy").read_bytes()).status_code == 200
    submit(bucket, poll, "means", MEANS, after="scaled")
    for number in np.random.default_rng(2).permutation(12):
        bucket.put(f"run/{number:02}.raw", frames(1, seed=number))
    bucket.put("run/07b.raw", frames(700, seed=20))
    with h5py.File(tmp_path / "stack.h5", "w") as file:
        file.create_dataset(
            "entry/data/data", data=frames(40, seed=21), chunks=(3, *SHAPE), compression="gzip", shuffle=True
        )
    answer = bucket.call("PUT", "run/stack.h5", (tmp_path / "stack.h5").read_bytes())
    assert answer.status_code == 200
    run_is_whole(bucket, poll, "means", "run/", 14)
    done = replay("means", f"s3://{bucket.name}/run/", "--compare")
    done.same(3)
    assert done.json["frames"] == 12 + 700 + 40

    # One bit of a live product would have been seen: with another kernel of that name all of it differs.
    (tmp_path / "means.py").write_text(MEANS.replace("/ 3.0", "/ 3.0000000000000004"))
    done = replay(str(tmp_path / "means.py"), f"s3://{bucket.name}/run/", "--after", "scaled", "--compare")
    assert done.code == 1
    assert {"kernel", "state/mean"} <= {one["what"] for one in done.json["differences"]}


def test_an_ordered_kernel_sees_a_run_in_the_order_of_its_keys(
    bucket: Bucket, poll: Poll, replay: Callable[..., Replayed]
) -> None:
    submit(bucket, poll, "sequence", SEQUENCE)
    for number in np.random.default_rng(3).permutation(12):
        bucket.put(f"run/{number:02}.raw", frames(1, seed=number))
    bucket.put("run/many.raw", frames(60, seed=30))
    bucket.call("PUT", "run/_SUCCESS")
    run_is_whole(bucket, poll, "sequence", "run/", 13)
    replay("sequence", f"s3://{bucket.name}/run/", "--compare").same(2)


SLOW = """\
STATE = {"sum": ("int64", (4, 6), "sum"), "busy": ("float64", (1,), "max"), "frames": ("int64", (1,), "sum")}


def frame(frame, params, state, index, out, feedback):
    busy = 1.0
    for turn in range(300_000):
        busy = busy * 0.999999 + turn
    state.busy[0] = max(state.busy[0], busy)
    state.frames[0] += 1
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.sum[y, x] += frame[y, x]
    return KEEP
"""


def test_a_dask_worker_that_is_killed_costs_time_and_no_frame_counts_twice(
    real_node: Any, bucket: Bucket, poll: Poll, is_gone: Callable[[int], bool], tmp_path: Path
) -> None:
    submit(bucket, poll, "slow", SLOW)
    for number in range(4):
        bucket.put(f"run/{number}.raw", frames(400, seed=number))
    run_is_whole(bucket, poll, "slow", "run/", 4)
    dask = Dask(tmp_path, 2)
    try:
        # Each object is a task of its own, so that both workers are busy.
        process = start(
            real_node, "slow", f"s3://{bucket.name}/run/", "--scheduler", dask.address, "--compare",
            "--split-bytes", "4096",
        )  # fmt: skip
        victim = poll(lambda: next((pid for pid in dask.pids if dask.sandboxes(pid)), 0), "a worker judges", 200)
        family = [child.pid for child in psutil.Process(victim).children(recursive=True)]
        os.kill(victim, signal.SIGKILL)
        out, err = process.communicate(timeout=240)
        done = Replayed(process.returncode, out, err)
        done.same(5)
        assert done.json["frames"] == 1600
        poll(lambda: all(map(is_gone, family)), "its fork server and its sandboxes went with it")
    finally:
        dask.close()


CRASHING = """\
STATE = {"sum": ("int64", (2,), "sum")}


def frame(frame, params, state, index, out, feedback):
    state.sum[frame[0, 0]] += 1
    return KEEP
"""


def test_an_object_that_fails_is_named_and_costs_no_other(
    bucket: Bucket, poll: Poll, replay: Callable[..., Replayed], tmp_path: Path
) -> None:
    for number, value in enumerate([0, 1, 7, 1]):
        bucket.put(f"run/{number}.raw", np.full((1, *SHAPE), value, np.uint16))
    bucket.put("run/bad.raw", np.full((30, *SHAPE), 9, np.uint16))
    bucket.put("run/good.raw", np.full((30, *SHAPE), 1, np.uint16))
    (tmp_path / "crashing.py").write_text(CRASHING)
    target = f"s3://{bucket.name}/again"
    assert (
        "would run over its own products"
        in replay(str(tmp_path / "crashing.py"), f"s3://{bucket.name}/run/", "--output", target).err
    )
    done = replay(str(tmp_path / "crashing.py"), f"s3://{bucket.name}/run/", "--output", str(tmp_path / "out"))
    assert done.code == 1
    assert [one["key"] for one in done.json["failures"]] == ["run/2.raw", "run/bad.raw"]
    assert all("crashing.py:5" in one["reason"] for one in done.json["failures"])
    found = read((tmp_path / "out/crashing/run/_run.nxs").read_bytes())
    assert found.state is not None
    assert found.state["sum"].tolist() == [1, 32]
    assert (found.about_run["members"], found.about_run["failed"]) == (4, 2)


def test_ctrl_c_leaves_nothing(
    real_node: Any, bucket: Bucket, poll: Poll, dask: Dask, is_gone: Callable[[int], bool], tmp_path: Path
) -> None:
    bucket.put("run/0.raw", frames(100_000))
    bucket.put("run/1.raw", frames(1))
    (tmp_path / "slow.py").write_text(SLOW)
    out = tmp_path / "out"
    process = start(
        real_node, str(tmp_path / "slow.py"), f"s3://{bucket.name}/run/", "--scheduler", dask.address, "--output", str(out)
    )  # fmt: skip
    poll(lambda: dask.sandboxes(dask.pids[0]), "the worker judges", 200)
    family = dask.below()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")
    poll(lambda: not dask.below(), "no process is left at the Dask worker")
    assert all(map(is_gone, family))
    assert not out.exists()


def test_what_is_missing_is_said(
    here: Hiss, real_node: Any, bucket: Bucket, poll: Poll, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(bucket, poll, "counts", COUNTS)
    bucket.put("run/0.raw", frames(3))

    def asked(*arguments: str) -> Any:
        return here("replay", "--prefix", f"s3://{bucket.name}/run/", "--data", str(real_node.data_dir), *arguments)

    done = asked("--kernel", "counts", "--scheduler", "tcp://127.0.0.1:1", "--compare")
    assert (done.code, "no Dask scheduler answers at tcp://127.0.0.1:1" in done.err) == (4, True), done.err
    done = asked("--kernel", "nobody")
    assert (done.code, "has no kernel 'nobody' (there are: counts)" in done.err) == (2, True), done.err
    done = asked("--kernel", "counts", "--params", '{"high": 1}', "--compare")
    assert (done.code, "'high'" in done.err) == (2, True), done.err
    done = asked("--kernel", "counts")
    assert (done.code, "say where the products go with --output" in done.err) == (2, True), done.err
    assert "_products/counts/run/0.raw.nxs" in done.out
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = asked("--kernel", "counts", "--compare")
    assert (done.code, done.err) == (2, "hiss: a replay needs Dask: pip install hiss-gateway[dask]\n")
