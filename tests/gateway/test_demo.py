"""``hiss demo``: it runs through, its figures hold together, and it leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.demo import frames, product

Poll = Callable[..., Any]


def demo(*flags: str, folder: Path, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gateway.cli", "demo", "--gigabytes", "0.25", "--folder", str(folder), *flags]
    return subprocess.Popen(
        command, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in entry.read_bytes().decode(errors="replace"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_it_runs_through_says_what_is_synthetic_and_keeps_files_when_asked(tmp_path: Path) -> None:
    running = demo("--json", "--keep", folder=tmp_path, HISS_DATA=str(tmp_path / "none"))
    out, error = running.communicate(timeout=100)
    assert running.returncode == 0, error
    outcome = json.loads(out)
    assert "synthetic scattering frames" in outcome["data"]
    assert outcome["frames_sent"] == outcome["frames_reduced"] == 660
    assert outcome["frames_kept"] + outcome["frames_dropped"] == 660
    assert outcome["bytes_sent"] == 660 * frames.FRAME_BYTES
    assert outcome["read_back_identical"] is True
    assert outcome["feedback_events"] == outcome["frames_dropped"] + 2, "one a dim frame, also in the two stacks of ten"
    assert 0 < outcome["gbps"]
    assert 0 < outcome["ceiling_gbps"]
    assert "both products equal numpy's" in error
    archived = Path(outcome["folder"]) / "data" / "archive" / "beamtime"
    assert (archived / "stream" / "000.raw").stat().st_size == 660 * frames.FRAME_BYTES
    found = product.read((archived / "_products" / "saxs" / "stream" / "000.raw.nxs").read_bytes())
    assert (found.received, found.kept) == (660, outcome["frames_kept"])
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(tmp_path: Path, poll: Poll, number: int) -> None:
    running = demo(folder=tmp_path)
    poll(lambda: list(tmp_path.glob("*/data/run/ports.json")), "the node starts")
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert processes_of(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_killed_it_takes_its_node_along(tmp_path: Path, poll: Poll) -> None:
    running = demo(folder=tmp_path)
    poll(lambda: list(tmp_path.glob("*/data/run/ports.json")), "the node starts")
    running.kill()
    running.communicate(timeout=60)
    poll(lambda: not processes_of(tmp_path), "the node stops", 60)


def test_a_stream_is_whole_frames_that_go_round_the_pool() -> None:
    assert list(frames.pieces(0, 10, 4)) == [(0, 4), (0, 4), (0, 2)]
    assert list(frames.pieces(7, 3, 4)) == [(3, 1), (0, 2)]


def test_resampled_frames_scatter_around_the_measured_ones(tmp_path: Path) -> None:
    measured = frames.load(tmp_path)
    assert measured.synthetic
    told: list[int] = []
    pool = frames.resample(measured.frames, 10, told.append)
    try:
        difference = pool.frames - measured.frames
        assert len(told) == 10
        assert np.abs(difference.mean()) < 1
        assert difference.var() == pytest.approx(measured.frames.mean(), rel=0.05)
    finally:
        pool.close()


def test_a_plot_has_its_ends_labelled() -> None:
    x = np.linspace(0.5, 16.5, 300)
    lines = product.plot(x, 100 + x * 10, "q", "counts").splitlines()
    assert lines[1].startswith("      265 ┤")
    assert lines[1].endswith("●")
    assert lines[-3].startswith("      105 ┤●")
    assert lines[-1].split() == ["0.5", "q", "16.5"]
