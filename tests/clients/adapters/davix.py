"""davix, of the grid's storage: HTTP with S3 on top."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from tests.clients.adapters.base import REGION, Adapter


class Davix(Adapter):
    name = "davix"
    cannot = {  # noqa: RUF012
        "ranged_get": "its programs read whole objects; ranges are for callers of the library",
        "copy": "davix-cp is WebDAV's third-party copy; it has no CopyObject",
        "presign": "no program of it prints a signed URL",
        "metadata": "no program of it prints the fields of an answer",
    }
    one_put = "davix-put goes over to parts only where one PUT may not be long enough"

    def davix(self, program: str, *words: str) -> str:
        flags = ["--s3accesskey", self.service.access_key, "--s3secretkey", self.service.secret_key]
        flags += ["--s3region", REGION, "--s3alternate", "--retry", "0"]
        if self.service.ca is not None:
            flags += ["--capath", str(self.service.ca.parent)]
        return self.run(self.peer(f"davix-{program}"), *flags, *words)

    def url(self, key: str) -> str:
        return f"{'s3s' if self.service.secure else 's3'}://{self.service.netloc}/{self.service.bucket}/{quote(key)}"

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = [word for name, value in (metadata or {}).items() for word in ("-H", f"x-amz-meta-{name}: {value}")]
        self.davix("put", *extra, str(file), self.url(key))

    def get(self, key: str, file: Path) -> None:
        self.davix("get", self.url(key), str(file))

    def keys(self) -> list[str]:
        """Folder by folder: it reads one page of a listing only."""
        start = f"{'s3s' if self.service.secure else 's3'}://{self.service.netloc}/{self.service.many}/"
        folders = self.davix("ls", start).split()
        return [
            f"{folder}/{name}"
            for folder in folders
            for name in self.davix("ls", f"{start}{folder}/").splitlines()
            if name
        ]

    def delete(self, key: str) -> None:
        self.davix("rm", self.url(key))
