"""The same kernel on an FPGA: a typed integer form of ``frame()``, made from its syntax tree, and what is made from that.

Upstream: an admitted kernel (kernels/gate.py) and the layout of its frames. Downstream: numba source that runs at rate in
the ordinary sandbox (the *model*), VHDL-2008 with AXI4-Stream ports, a testbench, estimates, a folder to take away.

- types, domain, ir, loops, walk, operators, values, statements, build: syntax tree → IR, or ``Refusal`` with line and reason;
- emit_numba: IR → numba source; vhdl_*, registers: IR → VHDL; testbench, ghdl: simulation; yosys: estimates; folder: all of it;
- device, verify: devices as the host sees them, and the comparison of sampled frames with the plain kernel.

What always holds: the IR's values are exact integers; a wrap is a node of its own, and is left out only where an interval
proves that nothing can overflow. So model, VHDL and plain kernel agree bit by bit, or the kernel is refused.
"""
