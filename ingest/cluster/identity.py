"""Which node of which cluster a data folder is: DATA/cluster.json.

In: the folder. Out: ``Identity``. Written before the engine hears of it (with a claim that only this folder knows) and once more
when the engine has given the number, so that a crash between the two leaves a node that finds itself again.
"""

from __future__ import annotations

import os
import secrets

import msgspec

from ingest.catalog.snapshot import flush_path
from ingest.cluster.errors import ClusterRefused
from ingest.paths import NodePaths


class Identity(msgspec.Struct, frozen=True):
    claim: str
    """Random: how the engine knows this folder from another one that calls itself the same."""
    cluster_id: str = ""
    node: int = -1

    @property
    def joined(self) -> bool:
        return self.node >= 0


def read(paths: NodePaths) -> Identity | None:
    """None for the folder of a node alone, or of none yet. Raises ClusterRefused for a file that cannot be read."""
    try:
        return msgspec.json.decode(paths.cluster.read_bytes(), type=Identity)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ClusterRefused(f"{paths.cluster} cannot be read: {error}") from None


def claimed(paths: NodePaths) -> Identity:
    """The folder's identity; a new claim where it has none."""
    found = read(paths)
    if found is None:
        found = Identity(secrets.token_hex(16))
        write(paths, found)
    return found


def write(paths: NodePaths, identity: Identity) -> None:
    """On disk on return."""
    made = paths.cluster.with_name(".cluster.json")
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(identity)))
        file.flush()
        os.fsync(file.fileno())
    made.rename(paths.cluster)
    flush_path(paths.cluster.parent)
