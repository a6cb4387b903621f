"""rclone, as a remote of type s3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.clients.adapters.base import REGION, Adapter, Service


class Rclone(Adapter):
    name = "rclone"

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        self.environ = {
            "RCLONE_CONFIG": str(folder / "rclone.conf"),
            "RCLONE_CONFIG_HISS_TYPE": "s3",
            "RCLONE_CONFIG_HISS_PROVIDER": "Other",
            "RCLONE_CONFIG_HISS_ENDPOINT": service.url,
            "RCLONE_CONFIG_HISS_REGION": REGION,
            "RCLONE_CONFIG_HISS_ACCESS_KEY_ID": service.access_key,
            "RCLONE_CONFIG_HISS_SECRET_ACCESS_KEY": service.secret_key,
            "RCLONE_RETRIES": "1",
            "RCLONE_S3_UPLOAD_CUTOFF": "16M",
        }
        if service.ca is not None:
            self.environ["RCLONE_CA_CERT"] = str(service.ca)
        Path(self.environ["RCLONE_CONFIG"]).touch()

    def rclone(self, *words: str) -> str:
        return self.run(self.peer("rclone"), *words, **self.environ)

    def place(self, key: str) -> str:
        return f"hiss:{self.service.bucket}/{key}"

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = [word for name, value in (metadata or {}).items() for word in ("--metadata-set", f"{name}={value}")]
        self.rclone("copyto", "-M", *extra, str(file), self.place(key))

    def put_large(self, key: str, file: Path) -> None:
        self.rclone("copyto", str(file), self.place(key))

    def get(self, key: str, file: Path) -> None:
        self.rclone("copyto", self.place(key), str(file))

    def get_range(self, key: str, first: int, count: int) -> bytes:
        # Text only passes: the scenario's ranged object is printable.
        return self.rclone("cat", "--offset", str(first), "--count", str(count), self.place(key)).encode()

    def keys(self) -> list[str]:
        return self.rclone("lsf", "-R", "--files-only", f"hiss:{self.service.many}").splitlines()

    def copy(self, source: str, target: str) -> None:
        self.rclone("copyto", self.place(source), self.place(target))

    def delete(self, key: str) -> None:
        self.rclone("deletefile", self.place(key))

    def presign(self, key: str) -> str:
        return self.rclone("link", "--expire", "1h", self.place(key)).strip()

    def metadata(self, key: str) -> dict[str, str]:
        return dict(json.loads(self.rclone("lsjson", "-M", "--stat", self.place(key)))["Metadata"])
