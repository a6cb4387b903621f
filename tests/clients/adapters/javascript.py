"""The SDK for JavaScript, version 3: one Node.js process that does what it reads, a line of JSON at a time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.adapters.base import REGION, Adapter, Service
from tests.clients.adapters.boto import rfc_2047

FOLDER = Path(__file__).parents[1] / "js"


class JavaScript(Adapter):
    name = "JS SDK v3"

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        if not (FOLDER / "node_modules").is_dir():
            message = "the JavaScript SDK is not installed; `make apt` installs it or says how"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
        environ = {**os.environ, **self.aws_environ()}
        if service.ca is not None:
            environ["NODE_EXTRA_CA_CERTS"] = str(service.ca)
        self.process = subprocess.Popen(
            [peer("node"), str(FOLDER / "client.mjs"), service.url, REGION],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True,
        )  # fmt: skip

    def ask(self, verb: str, **values: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"verb": verb, "bucket": self.service.bucket, **values}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        self.ask("put", key=key, file=str(file), metadata=metadata or {})

    def put_large(self, key: str, file: Path) -> None:
        self.ask("upload", key=key, file=str(file))

    def get(self, key: str, file: Path) -> None:
        self.ask("get", key=key, file=str(file))

    def get_range(self, key: str, first: int, count: int) -> bytes:
        file = self.folder / "range"
        self.ask("get", key=key, file=str(file), range=f"bytes={first}-{first + count - 1}")
        return file.read_bytes()

    def keys(self) -> list[str]:
        return list(self.ask("keys", bucket=self.service.many))

    def copy(self, source: str, target: str) -> None:
        self.ask("copy", source=source, key=target)

    def delete(self, key: str) -> None:
        self.ask("delete", key=key)

    def presign(self, key: str) -> str:
        return str(self.ask("presign", key=key))

    def metadata(self, key: str) -> dict[str, str]:
        return dict(self.ask("metadata", key=key))

    def spell(self, value: str) -> str:
        """Node.js refuses header octets beyond Latin-1."""
        return rfc_2047(value)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
