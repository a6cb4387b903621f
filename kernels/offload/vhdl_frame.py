"""The clocked process of a core that takes pixels and runs the kernel; see vhdl_core.

Phases: clear (state to its identity) → idle → prologue → run (a pixel a clock) → flush (the last rows of a window) → epilogue →
closing (the verdict goes out) → idle. A frame that breaks off, begins within another, or has too many pixels goes through skip
(to its end) to closing, and gets no verdict but a mark.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernels.offload import registers as regs
from kernels.offload import types
from kernels.offload.ir import Offload
from kernels.offload.vhdl_memory import clear_bits, memory_read, memory_variables, memory_write, unsigned
from kernels.offload.vhdl_values import literal, width_of

if TYPE_CHECKING:
    from kernels.offload.vhdl_core import Core


def lead_of(offload: Offload) -> int:
    """Pixels by which the newest one is ahead of the pixel at hand."""
    return offload.window.bottom * offload.width + offload.window.right


def frame_process(core: Core) -> Iterator[str]:
    yield "  -- A beat that begins a frame within another is not taken here: the broken frame ends first."
    yield "  s_axis_tready <= accept and not (s_axis_tuser and not first);"
    yield "  m_axis_tvalid <= result_valid;"
    yield ""
    yield "  frames : process (aclk)"
    yield from (f"    {line}" for line in _variables(core))
    yield "  begin"
    yield "    if rising_edge(aclk) then"
    yield from textwrap.indent(_BEGIN, "      ").splitlines()
    for spec in core.offload.memories:
        yield from (f"      {line}" for line in memory_write(core, spec))
    yield "      case phase is"
    yield from textwrap.indent("\n".join(_phases(core)), "        ").splitlines()
    yield "      end case;"
    yield "      if step then"
    yield from textwrap.indent("\n".join(_step(core)), "        ").splitlines()
    yield "      end if;"
    yield from textwrap.indent(_SEND, "      ").splitlines()
    for spec in core.offload.memories:
        yield from (f"      {line}" for line in memory_read(core, spec))
    yield from textwrap.indent("\n".join(_reset(core)), "      ").splitlines()
    yield from (f"      {line}" for line in _shown(core))
    yield "    end if;"
    yield "  end process;"
    yield ""


def _variables(core: Core) -> Iterator[str]:
    offload, values = core.offload, core.values
    yield "variable phase : phase_t := clear;"
    for slot in offload.slots:
        kind = (
            "boolean := false"
            if slot.is_bool
            else f"signed({values.slot_width(slot.name) - 1} downto 0) := (others => '0')"
        )
        yield f"variable {values.locals[slot.name]} : {kind};"
    for spec in offload.registers:
        name = values.states[spec.name]
        yield f"variable {name} : {name}_t := (others => {name}_identity);"
    for spec in offload.memories:
        yield from memory_variables(core, spec)
    yield from core.span_variables()
    yield f"variable at_y : signed({width_of(0, offload.height) - 1} downto 0) := (others => '0');"
    yield f"variable at_x : signed({width_of(0, offload.width) - 1} downto 0) := (others => '0');"
    yield f"variable in_x : unsigned({_count_bits(offload.width) - 1} downto 0) := (others => '0');"
    yield f"variable to_come : unsigned({_count_bits(offload.pixels + 1) - 1} downto 0) := (others => '0');"
    yield f"variable lead : unsigned({_count_bits(lead_of(offload) + 1) - 1} downto 0) := (others => '0');"
    yield f"variable clear_at : unsigned({clear_bits(offload) - 1} downto 0) := (others => '0');"
    yield "variable window : window_t := (others => (others => (others => '0')));"
    if offload.window.rows > 1:
        yield "variable beneath : std_logic_vector(above'range);"
    yield from _VARIABLES.splitlines()


def _count_bits(values: int) -> int:
    return max(1, (values - 1).bit_length())


# -- phases


def _phases(core: Core) -> Iterator[str]:
    offload = core.offload
    yield from _clear(core)
    yield from _idle(core)
    yield "when prologue =>"
    yield from core.code(offload.prologue, 1)
    if offload.rows is not None:
        yield from (f"  {line}" for line in core.span_assignments(offload.rows, "y"))
    else:
        yield from (f"  {line}" for line in core.span_assignments(offload.columns, "x"))
    lead = lead_of(offload)
    yield "  at_y := (others => '0');"
    yield "  at_x := (others => '0');"
    yield "  in_x := (others => '0');"
    yield f"  to_come := {unsigned(offload.pixels, _count_bits(offload.pixels + 1))};"
    yield f"  lead := {unsigned(lead, _count_bits(lead + 1))};"
    yield "  opening := true;"
    yield "  phase := run;"
    yield from _RUN.format(
        one=unsigned(1, _count_bits(offload.pixels + 1)), after="flush" if lead else "epilogue"
    ).splitlines()
    yield "when flush =>"
    yield "  if not waiting then"
    yield "    arrived := (others => '0');"
    yield "    step := true;"
    yield "  end if;"
    yield "when epilogue =>"
    yield "  if not waiting then"
    yield from core.code(offload.epilogue, 2)
    yield "    phase := closing;"
    yield "  end if;"
    yield from _REPORT.splitlines()


def _clear(core: Core) -> Iterator[str]:
    size = max([1, *(regs.elements(spec) for spec in core.offload.memories)])
    yield "when clear =>"
    for spec in core.offload.registers:
        name = core.values.states[spec.name]
        yield f"  {name} := (others => {name}_identity);"
    yield f"  if clear_at = {unsigned(size - 1, clear_bits(core.offload))} then"
    yield "    clear_at := (others => '0');"
    yield "    fault(3) := '0';"
    yield "    did_clear <= '1';"
    yield "    phase := idle;"
    yield "  else"
    yield "    clear_at := clear_at + 1;"
    yield "  end if;"


def _idle(core: Core) -> Iterator[str]:
    yield "when idle =>"
    yield "  broken := false;"
    yield "  if set_number = '1' then frame_number := signed(new_number); end if;"
    yield "  if ask_clear = '1' and did_clear = '0' then"
    yield "    phase := clear;"
    yield "  elsif hold = '0' and s_axis_tvalid = '1' and s_axis_tuser = '1' then"
    if core.offload.kernel.params:
        yield "    if ask_apply = '1' then"
        for spec in core.offload.kernel.params:
            name = core.values.params[spec.name]
            yield f"      {name} <= w_{name}({types.bits(spec.dtype) - 1} downto 0);"
        yield "    end if;"
    yield "    did_apply <= ask_apply;"
    yield "    phase := prologue;"
    yield "  elsif hold = '0' and s_axis_tvalid = '1' then"
    yield "    fault(2) := '1';"
    yield "    broken := true;"
    yield "    phase := skip;"
    yield "  end if;"


# -- one pixel


def _step(core: Core) -> Iterator[str]:
    offload = core.offload
    yield from _window_step(offload)
    lead = lead_of(offload)
    if lead:
        yield f"if lead /= {unsigned(0, _count_bits(lead + 1))} then"
        yield "  lead := lead - 1;"
        yield "else"
    else:
        yield "if true then"
    emits = itertools.count()
    if offload.rows is None:
        yield f"  if {core.inside(offload.columns, 'x')} then"
        yield from core.code(offload.body, 2, emits)
        yield "  end if;"
    else:
        yield f"  if {core.inside(offload.rows, 'y')} then"
        yield from _row(core, emits)
        yield "  end if;"
    yield f"  if at_x = {literal(offload.width - 1, width_of(0, offload.width))} then"
    yield "    at_x := (others => '0');"
    yield f"    if at_y = {literal(offload.height - 1, width_of(0, offload.height))} then"
    yield "      if phase = flush then phase := epilogue; end if;"
    yield "    else"
    yield "      at_y := at_y + 1;"
    yield "    end if;"
    yield "  else"
    yield "    at_x := at_x + 1;"
    yield "  end if;"
    yield "end if;"


def _row(core: Core, emits: Iterator[int]) -> Iterator[str]:
    offload = core.offload
    width = width_of(0, offload.width)
    begin = [*core.code(offload.row_prologue, 3, emits)]
    begin += [f"      {line}" for line in core.span_assignments(offload.columns, "x")]
    if begin:
        yield f"    if at_x = {literal(0, width)} then"
        yield from begin
        yield "    end if;"
    yield f"    if {core.inside(offload.columns, 'x')} then"
    yield from core.code(offload.body, 3, emits)
    yield "    end if;"
    if offload.row_epilogue:
        yield f"    if at_x = {literal(offload.width - 1, width)} then"
        yield from core.code(offload.row_epilogue, 3, emits)
        yield "    end if;"


def _window_step(offload: Offload) -> Iterator[str]:
    """Every row of the window moves by one; the newest column comes from the rows above, and from the stream."""
    window, pixel = offload.window, types.bits(offload.dtype)
    for row in range(window.rows):
        for column in range(window.columns - 1):
            yield f"window({row})({column}) := window({row})({column + 1});"
    newest = window.columns - 1
    for row in range(window.rows - 1):
        yield f"window({row})({newest}) := above({(row + 1) * pixel - 1} downto {row * pixel});"
    yield f"window({window.rows - 1})({newest}) := arrived;"
    if window.rows == 1:
        return
    top = (window.rows - 1) * pixel
    if window.rows == 2:
        yield "beneath := arrived;"
    else:
        yield f"beneath := arrived & above({top - 1} downto {pixel});"
    bits = _count_bits(offload.width)
    yield "rows_above(to_integer(in_x)) <= beneath;"
    yield f"if in_x = {unsigned(offload.width - 1, bits)} then in_x := (others => '0'); else in_x := in_x + 1; end if;"
    yield "-- Asked for a cycle ahead, as block RAM answers."
    yield "above <= rows_above(to_integer(in_x));"


# -- reset and what the register file sees


def _reset(core: Core) -> Iterator[str]:
    yield "if aresetn = '0' then"
    yield from textwrap.indent(_RESET, "  ").splitlines()
    for spec in core.offload.memories:
        name = core.values.states[spec.name]
        yield f"  {name}_next_on := false;"
        yield f"  {name}_last_on := false;"
    yield "end if;"


def _shown(core: Core) -> Iterator[str]:
    for spec in core.offload.registers:
        name = core.values.states[spec.name]
        yield f"{name}_shown <= {name};"
    yield from _SHOWN.splitlines()


_VARIABLES = """\
variable frame_number : signed(63 downto 0) := (others => '0');
variable verdict : std_logic_vector(1 downto 0) := "00";
variable arrived : pixel_t;
variable step : boolean;
variable opening : boolean := false;  -- the next pixel is the first of its frame
variable broken : boolean := false;
variable fault : std_logic_vector(3 downto 0) := "0000";
type words_t is array (0 to EMITS - 1) of signed(63 downto 0);
variable emit_on : std_logic_vector(0 to EMITS - 1) := (others => '0');
variable emit_unsigned : std_logic_vector(0 to EMITS - 1) := (others => '0');
variable emit_code : words_t := (others => (others => '0'));
variable emit_value : words_t := (others => (others => '0'));
variable waiting : boolean := false;  -- feedback of the last cycle has not left yet
variable sending : boolean := false;"""

_BEGIN = """\
did_clear <= '0';
did_apply <= '0';
step := false;
if ask_forget = '1' then fault(2 downto 0) := "000"; end if;
if m_axis_tready = '1' then sending := false; end if;"""

_RUN = """\
when run =>
  if accept = '1' and s_axis_tvalid = '1' then
    if s_axis_tuser = '1' and not opening then
      fault(0) := '1';
      broken := true;
      phase := closing;
    else
      arrived := s_axis_tdata;
      step := true;
      opening := false;
      if to_come = {one} then
        if s_axis_tlast = '1' then
          phase := {after};
        else
          fault(1) := '1';
          broken := true;
          phase := skip;
        end if;
      elsif s_axis_tlast = '1' then
        fault(0) := '1';
        broken := true;
        phase := closing;
      end if;
      to_come := to_come - 1;
    end if;
  end if;"""

_REPORT = """\
when closing =>
  if not waiting and not sending then
    m_axis_tdata <= (others => '0');
    m_axis_tdata(159 downto 128) <= std_logic_vector(frame_number(31 downto 0));
    m_axis_tdata(160) <= '1';
    if broken then
      fault(3) := '1';
      m_axis_tdata(161) <= '1';
      frames_broken <= frames_broken + 1;
    else
      m_axis_tdata(169 downto 168) <= verdict;
      last_verdict <= verdict;
      frames_done <= frames_done + 1;
    end if;
    m_axis_tlast <= '1';
    sending := true;
    frame_number := frame_number + 1;
    phase := idle;
  end if;
