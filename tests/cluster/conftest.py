"""The cluster tests' plugin: a network of namespaces for each file, where the machine lets us make one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from bench.netns import Network, Refused


@pytest.fixture(scope="session")
def network_tools(peer: Callable[[str], str]) -> None:
    """Skips where namespaces are not to be had; in CI programs must be there, and the user must be root."""
    if os.getuid() != 0:
        assert os.environ.get("CI") != "true", "tests of clusters need root"
        pytest.skip("network namespaces need root")
    for program in ("ip", "tc", "nsenter"):
        peer(program)


@pytest.fixture(scope="module")
def network(network_tools: None) -> Iterator[Network]:
    """A switch without hosts; gone with the file."""
    try:
        made = Network()
    except Refused as error:
        pytest.skip(f"this machine makes no network namespaces: {error}")
    try:
        yield made
    finally:
        made.end()
