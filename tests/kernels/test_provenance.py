"""Lineage: what a product says of its own origin, and that other people's readers understand it."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import re
from typing import Any

import h5py
import numpy as np
import pytest

from ingest.records import FrameGeometry, FrameLedger, ObjectRecord, ObjectState
from kernels.contract import ArraySpec, Kernel, ParamSpec
from kernels.lineage import ArrayUse, Epoch, Input, Lineage, StageSettings
from kernels.product import Findings, build
from kernels.provenance import PROV_INPUTS_MAX, prov_json

BEGAN_NS = 1_700_000_000_123_456_789
SOURCE = "def frame(frame, params, state, index, out, feedback):\n    return KEEP  # µ\n"
FLAT = Kernel("flat", SOURCE + "# first\n", "cd" * 32, (), (), (ArraySpec("gain", "float32", (2,)),))
HITS = Kernel("hits", SOURCE, "ab" * 32, (ParamSpec("low", "uint16", 1), ParamSpec("cut", "float32", 0.5)), ())


def record(number: int = 0) -> ObjectRecord:
    return ObjectRecord(
        bucket="scan42",
        key=b"run/a\xff%d.raw" % number,
        version_id="null",
        object_id=number.to_bytes(16, "big"),
        sequence=1,
        state=ObjectState.BUFFERED,
        length=96,
        stored_length=96,
        etag="e",
        crc64nvme=0xABC + number,
        modified_ns=BEGAN_NS,
        owner="o",
    )


def gain(first: float, number: int) -> ArrayUse:
    values = np.array([first, 1.0], np.float32)
    return ArrayUse(b"_kernels/flat/gain.npy", bytes([number]) * 16, number, values)


def lineage(inputs: int = 1) -> Lineage:
    """A chain of two kernels; parameters and array of either changed before frame 7."""
    geometry = FrameGeometry("<u2", (4, 6), 128, 48, None)
    epochs = (Epoch(0, 0), Epoch(7, 1))
    return Lineage(
        kernel=HITS,
        match="run/*",
        settings=(
            (StageSettings({}, {"gain": gain(2.0, 1)}), StageSettings({"low": 12, "cut": float("inf")})),
            (StageSettings({}, {"gain": gain(3.0, 2)}), StageSettings({"low": 13, "cut": 0.25})),
        ),
        inputs=tuple(Input(record(number), geometry, 10, epochs) for number in range(inputs)),
        started_ns=BEGAN_NS,
        ended_ns=BEGAN_NS + 1_000_000_000,
        before=(FLAT,),
        run=None if inputs == 1 else b"run/",
    )


def product(one: Lineage) -> h5py.File:
    findings = Findings({}, np.ones(10, np.uint8), FrameLedger(received=10, kept=10, stored=10), 0)
    return h5py.File(io.BytesIO(build(one, findings)))


def texts(dataset: h5py.Dataset) -> list[str]:
    return list(dataset.asstr()[:])


def test_everything_that_decided_the_result_is_in_the_product() -> None:
    with product(lineage()) as file:
        entry = file["entry"]
        process, before = entry["process"], entry["process_1"]
        assert (before["sequence_index"][()], process["sequence_index"][()]) == (1, 2)
        assert process["kernel/data"].asstr()[()] == SOURCE
        assert before["kernel/sha256"].asstr()[()] == FLAT.sha256
        assert process["parameters/low"][:].tolist() == [12, 13]
        assert process["parameters/low"].dtype == np.uint16
        assert texts(before["arrays/gain/location"]) == ["s3://scan42/_kernels/flat/gain.npy"] * 2
        for number, crc in enumerate(texts(before["arrays/gain/crc64nvme"])):
            assert before["arrays/gain/values"][crc][0] == 2.0 + number
        source = entry["source"]
        assert texts(source["location"]) == ["s3://scan42/run/a%FF0.raw"]
        assert texts(source["key"]) == ["run/a\\xff0.raw"]
        assert texts(source["crc64nvme"]) == ["0000000000000abc"]
        assert (texts(source["dtype"]), texts(source["shape"]), source["origin"][0]) == (["<u2"], ["4,6"], 128)
        assert source["epochs"][:].tolist() == [[0, 0, 0], [0, 7, 1]]
        environment = {name: value.asstr()[()] for name, value in process["environment"].items()}
        assert environment["device"] == "cpu"
        assert "unknown" not in environment.values()
        assert re.fullmatch(r"\d+\.\d+\.\d+", environment["llvm"])


def test_large_arrays_are_named_and_not_stored() -> None:
    use = ArrayUse(b"_kernels/flat/gain.npy", b"a" * 16, 5, np.ones(300_000, np.float32))
    one = lineage()
    settings = ((StageSettings({}, {"gain": use}), one.settings[0][1]),)
    inputs = (Input(record(), one.inputs[0].geometry, 10),)
    with product(dataclasses.replace(one, settings=settings, inputs=inputs)) as file:
        arrays = file["entry/process_1/arrays/gain"]
        assert texts(arrays["object_id"]) == [(b"a" * 16).hex()]
        assert list(arrays["values"]) == []


# -- PROV-JSON as its member submission defines it: https://www.w3.org/submissions/prov-json/

RELATIONS = {
    "wasGeneratedBy": {"prov:entity": "entity", "prov:activity": "activity"},
    "used": {"prov:activity": "activity", "prov:entity": "entity"},
    "wasDerivedFrom": {"prov:generatedEntity": "entity", "prov:usedEntity": "entity", "prov:activity": "activity"},
    "wasAssociatedWith": {"prov:activity": "activity", "prov:agent": "agent", "prov:plan": "entity"},
}
TIMES = {"prov:startTime", "prov:endTime", "prov:time"}
XSD = {"xsd:double": float, "xsd:long": int, "xsd:unsignedLong": int, "prov:QUALIFIED_NAME": str}


def checked(document: dict[str, Any]) -> dict[str, Any]:
    """Every statement is of a known kind, its names have declared prefixes, its references exist, its values are literals."""
    prefixes = set(document["prefix"]) | {"prov", "xsd"}
    assert set(document) <= {"prefix", "entity", "activity", "agent", *RELATIONS}

    def qualified(name: str) -> str:
        prefix, colon, local = name.partition(":")
        assert colon
        assert local
        assert prefix in prefixes, name
        return name

    def literal(value: Any) -> None:
        if isinstance(value, dict):
            assert set(value) == {"$", "type"}
            assert isinstance(value["$"], str)
            XSD[value["type"]](value["$"])
            if value["type"] == "prov:QUALIFIED_NAME":
                qualified(value["$"])
        else:
            assert isinstance(value, str | int | float | bool), value

    for kind in set(document) - {"prefix"}:
        references = RELATIONS.get(kind, {})
        for name, attributes in document[kind].items():
            assert name.startswith("_:") if kind in RELATIONS else qualified(name)
            for attribute, value in attributes.items():
                qualified(attribute)
                if attribute in references:
                    assert value in document[references[attribute]], f"{kind} names {value}, which is nowhere"
                elif attribute in TIMES:
                    datetime.datetime.fromisoformat(value)
                else:
                    literal(value)
    return document


@pytest.mark.parametrize("inputs", [1, 3, PROV_INPUTS_MAX + 1])
def test_prov_json_is_sound(inputs: int) -> None:
    with product(lineage(inputs)) as file:
        document = checked(json.loads(file["entry/provenance/data"].asstr()[()]))
    (activity,) = document["activity"]
    (made,) = document["wasGeneratedBy"].values()
    assert made["prov:activity"] == activity
    derived = [document["entity"][one["prov:usedEntity"]] for one in document["wasDerivedFrom"].values()]
    if inputs <= PROV_INPUTS_MAX:
        assert [one["hiss:crc64nvme"] for one in derived] == [f"{0xABC + n:016x}" for n in range(inputs)]
    else:
        assert [one["hiss:count"] for one in derived] == [inputs]
    plans = [document["entity"][one["prov:plan"]]["hiss:sha256"] for one in document["wasAssociatedWith"].values()]
    assert plans == [FLAT.sha256, HITS.sha256]
    lows = [one["param:low"]["$"] for one in document["entity"].values() if "param:low" in one]
    assert lows == ["12", "13"]


def test_reductions_of_the_same_are_the_same_activity_and_others_are_not() -> None:
    one, other = lineage(), lineage(2)
    assert prov_json(one) == prov_json(dataclasses.replace(one))
    assert set(prov_json(one)["activity"]).isdisjoint(prov_json(other)["activity"])
