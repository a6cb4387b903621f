"""A real node for other people's clients, first without TLS and then with it, and the objects that they all carry."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> nodes.Certificate:
    return nodes.Certificate(*authority.make(tmp_path_factory.mktemp("tls")))


@pytest.fixture(scope="session")
def node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificate: nodes.Certificate
) -> Iterator[ClientNode]:
    """By the parameter ``http`` or ``https``; one at a time, because pytest sorts by session parameters."""
    tls = certificate if request.param == "https" else None
    with nodes.running(tmp_path_factory.mktemp(f"node-{request.param}"), tls) as started:
        started.put(BUCKET)
        started.fill(MANY, LISTED)
        yield started


@pytest.fixture(scope="session")
def stage_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("objects")
    text, large, empty = folder / "text", folder / "frames.raw", folder / "empty"
    text.write_text("".join(f"{number:07d}\n" for number in range(50_000)))
    large.write_bytes(os.urandom(OBJECT_BYTES))
    empty.touch()
    return text, large, empty


@pytest.fixture(scope="session")
def service(node: ClientNode) -> Service:
    return Service(node.url, node.keys.access_key, node.keys.secret_key, node.ca, BUCKET, MANY)


@pytest.fixture
def stage(node: ClientNode, stage_files: tuple[Path, Path, Path], tmp_path: Path) -> Stage:
    text, large, empty = stage_files
    return Stage(node, tmp_path, text, large, empty)


@pytest.fixture(scope="session")
def adapter(
    request: pytest.FixtureRequest, service: Service, peer: Peer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapter]:
    kind: type[Adapter] = request.param
    with pytest.MonkeyPatch.context() as patch:
        # What some libraries read when they make their first connection.
        if service.ca is not None:
            patch.setenv("SSL_CERT_FILE", str(service.ca))
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        made = kind(service, peer, tmp_path_factory.mktemp(kind.__name__))
        try:
            yield made
        finally:
            made.close()
