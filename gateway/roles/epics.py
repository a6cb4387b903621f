"""The epics process: writes the values of named actions to their targets (gateway/bridge)."""

from __future__ import annotations

from gateway.boot import Boot
from gateway.bridge.epics import EpicsDriver
from gateway.bridge.server import run


def main(boot: Boot) -> None:
    run(boot.paths.bridge_socket("epics"), EpicsDriver(), boot.ready)
