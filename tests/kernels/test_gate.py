"""The gate: what it admits, what it reads, and that it names the line of what it refuses.

In refused sources, the comment ``# <-`` marks the line that the message must name.
"""

from __future__ import annotations

import ast
import hashlib

import pytest

from ingest.ports import KernelRefused
from kernels import gate
from kernels.contract import ParamSpec, StateSpec, resolve_params
from kernels.gate import admit

HEAD = "def frame(frame, params, state, index, out, feedback):\n"

HITS = '''"""Hit finder."""
import math

import numpy as np
from hiss import DROP, KEEP, emit

BINS = 4 * 1024
EDGES = (0.5, -1, 2**10)
PARAMS = {"low": ("uint16", 12), "scale": ("f4", 1 / 2), "min_pixels": ("int64", BINS // 100)}
STATE = {
    "hits": ("int64", (1,), "sum"),
    "histogram": ("<u4", (BINS,), "sum"),
    "peak": ("float64", (2, 3), "max"),
    "flags": ("uint8", (8,), "or"),
}
OUT = None
ROWS = None


def weigh(value, params):
    """Helpers may have docstrings."""
    if value < params.low:
        return 0.0
    return math.sqrt(value) * params.scale


def frame(frame, params, state, index, out, feedback):
    n = 0
    total = np.float64(0)
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = frame[y, x]
            n += value >= params.low
            total += weigh(value, params)
            state.histogram[min(value, BINS - 1)] += 1
    state.hits[0] += n >= params.min_pixels
    state.peak[0, 1:] = max(state.peak[0, 1], total)
    rows, columns = frame.shape
    while rows > 1 and not columns == 0:
        rows //= 2
        if rows == 3:
            continue
        else:
            pass
    first = frame[:, 0].astype(np.int64).sum()
    emit(feedback, 1, n)
    emit(feedback, 2, first if index > 0 else -1)
    if n >= params.min_pixels:
        return KEEP
    else:
        return DROP
'''


def body(*lines: str, before: str = "") -> str:
    return before + HEAD + "".join(f"    {line}\n" for line in lines)


def refusal(source: str | bytes, name: str = "k") -> KernelRefused:
    with pytest.raises(KernelRefused) as caught:
        admit(name, source.encode() if isinstance(source, str) else source)
    return caught.value


def test_reads_declarations() -> None:
    kernel = admit("hits", HITS.encode())
    assert kernel.name == "hits"
    assert kernel.source == HITS
    assert kernel.sha256 == hashlib.sha256(HITS.encode()).hexdigest()
    assert kernel.params == (
        ParamSpec("low", "uint16", 12),
        ParamSpec("scale", "float32", 0.5),
        ParamSpec("min_pixels", "int64", 40),
    )
    assert kernel.state == (
        StateSpec("hits", "int64", (1,), "sum"),
        StateSpec("histogram", "uint32", (4096,), "sum"),
        StateSpec("peak", "float64", (2, 3), "max"),
        StateSpec("flags", "uint8", (8,), "or"),
    )


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_line_ends_of_other_systems(ending: str) -> None:
    kernel = admit("hits", HITS.replace("\n", ending).encode())
    assert kernel.source == HITS


def test_a_byte_order_mark_is_no_part_of_the_source() -> None:
    assert admit("hits", b"\xef\xbb\xbf" + HITS.encode()).source == HITS


def test_nothing_needs_to_be_declared_or_imported() -> None:
    kernel = admit("k", body("return KEEP").encode())
    assert (kernel.params, kernel.state) == ((), ())


def test_a_long_flat_table_is_a_constant() -> None:
    table = ", ".join(str(n) for n in range(256))
    admit("k", body("return KEEP if TABLE[index % 256] > 3 else DROP", before=f"TABLE = ({table})\n").encode())


