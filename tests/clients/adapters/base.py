"""What an adapter does. Keys and metadata come as the scenario has them; an adapter spells them as its client wants."""

from __future__ import annotations

import abc
import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

COMMAND_TIMEOUT_S = 100
REGION = "us-east-1"


@dataclasses.dataclass(frozen=True)
class Service:
    """Where the node is and whom it knows. ``ca``: the certificate to trust; None speaks plain HTTP."""

    url: str
    access_key: str
    secret_key: str
    ca: Path | None
    bucket: str = "clients"
    many: str = "many"
    """The bucket with the keys of the listing."""

    @property
    def netloc(self) -> str:
        return self.url.partition("://")[2]

    @property
    def secure(self) -> bool:
        return self.ca is not None


def run_program(*command: str, home: Path, **environ: str) -> str:
    """Standard output of a program that must succeed; nothing that this machine has configured for S3 reaches it."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "RCLONE_", "RESTIC_", "S3_"))}
    done = subprocess.run(
        command, env={**clean, "HOME": str(home), **environ}, capture_output=True, text=True,
        timeout=COMMAND_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Adapter(abc.ABC):
    """One client. A method that ``cannot`` names is never called, by the scenario or by anybody."""

    name: ClassVar[str]
    cannot: ClassVar[dict[str, str]] = {}
    """Step of the scenario -> why this client has no way to do it."""
    one_put: ClassVar[str] = ""
    """Why this client sends even large files in one piece."""

    def __init__(self, service: Service, peer: Callable[[str], str], folder: Path) -> None:
        """``peer`` finds a program (and skips or fails without it); ``folder`` is this client's own."""
        self.service = service
        self.peer = peer
        self.folder = folder

    @abc.abstractmethod
    def put(self, key: str, file: Path, metadata: dict[str, str] | None = None) -> None: ...

    @abc.abstractmethod
    def get(self, key: str, file: Path) -> None: ...

    @abc.abstractmethod
    def delete(self, key: str) -> None: ...

    @abc.abstractmethod
    def keys(self) -> list[str]:
        """Every key of the bucket ``service.many``."""

    def get_range(self, key: str, first: int, count: int) -> bytes:
        raise NotImplementedError

    def put_large(self, key: str, file: Path) -> None:
        """Upload a large file: in parts, unless ``one_put`` says why not."""
        self.put(key, file)

    def copy(self, source: str, target: str) -> None:
        """Copy within the server."""
        raise NotImplementedError

    def presign(self, key: str) -> str:
        """A URL anybody can GET for a while."""
        raise NotImplementedError

    def metadata(self, key: str) -> dict[str, str]:
        raise NotImplementedError

    def spell(self, value: str) -> str:
        """A metadata value that is not ASCII, as this client takes it."""
        return value

    def close(self) -> None:
        return

    # -- for adapters of programs

    def run(self, *command: str, **environ: str) -> str:
        return run_program(*command, home=self.folder, **environ)

    def aws_environ(self) -> dict[str, str]:
        """Credentials as tools in the manner of AWS read them."""
        found = {
            "AWS_ACCESS_KEY_ID": self.service.access_key,
            "AWS_SECRET_ACCESS_KEY": self.service.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_CONFIG_FILE": str(self.folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self.service.ca is not None:
            found |= {"AWS_CA_BUNDLE": str(self.service.ca), "SSL_CERT_FILE": str(self.service.ca)}
        return found
