"""``hiss kernel reproduce`` and ``watch``: products of a real node, computed again and followed while they come."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest

from gateway.cli.s3put import sign
from gateway.users import KeyPair
from kernels.recorded import read

Hiss = Callable[..., Any]
Poll = Callable[..., Any]

SOURCE = """\
from hiss import DROP, KEEP, append, emit

PARAMS = {"low": ("uint16", 9)}
STATE = {"hits": ("int64", (1,), "sum"), "mean": ("float64", (4, 6), "sum"), "first": ("int64", (1,), "min")}
ROWS = {"pixels": "int32"}


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            n += frame[y, x] >= params.low
            state.mean[y, x] += frame[y, x] / 3.0
    state.hits[0] += n
    state.first[0] = min(state.first[0], frame[0, 0])
    append(feedback, n)
    emit(feedback, 7, n)
    return KEEP if n >= 8 else DROP
"""
SHAPE = (4, 6)
GEOMETRY = {"x-amz-meta-frame-dtype": "uint16", "x-amz-meta-frame-shape": "4,6"}


class Bucket:
    """A bucket with the kernel in it."""

    def __init__(self, node: Any, name: str) -> None:
        self.node = node
        self.name = name
        self._keys = KeyPair(**node.keys())

    def call(self, method: str, path: str = "", body: bytes = b"", **headers: str) -> httpx.Response:
        url = self.node.url("s3")
        path = f"/{self.name}" + (f"/{path}" if path else "")
        signed = sign(method, path, {"host": url.split("://")[1], **headers}, self._keys, "us-east-1")
        return httpx.request(method, url + path, content=body, headers=signed, timeout=60)

    def put(self, key: str, frames: np.ndarray) -> None:
        answer = self.call("PUT", key, frames.tobytes(), **GEOMETRY)
        assert answer.status_code == 200, answer.text

    def product(self, key: str) -> bytes | None:
        answer = self.call("GET", f"_products/hits/{key}")
        return answer.content if answer.status_code == 200 else None


@pytest.fixture
def bucket(real_node: Any, request: pytest.FixtureRequest, poll: Poll) -> Bucket:
    made = Bucket(real_node, request.node.name.replace("_", "-")[-40:].strip("-"))
    assert made.call("PUT").status_code == 200
    # A node that has just started may say SlowDown: its fork server is still warming up.
    poll(lambda: made.call("PUT", "_kernels/hits.py", SOURCE.encode()).status_code == 200, "the kernel is admitted", 60)
    return made


@pytest.fixture
def reproduce(quick: Hiss, real_node: Any) -> Hiss:
    return lambda *arguments: quick("kernel", "reproduce", *arguments, "--data", str(real_node.data_dir))


def frames(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (count, *SHAPE)).astype(np.uint16)


def test_a_product_is_computed_again_from_the_raw_data(
    reproduce: Hiss, bucket: Bucket, poll: Poll, tmp_path: Path
) -> None:
    bucket.put("run/a.raw", frames(50))
    product = poll(lambda: bucket.product("run/a.raw.nxs"), "the product")
    place = f"{bucket.name}/_products/hits/run/a.raw.nxs"
    done = reproduce(place, "--json")
    assert done.code == 0, done.out + done.err
    assert done.json | {"product": ""} == {
        "product": "", "reproduced": True, "inputs": 1, "frames": 50, "differences": [], "notes": [],
    }  # fmt: skip

    # One bit of one number, and a verdict: both are found and named.
    file = tmp_path / "altered.nxs"
    file.write_bytes(product)
    with h5py.File(file, "r+") as opened:
        mean = opened["entry/state/mean"]
        mean[2, 3] = np.nextafter(mean[2, 3], np.inf)
        opened["entry/verdicts"][49] ^= 1
        opened["entry/process/environment/numba"][()] = "0.1.2"
    done = reproduce(str(file), "--json")
    assert done.code == 1
    assert [one["what"] for one in done.json["differences"]] == ["state/mean", "verdicts"]
    assert done.json["differences"][0]["how"].startswith("1 of 24 values; first at [2, 3]: ")
    assert any(note.startswith("numba was 0.1.2, here it is ") for note in done.json["notes"])

    # With other parameters another result: what is recorded is what is used.
    with h5py.File(file, "r+") as opened:
        opened["entry/process/parameters/low"][0] = 3
    assert "state/hits" in reproduce(str(file)).out

    bucket.put("run/a.raw", frames(50, seed=2))
    file.write_bytes(product)
    done = reproduce(str(file))
    assert (done.code, "it was overwritten, filtered or damaged" in done.err) == (2, True)
    bucket.call("DELETE", "run/a.raw")
    done = reproduce(str(file))
    assert (done.code, done.err) == (
        2, f"hiss: {file}: cannot be reproduced: s3://{bucket.name}/run/a.raw: is gone\n"
    )  # fmt: skip

    # From a copy in a folder it needs no node.
    (tmp_path / "archive/run").mkdir(parents=True)
    (tmp_path / "archive/run/a.raw").write_bytes(frames(50).tobytes())
    done = reproduce(str(file), "--raw", str(tmp_path / "archive"))
    assert (done.code, "the same, bit by bit (1 objects, 50 frames)" in done.out) == (0, True), done.err


def test_the_product_of_a_run_is_computed_again_over_its_members(reproduce: Hiss, bucket: Bucket, poll: Poll) -> None:
    for number in range(6):
        bucket.put(f"run/{number}.raw", frames(1, seed=number))
    bucket.put("run/6.raw", frames(5, seed=6))

    def whole() -> bool:
        found = bucket.product("run/_run.nxs")
        return found is not None and len(read(found).inputs) == 7

    poll(whole, "the run's product", 60)
    done = reproduce(f"s3://{bucket.name}/_products/hits/run/_run.nxs", "--json")
    assert done.code == 0, done.out + done.err
    assert (done.json["inputs"], done.json["frames"]) == (7, 11)


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


def test_an_ordered_run_is_computed_again_in_the_order_of_its_keys(
    reproduce: Hiss, bucket: Bucket, poll: Poll, tmp_path: Path
) -> None:
    answer = bucket.call("PUT", "_kernels/sequence.py", SEQUENCE.encode())
    assert answer.status_code == 200, answer.text
    order = np.random.default_rng(3).permutation(12)
    for number in order:
        bucket.put(f"run/{number:02}.raw", frames(1, seed=number))
    bucket.call("PUT", "run/_SUCCESS")

    def whole() -> bytes | None:
        answer = bucket.call("GET", "_products/sequence/run/_run.nxs")
        found = answer.content if answer.status_code == 200 else None
        return found if found is not None and len(read(found).inputs) == 12 else None

    product = poll(whole, "the run's product", 60)
    trace, expected = 0.0, []
    for number in range(12):
        trace = trace * 0.75 + float(frames(1, seed=number).sum()) / 3.0
        expected.append(trace)
    recorded = read(product)
    assert recorded.rows is not None
    assert recorded.rows["trace"].tolist() == expected
    place = f"s3://{bucket.name}/_products/sequence/run/_run.nxs"
    done = reproduce(place, "--json")
    assert (done.code, done.json["differences"]) == (0, []), done.out + done.err
    assert (done.json["inputs"], done.json["frames"]) == (12, 12)

    # In another order it would have been another result, and the comparison sees it.
    file = tmp_path / "altered.nxs"
    file.write_bytes(product)
    with h5py.File(file, "r+") as opened:
        opened["entry/state/trace"][0] = np.nextafter(expected[-1], np.inf)
    done = reproduce(str(file), "--json")
    assert (done.code, [one["what"] for one in done.json["differences"]]) == (1, ["state/trace"])


def test_what_is_no_product_is_named(reproduce: Hiss, bucket: Bucket, tmp_path: Path, poll: Poll) -> None:
    file = tmp_path / "file.nxs"
    file.write_bytes(b"not HDF5")
    done = reproduce(str(file), "--json")
    assert (done.code, done.json["reproduced"]) == (2, None)
    assert "it is no product of a kernel" in done.err
    assert "neither a file nor BUCKET/_products" in reproduce(f"{bucket.name}/run/a.raw").err
    assert "there is no such product" in reproduce(f"{bucket.name}/_products/hits/run/a.raw.nxs").err
    bucket.call("PUT", "run/words.txt", b"no frames at all")
    failed = poll(lambda: bucket.product("run/words.txt.nxs"), "the product")
    assert read(failed).error
    done = reproduce(f"{bucket.name}/_products/hits/run/words.txt.nxs")
    assert (done.code, "the product has no result, it says why" in done.err) == (2, True)


# -- watch


class Watching:
    """``hiss kernel watch --json`` as a process; what it said so far."""

    def __init__(self, bucket: Bucket, *arguments: str) -> None:
        command = [sys.executable, "-m", "gateway.cli", "kernel", "watch", f"{bucket.name}/hits", "--every", "0.2"]
        self.process = subprocess.Popen(
            [*command, "--data", str(bucket.node.data_dir), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def pages(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.lines)]

    @property
    def values(self) -> list[tuple[str, int, float]]:
        return [(event["key"], event["frame"], event["value"]) for page in self.pages for event in page["fresh"]]

    def interrupt(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def watch(bucket: Bucket) -> Iterator[Callable[..., Watching]]:
    running: list[Watching] = []

    def start(*arguments: str) -> Watching:
        running.append(Watching(bucket, *arguments))
        return running[-1]

    yield start
    for one in running:
        one.end()


def subscribers(node: Any) -> float:
    text = httpx.get(node.url("control") + "/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("hiss_feedback_subscribers"))


def test_watch_follows_feedback_and_products_through_a_restart(
    bucket: Bucket, real_node: Any, watch: Callable[..., Watching], poll: Poll
) -> None:
    watching = watch("--json")
    poll(lambda: subscribers(real_node) == 1, "the stream is open")
    first, second = frames(5), frames(7, seed=2)
    bucket.put("run/a.raw", first)
    hits = [float(n) for n in (first >= 9).sum(axis=(1, 2))]
    expected = [("run/a.raw", frame, value) for frame, value in enumerate(hits)]
    poll(lambda: watching.values == expected, "all events in order")
    poll(
        lambda: any(page["product"] and page["product"]["counts"]["received"] == 5 for page in watching.pages),
        "the product",
    )

    control = next(row for row in real_node.processes() if row["role"] == "control")
    os.kill(control["pid"], signal.SIGKILL)
    real_node.healthy()

    def again() -> bool:
        try:
            return subscribers(real_node) == 1
        except httpx.TransportError:
            return False

    poll(again, "the stream is open again", 60)
    bucket.put("run/b.raw", second)
    poll(lambda: len(watching.values) >= 12, "events after the restart")
    assert watching.values[5:] == [("run/b.raw", n, float(v)) for n, v in enumerate((second >= 9).sum(axis=(1, 2)))]
    assert watching.pages[-1]["reconnections"] >= 1
    assert watching.pages[-1]["events"] == 12
    assert watching.interrupt() == (0, "")


def test_watch_draws_lines_where_there_is_no_terminal(here: Hiss, bucket: Bucket, real_node: Any, poll: Poll) -> None:
    bucket.put("run/a.raw", frames(5))
    poll(lambda: bucket.product("run/a.raw.nxs"), "the product")
    done = here("kernel", "watch", f"{bucket.name}/hits", "--for", "0.2", "--data", str(real_node.data_dir))
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("_products/hits/run/")
    assert "received 5" in done.out
    absent = here("kernel", "watch", "no-such-bucket/hits", "--for", "5", "--data", str(real_node.data_dir))
    assert absent.code == 2


SCALE = """\
PARAMS = {"gain": ("float32", "frame")}
OUT = ("float32", "same")


