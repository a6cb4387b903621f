"""boto3, with its own transfers and with those of the AWS Common Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.header import Header
from pathlib import Path
from typing import Any

import awscrt.auth
import awscrt.io
import boto3
import botocore.config
import botocore.session
from awscrt.s3 import S3Client, S3RequestTlsMode
from boto3.s3.transfer import TransferConfig
from s3transfer.crt import BotocoreCRTCredentialsWrapper, BotocoreCRTRequestSerializer, CRTTransferManager

from tests.clients.adapters.base import COMMAND_TIMEOUT_S, REGION, Adapter, Service

PART_BYTES = 16 << 20


def rfc_2047(value: str) -> str:
    """botocore refuses metadata beyond ASCII; this is the spelling that AWS documents for it."""
    return Header(value, "utf-8", maxlinelen=1000).encode()


class Boto3(Adapter):
    name = "boto3"

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=service.url,
            region_name=REGION,
            aws_access_key_id=service.access_key,
            aws_secret_access_key=service.secret_key,
            verify=str(service.ca) if service.ca else None,
            config=botocore.config.Config(retries={"max_attempts": 1}),
        )
        self.transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        with file.open("rb") as body:
            self.client.put_object(Bucket=self.service.bucket, Key=key, Body=body, Metadata=metadata or {})

    def get(self, key: str, file: Path) -> None:
        self.client.download_file(self.service.bucket, key, str(file), Config=self.transfer)

    def get_range(self, key: str, first: int, count: int) -> bytes:
        span = f"bytes={first}-{first + count - 1}"
        return bytes(self.client.get_object(Bucket=self.service.bucket, Key=key, Range=span)["Body"].read())

    def put_large(self, key: str, file: Path) -> None:
        self.client.upload_file(str(file), self.service.bucket, key, Config=self.transfer)

    def keys(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.service.many)
        return [item["Key"] for page in pages for item in page["Contents"]]

    def copy(self, source: str, target: str) -> None:
        self.client.copy({"Bucket": self.service.bucket, "Key": source}, self.service.bucket, target)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.service.bucket, Key=key)

    def presign(self, key: str) -> str:
        return str(self.client.generate_presigned_url("get_object", {"Bucket": self.service.bucket, "Key": key}))

    def metadata(self, key: str) -> dict[str, str]:
        return dict(self.client.head_object(Bucket=self.service.bucket, Key=key)["Metadata"])

    def spell(self, value: str) -> str:
        return rfc_2047(value)

    def close(self) -> None:
        self.client.close()


class Boto3Crt(Adapter):
    """s3transfer's manager over the Common Runtime. ``boto3`` itself hands it the default endpoint only, so it is built here."""

    name = "boto3 CRT"
    cannot = {  # noqa: RUF012
        "ranged_get": "the manager takes whole objects; it asks for the 100 MB in ranges",
        "listing": "the CRT transfers objects; boto3 lists",
        "copy": "the CRT transfers objects; boto3 copies",
        "presign": "the CRT transfers objects; boto3 signs URLs",
        "metadata": "the manager hands back bodies only; boto3 reads metadata",
    }

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        session = botocore.session.Session()
        session.set_credentials(service.access_key, service.secret_key)
        provider = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
        tls = None
        if service.ca is not None:
            options = awscrt.io.TlsContextOptions()
            options.override_default_trust_store(service.ca.read_bytes())
            tls = awscrt.io.ClientTlsContext(options).new_connection_options()
        group = awscrt.io.EventLoopGroup(2)
        bootstrap = awscrt.io.ClientBootstrap(group, awscrt.io.DefaultHostResolver(group))
        client = S3Client(
            bootstrap=bootstrap, region=REGION, part_size=PART_BYTES, tls_connection_options=tls,
            tls_mode=S3RequestTlsMode.ENABLED if tls else S3RequestTlsMode.DISABLED,
            signing_config=awscrt.s3.create_default_s3_signing_config(region=REGION, credential_provider=provider),
        )  # fmt: skip
        serializer = BotocoreCRTRequestSerializer(
            session, {"region_name": REGION, "endpoint_url": service.url, "verify": False}
        )
        self.manager = CRTTransferManager(client, serializer)

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = {"Metadata": metadata} if metadata else {}
        self.manager.upload(str(file), self.service.bucket, key, extra_args=extra).result()

    def get(self, key: str, file: Path) -> None:
        self.manager.download(self.service.bucket, key, str(file)).result()
        # The file gets its name in a callback that nobody can wait for.
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while not file.exists():
            assert time.monotonic() < deadline, "the download did not appear"
            time.sleep(0.01)

    def keys(self) -> list[str]:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        self.manager.delete(self.service.bucket, key).result()

    def close(self) -> None:
        self.manager.shutdown()
