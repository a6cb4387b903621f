"""The process that sandboxes are forked from: ``python -m kernels.zygote --socket PATH``.

Freshly started by the supervisor, never a fork of a process that holds secrets: it has numba loaded and warm, so that a
sandbox is a fork of milliseconds instead of a start of seconds. This file is its beginning: a clean environment (thread
counts must stand before numpy is imported, so nothing but the standard library is imported above), the socket, the
warm-up; kernels/forkserver.py is the rest of its life. It says ``ready`` (to stderr, and to ``--ready-fd``) and
answers from then on.

The zygote dies with the thread that started it (PDEATHSIG: start it from a long-lived one). As root, every live child has
a user id of its own, ``--uid-base`` + n with n below ``--max-children``: keep that range free of real users. As an
ordinary user children keep its id.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
from pathlib import Path

DEFAULT_MAX_CHILDREN = 64
DEFAULT_UID_BASE = 60000

_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "NUMBA_DISABLE_INTEL_SVML": "1",
}
"""All that the zygote's libraries and its children see. SVML would load a library after the lock-down."""

log = logging.getLogger("hiss.zygote")


def listen(path: Path) -> socket.socket:
    """A listening SEQPACKET socket with mode 0600. Raises OSError."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    umask = os.umask(0o177)
    try:
        # Through the folder's descriptor: sun_path holds 107 bytes, the data folder's path may be longer.
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.umask(umask)
        os.close(folder)
    listener.listen(64)
    return listener


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kernels.zygote", description="fork server of sandboxed kernels")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--parent", type=int, default=0, help="process id this one must not outlive")
    parser.add_argument(
        "--ready-fd", type=int, default=-1, help="descriptor that gets one byte once requests are answered"
    )
    parser.add_argument("--max-children", type=int, default=DEFAULT_MAX_CHILDREN)
    parser.add_argument("--uid-base", type=int, default=DEFAULT_UID_BASE, help="first user id of children, as root")
    parser.add_argument(
        "--tolerant", action="store_true", help="run kernels even where the machine cannot confine them"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    path = options.socket.absolute()
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    os.chdir("/")
    # A terminal's Ctrl-C is the supervisor's to handle, in its order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from kernels import forkserver, lockdown, warmup

    try:
        lockdown.die_with_parent(options.parent or os.getppid())
    except lockdown.LockdownError as error:
        raise SystemExit(f"zygote: {error}") from None
    warmup.warm()
    listener = listen(path)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise SystemExit(f"the zygote must have one thread to fork safely, it has {threads}")
    gc.collect()
    gc.freeze()
    if options.ready_fd >= 0:
        os.write(options.ready_fd, b"R")
        os.close(options.ready_fd)
    log.info("ready, %d children at most", options.max_children)
    forkserver.ForkServer(listener, options.max_children, options.uid_base, tolerant=options.tolerant).serve()


if __name__ == "__main__":
    main()