def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            out[y, x] = frame[y, x] * params.gain[y, x]
    return REPLACE
"""
BRIGHTEST = """\
STATE = {"sum": ("float64", (4, 6), "sum"), "mean": ("float64", (4, 6), "sum"), "frames": ("int64", (1,), "sum")}
ROWS = {"brightest": "float32"}


def finish(state, params):
    for y in range(4):
        for x in range(6):
            state.mean[y, x] = state.sum[y, x] / state.frames[0]


def frame(frame, params, state, index, out, feedback):
    state.frames[0] += 1
    for y in range(4):
        for x in range(6):
            state.sum[y, x] += frame[y, x]
    append(feedback, frame.max())
    return KEEP
"""


def test_a_chain_with_an_array_from_submission_to_reproduction(
    here: Hiss, quick: Hiss, bucket: Bucket, poll: Poll, tmp_path: Path
) -> None:
    node = ("--data", str(bucket.node.data_dir))
    (tmp_path / "scale.py").write_text(SCALE)
    (tmp_path / "brightest.py").write_text(BRIGHTEST)
    here("kernel", "remove", f"{bucket.name}/hits", *node)
    done = here("kernel", "submit", str(tmp_path / "brightest.py"), "--bucket", bucket.name, "--after", "scale", *node)
    assert done.code == 0, done.err
    row = here("kernel", "list", bucket.name, "--json", *node).json[0]
    assert (row["state"], row["reason"].split(",")[0]) == ("waiting", "for kernel scale")
    done = here("kernel", "submit", str(tmp_path / "scale.py"), "--bucket", bucket.name, *node, "--match", "none/*")
    assert (done.code, "not sent: gain" in done.out) == (0, True), done.err
    done = here("kernel", "submit", str(tmp_path / "brightest.py"), "--bucket", bucket.name, "--after", "scale", *node)
    assert done.code == 0, done.err
    bucket.put("run/a.raw", frames(20))

    def state(name: str) -> tuple[str, str]:
        rows = here("kernel", "list", bucket.name, "--json", *node).json
        return next((row["state"], row["reason"]) for row in rows if row["name"] == name)

    assert state("scale") == (
        "waiting", "for array gain: `hiss kernel submit … --array gain=FILE.npy`"
    )  # fmt: skip
    gain = np.linspace(0.5, 2, 24, dtype=np.float32).reshape(SHAPE)
    np.save(tmp_path / "gain.npy", gain)
    arguments = ("--array", f"gain={tmp_path / 'gain.npy'}", "--match", "none/*")
    done = here("kernel", "submit", str(tmp_path / "scale.py"), "--bucket", bucket.name, *arguments, *node)
    assert done.code == 0, done.err
    assert state("scale")[0] == "running"

    def product() -> bytes | None:
        answer = bucket.call("GET", "_products/brightest/run/a.raw.nxs")
        return answer.content if answer.status_code == 200 else None

    recorded = read(poll(product, "the product, once the array is there", 90))
    assert [stage.name for stage in recorded.stages] == ["scale", "brightest"]
    assert recorded.rows is not None
    scaled = frames(20).astype(np.float32) * gain
    np.testing.assert_array_equal(recorded.rows["brightest"], scaled.max(axis=(1, 2)))
    done = quick("kernel", "reproduce", f"{bucket.name}/_products/brightest/run/a.raw.nxs", "--json", *node)
    assert (done.code, done.json["differences"]) == (0, []), done.err
    gone = here("kernel", "remove", f"{bucket.name}/scale", *node)
    assert f"removed s3://{bucket.name}/_kernels/scale/gain.npy" in gone.out
