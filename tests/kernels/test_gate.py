"""The gate: what it admits, what it reads, and that it names the line of what it refuses.

In refused sources, the comment ``# <-`` marks the line that the message must name.
"""

from __future__ import annotations

import ast
import hashlib

import pytest

from ingest.ports import KernelRefused
from kernels import gate
from kernels import literals as gate_literals
from kernels.contract import ArraySpec, OutSpec, ParamSpec, RowsSpec, StateSpec, resolve_params
from kernels.gate import admit

HEAD = "def frame(frame, params, state, index, out, feedback):\n"

HITS = '''"""Hit finder."""
import math

import numpy as np
from hiss import DROP, KEEP, REPLACE, STOP, append, emit

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
    assert (kernel.params, kernel.state, kernel.arrays) == ((), (), ())
    assert (kernel.out, kernel.rows, kernel.ordered, kernel.has_finish) == (None, None, False, False)


def test_a_long_table_is_a_constant() -> None:
    table = ", ".join(str(n) for n in range(gate_literals.MAX_TABLE_ENTRIES))
    admit("k", body("return KEEP if TABLE[index % 256] > 3 else DROP", before=f"TABLE = ({table})\n").encode())


def test_a_table_of_rows_is_a_constant() -> None:
    table = "TABLE = (\n    (1, 2, 1),\n    (2, 4, -2),\n)\n"
    admit("k", body("return KEEP if TABLE[index % 2][1] > 3 else DROP", before=table).encode())


WHOLE = '''
import numpy as np
from hiss import DROP, KEEP, REPLACE, STOP, append, emit

SHAPE = (195, 487)
PARAMS = {
    "low": ("uint16", 12),
    "mask": ("uint8", "frame"),
    "flat": ("float32", SHAPE),
    "table": ("<i4", (-1, 2 * 2)),
}
STATE = {"n": ("int64", (1,), "sum"), "mean": ("float64", SHAPE, "sum")}
OUT = ("float32", "same")
ROWS = {"x": "float32", "y": "<f4", "id": "uint32"}
ROWS_MAX = 2 * 16
ORDERED = True


def correct(value, y, x, params, out):
    """``out`` is an argument like any other here."""
    out[y, x] = value * params.flat[y, x]
    return out[y, x]


def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if params.mask[y, x] == 0 and correct(frame[y, x], y, x, params, out) > params.low:
                append(feedback, x, y, params.table[0, 1])
                state.n[0] += 1
    if state.n[0] > 1000:
        return STOP
    return REPLACE


def finish(state, params):
    if state.n[0] == 0:
        return
    state.mean[:] = state.mean / state.n[0]
