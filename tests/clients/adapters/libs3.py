"""libs3's ``s3`` program: C, Signature Version 2."""

from __future__ import annotations

import re
from pathlib import Path

from tests.clients.adapters.base import Adapter


class Libs3(Adapter):
    name = "libs3"
    cannot = {"odd_key": "it sends a space in a key as +, which names another key"}  # noqa: RUF012
    one_put = "the release that distributions carry (2.0) knows no multipart uploads"

    def s3(self, *words: str) -> str:
        environ = {
            "S3_ACCESS_KEY_ID": self.service.access_key,
            "S3_SECRET_ACCESS_KEY": self.service.secret_key,
            "S3_HOSTNAME": self.service.netloc,
        }
        return self.run(self.peer("s3"), *(() if self.service.secure else ("-u",)), *words, **environ)

    def place(self, key: str) -> str:
        return f"{self.service.bucket}/{key}"

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = [f"x-amz-meta-{name}={value}" for name, value in (metadata or {}).items()]
        self.s3("put", self.place(key), f"filename={file}", *extra)

    def get(self, key: str, file: Path) -> None:
        self.s3("get", self.place(key), f"filename={file}")

    def get_range(self, key: str, first: int, count: int) -> bytes:
        file = self.folder / "range"
        self.s3("get", self.place(key), f"filename={file}", f"startByte={first}", f"byteCount={count}")
        return file.read_bytes()

    def keys(self) -> list[str]:
        return re.findall(r"(?m)^(.*?) +\d{4}-\d\d-\d\dT\S+Z +\d", self.s3("list", self.service.many))

    def copy(self, source: str, target: str) -> None:
        self.s3("copy", self.place(source), self.place(target))

    def delete(self, key: str) -> None:
        self.s3("delete", self.place(key))

    def presign(self, key: str) -> str:
        return self.s3("gqs", self.place(key)).strip()

    def metadata(self, key: str) -> dict[str, str]:
        shown = self.s3("head", self.place(key))
        return {name.lower(): value for name, value in re.findall(r"x-amz-meta-([\w-]+): (.*)", shown)}
