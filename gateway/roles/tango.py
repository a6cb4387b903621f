"""The tango process: writes the values of named actions to their targets (gateway/bridge)."""

from __future__ import annotations

from gateway.boot import Boot
from gateway.bridge.server import run
from gateway.bridge.tango import TangoDriver


def main(boot: Boot) -> None:
    run(boot.paths.bridge_socket("tango"), TangoDriver(), boot.ready)
