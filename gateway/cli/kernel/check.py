"""``hiss kernel check``: gate, compiler and sandbox of a node, on one's own frames and without a node.

Exit code 0: it runs; 2: refused, failed, or no frames in the file. The report says what a product would hold, and how many
cores the line would need.
"""

from __future__ import annotations

import asyncio
import collections
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import options
from gateway.cli.kernel.source import Given, Refused, load, parse_arrays, parse_params
from gateway.cli.kernel.submit import Arrays, Constants, Params, What
from gateway.cli.output import CliError, ExitCode, human_rate, print_json, print_table
from ingest.ports import KernelRefused

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gateway.cli.kernel.trial import Trial
    from kernels.contract import Stage
    from kernels.offline.body import Body
    from kernels.offload.device import Plan

VALUES_SHOWN_MAX = 16
ROWS_SHOWN = 5
FEEDBACK_SHOWN = 10
TIMED_BYTES_ENOUGH = 4 << 20
"""A pass over fewer bytes is mostly the round trip to the sandbox."""


def check(
    what: What,
    frames: Annotated[Path, typer.Option("--frames", metavar="FILE", help="Frames to try it on.")],
    dtype: Annotated[str, typer.Option(help="Of raw frames, e.g. uint16.")] = "",
    shape: Annotated[str, typer.Option(help="Of a raw frame, e.g. 195x487.")] = "",
    dataset: Annotated[str, typer.Option(help="The frames' dataset in an HDF5 file, if not the obvious one.")] = "",
    params: Params = "",
    arrays: Arrays = None,
    constants: Constants = None,
    after: Annotated[
        list[str] | None,
        typer.Option("--after", metavar="FILE|NAME", help="The kernel before it; repeatable, in order."),
    ] = None,
    device: Annotated[
        options.Core, typer.Option(help="Compare with the FPGA core's model, or with the simulated VHDL as well.")
    ] = options.Core.CPU,
    most: Annotated[int, typer.Option("--max-frames", min=1, help="How many frames are judged.")] = 1000,
    seconds: Annotated[float, typer.Option(min=0.0, max=600.0, help="How long its speed is measured.")] = 1.0,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write the plot there.")] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Plot the obvious result.")] = True,
    as_json: options.Json = False,
) -> None:
    """Try a kernel on your own frames, in the sandbox of a node: verdicts, state, rows, feedback, speed, a plot.

    Parameters and arrays of kernels before it are written KERNEL.NAME.
    """
    try:
        chain = [*(load(one) for one in after or ()), load(what, constants=constants or ())]
        stages = _stages(chain, parse_params(params), arrays or ())
        body = _body(frames, {"frame-dtype": dtype, "frame-shape": shape, "frame-dataset": dataset})
        try:
            plan = _planned(chain, body) if device is not options.Core.CPU else None
            trial, said = _tried(chain, stages, body, min(most, body.frames), seconds, plan, device)
        finally:
            body.close()
    except Refused as refusal:
        if as_json:
            refusal.print_json()
        raise
    _report(chain, body, trial, said, png, plot=plot, as_json=as_json)


def _stages(chain: Sequence[Given], params: Mapping[str, int | float], arrays: Sequence[str]) -> list[Stage]:
    """Everything goes to the kernel it names, or to the last one."""
    from kernels.contract import Stage, resolve_params

    names = [given.kernel.name for given in chain]
    if len(set(names)) < len(names):
        raise CliError(f"the kernels of a chain need different names: {', '.join(names)}")

    def of(text: str) -> tuple[str, str]:
        kernel, dot, rest = text.partition(".")
        return (kernel, rest) if dot and kernel in names else (names[-1], text)

    stages = []
    for given in chain:
        own = {
            rest: value for key, value in params.items() for kernel, rest in [of(key)] if kernel == given.kernel.name
        }
        pairs = [rest for pair in arrays for kernel, rest in [of(pair)] if kernel == given.kernel.name]
        files = parse_arrays(given.kernel, pairs)
        try:
            stages.append(
                Stage(given.kernel, resolve_params(given.kernel, own), {file.name: file.values for file in files})
            )
        except KernelRefused as refusal:
            raise Refused.of(refusal, given.text) from None
    return stages


def _body(file: Path, metadata: Mapping[str, str]) -> Body:
    from kernels.offline.body import NoFrames, open_body

    try:
        body = open_body(file, file.name.encode(), {name: value for name, value in metadata.items() if value})
    except NoFrames as reason:
        raise CliError(f"{file}: {reason}; raw frames need --dtype and --shape") from None
    except OSError as error:
        raise CliError(f"{file}: {error.strerror or error}") from None
    if body.frames < 1:
        body.close()
        raise CliError(f"{file}: not one whole frame in it ({body.reading})")
    return body


