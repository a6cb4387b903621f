"""The network that cluster tests run in: addresses, rates, and cuts that nobody is told of."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from bench.netns import Host, Network

PORT = 7000


class Echo:
    """On a host: takes connections and sends back what comes."""

    def __init__(self, host: Host) -> None:
        with host.entered():
            self.listener = socket.create_server((host.address, PORT))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1 << 20):
                connection.sendall(data)


def connect(source: Host, target: Host, timeout_s: float = 20.0) -> socket.socket:
    with source.entered():
        return socket.create_connection((target.address, PORT), timeout=timeout_s)


def answers(connection: socket.socket, timeout_s: float) -> bool:
    connection.settimeout(timeout_s)
    try:
        connection.sendall(b"x")
        return connection.recv(1) == b"x"
    except TimeoutError:
        return False


@pytest.fixture(scope="module")
def three(network: Network) -> tuple[Host, Host, Host]:
    hosts = network.host("a"), network.host("b"), network.host("c")
    for host in hosts:
        Echo(host)
    return hosts


def test_hosts_reach_each_other_and_the_tests_own_network_does_not(three: tuple[Host, Host, Host]) -> None:
    a, b, _ = three
    with connect(a, b) as connection:
        assert connection.getpeername() == (b.address, PORT)
        assert answers(connection, 20)
    listener = socket.create_server(("127.0.0.1", 0))  # this thread is at home again
    listener.close()


def test_a_cut_is_silent_and_heals(three: tuple[Host, Host, Host]) -> None:
    a, b, c = three
    with connect(a, b) as old:
        b.cut()
        assert not answers(old, 0.3)
        with connect(a, c) as other:
            assert answers(other, 20)
        b.mend()
        old.settimeout(30)
        assert old.recv(1) == b"x"


@pytest.mark.parametrize(("sends", "receives"), [(True, False), (False, True)])
def test_one_direction_of_a_link_is_cut(three: tuple[Host, Host, Host], sends: bool, receives: bool) -> None:
    a, b, _ = three
    with connect(a, b) as old:
        b.cut(sends=sends, receives=receives)
        assert not answers(old, 0.3)
        b.mend()
        old.settimeout(30)
        assert old.recv(1) == b"x"


def test_one_way_between_two_hosts_is_cut(three: tuple[Host, Host, Host]) -> None:
    a, b, c = three
    with connect(a, b) as old, connect(c, b) as other, connect(a, c) as third:
        a.cut_from(b)
        assert not answers(old, 0.3)
        assert answers(other, 20)
        assert answers(third, 20)
        a.mend()
        old.settimeout(30)
        assert old.recv(1) == b"x"


def test_a_link_has_its_rate(network: Network) -> None:
    d, e = network.host("d", 40e6), network.host("e")
    echo = Echo(e)
    total = 8_000_000
    received = 0

    def read(connection: socket.socket) -> None:
        nonlocal received
        while received < total:
            received += len(connection.recv(1 << 20))

    with connect(d, e) as connection:
        reader = threading.Thread(target=read, args=(connection,))
        reader.start()
        begun = time.perf_counter()
        for _ in range(total // 100_000):
            connection.sendall(bytes(100_000))
        reader.join(60)
        rate = total / (time.perf_counter() - begun)
    echo.listener.close()
    assert received == total
    assert 20e6 < rate < 46e6
