"""A VHDL testbench that plays a script of frames and register accesses against a core, with stalls at random on both sides.

In: ``Offload``. Out: the text of the testbench; a ``Script`` that is written to the file it reads; ``parse_results`` and
``parse_reads`` for the files it writes. Files are bytes, so that vectors of any length cost no VHDL. Everything of one
script happens in order; results are taken at the same time by a second process.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import numpy.typing as npt

from kernels.offload import registers as regs
from kernels.offload import types
from kernels.offload.ir import Offload
from kernels.offload.vhdl_core import RESULT_BITS, entity_name

_BEAT, _WRITE, _READ, _POLL, _RESET, _FRAME, _WAIT = 1, 2, 3, 4, 5, 6, 7
_RESULT_BYTES = RESULT_BITS // 8
_RECORD = np.dtype([("value", "<u8"), ("code", "<i8"), ("flags", "<u8"), ("last", "u1"), ("cycle", "<u4")])


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """A beat of the result stream. ``cycle``: clock cycles since the start of the simulation."""

    frame: int
    is_verdict: bool
    broken: bool
    verdict: int
    code: int
    value: int
    last: bool
    cycle: int


class Script:
    """What the testbench does, as bytes."""

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._parts: list[bytes] = []

    def data(self) -> bytes:
        return b"".join(self._parts)

    def frame(self, pixels: npt.NDArray[np.generic]) -> Script:
        """A whole frame, tuser on its first pixel and tlast on its last."""
        flat = np.ascontiguousarray(pixels, dtype=self._offload.dtype).reshape(-1)
        self._parts.append(struct.pack("<BI", _FRAME, flat.size) + flat.astype(flat.dtype.newbyteorder("<")).tobytes())
        return self

    def beat(self, pixel: int, *, first: bool = False, last: bool = False) -> Script:
        self._parts.append(struct.pack("<BBI", _BEAT, first | last << 1, pixel & 0xFFFFFFFF))
        return self

    def write(self, address: int, value: int) -> Script:
        self._parts.append(struct.pack("<BII", _WRITE, address, value & 0xFFFFFFFF))
        return self

    def write_long(self, address: int, value: int) -> Script:
        return self.write(address, value).write(address + 4, value >> 32)

    def read(self, address: int) -> Script:
        self._parts.append(struct.pack("<BI", _READ, address))
        return self

    def read_long(self, address: int) -> Script:
        return self.read(address).read(address + 4)

    def poll(self, address: int, mask: int, value: int) -> Script:
        """Read until the masked bits have this value."""
        self._parts.append(struct.pack("<BIII", _POLL, address, mask, value))
        return self

    def wait(self, cycles: int) -> Script:
        self._parts.append(struct.pack("<BI", _WAIT, cycles))
        return self

    def reset(self) -> Script:
        self._parts.append(struct.pack("<B", _RESET))
        return self

    # -- what a driver does

    def params(self, values: dict[str, int]) -> Script:
        """Write parameters; they count from the next frame that begins."""
        for name, value in values.items():
            self.write_long(regs.param_address(self._offload, name), value)
        return self.write(regs.CONTROL, regs.APPLY_PARAMS)

    def hold(self) -> Script:
        """Begin no further frame, and wait for the end of the one under way."""
        return self.write(regs.CONTROL, regs.HOLD).poll(regs.STATUS, regs.HELD, regs.HELD)

    def read_state(self) -> Script:
        """Every element of every state array, in the order of the kernel; the core must be held."""
        for spec, address in regs.zip_state(self._offload):
            for number in range(regs.elements(spec)):
                self.read_long(address + 8 * number)
        return self


def state_of(offload: Offload, reads: list[tuple[int, int]]) -> dict[str, npt.NDArray[np.generic]]:
    """State arrays from the answers to ``read_state``. ValueError if a read failed."""
    if any(response for _, response in reads):
        raise ValueError("the state could not be read")
    words = np.array([data for data, _ in reads], np.uint32).view(np.uint64)
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    position = 0
    for spec in offload.state:
        size = regs.elements(spec)
        arrays[spec.name] = words[position : position + size].astype(spec.dtype).reshape(spec.shape)
        position += size
    return arrays


def parse_results(data: bytes) -> list[Result]:
    results = []
    for record in np.frombuffer(data, _RECORD):
        flags = int(record["flags"])
        value = int(record["value"])
        unsigned = bool(flags >> 34 & 1)
        results.append(
            Result(
                frame=flags & 0xFFFFFFFF,
                is_verdict=bool(flags >> 32 & 1),
                broken=bool(flags >> 33 & 1),
                verdict=flags >> 40 & 3,
                code=int(record["code"]),
                value=value if unsigned or value < 1 << 63 else value - (1 << 64),
                last=bool(record["last"]),
                cycle=int(record["cycle"]),
            )
        )
    return results


def parse_reads(data: bytes) -> list[tuple[int, int]]:
    """(data, response) of every read; response 0 is OKAY, 2 SLVERR."""
    return [(int(word), int(response)) for word, response in np.frombuffer(data, "<u4").reshape(-1, 2)]


def emit_testbench(offload: Offload) -> str:
    pixel = types.bits(offload.dtype)
    return _TESTBENCH.format(
        core=entity_name(offload),
        pixel=pixel - 1,
        pixel_bytes=pixel // 8,
        address=regs.address_bits(offload) - 1,
        result=RESULT_BITS - 1,
        result_bytes=_RESULT_BYTES,
    )


_TESTBENCH = """\
-- Plays SCRIPT against {core} and writes what comes out. Stalls are 0 (never) to 255 (nearly always).
-- Script records: 1 beat(flags, data) 2 write(address, data) 3 read(address) 4 poll(address, mask, value) 5 reset
-- 6 frame(pixels, data) 7 wait(cycles); numbers are 4 bytes, little-endian, flags one byte (bit 0 tuser, bit 1 tlast).
library ieee;
use ieee.std_logic_1164.all;
use ieee.numeric_std.all;
use ieee.math_real.all;

