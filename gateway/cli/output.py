"""What commands print: answers on stdout (a table or JSON), complaints on stderr, exit codes."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


class ExitCode(enum.IntEnum):
    """See gateway/cli/__init__.py for the whole table."""

    OK = 0
    NO = 1
    USAGE = 2
    HELD = 3
    NO_NODE = 4
    NOT_STARTED = 5


class CliError(Exception):
    """``str()`` says what is wrong and what to do next, in one line."""

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.code = code


def complain(message: str) -> None:
    """One line on stderr for each line of the message."""
    for line in message.splitlines():
        print(f"hiss: {line}", file=sys.stderr)


def print_json(value: Any) -> None:
    """One JSON document, one line: fit for jq and for a log."""
    print(json.dumps(value, default=str), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """A plain table; numbers are aligned right. Nothing is cut when stdout is no terminal."""
    table = Table(title=title or None, box=None, title_justify="left", pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = all(isinstance(row[number], int | float) for row in rows) and bool(rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console().print(table)


def console() -> Console:
    """Stdout; as wide as needed when it is a file or a pipe."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def human_rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


def human_size(size_bytes: float) -> str:
    """Decimal units, as disks and networks count."""
    for unit_bytes, unit, digits in ((1e12, "TB", 3), (1e9, "GB", 3), (1e6, "MB", 1), (1e3, "kB", 1)):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"


def human_age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
