"""The register file of a core: which address holds what. One table, for the VHDL, the testbench, the driver and the README.

AXI4-Lite, words of 32 bits; a value of 64 bits is two words, the low one first. Parameters, state elements and feedback are
64 bits each, extended by their sign.
"""

from __future__ import annotations

import dataclasses
import math

from kernels.contract import StateSpec
from kernels.offload.ir import Offload

MAGIC = 0x48495353
"""``HISS``."""
CORE_VERSION = 1

ID, CORE, SOURCE, CONTROL, STATUS, FRAMES, BROKEN, VERDICT = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x1C
HEIGHT, WIDTH, PIXEL, NEXT_FRAME = 0x20, 0x24, 0x28, 0x30
EMITTED, LAST_CODE, LAST_VALUE = 0x38, 0x40, 0x48
PARAMS = 0x100
STATE = 0x1000

HOLD, CLEAR_STATE, APPLY_PARAMS, CLEAR_ERRORS = 1 << 0, 1 << 1, 1 << 2, 1 << 3
BUSY, HELD, CLEARING, APPLYING = 1 << 0, 1 << 1, 1 << 2, 1 << 3
EARLY, LATE, UNSTARTED, TAINTED = 1 << 8, 1 << 9, 1 << 10, 1 << 11


@dataclasses.dataclass(frozen=True, slots=True)
class Register:
    """``access``: r, w or rw. ``bytes``: what it covers."""

    name: str
    address: int
    size_bytes: int
    access: str
    text: str


FIXED = (
    Register("ID", ID, 4, "r", f"0x{MAGIC:08X}"),
    Register("CORE", CORE, 4, "r", f"version of this register map: {CORE_VERSION}"),
    Register("SOURCE", SOURCE, 4, "r", "first 32 bits of the SHA-256 of the kernel's file"),
    Register(
        "CONTROL",
        CONTROL,
        4,
        "rw",
        "bit 0 hold: begin no further frame; bit 1 clear the state, bit 2 apply the parameters written so far, both between "
        "frames; bit 3 clear the error bits. Bits 1 to 3 clear themselves",
    ),
    Register(
        "STATUS",
        STATUS,
        4,
        "r",
        "bit 0 in a frame; bit 1 held: the state can be read; bit 2 clearing; bit 3 parameters wait to be applied; bit 8 "
        "tlast came early, or a frame began within a frame; bit 9 tlast came late; bit 10 a frame did not begin with tuser; "
        "bit 11 the state has counted part of a broken frame: clear it. Bits 8 to 11 stay until cleared",
    ),
    Register("FRAMES", FRAMES, 4, "r", "frames that got a verdict, modulo 2^32"),
    Register("BROKEN", BROKEN, 4, "r", "frames that were broken and got none, modulo 2^32"),
    Register("VERDICT", VERDICT, 4, "r", "of the last frame: 0 drop, 1 keep, 3 stop"),
    Register("HEIGHT", HEIGHT, 4, "r", "rows of a frame"),
    Register("WIDTH", WIDTH, 4, "r", "pixels of a row"),
    Register("PIXEL", PIXEL, 4, "r", "bits of a pixel; bit 8 set: signed"),
    Register(
        "NEXT_FRAME", NEXT_FRAME, 8, "rw", "number of the next frame (argument index); write while held; counts up"
    ),
    Register("EMITTED", EMITTED, 4, "r", "feedback values emitted, modulo 2^32"),
    Register("LAST_CODE", LAST_CODE, 8, "r", "code of the last one"),
    Register("LAST_VALUE", LAST_VALUE, 8, "r", "value of the last one"),
)


def param_address(offload: Offload, name: str) -> int:
    return PARAMS + 8 * [spec.name for spec in offload.kernel.params].index(name)


def elements(spec: StateSpec) -> int:
    return math.prod(spec.shape)


def window_bits(spec: StateSpec) -> int:
    """Address bits of one state array: its window is a power of two, at a multiple of itself."""
    return 3 + (elements(spec) - 1).bit_length()


def state_addresses(offload: Offload) -> dict[str, int]:
    addresses: dict[str, int] = {}
    address = STATE
    # Largest first: no window needs padding.
    for spec in sorted(offload.state, key=lambda spec: (-window_bits(spec), spec.name)):
        size = 1 << window_bits(spec)
        address = -(-address // size) * size
        addresses[spec.name] = address
        address += size
    return addresses


def address_bits(offload: Offload) -> int:
    ends = [address + (1 << window_bits(spec)) for spec, address in zip_state(offload)]
    return (max([STATE, *ends]) - 1).bit_length()


def zip_state(offload: Offload) -> list[tuple[StateSpec, int]]:
    addresses = state_addresses(offload)
    return [(spec, addresses[spec.name]) for spec in offload.state]


def register_map(offload: Offload) -> list[Register]:
    """Everything, by address."""
    params = [
        Register(
            f"params.{spec.name}",
            PARAMS + 8 * number,
            8,
            "rw",
            f"{spec.dtype}, {spec.default} after reset; see CONTROL bit 2",
        )
        for number, spec in enumerate(offload.kernel.params)
    ]
    states = [
        Register(
            f"state.{spec.name}",
            address,
            8 * elements(spec),
            "r",
            f"{spec.dtype}{list(spec.shape)}, merges by {spec.merge}; 8 bytes an element, C order"
            + ("" if spec in offload.registers else "; readable while held"),
        )
        for spec, address in zip_state(offload)
    ]
    return sorted([*FIXED, *params, *states], key=lambda register: register.address)
