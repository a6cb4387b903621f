"""Floods of connections on the control port: those who ask are answered, whatever number of others says nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

UPGRADE = b"GET /v1/feedback?bucket=scan HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
HEALTH = b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.contextmanager
def flood(port: int, count: int, *, said: bytes = b"") -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connected(port, said)) for _ in range(count)]


def connected(port: int, said: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(said)
    return connection


def ended(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.control.process.CONNECTIONS_MAX", 60)
    monkeypatch.setattr("gateway.control.process.CONNECTIONS_SPARE", 20)


@pytest.mark.parametrize("said", [b"", UPGRADE, HEALTH], ids=["silent", "half a handshake", "idle after a request"])
async def test_idle_connections_make_room(narrow: None, start: Any, poll: Callable[..., Any], said: bytes) -> None:
    node = await start()
    with contextlib.ExitStack() as stack:
        connections = await asyncio.to_thread(lambda: stack.enter_context(flood(node.port, 150, said=said)))
        async with node.client() as client:
            for _ in range(5):
                assert (await client.get("/v1/health")).status_code == 200
        gone = await asyncio.to_thread(lambda: sum(map(ended, connections)))
        assert 100 <= gone < 150, "the oldest went, the newest are still there"


async def test_a_head_has_its_time(start: Any, monkeypatch: pytest.MonkeyPatch, poll: Callable[..., Any]) -> None:
    monkeypatch.setattr("gateway.control.patience.HEAD_TIMEOUT_S", 0.3)
    node = await start()
    await node.catalog.create_bucket("scan", "root")
    async with node.client() as client, client.stream("GET", "/v1/feedback?bucket=scan") as stream:
        lines = stream.aiter_lines()
        with flood(node.port, 10, said=UPGRADE) as slow, flood(node.port, 10) as silent:
            await asyncio.to_thread(poll, lambda: all(map(ended, slow + silent)), "they are closed", 20)
        with flood(node.port, 1, said=HEALTH) as (kept,):
            await asyncio.sleep(0)
            assert await asyncio.to_thread(kept.recv, 12) == b"HTTP/1.1 200"
            # A second request's head, slower than allowed.
            kept.sendall(UPGRADE)
            await asyncio.to_thread(poll, lambda: ended(kept), "it is closed", 20)
        async for line in lines:
            if line.startswith("event:"):
                break
        assert line == "event: ready", "a stream that is answered goes on"


async def test_silence_before_tls_makes_room(narrow: None, start: Any, certificate: tuple[Path, Path]) -> None:
    node = await start(tls=certificate)
    with contextlib.ExitStack() as stack:
        await asyncio.to_thread(lambda: stack.enter_context(flood(node.port, 150)))
        async with node.client() as client:
            assert (await client.get("/v1/health")).status_code == 200
