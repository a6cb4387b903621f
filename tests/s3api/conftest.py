"""Fixtures of the S3 tests: a node in a thread (real catalogue, buffer and HTTP server) and clients that sign."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import uvloop
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials as BotoCredentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ingest.arena import Arena, create_regions
from ingest.buffer import Buffer
from ingest.catalog import server as catalogue
from ingest.catalog.client import CatalogClient
from ingest.cluster.holdings import Holdings
from ingest.cluster.members import Members
from ingest.cluster.neighbours import Neighbours
from ingest.cluster.peer import PeerClient, PeerLimits
from ingest.cluster.signing import PeerKey, Sender
from ingest.counters import CATALOGUE, Counters
from ingest.paths import NodePaths
from ingest.ports import FrameHost, KernelRefused
from ingest.records import Grant, UserRecord
from ingest.recovery import recover
from ingest.segments import SegmentStore
from ingest.span_table import SpanTable
from s3api.auth.sessions import SessionSealer
from s3api.auth.users import CatalogUsers
from s3api.call import ServiceSettings
from s3api.http.limits import HttpLimits
from s3api.http.listener import Server
from s3api.peers import PeerService
from s3api.service import S3Service

START_TIMEOUT_S = 20.0
PEER_LIMITS = PeerLimits(connect_s=2.0, answer_s=3.0, ask_s=3.0, durable_s=5.0, stall_s=2.0)
PEER_KEY = PeerKey.derived(b"the key that nodes of a cluster share")
REGIONS, REGION_BYTES, SLAB_BYTES = 4, 64 << 20, 4 << 20


class CheckingHost:
    """The part of the kernel room that S3 talks to: refuses sources that do not compile, reduces nothing."""

    async def prepare(self, bucket: str) -> None: ...

    def open(self, info: object) -> None: ...

    def kernels_for(self, bucket: str, key: bytes) -> tuple[str, ...]:
        return ()

    def filters(self, bucket: str, key: bytes) -> dict[str, str]:
        return {}

    def catch_up(self, record: object, kernels: tuple[str, ...]) -> None: ...
    def landed(self, record: object, kernels: tuple[str, ...], payload: object) -> None: ...

    async def check_array(self, bucket: str, kernel: str, name: str, head: bytes, length: int) -> None:
        if not head.startswith(b"\x93NUMPY"):
            raise KernelRefused(f"{kernel}/{name}.npy", 1, "not a .npy file")

    async def check(self, bucket: str, name: str, source: bytes, metadata: object) -> None:
        try:
            compile(source, f"{name}.py", "exec")
        except SyntaxError as error:
            raise KernelRefused(f"{name}.py", error.lineno or 0, error.msg) from None


class NodeThread:
    """A whole S3 node on its own loop and thread; everything real, nothing mocked."""

    def __init__(
        self,
        root: Path,
        settings: ServiceSettings,
        kernels: FrameHost | None,
        number: int = 0,
        slot: int = 0,
        beside: NodeThread | None = None,
        files_max: int = 8,
    ) -> None:
        """``beside``: another node whose catalogue this one uses, too, with a slot of its own: a cluster without an engine."""
        self.paths = NodePaths(root)
        self.number = number
        self._slot = slot
        self._beside = beside
        self._files_max = files_max
        self.counters = Counters(None, 0)
        self.catalog: CatalogClient
        self.buffer: Buffer
        self.service: S3Service
        self._settings = settings
        self._kernels = kernels
        self._secrets: dict[bytes, str] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._tls_listener = socket.create_server(("127.0.0.1", 0))
        self.tls_endpoint = f"https://localhost:{self._tls_listener.getsockname()[1]}"
        self.certificate = root.parent / "certificate.pem"
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="node")

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S), "the node did not start"
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_TIMEOUT_S)
        assert not self._thread.is_alive(), "the node did not stop"
        if self._failure is not None:
            raise self._failure

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the node's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_TIMEOUT_S)

    def add_user(
        self, user_id: str, *grants: Grant, root: bool = False, enabled: bool = True, **fields: Any
    ) -> tuple[str, str]:
        """Returns (access key, secret key). ``fields``: of UserRecord."""
        access_key, secret = f"AK{secrets.token_hex(6).upper()}", secrets.token_hex(16)
        sealed = self.seal(secret)
        record = UserRecord(user_id, user_id.title(), access_key, sealed, tuple(grants), enabled, root, **fields)
        self.run(self.catalog.put_user(record))
        return access_key, secret

    def seal(self, secret: str) -> bytes:
        """What stands for the secret in an AccessKey."""
        sealed = secrets.token_bytes(16)
        self._secrets[sealed] = secret
        return sealed

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            self._failure = error
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        down = asyncio.Event()
        writer = None
        if self._beside is None:
            up = asyncio.Event()
            writer = asyncio.create_task(
                catalogue.serve(self.paths, Counters(None, CATALOGUE), node=self.number, ready=up.set, stop=down)
            )
            started = asyncio.create_task(up.wait())
            await asyncio.wait([writer, started], return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                started.cancel()
                await writer
        else:
            self.paths.create()
        executor = ThreadPoolExecutor(4)
        catalogued = self.paths if self._beside is None else self._beside.paths
        async with CatalogClient(catalogued, slot=self._slot, node=self.number) as self.catalog:
            arena = Arena(create_regions(REGIONS, REGION_BYTES), self.counters)
            spans = SpanTable(SpanTable.create(REGIONS, REGION_BYTES // SLAB_BYTES), REGION_BYTES // SLAB_BYTES)
            segments = SegmentStore(
                self.paths,
                node=self.number,
                slot=self._slot,
                segment_bytes=64 << 20,
                files_max=self._files_max,
                files_elsewhere=lambda: 0,
                use=lambda: self.catalog.segment_use(self._slot),
                durable=self.catalog.barrier,
                executor=executor,
                counters=self.counters,
            )
            await recover(self.paths, self.catalog, segments, arena, spans, self.counters)
            self.buffer = Buffer(
                paths=self.paths,
                arena=arena,
                spans=spans,
                segments=segments,
                catalog=self.catalog,
                executor=executor,
                counters=self.counters,
                recall_timeout_s=0.2,
            )
            users = CatalogUsers(self.catalog, lambda _, key: self._secrets[key.secret], SessionSealer(b"k" * 32))
            client = PeerClient(PEER_KEY, lambda: Sender(self.number, 1), limits=PEER_LIMITS)
            self.buffer.neighbours = Neighbours(Members(self.paths), client)
            peers = PeerService(Holdings(self.buffer), PEER_KEY)
            self.service = S3Service(self.buffer, users, self.counters, self._settings, self._kernels, peers=peers)
            server = Server(
                [self._listener],
                self.service,
                HttpLimits(),
                self.counters,
                render_error=self.service.render_error,
                observe=self.service.observe,
            )
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.certificate)
            tls_server = Server([self._tls_listener], self.service, HttpLimits(), self.counters, context)
            server.start()
            tls_server.start()
            self._ready.set()
            await self._stop.wait()
            await asyncio.gather(server.close(2.0), tls_server.close(2.0))
            await self.buffer.close(5.0)
            await client.close()
        down.set()
        if writer is not None:
            await writer
        executor.shutdown()
        self._listener.close()
        self._tls_listener.close()


class Link:
    """A TCP proxy in front of a node, in a thread: it can be cut, or go silent, after so many bytes in either direction."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.cut_after: int | None = None
        self.cut_once = False
        """What is cut by ``cut_after`` is one connection: the next one works."""
        self.silent_after: int | None = None
        self.passed = 0
        self.hold = threading.Event()
        """Nothing passes while it is clear."""
        self.hold.set()
        self._pairs: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept, name="link")
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                near.close()
                continue
            self._pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(source, sink))
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(64 << 10):
                self.hold.wait()
                self.passed += len(data)
                if self.cut_after is not None and self.passed > self.cut_after:
                    if self.cut_once:
                        self.mend()
                    break
                if self.silent_after is None or self.passed <= self.silent_after:
                    sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Everything passes again; what was cut stays cut."""
        self.cut_after = self.silent_after = None
        self.cut_once = False
        self.passed = 0

    def close(self) -> None:
        self.hold.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        for end in self._pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._pairs:
            end.close()


def write_certificate(path: Path) -> None:
    """A self-signed certificate for localhost and its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(tz=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeThread]:
    settings = ServiceSettings(domains=("s3.test",), host_id="bm9kZQ==")
    node = NodeThread(tmp_path_factory.mktemp("s3") / "node", settings, CheckingHost())  # type: ignore[arg-type]
    write_certificate(node.certificate)
    node.start()
    yield node
    node.stop()


