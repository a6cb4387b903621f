"""The bridge processes against a real IOC and a real Tango device server: writes, refusals, what hangs, what dies."""

from __future__ import annotations

import itertools
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.bridge import wire


class Client:
    """Speaks to a bridge as the control process does, and waits."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._numbers = itertools.count(1)

    def send(self, target: str, value: float, timeout_s: float = 5.0, before_s: float = 5.0) -> int:
        number = next(self._numbers)
        write = wire.Write(number, target.partition(":")[2], value, timeout_s, time.monotonic() + before_s)
        self._socket.sendall(wire.encode(write))
        return number

    def answer(self) -> wire.Written:
        length = int.from_bytes(self._file.read(4), "little")
        return wire.WRITTEN.decode(self._file.read(length))

    def write(self, target: str, value: float, timeout_s: float = 5.0) -> str:
        """The error; empty when it was written."""
        number = self.send(target, value, timeout_s)
        answer = self.answer()
        assert answer.number == number
        return answer.error

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture(params=["epics", "tango"])
def system(request: pytest.FixtureRequest, bridge: Callable[..., Any], tmp_path: Path) -> Any:
    """(control system's server, bridge process, client, name of a writable number, and of another)."""
    peer = request.getfixturevalue("ioc" if request.param == "epics" else "device_server")
    process = bridge(request.param, tmp_path / "bridge.sock", peer.environment)
    client = Client(tmp_path / "bridge.sock")
    names = ("BL1:ATT", "BL1:COUNT") if request.param == "epics" else ("position", "number")
    yield peer, process, client, *names
    client.close()


def test_values_arrive_in_order(system: Any) -> None:
    peer, _, client, name, whole = system
    for value in (0.25, 1.0, -3.5, 0.0):
        assert client.write(peer.target(name), value) == ""
    assert peer.written(name) == [0.25, 1.0, -3.5, 0.0]
    assert client.write(peer.target(whole), 7.0) == ""
    assert peer.written(whole) == [7.0]


def test_what_is_not_there_fails_with_a_reason_and_the_next_write_works(system: Any) -> None:
    peer, _, client, name, _ = system
    error = client.write(peer.target("nothing"), 1.0, timeout_s=1.0)
    assert error
    assert "Traceback" not in error
    assert client.write(peer.target(name), 2.0) == ""


def test_a_server_that_hangs_costs_its_writes_only(system: Any) -> None:
    peer, process, client, name, whole = system
    assert client.write(peer.target(name), 1.0) == ""
    with peer.hung():
        began_s = time.monotonic()
        error = client.write(peer.target(name), 2.0, timeout_s=0.5)
        assert error
        assert time.monotonic() - began_s < 5
        # What could not begin in time is not done later.
        client.send(peer.target(name), 3.0, timeout_s=0.5, before_s=-0.1)
        assert client.answer().error
    assert client.write(peer.target(whole), 4.0, timeout_s=10) == ""
    assert process.poll() is None
    assert 3.0 not in peer.written(name)


def test_nonsense_ends_its_connection_only(system: Any, tmp_path: Path) -> None:
    peer, _, client, name, _ = system
    for nonsense in (b"\xff\xff\xff\xff", (3).to_bytes(4, "little") + b"abc"):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(tmp_path / "bridge.sock"))
            other.settimeout(10)
            other.sendall(nonsense)
            assert other.recv(1) == b""
    assert client.write(peer.target(name), 1.0) == ""


def test_it_stops_at_once_even_while_a_write_hangs(system: Any) -> None:
    peer, process, client, name, _ = system
    assert client.write(peer.target(name), 1.0) == ""
    with peer.hung():
        client.send(peer.target(name), 2.0, timeout_s=60)
        process.terminate()
        assert process.wait(20) == 0


def test_epics_enums_strings_and_refusals(ioc: Any, bridge: Callable[..., Any], tmp_path: Path) -> None:
    bridge("epics", tmp_path / "bridge.sock", ioc.environment)
    client = Client(tmp_path / "bridge.sock")
    assert client.write("epics:BL1:SHUTTER", 1.0) == ""
    assert ioc.written("BL1:SHUTTER") == [1.0]
    assert "above the drive limit" in client.write("epics:BL1:LIMITED", 6.0)
    assert client.write("epics:BL1:LIMITED", 5.0) == ""
    assert "whole numbers" in client.write("epics:BL1:SHUTTER", 0.5)
    assert "whole numbers" in client.write("epics:BL1:COUNT", 0.5)
    assert "takes no number" in client.write("epics:BL1:NAME", 1.0)
    assert ioc.written("BL1:SHUTTER") == [1.0]
    client.close()


def test_tango_types_and_refusals(device_server: Any, bridge: Callable[..., Any], tmp_path: Path) -> None:
    bridge("tango", tmp_path / "bridge.sock", {})
    client = Client(tmp_path / "bridge.sock")
    target = device_server.target
    assert client.write(target("is_open"), 1.0) == ""
    assert device_server.written("is_open") == [1.0]
    assert "whole numbers" in client.write(target("number"), 0.5)
    assert "beyond the end switch" in client.write(target("position"), 60.0)
    assert "not writable" in client.write(target("fixed"), 1.0)
    client.close()


def test_a_device_server_that_restarts_is_found_again(
    device_server: Any, bridge: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bridge("tango", tmp_path / "bridge.sock", {})
    client = Client(tmp_path / "bridge.sock")
    target = device_server.target("position")
    assert client.write(target, 1.0) == ""
    arguments = device_server.process.args
    device_server.process.kill()
    device_server.process.wait()
    assert client.write(target, 2.0, timeout_s=1.0)
    again = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while client.write(target, 3.0, timeout_s=2.0):
            assert time.monotonic() < deadline
    finally:
        again.kill()
        again.wait()
    assert device_server.written("position") == [1.0, 3.0]
    client.close()
