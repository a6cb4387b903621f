"""What a kernel is once admitted: its parameters, arrays, state, verdicts, and how partial states merge.

In: the declarations that the gate (kernels/gate.py) read from a kernel's source. Out: plain frozen values that the
sandbox, the host and the products share, and ``merge``, the trusted half of a reduction. Nothing here compiles or runs
a kernel's code; the names and dtypes in these values have passed the gate's limits.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ingest.ports import KernelRefused

DROP = 0
KEEP = 1
REPLACE = 2
STOP = 3
VERDICTS = {"DROP": DROP, "KEEP": KEEP, "REPLACE": REPLACE, "STOP": STOP}
"""What ``frame()`` may return. KEEP is 1, so that returning a comparison keeps the frames for which it holds. REPLACE keeps
``out`` in the frame's place; STOP keeps this frame and says that the rest of the stream is of no use."""

ARGUMENTS = ("frame", "params", "state", "index", "out", "feedback")
"""Positional arguments of ``frame()``, in order."""
FINISH_ARGUMENTS = ("state", "params")
"""Those of ``finish()``."""

INTEGER_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOAT_DTYPES = ("float32", "float64")
DTYPES = INTEGER_DTYPES + FLOAT_DTYPES
"""dtypes of frames, parameters, state, ``out`` and rows; all little-endian as the machine."""

MERGES = ("sum", "min", "max", "or")

MAX_FRAME_NDIM = 4
MAX_STATE_ARRAYS = 32
MAX_STATE_NDIM = 4
MAX_STATE_BYTES = 64 << 20
"""All state arrays of one slot together; room for a summed image of 8 megapixels in int64."""
MAX_PARAMS = 64
MAX_ARRAY_BYTES = 256 << 20
"""All parameter arrays of one kernel together: a 16-megapixel mask, flat field and bin table."""
MAX_ROW_FIELDS = 32
MAX_ROWS = 4096
"""Most rows one frame may append."""
DEFAULT_ROWS = 256
"""Rows a frame may append where the kernel does not say (``ROWS_MAX``)."""
FRAME = "frame"
"""In place of an array parameter's shape: the shape of one frame, whatever it is."""
SAME = "same"
"""In place of the dtype or shape of ``OUT``: that of the frame."""
FRAME_COLUMN = "frame"
"""First column of every table of rows: the frame's index."""
MAX_OUT_BYTES = 256 << 20
"""One transformed frame."""


