"""``hiss demo``: real frames through a whole node, in a temporary folder, in under two minutes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from gateway.cli import options
from gateway.cli.output import CliError, ExitCode, print_json

INTERRUPTED = 130
"""Exit code, as gateway/cli/__init__.py lists it."""


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave all files where they are, and say where.")] = False,
    gigabytes: Annotated[float, typer.Option("--gigabytes", min=0.1, max=1000, help="Size of the stream.")] = 4.0,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where to make the temporary folder; default: the system's place for them."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Start a node, attach a kernel, stream real frames, watch feedback and drain, read everything back."""
    # The frames and the plots need numpy and HDF5, which no other command should wait for.
    from gateway.demo.node import DemoFailed
    from gateway.demo.story import Story
    from gateway.demo.stream import StreamFailed

    console = Console(stderr=as_json)
    with _temporary(folder, keep) as place:
        try:
            outcome = Story(place, gigabytes, console).tell()
        except (DemoFailed, StreamFailed) as error:
            log = _kept_log(place, keep)
            raise CliError(f"{error}\nthe node's log: {log}", ExitCode.NO) from None
        if as_json:
            print_json(dataclasses.asdict(outcome))
        elif keep:
            _say_where(console, place)
        else:
            console.print("[bold]files[/bold]     removed; `hiss demo --keep` leaves them and says where they are")


def _say_where(console: Console, place: Path) -> None:
    data = place / "data"
    for name, path in (
        ("archived frames", data / "archive" / "beamtime" / "stream"),
        ("products", data / "archive" / "beamtime" / "_products" / "saxs"),
        ("buffer", data / "segments"),
        ("catalogue", data / "catalogue"),
        ("log", place / "node.log"),
    ):
        console.print(f"[bold]{name:16}[/bold] {path}", highlight=False, soft_wrap=True)
    console.print(f"[bold]{'look again':16}[/bold] hiss serve --data {data}", highlight=False, soft_wrap=True)


def _kept_log(place: Path, keep: bool) -> Path:
    """The node's log, moved out of the folder when that is going to be removed."""
    log = place / "node.log"
    if keep or not log.exists():
        return log
    return Path(shutil.copy(log, Path(tempfile.mkdtemp(prefix="hiss-demo-log-")) / "node.log"))


@contextlib.contextmanager
def _temporary(parent: Path | None, keep: bool) -> Iterator[Path]:
    """A folder that is removed at the end unless ``keep``. SIGTERM and SIGHUP end the demonstration like Ctrl-C does."""
    try:
        place = Path(tempfile.mkdtemp(prefix="hiss-demo-", dir=parent))
    except OSError as error:
        raise CliError(f"--folder {parent}: {error.strerror}") from None

    def interrupt(*_: object) -> NoReturn:
        # Not KeyboardInterrupt: inside an exec(), as in an import that makes a dataclass, it marks the whole process as ended
        # by SIGINT, whatever is done about it later.
        sys.exit(INTERRUPTED)

    # Also SIGINT: a process that a shell put into the background was born ignoring it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
        signal.signal(signal.SIGHUP, interrupt)
    try:
        yield place
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
