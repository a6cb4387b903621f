"""Where everything of a node lies under its data folder. The only place that joins these names."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class NodePaths:
    """``root`` is the ``--data`` folder. Folders are made with mode 0700."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def node_key(self) -> Path:
        return self.root / "node.key"

    @property
    def credentials(self) -> Path:
        return self.root / "root-credentials.json"

    @property
    def users_applied(self) -> Path:
        """Ids of the users that the last users.toml named."""
        return self.root / "users-applied.json"

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    @property
    def catalogue(self) -> Path:
        return self.root / "catalogue" / "catalogue.sqlite"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def lifecycle(self) -> Path:
        """Where the pass of lifecycle rules is."""
        return self.root / "lifecycle"

    @property
    def segments(self) -> Path:
        return self.root / "segments"

    @property
    def cluster(self) -> Path:
        """Which node of which cluster this folder is (ingest/cluster/identity.py); missing for a node alone."""
        return self.root / "cluster.json"

    @property
    def members(self) -> Path:
        """While a node of a cluster runs: who else there is, and how they are (ingest/cluster/members.py)."""
        return self.run / "members.json"

    @property
    def kernels(self) -> Path:
        """On a node of a cluster: copies of the kernels that other nodes received (ingest/cluster/copies.py)."""
        return self.root / "kernels"

    @property
    def archive(self) -> Path:
        return self.root / "archive"

    @property
    def archive_identity(self) -> Path:
        """Which archive this node knows: an empty mount point must not be taken for a new one."""
        return self.root / "archive-id"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def epoch(self) -> Path:
        """Count of starts of the node, so that a newer process can always be told from an older one."""
        return self.root / "epoch"

    @property
    def ports(self) -> Path:
        """While a node runs: the ports it bound (JSON)."""
        return self.run / "ports.json"

    @property
    def processes(self) -> Path:
        """While a node runs: its processes and how they are (JSON)."""
        return self.run / "processes.json"

    @property
    def clock(self) -> Path:
        """Only on a node with ``virtual_clock``: by how much its clock is ahead (ingest/clock.py)."""
        return self.run / "clock"

    @property
    def sandbox(self) -> Path:
        """While a node runs: whether its machine can confine kernels (JSON)."""
        return self.run / "sandbox.json"

    @property
    def catalogue_socket(self) -> Path:
        return self.run / "catalogue.sock"

    @property
    def zygote_socket(self) -> Path:
        return self.run / "zygote.sock"

    @property
    def feedback_socket(self) -> Path:
        return self.run / "feedback.sock"

    def strikes_file(self, slot: int) -> Path:
        """While a node runs: which kernels fail in this worker (JSON)."""
        return self.run / f"kernels-{slot:02d}.json"

    def bridge_socket(self, scheme: str) -> Path:
        """Where the process that writes to ``epics`` or ``tango`` targets listens."""
        return self.run / f"{scheme}.sock"

    def segment_name(self, slot: int, segment: int) -> str:
        """As text: joining paths is a twentieth of the cost of a small GET."""
        return f"{self.root}/segments/{slot:02d}/{segment:06d}.seg"

    def segment_file(self, slot: int, segment: int) -> Path:
        return Path(self.segment_name(slot, segment))

    def create(self) -> None:
        """Make what is missing. A new folder is on disk on return: what is flushed inside it must not vanish with it."""
        for folder in (self.root, self.journal, self.catalogue.parent, self.snapshots, self.segments, self.run):
            make_folder(folder)


def make_folder(folder: Path) -> None:
    """Make the folder and those above it that are missing, mode 0700, durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    above = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(above)
    finally:
        os.close(above)


@functools.cache
def socket_address(path: Path) -> str:
    """An address for a unix socket however long ``path`` is: sun_path holds 107 bytes, so go through an open folder,
    which stays open for the life of the process."""
    if len(os.fsencode(path)) < 100:
        return str(path)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{folder}/{path.name}"
