"""s5cmd, in Go."""

from __future__ import annotations

import json
from pathlib import Path

from tests.clients.adapters.base import Adapter


class S5cmd(Adapter):
    name = "s5cmd"
    cannot = {  # noqa: RUF012
        "ranged_get": "no option for a range; its parallel download of the 100 MB asks for ranges",
    }

    def s5cmd(self, *words: str) -> str:
        return self.run(self.peer("s5cmd"), "--json", "--endpoint-url", self.service.url, *words, **self.aws_environ())

    def url(self, key: str) -> str:
        return f"s3://{self.service.bucket}/{key}"

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = [word for name, value in (metadata or {}).items() for word in ("--metadata", f"{name}={value}")]
        self.s5cmd("cp", "--raw", *extra, str(file), self.url(key))

    def put_large(self, key: str, file: Path) -> None:
        self.s5cmd("cp", "--part-size", "16", str(file), self.url(key))

    def get(self, key: str, file: Path) -> None:
        self.s5cmd("cp", "--raw", "--part-size", "16", self.url(key), str(file))

    def keys(self) -> list[str]:
        start = f"s3://{self.service.many}/"
        lines = self.s5cmd("ls", start + "*").splitlines()
        return [json.loads(line)["key"].removeprefix(start) for line in lines]

    def copy(self, source: str, target: str) -> None:
        self.s5cmd("cp", self.url(source), self.url(target))

    def delete(self, key: str) -> None:
        self.s5cmd("rm", "--raw", self.url(key))

    def presign(self, key: str) -> str:
        return self.s5cmd("presign", self.url(key)).strip()

    def metadata(self, key: str) -> dict[str, str]:
        return {n.lower(): v for n, v in json.loads(self.s5cmd("head", self.url(key)))["metadata"].items()}