REFUSED = {
    "no frame": ("X = 1\n", "there is no function frame"),
    "open": (body('f = open("/etc/passwd")  # <-', "return KEEP"), "open() is not a function"),
    "eval": (body('eval("1")  # <-', "return KEEP"), "eval() is not a function"),
    "import os": ("import os  # <-\n" + body("return KEEP"), "imports allowed"),
    "import as": ("import numpy  # <-\n" + body("return KEEP"), "imports allowed"),
    "from numpy": ("from numpy.lib import stride_tricks  # <-\n" + body("return KEEP"), "imports allowed"),
    "import inside": (body("import os  # <-", "return KEEP"), "`import` is not allowed"),
    "STOP": (body("if index > 3:", "    return STOP  # <-", "return KEEP"), "STOP is not supported yet"),
    "REPLACE imported": ("from hiss import REPLACE  # <-\n" + body("return KEEP"), "REPLACE is not supported yet"),
    "OUT": ('OUT = ("same", "same")  # <-\n' + body("return KEEP"), "OUT"),
    "ROWS": ('ROWS = {"x": "float32"}  # <-\n' + body("return KEEP"), "ROWS"),
    "ORDERED": ("ORDERED = True  # <-\n" + body("return KEEP"), "ORDERED is not supported yet"),
    "finish": ("def finish(state, params):  # <-\n    return 1\n" + body("return KEEP"), "finish() is not supported"),
    "out used": (body("out[0, 0] = 1  # <-", "return KEEP"), "out) are not supported yet"),
    "decorator": ("@print  # <-\n" + body("return KEEP"), "decorators"),
    "class": ("class A:  # <-\n    pass\n" + body("return KEEP"), "a class is not allowed"),
    "closure": (body("def inner():  # <-", "    return 1", "return KEEP"), "a function inside a function"),
    "lambda": (body("f = lambda: 1  # <-", "return KEEP"), "`lambda` is not allowed"),
    "comprehension": (body("f = [x for x in frame]  # <-", "return KEEP"), "a comprehension"),
    "f-string": (body('f = f"{index}"  # <-', "return KEEP"), "an f-string"),
    "string": (body('f = "x"  # <-', "return KEEP"), "str constants"),
    "list": (body("f = [1, 2]  # <-", "return KEEP"), "a list"),
    "try": (body("try:  # <-", "    n = 1", "finally:", "    n = 2", "return KEEP"), "`try`"),
    "with": (body("with objmode():  # <-", "    n = 1", "return KEEP"), "`with`"),
    "raise": (body("raise ValueError  # <-"), "`raise`"),
    "global": (body("global N  # <-", "return KEEP"), "`global`"),
    "walrus": (body("if (n := 2) > 1:  # <-", "    return KEEP", "return DROP"), "`:=`"),
    "annotation": (body("n: int = 1  # <-", "return KEEP"), "a type annotation"),
    "annotated argument": ("def h(a: int):  # <-\n    return a\n" + body("return KEEP"), "type annotations"),
    "matmul": (body("n = frame @ frame  # <-", "return KEEP"), "`@`"),
    "dunder attribute": (body("n = frame.__class__  # <-", "return KEEP"), ".__class__ is not available"),
    "dunder name": (body("n = __builtins__  # <-", "return KEEP"), "unknown name '__builtins__'"),
    "ctypes": (body("n = frame.ctypes  # <-", "return KEEP"), ".ctypes is not available"),
    "np.lib": (body("n = np.lib.stride_tricks.as_strided(frame, (9, 9))  # <-", "return KEEP"), "as_strided"),
    "np.load": (body('n = np.load("x")  # <-', "return KEEP"), "np.load() is not available"),
    "np.frombuffer": (body("n = np.frombuffer(frame)  # <-", "return KEEP"), "np.frombuffer() is not available"),
    "np alone": (body("n = np  # <-", "return KEEP"), "'np' is not a value"),
    "tofile": (body("frame.tofile(3)  # <-", "return KEEP"), ".tofile() is not available"),
    "unknown name": (body("n = thresold + 1  # <-", "return KEEP"), "unknown name 'thresold'"),
    "unknown parameter": (
        'PARAMS = {"low": ("uint16", 12)}\n' + body("n = params.lwo  # <-", "return KEEP"),
        "params.lwo is not in PARAMS (declared: low)",
    ),
    "unknown state": (body("state.hits[0] += 1  # <-", "return KEEP"), "state.hits is not in STATE (declared: none)"),
    "replaced state": (
        'STATE = {"hits": ("int64", (1,), "sum")}\n' + body("state.hits = 1  # <-", "return KEEP"),
        "cannot be replaced",
    ),
    "params assigned": (body("params = 1  # <-", "return KEEP"), "'params' cannot be assigned to"),
    "hidden builtin": (body("min = 3  # <-", "return KEEP"), "would hide"),
    "hidden verdict": (body("KEEP = 3  # <-", "return KEEP"), "would hide"),
    "state as value": (body("n = state  # <-", "return KEEP"), "'state' alone is not a value"),
    "feedback elsewhere": (body("emit(frame, 1, 2)  # <-", "return KEEP"), "the call is emit(feedback"),
    "emit arguments": (body("emit(feedback, 2)  # <-", "return KEEP"), "the call is emit(feedback"),
    "recursion": (
        "def h(n):\n    return h(n - 1)  # <-\n" + body("return KEEP"),
        "h() calls itself",
    ),
    "recursion in a circle": (
        "def a(n):\n    return b(n)\n\n\ndef b(n):\n    return a(n)  # <-\n" + body("return KEEP"),
        "a() calls itself",
    ),
    "helper arguments": ("def h(n):\n    return n\n" + body("n = h(1, 2)  # <-", "return KEEP"), "takes 1 arguments"),
    "renamed state": (
        "def h(s):\n    return 1\n" + body("n = h(state)  # <-", "return KEEP"),
        "hand state on as an argument named 'state'",
    ),
    "defaults": ("def h(n=1):  # <-\n    return n\n" + body("return KEEP"), "plain arguments only"),
    "star": ("def h(*n):  # <-\n    return n\n" + body("return KEEP"), "plain arguments only"),
    "signature": ("def frame(image, params):  # <-\n    return 1\n", "the signature is frame(frame, params,"),
    "no verdict": (body("n = 1  # <-"), "must end with"),
    "verdict on one path": (body("if index > 1:  # <-", "    return KEEP"), "must end with"),
    "empty return": (body("if index > 1:", "    return  # <-", "return KEEP"), "frame() returns KEEP or DROP"),
    "no effect": (body("index + 1  # <-", "return KEEP"), "no effect"),
    "twice": ("A = 1\nA = 2  # <-\n" + body("return KEEP"), "'A' is defined twice"),
    "code outside": ("for i in range(3):  # <-\n    pass\n" + body("return KEEP"), "outside functions"),
    "call outside": ("A = print(1)  # <-\n" + body("return KEEP"), "a constant is a number"),
    "huge constant": ("A = 9**9**9  # <-\n" + body("return KEEP"), "constant"),
    "huge shift": ("A = 1 << 900  # <-\n" + body("return KEEP"), "64 bits"),
    "division by zero": ("A = 1 // 0  # <-\n" + body("return KEEP"), "cannot be computed"),
    "complex power": ("A = (0 - 8) ** 0.5  # <-\n" + body("return KEEP"), "cannot be computed"),
    "huge integer": (body(f"n = {1 << 70}  # <-", "return KEEP"), "64 bits"),
    "big table": (f"A = ({'1, ' * 300})  # <-\n" + body("return KEEP"), "256 entries"),
    "bad dtype": ('PARAMS = {\n    "low": ("string", 1),  # <-\n}\n' + body("return KEEP"), "a dtype is one of"),
    "big-endian": ('PARAMS = {"low": (">u2", 1)}  # <-\n' + body("return KEEP"), "a dtype is one of"),
    "default too large": ('PARAMS = {"low": ("uint8", 256)}  # <-\n' + body("return KEEP"), "not a value of uint8"),
    "float default": ('PARAMS = {"low": ("uint8", 1.5)}  # <-\n' + body("return KEEP"), "not a value of uint8"),
    "parameter name": ('PARAMS = {"_low": ("uint8", 1)}  # <-\n' + body("return KEEP"), "not a plain name"),
    "keyword as name": ('PARAMS = {"def": ("uint8", 1)}  # <-\n' + body("return KEEP"), "not a plain name"),
    "state too large": (
        'STATE = {"a": ("int64", (4096, 4096), "sum")}  # <-\n' + body("return KEEP"),
        "more than 64 MiB",
    ),
    "empty state": ('STATE = {"a": ("int64", (0,), "sum")}  # <-\n' + body("return KEEP"), "not a size"),
    "shape not a tuple": ('STATE = {"a": ("int64", 5, "sum")}  # <-\n' + body("return KEEP"), "the shape is a tuple"),
    "merge": ('STATE = {"a": ("int64", (1,), "mean")}  # <-\n' + body("return KEEP"), "merges by one of"),
    "float or": ('STATE = {"a": ("float32", (1,), "or")}  # <-\n' + body("return KEEP"), "'or' merges integers"),
    "syntax": (body("n = = 1  # <-", "return KEEP"), "syntax error"),
    "indentation": ("def frame(frame, params, state, index, out, feedback):\nreturn 1  # <-\n", "syntax error"),
    "unclosed": ("X = (1,  # <-\n", "syntax error"),
}


