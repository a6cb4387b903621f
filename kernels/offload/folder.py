"""A folder that an FPGA engineer can take away: sources, testbench with vectors, run script, and what the interface is.

In: ``Offload``, parameters, frames for the vectors and what the plain kernel found in them, perhaps an estimate. Out: files,
by name. Equal inputs give equal files. Figures are counted in clock cycles from the structure of the core; everything that
was not measured on a chip is called modelled.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kernels.offload import registers as regs
from kernels.offload import types
from kernels.offload.ir import Offload
from kernels.offload.testbench import Script, emit_testbench
from kernels.offload.vhdl_core import RESULT_BITS, emit_vhdl, emits_of, entity_name
from kernels.offload.vhdl_frame import lead_of
from kernels.offload.yosys import Estimate

LINE_BITS_PER_S = 40e9
CLOCKS_MHZ = (156.25, 250.0, 322.265625)
"""Clocks that 10, 25 and 100 Gb/s Ethernet cores hand out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What the plain kernel found in the frames of the vectors, from a clear state."""

    verdicts: Sequence[int]
    feedback: Sequence[tuple[int, int, float]]
    state: Mapping[str, npt.NDArray[np.generic]]


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Clock cycles, of a core that is never made to wait."""

    pixels: int
    between: int
    """From the last pixel of a frame to the first of the next."""
    verdict: int
    """From the clock that takes the last pixel of a frame to the one that takes its verdict, without feedback at the end."""

    @property
    def frame(self) -> int:
        return self.pixels + self.between


def timing_of(offload: Offload) -> Timing:
    lead = lead_of(offload)
    return Timing(offload.pixels, lead + BETWEEN_CYCLES, lead + VERDICT_CYCLES)


BETWEEN_CYCLES = 4
"""epilogue, closing, idle, prologue."""
VERDICT_CYCLES = 3


def files(
    offload: Offload,
    params: Mapping[str, int | float],
    frames: npt.NDArray[np.generic],
    expected: Expected,
    estimate: Estimate | str,
) -> dict[str, bytes]:
    """``estimate``: or the reason why there is none."""
    script = Script(offload).hold()
    script.params({spec.name: int(params[spec.name]) for spec in offload.kernel.params if spec.dtype in types.INTEGERS})
    for frame in frames:
        script.frame(frame)
    script.poll(regs.FRAMES, 0xFFFFFFFF, len(frames)).hold().read_state()
    results, reads = vectors(offload, expected)
    source = offload.kernel.source.encode()
    return {
        f"{entity_name(offload)}.vhd": emit_vhdl(offload).encode(),
        "testbench.vhd": emit_testbench(offload).encode(),
        "script.bin": script.data(),
        "expected_results.bin": results,
        "expected_reads.bin": reads,
        "run.sh": _RUN.format(core=entity_name(offload)).encode(),
        "compare.py": _COMPARE.encode(),
        "interface.json": _interface(offload).encode(),
        "README.md": readme(offload, params, len(frames), estimate).encode(),
        offload.kernel.file: source,
    }


def vectors(offload: Offload, expected: Expected) -> tuple[bytes, bytes]:
    """What the testbench must write, without the cycles: (value, code, flags) of each result, (word, 0) of each read."""
    records = []
    feedback = list(expected.feedback)
    for frame, verdict in enumerate(expected.verdicts):
        records += [
            (int(value) % (1 << 64), code % (1 << 64), frame | int(value >= 1 << 63) << 34)
            for index, code, value in feedback
            if index == frame
        ]
        records.append((0, 0, frame | 1 << 32 | verdict << 40))
    words: list[int] = []
    for spec in offload.state:
        for element in expected.state[spec.name].reshape(-1).tolist():
            words += [element % (1 << 64) & 0xFFFFFFFF, 0, element % (1 << 64) >> 32, 0]
    return np.array(records, np.uint64).astype("<u8").tobytes(), np.array(words, "<u4").tobytes()