def _planned(chain: Sequence[Given], body: Body) -> Plan:
    from gateway.cli.kernel.device import planned

    if len(chain) > 1:
        raise CliError("--device: a kernel that comes after another runs on the cpu")
    return planned(chain[-1], body)


def _tried(
    chain: Sequence[Given],
    stages: Sequence[Stage],
    body: Body,
    frames: int,
    seconds: float,
    plan: Plan | None,
    device: options.Core,
) -> tuple[Trial, dict[str, str]]:
    """With what the comparison with the core says."""
    from gateway.cli.kernel import trial
    from gateway.cli.kernel.device import compared
    from kernels.offline.zygote import NoZygote, private_zygote
    from kernels.sandbox import SandboxFailed

    try:
        with private_zygote() as socket:
            tried = asyncio.run(trial.run(socket, stages, body, frames, seconds))
            if plan is None:
                return tried, {}
            return tried, asyncio.run(compared(socket, plan, stages[-1], body, tried.found, device))
    except KernelRefused as refusal:
        of = next((given for given in chain if given.kernel.file == refusal.file), chain[-1])
        raise Refused.of(refusal, of.text) from None
    except SandboxFailed as failure:
        raise _failed(failure.kind, failure.message, chain) from None
    except (NoZygote, ValueError, OSError) as error:
        raise CliError(f"it could not be tried: {error}") from None


def _failed(kind: str, message: str, chain: Sequence[Given]) -> CliError:
    """A kernel that failed on a node would cost its product. Where the message names a line, it is shown."""
    if kind == "unavailable":
        return CliError(f"the sandbox does not work here: {message}", ExitCode.NOT_STARTED)
    for given in chain:
        _, found, rest = message.partition(f"{given.kernel.file}:")
        line, _, reason = rest.partition(":")
        if found and line.isdigit():
            place = message.partition(f" {given.kernel.file}:")[0].rstrip(": ")
            return Refused(given.kernel.file, int(line), f"{place}: {reason.strip()}", given.text)
    return CliError(f"{kind}: {message}")


# -- the report


def _report(
    chain: Sequence[Given],
    body: Body,
    trial: Trial,
    said: dict[str, str],
    png: Path | None,
    *,
    plot: bool,
    as_json: bool,
) -> None:
    from gateway.cli.kernel import plots

    found = trial.found
    name, values = plots.default_of(found.state, trial.result, found.verdicts)
    if png is not None:
        try:
            png.write_bytes(plots.png(name, values))
        except OSError as error:
            raise CliError(f"--png {png}: {error.strerror}") from None
    document = {**describe(chain, body, trial), "device": said}
    if as_json:
        print_json({**document, "plot": name, "png": str(png) if png else None})
        return
    _print(document)
    if plot:
        print()
        print(plots.text(name, values))


def describe(chain: Sequence[Given], body: Body, trial: Trial) -> dict[str, Any]:
    """The report as plain values."""
    from gateway.cli.kernel.trial import LINE_BYTES_PER_S

    found = trial.found
    kernel = chain[-1].kernel
    codes = collections.Counter(code for _, code, _ in found.feedback)
    return {
        "kernel": kernel.name,
        "sha256": kernel.sha256,
        "after": [given.kernel.name for given in chain[:-1]],
        "read_as": body.reading,
        "frames": trial.frames,
        "verdicts": verdict_counts(found.verdicts),
        "stopped_at": found.stopped_at,
        "state": {name: _array(values) for name, values in found.state.items()},
        "result": None if trial.result is None else {name: _array(values) for name, values in trial.result.items()},
        "rows": None if found.rows is None else {
            "count": len(found.rows),
            "dropped": found.dropped_rows,
            "first": [dict(zip(found.rows.dtype.names or (), row.tolist(), strict=True)) for row in found.rows[:ROWS_SHOWN]],
        },
        "feedback": {
            "events": found.feedback_events,
            "dropped": found.dropped_feedback,
            "by_code": {str(code): count for code, count in sorted(codes.items())},
            "first": [{"frame": frame, "code": code, "value": _number(value)} for frame, code, value in
                      found.feedback[:FEEDBACK_SHOWN]],
        },
        "cautions": list(trial.cautions),
        "compile_s": round(trial.compile_s, 3),
        "bytes_per_s_a_core": round(trial.bytes_per_s),
        "decoding_bytes_per_s_a_core": _rate(trial.decoding_bytes_per_s),
        "kernel_bytes_per_s_a_core": _rate(trial.kernel_bytes_per_s),
        "cores_for_40_gbps": math.ceil(LINE_BYTES_PER_S / trial.bytes_per_s),
        "timed_bytes": trial.timed_frames * body.frame_bytes,
        "timed_frames": trial.timed_frames,
        "timed_passes": trial.passes,
    }  # fmt: skip


