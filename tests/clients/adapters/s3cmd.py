"""s3cmd, in Python, from before there was boto."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.clients.adapters.base import Adapter, Service


class S3cmd(Adapter):
    name = "s3cmd"

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        self.config = folder / "s3cfg"
        self.config.write_text(
            f"[default]\naccess_key = {service.access_key}\nsecret_key = {service.secret_key}\n"
            f"host_base = {service.netloc}\nhost_bucket = {service.netloc}\nuse_https = {service.secure}\n"
            + (f"ca_certs_file = {service.ca}\n" if service.ca else "")
        )

    def s3cmd(self, *words: str) -> str:
        return self.run(self.peer("s3cmd"), f"--config={self.config}", "--no-progress", *words, LC_ALL="C.UTF-8")

    def url(self, key: str) -> str:
        return f"s3://{self.service.bucket}/{key}"

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = [f"--add-header=x-amz-meta-{name}: {value}" for name, value in (metadata or {}).items()]
        self.s3cmd("put", *extra, str(file), self.url(key))

    def get(self, key: str, file: Path) -> None:
        self.s3cmd("get", "--force", self.url(key), str(file))

    def get_range(self, key: str, first: int, count: int) -> bytes:
        """It asks for ranges when it goes on with a download that was cut off."""
        file = self.folder / "begun"
        file.write_bytes(bytes(first))
        self.s3cmd("get", "--continue", self.url(key), str(file))
        return file.read_bytes()[first : first + count]

    def keys(self) -> list[str]:
        start = f"s3://{self.service.many}/"
        lines = self.s3cmd("ls", "--recursive", start).splitlines()
        return [line[line.index(start) + len(start) :] for line in lines]

    def copy(self, source: str, target: str) -> None:
        self.s3cmd("cp", self.url(source), self.url(target))

    def delete(self, key: str) -> None:
        self.s3cmd("del", self.url(key))

    def presign(self, key: str) -> str:
        found = self.s3cmd("signurl", self.url(key), "+3600").strip()
        return found if found.startswith(self.service.url) else found.replace("http://", "https://", 1)

    def metadata(self, key: str) -> dict[str, str]:
        found = re.findall(r"x-amz-meta-([\w-]+): +(.*)", self.s3cmd("info", self.url(key)))
        # It shows the octets of a field as Latin-1.
        return {name: value.encode("latin-1").decode() for name, value in found}