def _interface(offload: Offload) -> str:
    """The register map and the figures, for machines."""
    timing = timing_of(offload)
    description = {
        "entity": entity_name(offload),
        "kernel": {"file": offload.kernel.file, "sha256": offload.kernel.sha256},
        "frame": {"dtype": offload.dtype, "shape": list(offload.shape)},
        "registers": [dataclasses.asdict(register) for register in regs.register_map(offload)],
        "cycles": {"frame": timing.frame, "between_frames": timing.between, "last_pixel_to_verdict": timing.verdict},
        "pixels_per_cycle": 1,
        "result_bits": RESULT_BITS,
    }
    return json.dumps(description, indent=2) + "\n"


def readme(offload: Offload, params: Mapping[str, int | float], frames: int, estimate: Estimate | str) -> str:
    return _README.format(
        core=entity_name(offload),
        file=offload.kernel.file,
        sha256=offload.kernel.sha256,
        shape=" × ".join(map(str, offload.shape)),
        dtype=offload.dtype,
        pixel=types.bits(offload.dtype),
        result=RESULT_BITS,
        address=regs.address_bits(offload),
        frames=frames,
        params=", ".join(f"{name} = {value}" for name, value in params.items()) or "none",
        registers="\n".join(_row(register) for register in regs.register_map(offload)),
        clocks=_clocks(offload),
        estimate=_estimate(estimate),
        memories=_memories(offload),
    )


def _row(register: regs.Register) -> str:
    return (
        f"| 0x{register.address:05X} | {register.size_bytes} | {register.access} | {register.name} | {register.text} |"
    )


def _clocks(offload: Offload) -> str:
    timing, pixel_bits = timing_of(offload), types.bits(offload.dtype)
    share = timing.pixels / timing.frame
    needed_mhz = LINE_BITS_PER_S / pixel_bits / share / 1e6
    lines = [
        f"- One pixel a clock. A frame takes {timing.pixels} clocks and {timing.between} between it and the next: "
        f"{timing.frame} in all ({share:.2%} of the clocks take a pixel), and one more for each value emitted at its end "
        "beyond the first.",
        f"- From the last pixel to the verdict: {timing.verdict} clocks, and one for each value emitted at the end "
        f"(at most {emits_of(offload)} emit() calls in one place).",
        f"- {LINE_BITS_PER_S / 1e9:g} Gb/s of {pixel_bits}-bit pixels would need {needed_mhz:.0f} MHz from one core. Instead, "
        "frames are dealt to several cores in turn, and their states merge as the gateway merges those of its "
        "processes (column `merges by` below), which is exact:",
    ]
    for clock in CLOCKS_MHZ:
        rate = clock * 1e6 * share * pixel_bits
        cores = math.ceil(LINE_BITS_PER_S / rate)
        lines.append(
            f"  - at {clock:g} MHz: {rate / 1e9:.2f} Gb/s a core, {cores} cores for {LINE_BITS_PER_S / 1e9:g} Gb/s"
        )
    return "\n".join(lines)


def _memories(offload: Offload) -> str:
    lines = [
        f"- state.{spec.name}: {regs.elements(spec)} × {types.bits(spec.dtype)} bits, read in the clock of the pixel and "
        "written in the next, with the value on its way forwarded"
        for spec in offload.memories
    ]
    window = offload.window
    if window.rows > 1:
        bits = types.bits(offload.dtype) * (window.rows - 1)
        lines.append(
            f"- line buffer: {offload.width} × {bits} bits, for a window of {window.rows} × {window.columns} pixels"
        )
    return "\n".join(lines) or "- none"


