"""Two workers of one node and the same kernels: what one learns or is told holds for both, and their streams have one result."""

from __future__ import annotations

import hashlib
import http.client
import io
from collections.abc import Iterator
from contextlib import closing

import h5py
import numpy as np
import pytest

from ingest.records import ObjectRecord
from kernels.strikes import FILE_PATTERN, read_all
from tests.crash.harness import S3, Node, running, sign, until

BUCKET = "disk"
SHAPE = (32, 64)
FRAMES = 64
GEOMETRY = {"frame_dtype": "uint16", "frame_shape": "32,64"}
LEVEL = """
PARAMS = {"level": ("int64", 1)}
STATE = {"frames": ("int64", (8,), "sum"), "total": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.frames[params.level] += 1
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.total[0] += frame[y, x]
    return KEEP
"""
CRASHES = """
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.n[frame.shape[0] + index] += 1
    return KEEP
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("workers"), kernels="on", workers="2") as node:
        yield node


def record(node: Node, key: str) -> ObjectRecord:
    return next(one for one in node.records() if one.bucket == BUCKET and one.key == key.encode())


def slot(node: Node, key: str) -> int:
    """The worker that received the object."""
    return record(node, key).extents[0].slot


def on_each(node: Node, prefix: str, body: bytes, **metadata: str) -> dict[int, S3]:
    """A client with a connection to each worker; each has put one object below ``prefix``."""
    clients: dict[int, S3] = {}
    spare: list[S3] = []

    def found() -> bool:
        client, key = S3(node), f"{prefix}{len(clients) + len(spare)}.raw"
        assert client.put(BUCKET, key, body, **metadata).ok
        if clients.setdefault(slot(node, key), client) is not client:
            spare.append(client)  # stays open, so that the next connection goes elsewhere
        return len(clients) == 2

    until(found, "both workers have a connection")
    for client in spare:
        client.close()
    return clients


class Halves:
    """A PUT that stops in the middle."""

    def __init__(self, node: Node, key: str, body: bytes) -> None:
        self.key = key
        self._body = body
        self._connection = http.client.HTTPConnection("127.0.0.1", node.port(), timeout=60)
        path = f"/{BUCKET}/{key}"
        headers = {
            "host": f"127.0.0.1:{node.port()}",
            "x-amz-meta-frame-dtype": "uint16",
            "x-amz-meta-frame-shape": "32,64",
        }
        self._connection.putrequest("PUT", path, skip_host=True, skip_accept_encoding=True)
        for name, value in {**sign("PUT", path, "", headers), "content-length": str(len(body))}.items():
            self._connection.putheader(name, value)
        self._connection.endheaders()
        self._connection.send(body[: len(body) // 2])

    def finish(self) -> None:
        self._connection.send(self._body[len(self._body) // 2 :])
        answer = self._connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
        self._connection.close()


def test_parameters_changed_while_streams_of_both_run(node: Node) -> None:
    with closing(S3(node)) as client:

        def submit(level: int) -> bool:
            return client.put(BUCKET, "_kernels/level.py", LEVEL.encode(), params=f'{{"level": {level}}}').ok

        until(lambda: submit(1), "the node takes a kernel", 60)
        bodies = np.random.default_rng(4).integers(0, 99, (8, FRAMES, *SHAPE), np.uint16)
        streams = [Halves(node, f"run/{number}.raw", body.tobytes()) for number, body in enumerate(bodies)]
        assert submit(5)
        # A stream that opens in a worker now has the new parameters: so that worker knows them.
        for probe in on_each(node, "probe/", bodies[0].tobytes(), **GEOMETRY).values():
            probe.close()
        for stream in streams:
            stream.finish()
        assert {slot(node, stream.key) for stream in streams} == {0, 1}

        total = np.zeros(8, np.int64)
        for stream, body in zip(streams, bodies, strict=True):
            answer = until(
                lambda key=stream.key: (found := client.get(BUCKET, f"_products/level/{key}.nxs")).ok and found,
                lambda: node.tail(),
                60,
            )
            stored = record(node, stream.key)
            epochs = [(one.first_frame, one.stages[-1].params["level"]) for one in stored.epochs]
            assert [level for _, level in epochs] == [1, 5], "each stream changed once"
            change = epochs[1][0]
            assert 0 < change < FRAMES
            with h5py.File(io.BytesIO(answer.body)) as file:
                counted = file["entry/state/frames"][()]
                assert (counted[1], counted[5], counted.sum()) == (change, FRAMES - change, FRAMES)
                assert file["entry/state/total"][0] == body.sum(dtype=np.int64)
                assert file["entry/process/parameters/level"][:].tolist() == [1, 5]
                total += counted

        def run() -> h5py.File | None:
            answer = client.get(BUCKET, "_products/level/run/_run.nxs")
            file = h5py.File(io.BytesIO(answer.body)) if answer.ok else None
            return file if file is not None and file["entry/state/frames"][()].sum() == 8 * FRAMES else None

        with until(run, lambda: node.tail(), 60) as file:
            assert np.array_equal(file["entry/state/frames"][()], total)
            assert file["entry/state/total"][0] == bodies.sum(dtype=np.int64)
        assert client.delete(BUCKET, "_kernels/level.py").ok


def test_a_kernel_that_one_worker_disabled_gets_no_stream_of_the_other(node: Node) -> None:
    """A stream that the second is given before it has looked around may disable the kernel there as well: then once more,
    with another source."""
    body = bytes(FRAMES * SHAPE[0] * SHAPE[1] * 2)
    clients = on_each(node, "before/", body, **GEOMETRY)
    with closing(clients[0]) as first, closing(clients[1]) as second:
        assert any(_second_learns(node, first, second, body, attempt) for attempt in range(5))


def _second_learns(node: Node, first: S3, second: S3, body: bytes, attempt: int) -> bool:
    source = f"# {attempt}\n{CRASHES}".encode()
    sha256 = hashlib.sha256(source).hexdigest()
    until(lambda: first.put(BUCKET, "_kernels/crashes.py", source).ok, "the node takes a kernel", 60)

    def strikes(worker: int) -> int:
        file = node.paths.run / FILE_PATTERN.replace("*", f"{worker:02}")
        return sum(one.count for one in read_all([file]) if one.sha256 == sha256)

    def told() -> str:
        return f"strikes of the first {strikes(0)}, of the second {strikes(1)}\n{node.tail()}"

    for number in range(3):
        key = f"crash/{attempt}-{number}.raw"
        assert first.put(BUCKET, key, body, **GEOMETRY).ok
        assert slot(node, key) == 0
    until(lambda: strikes(0) >= 3, told, 60)

    numbers = iter(range(1000))

    def left_alone() -> bool:
        key = f"after/{attempt}-{next(numbers)}.raw"
        assert second.put(BUCKET, key, body, **GEOMETRY).ok
        assert slot(node, key) == 1
        with node.catalogue() as reader:
            owed = "SELECT count(*) FROM reductions WHERE object_id = ?"
            (count,) = reader._db.execute(owed, (record(node, key).object_id,)).fetchone()
        return count == 0 and record(node, key).ledger is None

    until(left_alone, told, 60)
    return strikes(1) < 3
