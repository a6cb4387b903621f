"""How fast kernels are, and what a slot makes of it: the pure cores, and the pace of a real sandbox."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ingest.records import FrameGeometry
from kernels.admission import Room, weigh
from kernels.attach import Attachment, attach
from kernels.dryrun import DryRuns
from kernels.gate import admit
from kernels.pace import METER_BYTES, METER_CPU_S, Meter, Pace, Paces, latest, read
from kernels.sandbox import SandboxLimits

SUM = """
STATE = {"total": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    total = 0
    for turn in range(TURNS):
        for y in range(frame.shape[0]):
            for x in range(frame.shape[1]):
                total += (np.int64(frame[y, x]) * (turn + 3)) % 7
    state.total[0] += total
    return KEEP
"""
GEOMETRY = FrameGeometry("<u2", (64, 64), 0, 2 * 64 * 64)


def attachment(name: str = "total", turns: int = 1, **metadata: str) -> Attachment:
    source = f"import numpy as np\nfrom hiss import KEEP\nTURNS = {turns}\n{SUM}"
    return attach(admit(name, source.encode()), metadata)


def pace(name: str, bytes_per_s: float, *, live: bool = True, time_ns: int = 1) -> Pace:
    return Pace("scan42", name, "sha", "uint16 64×64", bytes_per_s, live, time_ns)


def test_a_kernel_fits_where_its_cores_are() -> None:
    (alone,) = weigh({"hits": pace("hits", 1e9)}, 2_500_000_000, Room(cores=8, workers=8))
    assert (alone.cores, alone.fits) == (2.5, True)
    assert "1 GB/s a core" in alone.said
    assert "20 Gbps on a node needs 2.5 cores" in alone.said


def test_a_kernel_has_one_process_a_worker() -> None:
    (alone,) = weigh({"hits": pace("hits", 1e9)}, 2_500_000_000, Room(cores=8, workers=2))
    assert not alone.fits
    assert "one process in each of the node's 2 workers" in alone.said


def test_what_needs_least_has_its_cores_first() -> None:
    paces = {"a-slow": pace("a-slow", 0.5e9), "fast": pace("fast", 2e9), "new": None}
    slow, fast, new = weigh(paces, 2_000_000_000, Room(cores=4, workers=4))
    assert (slow.fits, fast.fits, new.fits) == (False, True, True)
    assert "3 of 4 cores are left" in slow.said
    assert new.said == "new: not measured yet"


def test_a_meter_waits_for_enough_to_say() -> None:
    meter = Meter()
    assert meter.add(1000, METER_CPU_S / 2) is None
    assert meter.add(1000, METER_CPU_S / 2) == pytest.approx(2000 / METER_CPU_S)
    assert meter.add(METER_BYTES, 0.0) is None
    assert meter.add(METER_BYTES, 0.01) == pytest.approx(200 * METER_BYTES)


async def test_frames_that_came_count_more_than_a_dry_run(tmp_path: Path) -> None:
    paces, kernel = Paces(tmp_path / "paces-0.json"), attachment()
    assert paces.of("scan42", kernel) is None
    paces.tried("scan42", kernel, "uint16 64×64", 1e9)
    assert not paces.of("scan42", kernel).live
    paces.live("scan42", kernel, GEOMETRY, 3e9)
    paces.tried("scan42", kernel, "uint16 64×64", 1e9)
    paces.live("scan42", kernel, GEOMETRY, 3e9)
    found = paces.of("scan42", kernel)
    assert (found.bytes_per_s, found.live) == (3e9, True)
    assert paces.of("scan42", attachment(turns=2)) is None, "another source"
    assert paces.of("other", kernel) is None


async def test_workers_learn_from_each_other_and_from_who_they_were(tmp_path: Path) -> None:
    mine, other, kernel = Paces(tmp_path / "paces-0.json"), Paces(tmp_path / "paces-1.json"), attachment()
    mine.live("scan42", kernel, GEOMETRY, 3e9)
    await written(tmp_path / "paces-0.json")
    await other.look_around()
    assert other.of("scan42", kernel).bytes_per_s == 3e9
    assert Paces(tmp_path / "paces-0.json").of("scan42", kernel).live
    again = dataclasses.replace(kernel, submitted_ns=77)
    assert mine.attached("scan42", again)
    await written(tmp_path / "paces-0.json", lambda text: '"submitted_ns":77' in text)
    assert read([tmp_path / "paces-0.json"])[0].submitted_ns == 77


async def written(file: Path, like: Callable[[str], object] = bool) -> None:
    def done() -> object:
        return file.exists() and like(file.read_text())

    for _ in range(500):
        if await asyncio.to_thread(done):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{file} was not written")


def test_of_several_workers_the_latest_live_one_counts() -> None:
    paces = [pace("hits", 1.0, time_ns=5), pace("hits", 2.0, live=False, time_ns=9), pace("hits", 3.0, time_ns=7)]
    assert [one.bytes_per_s for one in latest(paces).values()] == [3.0]


def test_a_file_that_makes_no_sense_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "paces-0.json").write_text(json.dumps([{"bucket": 7}]))
    assert read([tmp_path / "paces-0.json", tmp_path / "paces-1.json"]) == []


async def test_a_dry_run_finds_the_slower_kernel_slower(zygote_socket: str) -> None:
    paces = Paces(None)
    runs = DryRuns(zygote_socket, paces, SandboxLimits())
    kernels = [attachment("quick", 1, **{"frame-dtype": "uint16", "frame-shape": "256,256"}), attachment("slow", 40)]
    began_s = time.monotonic()
    for kernel in kernels:
        await runs.measure("scan42", kernel)
    quick, slow = (paces.of("scan42", kernel) for kernel in kernels)
    assert quick.frames == "uint16 256×256"
    assert slow.frames == "uint16 512×1024"
    assert not quick.live
    # Forty times the work, on a machine that does other things as well.
    assert quick.bytes_per_s > 10 * slow.bytes_per_s
    assert time.monotonic() - began_s < 60


async def test_a_kernel_that_fails_its_dry_run_is_not_measured(zygote_socket: str) -> None:
    source = b"def frame(frame, params, state, index, out, feedback):\n    return frame[index + 600, 0] > 0\n"
    paces, kernel = Paces(None), attach(admit("beyond", source), {})
    await DryRuns(zygote_socket, paces, SandboxLimits()).measure("scan42", kernel)
    assert paces.of("scan42", kernel) is None