def _estimate(estimate: Estimate | str) -> str:
    if isinstance(estimate, str):
        return f"None: {estimate}"
    rows = [
        ("LUTs", estimate.luts),
        ("flip-flops", estimate.flip_flops),
        ("carry blocks", estimate.carry),
        ("DSP slices", estimate.dsp),
        ("block RAM (18 kbit)", estimate.block_ram_18k),
        ("LUT RAM cells", estimate.lut_ram),
        ("UltraRAM", estimate.ultra_ram),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"| cell | number (modelled) |\n|---|---|\n{table}\n\nMapped for UltraScale+ by {estimate.tool}, from GHDL's netlist."


_RUN = """\
#!/bin/sh
# Simulates the core against the vectors with GHDL (2.0 or newer), with stalls on both sides, and compares.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ghdl -a --std=08 --workdir="$work" {core}.vhd testbench.vhd
for seed in 1 2 3; do
    stall=$(( (seed - 1) * 60 ))
    ghdl -r --std=08 --workdir="$work" testbench -gSEED=$seed -gSTALL_IN=$stall -gSTALL_OUT=$stall \\
        -gRESULTS="$work/results.bin" -gREADS="$work/reads.bin" --ieee-asserts=disable
    python3 compare.py "$work/results.bin" "$work/reads.bin"
done
ghdl --synth --std=08 --workdir="$work" {core}.vhd -e {core} >"$work/netlist.vhd"
echo "the core is bit-exact on the vectors, and synthesizable"
"""

_COMPARE = '''\
"""Compares what the testbench wrote with what the kernel found on a processor. Arguments: results file, reads file."""
import struct
import sys

with open(sys.argv[1], "rb") as file:
    results = file.read()
with open("expected_results.bin", "rb") as file:
    expected = list(struct.iter_unpack("<QQQ", file.read()))
with open(sys.argv[2], "rb") as file:
    reads = file.read()
with open("expected_reads.bin", "rb") as file:
    expected_reads = file.read()
# Of each record the value, the code and the flags; then come tlast (one byte) and the clock cycle (four).
found = [record[:3] for record in struct.iter_unpack("<QQQBI", results)]
for number, (one, other) in enumerate(zip(found, expected)):
    if one != other:
        sys.exit(f"result {number} is {one}, not {other}")
if len(found) != len(expected):
    sys.exit(f"{len(found)} results, not {len(expected)}")
if reads != expected_reads:
    sys.exit("the state differs")
print(f"{len(found)} results and {len(reads) // 16} state elements agree")
'''

_README = """\
# {core}

`{file}` as an FPGA core, for frames of {shape} {dtype}. Made by `hiss kernel vhdl`; SHA-256 of the kernel's file:
`{sha256}`. VHDL-2008, one file, no vendor primitives, no constraints: it is synthesizable (`ghdl --synth` passed) and
was never placed on a chip. Every figure here is counted or **modelled**, none is measured.

| file | |
|---|---|
| `{core}.vhd` | package and core |
| `testbench.vhd`, `script.bin` | a testbench that plays {frames} frames and reads the state; parameters: {params} |
| `expected_*.bin`, `compare.py`, `run.sh` | what the kernel finds in them on a processor; `./run.sh` simulates and compares |
| `interface.json` | register map and figures for machines |

## Ports

One clock, `aclk`; `aresetn` is synchronous, low active. After a reset the state is cleared, one element a clock.

| port | width | |
|---|---|---|
| `s_axis` | {pixel} | pixels, row by row; `tuser` marks the first of a frame, `tlast` the last |
| `m_axis` | {result} | results: feedback in the order emitted, then the verdict with `tlast` |
| `s_axil` | 32 | registers, AXI4-Lite, {address} address bits |

Both streams may stall at any time; nothing is lost. `s_axis_tready` is low between frames, while feedback waits, and
(combinationally) on a beat that begins a frame within another. A result:

| bits | |
|---|---|
| 63–0 | value (feedback); two's complement unless bit 162 |
| 127–64 | code (feedback) |
| 159–128 | number of the frame, modulo 2^32 |
| 160 | 0 feedback, 1 verdict |
| 161 | the frame was broken: tlast early or late, or no tuser. It has no verdict |
| 162 | the value is unsigned |
| 169–168 | verdict: 0 drop, 1 keep, 3 stop |

A frame with `tlast` too early or too late is reported as broken. Pixels that it had are in the state: STATUS bit 11 says
so, clear the state. Beats without a start are dropped up to the next `tlast`, or to the next `tuser`.

## Registers

Values of 8 bytes are two words, the low one first, extended by their sign. Parameters that were written count from the
next frame that begins after CONTROL bit 2 was written, all at once. State memories are read while the core is held.

| address | bytes | | name | |
|---|---|---|---|---|
{registers}

## Speed

{clocks}

## Memory

{memories}

## Resources

{estimate}

Everything that happens for one pixel happens in one clock: the longest path is that of the kernel's arithmetic. Register
retiming, or a slower clock and more cores, are the ways to meet timing.
"""
