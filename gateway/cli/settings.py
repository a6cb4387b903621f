"""``hiss settings``: the table of settings, with the value each would have here and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateway.cli import options
from gateway.cli.output import print_json, print_table
from gateway.cli.serve import given, parse_sets
from gateway.settings import human_bytes, load, table


def settings(
    data: options.Folder = None,
    config: options.Config = None,
    sets: options.Sets = None,
    as_json: options.Json = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="The table for the documentation, no values.")
    ] = False,
) -> None:
    """Every setting: value, where it comes from, unit, limits, meaning."""
    if as_markdown:
        print(markdown())
        return
    # Without a folder the values are those that a node started here would have.
    flags = {"data_dir": Path("hiss-data"), **parse_sets(sets), **given(data_dir=data)}
    loaded = load(flags, config=config)
    values = loaded.settings.shown()
    rows = table()
    if as_json:
        print_json(
            [
                {
                    "name": row.name,
                    "value": values[row.name],
                    "origin": loaded.origins[row.name],
                    "unit": row.unit,
                    "default": row.default,
                    "minimum": row.minimum,
                    "maximum": row.maximum,
                    "help": row.help,
                }
                for row in rows
            ]
        )
        return
    shown = [
        (row.name, _shown(values[row.name], row.unit), loaded.origins[row.name], row.allowed, row.help) for row in rows
    ]
    print_table(("setting", "value", "from", "allowed", "meaning"), shown)


def markdown() -> str:
    """The settings table as it stands in the documentation."""
    lines = ["| setting | unit | default | allowed | meaning |", "|---|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.unit} | {row.default} | {row.allowed} | {row.help} |" for row in table()]
    return "\n".join(lines)


def _shown(value: object, unit: str) -> str:
    if value is None:
        return "–"
    return human_bytes(value) if isinstance(value, int) and unit.startswith("bytes") else str(value)
