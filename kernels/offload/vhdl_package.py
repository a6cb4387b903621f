"""The VHDL package that every core carries: a handful of functions over ``signed``."""

from __future__ import annotations

PACKAGE = """\
library ieee;
use ieee.std_logic_1164.all;
use ieee.numeric_std.all;

package hiss_offload is
  -- The low bits; extended by the sign where more are asked for.
  function fit(value : signed; bits : positive) return signed;
  function smin(a, b : signed) return signed;
  function smax(a, b : signed) return signed;
  function pick(test : boolean; yes, no : signed) return signed;
  function b2s(value : boolean) return signed;
end package;

package body hiss_offload is
  function fit(value : signed; bits : positive) return signed is
    constant given : signed(value'length - 1 downto 0) := value;
  begin
    if bits <= given'length then
      return given(bits - 1 downto 0);
    end if;
    return resize(given, bits);
  end function;

  function smin(a, b : signed) return signed is
  begin
    if a < b then
      return a;
    end if;
    return b;
  end function;

  function smax(a, b : signed) return signed is
  begin
    if a > b then
      return a;
    end if;
    return b;
  end function;

  function pick(test : boolean; yes, no : signed) return signed is
  begin
    if test then
      return yes;
    end if;
    return no;
  end function;

  function b2s(value : boolean) return signed is
  begin
    if value then
      return "01";
    end if;
    return "00";
  end function;
end package body;
"""
