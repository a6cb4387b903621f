"""``hiss catalog backup|restore`` and ``hiss fsck``: keeping and checking the node's truth, on the node itself."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli import node, options
from gateway.cli.output import CliError, ExitCode, print_json, print_table

app = typer.Typer(help="Back-ups of the catalogue.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The back-up: one SQLite file.")]


@app.command("backup")
def back_up(file: File, data: options.NodeData, as_json: options.Json = False) -> None:
    """Write a back-up of the catalogue; the node may run. Object bytes are not in it."""
    from ingest.catalog.backup import backup
    from ingest.journal import JournalDamaged

    if file.exists():
        raise CliError(f"{file} is there already; give a new name")
    try:
        report = backup(node.paths_of(data).root, file)
    except JournalDamaged as error:
        raise CliError(f"the journal of {data} is damaged: {error}; run `hiss fsck --data {data}`") from None
    except (OSError, sqlite3.Error) as error:
        raise CliError(f"{file} could not be written: {error}") from None
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    print(f"{report.file}: {report.size_bytes} bytes, complete up to journal entry {report.applied_sequence}")


@app.command("restore")
def put_back(file: File, data: options.NodeData, as_json: options.Json = False) -> None:
    """Make a back-up the catalogue of a stopped node; what was committed later is no longer known."""
    from ingest.catalog.backup import restore
    from ingest.catalog.lock import CatalogueBusy

    try:
        report = restore(node.paths_of(data).root, file)
    except CatalogueBusy:
        raise CliError(f"a node runs on {data}; stop it first", ExitCode.HELD) from None
    except (OSError, sqlite3.Error) as error:
        raise CliError(f"{file} could not be restored: {error}") from None
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    print(f"restored up to journal entry {report.applied_sequence}; now run `hiss fsck --data {data}`")
    for path in report.set_aside:
        print(f"set aside: {path}")


def check(
    data: options.NodeData,
    repair: Annotated[bool, typer.Option("--repair", help="Build a damaged index anew (stopped node).")] = False,
    payload: Annotated[bool, typer.Option("--payload", help="Read every buffered byte, too.")] = False,
    catalog: Annotated[
        str,
        typer.Option(
            "--catalog",
            envvar="HISS_CATALOG",
            help="A node of a cluster: its engine, with whose log the index is compared.",
        ),
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Check journal, index and segments against each other. Exit code 0: sound; 1: something does not fit."""
    from ingest.catalog.fsck import fsck
    from ingest.catalog.lock import CatalogueBusy
    from ingest.cluster import identity

    paths = node.paths_of(data)
    known = identity.read(paths)
    tell = None
    if known is not None and known.joined and catalog:
        joined = known

        def tell(made: Path, up_to: int) -> None:
            from ingest.cluster.retold import retell

            asyncio.run(retell(catalog, joined, made, up_to))

    try:
        report = fsck(paths.root, repair=repair, payload=payload, tell=tell)
    except CatalogueBusy:
        raise CliError(f"a node runs on {data}; stop it to repair", ExitCode.HELD) from None
    except OSError as error:
        raise CliError(f"{data} could not be read: {error}") from None
    if as_json:
        print_json({"sound": report.sound, **dataclasses.asdict(report)})
    else:
        facts = dataclasses.asdict(report)
        del facts["problems"], facts["unchecked"]
        print_table(("", "sound" if report.sound else "DAMAGED"), [(k.replace("_", " "), v) for k, v in facts.items()])
        if report.problems:
            rows = [(problem.kind, problem.where, problem.detail) for problem in report.problems]
            print_table(("kind", "where", "problem"), rows)
        for what in report.unchecked:
            print(f"not checked: {what}")
        if report.repaired and known is not None:
            print("the damaged index was set aside; the node makes it anew from the engine when it starts")
    if not report.sound:
        raise typer.Exit(ExitCode.NO)
