"""Kernels of a cluster of real nodes: put on one, they run on all, with the same parameters and arrays, and outlive the node
that received them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import h5py
import numpy as np
import pytest
from awscrt import checksums

from ingest.records import KernelEpoch, ObjectRecord
from tests.cluster.together import Cluster, cluster, number
from tests.crash.harness import S3, Node, until
from tests.engine import Engine
from tests.kernels.test_two_workers import BUCKET, FRAMES, GEOMETRY, LEVEL, SHAPE, Halves

MASKED = """
PARAMS = {"mask": ("uint8", "frame"), "scale": ("int64", 1)}
STATE = {"sum": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if params.mask[y, x]:
                state.sum[0] += params.scale * frame[y, x]
    return KEEP
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, postgres: Engine) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("kernels"), postgres.fresh(), "a", "b", kernels="on") as made:
        yield made


def record(node: Node, key: str) -> ObjectRecord:
    """As the node's own index has it: of another node's a moment later."""

    def found() -> ObjectRecord | None:
        return next((one for one in node.records() if one.bucket == BUCKET and one.key == key.encode()), None)

    return until(found, f"{key} is known")


def epochs_of(stored: ObjectRecord, kernel: str) -> list[KernelEpoch]:
    return [one for one in stored.epochs if one.kernel == kernel]


def npy(values: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, values)
    return target.getvalue()


def frames(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 99, (FRAMES, *SHAPE), np.uint16)


def product(node: Node, kernel: str, key: str) -> h5py.File:
    """As the node answers it, whoever stored it."""
    with contextlib.closing(S3(node)) as client:
        found = until(
            lambda: (answer := client.get(BUCKET, f"_products/{kernel}/{key}.nxs")).ok and answer,
            lambda: node.tail(),
            60,
        )
    return h5py.File(io.BytesIO(found.body))


def test_parameters_put_elsewhere_count_for_a_stream_that_runs(nodes: Cluster) -> None:
    with contextlib.closing(S3(nodes["a"])) as here, contextlib.closing(S3(nodes["b"])) as there:
        source = LEVEL.encode()
        until(lambda: here.put(BUCKET, "_kernels/level.py", source, params='{"level": 1}').ok, "a takes a kernel")
        body = frames(1)
        # Known on b at once: its answers rest on everything that was answered before.
        assert there.get(BUCKET, "_kernels/level.py").body == source
        stream = Halves(nodes["b"], "change/one.raw", body.tobytes())
        assert here.put(BUCKET, "_kernels/level.py", source, params='{"level": 5}').ok

        def changed() -> bool:
            """A stream that begins on b now has the new parameters."""
            assert there.put(BUCKET, "probe/x.raw", body.tobytes(), **GEOMETRY).ok
            return epochs_of(record(nodes["b"], "probe/x.raw"), "level")[0].stages[-1].params["level"] == 5

        until(changed, nodes.tails)
        stream.finish()
    stored = record(nodes["a"], stream.key)
    assert stored.extents[0].node == number(nodes["b"])
    epochs = epochs_of(stored, "level")
    assert [one.stages[-1].params["level"] for one in epochs] == [1, 5]
    change = epochs[1].first_frame
    with product(nodes["a"], "level", stream.key) as file:
        counted = file["entry/state/frames"][()]
        assert (counted[1], counted[5], counted.sum()) == (change, FRAMES - change, FRAMES)
        assert file["entry/state/total"][0] == body.sum(dtype=np.int64)
        assert file["entry/process/parameters/level"][:].tolist() == [1, 5]


def test_an_array_put_elsewhere_is_the_kernels(nodes: Cluster) -> None:
    masks = np.random.default_rng(3).integers(0, 2, (2, *SHAPE)).astype(np.uint8)
    body = frames(2)
    with contextlib.closing(S3(nodes["a"])) as here, contextlib.closing(S3(nodes["b"])) as there:
        assert here.put(BUCKET, "_kernels/masked.py", MASKED.encode(), match="masked/*").ok
        # What b has answered once, its streams know: otherwise they do a tenth of a second later.
        assert there.get(BUCKET, "_kernels/masked.py").ok
        for number, mask in enumerate(masks):
            # The second in the middle of a stream on the other node.
            stream = Halves(nodes["b"], f"masked/{number}.raw", body.tobytes())
            assert here.put(BUCKET, "_kernels/masked/mask.npy", npy(mask)).ok
            wanted = record(nodes["a"], "_kernels/masked/mask.npy").crc64nvme

            def seen(wanted: int = wanted) -> bool:
                assert there.put(BUCKET, "masked/probe.raw", body.tobytes(), **GEOMETRY).ok
                epochs = epochs_of(record(nodes["b"], "masked/probe.raw"), "masked")
                return bool(epochs) and epochs[0].stages[-1].arrays.get("mask") == wanted

            until(seen, nodes.tails)
            stream.finish()
    # One waited for its array, the other had it changed; which frames saw which is part of the product.
    by_crc = {f"{checksums.crc64nvme(npy(mask)):016x}": mask for mask in masks}
    for key in ("masked/0.raw", "masked/1.raw"):
        with product(nodes["a"], "masked", key) as file:
            used = [crc.decode() for crc in file["entry/process/arrays/mask/crc64nvme"][:]]
            changes = [(int(first), used[number]) for _, first, number in file["entry/source/epochs"][()]]
            ends = [first for first, _ in changes[1:]] + [FRAMES]
            total = sum(
                body[first:end, by_crc[crc] > 0].sum(dtype=np.int64)
                for (first, crc), end in zip(changes, ends, strict=True)
            )
            assert file["entry/state/sum"][0] == total
    stored = epochs_of(record(nodes["a"], "masked/1.raw"), "masked")
    assert stored[-1].stages[-1].arrays["mask"] == checksums.crc64nvme(npy(masks[1]))


def test_kernels_outlive_the_node_that_received_them(nodes: Cluster) -> None:
    """Last of the file: node a is gone afterwards."""
    with contextlib.closing(S3(nodes["a"])) as here:
        keys = [key for key in here.listed(BUCKET) if key.startswith("_kernels/")]
        assert len(keys) == 3
        bodies = {key: here.get(BUCKET, key).body for key in keys}
    wanted = {record(nodes["a"], key).object_id.hex() for key in keys}
    until(
        lambda: {file.name for file in nodes["b"].paths.kernels.glob("*")} >= wanted, "b has copies of what a received"
    )
    nodes["a"].kill_all()
    # Whoever has read nothing yet: a new worker of b, and a node that joins now.
    nodes["b"].kill("worker")
    joined = nodes.add("c")
    joined.ready(500.0)
    nodes["b"].ready(500.0)
    for node in (nodes["b"], joined):
        with contextlib.closing(S3(node)) as client:
            for key, body in bodies.items():
                until(lambda key=key: client.get(BUCKET, key).ok, nodes.tails)
                assert client.get(BUCKET, key).body == body
            body = frames(4)
            key = f"masked/on-{node.port()}.raw"
            assert client.put(BUCKET, key, body.tobytes(), **GEOMETRY).ok
            with product(node, "masked", key) as file:
                mask = np.load(io.BytesIO(bodies["_kernels/masked/mask.npy"]))
                assert file["entry/state/sum"][0] == body[:, mask > 0].sum(dtype=np.int64)