entity testbench is
  generic (
    SCRIPT : string := "script.bin";
    RESULTS : string := "results.bin";
    READS : string := "reads.bin";
    SEED : positive := 1;
    STALL_IN : natural := 0;
    STALL_OUT : natural := 0;
    CYCLES_MAX : natural := 100000000
  );
end entity;

architecture test of testbench is
  type bytes_t is file of character;
  file results_file : bytes_t;
  signal aclk : std_logic := '0';
  signal aresetn : std_logic := '0';
  signal running : boolean := true;
  signal cycle : natural := 0;
  signal s_axis_tdata : std_logic_vector({pixel} downto 0) := (others => '0');
  signal s_axis_tvalid, s_axis_tready, s_axis_tlast, s_axis_tuser : std_logic := '0';
  signal m_axis_tdata : std_logic_vector({result} downto 0);
  signal m_axis_tvalid, m_axis_tready, m_axis_tlast : std_logic := '0';
  signal awaddr, araddr : std_logic_vector({address} downto 0) := (others => '0');
  signal wdata, rdata : std_logic_vector(31 downto 0) := (others => '0');
  signal awvalid, awready, wvalid, wready, bvalid, bready, arvalid, arready, rvalid, rready : std_logic := '0';
  signal bresp, rresp : std_logic_vector(1 downto 0);
