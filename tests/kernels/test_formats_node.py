"""Every format over S3 through a real node: products equal h5py, fabio, tifffile and numpy, live where it can be."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fabio
import h5py
import hdf5plugin
import httpx
import numpy as np
import pytest
import tifffile

from tests.crash.harness import S3, Node, running, until
from tests.kernels import dectris

BUCKET = "disk"
SUM = """
STATE = {"rows": ("int64", (2048,), "sum"), "sums": ("int64", (256,), "sum"), "most": ("int64", (1,), "max")}

def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        row = 0
        for x in range(frame.shape[1]):
            value = np.int64(frame[y, x])
            row += value
            state.most[0] = max(state.most[0], value)
        state.rows[y] += row
        n += row
    state.sums[index % 256] += n
    return KEEP if n % 2 else DROP
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("formats"), kernels="on", workers="1") as node:
        client = S3(node)
        client.make_buckets()
        answer = client.put(BUCKET, "_kernels/sum.py", SUM.encode())
        assert answer.ok, answer
        client.close()
        yield node


class Scene:
    def __init__(self, node: Node) -> None:
        self.node = node
        self.client = S3(node)

    def put(self, key: str, body: bytes) -> None:
        answer = self.client.put(BUCKET, key, body)
        assert answer.ok, answer

    def product(self, key: str, good: Callable[[h5py.File], bool] = lambda file: True) -> h5py.File:
        found: list[h5py.File] = []

        def look() -> bool:
            answer = self.client.get(BUCKET, f"_products/sum/{key}")
            if answer.status == 200:
                file = h5py.File(io.BytesIO(answer.body), "r")
                if good(file):
                    found.append(file)
                    return True
            time.sleep(0.1)
            return False

        until(look, lambda: f"the product of {key}\n{self.node.tail(25)}", 60)
        return found[0]

    def check(self, key: str, frames: np.ndarray) -> h5py.File:
        file = self.product(key + ".nxs")
        assert "error" not in file["entry"], file["entry/error"].asstr()[()]
        sums = frames.astype(np.int64).sum(axis=(1, 2))
        expected = np.zeros(256, np.int64)
        np.add.at(expected, np.arange(len(sums)) % 256, sums)
        np.testing.assert_array_equal(file["entry/state/sums"], expected)
        rows = np.zeros(2048, np.int64)
        rows[: frames.shape[1]] = frames.astype(np.int64).sum(axis=(0, 2))
        np.testing.assert_array_equal(file["entry/state/rows"], rows)
        assert file["entry/state/most"][0] == frames.max()
        np.testing.assert_array_equal(file["entry/verdicts"], sums % 2)
        assert file["entry/frames/unreduced"][()] == 0
        return file

    def caught_up(self) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.node.port('control')}/metrics", timeout=60).text
        lines = [line for line in text.splitlines() if line.startswith("hiss_kernel_catchup_frames_total")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.fixture
def scene(node: Node) -> Iterator[Scene]:
    scene = Scene(node)
    yield scene
    scene.client.close()


def hdf5(frames: np.ndarray, **options: Any) -> bytes:
    target = io.BytesIO()
    with h5py.File(target, "w") as file:
        file.create_dataset("entry/data/data", data=frames, **options)
    return target.getvalue()


def test_real_files(scene: Scene, data_folder: Path) -> None:
    for name, dataset in (("eiger1_bslz4_data_000001.h5", "entry/data/data"), ("aps_nxsas.h5", "entry/data/frames")):
        scene.put(f"real/{name}", (data_folder / name).read_bytes())
        with h5py.File(data_folder / name) as file:
            product = scene.check(f"real/{name}", file[dataset][:])
        assert product["entry/source/layout"].asstr()[0].startswith(f"HDF5 /{dataset}, ")


def test_objects_of_one_frame_go_into_their_run(scene: Scene, data_folder: Path) -> None:
    """CBF, TIFF, HDF5 and one message an object: the run's state is their sum, whatever each is."""
    cbf = (data_folder / "phi_scan_001.cbf").read_bytes()
    pixels = fabio.open(str(data_folder / "phi_scan_001.cbf")).data.astype(np.int64)
    frames = np.random.default_rng(1).poisson(5, (4, 1030, 1065)).astype("<u2")
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, frames[0], compression="zlib", predictor=True, photometric="minisblack")
    runs = {
        "cbf": ([cbf, cbf, cbf], 3 * pixels.sum()),
        "tiff": ([tiff.getvalue()], frames[0].sum()),
        # Small enough to be packed, and too large for that.
        "messages": ([dectris.image(frame, 17 + n) for n, frame in enumerate(frames)], frames.sum()),
        "plain": ([dectris.image(frame, 17 + n, "none") for n, frame in enumerate(frames)], frames.sum()),
        "hdf5": (
            [hdf5(frame[None], chunks=(1, 1030, 1065), **hdf5plugin.Bitshuffle()) for frame in frames],
            frames.sum(),
        ),
    }
    for run, (bodies, _) in runs.items():
        for number, body in enumerate(bodies):
            scene.put(f"{run}/{number}.x", body)
    for run, (_, total) in runs.items():

        def whole(file: h5py.File, total: int = int(total)) -> bool:
            return "entry/state" in file and bool(file["entry/state/sums"][0] == total)

        scene.product(f"{run}/_run.nxs", whole)


