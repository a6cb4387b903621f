"""Runs whose members land on three real nodes: one product, the same bits as on one node, also when its keeper dies."""

from __future__ import annotations

import contextlib
import io
import json
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np
import pytest

from ingest.cluster import members
from kernels.runs.keeping import keeper
from tests.cluster.together import Cluster, cluster, number
from tests.crash.harness import ROOT, S3, Node, until
from tests.engine import Engine

BUCKET = "disk"
SHAPE = (24, 32)
GEOMETRY = {"frame_dtype": "uint16", "frame_shape": "24,32"}
COUNT = """
STATE = {"total": ("int64", (24, 32), "sum"), "most": ("int64", (1,), "max")}
ROWS = {"spot": "uint16"}
ROWS_MAX = 2

def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = np.int64(frame[y, x])
            state.total[y, x] += value
            state.most[0] = max(state.most[0], value)
    append(feedback, frame[1, 1])
    return KEEP if frame[0, 0] > 100 else DROP
"""
FLOATS = """
STATE = {"mean": ("float64", (24,), "sum")}

def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.mean[y] += frame[y, x] / 7.0e-3 + 1.0e-9 * x
    return KEEP
"""
ORDERED = """
ORDERED = True
STATE = {"digest": ("int64", (1,), "sum"), "frames": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.digest[0] = (state.digest[0] * 31 + frame[0, 0]) % 1000003
    state.frames[0] += 1
    return KEEP
"""
KERNELS = {"count": COUNT, "floats": FLOATS, "ordered": ORDERED}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, postgres: Engine) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("runs"), postgres.fresh(), "a", "b", "c", kernels="on") as made:
        with contextlib.closing(S3(made["b"])) as client:
            for name, source in KERNELS.items():
                put = client.put(BUCKET, f"_kernels/{name}.py", source.encode())
                assert put.ok, put
        yield made


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, SHAPE, np.uint16)


def put(node: Node, key: str, values: np.ndarray) -> None:
    with contextlib.closing(S3(node)) as client:
        answer = client.put(BUCKET, key, values.tobytes(), **GEOMETRY)
        assert answer.ok, answer


