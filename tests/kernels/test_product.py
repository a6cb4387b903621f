"""The product: what a scientist and a NeXus viewer find in it."""

from __future__ import annotations

import dataclasses
import io

import h5py
import numpy as np
import pytest

from ingest.records import FrameGeometry, FrameLedger, ObjectRecord, ObjectState
from kernels.contract import Kernel, ParamSpec, StateSpec
from kernels.lineage import Input, Lineage, StageSettings
from kernels.product import Findings, build
from kernels.runs.names import product_key
from kernels.verdicts import UNREDUCED, Verdicts

SOURCE = "def frame(frame, params, state, index, out, feedback):\n    return KEEP  # µ\n"


def lineage(*state: StateSpec) -> Lineage:
    record = ObjectRecord(
        bucket="scan42",
        key=b"run/a\xff.raw",
        version_id="null",
        object_id=bytes(range(16)),
        sequence=1,
        state=ObjectState.BUFFERED,
        length=96,
        stored_length=96,
        etag="e",
        crc64nvme=0xABC,
        modified_ns=1_700_000_000_123_456_789,
        owner="o",
    )
    kernel = Kernel("hits", SOURCE, "ab" * 32, (ParamSpec("low", "uint16", 1),), state)
    geometry = FrameGeometry("<u2", (4, 6), 0, 48, None)
    settings = ((StageSettings({"low": 12}),),)
    began_ns = 1_700_000_000_000_000_000
    return Lineage(kernel, "*", settings, (Input(record, geometry, 2),), began_ns, began_ns + 1_000_000_000)


def findings(state: dict[str, np.ndarray], verdicts: tuple[int, ...] = (1, 0)) -> Findings:
    ledger = FrameLedger(received=2, kept=1, dropped=1, stored=2, gaps=((2, 3),), trailing_bytes=7)
    return Findings(state, np.array(verdicts, np.uint8), ledger, 5)


def opened(body: memoryview) -> h5py.File:
    return h5py.File(io.BytesIO(body))


SPECTRUM = StateSpec("spectrum", "int64", (4096,), "sum")
IMAGE = StateSpec("image", "uint32", (300, 200), "max")
SCALAR = StateSpec("hits", "int64", (1,), "sum")


def default_signal(file: h5py.File) -> tuple[h5py.Dataset, str]:
    """Follow the default attributes as a NeXus viewer does."""
    entry = file[file.attrs["default"]]
    data = entry[entry.attrs["default"]]
    assert (entry.attrs["NX_class"], data.attrs["NX_class"]) == ("NXentry", "NXdata")
    return data[data.attrs["signal"]], data.attrs["interpretation"]


@pytest.mark.parametrize(
    ("specs", "expected", "interpretation"),
    [
        ((SCALAR, IMAGE, SPECTRUM), "image", "image"),
        ((SCALAR, SPECTRUM, IMAGE), "spectrum", "spectrum"),
        ((SCALAR,), "verdicts", "spectrum"),
        ((), "verdicts", "spectrum"),
    ],
)
def test_the_default_plot_is_the_obvious_one(specs: tuple[StateSpec, ...], expected: str, interpretation: str) -> None:
    state = {spec.name: np.arange(np.prod(spec.shape)).reshape(spec.shape).astype(spec.dtype) for spec in specs}
    with opened(build(lineage(*specs), findings(state))) as file:
        signal, kind = default_signal(file)
        assert kind == interpretation
        truth = state.get(expected, np.array([1, 0], np.uint8))
        np.testing.assert_array_equal(signal, truth)
        for spec in specs:
            dataset = file["entry/state"][spec.name]
            np.testing.assert_array_equal(dataset, state[spec.name])
            assert (dataset.dtype, dataset.attrs["merge"]) == (np.dtype(spec.dtype), spec.merge)


def test_counts_and_gaps() -> None:
    with opened(build(lineage(SCALAR), findings({"hits": np.array([3])}))) as file:
        entry = file["entry"]
        assert entry["title"].asstr()[()] == "hits over scan42/run/a%FF.raw"
        assert entry["frames/gaps"][:].tolist() == [[2, 3]]
        assert entry["frames/kept"][()] == 1


def test_a_reason_instead_of_findings() -> None:
    one = lineage(SCALAR)
    without_frames = dataclasses.replace(one, inputs=(Input(one.inputs[0].record, None, 0),))
    with opened(build(without_frames, "no frame geometry")) as file:
        assert file["entry/error"].asstr()[()] == "no frame geometry"
        assert "state" not in file["entry"]
        assert file["entry/process/kernel/sha256"].asstr()[()] == "ab" * 32


def test_equal_inputs_give_equal_bytes() -> None:
    state = {"image": np.arange(60000, dtype=np.uint32).reshape(300, 200)}
    assert bytes(build(lineage(IMAGE), findings(state))) == bytes(build(lineage(IMAGE), findings(state)))


def test_product_keys_fit_and_do_not_collide() -> None:
    assert product_key("hits", b"run/a.raw") == b"_products/hits/run/a.raw.nxs"
    long = [product_key("hits", b"a" * 1024), product_key("hits", b"a" * 1023 + b"b")]
    assert all(len(key) <= 1024 for key in long)
    assert long[0] != long[1]


def test_verdicts_of_several_kernels_combine() -> None:
    verdicts = Verdicts(2)
    verdicts.record(0, 0, np.array([1, 0, 0, 1], np.uint8))
    assert (verdicts.kept, verdicts.dropped) == (2, 0)
    verdicts.record(1, 1, np.array([0, 1], np.uint8))
    assert (verdicts.kept, verdicts.dropped) == (3, 1)
    verdicts.void(0, 0, 4)
    assert (verdicts.kept, verdicts.dropped) == (1, 0)
    assert verdicts.row(1, 5).tolist() == [UNREDUCED, 0, 1, UNREDUCED, UNREDUCED]
