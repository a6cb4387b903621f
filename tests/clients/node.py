"""The node that all clients share: ``hiss serve`` as an operator starts it, with or without TLS, and asked without any client."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import httpx

from gateway.boot import die_with_parent
from gateway.cli.s3put import sign
from gateway.users import KeyPair
from tests.clients.adapters.base import REGION

START_TIMEOUT_S, STOP_TIMEOUT_S = 120.0, 60.0


class Certificate(NamedTuple):
    """Files in PEM: who signed, what the node shows, its private key."""

    ca: Path
    chain: Path
    key: Path


@dataclasses.dataclass
class ClientNode:
    """``http`` trusts the node's certificate."""

    url: str
    keys: KeyPair
    ca: Path | None
    http: httpx.Client
    data: Path
    many_keys: list[str] = dataclasses.field(default_factory=list)

    def s3(self, method: str, bucket: str, key: str = "", body: bytes = b"") -> httpx.Response:
        """One signed request; any status is returned."""
        path = f"/{bucket}/{quote(key, safe='/-_.~')}" if key else f"/{bucket}"
        headers = sign(method, path, {"host": urlsplit(self.url).netloc}, self.keys, REGION)
        return self.http.request(method, self.url + path, headers=headers, content=body if method == "PUT" else None)

    def put(self, bucket: str, key: str = "", body: bytes = b"") -> None:
        answer = self.s3("PUT", bucket, key, body)
        assert answer.status_code == 200, answer.text

    def fill(self, bucket: str, count: int) -> None:
        """``count`` keys in folders of a hundred."""
        self.put(bucket)
        self.many_keys = [f"run{number // 100:02d}/frame {number:04d}.cbf" for number in range(count)]
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda key: self.put(bucket, key, b"x"), self.many_keys):
                pass


@contextlib.contextmanager
def running(folder: Path, certificate: Certificate | None) -> Iterator[ClientNode]:
    """``certificate``: for a node that speaks TLS."""
    keys = KeyPair("CLIENTS" + secrets.token_hex(6).upper(), secrets.token_urlsafe(30))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HISS_")}
    environ |= {"HISS_ROOT_ACCESS_KEY": keys.access_key, "HISS_ROOT_SECRET_KEY": keys.secret_key}
    data = folder / "data"
    command = [sys.executable, "-m", "gateway.cli", "serve", "--data", str(data), "--host", "127.0.0.1"]
    command += ["--s3-port", "0", "--control-port", "0", "--dav-port", "0"]
    command += ["--set", "arena_bytes=512MiB", "--set", "kernels=off"]
    if certificate is not None:
        command += ["--tls-cert", str(certificate.chain), "--tls-key", str(certificate.key)]
    log = folder / "node.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # A node never outlives the tests, however these end.
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
    scheme, ca = ("https", certificate.ca) if certificate else ("http", None)
    limits = httpx.Limits(max_keepalive_connections=10)
    with httpx.Client(verify=_trust(ca), timeout=60.0, limits=limits) as http:
        try:
            ports = _ports(process, data, scheme, http, log)
            yield ClientNode(f"{scheme}://127.0.0.1:{ports['s3']}", keys, ca, http, data)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _trust(ca: Path | None) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=str(ca)) if ca else True


def _ports(process: subprocess.Popen[bytes], data: Path, scheme: str, http: httpx.Client, log: Path) -> dict[str, int]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, httpx.TransportError):
            ports = json.loads((data / "run" / "ports.json").read_text())
            if http.get(f"{scheme}://127.0.0.1:{ports['control']}/v1/health").status_code == 200:
                return dict(ports)
        time.sleep(0.05)
    raise AssertionError(f"the node did not start:\n{log.read_text()[-3000:]}")
