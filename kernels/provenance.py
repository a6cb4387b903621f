"""Writing a product's lineage into its file: NXprocess groups, the table of inputs, and the same as PROV-JSON.

In: a ``Lineage`` and the file's /entry. Out:

    /entry/process            NXprocess of the kernel: program, version, date, sequence_index
    /entry/process_<i>        the same for each kernel of the chain before it (sequence_index i, from 1)
      kernel                  NXnote: the source, its file_name and sha256
      parameters/<name>       one value for each settings
      arrays/<name>           location, object_id, crc64nvme for each settings; values/<crc64nvme> where small
    /entry/process/environment  versions, processor, device
    /entry/source             one row an input: key, location, version_id, object_id, etag, crc64nvme, length, stored,
                              dtype, shape, origin, frames, frame_metadata (x-amz-meta-frame-*, JSON); bucket; run (prefix)
    /entry/source/epochs      rows of (input, first frame, settings): from that frame on these settings held
    /entry/provenance         NXnote: PROV-JSON (W3C member submission prov-json), PROV-DM terms

Attributes of PROV records are literals only, as its JSON schema asks. More than PROV_INPUTS_MAX inputs are one
prov:Collection there, whose members the table names.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import h5py
import msgspec
import numpy as np

from ingest.records import ObjectRecord
from kernels import nexus
from kernels.contract import Kernel
from kernels.lineage import ArrayUse, Input, Lineage, StageSettings, environment, location

ARRAY_VALUES_BYTES_MAX = 1 << 20
"""Larger parameter arrays are named by location and checksum only."""
PROV_INPUTS_MAX = 1000
PREFIXES = {"hiss": "urn:hiss:", "param": "urn:hiss:param:"}

_Record = dict[str, object]


def write(entry: h5py.Group, lineage: Lineage) -> None:
    """All of it, below ``entry``."""
    stages = lineage.stages
    for index, kernel in enumerate(stages):
        last = index == len(stages) - 1
        group = nexus.group(entry, "process" if last else f"process_{index + 1}", "NXprocess")
        _stage(group, kernel, lineage, index)
        if last:
            nexus.text(group["kernel"], "match", lineage.match)
            software = nexus.group(group, "environment", "NXcollection")
            for name, version in dataclasses.asdict(lineage.software or environment()).items():
                nexus.text(software, name, version)
            nexus.text(software, "device", lineage.device)
    _source(entry, lineage)
    document = msgspec.json.encode(prov_json(lineage), order="sorted").decode()
    nexus.note(entry, "provenance", "application/json", document)


def _stage(group: h5py.Group, kernel: Kernel, lineage: Lineage, index: int) -> None:
    nexus.text(group, "program", "hiss")
    nexus.text(group, "version", (lineage.software or environment()).hiss)
    nexus.text(group, "date", nexus.time_text(lineage.ended_ns))
    nexus.number(group, "sequence_index", index + 1)
    note = nexus.note(group, "kernel", "text/x-python", kernel.source)
    nexus.text(note, "file_name", kernel.file)
    nexus.text(note, "sha256", kernel.sha256)
    settings = [each[index] for each in lineage.settings]
    params = nexus.group(group, "parameters", "NXcollection")
    for spec in kernel.params:
        values = np.array([one.params[spec.name] for one in settings], spec.dtype)
        nexus.array(params, spec.name, values)
    arrays = nexus.group(group, "arrays", "NXcollection")
    for array in kernel.arrays:
        uses = [one.arrays[array.name] for one in settings if array.name in one.arrays]
        _array_uses(nexus.group(arrays, array.name, "NXcollection"), lineage.bucket, uses)


def _array_uses(group: h5py.Group, bucket: str, uses: list[ArrayUse]) -> None:
    nexus.texts(group, "location", [location(bucket, use.key) for use in uses])
    nexus.words(group, "object_id", [use.object_id.hex() for use in uses])
    nexus.words(group, "crc64nvme", [f"{use.crc64nvme:016x}" for use in uses])
    values = nexus.group(group, "values", "NXcollection")
    for use in uses:
        name = f"{use.crc64nvme:016x}"
        if 0 < use.values.nbytes <= ARRAY_VALUES_BYTES_MAX and name not in values:
            nexus.array(values, name, use.values)


def _source(entry: h5py.Group, lineage: Lineage) -> None:
    inputs = lineage.inputs
    records = [one.record for one in inputs]
    group = nexus.group(entry, "source", "NXcollection")
    nexus.text(group, "bucket", lineage.bucket)
    if lineage.run is not None:
        nexus.text(group, "run", lineage.subject)
    nexus.texts(group, "key", [nexus.key_text(record.key) for record in records])
    nexus.texts(group, "location", [location(record.bucket, record.key) for record in records])
    nexus.texts(group, "version_id", [record.version_id for record in records])
    nexus.words(group, "object_id", [record.object_id.hex() for record in records])
    nexus.texts(group, "etag", [record.etag for record in records])
    nexus.words(group, "crc64nvme", [f"{record.crc64nvme:016x}" for record in records])
    nexus.words(group, "stored", [nexus.time_text(record.modified_ns) for record in records])
    length = nexus.array(group, "length", np.array([record.length for record in records], np.int64))
    nexus.attribute(length, "units", "bytes")
    nexus.words(group, "dtype", [one.geometry.dtype if one.geometry else "" for one in inputs])
    nexus.words(group, "shape", [_shape_text(one) for one in inputs])
    nexus.texts(group, "frame_metadata", [_frame_metadata(record) for record in records])
    origins = [one.geometry.origin if one.geometry else 0 for one in inputs]
    nexus.attribute(nexus.array(group, "origin", np.array(origins, np.int64)), "units", "bytes")
    nexus.texts(group, "layout", [one.layout for one in inputs])
    nexus.array(group, "frames", np.array([one.frames for one in inputs], np.int64))
    rows = [(number, epoch.first_frame, epoch.settings) for number, one in enumerate(inputs) for epoch in one.epochs]
    epochs = nexus.array(group, "epochs", np.array(rows, np.int64).reshape(-1, 3))
    nexus.attribute(epochs, "columns", "input, first frame, settings")


def _frame_metadata(record: ObjectRecord) -> str:
    """What the submitter said of the frames: without it raw bytes say nothing."""
    said = {name: value for name, value in record.metadata.items() if name.startswith("frame-")}
    return msgspec.json.encode(said, order="sorted").decode()


def _shape_text(one: Input) -> str:
    return ",".join(map(str, one.geometry.shape)) if one.geometry else ""


# -- PROV-JSON: https://www.w3.org/submissions/prov-json/


def prov_json(lineage: Lineage) -> dict[str, dict[str, object]]:
    """The product was generated by a reduction, which used the inputs, the settings and the arrays, carried out by this
    software according to the kernels."""
    document: dict[str, dict[str, object]] = {"prefix": dict(PREFIXES)}
    activity = f"hiss:reduction/{_identity(lineage)}"
    product = f"hiss:product/{_identity(lineage)}"
    agent = f"hiss:software/{(lineage.software or environment()).hiss}"

    def say(kind: str, name: str, record: _Record) -> None:
        document.setdefault(kind, {})[name] = record

    def relate(kind: str, record: _Record) -> None:
        known = document.setdefault(kind, {})
        known[f"_:{kind}{len(known) + 1}"] = record

    say("activity", activity, _activity(lineage))
    say("agent", agent, {"prov:type": _name("prov:SoftwareAgent"), **_software(lineage)})
    say("entity", product, {"prov:type": _name("hiss:Product"), "hiss:of": lineage.subject})
    relate("wasGeneratedBy", {"prov:entity": product, "prov:activity": activity, **_at(lineage.ended_ns)})
    for plan, record in _plans(lineage):
        say("entity", plan, record)
        relate("wasAssociatedWith", {"prov:activity": activity, "prov:agent": agent, "prov:plan": plan})
    for used, record in _inputs(lineage):
        say("entity", used, record)
        relate("used", {"prov:activity": activity, "prov:entity": used})
        relate("wasDerivedFrom", {"prov:generatedEntity": product, "prov:usedEntity": used, "prov:activity": activity})
    for used, record in _settings(lineage):
        say("entity", used, record)
        relate("used", {"prov:activity": activity, "prov:entity": used})
    return document


def _activity(lineage: Lineage) -> _Record:
    return {
        "prov:startTime": nexus.time_text(lineage.started_ns),
        "prov:endTime": nexus.time_text(lineage.ended_ns),
        "hiss:frames": sum(one.frames for one in lineage.inputs),
        "hiss:device": lineage.device,
    }


def _software(lineage: Lineage) -> _Record:
    used = lineage.software or environment()
    return {f"hiss:{name}": version for name, version in dataclasses.asdict(used).items()}


def _plans(lineage: Lineage) -> Iterator[tuple[str, _Record]]:
    for index, kernel in enumerate(lineage.stages):
        yield (
            f"hiss:kernel/{kernel.sha256}",
            {
                "prov:type": _name("prov:Plan"),
                "prov:label": kernel.file,
                "hiss:sha256": kernel.sha256,
                "hiss:stage": index + 1,
            },
        )


def _inputs(lineage: Lineage) -> Iterator[tuple[str, _Record]]:
    if len(lineage.inputs) > PROV_INPUTS_MAX:
        digest = hashlib.sha256(b"".join(one.record.object_id for one in lineage.inputs)).hexdigest()
        members = {"hiss:members": "/entry/source", "hiss:count": len(lineage.inputs)}
        yield (
            f"hiss:inputs/{digest[:32]}",
            {"prov:type": _name("prov:Collection"), "prov:location": lineage.subject, **members},
        )
        return
    for one in lineage.inputs:
        record = one.record
        yield (
            f"hiss:object/{record.object_id.hex()}",
            {
                "prov:location": location(record.bucket, record.key),
                "hiss:version_id": record.version_id,
                "hiss:etag": record.etag,
                "hiss:crc64nvme": f"{record.crc64nvme:016x}",
                "hiss:length_bytes": record.length,
                "hiss:frames": one.frames,
            },
        )


def _settings(lineage: Lineage) -> Iterator[tuple[str, _Record]]:
    """Parameters of every stage and epoch, and each array version once."""
    arrays: dict[str, _Record] = {}
    for number, settings in enumerate(lineage.settings):
        for stage, (kernel, one) in enumerate(zip(lineage.stages, settings, strict=True), 1):
            values = {f"param:{name}": _literal(kernel, name, value) for name, value in one.params.items()}
            name = f"hiss:settings/{_identity(lineage)}/{number}/{stage}"
            yield name, {"prov:type": _name("hiss:Settings"), "hiss:kernel_sha256": kernel.sha256, **values}
            arrays.update(_array_entities(lineage.bucket, one))
    yield from arrays.items()


def _array_entities(bucket: str, settings: StageSettings) -> Iterator[tuple[str, _Record]]:
    for use in settings.arrays.values():
        yield (
            f"hiss:object/{use.object_id.hex()}",
            {"prov:location": location(bucket, use.key), "hiss:crc64nvme": f"{use.crc64nvme:016x}"},
        )


def _literal(kernel: Kernel, name: str, value: int | float) -> object:
    """A typed literal: JSON numbers do not say integer or float, and know neither infinity nor NaN."""
    dtype = next(spec.dtype for spec in kernel.params if spec.name == name)
    if np.dtype(dtype).kind == "f":
        return {"$": {"inf": "INF", "-inf": "-INF", "nan": "NaN"}.get(repr(value), repr(value)), "type": "xsd:double"}
    return {"$": str(value), "type": "xsd:unsignedLong" if np.dtype(dtype).kind == "u" else "xsd:long"}


def _name(qualified: str) -> _Record:
    return {"$": qualified, "type": "prov:QUALIFIED_NAME"}


def _at(time_ns: int) -> _Record:
    return {"prov:time": nexus.time_text(time_ns)}


def _identity(lineage: Lineage) -> str:
    """Of one reduction: the same inputs by the same kernel have the same."""
    if lineage.run is None:
        return f"{lineage.inputs[0].record.object_id.hex()}/{lineage.kernel.name}"
    of_run = hashlib.sha256(f"{lineage.subject}\0{lineage.kernel.name}".encode()).hexdigest()
    return f"{of_run[:32]}/{lineage.kernel.name}"
