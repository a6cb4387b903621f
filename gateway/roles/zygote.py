"""The zygote: becomes ``python -m kernels.zygote``, a process that has never seen settings, keys or connections.

Its death signal was set in ``boot.load`` and survives the exec; every descriptor but the ready pipe is closed by it.
"""

from __future__ import annotations

import os
import sys

from gateway.boot import Boot


def main(boot: Boot) -> None:
    assert boot.ready_fd is not None
    os.set_inheritable(boot.ready_fd, True)
    command = [sys.executable, "-P", "-m", "kernels.zygote", "--socket", str(boot.paths.zygote_socket)]
    command += ["--parent", str(boot.supervisor_pid), "--ready-fd", str(boot.ready_fd)]
    if boot.load_settings().kernels == "unconfined":
        command.append("--tolerant")
    os.execv(sys.executable, command)
