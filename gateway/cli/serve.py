"""``hiss serve``: decide the settings, run the supervisor until SIGTERM, say where the node answers.

Needs nothing but ``--data``. On first start a root key pair is made; its secret is shown once, on a terminal, and by
``hiss user show-root`` whenever asked.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway import logging as gateway_logging
from gateway import users, users_file
from gateway.cli import options
from gateway.cli.output import CliError, print_json
from gateway.node_key import NodeKey
from gateway.settings import Settings, load
from gateway.supervisor.node import Supervisor
from gateway.supervisor.table import node_roles
from ingest.paths import NodePaths


def serve(
    data: options.Folder = None,
    config: options.Config = None,
    users_file: Annotated[Path | None, typer.Option("--users", help="users.toml; SIGHUP reads it again.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [0.0.0.0].")] = None,
    s3_port: Annotated[int | None, typer.Option(help="S3 [9000]; 0 picks a free port.")] = None,
    control_port: Annotated[int | None, typer.Option(help="Control API and console [9001].")] = None,
    dav_port: Annotated[int | None, typer.Option(help="WebDAV [9002].")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: cores, at most 8.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain, for all three ports.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key.")] = None,
    sets: options.Sets = None,
    as_json: options.Json = False,
) -> None:
    """Run a node until SIGTERM or Ctrl-C. Needs nothing but --data DIR."""
    flags: dict[str, Any] = {
        **parse_sets(sets),
        **given(
            data_dir=data,
            users_file=users_file,
            host=host,
            s3_port=s3_port,
            control_port=control_port,
            dav_port=dav_port,
            workers=workers,
            tls_cert=tls_cert,
            tls_key=tls_key,
        ),
    }
    settings = load(flags, config=config).settings
    gateway_logging.setup(settings.log_level, settings.log_format, role="supervisor")
    asyncio.run(Node(settings, as_json=as_json).run())


def given(**flags: Any) -> dict[str, Any]:
    """The flags that were given."""
    return {name: value for name, value in flags.items() if value is not None}


def parse_sets(sets: list[str] | None) -> dict[str, str]:
    """``["name=value", …]`` as settings; raises CliError."""
    values = {}
    for text in sets or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise CliError(f"--set {text}: write it as NAME=VALUE; `hiss settings` lists the names")
        values[name.strip()] = value.strip()
    return values


class Node:
    """The supervisor with what only the composition root knows: the users, and what to tell the operator."""

    def __init__(self, settings: Settings, *, as_json: bool) -> None:
        self._settings = settings
        self._as_json = as_json
        self._paths = NodePaths(settings.data_dir)
        self._root = users.KeyPair("", "")
        self._root_is_new = False

    async def run(self) -> None:
        # Read before anything starts: a wrong file is the operator's to put right, at once.
        self._read_users()
        supervisor = Supervisor(
            self._settings,
            node_roles(self._settings),
            hooks={"catalogue": self._write_users},
            reload=self._write_users,
            serving=self._say_serving,
        )
        await supervisor.run()

    def _read_users(self) -> list[users.FileUser]:
        return users_file.read_file(self._settings.users_file) if self._settings.users_file else []

    async def _write_users(self) -> None:
        """Root and users.toml into the catalogue: when it is first ready, and on SIGHUP."""
        from ingest.catalog.client import CatalogClient

        key = NodeKey.load_or_create(self._paths.node_key)
        async with CatalogClient(self._paths) as catalog:
            if self._settings.catalog:
                await users.adopt_root(catalog, self._paths, key)
            self._root, made = users.root_keys(self._paths, key)
            self._root_is_new = self._root_is_new or made
            await users.apply(catalog, self._paths, key, self._root, self._read_users())

    def _say_serving(self, ports: dict[str, int]) -> None:
        data_dir, access_key = self._settings.data_dir, self._root.access_key
        if self._as_json:
            print_json({"event": "serving", "data": data_dir, "ports": ports, "access_key": access_key})
            return
        scheme = "https" if self._settings.tls else "http"
        for label, name in (("S3", "s3"), ("control", "control"), ("WebDAV", "dav")):
            print(f"{label:8} {scheme}://{self._settings.host}:{ports[name]}")
        print(f"root     access key {access_key}")
        if self._root_is_new and sys.stdout.isatty():
            print(f"         secret key {self._root.secret_key}   (new; shown this once)")
        print(f"         `hiss user show-root --data {data_dir}` shows the secret key", flush=True)
