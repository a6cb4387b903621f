"""Who keeps a run's product: one worker of one node, and every process of a cluster comes to the same.

In: the run, the nodes that can keep runs now, the workers of this node. Out: whether it is this worker's. What always
holds: while the nodes that live stay the same, so does the keeper of every run; when one goes, or comes, only its runs
move. While nodes do not agree yet (a lease has just ended) a run may have two keepers, or none: the catalogue refuses the
product of whoever knows less (``RunProductOf.reflects``), and what is due stays due.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable


def owner(bucket: str, run: bytes, kernel: str, workers: int) -> int:
    """The worker of a node that keeps the product: every process of it computes the same."""
    return zlib.crc32(_identity(bucket, run, kernel)) % workers


@functools.lru_cache(4096)
def keeper(bucket: str, run: bytes, kernel: str, nodes: tuple[int, ...]) -> int | None:
    """The node that keeps the product: the highest of its hashes with each (rendezvous hashing). None: there is no node."""
    identity = _identity(bucket, run, kernel)

    def weight(node: int) -> bytes:
        return hashlib.blake2b(identity, digest_size=8, key=node.to_bytes(8, "little")).digest()

    return max(nodes, key=weight, default=None)


def _identity(bucket: str, run: bytes, kernel: str) -> bytes:
    return b"\0".join((bucket.encode(), kernel.encode(), run))


@dataclasses.dataclass(frozen=True, slots=True)
class Keeping:
    """Of one worker. ``nodes``: the number of this node, and of those that can keep runs now; None: a node alone."""

    slot: int
    workers: int
    nodes: Callable[[], tuple[int, tuple[int, ...]]] | None = None

    def keeps(self, bucket: str, run: bytes, kernel: str) -> bool:
        if self.nodes is not None:
            me, nodes = self.nodes()
            if keeper(bucket, run, kernel, nodes) != me:
                return False
        return owner(bucket, run, kernel, self.workers) == self.slot
