"""Copies of the catalogue's snapshots on the archive, so that losing the node does not lose the names of what is archived.

In: the folder where the catalogue process writes its snapshots (a name appears when the snapshot is complete). Out: the
newest ``kept`` of them under the target's own folder. Always true: an older copy goes only after the newer ones are durable.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from archive.targets.base import Target

_SUFFIX = ".sqlite"


def plan(here: Sequence[tuple[str, int]], there: Sequence[tuple[str, int]], kept: int) -> tuple[list[str], list[str]]:
    """(names to copy, names to remove), from (name, size in bytes) lists with the oldest first. Pure."""
    wanted = list(here)[-kept:]
    copies = [name for name, size in wanted if (name, size) not in there]
    newest = [name for name, _ in there if name not in dict(wanted)] + [name for name, _ in wanted]
    known = dict(there)
    return copies, [name for name in newest[:-kept] if name in known]


def complete_snapshots(folder: Path) -> list[tuple[str, int]]:
    """(name, size) of finished snapshots, oldest first; any other suffix is one still being written."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and entry.name.endswith(_SUFFIX):
                    found.append((status.st_mtime_ns, entry.name, status.st_size))
    except FileNotFoundError:
        return []
    return [(name, size) for _, name, size in sorted(found)]


async def keep_snapshots(folder: Path, target: Target, kept: int) -> None:
    """Bring the target's copies up to date. Raises TargetError."""
    here = await asyncio.to_thread(complete_snapshots, folder)
    copies, removals = plan(here, await target.kept_files(), kept)
    for name in copies:
        await target.keep_file(name, folder / name)
    for name in removals:
        await target.drop_file(name)
