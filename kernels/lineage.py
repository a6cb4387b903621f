"""Where a product comes from: values only. kernels/provenance.py writes them down, kernels/recorded.py reads them back.

A product has one or more ``Input``s (object versions; a run has many), went through the stages of a chain (the kernel
itself comes last), and each stage had ``Settings``: one for each parameter epoch. An input says from which of its frames
on which settings held. So everything that decided the result is here, or is named with a checksum.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from urllib.parse import quote_from_bytes

import numpy as np
import numpy.typing as npt

from ingest.records import FrameGeometry, ObjectRecord
from kernels.contract import Kernel

_LLVM_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayUse:
    """A parameter array as it was used: the version of ``_kernels/<kernel>/<name>.npy``, and what was in it."""

    key: bytes
    object_id: bytes
    crc64nvme: int
    """Of the .npy file."""
    values: npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True, slots=True)
class StageSettings:
    """One stage's parameters during one epoch: a value for everything its kernel declares."""

    params: Mapping[str, int | float]
    arrays: Mapping[str, ArrayUse] = dataclasses.field(default_factory=dict)


Settings = tuple[StageSettings, ...]
"""Of every stage of the chain, in order; the product's own kernel is the last."""


@dataclasses.dataclass(frozen=True, slots=True)
class Epoch:
    """From ``first_frame`` of an input on, settings number ``settings`` of the lineage held."""

    first_frame: int
    settings: int


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One object version. ``frames``: how many it had for the kernel."""

    record: ObjectRecord
    geometry: FrameGeometry | None
    frames: int
    epochs: tuple[Epoch, ...] = (Epoch(0, 0),)
    layout: str = ""
    """Where in the object the frames were and how they were stored, if they did not lie there plainly."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lineage:
    """Times are nanoseconds since the epoch. ``inputs`` lie in one bucket, in the order in which their frames count."""

    kernel: Kernel
    match: str
    settings: tuple[Settings, ...]
    inputs: tuple[Input, ...]
    started_ns: int
    ended_ns: int
    before: tuple[Kernel, ...] = ()
    """The kernels of the chain before this one, first to last."""
    run: bytes | None = None
    """The key prefix, for the product of a run."""
    device: str = "cpu"
    software: Environment | None = None
    """What it was computed with, where that was not here."""

    @property
    def stages(self) -> tuple[Kernel, ...]:
        return (*self.before, self.kernel)

    @property
    def bucket(self) -> str:
        return self.inputs[0].record.bucket

    @property
    def subject(self) -> str:
        """What was reduced, as an S3 location: an object or a run."""
        return location(self.bucket, self.inputs[0].record.key if self.run is None else self.run)


def location(bucket: str, key: bytes) -> str:
    """``s3://bucket/key``, percent-encoded: exact also for keys that are no text."""
    return f"s3://{bucket}/{quote_from_bytes(key, safe='/-_.~')}"


# -- what it ran on


@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """What decides the bits of a result beside source, settings and frames."""

    hiss: str
    python: str
    numpy: str
    numba: str
    llvmlite: str
    llvm: str
    cpu: str
    cpu_target: str
    """The processor as LLVM calls it: what machine code was made for."""


@functools.cache
def environment() -> Environment:
    """Of this node. The first call takes a moment: LLVM is asked in a process of its own, so that it is not loaded here."""
    llvm, _, target = _llvm().partition(" ")
    return Environment(
        hiss=_version("hiss-gateway"),
        python=platform.python_version(),
        numpy=_version("numpy"),
        numba=_version("numba"),
        llvmlite=_version("llvmlite"),
        llvm=llvm,
        cpu=_cpu_model(),
        cpu_target=target,
    )


_ASK_LLVM = """
import llvmlite.binding as b
print(".".join(map(str, b.llvm_version_info)), b.get_host_cpu_name())
"""


def _llvm() -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _ASK_LLVM], capture_output=True, text=True, timeout=_LLVM_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown unknown"
    return done.stdout.strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()
