"""``hiss kernel vhdl``: a kernel as an FPGA core, in a folder to take away.

In: a kernel, the layout of its frames, parameters; frames for the test vectors, of the user's own or made up. Out: the
folder (kernels/offload/folder.py). Exit code 0: written; 2: refused, with the line; 1: GHDL does not agree.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli import options
from gateway.cli.kernel.source import Given, Refused, load, parse_params
from gateway.cli.output import CliError, ExitCode, print_json, print_table
from ingest.ports import KernelRefused

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kernels.offload.folder import Expected
    from kernels.offload.ir import Offload
    from kernels.offload.yosys import Estimate

VECTOR_FRAMES = 3
VECTOR_PIXELS_MAX = 1 << 20
"""Pixels of all vectors; a large frame is the only one."""
SIMULATION_S = 600.0


def vhdl(
    what: Annotated[str, typer.Argument(metavar="FILE|NAME", help="A kernel file, or the name of a shipped kernel.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; made if it is not there.")],
    shape: Annotated[
        str, typer.Option(metavar="512x1030", help="Of a frame: rows x columns, or pixels; default: that of --frames.")
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="Of a pixel: uint8, uint16, uint32, int16, int32; default: that of --frames, or uint16.")
    ] = "",
    params: Annotated[str, typer.Option(metavar="JSON", help="Parameters for the vectors.")] = "",
    frames: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="Frames for the vectors; default: random.")
    ] = None,
    simulate: Annotated[bool, typer.Option(help="Prove the core on the vectors with GHDL.")] = True,
    estimate: Annotated[bool, typer.Option(help="Estimate resources with yosys (minutes).")] = True,
    as_json: options.Json = False,
) -> None:
    """Write a kernel as VHDL, with testbench, vectors and interface description."""
    from kernels.contract import resolve_params
    from kernels.offload import folder
    from kernels.offload.build import build
    from kernels.offload.ghdl import GhdlFailed, GhdlMissing, synthesize
    from kernels.offload.ir import Refusal

    given = load(what)
    found = _opened(frames) if frames is not None else None
    dtype = dtype or (found.dtype.name if found is not None else "uint16")
    sizes = _shape(shape) if shape else _shape_of(found)
    try:
        values = resolve_params(given.kernel, parse_params(params))
        offload = build(given.kernel, dtype, sizes)
    except KernelRefused as refusal:
        raise CliError(f"--params: {refusal.reason}") from None
    except Refusal as reason:
        refused = Refused(given.kernel.file, reason.line, reason.reason, given.text)
        if as_json:
            refused.print_json()
        raise refused from None
    pixels = _made(dtype, sizes) if found is None else _given(frames, found, dtype, sizes)
    expected = _expected(given, pixels, values)
    said: dict[str, str] = {}
    try:
        synthesize(offload)
        said["synthesis"] = "ghdl --synth accepts the core"
        said["simulation"] = _proven(offload, pixels, values, expected) if simulate else "not asked for"
    except GhdlMissing as missing:
        said["simulation"] = str(missing)
    except GhdlFailed as failure:
        raise CliError(f"GHDL: {failure}", ExitCode.NO) from None
    figures = _estimate(offload) if estimate else "not asked for"
    written = folder.files(offload, values, pixels, expected, figures)
    _write(output, written)
    timing = folder.timing_of(offload)
    said["clocks a frame"] = f"{timing.frame} (counted)"
    said["resources"] = (
        figures if isinstance(figures, str) else f"{figures.luts} LUTs, {figures.flip_flops} flip-flops (modelled)"
    )
    if as_json:
        print_json({"folder": str(output), "files": sorted(written), "said": said, "estimate": _plain(figures)})
    else:
        print_table(("", str(output)), sorted(said.items()))


def _plain(figures: Estimate | str) -> object:
    return {"none": figures} if isinstance(figures, str) else {**dataclasses.asdict(figures), "modelled": True}


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 2 or min(sizes) < 1:
        raise CliError(f"--shape {text!r}: write it as ROWSxCOLUMNS, e.g. 512x1030, or as a number of pixels")
    return sizes


def _opened(file: Path) -> npt.NDArray[np.generic]:
    import numpy as np

    try:
        found: npt.NDArray[np.generic] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CliError(f"{file}: {error}") from None
    return found


def _shape_of(frames: npt.NDArray[np.generic] | None) -> tuple[int, ...]:
    """As a node reads an .npy: three dimensions are frames of two, fewer are one frame."""
    if frames is None:
        raise CliError("of which frames? give --shape ROWSxCOLUMNS, or --frames FILE.npy")
    if not 1 <= frames.ndim <= 3:
        raise CliError(f"--frames holds an array of {frames.shape}: give the --shape of a frame")
    return frames.shape[1:] if frames.ndim == 3 else frames.shape


def _count(shape: tuple[int, ...]) -> int:
    return max(1, min(VECTOR_FRAMES, VECTOR_PIXELS_MAX // math.prod(shape)))


def _made(dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    import numpy as np

    bounds = np.iinfo(dtype)
    rng = np.random.default_rng(1)
    made = rng.integers(bounds.min, bounds.max, (_count(shape), *shape), dtype=dtype, endpoint=True)
    # Small values too: thresholds and histograms have little to do with the full range.
    made[1:] //= 1 << max(0, bounds.bits - 6)
    return made


def _given(
    file: Path | None, found: npt.NDArray[np.generic], dtype: str, shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    import numpy as np

    if found.shape == shape:
        found = found[np.newaxis]
    if found.dtype != np.dtype(dtype) or found.shape[1:] != shape:
        raise CliError(f"{file} holds {found.dtype} of {found.shape}, not frames of {dtype} {shape}")
    return np.array(found[: _count(shape)])


def _expected(given: Given, frames: npt.NDArray[np.generic], values: dict[str, int | float]) -> Expected:
    """What the plain kernel finds, in the sandbox like any kernel."""
    from kernels.offline.zygote import NoZygote, private_zygote
    from kernels.sandbox import SandboxFailed

    try:
        with private_zygote() as socket:
            return asyncio.run(_judged(socket, given, frames, values))
    except KernelRefused as refusal:
        raise Refused.of(refusal, given.text) from None
    except (SandboxFailed, NoZygote, ValueError, OSError) as error:
        raise CliError(f"the kernel could not be run on the vectors: {error}", ExitCode.NOT_STARTED) from None


async def _judged(
    socket: str, given: Given, frames: npt.NDArray[np.generic], values: dict[str, int | float]
) -> Expected:
    import numpy as np

    from kernels.contract import Stage
    from kernels.offline.body import open_body
    from kernels.offline.memory import Window, window_bytes
    from kernels.offline.runner import Runner
    from kernels.offload.folder import Expected

    with tempfile.TemporaryDirectory(prefix="hiss-vectors-") as name:
        np.save(Path(name) / "vectors.npy", frames)
        body = open_body(Path(name) / "vectors.npy", b"vectors.npy", {})
        window = Window(window_bytes(body, len(frames)))
        try:
            runner = await Runner.start(socket, [Stage(given.kernel, values)], body.dtype, body.shape, window)
            try:
                # One by one: a core goes on after STOP.
                found = [await runner.judge(body, i, i + 1, fresh=i == 0) for i in range(len(frames))]
            finally:
                await runner.close()
        finally:
            window.close()
            body.close()
    return Expected(
        [int(one.verdicts[0]) for one in found], [event for one in found for event in one.feedback], found[-1].state
    )


def _proven(
    offload: Offload, frames: npt.NDArray[np.generic], values: dict[str, int | float], expected: Expected
) -> str:
    """Simulate the core on the vectors; CliError where it differs."""
    import numpy as np

    from kernels.offload import ghdl

    judged = ghdl.judge(offload, frames, values, stall_in=30, stall_out=30, timeout_s=SIMULATION_S)
    feedback = [(frame, code, float(value)) for frame, code, value in judged.feedback]
    if judged.verdicts != list(expected.verdicts) or feedback != list(expected.feedback):
        raise CliError("the simulated core gives other verdicts or feedback than the kernel", ExitCode.NO)
    for array, found in judged.state.items():
        if not np.array_equal(found, expected.state[array]):
            raise CliError(f"the simulated core leaves another state.{array} than the kernel", ExitCode.NO)
    return f"bit-exact with the kernel on {len(frames)} frame(s)"


def _estimate(offload: Offload) -> Estimate | str:
    from kernels.offload.ghdl import GhdlFailed, GhdlMissing
    from kernels.offload.yosys import estimate

    try:
        return estimate(offload)
    except (GhdlMissing, GhdlFailed) as reason:
        return str(reason)


def _write(output: Path, written: dict[str, bytes]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, data in written.items():
            (output / name).write_bytes(data)
        (output / "run.sh").chmod(0o755)
    except OSError as error:
        raise CliError(f"{output}: {error.strerror}") from None
