"""s3fs-fuse: a bucket as a folder of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.adapters.base import REGION, Adapter, Service

MOUNT_TIMEOUT_S = 20.0


class S3fsFuse(Adapter):
    name = "s3fs-fuse"
    cannot = {  # noqa: RUF012
        "copy": "the kernel copies through the mount; CopyObject is what a rename does, which the round trip makes",
        "presign": "a file system has no URLs",
        "metadata": "extended attributes travel packed, in one field of its own",
    }

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        super().__init__(service, peer, folder)
        program = peer("s3fs")
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            pytest.skip("/dev/fuse cannot be opened here")
        self.mounts: list[tuple[Path, subprocess.Popen[bytes]]] = []
        self.root = self._mount(program, service.bucket)
        self.many = self._mount(program, service.many)

    def _mount(self, program: str, bucket: str) -> Path:
        point = self.folder / f"mount-{bucket}"
        point.mkdir()
        log = self.folder / f"{bucket}.log"
        options = [f"url={self.service.url}", "use_path_request_style", f"endpoint={REGION}", "retries=1"]
        environ = {
            **os.environ,
            "AWSACCESSKEYID": self.service.access_key,
            "AWSSECRETACCESSKEY": self.service.secret_key,
        }
        if self.service.secure:
            # It trusts the authorities of the system and takes no other: here TLS can only be spoken unverified.
            options.append("no_check_certificate")
        command = [program, bucket, str(point), "-f", *(word for option in options for word in ("-o", option))]
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        self.mounts.append((point, process))
        deadline = time.monotonic() + MOUNT_TIMEOUT_S
        while not os.path.ismount(point):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        return point

    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)

    def get(self, key: str, file: Path) -> None:
        shutil.copyfile(self.root / key, file)

    def get_range(self, key: str, first: int, count: int) -> bytes:
        with (self.root / key).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), count, first)

    def keys(self) -> list[str]:
        return [str(Path(top, name).relative_to(self.many)) for top, _, names in os.walk(self.many) for name in names]

    def delete(self, key: str) -> None:
        (self.root / key).unlink()

    def close(self) -> None:
        for point, process in self.mounts:
            subprocess.run(["fusermount3", "-u", str(point)], timeout=20, check=False, capture_output=True)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