@pytest.mark.parametrize(("source", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_at_the_line(source: str, reason: str) -> None:
    refused = refusal(source, "hits")
    assert reason in refused.reason
    assert refused.file == "hits.py"
    marked = [number for number, line in enumerate(source.splitlines(), 1) if "# <-" in line]
    assert refused.line == (marked[0] if marked else 1)
    assert str(refused) == f"hits.py:{refused.line}: {refused.reason}"


@pytest.mark.parametrize("name", ["", "1st", "a/b", "../x", "a b", "é", "x" * 65])
def test_refuses_names(name: str) -> None:
    assert "a kernel's name" in refusal(body("return KEEP"), name).reason


FLOODS = {
    "size": b"# " + b"x" * gate.MAX_SOURCE_BYTES,
    "statements": body(*["n = 1"] * 299, "return KEEP").encode() + b"X = 1\n" * 3,
    "lines": b"X = 1\n" * 8000,
    "brackets": b"X = " + b"(" * 5000,
    "unary": b"X = " + b"-" * 60_000 + b"1",
    "unary, below the limit": b"X = " + b"-" * 590 + b"1",
    "sum": b"X = " + b"1+" * 30_000 + b"1",
    "sum, below the limit": body("n = " + "+".join(["index"] * 290), "return KEEP").encode() + b"a.b" + b".c" * 290,
    "attributes": b"a" + b".b" * 30_000,
    "elif": b"if 1:\n 1\n" + b"elif 1:1\n" * 5000,
    "elif, below the limit": b"if 1:\n 1\n" + b"elif 1:1\n" * 280,
    "indents": b"".join(b" " * depth + b"if 1:\n" for depth in range(95)),
    "continued": b"X = 1 " + b"\\\n + 1 " * 8000,
    "digits": b"X = " + b"9" * 60_000,
    "hex digits": b"X = 0x" + b"f" * 60_000,
    "nul": b"X = 1\x00\n",
    "not utf-8": b"\xff\xfe",
    "latin-1 declared": b"# -*- coding: latin-1 -*-\n# \xe9\n",
}


@pytest.mark.parametrize("source", FLOODS.values(), ids=FLOODS)
def test_floods_are_refused_quickly(source: bytes) -> None:
    refusal(source)


def test_statement_limit_names_a_line_within_the_file() -> None:
    source = body(*["n = 1"] * 400, "return KEEP")
    assert 1 <= refusal(source).line <= source.count("\n")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"lwo": 1}, "'lwo' is not in PARAMS (declared: low, scale, min_pixels)"),
        ({"low": -1}, "-1 is not a value of uint16"),
        ({"low": 1.0}, "1.0 is not a value of uint16"),
        ({"low": True}, "True is not a value of uint16"),
        ({"scale": 1e300}, "1e+300 is not a value of float32"),
        ({"scale": "x"}, "'x' is not a value of float32"),
    ],
)
def test_parameters_given_are_checked(given: dict[str, int | float], reason: str) -> None:
    with pytest.raises(KernelRefused, match=r"hits\.py:1: ") as caught:
        resolve_params(admit("hits", HITS.encode()), given)
    assert reason in caught.value.reason


def test_parameters_given_replace_defaults() -> None:
    values = resolve_params(admit("hits", HITS.encode()), {"low": 3, "scale": 2})
    assert values == {"low": 3, "scale": 2, "min_pixels": 40}


def test_every_construct_has_a_name() -> None:
    """What a message calls a construct is a word, not a class of Python's ast module."""
    from kernels.violation import quoted

    for kind in (ast.Try, ast.With, ast.Raise, ast.ClassDef, ast.Lambda, ast.ListComp, ast.JoinedStr, ast.Global):
        assert quoted(kind()) != kind.__name__
