"""Python libraries that are not AWS's: minio-py, obstore (Rust's object_store), s3fs (fsspec over aiobotocore)."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minio
import obstore
import s3fs
import urllib3
from minio.commonconfig import CopySource
from obstore.store import S3Store

from tests.clients.adapters.base import REGION, Adapter, Service
from tests.clients.adapters.boto import PART_BYTES, rfc_2047


class MinioPy(Adapter):
    name = "minio-py"

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        self.pool = urllib3.PoolManager(ca_certs=str(service.ca) if service.ca else None)
        self.client = minio.Minio(
            service.netloc, service.access_key, service.secret_key, secure=service.secure, region=REGION, http_client=self.pool
        )  # fmt: skip

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        self.client.fput_object(self.service.bucket, key, str(file), metadata=dict(metadata) if metadata else None)

    def put_large(self, key: str, file: Path) -> None:
        self.client.fput_object(self.service.bucket, key, str(file), part_size=PART_BYTES)

    def get(self, key: str, file: Path) -> None:
        self.client.fget_object(self.service.bucket, key, str(file))

    def get_range(self, key: str, first: int, count: int) -> bytes:
        answer = self.client.get_object(self.service.bucket, key, offset=first, length=count)
        try:
            return bytes(answer.read())
        finally:
            answer.close()
            answer.release_conn()

    def keys(self) -> list[str]:
        return [str(item.object_name) for item in self.client.list_objects(self.service.many, recursive=True)]

    def copy(self, source: str, target: str) -> None:
        self.client.copy_object(self.service.bucket, target, CopySource(self.service.bucket, source))

    def delete(self, key: str) -> None:
        self.client.remove_object(self.service.bucket, key)

    def presign(self, key: str) -> str:
        return str(self.client.presigned_get_object(self.service.bucket, key))

    def metadata(self, key: str) -> dict[str, str]:
        found = self.client.stat_object(self.service.bucket, key).metadata or {}
        start = "x-amz-meta-"
        return {n.lower().removeprefix(start): v for n, v in found.items() if n.lower().startswith(start)}

    def spell(self, value: str) -> str:
        return rfc_2047(value)

    def close(self) -> None:
        self.pool.clear()


class Obstore(Adapter):
    name = "obstore"

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        self.store = self._store(service.bucket)

    def _store(self, bucket: str) -> Any:
        options: dict[str, Any] = {"allow_http": not self.service.secure}
        return S3Store(
            bucket, endpoint=self.service.url, region=REGION, access_key_id=self.service.access_key,
            secret_access_key=self.service.secret_key, client_options=options,
        )  # fmt: skip

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        obstore.put(self.store, key, file, attributes=metadata, use_multipart=False)

    def put_large(self, key: str, file: Path) -> None:
        obstore.put(self.store, key, file, use_multipart=True, chunk_size=PART_BYTES)

    def get(self, key: str, file: Path) -> None:
        with file.open("wb") as target:
            target.writelines(obstore.get(self.store, key).stream(min_chunk_size=1 << 20))

    def get_range(self, key: str, first: int, count: int) -> bytes:
        return bytes(obstore.get_range(self.store, key, start=first, length=count))

    def keys(self) -> list[str]:
        return [item["path"] for page in obstore.list(self._store(self.service.many)) for item in page]

    def copy(self, source: str, target: str) -> None:
        obstore.copy(self.store, source, target)

    def delete(self, key: str) -> None:
        obstore.delete(self.store, key)

    def presign(self, key: str) -> str:
        return str(obstore.sign(self.store, "GET", key, datetime.timedelta(hours=1)))

    def metadata(self, key: str) -> dict[str, str]:
        return {name: value for name, value in obstore.get(self.store, key).attributes.items() if "ontent" not in name}

    def spell(self, value: str) -> str:
        return rfc_2047(value)


class S3fs(Adapter):
    name = "s3fs"

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        self.files: Any = s3fs.S3FileSystem(
            key=service.access_key, secret=service.secret_key, endpoint_url=service.url, skip_instance_cache=True,
            client_kwargs={"region_name": REGION, "verify": str(service.ca) if service.ca else None},
            use_listings_cache=False,
        )  # fmt: skip

    def path(self, key: str) -> str:
        return f"{self.service.bucket}/{key}"

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = {"Metadata": metadata} if metadata else {}
        self.files.put_file(str(file), self.path(key), **extra)

    def put_large(self, key: str, file: Path) -> None:
        self.files.put_file(str(file), self.path(key), chunksize=PART_BYTES)

    def get(self, key: str, file: Path) -> None:
        self.files.get_file(self.path(key), str(file))

    def get_range(self, key: str, first: int, count: int) -> bytes:
        return bytes(self.files.cat_file(self.path(key), start=first, end=first + count))

    def keys(self) -> list[str]:
        start = f"{self.service.many}/"
        return [path.removeprefix(start) for path in self.files.find(self.service.many)]

    def copy(self, source: str, target: str) -> None:
        self.files.cp_file(self.path(source), self.path(target))

    def delete(self, key: str) -> None:
        self.files.rm_file(self.path(key))

    def presign(self, key: str) -> str:
        return str(self.files.sign(self.path(key), expiration=3600))

    def metadata(self, key: str) -> dict[str, str]:
        return dict(self.files.metadata(self.path(key)))

    def spell(self, value: str) -> str:
        return rfc_2047(value)
