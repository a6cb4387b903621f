"""What this node knows of the other nodes' kernels: what fails there, and what waits for a node that is gone.

In: what the other control processes tell (feedback/peers.py), members, the catalogue. Out: per node, by its name. What always
holds: a node alone has nobody elsewhere; nothing is asked of another node, so a dead one costs nothing, and what it said last
stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.control.feedback.exchange import Kernels
from gateway.control.feedback.peers import Peers
from ingest.cluster.members import Members
from ingest.errors import NoSuchKey
from ingest.ports import Catalog
from ingest.records import NodeState, PartialRecord
from kernels.pace import Pace


class Elsewhere:
    def __init__(self, members: Members | None = None, peers: Peers | None = None) -> None:
        self._members = members
        self._peers = peers

    def kernels(self) -> Mapping[str, Kernels]:
        return {} if self._peers is None else self._peers.kernels()

    def paces(self) -> list[Pace]:
        return [pace for said in self.kernels().values() for pace in said.paces]

    async def waiting(self, catalog: Catalog, bucket: str, prefix: bytes = b"") -> dict[str, dict[str, int]]:
        """Kernel -> what cannot be reached -> products that wait for it: of versions that only a node has that is gone."""
        found: dict[str, dict[str, int]] = {}
        for node, said in self._gone().items():
            for kernel, count in (await catalog.owed_at_node(node, bucket, prefix)).items():
                found.setdefault(kernel, {})[said] = count
        return found

    async def unreachable(self, catalog: Catalog, partials: Sequence[PartialRecord]) -> dict[str, int]:
        """What cannot be reached -> members of a run whose partials are only there."""
        found: dict[str, int] = {}
        gone = self._gone()
        for one in partials if gone else ():
            try:
                record = await catalog.by_id(one.object_id)
            except NoSuchKey:
                continue  # joined with others meanwhile
            if record.extents and record.extents[0].node in gone and not record.mirror:
                said = gone[record.extents[0].node]
                found[said] = found.get(said, 0) + one.members
        return found

    def _gone(self) -> dict[int, str]:
        found = {}
        for one in () if self._members is None else self._members.look().members:
            if one.record.state is NodeState.REMOVED:
                found[one.node] = f"node {one.record.name}, which has left"
            elif not one.alive:
                found[one.node] = f"node {one.record.name}, which has been silent for {one.silent_s:.0f} s"
        return found


def sentence(waiting: Mapping[str, int]) -> str:
    """Empty when nothing waits."""
    return "; ".join(f"{count} objects are only on {node}" for node, count in waiting.items())
