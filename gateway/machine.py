"""What this machine has: cores, memory and disk, as far as this process may use them.

Defaults of settings depend on it. In a container the control group's limit counts, not the host's memory.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    cores: int
    memory_bytes: int
    disk_bytes: int
    """Free space of the data folder's filesystem, with what the node's own segments already hold of it."""


def this_machine(data_dir: Path) -> Machine:
    """``data_dir`` need not exist yet: its nearest existing parent is asked."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            memory_bytes = min(memory_bytes, int(path.read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    folder = data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    space = os.statvfs(folder)
    # Without our own segments the default would shrink each time the node starts again.
    own_bytes = sum(file.stat().st_blocks * 512 for file in (data_dir / "segments").glob("*/*.seg"))
    return Machine(len(os.sched_getaffinity(0)), memory_bytes, space.f_bavail * space.f_frsize + own_bytes)
