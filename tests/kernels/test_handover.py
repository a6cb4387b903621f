"""What a worker hands to its keeper in memory is what the keeper would have read from storage."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kernels.contract import RowsSpec, StateSpec
from kernels.product import build
from kernels.runs.handover import BYTES_MAX, Handover
from kernels.runs.keeping import Keeping, owner
from kernels.runs.partial import Origin, Partial, from_product, of_version
from kernels.verdicts import AFTER_STOP, UNREDUCED
from tests.kernels.test_product import findings, lineage

ORIGIN = Origin("*", (), ())
ROWS = RowsSpec((("x", "float32"), ("n", "uint16")), 8)


@pytest.mark.parametrize("rows", [None, ROWS])
def test_a_handed_partial_is_the_one_that_storage_gives(rows: RowsSpec | None) -> None:
    specs = (
        StateSpec("image", "uint32", (300, 200), "max"),
        StateSpec("mean", "float64", (3,), "sum"),
        StateSpec("hits", "int64", (1,), "sum"),
    )
    one = lineage(*specs)
    one = dataclasses.replace(one, kernel=dataclasses.replace(one.kernel, rows=rows))
    state = {
        "image": np.arange(60000, dtype=np.uint32).reshape(300, 200),
        "mean": np.array([np.nan, -0.0, np.inf]),
        "hits": np.array([-7], np.int64),
    }
    found = findings(state, (1, 0, 2, 3, AFTER_STOP, UNREDUCED))
    table = None
    if rows is not None:
        table = np.zeros(5, rows.dtype)
        table["frame"], table["x"] = np.arange(5), np.linspace(-1, 1, 5)
    found = dataclasses.replace(found, rows=table, rows_left_out=3)
    record = one.inputs[0].record
    stored = from_product(bytes(build(one, found)), record, one.kernel, ORIGIN)
    handed = of_version(
        record,
        one.kernel,
        ORIGIN,
        state=state,
        verdicts=found.verdicts,
        frames=found.ledger.received,
        gaps=found.ledger.gaps,
        epochs=((0, 0),),
        rows=table,
        feedback_events=found.feedback_events,
        rows_left_out=found.rows_left_out,
    )
    assert handed == stored


def test_it_is_for_the_keeper_of_the_run_once_and_bounded() -> None:
    kept = [Handover(Keeping(slot, 3)).keeps("b", b"run/", "k") for slot in range(3)]
    assert kept == [slot == owner("b", b"run/", "k", 3) for slot in range(3)]
    handover = Handover(Keeping(0, 1))
    large = Partial(ORIGIN, (), {"s": bytes(BYTES_MAX // 2)}, each=True, started_ns=0, ended_ns=0)
    for number in range(3):
        handover.give(bytes([number]), large)
    assert handover.take(b"\0") is None
    assert handover.take(b"\1") is large
    assert handover.take(b"\1") is None
    assert handover.take(b"\2") is large
