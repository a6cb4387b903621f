"""``hiss kernel check``: real sandboxes, no node; what it prints must be what numpy finds in the same frames."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fabio
import h5py
import hdf5plugin
import numpy as np
import pytest
import tifffile

from gateway.cli.kernel import plots
from kernels.offload import device
from kernels.offload.emit_numba import emit_numba
from tests.kernels.offload import samples

Hiss = Callable[..., Any]

PEAKS = """\
from hiss import DROP, KEEP, append, emit

PARAMS = {"low": ("uint16", 60000), "mask": ("uint8", "frame")}
STATE = {
    "hits": ("int64", (1,), "sum"),
    "columns": ("int64", (-7 + 47,), "sum"),
    "share": ("float64", (40,), "sum"),
}
ROWS = {"x": "float32", "y": "float32"}
ROWS_MAX = 8


def finish(state, params):
    for i in range(40):
        state.share[i] = state.columns[i] / state.hits[0]


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if params.mask[y, x] and frame[y, x] >= params.low:
                n += 1
                state.columns[x] += 1
                append(feedback, x, y)
    state.hits[0] += n
    if n > 37:
        emit(feedback, 3, n)
    return KEEP if n > 37 else DROP
"""
SHAPE = (30, 40)


@pytest.fixture
def peaks(tmp_path: Path) -> Path:
    path = tmp_path / "peaks.py"
    path.write_text(PEAKS)
    return path


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 65536, (150, *SHAPE)).astype(np.uint16)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return (np.random.default_rng(4).random(SHAPE) < 0.13).astype(np.uint8)


def test_the_report_is_what_numpy_finds(
    here: Hiss, tmp_path: Path, peaks: Path, frames: np.ndarray, mask: np.ndarray
) -> None:
    np.save(tmp_path / "frames.npy", frames)
    np.save(tmp_path / "mask.npy", mask)
    png = tmp_path / "plot.png"
    done = here(
        "kernel", "check", str(peaks), "--frames", str(tmp_path / "frames.npy"), "--params", '{"low": 50000}',
        "--array", f"mask={tmp_path / 'mask.npy'}", "--seconds", "0", "--png", str(png), "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = done.json
    bright = (frames >= 50000) & (mask > 0)
    per_frame = bright.sum(axis=(1, 2))
    kept = int((per_frame > 37).sum())
    assert 0 < kept < 150
    assert report["read_as"] == ".npy: 150 frames of 30×40 uint16"
    assert report["verdicts"] == {"keep": kept, "drop": 150 - kept}
    assert report["state"]["hits"]["values"] == [int(bright.sum())]
    columns = bright.sum(axis=(0, 1))
    found = report["state"]["columns"]
    assert (found["shape"], found["min"], found["max"], found["sum"]) == (
        [40], int(columns.min()), int(columns.max()), int(columns.sum())
    )  # fmt: skip
    assert report["result"]["share"]["sum"] == pytest.approx(1.0)
    assert report["rows"]["count"] == np.minimum(per_frame, 8).sum()
    assert report["rows"]["dropped"] == np.maximum(per_frame - 8, 0).sum()
    y, x = np.argwhere(bright[0])[0]
    assert report["rows"]["first"][0] == {"frame": 0, "x": float(x), "y": float(y)}
    assert report["feedback"]["by_code"] == {"3": kept}
    assert report["cores_for_40_gbps"] == -(-5_000_000_000 // report["bytes_per_s_a_core"])
    assert report["compile_s"] > 0
    assert report["plot"] == "share", "what finish() made of the state"
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("form", ["bslz4", "gzip", "raw", "tiff"])
def test_a_file_is_read_as_a_node_reads_it(quick: Hiss, tmp_path: Path, form: str, frames: np.ndarray) -> None:
    """Large frames: what a codec does with memory and threads then is what matters in the sandbox."""
    large = np.tile(frames[:4], (1, 20, 30))
    file = tmp_path / "file"
    arguments = ["--frames", str(file), "--max-frames", "3", "--seconds", "0"]
    if form == "tiff":
        large = large[:1]
        tifffile.imwrite(file, large[0], compression="zlib", photometric="minisblack")
    elif form == "raw":
        file.write_bytes(large.tobytes() + b"tail")
        arguments += ["--dtype", "uint16", "--shape", "600x1200"]
    else:
        filters = dict(hdf5plugin.Bitshuffle(cname="lz4")) if form == "bslz4" else {"compression": "gzip"}
        with h5py.File(file, "w") as opened:
            opened.create_dataset("entry/data/data", data=large, chunks=(1, 600, 1200), **filters)
    total = tmp_path / "total.py"
    total.write_text(
        'STATE = {"total": ("int64", (1,), "sum")}\n\n\n'
        "def frame(frame, params, state, index, out, feedback):\n"
        "    state.total[0] += frame.sum()\n    return KEEP\n"
    )
    done = quick("kernel", "check", str(total), *arguments, "--json")
    assert done.code == 0, done.err
    assert done.json["state"]["total"]["values"] == [int(large[:3].sum(dtype=np.int64))]
    assert ("bslz4" in done.json["read_as"]) == (form == "bslz4")
    decoding = done.json["decoding_bytes_per_s_a_core"]
    assert (decoding is not None) == (form != "raw")
    kernel = done.json["kernel_bytes_per_s_a_core"]
    if decoding is None:
        assert kernel == done.json["bytes_per_s_a_core"]
    else:
        assert kernel is None or kernel > done.json["bytes_per_s_a_core"]


def test_a_real_cbf(quick: Hiss, tmp_path: Path) -> None:
    folder = Path(os.environ.get("HISS_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    file = folder / "phi_scan_001.cbf"
    if not file.exists():
        pytest.skip("real detector data is not here")
    kernel = ("pixel_statistics", "--constant", "HEIGHT=619", "--constant", "WIDTH=487")
    done = quick("kernel", "check", *kernel, "--frames", str(file), "--seconds", "0", "--json")
    assert done.code == 0, done.err
    assert done.json["read_as"] == "CBF (byte-offset): 1 frames of 619×487 int32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = fabio.open(str(file)).data
    sums = [one["sum"] for one in done.json["state"].values()]
    assert int(image.clip(0).sum(dtype=np.int64)) in sums or int(image.sum(dtype=np.int64)) in sums


def test_a_chain_and_a_stop(quick: Hiss, tmp_path: Path, frames: np.ndarray) -> None:
    """B sees what A makes; parameters go to the kernel they name."""
    np.save(tmp_path / "frames.npy", frames)
    (tmp_path / "halve.py").write_text(
        'PARAMS = {"by": ("uint16", 1)}\nOUT = ("float32", "same")\n\n\n'
        "def frame(frame, params, state, index, out, feedback):\n"
        "    for y in range(frame.shape[0]):\n        for x in range(frame.shape[1]):\n"
        "            out[y, x] = frame[y, x] / params.by\n    return REPLACE\n"
    )
    (tmp_path / "first.py").write_text(
        'STATE = {"corner": ("float64", (1,), "max")}\n\n\n'
        "def frame(frame, params, state, index, out, feedback):\n"
        "    state.corner[0] = max(state.corner[0], frame[0, 0])\n"
        "    return STOP if index == 5 else KEEP\n"
    )
    done = quick(
        "kernel", "check", str(tmp_path / "first.py"), "--after", str(tmp_path / "halve.py"), "--seconds", "0", "--json",
        "--params", '{"halve.by": 4}', "--frames", str(tmp_path / "frames.npy"),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["state"]["corner"]["values"] == [float(frames[:6, 0, 0].max() / 4)]
    assert (done.json["stopped_at"], done.json["timed_frames"]) == (5, 6)
    assert done.json["verdicts"] == {"keep": 5, "drop": 0, "stop": 1, "behind stop": 144}


def test_failures_name_the_line(quick: Hiss, tmp_path: Path, peaks: Path, frames: np.ndarray) -> None:
    np.save(tmp_path / "frames.npy", frames[:, :20, :50])
    ones = tmp_path / "ones.npy"
    np.save(ones, np.ones((20, 40), np.uint8))
    arguments = ("--frames", str(tmp_path / "frames.npy"), "--array", f"mask={ones}", "--params", '{"low": 0}')
    peaks.write_text(PEAKS.replace("state.columns[x] += 1", "state.columns[x + 1] += 1"))
    done = quick("kernel", "check", str(peaks), *arguments)
    assert done.code == 2
    assert done.err.startswith("hiss: peaks.py:24: frame 0: IndexError")
    assert "\nhiss:    24 |                 state.columns[x + 1] += 1\n" in done.err
    peaks.write_text(PEAKS.replace("frame[y, x] >= ", "frame[y, x, 0, 0] >= "))
    done = quick("kernel", "check", str(peaks), *arguments, "--json")
    assert (done.code, done.json["refused"]["line"]) == (2, 22)


def test_no_frames_no_file_no_array(quick: Hiss, tmp_path: Path, peaks: Path, frames: np.ndarray) -> None:
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(os.urandom(5000))
    done = quick("kernel", "check", str(peaks), "--frames", str(rubbish))
    assert (done.code, "raw frames need --dtype and --shape" in done.err) == (2, True)
    done = quick("kernel", "check", str(peaks), "--frames", str(tmp_path / "absent"))
    assert (done.code, "No such file" in done.err) == (2, True)
    np.save(tmp_path / "frames.npy", frames)
    done = quick("kernel", "check", str(peaks), "--frames", str(tmp_path / "frames.npy"))
    assert (done.code, "array 'mask' is missing" in done.err) == (2, True)
    np.save(tmp_path / "mask.npy", np.ones(SHAPE, np.float32))
    arguments = ("--frames", str(tmp_path / "frames.npy"), "--array", f"mask={tmp_path / 'mask.npy'}")
    done = quick("kernel", "check", str(peaks), *arguments)
    assert (done.code, "holds float32, declared is uint8" in done.err) == (2, True)


def test_a_shipped_kernel_with_its_size_changed(quick: Hiss, tmp_path: Path, frames: np.ndarray) -> None:
    listed = quick("kernel", "list", "--library", "--json").json
    (statistics,) = [one for one in listed if one["name"] == "pixel_statistics"]
    assert statistics["constants"].keys() >= {"HEIGHT", "WIDTH"}
    assert "pixel_statistics" in quick("kernel", "list", "--library").out
    np.save(tmp_path / "frames.npy", frames)
    size = ("--constant", "HEIGHT=30", "--constant", "WIDTH=40", "--seconds", "0", "--json")
    done = quick("kernel", "check", "pixel_statistics", "--frames", str(tmp_path / "frames.npy"), *size)
    assert done.code == 0, done.err
    assert any(one["sum"] == int(frames.sum(dtype=np.int64)) for one in done.json["state"].values())
    done = quick("kernel", "check", "pixel_statistics", "--frames", "x", "--constant", "DEPTH=1")
    assert (done.code, "has no constant DEPTH" in done.err) == (2, True)


# -- plots


def unpacked(png: bytes) -> np.ndarray:
    """Pixels of an 8-bit greyscale PNG without row filters."""
    stream = io.BytesIO(png[8:])
    data, size = b"", (0, 0)
    while head := stream.read(8):
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        body = stream.read(length)
        assert int.from_bytes(stream.read(4), "big") == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = (int.from_bytes(body[4:8], "big"), int.from_bytes(body[:4], "big"))
            assert body[8:] == bytes([8, 0, 0, 0, 0])
        elif kind == b"IDAT":
            data += body
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(size[0], size[1] + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_an_image_as_png_and_as_text() -> None:
    image = np.zeros((100, 200), np.int64)
    image[80, 150] = 1000
    pixels = unpacked(plots.png("image", image))
    assert pixels.shape == image.shape
    assert np.argwhere(pixels).tolist() == [[80, 150]]
    lines = plots.text("image", image).splitlines()
    assert lines[0] == "image (100×200, 0 to 1000)"
    ((row, column),) = [(y, line.index("@")) for y, line in enumerate(lines) if "@" in line]
    height, width = len(lines) - 3, len(lines[1]) - 2
    assert ((row - 2) / height, (column - 1) / width) == (pytest.approx(0.8, abs=0.06), pytest.approx(0.75, abs=0.02))


def test_a_line_as_png_and_as_text() -> None:
    values = np.zeros(1000)
    values[250] = 5
    pixels = unpacked(plots.png("line", values))
    assert pixels.shape == (plots.PNG_HEIGHT, plots.PNG_WIDTH)
    peak = np.flatnonzero((pixels == 0).sum(axis=0) > plots.PNG_HEIGHT // 2)
    assert peak.mean() / plots.PNG_WIDTH == pytest.approx(0.26, abs=0.02)
    lines = plots.text("line", values).splitlines()
    assert lines[0] == "line (1000 values, 0 to 5)"
    assert lines[1].startswith("5 ┤")
    assert 0.2 < (lines[1][3:].rstrip("\u2800").index(lines[1][3:].strip("\u2800")[0])) / plots.COLUMNS < 0.3


@pytest.mark.parametrize("values", [np.zeros(9), np.array([np.nan, np.inf, 1.0]), np.zeros((3, 4, 5)), np.ones((1, 1))])
def test_nothing_to_see_is_drawn_too(values: np.ndarray) -> None:
    assert plots.text("x", values)
    assert unpacked(plots.png("x", values)).size


def test_the_core_is_compared_with_the_kernel(peer: Callable[[str], str], quick: Hiss, tmp_path: Path) -> None:
    peer("ghdl")
    kernel, file = tmp_path / "hits.py", tmp_path / "frames.npy"
    kernel.write_text(samples.THRESHOLD)
    np.save(file, np.random.default_rng(2).integers(0, 40, (12, 8, 12)).astype(np.uint16))
    arguments = ("--frames", str(file), "--seconds", "0", "--no-plot", "--json")
    done = quick("kernel", "check", str(kernel), *arguments, "--device", "ghdl")
    assert done.code == 0, done.err
    assert done.json["device"] == {
        "model": "equal to the cpu on 12 frames",
        "ghdl": "the simulated VHDL is equal to the cpu on 8 frames",
    }
    assert quick("kernel", "check", str(kernel), *arguments).json["device"] == {}


def test_a_core_that_differs_is_an_error(quick: Hiss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        device, "emit_numba", lambda offload: emit_numba(offload).replace("np.uint16(63)", "np.uint16(30)")
    )
    kernel, file = tmp_path / "hits.py", tmp_path / "frames.npy"
    kernel.write_text(samples.THRESHOLD)
    np.save(file, np.random.default_rng(2).integers(0, 40, (3, 8, 12)).astype(np.uint16))
    arguments = ("--frames", str(file), "--seconds", "0", "--device", "model")
    done = quick("kernel", "check", str(kernel), *arguments)
    assert done.code == 1
    assert "the model of the core and the cpu differ in state.histogram" in done.err
    kernel.write_text(samples.THRESHOLD.replace("v = frame[y, x]", "v = frame[y, x] * 0.5"))
    done = quick("kernel", "check", str(kernel), *arguments)
    assert (done.code, "hits.py:9: device fpga: an FPGA core works in integers" in done.err) == (2, True)
