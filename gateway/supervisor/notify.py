"""Telling systemd how the service is: READY=1, WATCHDOG=1, STOPPING=1 (sd_notify(3)); silent without NOTIFY_SOCKET."""

from __future__ import annotations

import asyncio
import os
import socket


def notify(state: str) -> None:
    """Send one state to the service manager, if there is one; never raises, never blocks."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            return


async def watchdog() -> None:
    """Feed the service manager's watchdog at half its period, for as long as this loop runs."""
    period_s = int(os.environ.get("WATCHDOG_USEC", "0") or 0) / 1e6
    while period_s > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_s / 2)
