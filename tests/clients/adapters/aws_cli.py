"""The aws command line, both of its lines of development."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.adapters.base import Adapter
from tests.clients.adapters.boto import rfc_2047


class AwsCliV1(Adapter):
    name = "aws cli v1"

    def program(self) -> str:
        return self.peer("aws")

    def aws(self, *words: str) -> str:
        return self.run(self.program(), "--endpoint-url", self.service.url, *words, **self.aws_environ())

    def url(self, key: str) -> str:
        return f"s3://{self.service.bucket}/{key}"

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = ["--metadata", json.dumps(metadata)] if metadata else []
        self.aws("s3", "cp", "--quiet", str(file), self.url(key), *extra)

    def get(self, key: str, file: Path) -> None:
        self.aws("s3", "cp", "--quiet", self.url(key), str(file))

    def get_range(self, key: str, first: int, count: int) -> bytes:
        file = self.folder / "range"
        where = ("--bucket", self.service.bucket, "--key", key, "--range", f"bytes={first}-{first + count - 1}")
        self.aws("s3api", "get-object", *where, str(file))
        return file.read_bytes()

    def keys(self) -> list[str]:
        query = ("--query", "Contents[].Key", "--output", "json")
        return list(json.loads(self.aws("s3api", "list-objects-v2", "--bucket", self.service.many, *query)))

    def copy(self, source: str, target: str) -> None:
        self.aws("s3", "cp", "--quiet", self.url(source), self.url(target))

    def delete(self, key: str) -> None:
        self.aws("s3", "rm", "--quiet", self.url(key))

    def presign(self, key: str) -> str:
        return self.aws("s3", "presign", self.url(key)).strip()

    def metadata(self, key: str) -> dict[str, str]:
        where = ("--bucket", self.service.bucket, "--key", key)
        return dict(json.loads(self.aws("s3api", "head-object", *where, "--output", "json"))["Metadata"])

    def spell(self, value: str) -> str:
        return rfc_2047(value)


class AwsCliV2(AwsCliV1):
    name = "aws cli v2"

    def program(self) -> str:
        """Version 2 is no Python package of its own: the system's ``aws``, where that is version 2."""
        own = str(Path(sys.executable).parent)
        for folder in os.environ["PATH"].split(os.pathsep):
            found = shutil.which("aws", path=folder) if folder != own else None
            if found:
                done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False)
                if done.stdout.startswith("aws-cli/2."):
                    return found
        if os.environ.get("CI") == "true":
            pytest.fail("version 2 of the aws cli is not installed")
        pytest.skip("version 2 of the aws cli is not installed; `make apt` installs it or says how")
