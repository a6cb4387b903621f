"""A fork server of a command's own: its folder goes with it, or with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kernels.offline.zygote import private_zygote

HOLD = """
import sys, time
from kernels.offline.zygote import private_zygote
with private_zygote() as socket:
    print(socket, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_command_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environ, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        left = Path(holder.stdout.readline().strip()).parent
        assert left.parent == tmp_path
        with private_zygote() as socket:
            assert left.exists(), "it is in use"
            assert Path(socket).parent != left
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
    assert left.exists()
    with private_zygote() as socket:
        assert not left.exists()
        assert Path(socket).exists()
    assert list(tmp_path.iterdir()) == []
