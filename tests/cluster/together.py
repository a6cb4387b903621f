"""Nodes of one cluster on this host's loopback, without namespaces: for what needs no network that can be cut.

In: a folder, the engine's address. Out: started ``Node``s that share a node key. Always holds: every process of them is gone at
the end; a key is never written twice.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ingest.cluster import identity
from tests.crash.harness import S3, Node

SETTINGS = {"workers": "1", "arena_bytes": "192MiB"}


class Cluster:
    def __init__(self, folder: Path, dsn: str, **settings: str) -> None:
        self.folder = folder
        self._settings = {"catalog": dsn, "archive_dir": str(folder / "archive"), **settings}
        self._key = os.urandom(32)
        self.nodes: dict[str, Node] = {}
        (folder / "archive").mkdir()

    def add(self, name: str, **settings: str) -> Node:
        """One more node, started and not yet ready."""
        data = self.folder / name / "data"
        data.mkdir(parents=True, mode=0o700)
        with open(os.open(data / "node.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(self._key)
        node = Node(self.folder / name, node_name=name, **{**SETTINGS, **self._settings, **settings})
        self.nodes[name] = node
        node.start()
        return node

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def tails(self) -> str:
        return "\n".join(f"--- {name}\n{node.tail(30)}" for name, node in self.nodes.items() if node.log.exists())


def number(node: Node) -> int:
    """Which of the cluster's nodes it is."""
    known = identity.read(node.paths)
    assert known is not None
    assert known.joined
    return known.node


@contextlib.contextmanager
def cluster(folder: Path, dsn: str, *names: str, **settings: str) -> Iterator[Cluster]:
    """A running cluster with the buckets of tests/crash."""
    made = Cluster(folder, dsn, **settings)
    try:
        for name in names:
            made.add(name)
        for node in made.nodes.values():
            node.ready(500.0)
        if names:
            with contextlib.closing(S3(made[names[0]])) as client:
                client.make_buckets()
        yield made
    except BaseException:
        print(made.tails(), file=sys.stderr)
        raise
    finally:
        for node in made.nodes.values():
            node.end()
