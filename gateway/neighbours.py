"""How a process of this node reaches the other nodes: the members file, the key all share, this node's certificates.

In: the boot, the settings. Out: ``Neighbours``. Always holds: a node alone has none, and costs nothing for that.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from gateway.node_key import NodeKey
from gateway.settings import Settings
from ingest.cluster.members import Members
from ingest.cluster.neighbours import Neighbours
from ingest.cluster.peer import PeerClient
from ingest.cluster.signing import Sender
from ingest.paths import NodePaths


def neighbours(paths: NodePaths, settings: Settings, key: NodeKey) -> Neighbours:
    members = Members(paths)

    def sender() -> Sender:
        me = members.me
        return Sender(0, 0) if me is None else Sender(me.node, me.record.epoch)

    return Neighbours(members, PeerClient(key.peers, sender, tls=peer_tls(settings.tls_cert)))


def peer_tls(certificate: Path | None) -> ssl.SSLContext | None:
    """Other nodes are known by the authorities of this machine, or by a certificate that is in this node's own file: the same for
    all nodes, or that of an authority behind it."""
    if certificate is None:
        return None
    context = ssl.create_default_context()
    context.load_verify_locations(cafile=certificate)
    return context
