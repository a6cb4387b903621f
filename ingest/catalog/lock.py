"""Who may write a catalogue: one lock of the node (its supervisor's), one of the catalogue process. Both are ``flock``s.

They die with their holder, so a crash leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ingest.errors import IngestError
from ingest.paths import NodePaths


class CatalogueBusy(IngestError):
    """A node, or another tool, has this data folder's catalogue open for writing."""


def catalogue(paths: NodePaths) -> Path:
    """Held by the process that writes the catalogue, and by whoever replaces it."""
    return paths.catalogue.parent / "lock"


def take(path: Path) -> int:
    """Hold the lock until the returned descriptor is closed. Raises CatalogueBusy, OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise CatalogueBusy(f"{path.parent} is in use by a running node: stop it first") from None
    return fd