def asked(node: Node, path: str, method: str = "GET") -> Any:
    token = b64encode(f"{ROOT['HISS_ROOT_ACCESS_KEY']}:{ROOT['HISS_ROOT_SECRET_KEY']}".encode()).decode()
    url = f"http://127.0.0.1:{node.port('control')}{path}"
    request = urllib.request.Request(url, headers={"Authorization": f"Basic {token}"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def product(node: Node, kernel: str, run: str, done: Callable[[h5py.File], bool]) -> h5py.File:
    """The run's product, once it is as wanted, as this node answers."""

    def found() -> h5py.File | None:
        with contextlib.closing(S3(node)) as client:
            answer = client.get(BUCKET, f"_products/{kernel}/{run}_run.nxs")
        file = h5py.File(io.BytesIO(answer.body)) if answer.ok else None
        return file if file is not None and done(file) else None

    return until(found, lambda: f"{run} of {kernel}: {asked(node, f'/v1/runs?bucket={BUCKET}')}\n{node.tail()}", 120)


def closed(file: h5py.File) -> bool:
    return file["entry/run/status"].asstr()[()] == "closed"


def members_of(file: h5py.File) -> int:
    return int(file["entry/run/members"][()])


def contents(file: h5py.File, run: str) -> dict[str, bytes]:
    """What does not depend on when and where the members arrived."""
    found = {f"state/{name}": file["entry/state"][name][()].tobytes() for name in file["entry/state"]}
    if "rows" in file["entry"]:
        found |= {f"rows/{name}": file["entry/rows"][name][()].tobytes() for name in ("frame", "object", "spot")}
    keys = [key.removeprefix(run) for key in file["entry/members/key"].asstr()[:].tolist()]
    found["keys"] = "\n".join(keys).encode()
    return found | {
        name: file["entry/members"][name][()].tobytes() for name in ("crc64nvme", "frames", "kept", "dropped")
    }


def test_the_product_of_a_run_on_three_nodes_is_that_of_one_node(nodes: Cluster) -> None:
    bodies = {f"{seed:02d}.raw": frame(seed) for seed in range(18)}
    bodies["stream.raw"] = np.stack([frame(seed) for seed in range(100, 108)])
    order = list(bodies)
    np.random.default_rng(1).shuffle(order)
    for at, name in enumerate(order):
        put(nodes["abc"[at % 3]], f"three/{name}", bodies[name])
        put(nodes["a"], f"one/{name}", bodies[name])
    # One is closed by a marker, the other over the API; neither on the node that has most to do with it.
    with contextlib.closing(S3(nodes["b"])) as client:
        assert client.put(BUCKET, "three/_SUCCESS", b"").ok
    assert asked(nodes["c"], f"/v1/runs/close?bucket={BUCKET}&prefix=one/", "POST")["closed_by"] == "request"

    for kernel in KERNELS:
        with (
            product(nodes["c"], kernel, "three/", closed) as three,
            product(nodes["b"], kernel, "one/", closed) as one,
        ):
            assert members_of(three) == members_of(one) == len(bodies)
            assert contents(three, "three/") == contents(one, "one/"), kernel
            if kernel == "count":
                every = np.concatenate([np.atleast_3d(body).reshape(-1, *SHAPE) for body in bodies.values()])
                assert np.array_equal(three["entry/state/total"][()], every.sum(axis=0, dtype=np.int64))
    for node in nodes.nodes.values():

        def whole(node: Node = node) -> bool:
            runs = {run["prefix"]: run for run in asked(node, f"/v1/runs?bucket={BUCKET}")["runs"]}
            found = runs["three/"]["products"]
            assert runs["three/"]["closed_by"] == "marker"
            return len(found) == 3 and all(one["complete"] and one["members"] == len(bodies) for one in found)

        until(whole, nodes.tails)


def test_a_run_goes_on_when_its_keeper_dies(nodes: Cluster) -> None:
    """Last of the file: node c is gone afterwards."""
    numbers = {name: number(node) for name, node in nodes.nodes.items()}
    every = tuple(sorted(numbers.values()))
    # All three of its products are kept by the node that is going to die.
    run = next(
        name
        for name in (f"kept{at}/" for at in range(10_000))
        if {keeper(BUCKET, name.encode(), kernel, every) for kernel in ("count", "floats")} == {numbers["c"]}
    )
    bodies = {f"{seed:02d}.raw": frame(200 + seed) for seed in range(6)}
    for at, (name, body) in enumerate(bodies.items()):
        put(nodes["abc"[at % 3]], run + name, body)
    for kernel in ("count", "floats"):
        product(nodes["a"], kernel, run, lambda file: members_of(file) == 6).close()

    # What c has made of its members is on another node, too, a few seconds later.
    def mirrored() -> bool:
        made = [one for one in nodes["a"].records() if one.key.startswith(b"_products/") and run.encode() in one.key]
        return all(one.mirror for one in made if one.extents[0].node == numbers["c"])

    until(mirrored, nodes.tails)
    nodes["c"].kill_all()
    for seed in range(6, 9):
        bodies[f"{seed:02d}.raw"] = frame(200 + seed)
        put(nodes["ab"[seed % 2]], f"{run}{seed:02d}.raw", frame(200 + seed))
    with contextlib.closing(S3(nodes["b"])) as client:
        assert client.put(BUCKET, f"{run}_SUCCESS", b"").ok
    # The same on one node.
    for name, body in bodies.items():
        put(nodes["a"], f"again/{name}", body)
    assert asked(nodes["a"], f"/v1/runs/close?bucket={BUCKET}&prefix=again/", "POST")
    for kernel in ("count", "floats"):
        with (
            product(nodes["b"], kernel, run, closed) as file,
            product(nodes["b"], kernel, "again/", closed) as again,
        ):
            assert contents(file, run) == contents(again, "again/"), kernel
    assert number(nodes["c"]) not in members.Members(nodes["a"].paths).reducing()
