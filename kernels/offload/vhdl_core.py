"""IR → the VHDL-2008 of a core: one pixel a clock in, verdicts and feedback out, a register file beside.

In: ``Offload``. Out: the text of one file with the package ``hiss_offload`` and the entity ``hiss_<kernel>``; equal inputs give
equal text. The kernel's statements become one clocked process: before the frame, for each pixel, after the frame. State
memories are read in the cycle of the pixel and written in the next; the value on its way is forwarded, so that two equal
pixels in a row count twice. Parameters are copied between frames only.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator

from kernels.contract import StateSpec
from kernels.offload import registers as regs
from kernels.offload import types
from kernels.offload.ir import Const, Emit, Expr, Offload, Span, Statement, statements
from kernels.offload.vhdl_axi import axi_process
from kernels.offload.vhdl_frame import frame_process
from kernels.offload.vhdl_package import PACKAGE
from kernels.offload.vhdl_values import (
    OPERATIONS,
    Values,
    address_width,
    identifier,
    literal,
    operand_width,
    updates,
    width_of,
)

RESULT_BITS = 192


def entity_name(offload: Offload) -> str:
    return f"hiss_{identifier(offload.kernel.name)}"


def emits_of(offload: Offload) -> int:
    """Calls of emit() that one cycle may carry out."""
    blocks = (offload.prologue, offload.step, offload.epilogue)
    return max(sum(isinstance(statement, Emit) for statement in statements(block)) for block in blocks)


def emit_vhdl(offload: Offload) -> str:
    return "\n".join(Core(offload).lines()) + "\n"


class Core:
    def __init__(self, offload: Offload) -> None:
        self.offload = offload
        self.values = Values(offload)
        self.name = entity_name(offload)
        self.emits = max(1, emits_of(offload))

    def lines(self) -> Iterator[str]:
        yield from self._head()
        yield from PACKAGE.splitlines()
        yield from self._entity()
        yield f"architecture rtl of {self.name} is"
        yield from self._declarations()
        yield "begin"
        yield from frame_process(self)
        yield from axi_process(self)
        yield "end architecture;"

    def _head(self) -> Iterator[str]:
        offload = self.offload
        shape = " x ".join(str(size) for size in offload.shape)
        yield f"-- {offload.kernel.file} as an FPGA core, for frames of {shape} {offload.dtype}."
        yield "-- Generated: change the kernel, not this."
        yield f"-- SHA-256 of the kernel's file: {offload.kernel.sha256}"
        yield "-- Comments name the lines of that file. Register map and ports: README.md beside."
        yield ""

    def _entity(self) -> Iterator[str]:
        pixel = types.bits(self.offload.dtype)
        address = regs.address_bits(self.offload)
        yield ""
        yield "library ieee;"
        yield "use ieee.std_logic_1164.all;"
        yield "use ieee.numeric_std.all;"
        yield "use work.hiss_offload.all;"
        yield ""
        yield f"entity {self.name} is"
        yield from textwrap.indent(
            _PORTS.format(pixel=pixel - 1, result=RESULT_BITS - 1, address=address - 1), "  "
        ).splitlines()
        yield "end entity;"
        yield ""

    # -- declarations

    def _declarations(self) -> Iterator[str]:
        offload, values = self.offload, self.values
        pixel = types.bits(offload.dtype)
        window = offload.window
        yield "  type phase_t is (clear, idle, prologue, run, flush, epilogue, closing, skip);"
        yield f"  subtype pixel_t is std_logic_vector({pixel - 1} downto 0);"
        yield f"  type pixel_row_t is array (0 to {window.columns - 1}) of pixel_t;"
        yield f"  type window_t is array (0 to {window.rows - 1}) of pixel_row_t;"
        if window.rows > 1:
            yield f"  -- The {window.rows - 1} row(s) above the newest pixel, side by side."
            word = f"std_logic_vector({(window.rows - 1) * pixel - 1} downto 0)"
            yield f"  type rows_t is array (0 to {offload.width - 1}) of {word};"
            yield "  signal rows_above : rows_t := (others => (others => '0'));"
            yield f"  signal above : {word} := (others => '0');"
        for param in offload.kernel.params:
            name, bits = values.params[param.name], types.bits(param.dtype)
            default = f"{int(param.default) % (1 << 64):016X}"
            yield f'  signal w_{name} : std_logic_vector(63 downto 0) := x"{default}";  -- as written'
            yield f"  signal {name} : std_logic_vector({bits - 1} downto 0) := (others => '0');  -- of this frame"
        for spec in offload.registers:
            yield from self._register_array(spec)
        for spec in offload.memories:
            yield from self._memory(spec)
        yield f"  constant EMITS : positive := {self.emits};"
        yield "  signal accept : std_logic := '0';"
        yield "  signal first : std_logic := '1';"
        yield "  signal result_valid : std_logic := '0';"
        yield from (f"  {line}" for line in _SHARED.splitlines())

    def _register_array(self, spec: StateSpec) -> Iterator[str]:
        name, bits, size = self.values.states[spec.name], types.bits(spec.dtype), regs.elements(spec)
        yield f"  type {name}_t is array (0 to {size - 1}) of std_logic_vector({bits - 1} downto 0);"
        yield f"  constant {name}_identity : std_logic_vector({bits - 1} downto 0) := {_bits(spec)};"
        yield f"  signal {name}_shown : {name}_t := (others => {name}_identity);"
        yield f"  function at_{name}(values : {name}_t; index : signed) return std_logic_vector is"
        yield f"    variable found : std_logic_vector({bits - 1} downto 0) := values(0);"
        yield "  begin"
        yield f"    for i in 1 to {size - 1} loop"
        yield "      if index = i then found := values(i); end if;"
        yield "    end loop;"
        yield "    return found;"
        yield "  end function;"

    def _memory(self, spec: StateSpec) -> Iterator[str]:
        name, bits, size = self.values.states[spec.name], types.bits(spec.dtype), regs.elements(spec)
        yield f"  type {name}_t is array (0 to {size - 1}) of std_logic_vector({bits - 1} downto 0);"
        yield f"  constant {name}_identity : std_logic_vector({bits - 1} downto 0) := {_bits(spec)};"
        yield f"  signal {name} : {name}_t;"
        yield f"  signal {name}_read : std_logic_vector({bits - 1} downto 0) := (others => '0');"
        yield f"  signal {name}_asked : unsigned({address_width(spec) - 1} downto 0) := (others => '0');"
        yield from self._changed(spec, name, bits)

    def _changed(self, spec: StateSpec, name: str, bits: int) -> Iterator[str]:
        """The function that computes a memory's new element; only the operations that the kernel uses."""
        used = sorted({update.op for update in updates(self.offload, spec.name)}, key=OPERATIONS.index)
        operand = operand_width(self.offload, spec.name)
        signed = types.is_signed(spec.dtype)
        yield f"  function changed_{name}(old : std_logic_vector; op : std_logic_vector; by : signed) return std_logic_vector is"
        yield f"    variable now : signed({bits - (1 if signed else 0)} downto 0);"
        yield f"    variable by_low : signed({bits - 1} downto 0);"
        yield "  begin"
        yield f"    now := {'signed(old)' if signed else chr(39) + '0' + chr(39) + ' & signed(old)'};"
        yield f"    by_low := fit(by, {bits});"
        yield "    case op is"
        for op in used:
            yield f'      when "{OPERATIONS.index(op):03b}" => return std_logic_vector({_operation(op, bits, operand)});  -- {op}'
        yield "      when others => return old;"
        yield "    end case;"
        yield "  end function;"

    # -- what the processes ask

    def span_bound(self, node: Expr, name: str) -> str:
        """A bound of a loop over pixels: a constant where it is one."""
        if node.lo == node.hi:
            return literal(node.lo, width_of(0, node.lo))
        return name

    def span_assignments(self, span: Span, axis: str) -> Iterator[str]:
        size = self.offload.height if axis == "y" else self.offload.width
        for node, name in ((span.start, f"{axis}_from"), (span.stop, f"{axis}_to")):
            if node.lo != node.hi:
                yield f"{name} := {self.values.fitted(node, width_of(min(0, node.lo), size))};"

    def span_variables(self) -> Iterator[str]:
        spans = [("x", self.offload.columns, self.offload.width)]
        if self.offload.rows is not None:
            spans.append(("y", self.offload.rows, self.offload.height))
        for axis, span, size in spans:
            for node, name in ((span.start, f"{axis}_from"), (span.stop, f"{axis}_to")):
                if node.lo != node.hi:
                    yield f"variable {name} : signed({width_of(min(0, node.lo), size) - 1} downto 0) := (others => '0');"

    def inside(self, span: Span, axis: str) -> str:
        size = self.offload.height if axis == "y" else self.offload.width
        tests = []
        if not (isinstance(span.start, Const) and span.start.lo == 0):
            tests.append(f"at_{axis} >= {self.span_bound(span.start, f'{axis}_from')}")
        if not span.stop.lo == span.stop.hi == size:
            tests.append(f"at_{axis} < {self.span_bound(span.stop, f'{axis}_to')}")
        return " and ".join(tests) or "true"

    def code(self, block: tuple[Statement, ...], depth: int, emits: Iterator[int] | None = None) -> Iterator[str]:
        return self.values.block(block, depth, emits if emits is not None else itertools.count())


