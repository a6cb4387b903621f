"""What tests on a real node share, in one place to import from: a node that is killed, a client, its ledger and the judge.

``node`` starts and kills, ``client`` asks, ``load`` remembers what was told, ``judge`` compares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.crash.client import BUCKETS, S3, Answer, sign
from tests.crash.judge import Judge
from tests.crash.load import MIB, POOL, Body, Ledger, Load
from tests.crash.node import ROOT, Node, until


@contextlib.contextmanager
def running(folder: Path, environ: dict[str, str] | None = None, **settings: str) -> Iterator[Node]:
    """A started, ready node with its buckets."""
    node = Node(folder, environ, **settings)
    node.start()
    try:
        node.ready()
        with contextlib.closing(S3(node)) as client:
            client.make_buckets()
        yield node
    finally:
        node.end()


__all__ = [
    "BUCKETS",
    "MIB",
    "POOL",
    "ROOT",
    "S3",
    "Answer",
    "Body",
    "Judge",
    "Ledger",
    "Load",
    "Node",
    "running",
    "sign",
    "until",
]