@dataclasses.dataclass(frozen=True, slots=True)
class StateSpec:
    """One array of ``STATE``; it starts at, and resets to, the identity of ``merge``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    merge: str
    """One of MERGES."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def identity(self) -> int | float:
        """The value that merging leaves unchanged: sum 0, or 0, min the dtype's largest, max its smallest."""
        if self.merge in ("sum", "or"):
            return 0
        dtype = np.dtype(self.dtype)
        if dtype.kind == "f":
            return math.inf if self.merge == "min" else -math.inf
        bounds = np.iinfo(dtype)
        return int(bounds.max) if self.merge == "min" else int(bounds.min)


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """One scalar of ``PARAMS``."""

    name: str
    dtype: str
    default: int | float


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpec:
    """One named read-only array of ``PARAMS``, uploaded as ``_kernels/<kernel>/<name>.npy``.

    ``shape`` None: as a frame. A size of -1 in it: any size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class OutSpec:
    """The transformed frame, ``OUT``. None stands for "same": the dtype, or the shape, of the incoming frame."""

    dtype: str | None
    shape: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class RowsSpec:
    """What ``append(feedback, value, …)`` appends, ``ROWS`` and ``ROWS_MAX``: one value for each field, in order."""

    fields: tuple[tuple[str, str], ...]
    """(name, dtype); a column ``frame`` (int64, the frame's index) comes before them in every table."""
    most: int
    """Rows one frame may append; further ones are counted and not kept."""

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Of one row, packed."""
        return np.dtype([(FRAME_COLUMN, "<i8"), *((name, np.dtype(dtype).str) for name, dtype in self.fields)])


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """An admitted kernel. ``name`` has no suffix; ``sha256`` is the hex digest of the submitted bytes."""

    name: str
    source: str
    sha256: str
    params: tuple[ParamSpec, ...]
    state: tuple[StateSpec, ...]
    arrays: tuple[ArraySpec, ...] = ()
    out: OutSpec | None = None
    rows: RowsSpec | None = None
    ordered: bool = False
    """One sandbox sees the frames of a version, and the versions of a run, in sequence."""
    has_finish: bool = False
    """There is ``finish(state, params)``: it works on a copy of the merged state, which becomes the product's result."""

    @property
    def file(self) -> str:
        """The name that messages to the scientist carry."""
        return f"{self.name}.py"

    @property
    def params_line(self) -> int:
        """Where PARAMS is declared, 1-based, to point to when what is given does not fit it; 1 without."""
        lines = enumerate(self.source.splitlines(), 1)
        return next((number for number, line in lines if re.match(r"PARAMS\s*=", line)), 1)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One kernel of a chain with what it is given; see resolve_params and resolve_arrays."""

    kernel: Kernel
    params: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[np.generic]] = dataclasses.field(default_factory=dict)


Geometry = tuple[str, tuple[int, ...]]
"""dtype and shape of one frame."""


def out_geometry(kernel: Kernel, frame: Geometry) -> Geometry | None:
    """Of ``out``, for such frames; None where the kernel has none."""
    if kernel.out is None:
        return None
    dtype, shape = frame
    return kernel.out.dtype or np.dtype(dtype).name, kernel.out.shape or shape


def chain_geometries(kernels: Sequence[Kernel], frame: Geometry) -> list[Geometry]:
    """What each kernel of a chain gets as its frame: the ``out`` of the one before, where that has one."""
    geometries = [frame]
    for kernel in kernels[:-1]:
        geometries.append(out_geometry(kernel, geometries[-1]) or geometries[-1])
    return geometries


def fits(dtype: str, value: object) -> bool:
    """Whether a number can be stored in ``dtype`` without changing its meaning (floats may round, never overflow)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if dtype in FLOAT_DTYPES:
        try:
            return not math.isfinite(value) or abs(value) <= float(np.finfo(dtype).max)
        except OverflowError:
            return False
    if isinstance(value, float):
        return False
    bounds = np.iinfo(dtype)
    return int(bounds.min) <= value <= int(bounds.max)


def resolve_params(kernel: Kernel, given: Mapping[str, int | float]) -> dict[str, int | float]:
    """The value of every parameter: what is given over what the kernel declares. Raises KernelRefused."""
    specs = {spec.name: spec for spec in kernel.params}
    values = {spec.name: spec.default for spec in kernel.params}
    for name, value in given.items():
        spec = specs.get(name)
        if spec is None:
            declared = ", ".join(specs) or "none"
            raise KernelRefused(
                kernel.file, kernel.params_line, f"parameter {name!r} is not in PARAMS (declared: {declared})"
            )
        if not fits(spec.dtype, value):
            raise KernelRefused(
                kernel.file, kernel.params_line, f"parameter {name!r}: {value!r} is not a value of {spec.dtype}"
            )
        values[name] = value
    return values


def resolve_arrays(
    kernel: Kernel, given: Mapping[str, npt.NDArray[np.generic]], shape: tuple[int, ...]
) -> dict[str, npt.NDArray[np.generic]]:
    """Every array parameter as the kernel declares it, C-ordered; ``shape`` is that of a frame. Raises KernelRefused.

    An array is taken when its dtype converts to the declared one without any loss (numpy's "safe" casting: uint8 to
    uint16, bool to uint8, float32 to float64, any byte order) and its shape fits.
    """
    specs = {spec.name: spec for spec in kernel.arrays}
    for name in given:
        if name not in specs:
            declared = ", ".join(specs) or "none"
            raise KernelRefused(
                kernel.file, kernel.params_line, f"array {name!r} is not in PARAMS (arrays declared: {declared})"
            )
    resolved = {name: _fitted(kernel, spec, given.get(name), shape) for name, spec in specs.items()}
    if sum(array.nbytes for array in resolved.values()) > MAX_ARRAY_BYTES:
        raise KernelRefused(
            kernel.file, kernel.params_line, f"the arrays of PARAMS need more than {MAX_ARRAY_BYTES >> 20} MiB"
        )
    return resolved


def _fitted(
    kernel: Kernel, spec: ArraySpec, array: npt.NDArray[np.generic] | None, frame_shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    if array is None:
        raise KernelRefused(
            kernel.file,
            kernel.params_line,
            f"array {spec.name!r} is missing: upload it as _kernels/{kernel.name}/{spec.name}.npy",
        )
    wanted = frame_shape if spec.shape is None else spec.shape
    fitting = len(wanted) == array.ndim and all(w in (-1, s) for w, s in zip(wanted, array.shape, strict=True))
    if not fitting or array.size == 0:
        declared = f"{FRAME!r}, here {frame_shape}" if spec.shape is None else f"{spec.shape}"
        raise KernelRefused(
            kernel.file,
            kernel.params_line,
            f"array {spec.name!r} has shape {array.shape}, PARAMS declares {declared} (-1: any size)",
        )
    if not np.can_cast(array.dtype, spec.dtype, "safe"):
        raise KernelRefused(
            kernel.file,
            kernel.params_line,
            f"array {spec.name!r} is {array.dtype}, PARAMS declares {spec.dtype}: upload it as {spec.dtype}, or as a dtype "
            "that converts to it without loss",
        )
    return np.ascontiguousarray(array, np.dtype(spec.dtype))


def merge(spec: StateSpec, into: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> None:
    """Fold a partial state into another, in place. Exact for integers, min, max and or; float sums depend on order.

    Raises ValueError when either array does not have the shape and dtype of ``spec``.
    """
    for array in (into, other):
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise ValueError(f"state {spec.name!r} is {spec.dtype}{spec.shape}, not {array.dtype}{array.shape}")
    operation = {"sum": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or}[spec.merge]
    operation(into, other, out=into)
