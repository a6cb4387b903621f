"""``hiss kernel vhdl``: the folder is what an FPGA engineer needs, and its own script proves it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.offload import samples


def vhdl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway.cli", "kernel", "vhdl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    file = tmp_path / "hits.py"
    file.write_text(samples.THRESHOLD)
    return file


def test_the_folder_proves_itself(peer: Callable[[str], str], kernel: Path, tmp_path: Path) -> None:
    peer("ghdl")
    peer("yosys")
    frames = np.random.default_rng(2).integers(0, 40, (2, 8, 12)).astype(np.uint16)
    np.save(tmp_path / "frames.npy", frames)
    folder = tmp_path / "hits"
    params = ("--params", '{"low": 20}', "--frames", str(tmp_path / "frames.npy"))
    done = vhdl(str(kernel), "-o", str(folder), "--json", *params)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["said"]["simulation"] == "bit-exact with the kernel on 2 frame(s)"
    assert answer["estimate"]["modelled"] is True
    assert answer["estimate"]["latches"] == 0
    assert answer["estimate"]["flip_flops"] > 100

    proof = subprocess.run([folder / "run.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert proof.returncode == 0, proof.stderr
    assert "bit-exact on the vectors" in proof.stdout

    readme = (folder / "README.md").read_text()
    assert "| 0x00100 | 8 | rw | params.low | uint16, 12 after reset" in readme
    assert "number (modelled)" in readme
    registers = {
        row["name"]: row["address"] for row in json.loads((folder / "interface.json").read_text())["registers"]
    }
    assert registers["state.histogram"] == 0x1000

    # The vectors bite: another expectation is noticed.
    spoiled = bytearray((folder / "expected_reads.bin").read_bytes())
    spoiled[-16] ^= 1
    (folder / "expected_reads.bin").write_bytes(spoiled)
    proof = subprocess.run([folder / "run.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert proof.returncode != 0
    assert "the state differs" in proof.stderr


def test_a_refusal_names_the_line(kernel: Path, tmp_path: Path) -> None:
    kernel.write_text(samples.THRESHOLD.replace("v = frame[y, x]", "v = frame[y, x] * 0.5"))
    done = vhdl(str(kernel), "-o", str(tmp_path / "hits"), "--shape", "8x12")
    assert done.returncode == 2
    assert "hits.py:9: an FPGA core works in integers: 0.5 is a float" in done.stderr
    assert not (tmp_path / "hits").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--shape", "8by12"), "write it as ROWSxCOLUMNS"),
        ((), "of which frames? give --shape ROWSxCOLUMNS, or --frames FILE.npy"),
        (("--shape", "8x12", "--dtype", "float32"), "frames of float32 are not offloaded"),
        (("--shape", "8x12", "--params", '{"high": 1}'), "is not in PARAMS"),
    ],
)
def test_what_cannot_be_asked_for(kernel: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    done = vhdl(str(kernel), "-o", str(tmp_path / "hits"), *arguments)
    assert done.returncode == 2
    assert reason in done.stderr
