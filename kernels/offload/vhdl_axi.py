"""The register file of a core, AXI4-Lite: parameters, control, status, and the state while the core is held.

One address at a time; a read takes four clocks. Addresses that hold nothing, memories while the core is not held and writes
to what cannot be written answer SLVERR.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernels.offload import registers as regs
from kernels.offload import types
from kernels.offload.vhdl_values import address_width

if TYPE_CHECKING:
    from kernels.offload.vhdl_core import Core


def axi_process(core: Core) -> Iterator[str]:
    yield from _PORTS.splitlines()
    yield ""
    yield "  registers : process (aclk)"
    yield from (f"    {line}" for line in _VARIABLES.splitlines())
    yield "  begin"
    yield "    if rising_edge(aclk) then"
    yield from textwrap.indent(_WRITE_HEAD, "      ").splitlines()
    yield from (f"        {line}" for line in _writes(core))
    yield from textwrap.indent(_WRITE_TAIL, "      ").splitlines()
    yield from (f"        {line}" for line in _asked(core))
    yield from textwrap.indent(_READ_MIDDLE, "      ").splitlines()
    yield from (f"        {line}" for line in _reads(core))
    yield from textwrap.indent(_READ_TAIL, "      ").splitlines()
    yield from (f"        {line}" for line in _reset(core))
    yield "      end if;"
    yield "    end if;"
    yield "  end process;"


def _is(core: Core, signal: str, address: int, size_bytes: int) -> str:
    """``signal`` lies in a register of a power of two bytes, aligned to it."""
    bits = regs.address_bits(core.offload)
    low = (size_bytes - 1).bit_length()
    return f'{signal}({bits - 1} downto {low}) = "{address >> low:0{bits - low}b}"'


def _word(address: str, name: str) -> str:
    low, high = (f"merge({name}({part}), word, strobe);" for part in ("31 downto 0", "63 downto 32"))
    return f"if {address}(2) = '0' then {low} else {high} end if;"


def _writes(core: Core) -> Iterator[str]:
    yield f"if {_is(core, 'at', regs.CONTROL, 4)} then"
    yield from textwrap.indent(_CONTROL, "  ").splitlines()
    yield f"elsif {_is(core, 'at', regs.NEXT_FRAME, 8)} and held = '1' then"
    yield f"  long := frame_shown; {_word('at', 'long')}"
    yield "  new_number <= long;"
    yield "  set_number <= '1';"
    for number, spec in enumerate(core.offload.kernel.params):
        name = f"w_{core.values.params[spec.name]}"
        yield f"elsif {_is(core, 'at', regs.PARAMS + 8 * number, 8)} then"
        yield f"  long := {name}; {_word('at', 'long')}"
        yield f"  {name} <= long;"
    yield "else"
    yield "  b_error <= '1';"
    yield "end if;"


def _asked(core: Core) -> Iterator[str]:
    for spec, _ in regs.zip_state(core.offload):
        if spec in core.offload.registers:
            continue
        name, bits, size = core.values.states[spec.name], address_width(spec), regs.elements(spec)
        index = f"unsigned(s_axil_araddr({bits + 2} downto 3))"
        if size == 1 << bits:
            yield f"{name}_asked <= {index};"
        else:
            yield f'if {index} <= unsigned\'("{size - 1:0{bits}b}") then {name}_asked <= {index}; end if;'


def _reads(core: Core) -> Iterator[str]:
    offload, values = core.offload, core.values
    number = int(offload.kernel.sha256[:8] or "0", 16)
    pixel = types.bits(offload.dtype) | (types.is_signed(offload.dtype) << 8)
    short = [
        (regs.ID, f'x"{regs.MAGIC:08X}"'),
        (regs.CORE, f'x"{regs.CORE_VERSION:08X}"'),
        (regs.SOURCE, f'x"{number:08X}"'),
        (regs.CONTROL, "(0 => hold, others => '0')"),
        (
            regs.STATUS,
            "(0 => busy, 1 => held, 2 => ask_clear, 3 => ask_apply, 8 => errors(0), 9 => errors(1), 10 => errors(2), "
            "11 => errors(3), others => '0')",
        ),
        (regs.FRAMES, "std_logic_vector(frames_done)"),
        (regs.BROKEN, "std_logic_vector(frames_broken)"),
        (regs.VERDICT, "(0 => last_verdict(0), 1 => last_verdict(1), others => '0')"),
        (regs.HEIGHT, f'x"{offload.height:08X}"'),
        (regs.WIDTH, f'x"{offload.width:08X}"'),
        (regs.PIXEL, f'x"{pixel:08X}"'),
        (regs.EMITTED, "std_logic_vector(emitted)"),
    ]
    long = [
        (regs.NEXT_FRAME, "frame_shown"),
        (regs.LAST_CODE, "last_code"),
        (regs.LAST_VALUE, "last_value"),
        *(
            (regs.PARAMS + 8 * position, f"w_{values.params[spec.name]}")
            for position, spec in enumerate(offload.kernel.params)
        ),
    ]
    word = "if"
    for address, text in short:
        yield f"{word} {_is(core, 'read_at', address, 4)} then"
        # A register of one word shows the same in both halves.
        yield f"  short := {text};"
        yield "  long := short & short;"
        word = "elsif"
    for address, text in long:
        yield f"elsif {_is(core, 'read_at', address, 8)} then"
        yield f"  long := {text};"
    for spec, address in regs.zip_state(offload):
        yield from _state_read(core, spec.name, address)
    yield "else"
    yield "  r_error := '1';"
    yield "end if;"


def _state_read(core: Core, array: str, address: int) -> Iterator[str]:
    spec = core.values.state[array]
    name, size = core.values.states[array], regs.elements(spec)
    yield f"elsif {_is(core, 'read_at', address, 1 << regs.window_bits(spec))} then"
    extend = "resize(signed({0}), 64)" if types.is_signed(spec.dtype) else "resize(unsigned({0}), 64)"
    if spec in core.offload.memories:
        text = f"{name}_read"
    elif size == 1:
        text = f"{name}_shown(0)"
    else:
        bits = regs.window_bits(spec) - 1
        text = f"at_{name}({name}_shown, signed('0' & read_at({bits} downto 3)))"
    yield f"  long := std_logic_vector({extend.format(text)});"
    if size > 1 and size != 1 << (size - 1).bit_length():
        bits = regs.window_bits(spec) - 1
        yield f"  if unsigned(read_at({bits} downto 3)) > unsigned'(\"{size - 1:0{bits - 2}b}\") then r_error := '1'; end if;"
    if spec in core.offload.memories:
        yield "  if held = '0' then r_error := '1'; end if;"


def _reset(core: Core) -> Iterator[str]:
    for spec in core.offload.kernel.params:
        yield f'w_{core.values.params[spec.name]} <= x"{int(spec.default) % (1 << 64):016X}";'
    yield from _RESET.splitlines()


_PORTS = """\
  s_axil_awready <= w_ready;
  s_axil_wready <= w_ready;
  s_axil_bvalid <= b_valid;
  s_axil_bresp <= b_error & '0';
  s_axil_arready <= r_ready;
  s_axil_rvalid <= r_valid;"""

_VARIABLES = """\
variable at, read_at : std_logic_vector(s_axil_awaddr'range) := (others => '0');
variable word, short : std_logic_vector(31 downto 0);
variable strobe : std_logic_vector(3 downto 0);
variable long : std_logic_vector(63 downto 0);
variable reading : natural range 0 to 2 := 0;
variable r_error : std_logic;
procedure merge(target : inout std_logic_vector(31 downto 0); given : std_logic_vector(31 downto 0);
                lanes : std_logic_vector(3 downto 0)) is
begin
  for i in 0 to 3 loop
    if lanes(i) = '1' then target(8 * i + 7 downto 8 * i) := given(8 * i + 7 downto 8 * i); end if;
  end loop;
end procedure;"""

_WRITE_HEAD = """\
ask_forget <= '0';
set_number <= '0';
if did_clear = '1' then ask_clear <= '0'; end if;
if did_apply = '1' then ask_apply <= '0'; end if;
w_ready <= '0';
if b_valid = '1' and s_axil_bready = '1' then b_valid <= '0'; end if;
if w_ready = '1' then b_valid <= '1'; end if;
if w_ready = '0' and b_valid = '0' and s_axil_awvalid = '1' and s_axil_wvalid = '1' then
  w_ready <= '1';
  b_error <= '0';
  at := s_axil_awaddr;
  word := s_axil_wdata;
  strobe := s_axil_wstrb;"""

_CONTROL = """\
if strobe(0) = '1' then
  hold <= word(0);
  if word(1) = '1' then ask_clear <= '1'; end if;
  if word(2) = '1' then ask_apply <= '1'; end if;
  ask_forget <= word(3);
end if;"""

_WRITE_TAIL = """\
end if;
r_ready <= '0';
if r_valid = '1' and s_axil_rready = '1' then r_valid <= '0'; end if;
if reading = 0 and r_valid = '0' and r_ready = '0' and s_axil_arvalid = '1' then
  r_ready <= '1';
  read_at := s_axil_araddr;
  reading := 2;"""

_READ_MIDDLE = """\
elsif reading = 2 then
  reading := 1;  -- a memory answers in this cycle
elsif reading = 1 then
  reading := 0;
  long := (others => '0');
  short := (others => '0');
  r_error := '0';"""

_READ_TAIL = """\
  if read_at(2) = '0' then s_axil_rdata <= long(31 downto 0); else s_axil_rdata <= long(63 downto 32); end if;
  if r_error = '1' then s_axil_rdata <= (others => '0'); end if;
  s_axil_rresp <= r_error & '0';
  r_valid <= '1';
end if;
if aresetn = '0' then"""

_RESET = """\
hold <= '0';
ask_clear <= '0';
ask_apply <= '1';
w_ready <= '0';
b_valid <= '0';
r_ready <= '0';
r_valid <= '0';
reading := 0;"""