def _bits(spec: StateSpec) -> str:
    width = types.bits(spec.dtype)
    return f'"{int(spec.identity) % (1 << width):0{width}b}"'


def _operation(op: str, bits: int, operand: int) -> str:
    if op in ("min", "max"):
        width = max(bits + 1, operand)
        return f"fit(s{op}(fit(now, {width}), fit(by, {width})), {bits})"
    if op == "set":
        return "by_low"
    sign = {"add": "+", "sub": "-", "and": "and", "or": "or", "xor": "xor"}[op]
    return f"fit(now, {bits}) {sign} by_low"


_PORTS = """\
port (
  aclk : in std_logic;
  aresetn : in std_logic;
  -- Pixels in, row by row. tuser marks the first pixel of a frame, tlast its last.
  s_axis_tdata : in std_logic_vector({pixel} downto 0);
  s_axis_tvalid : in std_logic;
  s_axis_tready : out std_logic;
  s_axis_tlast : in std_logic;
  s_axis_tuser : in std_logic;
  -- Results out: feedback of a frame in order, then its verdict with tlast.
  m_axis_tdata : out std_logic_vector({result} downto 0);
  m_axis_tvalid : out std_logic;
  m_axis_tready : in std_logic;
  m_axis_tlast : out std_logic;
  -- Registers, AXI4-Lite.
  s_axil_awaddr : in std_logic_vector({address} downto 0);
  s_axil_awvalid : in std_logic;
  s_axil_awready : out std_logic;
  s_axil_wdata : in std_logic_vector(31 downto 0);
  s_axil_wstrb : in std_logic_vector(3 downto 0);
  s_axil_wvalid : in std_logic;
  s_axil_wready : out std_logic;
  s_axil_bresp : out std_logic_vector(1 downto 0);
  s_axil_bvalid : out std_logic;
  s_axil_bready : in std_logic;
  s_axil_araddr : in std_logic_vector({address} downto 0);
  s_axil_arvalid : in std_logic;
  s_axil_arready : out std_logic;
  s_axil_rdata : out std_logic_vector(31 downto 0);
  s_axil_rresp : out std_logic_vector(1 downto 0);
  s_axil_rvalid : out std_logic;
  s_axil_rready : in std_logic
);"""

_SHARED = """\
-- From the register file to the frames.
signal hold : std_logic := '0';
signal ask_clear : std_logic := '0';
signal ask_apply : std_logic := '1';
signal ask_forget : std_logic := '0';
signal set_number : std_logic := '0';
signal new_number : std_logic_vector(63 downto 0) := (others => '0');
-- From the frames to the register file.
signal did_clear : std_logic := '0';
signal did_apply : std_logic := '0';
signal held : std_logic := '0';
signal errors : std_logic_vector(3 downto 0) := (others => '0');
signal frames_done : unsigned(31 downto 0) := (others => '0');
signal frames_broken : unsigned(31 downto 0) := (others => '0');
signal last_verdict : std_logic_vector(1 downto 0) := (others => '0');
signal frame_shown : std_logic_vector(63 downto 0) := (others => '0');
signal emitted : unsigned(31 downto 0) := (others => '0');
signal last_code : std_logic_vector(63 downto 0) := (others => '0');
signal last_value : std_logic_vector(63 downto 0) := (others => '0');
signal busy : std_logic := '0';
-- Handshakes of the register file.
signal w_ready, b_valid, b_error, r_ready, r_valid : std_logic := '0';"""