def verdict_counts(verdicts: npt.NDArray[np.uint8]) -> dict[str, int]:
    """How many of each; those that did not occur are left out, but for keep and drop."""
    from kernels.contract import DROP, KEEP, REPLACE, STOP
    from kernels.verdicts import AFTER_STOP, UNREDUCED

    names = {KEEP: "keep", DROP: "drop", REPLACE: "replace", STOP: "stop", AFTER_STOP: "behind stop"}
    names[UNREDUCED] = "not readable"
    counts = {name: int((verdicts == value).sum()) for value, name in names.items()}
    return {name: count for name, count in counts.items() if count or name in ("keep", "drop")}


def _array(values: npt.NDArray[np.generic]) -> dict[str, Any]:
    described: dict[str, Any] = {"dtype": values.dtype.name, "shape": list(values.shape)}
    if values.size:
        described |= {"min": _number(values.min()), "max": _number(values.max()), "sum": _number(values.sum())}
    if values.size <= VALUES_SHOWN_MAX:
        described["values"] = json.loads(json.dumps(values.tolist()), parse_constant=str)
    return described


def _number(value: Any) -> Any:
    """As JSON has it: no NaN, no infinity."""
    plain = value.item() if hasattr(value, "item") else value
    return str(plain) if isinstance(plain, float) and not math.isfinite(plain) else plain


def _rate(bytes_per_s: float | None) -> int | None:
    return None if bytes_per_s is None else round(bytes_per_s)


def _parts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Where frames are decoded: how much of the time is the kernel's."""
    decoding, kernel = document["decoding_bytes_per_s_a_core"], document["kernel_bytes_per_s_a_core"]
    if decoding is None:
        return []
    alone = "too fast to tell beside it" if kernel is None else f"{human_rate(kernel)} a core"
    share = min(1.0, document["bytes_per_s_a_core"] / decoding)
    return [
        ("of this, decoding", f"{share:.0%} of the time: {human_rate(decoding)} a core"),
        ("the kernel alone", alone),
    ]


def _few(timed_bytes: int) -> str:
    """On a node small frames go to the sandbox many at a time, here no more than there are."""
    enough = timed_bytes >= TIMED_BYTES_ENOUGH
    return "" if enough else " at most: so few bytes say little about a rate, try it on more frames"


def _print(document: dict[str, Any]) -> None:
    chain = " → ".join([*document["after"], document["kernel"]])
    feedback = document["feedback"]
    facts = [
        ("kernel", f"{chain}, sha256 {document['sha256'][:12]}, compiled in {document['compile_s']:.2f} s"),
        ("the node will read this file as", document["read_as"]),
        ("frames judged", document["frames"]),
        ("verdicts", ", ".join(f"{name} {count}" for name, count in document["verdicts"].items())),
        *([("stopped", f"at frame {document['stopped_at']}: later ones are not judged")]
          if document["stopped_at"] is not None else []),
        ("feedback", f"{feedback['events']} events" + "".join(
            f", code {code}: {count}" for code, count in feedback["by_code"].items()
        ) + (f", {feedback['dropped']} dropped" if feedback["dropped"] else "")),
        ("speed", f"{human_rate(document['bytes_per_s_a_core'])} a core (median of {document['timed_passes']} passes over "
                  f"{document['timed_frames']} frames)"
                  + (", decoding included" if document["decoding_bytes_per_s_a_core"] is not None else "")),
        *_parts(document),
        ("40 Gbps", f"needs {document['cores_for_40_gbps']} cores" + _few(document["timed_bytes"])),
    ]  # fmt: skip
    facts += [(f"core ({name})", sentence) for name, sentence in document["device"].items()]
    facts += [("caution", caution) for caution in document["cautions"]]
    for name, value in facts:
        print(f"{name:32} {value}")
    for title in ("state", "result"):
        if document[title]:
            rows = [
                (name, one["dtype"], "×".join(map(str, one["shape"])), one.get("min"), one.get("max"), one.get("sum"),
                 one.get("values", ""))
                for name, one in document[title].items()
            ]  # fmt: skip
            print()
            print_table((title, "dtype", "shape", "min", "max", "sum", "values"), rows)
    if document["rows"] is not None:
        rows_found = document["rows"]
        dropped = f", {rows_found['dropped']} found no room" if rows_found["dropped"] else ""
        print(f"\nrows: {rows_found['count']}{dropped}")
        if rows_found["first"]:
            print_table(list(rows_found["first"][0]), [list(row.values()) for row in rows_found["first"]])
