"""What the library promises of every kernel: it passes the gate, says what it is, and can be changed where it should be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kernels import library
from kernels.contract import MAX_STATE_BYTES
from kernels.gate import admit


@pytest.mark.parametrize("name", library.names())
def test_admitted_and_described(name: str) -> None:
    kernel = admit(name, library.source(name))
    description = library.describe(name)
    assert "\n\n" in description, "a summary, a blank line, the rest"
    assert 20 < len(library.summary(name)) < 120
    assert "Computes" in description
    assert "Source: " in description
    assert "Verdict: " in description
    for declared in (*kernel.params, *kernel.arrays, *kernel.state):
        assert f"``{declared.name}``" in description, f"{declared.name} is not explained"
    for field, _ in kernel.rows.fields if kernel.rows else ():
        assert f"``{field}``" in description, f"{field} is not explained"
    assert sum(spec.size_bytes for spec in kernel.state) <= MAX_STATE_BYTES


def test_every_file_is_a_kernel_and_in_the_guide() -> None:
    guide = (Path(library.__file__).parents[2] / "docs" / "KERNELS.md").read_text()
    assert len(library.names()) >= 19
    for name in library.names():
        assert f"`{name}`" in guide, f"docs/KERNELS.md does not list {name}"


def test_constants_are_changed_where_they_stand() -> None:
    source = library.source("rebin", HEIGHT=64, MOST=255)
    constants = {
        node.targets[0].id: node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert constants == {"HEIGHT": 64, "WIDTH": 487, "N": 2, "MOST": 255}
    out = admit("rebin", source).out
    assert out is not None
    assert out.shape == (32, 243)
    assert library.constants("rebin") == {"HEIGHT": 195, "WIDTH": 487, "N": 2, "MOST": 65535}


def test_a_comment_behind_a_constant_stays() -> None:
    assert b"STEPS = 32  # of an ADU" in library.source("photon_count", STEPS=32)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match=r"no kernel 'peaks'.*azimuthal"):
        library.source("peaks")
    with pytest.raises(KeyError, match=r"azimuthal has no constant STATE.*BINS"):
        library.source("azimuthal", STATE=1)
    with pytest.raises(KeyError):
        library.path("../gate")


OFFLOADED = ("threshold", "total", "histogram", "roi", "saturation_guard", "window3x3")


@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_says_that_it_runs_on_an_fpga_and_does(name: str, dtype: str) -> None:
    from kernels.offload.build import build

    assert "Runs on an FPGA" in " ".join(library.describe(name).split())
    build(admit(name, library.source(name)), dtype, (195, 487))


def test_nobody_else_says_so() -> None:
    says = [name for name in library.names() if "FPGA as well" in " ".join(library.describe(name).split())]
    assert sorted(says) == sorted(OFFLOADED)


@pytest.mark.parametrize("name", library.names())
def test_makes_no_arrays_in_frame(name: str) -> None:
    """A kernel that makes none is compiled once, and without reference counts (kernels/calls.py)."""
    makers = ("empty", "zeros", "ones", "full", "copy", "where", "arange", "astype", "ravel", "flatten")
    calls = [node.func.attr for node in ast.walk(ast.parse(library.source(name))) if _is_method(node)]
    assert not set(calls) & set(makers)


def _is_method(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
