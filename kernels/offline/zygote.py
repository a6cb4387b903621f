"""A fork server of one's own, for as long as a command runs: the node's, started the same way, with a socket nobody else sees.

In: nothing. Out: a socket's path. What always holds: the process is gone behind the context, or with the thread that started it;
its folder too, or, after a SIGKILL, with the next fork server that is started on this machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

READY_TIMEOUT_S = 60.0
PREFIX = "hiss-kernel-"
_IN_USE = "in-use"
"""Locked as long as its folder is used."""
_YOUNG_S = 60.0
"""A folder without that file has just been made, or is nobody's."""


class NoZygote(Exception):
    """It did not start; ``str()`` is the last thing it said."""


@contextlib.contextmanager
def private_zygote(children_max: int = 8, ready_timeout_s: float = READY_TIMEOUT_S) -> Iterator[str]:
    """The socket's path. Call it from a thread that lives as long: the fork server dies with the thread that started it.
    Raises NoZygote."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder, (Path(folder) / _IN_USE).open("wb") as in_use:
        fcntl.flock(in_use, fcntl.LOCK_EX)
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


def _sweep() -> None:
    """Remove what killed commands of this user left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    try:
        with (folder / _IN_USE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime > _YOUNG_S
    except BlockingIOError:
        return False


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
