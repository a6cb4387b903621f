"""What the metadata of a kernel's object say: over which keys it runs, with what parameters, after which kernel.

A kernel is attached by putting it at ``_kernels/NAME.py``; its own object metadata says the rest: ``match`` (glob over
keys, ``*`` crosses ``/``; default all), ``params`` (JSON object of numbers), ``raw`` (``all``, ``kept``, ``none``), ``device``
(``cpu``, ``fpga``), ``after`` (the kernel whose ``out`` is its frame). In: an admitted kernel, its metadata, the arrays that are
there. Out: an ``Attachment``, or KernelRefused for what can never be. What only is not there yet makes an attachment that
waits: ``owed`` says for what.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from ingest.ports import KernelRefused
from ingest.records import FrameGeometry, KernelEpoch, StageUse
from ingest.runs import is_marker
from kernels.contract import Kernel, Stage, chain_geometries, resolve_arrays, resolve_params
from kernels.formats import declared_geometry
from kernels.lineage import ArrayUse, StageSettings

KERNEL_PREFIX = b"_kernels/"
PRODUCT_PREFIX = b"_products/"
MATCH_BYTES_MAX = 1024
PARAMS_BYTES_MAX = 8192
CHAIN_MAX = 4
"""Kernels of one chain."""
RAW = ("all", "kept", "none")
DEVICES = ("cpu", "fpga")

_NAME = re.compile(rb"_kernels/([A-Za-z_][A-Za-z0-9_-]{0,63})\.py\Z")


def is_internal(key: bytes) -> bool:
    """Kernels, products and the markers of runs are never kernel input."""
    return key.startswith((KERNEL_PREFIX, PRODUCT_PREFIX)) or is_marker(key)


def kernel_name(key: bytes) -> str | None:
    """``hits`` of ``_kernels/hits.py``; None for any other key."""
    found = _NAME.match(key)
    return found[1].decode("ascii") if found else None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attachment:
    """A kernel as attached to a bucket. ``params`` has a value for every parameter it declares."""

    kernel: Kernel
    match: str
    params: Mapping[str, int | float]
    pattern: re.Pattern[str]
    raw: str = "all"
    """What of the raw data remains: all, kept (what it keeps) or none."""
    after: str = ""
    """Name of the kernel before it in a chain."""
    device: str = "cpu"
    """cpu, or fpga: run by the model of the core and compared with the cpu (kernels/offload)."""
    arrays: Mapping[str, ArrayUse] = dataclasses.field(default_factory=dict)
    before: tuple[Attachment, ...] = ()
    """The chain before it, first to last."""
    frames: tuple[str, tuple[int, ...]] | None = None
    """(dtype, shape) of the frames that its metadata say it is for."""
    submitted_ns: int = 0
    """When its object was put."""
    owed: str = ""
    """Why it cannot run yet, fit for the scientist; empty when it can."""

    @property
    def name(self) -> str:
        return self.kernel.name

    def matches(self, key: bytes) -> bool:
        return self.pattern.match(key.decode("utf-8", "surrogateescape")) is not None

    @property
    def stages(self) -> tuple[Attachment, ...]:
        """The chain with the kernel itself as the last."""
        return (*self.before, self)

    @property
    def sources(self) -> tuple[str, ...]:
        """SHA-256 of the chain's sources: what a running stream never changes."""
        return tuple(stage.kernel.sha256 for stage in self.stages)

    @property
    def uses(self) -> tuple[StageUse, ...]:
        """Sources and settings of the chain, as they are recorded."""
        return tuple(
            StageUse(
                stage.name,
                stage.kernel.sha256,
                dict(stage.params),
                {name: use.crc64nvme for name, use in stage.arrays.items()},
            )
            for stage in self.stages
        )

    @property
    def settings(self) -> tuple[StageSettings, ...]:
        return tuple(StageSettings(stage.params, stage.arrays) for stage in self.stages)


