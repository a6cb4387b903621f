"""``python -m bench [CASE …] [--rounds N] [--folder DIR] [--json FILE]``: run the cases, print the table, write the JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import bare
from bench.cases import CASES
from bench.figure import Bench, Figure
from bench.node import running
from bench.wire import Endpoint


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure a node beside its ceilings.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of ceiling and gateway a case [7]")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    unknown = set(options.cases) - CASES.keys()
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    figures = []
    clean_up_when_told()
    with (
        bare.serve("receiver") as port,
        running(
            options.folder, f"buffer_bytes={_buffer_bytes(options.folder)}", "feedback_zmq=tcp://127.0.0.1:*"
        ) as node,
    ):
        node.bucket("memory", "memory")
        node.bucket("disk", "disk")
        bench = Bench(node, Endpoint("127.0.0.1", port), options.folder, options.rounds)
        _wait_until_warm()
        for name in options.cases or CASES:
            figure = CASES[name](bench)
            figures.append(figure)
            print(row(figure), flush=True)
    if options.json:
        write_report(options.json, figures)
    missed = sum(not figure.met for figure in figures)
    print(f"{len(figures) - missed} of {len(figures)} figures met")
    return 0


def clean_up_when_told() -> None:
    """SIGTERM ends the program as Ctrl-C does: no node and no folder of many gigabytes stays."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _buffer_bytes(folder: Path) -> int:
    """Room for every case's data at once where the disk has it."""
    return min(48 << 30, int(0.8 * shutil.disk_usage(folder).free))


def _wait_until_warm() -> None:
    """The arena's pages are touched once in the background after the start: 0.3 to 0.5 GB/s on a virtual machine."""
    time.sleep(12)


def write_report(path: Path, figures: Sequence[Figure]) -> None:
    report = {"machine": _machine(), "figures": [dataclasses.asdict(figure) for figure in figures]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def _machine() -> dict[str, str | int | None]:
    return {"cores": os.cpu_count(), "system": platform.release(), "python": platform.python_version()}


def row(figure: Figure) -> str:
    mark = "met   " if figure.met else "MISSED"
    text = f"{mark} {figure.name:<46} {figure.value:9.2f} {figure.unit}"
    if figure.ratio is not None:
        text += f"  = {figure.ratio:.2f} of {figure.ceiling:.2f} ({figure.ceiling_name}; wanted {figure.wanted:.2f})"
    else:
        text += f"  (wanted at most {figure.wanted:g})"
    if figure.cpu_s_per_gb is not None:
        text += f"  {figure.cpu_s_per_gb:.2f} CPU-s/GB"
    if figure.cpu_s_per_gb_wanted is not None:
        text += f" (wanted at most {figure.cpu_s_per_gb_wanted:g})"
    return f"{text}  {figure.note}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
