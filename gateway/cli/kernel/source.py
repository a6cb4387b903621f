"""Kernel files on the user's side: found, admitted by the gate, with parameters and arrays as given on the command line.

In: FILE or the name of a shipped kernel, ``--params``, ``--array``. Out: ``Given``; a refusal is ``Refused``: a ``CliError``
whose message is ``file:line: reason`` and the line itself with a mark below it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.cli.output import CliError, print_json
from ingest.ports import KernelRefused

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kernels.contract import ArraySpec, Kernel

SOURCE_BYTES_MAX = 1 << 20
ARRAYS_MAX = 64
_MESSAGE = re.compile(r"(?P<file>[^:\s]+\.py):(?P<line>[0-9]+): (?P<reason>.+)", re.DOTALL)

Number = int | float


class Refused(CliError):
    """The kernel does not pass. ``line`` is 1-based."""

    def __init__(self, file: str, line: int, reason: str, source: str) -> None:
        super().__init__(f"{file}:{line}: {reason}\n{marked(source, line)}".rstrip())
        self.file = file
        self.line = line
        self.reason = reason

    @classmethod
    def of(cls, refusal: KernelRefused, source: str) -> Refused:
        return cls(refusal.file, refusal.line, refusal.reason, source)

    @classmethod
    def of_message(cls, message: str, source: str) -> Refused | None:
        """From a node's answer; None when it is of another form."""
        found = _MESSAGE.search(message)
        return cls(found["file"], int(found["line"]), found["reason"], source) if found else None

    def print_json(self) -> None:
        print_json({"refused": {"file": self.file, "line": self.line, "reason": self.reason}})


def marked(source: str, line: int) -> str:
    """The line with its number, and a mark below where its code begins."""
    lines = source.splitlines()
    if not 1 <= line <= len(lines):
        return ""
    text = lines[line - 1].expandtabs(4)[:160]
    number = f"{line:5} | "
    return f"{number}{text}\n{' ' * (len(number) - 2)}| {' ' * (len(text) - len(text.lstrip()))}^"


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """A kernel that passed the gate. ``bytes`` as in the file."""

    kernel: Kernel
    bytes: bytes

    @property
    def text(self) -> str:
        return self.bytes.decode("utf-8", "replace")


def load(what: str, name: str = "", constants: Sequence[str] = ()) -> Given:
    """FILE, or a name of the shipped library with some of the constants at its top changed. Raises CliError, Refused."""
    from kernels import library

    path = Path(what)
    if path.is_file():
        if constants:
            raise CliError(f"{path}: --constant is for shipped kernels; change the line in the file")
        if path.stat().st_size > SOURCE_BYTES_MAX:
            raise CliError(f"{path} is larger than the {SOURCE_BYTES_MAX} bytes of a kernel")
        return admitted(name or path.stem, path.read_bytes())
    if what not in library.names():
        raise CliError(f"{what}: neither a file nor a shipped kernel; shipped are: {', '.join(library.names())}")
    try:
        return admitted(name or what, library.source(what, **parse_assignments(constants)))
    except KeyError as error:
        raise CliError(f"--constant: {error.args[0]}") from None


def admitted(name: str, source: bytes) -> Given:
    """Through the gate, and given the name it is to have. Raises Refused."""
    from kernels.attach import kernel_name
    from kernels.gate import admit

    if kernel_name(f"_kernels/{name}.py".encode()) is None:
        raise CliError(f"{name!r} is no kernel name: a letter, then letters, digits, _ or - (give one with --name)")
    try:
        return Given(admit(name, source), source)
    except KernelRefused as refusal:
        raise Refused.of(refusal, source.decode("utf-8", "replace")) from None


# -- parameters


def parse_params(text: str) -> dict[str, Number]:
    """``--params``: a JSON object of numbers."""
    try:
        values = json.loads(text) if text else {}
    except ValueError as error:
        raise CliError(f'--params: not JSON ({error}); write it as {{"low": 12}}') from None
    if not isinstance(values, dict) or any(
        isinstance(v, bool) or not isinstance(v, int | float) for v in values.values()
    ):
        raise CliError('--params: a JSON object of numbers, such as {"low": 12}')
    return values


def parse_assignments(pairs: Sequence[str]) -> dict[str, Number]:
    """``name=value …``; whole numbers also as 0x10."""
    values: dict[str, Number] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise CliError(f"{pair!r}: write it as NAME=VALUE")
        try:
            values[name] = int(text, 0)
        except ValueError:
            try:
                values[name] = float(text)
            except ValueError:
                raise CliError(f"{pair!r}: {text!r} is no number") from None
    return values


def params_text(values: dict[str, Number]) -> str:
    """As metadata. JSON has no infinity: it would not come back."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise CliError(f"parameter {name}: {value} cannot be submitted, JSON has no such number")
    return json.dumps(values)


# -- arrays


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayFile:
    """``values`` is a mapping of the file, read-only."""

    name: str
    file: Path
    values: npt.NDArray[np.generic]


def parse_arrays(kernel: Kernel, pairs: Sequence[str]) -> list[ArrayFile]:
    """``--array name=file.npy``, each a plain .npy that fits what the kernel declares. Raises CliError."""
    import numpy as np

    if len(pairs) > ARRAYS_MAX:
        raise CliError(f"at most {ARRAYS_MAX} arrays")
    specs = {spec.name: spec for spec in kernel.arrays}
    found: dict[str, ArrayFile] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise CliError(f"--array {pair}: write it as NAME=FILE.npy")
        spec = specs.get(name)
        if spec is None:
            raise CliError(f"--array {name}: {kernel.file} declares {', '.join(specs) or 'no arrays'}")
        try:
            values = np.load(text, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CliError(f"--array {pair}: {error}") from None
        if not isinstance(values, np.ndarray):
            raise CliError(f"--array {pair}: is an archive of several arrays; save one with numpy.save")
        if reason := misfit(spec, values.dtype.name, values.shape):
            raise CliError(f"--array {name}: {reason}")
        found[name] = ArrayFile(name, Path(text), values)
    return list(found.values())


def misfit(spec: ArraySpec, dtype: str, shape: tuple[int, ...]) -> str:
    """Why an array is not what the kernel declares; empty when it is (a shape of a frame is not known here)."""
    import numpy as np

    if not np.can_cast(np.dtype(dtype), np.dtype(spec.dtype), "safe"):
        return f"holds {dtype}, declared is {spec.dtype}; convert it with .astype({spec.dtype!r})"
    if spec.shape is not None and (
        len(shape) != len(spec.shape)
        or any(want not in (-1, have) for want, have in zip(spec.shape, shape, strict=True))
    ):
        return f"has the shape {shape}, declared is {spec.shape}"
    return ""