@pytest.fixture(scope="session")
def root_keys(node: NodeThread) -> tuple[str, str]:
    return node.add_user("root", root=True)


def s3_client(node: NodeThread, keys: tuple[str, str], *, tls: bool = False, **config: Any) -> Any:
    config.setdefault("s3", {"addressing_style": "path"})
    return boto3.client(
        "s3",
        endpoint_url=node.tls_endpoint if tls else node.endpoint,
        verify=str(node.certificate) if tls else None,
        aws_access_key_id=keys[0],
        aws_secret_access_key=keys[1],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, **config),
    )


@pytest.fixture
def make_client(node: NodeThread) -> Iterator[Callable[..., Any]]:
    made = []

    def make(keys: tuple[str, str], **config: Any) -> Any:
        made.append(s3_client(node, keys, **config))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture(scope="session")
def s3(node: NodeThread, root_keys: tuple[str, str]) -> Iterator[Any]:
    """boto3 as root, with the SDK's defaults."""
    client = s3_client(node, root_keys)
    yield client
    client.close()


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"test-{secrets.token_hex(6)}"
    s3.create_bucket(Bucket=name)
    return name


class _Signer(S3SigV4Auth):
    """botocore's signer, with the payload hash a test asks for."""

    def payload(self, request: AWSRequest) -> str:
        return str(request.context.get("payload_hash") or super().payload(request))


class RawClient:
    """Requests exactly as a test writes them, signed by botocore, sent by httpx."""

    def __init__(self, endpoint: str, keys: tuple[str, str]) -> None:
        self.endpoint = endpoint
        self.credentials = BotoCredentials(*keys)
        self.http = httpx.Client(timeout=60)

    def signed(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, payload_hash: str = ""
    ) -> dict[str, str]:
        """The headers of the request, Authorization among them."""
        request = AWSRequest(method, self.endpoint + path, data=body, headers=dict(headers or {}))
        request.context["payload_hash"] = payload_hash
        _Signer(self.credentials, "s3", "us-east-1").add_auth(request)
        return dict(request.headers)

    def __call__(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        payload_hash: str = "",
    ) -> httpx.Response:
        signed = httpx.Headers(self.signed(method, path, body, headers, payload_hash), encoding="utf-8")
        return self.http.request(method, self.endpoint + path, content=body, headers=signed)


@pytest.fixture(scope="session")
def raw(node: NodeThread, root_keys: tuple[str, str]) -> Iterator[RawClient]:
    client = RawClient(node.endpoint, root_keys)
    yield client
    client.http.close()


def error_code(response: httpx.Response) -> str:
    return response.text.partition("<Code>")[2].partition("</Code>")[0]


@pytest.fixture
def code_of() -> Callable[[httpx.Response], str]:
    return error_code
