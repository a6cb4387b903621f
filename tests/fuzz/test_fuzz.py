"""A short run of every fuzz target, the same inputs every time; `make fuzz` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SECONDS_MAX = 15
RUNS = {"heads": 20_000, "framings": 8_000, "documents": 20_000, "wire": 1_000, "request": 8_000}


@pytest.mark.parametrize("target", RUNS)
def test_no_promise_is_broken(target: str, tmp_path: Path) -> None:
    bounds = ("--seed", "1", "--runs", str(RUNS[target]), "--seconds", str(SECONDS_MAX), "--keep", str(tmp_path))
    command = [sys.executable, "-m", "tests.fuzz", target, *bounds]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=110, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
