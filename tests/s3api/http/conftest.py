"""Real servers on loopback for the HTTP room: every test of it runs on uvloop, as the gateway does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from ingest.counters import Counters
from s3api.http.limits import HttpLimits
from s3api.http.listener import Server
from s3api.http.message import FileBody, HttpError, Request, Response


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], Any]]:
    return {"uvloop": uvloop.new_event_loop}


class MemorySink:
    """A BodySink over one piece of memory, handed out in ``span`` bytes; can be told to have none for a while."""

    def __init__(self, size: int, span: int = 1 << 30) -> None:
        self.memory = bytearray(size)
        self.count = 0
        self.span = span
        self.offers: list[int] = []
        self.dry = asyncio.Event()
        self.dry.set()
        self.starved = 0
        self.dry_every = 0
        self.full_at: int | None = None

    def get_buffer(self) -> memoryview | None:
        if self.full_at is not None and self.count >= self.full_at:
            raise HttpError(503, "SlowDown", "no room")
        if self.dry_every and self.count // self.dry_every > self.starved:
            self.starved += 1
            self.dry.clear()
            asyncio.get_running_loop().call_later(0.001, self.dry.set)
        if not self.dry.is_set():
            return None
        end = min(self.count + self.span - self.count % self.span, len(self.memory))
        self.offers.append(end - self.count)
        return memoryview(self.memory)[self.count : end]

    def received(self, count: int) -> None:
        assert 0 < count <= self.offers[-1]
        self.count += count

    async def writable(self) -> None:
        await self.dry.wait()

    def value(self) -> bytes:
        return bytes(self.memory[: self.count])


@dataclasses.dataclass
class Piece:
    fd: int
    offset: int
    length: int


class Echo:
    """A handler with a few behaviours, chosen by path; remembers what it saw."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.bodies: list[bytes] = []
        self.errors: list[BaseException] = []
        self.sinks: list[MemorySink] = []
        self.file: FileBody | None = None
        self.closed = 0
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()

    async def __call__(self, request: Request) -> Response:
        self.requests.append(request)
        self.entered.set()
        verb = request.path.strip("/").split("/")[0]
        action: Callable[[Request], Any] = getattr(self, f"do_{verb}", self.do_default)
        response = await action(request)
        assert isinstance(response, Response)
        return response

    async def do_default(self, request: Request) -> Response:
        body = await request.body.read(1 << 20)
        self.bodies.append(body)
        return Response(200, [("x-request-id", request.request_id)], hashlib.sha256(body).hexdigest().encode())

    async def do_sink(self, request: Request) -> Response:
        sink = MemorySink(int(request.arg("size") or 1 << 20), int(request.arg("span") or 1 << 30))
        sink.dry_every = int(request.arg("dry") or 0)
        sink.full_at = int(request.arg("full") or 0) or None
        self.sinks.append(sink)
        try:
            count = await request.body.into(sink)
        except BaseException as error:
            self.errors.append(error)
            raise
        assert count == sink.count
        self.bodies.append(sink.value())
        trailers = ",".join(f"{name}={value}" for name, value in request.body.trailers.items())
        return Response(200, [("x-trailers", trailers)], hashlib.sha256(sink.value()).hexdigest().encode())

    async def do_aws(self, request: Request) -> Response:
        request.body.unwrap_aws_chunked(int(request.headers["x-amz-decoded-content-length"]), False, True, None)
        return await self.do_sink(request)

    async def do_refuse(self, request: Request) -> Response:
        return Response(503, [], b"slow down")

    async def do_wait(self, request: Request) -> Response:
        await self.gate.wait()
        return Response(200, [], b"waited")

    async def do_narrow(self, request: Request) -> Response:
        """The body may be ``window`` ahead of what is read, which is nothing until the gate opens."""
        request.body.set_window(int(request.arg("window") or 0))
        await self.gate.wait()
        request.body.set_window(0)
        return await self.do_sink(request)

    async def do_boom(self, request: Request) -> Response:
        raise RuntimeError("secret detail")

    async def do_file(self, request: Request) -> Response:
        assert self.file is not None
        return Response(200, [("Content-Type", "application/octet-stream")], self.file)

    async def do_stream(self, request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            for i in range(int(request.arg("n") or 3)):
                yield b"%06d," % i * int(request.arg("times") or 1)
            if request.arg("fail") is not None:
                raise RuntimeError("in the middle")

        length = request.arg("length")
        return Response(200, [], chunks(), content_length=int(length) if length else None)

    async def do_head(self, request: Request) -> Response:
        return Response(200, [("ETag", '"x"')], content_length=12345)

    async def do_empty(self, request: Request) -> Response:
        return Response(204)


@dataclasses.dataclass
class Running:
    server: Server
    handler: Echo
    port: int
    counters: Counters
    observed: list[tuple[Request, int, int, int]]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, raw: bytes, *, eof: bool = False) -> bytes:
        """Send bytes, read until the server closes."""
        reader, writer = await self.connect()
        try:
            writer.write(raw)
            if eof:
                writer.write_eof()
            return await asyncio.wait_for(reader.read(), 30)
        finally:
            writer.close()


Start = Callable[..., Any]


async def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Poll for what has no event to wait for."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition():
        assert loop.time() < deadline, "it did not come to pass"
        await asyncio.sleep(0.005)


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """``await start(limits=…, tls=context)`` → a running server; all are closed, and checked empty, afterwards."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            *, limits: HttpLimits | None = None, tls: ssl.SSLContext | None = None, handler: Any = None
        ) -> Running:
            listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            stack.callback(listener.close)
            echo = handler or Echo()
            counters = Counters(None, 0)
            observed: list[tuple[Request, int, int, int]] = []
            server = Server(
                [listener],
                echo,
                limits or HttpLimits(),
                counters,
                tls,
                observe=lambda *seen: observed.append(seen),
            )
            server.start()

            async def stop() -> None:
                await server.close(2.0)
                assert counters.cell("hiss_http_connections").value() == 0
                assert server.active_bodies == 0

            stack.push_async_callback(stop)
            return Running(server, echo, listener.getsockname()[1], counters, observed)

        yield make


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return cert, key


@pytest.fixture
def server_tls(tls_files: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*tls_files)
    return context


@pytest.fixture
def client_tls(tls_files: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(tls_files[0]))
