"""``hiss send``: stream files into the gateway the way an instrument should, and optionally wait until they are safe.

Every file becomes one object ``PREFIX/NAME`` with its place in the sequence as metadata; exit code 0 means every object
was confirmed with its checksum (with ``--wait``: is archived and verified, too), 1 that some were not.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import rich.progress
import typer
from rich.console import Console

from gateway.cli import node, options
from gateway.cli.output import CliError, ExitCode, complain, human_rate, print_json
from gateway.cli.run import parse_place, wait_until_safe
from gateway.cli.s3put import Connection, SendFailed, Sent, put

_TIMEOUT_S = 300.0
_FRAMES = re.compile(r"(?P<dtype>[<>=|]?[a-z]+[0-9]*),(?P<shape>[1-9][0-9]*(?:[x,][1-9][0-9]*)*)")


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    file: Path
    key: str
    metadata: dict[str, str]


def send(
    paths: Annotated[list[str], typer.Argument(metavar="FILE... s3://BUCKET/PREFIX", help="What, then where to.")],
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    frames: Annotated[
        str, typer.Option("--frames", metavar="DTYPE,SHAPE", help="Frame geometry of raw files, e.g. uint16,1024x1024.")
    ] = "",
    first_sequence: Annotated[int, typer.Option(min=0, help="Sequence number of the first file.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Files in flight at a time.")] = 4,
    attempts: Annotated[int, typer.Option(min=1, max=100, help="Tries for each file.")] = 8,
    region: Annotated[str, typer.Option(help="Region to sign for.")] = "us-east-1",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until all of PREFIX is archived and verified.")] = False,
    wait_timeout_s: Annotated[float, typer.Option(min=1, help="Longest --wait, seconds.")] = 3600.0,
    as_json: options.Json = False,
) -> None:
    """Send files as objects, each with its checksum confirmed; --wait: until it is safe to clear the detector."""
    if len(paths) < 2:
        raise CliError("give at least one file and a place: hiss send FILE... s3://BUCKET/PREFIX")
    *files, place = paths
    if "://" not in place and Path(place).exists():
        raise CliError(f"{place} is a file: where is it to go? write the place as s3://BUCKET/PREFIX")
    bucket, prefix = parse_place(place)
    found = node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca)
    if not found.s3_url:
        raise CliError("which node? give --endpoint URL, or --data DIR of a running node")
    if wait and not found.control_url:
        raise CliError("--wait asks the control API: give --control URL, or --data DIR")
    jobs = _jobs([Path(file) for file in files], prefix, _geometry(frames), first_sequence)
    started = time.monotonic()
    sent, failed = _send_all(found, bucket, jobs, parallel=parallel, attempts=attempts, region=region, show=not as_json)
    seconds = time.monotonic() - started
    for reason in failed:
        complain(reason)
    status = None
    if wait and not failed:
        folder = prefix if prefix.endswith("/") or not prefix else prefix + "/"
        sent_bytes = sum(one.size_bytes for one in sent)
        status = wait_until_safe(
            found, bucket, folder, wait_timeout_s, expect_objects=len(sent), expect_bytes=sent_bytes
        )
    total = sum(one.size_bytes for one in sent)
    if as_json:
        objects = [dataclasses.asdict(one) for one in sent]
        print_json({"bucket": bucket, "sent": objects, "failed": failed, "seconds": seconds, "run": status})
    else:
        print(f"{len(sent)} objects, {total / 1e9:.3f} GB in {seconds:.1f} s, {human_rate(total / max(seconds, 1e-9))}")
    if failed or (status is not None and not status["safe_to_clear"]):
        raise typer.Exit(ExitCode.NO)


def _geometry(frames: str) -> dict[str, str]:
    if not frames:
        return {}
    match = _FRAMES.fullmatch(frames.replace(" ", ""))
    if match is None:
        raise CliError(f"--frames {frames}: write it as DTYPE,SHAPE, e.g. uint16,1024x1024")
    return {"frame-dtype": match["dtype"], "frame-shape": match["shape"].replace("x", ",")}


def _jobs(files: list[Path], prefix: str, geometry: dict[str, str], first_sequence: int) -> list[_Job]:
    """One job a file, in the order given. Raises CliError for a file that is none or a name that comes twice."""
    folder = prefix if prefix.endswith("/") or not prefix else prefix + "/"
    jobs: list[_Job] = []
    names: set[str] = set()
    for number, file in enumerate(files, first_sequence):
        if not file.is_file():
            raise CliError(f"{file} is not a file")
        if file.name in names:
            raise CliError(f"{file}: another file of that name is sent to the same place; send them to two prefixes")
        names.add(file.name)
        jobs.append(_Job(file, folder + file.name, {"sequence": str(number), **geometry}))
    return jobs


def _send_all(
    found: node.Node, bucket: str, jobs: list[_Job], *, parallel: int, attempts: int, region: str, show: bool
) -> tuple[list[Sent], list[str]]:
    """Send every job; (confirmed ones in order, a line for each failure)."""
    own = threading.local()
    connections: list[Connection] = []

    def one(job: _Job) -> Sent:
        if not hasattr(own, "connection"):
            own.connection = Connection(found.s3_url, found.tls, _TIMEOUT_S)
            connections.append(own.connection)
        return put(
            own.connection, job.file, bucket, job.key, found.keys,
            region=region, metadata=job.metadata, attempts=attempts, progress=advance,
        )  # fmt: skip

    sent, failed = [], []
    total = sum(job.file.stat().st_size for job in jobs)
    with _bar(total, show) as advance, concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        for future in [pool.submit(one, job) for job in jobs]:
            try:
                sent.append(future.result())
            except (SendFailed, OSError) as error:
                failed.append(str(error))
    for connection in connections:
        connection.close()
    return sent, failed


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, when that is a terminal; yields what advances it by bytes."""
    console = Console(stderr=True)
    columns = (
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task("send", total=total)
        yield lambda count: progress.advance(task, count)