@pytest.mark.parametrize("algorithm", ["bslz4", "none"])
def test_a_series_is_reduced_while_it_arrives(scene: Scene, algorithm: str) -> None:
    """Messages of 0.2 to 2 MB over many spans: every one is cut out whole, none has to be read back."""
    rng = np.random.default_rng(2)
    frames = np.stack([rng.poisson(1 + n % 7, (1030, 1065)).astype("<u2") for n in range(24)])
    before = scene.caught_up()
    body = dectris.stream(frames, algorithm, lost=(3,))
    scene.put(f"live/{algorithm}.cbor", body)
    file = scene.check(f"live/{algorithm}.cbor", np.delete(frames, 3, axis=0))
    assert file["entry/frames/gaps"][:].tolist() == [[3, 1]]
    assert file["entry/frames/trailing_bytes"][()] == 0
    # The arena may have taken a span back while the kernel was being compiled.
    assert scene.caught_up() - before <= 8
    answer = scene.client.get(BUCKET, f"live/{algorithm}.cbor")
    assert answer.body == body


def test_arrays_one_behind_the_other(scene: Scene) -> None:
    frames = np.random.default_rng(3).integers(0, 500, (30, 300, 301)).astype("<u2")
    target = io.BytesIO()
    for part in (frames[:1], frames[1:20], frames[20:]):
        np.save(target, part)
    scene.put("npy/stacks.npy", target.getvalue())
    scene.check("npy/stacks.npy", frames)


def test_large_hdf5(scene: Scene) -> None:
    frames = np.random.default_rng(4).poisson(2, (40, 514, 1030)).astype("<u2")
    scene.put("h5/stack.h5", hdf5(frames, chunks=(1, 514, 1030), **hdf5plugin.Bitshuffle()))
    scene.put("h5/deep.h5", hdf5(frames, chunks=(8, 100, 200), compression="gzip", compression_opts=1, shuffle=True))
    scene.put("h5/plain.h5", hdf5(frames.astype(">i4")))
    for name in ("stack", "deep", "plain"):
        scene.check(f"h5/{name}.h5", frames)


def test_broken_files_hurt_nobody(scene: Scene, data_folder: Path) -> None:
    """Random bytes flipped: each gets a product, with frames or with a reason; what comes next is reduced as ever."""
    rng = np.random.default_rng(5)
    seeds = {name: (data_folder / name).read_bytes() for name in ("eiger1_bslz4_data_000001.h5", "phi_scan_001.cbf")}
    for turn in range(6):
        name = sorted(seeds)[turn % 2]
        body = bytearray(seeds[name])
        for place in rng.integers(0, 6000, 8):
            body[place] = rng.integers(0, 256)
        scene.put(f"broken/{turn}/{name}", bytes(body))
    scene.put("broken/cut/x.h5", seeds["eiger1_bslz4_data_000001.h5"][:50_000])
    scene.put("broken/nothing.h5", b"\x89HDF\r\n\x1a\n")
    for key in ("broken/cut/x.h5", "broken/nothing.h5"):
        assert "entry/error" in scene.product(key + ".nxs")
    frames = np.random.default_rng(6).integers(0, 500, (5, 100, 100)).astype("<u2")
    scene.put("broken/good.h5", hdf5(frames, chunks=(1, 100, 100), **hdf5plugin.LZ4()))
    scene.check("broken/good.h5", frames)
