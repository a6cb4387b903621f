"""``hiss migrate``: a node that outgrew its embedded catalogue becomes the first node of a cluster."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import socket
import sqlite3
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gateway.cli import node, options
from gateway.cli.output import CliError, ExitCode, human_size, print_json
from gateway.node_key import NodeKey
from ingest.paths import NodePaths

if TYPE_CHECKING:
    from ingest.cluster.takeover import TakeoverReport

To = Annotated[
    str,
    typer.Option(
        "--to",
        envvar="HISS_CATALOG",
        metavar="URL",
        help="The engine, postgresql://USER:PASSWORD@HOST:PORT/DATABASE: an empty database. HISS_CATALOG keeps the password "
        "from the command line.",
    ),
]
Name = Annotated[
    str, typer.Option("--name", help="What the node is called; its setting node_name. Default: the host name.")
]


def migrate(data: options.NodeData, to: To, name: Name = "", as_json: options.Json = False) -> None:
    """Take a stopped node's catalogue into a new cluster, as its node 0. May be killed at any time and started again."""
    from ingest.catalog.lock import CatalogueBusy
    from ingest.cluster.engine import driver_url
    from ingest.cluster.errors import EngineAway
    from ingest.journal import JournalDamaged

    called = name or socket.gethostname()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", called):
        raise CliError(f"--name {called}: allowed are 1 to 63 letters, digits and ._-, a letter or digit first")
    address = driver_url(to)
    paths = node.paths_of(data)
    if not paths.node_key.exists():
        raise CliError(f"{data} has no node.key: it was never started", ExitCode.NO_NODE)
    fingerprint = NodeKey.load(paths.node_key).fingerprint
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, disable=as_json) as progress:
            report = asyncio.run(_take_over(to, node.paths_of(data), called, fingerprint, progress))
    except CatalogueBusy:
        raise CliError(f"a node runs on {data}; stop it first", ExitCode.HELD) from None
    except EngineAway as error:
        shown = address.render_as_string(hide_password=True)
        raise CliError(f"{shown}: {error}; the migration goes on when it is started again", ExitCode.NO_NODE) from None
    except JournalDamaged as error:
        raise CliError(f"the journal of {data} is damaged: {error}; run `hiss fsck --data {data}`") from None
    except (OSError, sqlite3.Error) as error:
        raise CliError(f"{data} could not be read or written: {error}") from None
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    print(
        f"{data} is node {report.node} ({report.name}) of cluster {report.cluster_id} now: {report.objects} object versions, "
        f"entry {report.applied_sequence}, {human_size(report.index_bytes)}, read back and compared (SHA-256 {report.digest})"
    )
    for path in report.set_aside:
        print(f"set aside: {path}")
    print(f"start it with the setting catalog and node_name={report.name}; copy its node.key to every other node first")


async def _take_over(url: str, paths: NodePaths, name: str, fingerprint: str, progress: Progress) -> TakeoverReport:
    from ingest.cluster.engine import Engine
    from ingest.cluster.join import Joining
    from ingest.cluster.takeover import take_over

    tasks: dict[str, TaskID] = {}

    def tell(step: str, done: int, of: int) -> None:
        if step not in tasks:
            tasks[step] = progress.add_task(step, total=of)
        progress.update(tasks[step], completed=done, total=max(1, of))

    async with Engine(url) as engine:
        return await take_over(paths, engine, Joining(name, fingerprint), tell)
