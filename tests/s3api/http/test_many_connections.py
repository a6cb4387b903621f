"""Ten thousand connections that say nothing: they cost little, and hold up nobody."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from s3api.http.limits import HttpLimits

IDLE = 10_000
DESCRIPTORS = IDLE + 500
BYTES_EACH_MAX = 8 * 1024
LAST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

PEERS = """
import socket, sys
sockets = []
for number in range(int(sys.argv[2])):
    sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60)
    sockets.append(sock)
    if number % 10 == 0:
        sock.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        pytest.skip(f"{hard} open files are allowed here, {DESCRIPTORS} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _peers(port: int) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", PEERS, str(port), str(IDLE)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def test_idle_connections_cost_little_and_hold_up_nobody(start, until, descriptors):
    """Every tenth has been used before it went idle: what a request needed is given back."""
    running = await start(limits=HttpLimits(connections=IDLE + 10, idle_timeout_s=600))
    open_now = running.counters.cell("hiss_http_connections")
    before = _anonymous_bytes()
    with _peers(running.port) as peers:
        assert peers.stdout is not None
        assert peers.stdin is not None
        try:
            assert await asyncio.to_thread(peers.stdout.readline) == b"ready\n"
            await until(lambda: open_now.value() == IDLE, 60)
            assert (_anonymous_bytes() - before) / IDLE < BYTES_EACH_MAX
            assert b" 200 OK" in await running.exchange(LAST)
        finally:
            peers.kill()
    await until(lambda: open_now.value() == 0, 60)