'''


def test_reads_the_whole_language() -> None:
    kernel = admit("whole", WHOLE.encode())
    assert kernel.params == (ParamSpec("low", "uint16", 12),)
    assert kernel.arrays == (
        ArraySpec("mask", "uint8", None),
        ArraySpec("flat", "float32", (195, 487)),
        ArraySpec("table", "int32", (-1, 4)),
    )
    assert kernel.out == OutSpec("float32", None)
    assert kernel.rows == RowsSpec((("x", "float32"), ("y", "float32"), ("id", "uint32")), 32)
    assert kernel.rows.dtype.names == ("frame", "x", "y", "id")
    assert kernel.rows.dtype.itemsize == 8 + 3 * 4
    assert kernel.ordered
    assert kernel.has_finish
    assert kernel.state[1].shape == (195, 487)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("None", None),
        ('("same", "same")', OutSpec(None, None)),
        ('("uint8", "same")', OutSpec("uint8", None)),
        ('("<u4", (128, 64))', OutSpec("uint32", (128, 64))),
    ],
)
def test_forms_of_out(declared: str, expected: OutSpec | None) -> None:
    assert admit("k", body("return KEEP", before=f"OUT = {declared}\n").encode()).out == expected


def test_rows_have_a_default_limit() -> None:
    rows = admit("k", body("return KEEP", before='ROWS = {"x": "float32"}\nORDERED = False\n').encode()).rows
    assert rows == RowsSpec((("x", "float32"),), 256)


REFUSED = {
    "no frame": ("X = 1\n", "there is no function frame"),
    "open": (body('f = open("/etc/passwd")  # <-', "return KEEP"), "open() is not a function"),
    "eval": (body('eval("1")  # <-', "return KEEP"), "eval() is not a function"),
    "import os": ("import os  # <-\n" + body("return KEEP"), "imports allowed"),
    "import as": ("import numpy  # <-\n" + body("return KEEP"), "imports allowed"),
    "from numpy": ("from numpy.lib import stride_tricks  # <-\n" + body("return KEEP"), "imports allowed"),
    "import inside": (body("import os  # <-", "return KEEP"), "`import` is not allowed"),
    "REPLACE without OUT": (body("if index > 3:", "    return REPLACE  # <-", "return KEEP"), "OUT is not declared"),
    "REPLACE where OUT is None": ("OUT = None\n" + body("return REPLACE  # <-"), "OUT is not declared"),
    "import of another name": ("from hiss import keep  # <-\n" + body("return KEEP"), "from hiss import KEEP, DROP"),
    "renamed import": ("from hiss import KEEP as K  # <-\n" + body("return KEEP"), "imports allowed"),
    "OUT with a shape only": ('OUT = ("same", (4, 4))  # <-\n' + body("return KEEP"), "names its dtype"),
    "OUT of one": ('OUT = "same"  # <-\n' + body("return KEEP"), 'OUT is None, ("same", "same")'),
    "OUT dtype": ('OUT = ("int", "same")  # <-\n' + body("return KEEP"), 'as a string, or "same"'),
    "OUT as the frame": ('OUT = ("uint8", "frame")  # <-\n' + body("return KEEP"), 'OUT is None, ("same", "same")'),
    "OUT shape": ('OUT = ("uint8", (4, 0))  # <-\n' + body("return KEEP"), "OUT: 0 is not a size"),
    "OUT size": ('OUT = ("uint8", (1 << 15, 1 << 15))  # <-\n' + body("return KEEP"), "more than 256 MiB"),
    "out without OUT": (body("out[0, 0] = 1  # <-", "return KEEP"), "OUT is not declared"),
    "out handed on without OUT": (
        "def h(out):\n    return out[0]\n" + body("n = h(out)  # <-", "return KEEP"),
        "OUT is not declared",
    ),
    "out replaced": (
        'OUT = ("same", "same")\n' + body("out = frame  # <-", "return REPLACE"),
        "assign to its elements, out[...]",
    ),
    "ROWS dtype": ('ROWS = {\n    "x": "float",  # <-\n}\n' + body("return KEEP"), "a dtype is one of"),
    "ROWS with a column frame": ('ROWS = {"frame": "int64"}  # <-\n' + body("return KEEP"), "'frame' already"),
    "ROWS empty": ("ROWS = {}  # <-\n" + body("return KEEP"), "ROWS has 1 to 32 fields"),
    "ROWS a tuple": ('ROWS = ("x", "y")  # <-\n' + body("return KEEP"), "ROWS is a dict"),
    "ROWS_MAX without ROWS": ("ROWS_MAX = 9  # <-\n" + body("return KEEP"), "ROWS_MAX needs ROWS"),
    "ROWS_MAX too many": ('ROWS_MAX = 5000  # <-\nROWS = {"x": "u1"}\n' + body("return KEEP"), "from 1 to 4096"),
    "ROWS_MAX a float": ('ROWS_MAX = 2.0  # <-\nROWS = {"x": "u1"}\n' + body("return KEEP"), "a whole number"),
    "append without ROWS": (body("append(feedback, 1)  # <-", "return KEEP"), "ROWS is not declared"),
    "append too few": (
        'ROWS = {"x": "u1", "y": "u1"}\n' + body("append(feedback, 1)  # <-", "return KEEP"),
        "the call is append(feedback, x, y)",
    ),
    "append elsewhere": (
        'ROWS = {"x": "u1"}\n' + body("append(frame, 1)  # <-", "return KEEP"),
        "the call is append(feedback, x)",
    ),
    "hidden append": (body("append = 1  # <-", "return KEEP"), "would hide"),
    "ORDERED": ("ORDERED = 1  # <-\n" + body("return KEEP"), "ORDERED is True or False"),
    "finish signature": ("def finish(state):  # <-\n    pass\n" + body("return KEEP"), "finish(state, params)"),
    "finish returns": (
        "def finish(state, params):\n    return 1  # <-\n" + body("return KEEP"),
        "finish() returns nothing",
    ),
    "finish emits": (
        "def finish(state, params):\n    emit(feedback, 1, 2)  # <-\n" + body("return KEEP"),
        "the call is emit(feedback",
    ),
    "finish called": (
        "def finish(state, params):\n    pass\n" + body("finish(state, params)  # <-", "return KEEP"),
        "called by the sandbox only",
    ),
    "array written": (
        'PARAMS = {"mask": ("uint8", "frame")}\n' + body("params.mask[0, 0] = 1  # <-", "return KEEP"),
        "params.mask is read-only",
    ),
    "array shape": ('PARAMS = {"mask": ("uint8", "full")}  # <-\n' + body("return KEEP"), 'or "frame" for a frame'),
    "array size": ('PARAMS = {"mask": ("uint8", (0, 3))}  # <-\n' + body("return KEEP"), "0 is not a size"),
    "array of any size": ('STATE = {"a": ("uint8", (-1,), "sum")}  # <-\n' + body("return KEEP"), "-1 is not a size"),
    "arrays too large": (
        'PARAMS = {"a": ("float64", (8192, 8192))}  # <-\n' + body("return KEEP"),
        "more than 256 MiB",
    ),
    "ragged table": ("A = (\n    (1, 2),\n    (1,),  # <-\n)\n" + body("return KEEP"), "a tuple of rows"),
    "deep table": ("A = ((1, 2), ((1, 2), (3, 4)))  # <-\n" + body("return KEEP"), "a tuple of rows"),
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
    "empty return": (body("if index > 1:", "    return  # <-", "return KEEP"), "frame() returns a verdict"),
    "no effect": (body("index + 1  # <-", "return KEEP"), "no effect"),
    "twice": ("A = 1\nA = 2  # <-\n" + body("return KEEP"), "'A' is defined twice"),
    "code outside": ("for i in range(3):  # <-\n    pass\n" + body("return KEEP"), "outside functions"),
    "call outside": ("A = print(1)  # <-\n" + body("return KEEP"), "a constant is a number"),
    "huge constant": ("A = 9**9**9  # <-\n" + body("return KEEP"), "constant"),
    "huge shift": ("A = 1 << 900  # <-\n" + body("return KEEP"), "64 bits"),
    "division by zero": ("A = 1 // 0  # <-\n" + body("return KEEP"), "cannot be computed"),
    "complex power": ("A = (0 - 8) ** 0.5  # <-\n" + body("return KEEP"), "cannot be computed"),
    "huge integer": (body(f"n = {1 << 70}  # <-", "return KEEP"), "64 bits"),
    "big table": (f"A = ({'1, ' * 5000})  # <-\n" + body("return KEEP"), "4096 entries"),
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
    with pytest.raises(KernelRefused, match=r"hits\.py:9: ") as caught:
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