def attach(kernel: Kernel, metadata: Mapping[str, str]) -> Attachment:
    """Read the kernel object's metadata (lower-case names, no ``x-amz-meta-``). KernelRefused for what cannot be."""

    def refuse(reason: str) -> KernelRefused:
        return KernelRefused(kernel.file, 1, reason)

    match = metadata.get("match", "*")
    if not 0 < len(match.encode()) <= MATCH_BYTES_MAX:
        raise refuse(f"x-amz-meta-match: a glob of 1 to {MATCH_BYTES_MAX} bytes")
    raw = metadata.get("raw", "all")
    if raw not in RAW:
        raise refuse(f"x-amz-meta-raw: {raw!r:.40} is not one of {', '.join(RAW)}")
    device = metadata.get("device", "cpu")
    if device not in DEVICES:
        raise refuse(f"x-amz-meta-device: {device!r:.40} is not one of {', '.join(DEVICES)}")
    after = metadata.get("after", "")
    if after and device != "cpu":
        raise refuse(f"x-amz-meta-device: a kernel that comes after another runs on the cpu, not on {device}")
    if after and kernel_name(f"_kernels/{after}.py".encode()) is None:
        raise refuse(f"x-amz-meta-after: {after!r:.80} is not a kernel's name; give it without .py")
    params = metadata.get("params", "{}")
    if len(params) > PARAMS_BYTES_MAX:
        raise refuse(f"x-amz-meta-params: more than {PARAMS_BYTES_MAX} bytes")
    try:
        given = msgspec.json.decode(params.encode(), type=dict[str, int | float])
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise refuse(f'x-amz-meta-params: a JSON object of numbers, e.g. {{"low": 12}} ({error})') from None
    try:
        declared = declared_geometry(metadata)
    except ValueError as error:
        raise refuse(str(error)) from None
    frames = None if declared is None else (np.dtype(declared.dtype).name, declared.shape)
    return Attachment(
        kernel, match, resolve_params(kernel, given), pattern_of(metadata), raw, after, device, frames=frames
    )


def device_for(attachment: Attachment, *, encoded: bool) -> Attachment:
    """An offloaded kernel takes pixels: frames that lie compressed or scattered in their file are reduced on the cpu."""
    return dataclasses.replace(attachment, device="cpu") if encoded and attachment.device != "cpu" else attachment


def pattern_of(metadata: Mapping[str, str]) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(metadata.get("match", "*")))


def with_arrays(attachment: Attachment, arrays: Mapping[str, ArrayUse], bad: Mapping[str, str]) -> Attachment:
    """With those of ``arrays`` that the kernel declares. ``bad``: why others could not be read, by name."""
    owed = ""
    for spec in attachment.kernel.arrays:
        file = f"_kernels/{attachment.name}/{spec.name}.npy"
        if spec.name in bad:
            owed = owed or f"{file}: {bad[spec.name]}"
        elif spec.name not in arrays:
            owed = owed or f"{file} is missing"
    declared = {spec.name: arrays[spec.name] for spec in attachment.kernel.arrays if spec.name in arrays}
    return dataclasses.replace(attachment, arrays=declared, owed=owed)


def misfit(attachment: Attachment, geometry: FrameGeometry) -> str:
    """Why the arrays of the chain do not fit such frames; empty when they do."""
    stages = attachment.stages
    frame = (np.dtype(geometry.dtype).name, geometry.shape)
    for stage, (_, shape) in zip(stages, chain_geometries([one.kernel for one in stages], frame), strict=True):
        try:
            resolve_arrays(stage.kernel, {name: use.values for name, use in stage.arrays.items()}, shape)
        except KernelRefused as refusal:
            return refusal.reason
    return ""


def stages_of(attachment: Attachment) -> list[Stage]:
    """What a sandbox is started with."""
    return [
        Stage(stage.kernel, stage.params, {name: use.values for name, use in stage.arrays.items()})
        for stage in attachment.stages
    ]


def epochs_of(attachment: Attachment, epochs: Sequence[KernelEpoch]) -> list[tuple[int, Attachment]]:
    """The settings with which a stored version's frames are judged, as (first frame, settings): those of the time when
    they arrived, if the sources and the arrays are still the same; else those of now, for all of them."""
    then = []
    for epoch in epochs:
        if epoch.kernel != attachment.name:
            continue
        same = [(use.kernel, use.sha256, use.arrays) for use in epoch.stages] == [
            (use.kernel, use.sha256, use.arrays) for use in attachment.uses
        ]
        if not same:
            return [(0, attachment)]
        *before, last = (
            dataclasses.replace(stage, params=dict(use.params))
            for stage, use in zip(attachment.stages, epoch.stages, strict=True)
        )
        then.append((epoch.first_frame, dataclasses.replace(last, before=tuple(before))))
    return then or [(0, attachment)]


def chained(attachment: Attachment, others: Mapping[str, Attachment]) -> Attachment:
    """With the chain before it, of ``others`` by name. Raises KernelRefused for a circle, or a chain that is too long; where
    a kernel of it is not there, the attachment waits."""
    before: list[Attachment] = []
    names = [attachment.name]
    owed = attachment.owed
    after = attachment.after
    while after:
        if after in names:
            circle = " after ".join((*names, after))
            raise KernelRefused(attachment.kernel.file, 1, f"x-amz-meta-after: {circle} is a circle")
        names.append(after)
        if len(names) > CHAIN_MAX:
            raise KernelRefused(
                attachment.kernel.file,
                1,
                f"x-amz-meta-after: {' after '.join(names)}: at most {CHAIN_MAX} kernels in a chain",
            )
        found = others.get(after)
        if found is None:
            owed = owed or f"_kernels/{after}.py, whose out is its frame, is missing or does not run"
            break
        owed = owed or found.owed
        before.insert(0, found)
        after = found.after
    return dataclasses.replace(attachment, before=tuple(before), owed=owed)
