"""curl, which signs with ``--aws-sigv4``: S3 by hand."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from tests.clients.adapters.base import REGION, Adapter

PART_BYTES = 50_000_000
NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


class Curl(Adapter):
    name = "curl"
    cannot = {"presign": "it signs headers only"}  # noqa: RUF012

    def curl(self, path: str, *words: str, query: str = "") -> str:
        base = [
            self.peer("curl"), "--silent", "--show-error", "--fail-with-body", "--aws-sigv4", f"aws:amz:{REGION}:s3",
            "--user", f"{self.service.access_key}:{self.service.secret_key}",
            "--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD",
        ]  # fmt: skip
        if self.service.ca is not None:
            base += ["--cacert", str(self.service.ca)]
        # It sends and signs a target as it is given, so the target has to be in canonical form.
        return self.run(
            *base, *words, f"{self.service.url}/{quote(path, safe='/-_.~')}" + (f"?{query}" if query else "")
        )

    def path(self, key: str) -> str:
        return f"{self.service.bucket}/{key}"

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        extra = [word for n, v in (metadata or {}).items() for word in ("--header", f"x-amz-meta-{n}: {v}")]
        self.curl(self.path(key), "--upload-file", str(file), *extra)

    def put_large(self, key: str, file: Path) -> None:
        begun = ElementTree.fromstring(self.curl(self.path(key), "--request", "POST", query="uploads="))
        upload = begun.findtext(f"{NAMESPACE}UploadId")
        rows = []
        piece, heads = self.folder / "part", self.folder / "heads"
        with file.open("rb") as source:
            number = 0
            while block := source.read(PART_BYTES):
                number += 1
                piece.write_bytes(block)
                query = f"partNumber={number}&uploadId={upload}"
                self.curl(self.path(key), "--upload-file", str(piece), "--dump-header", str(heads), query=query)
                tags = re.findall(r"(?im)^etag: (\S+)", heads.read_text())
                rows.append(f"<Part><PartNumber>{number}</PartNumber><ETag>{tags[-1]}</ETag></Part>")
        document = f"<CompleteMultipartUpload>{''.join(rows)}</CompleteMultipartUpload>"
        self.curl(self.path(key), "--request", "POST", "--data-binary", document, query=f"uploadId={upload}")

    def get(self, key: str, file: Path) -> None:
        self.curl(self.path(key), "--output", str(file))

    def get_range(self, key: str, first: int, count: int) -> bytes:
        file = self.folder / "range"
        self.curl(self.path(key), "--range", f"{first}-{first + count - 1}", "--output", str(file))
        return file.read_bytes()

    def keys(self) -> list[str]:
        found: list[str] = []
        query = "list-type=2"
        while True:
            page = ElementTree.fromstring(self.curl(self.service.many, query=query))
            found += [item.text or "" for item in page.iter(f"{NAMESPACE}Key")]
            token = page.findtext(f"{NAMESPACE}NextContinuationToken")
            if not token:
                return found
            query = f"continuation-token={quote(token, safe='')}&list-type=2"

    def copy(self, source: str, target: str) -> None:
        self.curl(self.path(target), "--request", "PUT", "--header", f"x-amz-copy-source: /{self.path(source)}")

    def delete(self, key: str) -> None:
        self.curl(self.path(key), "--request", "DELETE")

    def metadata(self, key: str) -> dict[str, str]:
        shown = self.curl(self.path(key), "--head")
        return dict(re.findall(r"(?im)^x-amz-meta-([\w-]+): (.*?)\r?$", shown))
