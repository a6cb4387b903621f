"""Real nodes for other people's clients, one without and one with TLS, and the objects that they all carry."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients import authority
from tests.clients import node as nodes
from tests.clients.adapters import Adapter, Service
from tests.clients.node import ClientNode
from tests.clients.scenario import LISTED, Stage

OBJECT_BYTES = 100_000_000
BUCKET, MANY = "clients", "many"
Peer = Callable[[str], str]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Steps that a client cannot do are no tests; the adapter says why."""
    idle = [item for item in items if _cannot(item)]
    if idle:
        config.hook.pytest_deselected(items=idle)
        items[:] = [item for item in items if item not in set(idle)]


def _cannot(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    kind, step = params.get("adapter"), params.get("step")
    return kind is not None and step is not None and step.__name__ in kind.cannot


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> nodes.Certificate:
    return nodes.Certificate(*authority.make(tmp_path_factory.mktemp("tls")))


@pytest.fixture(scope="package")
def node_of(
    tmp_path_factory: pytest.TempPathFactory, certificate: nodes.Certificate
) -> Iterator[Callable[[str], ClientNode]]:
    """The node that speaks ``http``, or ``https``: each is started when it is first asked for, and stays for all clients."""
    known: dict[str, ClientNode] = {}
    with contextlib.ExitStack() as stack:

        def find(scheme: str) -> ClientNode:
            if scheme not in known:
                tls = certificate if scheme == "https" else None
                folder = tmp_path_factory.mktemp(f"node-{scheme}")
                stack.callback(shutil.rmtree, folder, ignore_errors=True)  # gigabytes of segments
                started = stack.enter_context(nodes.running(folder, tls))
                started.put(BUCKET)
                started.fill(MANY, LISTED)
                known[scheme] = started
            return known[scheme]

        yield find


@pytest.fixture
def node(request: pytest.FixtureRequest, node_of: Callable[[str], ClientNode]) -> ClientNode:
    """By the parameter ``http`` or ``https``."""
    return node_of(request.param)


@pytest.fixture(scope="session")
def stage_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("objects")
    text, large, empty = folder / "text", folder / "frames.raw", folder / "empty"
    text.write_text("".join(f"{number:07d}\n" for number in range(50_000)))
    large.write_bytes(os.urandom(OBJECT_BYTES))
    empty.touch()
    return text, large, empty


@pytest.fixture
def service(node: ClientNode) -> Service:
    return Service(node.url, node.keys.access_key, node.keys.secret_key, node.ca, BUCKET, MANY)


@pytest.fixture
def stage(node: ClientNode, stage_files: tuple[Path, Path, Path], tmp_path: Path) -> Stage:
    text, large, empty = stage_files
    return Stage(node, tmp_path, text, large, empty)


@pytest.fixture(scope="session")
def adapter_of(
    peer: Peer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[type[Adapter], Service], Adapter]]:
    """One adapter is open at a time: the one of the test before, where it is the same."""
    opened: list[Adapter] = []

    def find(kind: type[Adapter], service: Service) -> Adapter:
        if not opened or type(opened[0]) is not kind or opened[0].service != service:
            while opened:
                opened.pop().close()
            opened.append(kind(service, peer, tmp_path_factory.mktemp(kind.__name__)))
        return opened[0]

    yield find
    while opened:
        opened.pop().close()


@pytest.fixture
def adapter(
    request: pytest.FixtureRequest,
    service: Service,
    adapter_of: Callable[[type[Adapter], Service], Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> Adapter:
    # What some libraries read when they make their first connection.
    if service.ca is not None:
        monkeypatch.setenv("SSL_CERT_FILE", str(service.ca))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return adapter_of(request.param, service)
