"""The reference sender against a scripted S3 server: retries, refusals before the body, checksums that must agree."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from awscrt.checksums import crc64nvme

from gateway.cli import main

Hiss = Callable[..., Any]
KEYS = {"HISS_ACCESS_KEY": "sender", "HISS_SECRET_KEY": "a secret of the sender"}


class ScriptedServer:
    """Answers one PUT after the other with what ``script`` says; later ones are confirmed.

    ``refuse``: a status and headers, before the body; ``cut``: close in the middle; ``lie``: confirm another checksum.
    """

    def __init__(self, *script: str | tuple[int, str]) -> None:
        self.script = list(script)
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                connection.settimeout(10)
                while self._one(connection, stream):
                    pass

    def _one(self, connection: socket.socket, stream: Any) -> bool:
        """Serve one request; False when the connection is to be closed."""
        lines = []
        while (line := stream.readline()) not in (b"\r\n", b""):
            lines.append(line.decode().strip())
        if not lines:
            return False
        self.heads.append("\n".join(lines))
        length = int(next(line.split(":")[1] for line in lines if line.startswith("content-length")))
        step = self.script.pop(0) if self.script else "confirm"
        if isinstance(step, tuple):
            status, code = step
            body = f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode()
            answer = (
                f"HTTP/1.1 {status} No\r\nRetry-After: 0\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(answer.encode() + body)
            return False
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if step == "cut":
            stream.read(length // 2)
            return False
        content = stream.read(length)
        self.bodies.append(content)
        crc = base64.b64encode((crc64nvme(content) ^ (step == "lie")).to_bytes(8, "big")).decode()
        answer = f'HTTP/1.1 200 OK\r\nETag: "abc"\r\nx-amz-checksum-crc64nvme: {crc}\r\nContent-Length: 0\r\n\r\n'
        connection.sendall(answer.encode())
        return True


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    servers: list[ScriptedServer] = []

    def start(*script: str | tuple[int, str]) -> ScriptedServer:
        servers.append(ScriptedServer(*script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "frame 1.raw"
    path.write_bytes(os.urandom(3_000_000))
    return path


def test_files_go_in_order_with_their_numbers_and_geometry(hiss: Hiss, serve: Hiss, file: Path, tmp_path: Path) -> None:
    server = serve()
    empty = tmp_path / "empty"
    empty.touch()
    done = hiss(
        "send", str(file), str(empty), "s3://scan42/run1", "--endpoint", server.url, "--frames", "uint16,1024x512",
        "--first-sequence", "7", "--parallel", "1", "--json", environ=KEYS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sent = json.loads(done.stdout)["sent"]
    assert [(one["key"], one["size_bytes"], one["attempts"]) for one in sent] == [
        ("run1/frame 1.raw", 3_000_000, 1),
        ("run1/empty", 0, 1),
    ]
    assert server.bodies == [file.read_bytes(), b""]
    head = server.heads[0]
    assert head.startswith("PUT /scan42/run1/frame%201.raw HTTP/1.1\n")
    for line in (
        "expect: 100-continue",
        "x-amz-meta-sequence: 7",
        "x-amz-meta-frame-dtype: uint16",
        "x-amz-meta-frame-shape: 1024,512",
        f"x-amz-checksum-crc64nvme: {sent[0]['crc64nvme']}",
    ):
        assert line in head.split("\n")
    assert "x-amz-meta-sequence: 8" in server.heads[1]
    assert "a secret of the sender" not in "".join(server.heads)


def test_slow_down_and_a_broken_connection_are_tried_again(hiss: Hiss, serve: Hiss, file: Path) -> None:
    server = serve((503, "SlowDown"), "cut", (500, "InternalError"))
    done = hiss("send", str(file), "s3://scan42/run1/", "--endpoint", server.url, "--json", environ=KEYS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sent"][0]["attempts"] == 4
    assert server.bodies == [file.read_bytes()]


def test_a_refusal_that_no_retry_helps_is_final(hiss: Hiss, serve: Hiss, file: Path) -> None:
    server = serve((403, "AccessDenied"))
    done = hiss("send", str(file), "s3://scan42/run1/", "--endpoint", server.url, environ=KEYS)
    assert done.returncode == 1
    assert done.stderr == "hiss: run1/frame 1.raw: refused with 403 AccessDenied: because\n"
    assert len(server.heads) == 1
    assert server.bodies == [], "the body of a refused PUT is never sent"


def test_tries_are_bounded(hiss: Hiss, serve: Hiss, file: Path) -> None:
    server = serve(*[(503, "SlowDown")] * 3)
    done = hiss("send", str(file), "s3://b42/r/", "--endpoint", server.url, "--attempts", "3", environ=KEYS)
    assert done.returncode == 1
    assert done.stderr == "hiss: r/frame 1.raw: not confirmed after 3 tries; the last one: 503 SlowDown\n"


def test_another_checksum_is_not_a_confirmation(hiss: Hiss, serve: Hiss, file: Path) -> None:
    done = hiss("send", str(file), "s3://scan42/run1/", "--endpoint", serve("lie").url, environ=KEYS)
    assert done.returncode == 1
    assert "do not clear it" in done.stderr


def test_nobody_there_is_said(hiss: Hiss, file: Path) -> None:
    arguments = ("--endpoint", "http://127.0.0.1:9", "--attempts", "1")
    done = hiss("send", str(file), "s3://scan42/run1/", *arguments, environ=KEYS)
    assert done.returncode == 1
    assert "Connection refused" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["/no/file", "s3://b/p"], "/no/file is not a file"),
        (["FILE", "http://b/p"], "'http://b/p' is no place"),
        (["FILE", "FILE"], "is a file: where is it to go?"),
        (["FILE", "FILE", "s3://b/p"], "another file of that name"),
        (["FILE", "s3://b/p", "--frames", "1024"], "write it as DTYPE,SHAPE"),
        (["FILE", "s3://b/p", "--wait"], "--wait asks the control API"),
    ],
)
def test_a_wrong_call_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: Path,
    arguments: list[str],
    complaint: str,
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    named = [str(file) if argument == "FILE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["hiss", "send", *named, "--endpoint", "http://127.0.0.1:9"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
