"""The cluster tests' plugin: a network of namespaces where the machine lets us make one, and a cluster on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.netns import Network, Refused
from tests.cluster.node import Cluster, ended
from tests.cluster.scene import Scene
from tests.cluster.wall_clock import WallClock

SMALL_DISK_BYTES = 640 << 20
EVICTING = {"evict_high": "0.05", "evict_low": "0.0"}
"""More than 51 MiB on a node are evicted as soon as they are archived."""


@pytest.fixture(scope="session")
def network_tools(peer: Callable[[str], str]) -> None:
    """Skips where namespaces are not to be had; in CI programs must be there, and the user must be root."""
    if os.getuid() != 0:
        assert os.environ.get("CI") != "true", "tests of clusters need root"
        pytest.skip("network namespaces need root")
    for program in ("ip", "tc", "nsenter", "gcc"):
        peer(program)


def _network() -> Iterator[Network]:
    try:
        made = Network()
    except Refused as error:
        pytest.skip(f"this machine makes no network namespaces: {error}")
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def network(network_tools: None) -> Iterator[Network]:
    """A switch without hosts; gone with the file."""
    yield from _network()


@pytest.fixture(scope="session")
def seed() -> int:
    """HISS_TEST_SEED, or a fixed one."""
    return int(os.environ.get("HISS_TEST_SEED", "20261129"))


@pytest.fixture(scope="package")
def cluster_network(network_tools: None) -> Iterator[Network]:
    yield from _network()


@pytest.fixture(scope="package")
def wall_clock(network_tools: None, peer: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> WallClock:
    """Of node b."""
    return WallClock(tmp_path_factory.mktemp("wall-clock"), peer("gcc"))


@pytest.fixture(scope="package")
def cluster(
    cluster_network: Network, postgres_programs: Path, wall_clock: WallClock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three serving nodes: b has a clock of its own, c a small disk of its own."""
    folder = tmp_path_factory.mktemp("cluster")
    with ended(Cluster(folder, cluster_network, postgres_programs, (), **EVICTING)) as made:
        made.add("a", failure_domain="rack-1")
        made.add("b", wall_clock.environ, failure_domain="rack-2")
        made.add("c", disk_bytes=SMALL_DISK_BYTES, failure_domain="rack-2")
        made.start()
        yield made
        made.stop()


@pytest.fixture
def scene(cluster: Cluster, wall_clock: WallClock, request: pytest.FixtureRequest, seed: int) -> Iterator[Scene]:
    """The cluster, whole before and after the test."""
    name = request.node.originalname.removeprefix("test_").replace("_", "-")[:40].strip("-")
    number = len(cluster.used)
    cluster.used.append(name)
    made = Scene(cluster, wall_clock, f"t{number}-{name}"[:50].strip("-"), seed)
    try:
        yield made
    finally:
        made.heal()
