"""Random kernels in the language of the offload: most are accepted, and every one is legal for numba."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

DTYPES = ("uint8", "uint16", "uint32", "int16", "int32")
CASTS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@dataclasses.dataclass
class Sample:
    source: str
    dtype: str
    shape: tuple[int, ...]


class _Writer:
    def __init__(self, draw: st.DrawFn, two_dimensional: bool, margin: int) -> None:
        self.draw = draw
        self.two = two_dimensional
        self.margin = margin
        self.locals: list[str] = []
        self.in_pixels = False

    def pick(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    def offset(self, name: str) -> str:
        by = self.draw(st.integers(-self.margin, self.margin))
        return name if by == 0 else f"{name} {'+' if by > 0 else '-'} {abs(by)}"

    def leaf(self) -> str:
        choices = ["const", "const", "param", "index", "register"]
        if self.locals:
            choices += ["local"] * 4
        if self.in_pixels:
            choices += ["pixel"] * 4 + ["position"]
        match self.pick(*choices):
            case "const":
                return str(self.draw(st.one_of(st.integers(-9, 9), st.integers(-(1 << 40), 1 << 40))))
            case "param":
                return self.pick("params.a", "params.b")
            case "register":
                return f"state.r[{self.draw(st.integers(0, 3))}]"
            case "local":
                return self.pick(*self.locals)
            case "pixel":
                place = [self.offset("y")] if self.two else []
                return f"frame[{', '.join([*place, self.offset('x')])}]"
            case "position":
                return self.pick("y", "x") if self.two else "x"
            case _:
                return "index"

    def number(self, depth: int) -> str:  # noqa: C901  # a table of forms
        if depth == 0 or self.draw(st.integers(0, 3)) == 0:
            return self.leaf()
        a = self.number(depth - 1)
        match self.pick(
            "+", "-", "*", "&", "|", "^", "<<", ">>", "//", "%", "min", "abs", "-a", "~", "cast", "if", "helper"
        ):
            case "<<" | ">>" as op:
                return f"(np.int64({a}) {op} ({self.number(depth - 1)} & {self.pick('7', '63', '1')}))"
            case "//" | "%" as op:
                return f"({a} {op} {self.pick('1', '2', '8', '1024')})"
            case "min":
                return f"{self.pick('min', 'max')}(np.int64({a}), np.int64({self.number(depth - 1)}))"
            case "abs":
                return f"abs({a})"
            case "-a":
                return f"(-np.int64({a}))" if self.draw(st.booleans()) else f"(-{a if not a.startswith('-') else '1'})"
            case "~":
                return f"(~np.int32({a}))"
            case "cast":
                return f"np.{self.pick(*CASTS)}({a})"
            case "if":
                return f"(np.int64({a}) if {self.truth(depth - 1)} else np.int64({self.number(depth - 1)}))"
            case "helper":
                return f"mixed({a}, np.int64({self.number(depth - 1)}))"
            case op:
                return f"({a} {op} {self.number(depth - 1)})"

    def truth(self, depth: int) -> str:
        op = self.pick("<", "<=", ">", ">=", "==", "!=")
        compared = f"(np.int64({self.number(depth)}) {op} np.int64({self.number(depth)}))"
        if depth and self.draw(st.integers(0, 2)) == 0:
            return f"({compared} {self.pick('and', 'or')} {self.truth(depth - 1)})"
        return f"(not {compared})" if self.draw(st.integers(0, 4)) == 0 else compared

    def statement(self, indent: str, depth: int) -> list[str]:
        match self.pick("assign", "assign", "augment", "augment", "if", "register", "memory", "unroll"):
            case "assign":
                return [f"{indent}{self.pick(*self.locals)} = np.int64({self.number(2)})"]
            case "augment":
                return [f"{indent}{self.pick(*self.locals)} {self.pick('+', '-', '^')}= np.int64({self.number(2)})"]
            case "register":
                at = self.pick("0", "1", "3", "index & 3")
                return [f"{indent}state.r[{at}] {self.pick('+=', '|=', '=')} {self.number(1)}"]
            case "memory" if self.in_pixels:
                at = f"np.int64({self.number(1)}) & {self.pick('31', '7', '1')}"
                if self.draw(st.booleans()):
                    return [f"{indent}state.m[{at}] += {self.number(1)}"]
                return [f"{indent}state.w[{at}] = {self.pick('min', 'max')}(state.w[{at}], np.int64({self.number(1)}))"]
            case "unroll" if depth:
                inner = self.statement(indent + "    ", 0)
                if any("state.m" in line or "state.w" in line for line in inner):
                    return inner[:1] and [line[4:] for line in inner]
                return [f"{indent}for k in range({self.draw(st.integers(1, 3))}):", *inner]
            case _ if depth:
                lines = [f"{indent}if {self.truth(1)}:", *self.statement(indent + "    ", depth - 1)]
                if self.draw(st.booleans()):
                    lines += [f"{indent}else:", *self.statement(indent + "    ", depth - 1)]
                return lines
        return [f"{indent}{self.pick(*self.locals)} += 1"]


@st.composite
def kernels(draw: st.DrawFn) -> Sample:
    two = draw(st.booleans())
    margin = draw(st.sampled_from((0, 0, 1, 2)))
    shape = (draw(st.integers(5, 7)), draw(st.integers(5, 9))) if two else (draw(st.integers(6, 40)),)
    dtype = draw(st.sampled_from(DTYPES))
    writer = _Writer(draw, two, margin)
    state_dtypes = [draw(st.sampled_from(CASTS)) for _ in range(3)]
    lines = [
        f'PARAMS = {{"a": ("{draw(st.sampled_from(CASTS))}", 3), "b": ("int64", -70000)}}',
        f'STATE = {{"r": ("{state_dtypes[0]}", (4,), "sum"), "m": ("{state_dtypes[1]}", (32,), "sum"), '
        f'"w": ("{"int16" if state_dtypes[2].startswith("u") else state_dtypes[2]}", (37,), "max")}}',
        "def mixed(p, q):",
        "    if q > 5:",
        "        return np.int64(p) - q",
        "    return np.int64(p) ^ q",
        "def frame(frame, params, state, index, out, feedback):",
    ]
    for name in ("n", "s", "t"):
        lines.append(f"    {name} = np.int64({writer.number(1)})")
        writer.locals.append(name)
    low, high = margin, f" - {margin}" if margin else ""
    indent = "    "
    if two:
        lines.append(f"    for y in range({low}, frame.shape[0]{high}):")
        indent += "    "
        if draw(st.booleans()):
            lines += writer.statement(indent, 0)
        lines.append(f"{indent}for x in range({low}, frame.shape[1]{high}):")
    else:
        lines.append(f"    for x in range({low}, frame.shape[0]{high}):")
    writer.in_pixels = True
    place = ("y, " if two else "") + "x"
    lines.append(f"{indent}    n += np.int64(frame[{place}])")
    body: list[str] = []
    for _ in range(draw(st.integers(1, 4))):
        lines_now = writer.statement(indent + "    ", 2)
        for memory in ("state.m", "state.w"):
            if any(memory in line for line in body) and any(memory in line for line in lines_now):
                lines_now = [f"{indent}    t ^= s"]
        body += lines_now
    lines += body
    writer.in_pixels = False
    if two and draw(st.booleans()):
        lines += writer.statement(indent, 1)
    lines += writer.statement("    ", 2)
    lines.append(f"    emit(feedback, {draw(st.integers(-3, 9))}, {writer.number(1)})")
    lines.append(f"    state.r[2] += {writer.number(1)}")
    lines.append(f"    return {writer.truth(1)}")
    return Sample("import numpy as np\n" + "\n".join(lines) + "\n", dtype, shape)
