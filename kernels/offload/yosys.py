"""An estimate of what a core takes of a chip: GHDL's netlist through yosys' mapping for a Xilinx UltraScale+ device.

In: ``Offload``. Out: ``Estimate``. It is modelled: nothing was placed or routed, and the vendor's tools will differ. Calls
block, for seconds to minutes. Raises GhdlMissing or GhdlFailed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path

from kernels.offload.ghdl import GhdlFailed, confined, synthesize
from kernels.offload.ir import Offload
from kernels.offload.vhdl_core import entity_name

FAMILY = "xcup"
TIMEOUT_S = 600.0
MEMORY_BYTES = 4 << 30

_INITIAL = re.compile(r"(always @\*\n\s+(\S+) = \S+; // \(isignal\))\n\s+initial\n\s+\2 <= [^;]+;")
"""GHDL writes the initial value of a signal at the wire behind its register, where yosys takes it for a latch."""
_LAST_CASE = re.compile(r"(\n\s+)\d+'b[01]+(: \S+ <= [^;]+;\n\s+endcase)")
"""It also leaves out the default of a case over all phases, which yosys would take for a latch: the last one stands for it."""
_LUTS = re.compile(r"LUT[1-6]$|INV$")


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """Cells after mapping. What clock they allow is not estimated: that is decided by placing and routing."""

    luts: int
    flip_flops: int
    latches: int
    carry: int
    dsp: int
    block_ram_18k: int
    lut_ram: int
    ultra_ram: int
    tool: str


def estimate(offload: Offload, timeout_s: float = TIMEOUT_S) -> Estimate:
    top = entity_name(offload)
    netlist = synthesize(offload, verilog=True, timeout_s=timeout_s)
    verilog = _LAST_CASE.sub(r"\1default\2", _INITIAL.sub(r"\1", netlist))
    with tempfile.TemporaryDirectory(prefix="hiss-yosys-") as name:
        folder = Path(name)
        (folder / "core.v").write_text(verilog)
        steps = (
            "read_verilog core.v",
            f"synth_xilinx -family {FAMILY} -flatten -noiopad -top {top}",
            "tee -q -o stat.json stat -json",
        )
        confined(["yosys", "-q", "-p", "; ".join(steps)], folder, timeout_s, memory_bytes=MEMORY_BYTES)
        try:
            found = json.loads((folder / "stat.json").read_text())
            cells: dict[str, int] = found["design"]["num_cells_by_type"]
        except (OSError, ValueError, KeyError) as error:
            raise GhdlFailed(f"yosys gave no statistics ({error})") from None
    return Estimate(
        luts=sum(count for cell, count in cells.items() if _LUTS.match(cell)),
        flip_flops=sum(cells.get(cell, 0) for cell in ("FDRE", "FDSE", "FDCE", "FDPE")),
        latches=sum(cells.get(cell, 0) for cell in ("LDCE", "LDPE")),
        carry=sum(cells.get(cell, 0) for cell in ("CARRY4", "CARRY8")),
        dsp=cells.get("DSP48E2", 0) + cells.get("DSP48E1", 0),
        block_ram_18k=cells.get("RAMB18E2", 0) + 2 * cells.get("RAMB36E2", 0),
        lut_ram=sum(count for cell, count in cells.items() if cell.startswith("RAM") and not cell.startswith("RAMB")),
        ultra_ram=cells.get("URAM288", 0),
        tool=str(found.get("creator", "yosys")),
    )
