"""The node of the demonstration: started as an operator would, asked as an instrument and a scientist would.

In: a folder. Out: ``DemoNode`` with its URLs, and requests signed as root. What always holds: when ``running`` ends, by
whatever way, the node has been stopped and waited for; if this process is killed, the operating system tells the node.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import http.client
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import numpy as np

from gateway.cli import node as cli_node
from gateway.cli.output import CliError
from gateway.cli.s3put import sign
from gateway.users import KeyPair

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0
REGION = "us-east-1"
_PR_SET_PDEATHSIG = 1


class DemoFailed(Exception):
    """Something did not go as it must; ``str()`` says what."""


class DemoNode:
    """``s3_url``, ``control_url`` and ``dav_url`` have no trailing slash."""

    def __init__(self, folder: Path, keys: KeyPair, ports: Mapping[str, Any]) -> None:
        self.data = folder / "data"
        self.log = folder / "node.log"
        self.keys = keys
        self.s3_url, self.control_url, self.dav_url = (
            f"http://127.0.0.1:{ports[name]}" for name in ("s3", "control", "dav")
        )

    def head(self, method: str, bucket: str, key: str, length: int, headers: Mapping[str, str]) -> str:
        """A complete, signed request head."""
        path = f"/{bucket}/{quote(key, safe='/-_.~')}" if key else f"/{bucket}"
        fields = {"host": urlsplit(self.s3_url).netloc, "content-length": str(length), **headers}
        signed = sign(method, path, fields, self.keys, REGION)
        return f"{method} {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in signed.items()) + "\r\n"

    def s3(
        self, method: str, bucket: str, key: str = "", body: bytes | memoryview = b"", **metadata: str
    ) -> httpx.Response:
        """One signed request; ``metadata`` becomes x-amz-meta- headers, ``_`` in a name is ``-``. Any status is returned."""
        path = f"/{bucket}/{quote(key, safe='/-_.~')}" if key else f"/{bucket}"
        fields = {"host": urlsplit(self.s3_url).netloc}
        fields |= {f"x-amz-meta-{name.replace('_', '-')}": value for name, value in metadata.items()}
        content = bytes(body) if method == "PUT" else None
        return httpx.request(
            method, self.s3_url + path, headers=sign(method, path, fields, self.keys, REGION), content=content,
            timeout=ANSWER_TIMEOUT_S,
        )  # fmt: skip

    def put(self, bucket: str, key: str = "", body: bytes | memoryview = b"", **metadata: str) -> httpx.Response:
        """PUT that must succeed. Raises DemoFailed."""
        answer = self.s3("PUT", bucket, key, body, **metadata)
        if answer.status_code != 200:
            raise DemoFailed(f"PUT {bucket}/{key}: answered {answer.status_code}: {answer.text[:600]}")
        return answer

    def tag(self, bucket: str, **settings: str) -> None:
        """Bucket settings as tags: ``drain_after_s="8"`` is ``hiss.drain-after-s``. Raises DemoFailed."""
        rows = (f"<Tag><Key>hiss.{n.replace('_', '-')}</Key><Value>{v}</Value></Tag>" for n, v in settings.items())
        fields = {"host": urlsplit(self.s3_url).netloc}
        answer = httpx.put(
            f"{self.s3_url}/{bucket}?tagging=",
            headers=sign("PUT", f"/{bucket}", fields, self.keys, REGION, query="tagging="),
            content=f"<Tagging><TagSet>{''.join(rows)}</TagSet></Tagging>",
            timeout=ANSWER_TIMEOUT_S,
        )
        if answer.status_code >= 300:
            raise DemoFailed(f"tags of {bucket}: answered {answer.status_code}: {answer.text[:600]}")

    def product(self, bucket: str, key: str, timeout_s: float) -> bytes:
        """The object, as soon as it is there. Raises DemoFailed."""
        deadline = time.monotonic() + timeout_s
        while (answer := self.s3("GET", bucket, key)).status_code != 200:
            if answer.status_code != 404 or time.monotonic() > deadline:
                raise DemoFailed(f"{bucket}/{key}: answered {answer.status_code} after {timeout_s:.0f} s")
            time.sleep(0.05)
        return answer.content

    def ask(self, path: str, **params: str) -> dict[str, Any]:
        """A JSON document of the control API."""
        answer = httpx.get(
            self.control_url + path, params=params, auth=(self.keys.access_key, self.keys.secret_key),
            timeout=ANSWER_TIMEOUT_S,
        )  # fmt: skip
        if answer.status_code != 200:
            raise DemoFailed(f"{path}: answered {answer.status_code}: {answer.text[:600]}")
        return dict(answer.json())

    def metric(self, name: str) -> float:
        """Sum over the series of one metric."""
        lines = httpx.get(self.control_url + "/metrics", timeout=ANSWER_TIMEOUT_S).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)

    def dav_differs_at(
        self, bucket: str, key: str, expected: Iterator[memoryview], progress: Callable[[int], None]
    ) -> int | None:
        """Read an object over WebDAV and compare it; the first offset of a block that differs, or None."""
        connection = http.client.HTTPConnection(urlsplit(self.dav_url).netloc, timeout=ANSWER_TIMEOUT_S)
        token = base64.b64encode(f"{self.keys.access_key}:{self.keys.secret_key}".encode()).decode()
        offset = 0
        try:
            connection.request("GET", f"/{bucket}/{quote(key)}", headers={"Authorization": f"Basic {token}"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise DemoFailed(f"WebDAV GET {bucket}/{key}: answered {answer.status}")
            block = memoryview(bytearray(1 << 20))
            for piece in expected:
                for start in range(0, len(piece), len(block)):
                    wanted = piece[start : start + len(block)]
                    got = block[: len(wanted)]
                    # memoryviews compare byte for byte in Python's own loop; numpy does it at the speed of memory.
                    if not _filled(answer, got) or not np.array_equal(
                        np.frombuffer(got, "u1"), np.frombuffer(wanted, "u1")
                    ):
                        return offset
                    offset += len(wanted)
                    progress(len(wanted))
            return offset if answer.read(1) else None
        finally:
            connection.close()


def _filled(answer: http.client.HTTPResponse, block: memoryview) -> bool:
    got = 0
    while got < len(block):
        count = answer.readinto(block[got:])
        if not count:
            return False
        got += count
    return True


@contextlib.contextmanager
def running(folder: Path) -> Iterator[DemoNode]:
    """A node on ``folder``/data with free ports and keys of its own. Raises DemoFailed when it does not start."""
    keys = KeyPair("DEMO" + secrets.token_hex(8).upper(), secrets.token_urlsafe(30))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HISS_")}
    environment |= {"HISS_ROOT_ACCESS_KEY": keys.access_key, "HISS_ROOT_SECRET_KEY": keys.secret_key}
    command = [sys.executable, "-m", "gateway.cli", "serve", "--data", str(folder / "data"), "--host", "127.0.0.1"]
    command += ["--s3-port", "0", "--control-port", "0", "--dav-port", "0"]
    with (folder / "node.log").open("wb") as log:
        # In a session of its own: Ctrl-C is for the demonstration, which then stops the node in good order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            preexec_fn=_end_with_parent(),
        )  # fmt: skip
    try:
        yield DemoNode(folder, keys, _ports_when_healthy(folder, process))
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> Callable[[], None]:
    """For the child, before it becomes the node: SIGTERM when this process dies, even by SIGKILL (prctl(2))."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _ports_when_healthy(folder: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(CliError, httpx.TransportError):
            ports = cli_node.running(folder / "data")
            health = httpx.get(f"http://127.0.0.1:{ports['control']}/v1/health", timeout=5.0)
            if ports["pid"] == process.pid and health.status_code == 200:
                return ports
        time.sleep(0.05)
    last = (folder / "node.log").read_text(errors="replace").strip().splitlines()[-3:]
    raise DemoFailed("the node did not start:\n" + "\n".join(last))
