"""State memories of a core: read in the cycle of the pixel, changed and written in the next; see vhdl_core.

The value on its way is forwarded, so that two updates of one element in a row both count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernels.contract import StateSpec
from kernels.offload import registers as regs
from kernels.offload import types
from kernels.offload.ir import Offload
from kernels.offload.vhdl_values import address_width, operand_width

if TYPE_CHECKING:
    from kernels.offload.vhdl_core import Core


def clear_bits(offload: Offload) -> int:
    return max([1, *(address_width(spec) for spec in offload.memories)])


def unsigned(value: int, bits: int) -> str:
    return f'unsigned\'("{value:0{bits}b}")'


def memory_variables(core: Core, spec: StateSpec) -> Iterator[str]:
    name, bits = core.values.states[spec.name], types.bits(spec.dtype)
    address = f"unsigned({address_width(spec) - 1} downto 0) := (others => '0')"
    operand = operand_width(core.offload, spec.name) - 1
    for stage in ("", "_next"):
        yield f"variable {name}{stage}_on : boolean := false;"
        yield f"variable {name}{stage}_at : {address};"
        yield f'variable {name}{stage}_op : std_logic_vector(2 downto 0) := "000";'
        yield f"variable {name}{stage}_by : signed({operand} downto 0) := (others => '0');"
    yield f"variable {name}_last_on : boolean := false;"
    yield f"variable {name}_last_at : {address};"
    yield f"variable {name}_last : std_logic_vector({bits - 1} downto 0) := (others => '0');"
    yield f"variable {name}_write : boolean;"
    yield f"variable {name}_write_at : {address};"


def memory_write(core: Core, spec: StateSpec) -> Iterator[str]:
    """The second half of an update: what was read in the last cycle, or written in it, is changed and written."""
    name = core.values.states[spec.name]
    bits, size = address_width(spec), regs.elements(spec)
    yield f"{name}_write := {name}_next_on;"
    yield f"{name}_write_at := {name}_next_at;"
    yield f"if {name}_next_on then"
    yield f"  if {name}_last_on and {name}_last_at = {name}_next_at then"
    yield f"    {name}_last := changed_{name}({name}_last, {name}_next_op, {name}_next_by);"
    yield "  else"
    yield f"    {name}_last := changed_{name}({name}_read, {name}_next_op, {name}_next_by);"
    yield "  end if;"
    yield f"  {name}_last_on := true;"
    yield f"  {name}_last_at := {name}_next_at;"
    yield "elsif phase = clear then"
    yield f"  {name}_last := {name}_identity;"
    yield f"  {name}_last_on := false;"
    if size == 1 << clear_bits(core.offload):
        yield f"  {name}_write := true;"
    else:
        width = clear_bits(core.offload)
        yield f"  {name}_write := clear_at <= {unsigned(size - 1, width)};"
    yield f"  {name}_write_at := clear_at({bits - 1} downto 0);"
    yield "end if;"
    yield f"if {name}_write then"
    yield f"  {name}(to_integer({name}_write_at)) <= {name}_last;"
    yield "end if;"
    yield f"{name}_on := false;"


def memory_read(core: Core, spec: StateSpec) -> Iterator[str]:
    """The first half of an update; between frames the register file reads."""
    name = core.values.states[spec.name]
    yield f"if not {name}_on then {name}_at := {name}_asked; end if;"
    yield f"{name}_read <= {name}(to_integer({name}_at));"
    for part in ("on", "at", "op", "by"):
        yield f"{name}_next_{part} := {name}_{part};"
