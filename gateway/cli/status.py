"""``hiss status`` and ``hiss drain``: how the node is, and what waits for the archive; both from the control API."""

from __future__ import annotations

import time
from typing import Any

import typer

from gateway.cli import node, options
from gateway.cli.output import CliError, ExitCode, human_age, print_json, print_table
from gateway.settings import human_bytes


def status(
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """How the node and its processes are. Exit code 0: it can take a PUT; 1: it cannot."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    document = _object(found.ask("/v1/status"), "/v1/status")
    if as_json:
        print_json(document)
    else:
        scalars = [(_words(name), _shown(name, value)) for name, value in document.items() if _scalar(value)]
        print_table(("node", ""), scalars)
        for name, value in document.items():
            if isinstance(value, dict):
                rows = [(_words(inner), _shown(inner, cell)) for inner, cell in value.items() if _scalar(cell)]
                print_table((_words(name), ""), rows)
            elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                columns = [column for column in value[0] if _scalar(value[0][column])]
                print_table(
                    tuple(_words(column) for column in columns),
                    [[_shown(column, row.get(column)) for column in columns] for row in value],
                    title=_words(name),
                )
    if document.get("status", document.get("healthy")) not in ("ok", "serving", True):
        raise typer.Exit(ExitCode.NO)


def drain(
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """What waits for the archive: queue, oldest, what fails and why."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    document = _object(found.ask("/v1/drain"), "/v1/drain")
    if as_json:
        print_json(document)
        return
    print_table(
        ("drain", ""), [(_words(name), _shown(name, value)) for name, value in document.items() if _scalar(value)]
    )
    failing = document.get("failing")
    if isinstance(failing, list) and failing:
        columns = list(failing[0])
        rows = [[_shown(column, row.get(column)) for column in columns] for row in failing]
        print_table(tuple(_words(column) for column in columns), rows, title="failing")


def _object(document: Any, path: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise CliError(f"{path}: answered no object; are node and hiss of one version?")
    return document


def _scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(name: str, value: Any) -> str:
    """A value as an operator reads it, by the unit its name ends with."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int) and name.endswith("_bytes"):
        return human_bytes(value) if value < 1 << 20 else f"{value / 1e9:.3f} GB"
    if isinstance(value, int | float) and name.endswith("_ns") and value > 10**18:
        return f"{human_age(max(0.0, time.time() - value / 1e9))} ago"
    if isinstance(value, int | float) and name.endswith(("_s", "_seconds")):
        return human_age(float(value))
    return str(value)