when skip =>
  if accept = '1' and s_axis_tvalid = '1' and (s_axis_tlast = '1' or s_axis_tuser = '1') then
    phase := closing;
  end if;"""

_SEND = """\
waiting := false;
for i in 0 to EMITS - 1 loop
  if emit_on(i) = '1' then
    if sending then
      waiting := true;
    else
      m_axis_tdata <= (others => '0');
      m_axis_tdata(63 downto 0) <= std_logic_vector(emit_value(i));
      m_axis_tdata(127 downto 64) <= std_logic_vector(emit_code(i));
      m_axis_tdata(159 downto 128) <= std_logic_vector(frame_number(31 downto 0));
      m_axis_tdata(162) <= emit_unsigned(i);
      m_axis_tlast <= '0';
      last_code <= std_logic_vector(emit_code(i));
      last_value <= std_logic_vector(emit_value(i));
      emitted <= emitted + 1;
      emit_on(i) := '0';
      sending := true;
    end if;
  end if;
end loop;"""

_RESET = """\
phase := clear;
clear_at := (others => '0');
broken := false;
opening := false;
waiting := false;
sending := false;
emit_on := (others => '0');
fault := "0000";
frame_number := (others => '0');
frames_done <= (others => '0');
frames_broken <= (others => '0');
emitted <= (others => '0');
did_clear <= '0';
did_apply <= '0';"""

_SHOWN = """\
frame_shown <= std_logic_vector(frame_number);
errors <= fault;
busy <= '0';
if phase /= idle and phase /= clear then busy <= '1'; end if;
held <= '0';
if phase = idle and hold = '1' and ask_clear = '0' then held <= '1'; end if;
accept <= '0';
if (phase = run or phase = skip) and not waiting then accept <= '1'; end if;
first <= '0';
if opening then first <= '1'; end if;
result_valid <= '0';
if sending then result_valid <= '1'; end if;"""
