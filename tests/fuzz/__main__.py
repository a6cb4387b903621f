"""``python -m tests.fuzz TARGET [--seconds N] [--runs N] [--seed N] [--keep DIR]``: one target, until bounds or a failure.

A failure is a traceback, the input in DIR/TARGET/crash-… and an exit code other than 0; ``--input FILE`` runs one input.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

INPUT_BYTES_MAX = 4096
FOLDER = "HISS_FUZZ_FOLDER"
"""Set for the process that fuzzes: where the node may keep its data."""
NAMES = ("heads", "framings", "documents", "wire", "request")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--keep", type=Path, default=Path(".cache/fuzz"), help="corpus and crashes")
    parser.add_argument("--input", type=Path, help="run this input only")
    asked = parser.parse_args()
    if FOLDER not in os.environ:
        # libFuzzer ends its process without unwinding: somebody else has to tidy up behind it.
        with tempfile.TemporaryDirectory(prefix="hiss-fuzz-") as folder:
            command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env={**os.environ, FOLDER: folder}, check=False).returncode)
    guided = importlib.util.find_spec("atheris") is not None and asked.input is None
    if guided:
        import atheris

        with atheris.instrument_imports(include=["s3api"]):
            importlib.import_module("tests.fuzz.requests")
            importlib.import_module("tests.fuzz.pure")
    with contextlib.ExitStack() as stack:
        target, seeds = _target(asked.target, Path(os.environ[FOLDER]), stack)
        if asked.input is not None:
            target(asked.input.read_bytes())
            return
        corpus = asked.keep / asked.target
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number:03d}").write_bytes(seed)
        if not guided:
            _mutate(target, corpus, asked)
            return
        flags = [
            f"-max_total_time={asked.seconds}",
            f"-runs={asked.runs}",
            f"-max_len={INPUT_BYTES_MAX}",
            "-timeout=60",
        ]
        flags += [f"-artifact_prefix={corpus}/", "-rss_limit_mb=4096", "-print_final_stats=1"]
        flags += [f"-seed={asked.seed}"] if asked.seed else []
        atheris.Setup([sys.argv[0], *flags, str(corpus)], target)
        atheris.Fuzz()


def _target(name: str, folder: Path, stack: contextlib.ExitStack) -> tuple[Callable[[bytes], None], list[bytes]]:
    from tests.fuzz import pure, requests

    if name in pure.TARGETS:
        return pure.TARGETS[name]
    stranger = stack.enter_context(requests.node(folder))
    of_node, seeds = {"wire": (requests.wire, requests.WIRES), "request": (requests.request, requests.SEEDS)}[name]
    return lambda data: of_node(stranger, data), seeds


def _mutate(target: Callable[[bytes], None], corpus: Path, asked: argparse.Namespace) -> None:
    """Where there is no atheris: seeds with bytes changed, cut, doubled and joined, blindly."""
    chance = random.Random(asked.seed or None)
    pool = [file.read_bytes() for file in sorted(corpus.iterdir()) if not file.name.startswith("crash-")]
    deadline, done = time.monotonic() + asked.seconds, 0
    while time.monotonic() < deadline and done != asked.runs:
        data = bytearray(chance.choice(pool))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(4):
                case 0:
                    data[at:at] = chance.randbytes(chance.randrange(1, 5))
                case 1:
                    del data[at : at + chance.randrange(1, 9)]
                case 2:
                    data[at : at + 1] = bytes([chance.randrange(256)])
                case _:
                    other = chance.choice(pool)
                    data[at:] = other[chance.randrange(len(other) + 1) :]
        done += 1
        try:
            target(bytes(data[:INPUT_BYTES_MAX]))
        except BaseException:
            (corpus / f"crash-{done}").write_bytes(data[:INPUT_BYTES_MAX])
            raise
    print(f"{done} runs")


if __name__ == "__main__":
    main()
