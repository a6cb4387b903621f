"""A kernel's parameters and arrays on a real node, through the death of the worker that judged the stream."""

from __future__ import annotations

import http.client
import io
from collections.abc import Iterator

import h5py
import numpy as np
import pytest

from tests.crash.harness import S3, Node, running, sign, until

BUCKET = "disk"
SHAPE = (64, 128)
FRAMES = 64
LEVEL = """
PARAMS = {"level": ("int64", 1), "weight": ("uint8", "frame"), "turns": ("int64", 100000)}
STATE = {"frames": ("int64", (8,), "sum"), "weighted": ("int64", (1,), "sum"), "spin": ("int64", (1,), "max")}

def frame(frame, params, state, index, out, feedback):
    n = np.int64(index)
    for turn in range(params.turns):
        n = (n * 1103515245 + 12345) % 2147483648
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.weighted[0] += np.int64(frame[y, x]) * params.weight[y, x]
    state.frames[params.level] += 1
    state.spin[0] = max(state.spin[0], n)
    return KEEP if index % 2 else DROP
"""


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("settings"), kernels="on", workers="1") as node:
        yield node


def put(node: Node, key: str, body: bytes, metadata: dict[str, str], *, until_half: object = None) -> int:
    """A PUT with metadata; ``until_half`` is called when half of the body is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", node.port(), timeout=40)
    headers = {f"x-amz-meta-{name}": value for name, value in metadata.items()}
    signed = sign("PUT", f"/{BUCKET}/{key}", "", {"host": f"127.0.0.1:{connection.port}", **headers})
    connection.putrequest("PUT", f"/{BUCKET}/{key}", skip_host=True)
    for name, value in {**signed, "content-length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders()
    half = len(body) // 2
    connection.send(body[:half])
    if callable(until_half):
        until_half()
    connection.send(body[half:])
    status = connection.getresponse().status
    connection.close()
    return status


def npy(values: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, values)
    return target.getvalue()


def test_epochs_and_ledger_survive_the_worker(node: Node) -> None:
    client = S3(node)
    frames = np.random.default_rng(2).integers(0, 99, (FRAMES, *SHAPE), np.uint16)
    weight = np.random.default_rng(3).integers(0, 3, SHAPE, np.uint8)
    geometry = {"frame-dtype": "uint16", "frame-shape": "64,128"}

    def submit(level: int) -> bool:
        return put(node, "_kernels/level.py", LEVEL.encode(), {"params": f'{{"level": {level}}}'}) == 200

    until(lambda: submit(2), "the node takes a kernel", 60)

    def product(key: str) -> h5py.File | None:
        try:
            answer = client.get(BUCKET, f"_products/level/{key}.nxs")
        except OSError:
            return None  # the worker is not back yet
        return h5py.File(io.BytesIO(answer.body)) if answer.status == 200 else None

    def change() -> None:
        assert client.put(BUCKET, "_kernels/level/weight.npy", npy(weight)).ok
        # The stream began without its array: it waits, and is reduced with what its worker knew at the first frame.
        assert submit(5)

    assert put(node, "a.raw", frames.tobytes(), geometry, until_half=change) == 200
    node.kill("worker")
    with until(lambda: product("a.raw"), lambda: node.tail(), 60) as file:
        assert file["entry/state/frames"][5] == FRAMES
        assert file["entry/state/weighted"][0] == (frames * weight.astype(np.int64)).sum()
    # Now with its array there, and changed in between: each half keeps the parameters of its time.
    node.ready()

    def second() -> None:
        assert submit(7)

    assert put(node, "b.raw", frames.tobytes(), geometry, until_half=second) == 200
    node.kill("worker")
    stored = next(one for one in node.records() if one.key == b"b.raw")
    levels = [(epoch.first_frame, epoch.stages[-1].params["level"]) for epoch in stored.epochs]
    assert levels[0] == (0, 5)

    with until(lambda: product("b.raw"), lambda: node.tail(), 60) as file:
        bounds = [first for first, _ in levels] + [FRAMES]
        for (_, level), first, end in zip(levels, bounds[:-1], bounds[1:], strict=True):
            assert file["entry/state/frames"][level] == end - first
        assert file["entry/process/parameters/level"][:].tolist() == [level for _, level in levels]
        assert file["entry/state/weighted"][0] == (frames * weight.astype(np.int64)).sum()
    ledger = next(one for one in node.records() if one.key == b"b.raw").ledger
    assert ledger is not None
    assert (ledger.received, ledger.kept, ledger.dropped, ledger.unreduced) == (FRAMES, FRAMES // 2, FRAMES // 2, 0)
    client.close()
