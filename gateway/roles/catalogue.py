"""The catalogue process: the node's only writer of journal and index. The room does the work; this wires it."""

from __future__ import annotations

from gateway.boot import Boot
from ingest.catalog import server
from ingest.counters import CATALOGUE, Counters

NODE = 0
"""Number of this node: there is one until membership gives numbers out."""


def main(boot: Boot) -> None:
    server.run(boot.paths, Counters(boot.counters, CATALOGUE), node=NODE, ready=boot.ready)
