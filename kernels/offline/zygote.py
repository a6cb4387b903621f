"""A fork server of one's own, for as long as a command runs: the node's, started the same way, with a socket nobody else sees."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

READY_TIMEOUT_S = 60.0


class NoZygote(Exception):
    """It did not start; ``str()`` is the last thing it said."""


@contextlib.contextmanager
def private_zygote(children_max: int = 8, ready_timeout_s: float = READY_TIMEOUT_S) -> Iterator[str]:
    """The socket's path. Call it from a thread that lives as long: the fork server dies with the thread that started it.
    Raises NoZygote."""
    with tempfile.TemporaryDirectory(prefix="hiss-kernel-") as folder:
        path = Path(folder) / "zygote.sock"
        log = Path(folder) / "zygote.log"
        ready, said = os.pipe()
        # -P: a file of the current folder must not stand in for a module.
        command = [sys.executable, "-P", "-m", "kernels.zygote", "--socket", str(path), "--parent", str(os.getpid())]
        command += ["--ready-fd", str(said), "--max-children", str(children_max)]
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[said]
                )
        finally:
            os.close(said)
        try:
            with os.fdopen(ready, "rb") as pipe:
                readable, _, _ = select.select([pipe], [], [], ready_timeout_s)
                if not readable or not pipe.read(1):
                    raise NoZygote(_last_line(log) or f"not ready within {ready_timeout_s:g} s")
            yield str(path)
        finally:
            process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