begin
  aclk <= not aclk after 5 ns when running else '0';

  core : entity work.{core}
    port map (
      aclk => aclk, aresetn => aresetn,
      s_axis_tdata => s_axis_tdata, s_axis_tvalid => s_axis_tvalid, s_axis_tready => s_axis_tready,
      s_axis_tlast => s_axis_tlast, s_axis_tuser => s_axis_tuser,
      m_axis_tdata => m_axis_tdata, m_axis_tvalid => m_axis_tvalid, m_axis_tready => m_axis_tready,
      m_axis_tlast => m_axis_tlast,
      s_axil_awaddr => awaddr, s_axil_awvalid => awvalid, s_axil_awready => awready,
      s_axil_wdata => wdata, s_axil_wstrb => "1111", s_axil_wvalid => wvalid, s_axil_wready => wready,
      s_axil_bresp => bresp, s_axil_bvalid => bvalid, s_axil_bready => bready,
      s_axil_araddr => araddr, s_axil_arvalid => arvalid, s_axil_arready => arready,
      s_axil_rdata => rdata, s_axil_rresp => rresp, s_axil_rvalid => rvalid, s_axil_rready => rready
    );

  watchdog : process (aclk)
  begin
    if rising_edge(aclk) then
      cycle <= cycle + 1;
      assert cycle < CYCLES_MAX report "the simulation takes too many cycles" severity failure;
    end if;
  end process;

  stimulus : process
    file script_file : bytes_t open read_mode is SCRIPT;
    file reads_file : bytes_t open write_mode is READS;
    variable seed_1 : positive := SEED;
    variable seed_2 : positive := 4711;
    variable code : character;
    variable a, b, c, d, e : std_logic_vector(31 downto 0);

    procedure get(value : out std_logic_vector; bytes : positive) is
      variable octet : character;
      variable found : std_logic_vector(8 * bytes - 1 downto 0);
    begin
      for i in 0 to bytes - 1 loop
        read(script_file, octet);
        found(8 * i + 7 downto 8 * i) := std_logic_vector(to_unsigned(character'pos(octet), 8));
      end loop;
      value := found;
    end procedure;

    procedure put(value : std_logic_vector(31 downto 0)) is
    begin
      for i in 0 to 3 loop
        write(reads_file, character'val(to_integer(unsigned(value(8 * i + 7 downto 8 * i)))));
      end loop;
    end procedure;

    procedure stall is
      variable chance : real;
    begin
      loop
        exit when STALL_IN = 0;
        uniform(seed_1, seed_2, chance);
        exit when chance * 256.0 >= real(STALL_IN);
        wait until rising_edge(aclk);
      end loop;
    end procedure;

    procedure send(data : std_logic_vector({pixel} downto 0); first, last : std_logic) is
    begin
      stall;
      s_axis_tdata <= data;
      s_axis_tuser <= first;
      s_axis_tlast <= last;
      s_axis_tvalid <= '1';
      loop
        wait until rising_edge(aclk);
        exit when s_axis_tready = '1';
      end loop;
      s_axis_tvalid <= '0';
    end procedure;

    procedure write_register(address, data : std_logic_vector(31 downto 0)) is
    begin
      awaddr <= address(awaddr'range);
      wdata <= data;
      awvalid <= '1';
      wvalid <= '1';
      loop
        wait until rising_edge(aclk);
        exit when awready = '1' and wready = '1';
      end loop;
      awvalid <= '0';
      wvalid <= '0';
      stall;
      bready <= '1';
      loop
        wait until rising_edge(aclk);
        exit when bvalid = '1';
      end loop;
      bready <= '0';
    end procedure;

    procedure read_register(address : std_logic_vector(31 downto 0); data, response : out std_logic_vector(31 downto 0)) is
    begin
      araddr <= address(araddr'range);
      arvalid <= '1';
      loop
        wait until rising_edge(aclk);
        exit when arready = '1';
      end loop;
      arvalid <= '0';
      stall;
      rready <= '1';
      loop
        wait until rising_edge(aclk);
        exit when rvalid = '1';
      end loop;
      data := rdata;
      response := (others => '0');
      response(1 downto 0) := rresp;
      rready <= '0';
    end procedure;

    procedure send_frame(pixels : natural) is
      variable pixel : std_logic_vector({pixel} downto 0);
      variable first, last : std_logic;
    begin
      for i in 1 to pixels loop
        get(pixel, {pixel_bytes});
        first := '0';
        last := '0';
        if i = 1 then first := '1'; end if;
        if i = pixels then last := '1'; end if;
        send(pixel, first, last);
      end loop;
    end procedure;
  begin
    file_open(results_file, RESULTS, write_mode);
    for i in 1 to 4 loop
      wait until rising_edge(aclk);
    end loop;
    aresetn <= '1';
    while not endfile(script_file) loop
      read(script_file, code);
      case character'pos(code) is
        when 1 =>
          get(a(7 downto 0), 1);
          get(b, 4);
          send(b({pixel} downto 0), a(0), a(1));
        when 2 =>
          get(a, 4);
          get(b, 4);
          write_register(a, b);
        when 3 =>
          get(a, 4);
          read_register(a, b, c);
          put(b);
          put(c);
        when 4 =>
          get(a, 4);
          get(b, 4);
          get(c, 4);
          loop
            read_register(a, d, e);
            exit when (d and b) = c;
          end loop;
        when 5 =>
          aresetn <= '0';
          wait until rising_edge(aclk);
          wait until rising_edge(aclk);
          aresetn <= '1';
        when 6 =>
          get(a, 4);
          send_frame(to_integer(unsigned(a)));
        when 7 =>
          get(a, 4);
          for i in 1 to to_integer(unsigned(a)) loop
            wait until rising_edge(aclk);
          end loop;
        when others =>
          report "an unknown record in the script" severity failure;
      end case;
    end loop;
    for i in 1 to 4 loop
      wait until rising_edge(aclk);
    end loop;
    running <= false;
    file_close(results_file);
    file_close(reads_file);
    wait;
  end process;

  sink : process
    variable seed_1 : positive := SEED + 1;
    variable seed_2 : positive := 815;
    variable chance : real;
    variable now : unsigned(31 downto 0);
  begin
    wait until rising_edge(aclk);
    if m_axis_tvalid = '1' and m_axis_tready = '1' then
      for i in 0 to {result_bytes} - 1 loop
        write(results_file, character'val(to_integer(unsigned(m_axis_tdata(8 * i + 7 downto 8 * i)))));
      end loop;
      if m_axis_tlast = '1' then write(results_file, character'val(1)); else write(results_file, character'val(0)); end if;
      now := to_unsigned(cycle, 32);
      for i in 0 to 3 loop
        write(results_file, character'val(to_integer(now(8 * i + 7 downto 8 * i))));
      end loop;
    end if;
    uniform(seed_1, seed_2, chance);
    if STALL_OUT = 0 or chance * 256.0 >= real(STALL_OUT) then m_axis_tready <= '1'; else m_axis_tready <= '0'; end if;
  end process;
end architecture;
"""
