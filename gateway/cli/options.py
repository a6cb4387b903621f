"""Options that several commands share, so that one thing is called the same everywhere."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Config = Annotated[Path | None, typer.Option("--config", envvar="HISS_CONFIG", help="Settings file (hiss.toml).")]
Folder = Annotated[Path | None, typer.Option("--data", help="The node's folder (or HISS_DATA_DIR).")]
Data = Annotated[
    Path | None,
    typer.Option("--data", envvar="HISS_DATA_DIR", help="The node's folder: its ports and root keys are found there."),
]
NodeData = Annotated[Path, typer.Option("--data", envvar="HISS_DATA_DIR", help="The node's folder.")]
Control = Annotated[
    str, typer.Option("--control", envvar="HISS_CONTROL", help="URL of the control API, e.g. https://gw:9001.")
]
Endpoint = Annotated[str, typer.Option("--endpoint", envvar="HISS_ENDPOINT", help="URL of the S3 port.")]
AccessKey = Annotated[
    str,
    typer.Option(
        "--access-key", envvar="HISS_ACCESS_KEY", help="Its secret: HISS_SECRET_KEY. Default: root's, with --data."
    ),
]
CaFile = Annotated[Path | None, typer.Option("--ca", help="PEM file of the authority that signed the certificate.")]


class Core(enum.StrEnum):
    """What a kernel's results are compared with."""

    CPU = "cpu"
    MODEL = "model"
    GHDL = "ghdl"


def bucket_of(text: str) -> str:
    """``BUCKET``, as people also write it: ``s3://BUCKET/``."""
    return text.removeprefix("s3://").removesuffix("/")


Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; see `hiss settings`.")
]
SECRET_VARIABLE = "HISS_SECRET_KEY"
"""The secret is taken from the environment only: command lines are visible to every user of the machine."""
