"""``hiss replay``: reduce again what is stored, on a Dask cluster, with the kernels, the sandbox and the merge of a node.

Exit code 0: everything was judged (and, with ``--compare``, is the same bit by bit); 1: an object failed, or something
differs (each is named); 2: no such kernel, no output, no Dask; 4: no node or no scheduler is there.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import node, options
from gateway.cli.kernel.source import Refused, parse_params
from gateway.cli.output import CliError, ExitCode, human_rate, human_size, print_json
from gateway.cli.s3 import REGION, S3, Listed, shown

if TYPE_CHECKING:
    from rich.progress import Progress

    from gateway.replay.access import Access
    from gateway.replay.cluster import Cluster
    from gateway.replay.drive import Drive
    from gateway.replay.plan import Settings
    from gateway.replay.results import Output, Results

SPLIT_BYTES = 512 << 20
NAMED_MAX = 20


class Credentials(enum.StrEnum):
    """Where Dask workers have their keys from."""

    SESSION = "session"
    ENVIRONMENT = "environment"


def replay(
    kernel: Annotated[
        str, typer.Option("--kernel", metavar="NAME|FILE.py", help="A kernel of the bucket, or a local file.")
    ],
    prefix: Annotated[str, typer.Option("--prefix", metavar="s3://BUCKET/PREFIX", help="The objects.")],
    scheduler: Annotated[
        str,
        typer.Option(
            "--scheduler", metavar="ADDRESS", help="Of a Dask cluster: tcp://HOST:8786. Default: this machine."
        ),
    ] = "",
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=256, help="Without --scheduler: processes on this machine.")
    ] = 2,
    output: Annotated[
        str, typer.Option("--output", metavar="DIR|s3://BUCKET/PREFIX", help="Where the products go.")
    ] = "",
    compare: Annotated[bool, typer.Option("--compare", help="Compare with the live products, bit by bit.")] = False,
    params: Annotated[
        str, typer.Option("--params", metavar="JSON", help="Other parameters than those that held.")
    ] = "",
    after: Annotated[
        str, typer.Option("--after", metavar="NAME", help="Of a local file: the bucket's kernel before it.")
    ] = "",
    name: Annotated[
        str, typer.Option("--name", help="Of a local file: the name it goes by. Default: the file's.")
    ] = "",
    split: Annotated[
        int,
        typer.Option("--split-bytes", min=4096, help="Larger objects are several tasks, where the kernel allows it."),
    ] = SPLIT_BYTES,
    credentials: Annotated[
        Credentials,
        typer.Option(
            help="session: read-only keys for 12 hours, brought to the workers; environment: they have their own."
        ),
    ] = Credentials.SESSION,
    worker_endpoint: Annotated[
        str, typer.Option("--worker-endpoint", metavar="URL", help="The S3 port as the Dask workers reach it.")
    ] = "",
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Reduce stored objects again on a Dask cluster; the results are those of the node, bit by bit."""
    from gateway.replay import cluster as clusters
    from gateway.replay.plan import settings_of
    from gateway.replay.results import Output

    clusters.require()
    bucket, _, below = prefix.removeprefix("s3://").partition("/")
    if not bucket:
        raise CliError(f"--prefix {prefix!r}: which bucket? write s3://BUCKET/PREFIX")
    wanted = Output.of(output) if output else None
    found = node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca)
    with S3(found) as s3:
        given = parse_params(params) if params else None
        try:
            settings = settings_of(s3, bucket, kernel, given, after, name)
        except Refused as refusal:
            if as_json:
                refusal.print_json()
            raise
        objects = list(_objects(s3, bucket, below, settings))
        if not objects:
            raise CliError(f"s3://{bucket}/{below}: no object that kernel {settings.now.name} runs over")
        _check_output(wanted, bucket, settings)
        if wanted is None and not compare:
            _say_what_would_be(bucket, objects, settings, as_json=as_json)
        access = _access(found, bucket, credentials, worker_endpoint, ca)
        done = _replayed(
            s3, bucket, settings, objects, wanted, scheduler, workers, access, compare, split, _own(found, ca)
        )
    _report(done, bucket, settings, as_json=as_json)
    if done.drive.failures or done.results.differences:
        raise typer.Exit(ExitCode.NO)


@dataclasses.dataclass(frozen=True, slots=True)
class _Done:
    drive: Drive
    results: Results
    cluster: Cluster
    objects: int
    seconds: float
    first_answer_s: float
    stored: bool


def _objects(s3: S3, bucket: str, prefix: str, settings: Settings) -> Iterator[Listed]:
    """What a node's kernel sees: not kernels, products, markers of runs and empty objects; what its ``match`` lets through."""
    from kernels.attach import is_internal

    for one in s3.walk(bucket, prefix):
        if one.size_bytes and not is_internal(one.key) and settings.now.matches(one.key):
            yield one


def _check_output(output: Output | None, bucket: str, settings: Settings) -> None:
    if output is None or output.bucket != bucket:
        return
    if settings.now.matches(output.prefix.encode() + b"x.nxs"):
        raise CliError(
            f"--output s3://{bucket}/{output.prefix}: kernel {settings.now.name} would run over its own products there; "
            "choose another bucket, or a folder"
        )


def _say_what_would_be(bucket: str, objects: list[Listed], settings: Settings, *, as_json: bool) -> None:
    """Raises CliError: there is nowhere to put it."""
    from ingest.runs import run_of
    from kernels.runs.names import product_key, run_key

    name = settings.now.name
    runs = sorted({run_of(one.key) for one in objects})
    size_bytes = sum(one.size_bytes for one in objects)
    products = [shown(product_key(name, one.key)) for one in objects] + [shown(run_key(name, run)) for run in runs]
    if as_json:
        print_json(
            {
                "kernel": name,
                "sha256": settings.now.kernel.sha256,
                "params": dict(settings.now.params),
                "objects": len(objects),
                "bytes": size_bytes,
                "would_store": products,
            }
        )
    else:
        print(f"kernel {name} with {dict(settings.now.params) or 'no parameters'} over {len(objects)} objects of s3://{bucket}, "
              f"{human_size(size_bytes)}, in {len(runs)} runs; it would store")  # fmt: skip
        for product in products[:NAMED_MAX]:
            print(f"  {product}")
        if len(products) > NAMED_MAX:
            print(f"  and {len(products) - NAMED_MAX} more")
        print("objects of one frame count in the product of their run only")
    raise CliError(
        "nothing was done: say where the products go with --output DIR or s3://BUCKET/PREFIX, or --compare them"
    )


def _own(found: node.Node, ca: Path | None) -> Access:
    """For what this command reads itself."""
    from gateway.replay.access import Access

    return Access(
        found.s3_url, REGION, _authority(ca), found.tls is None or ca is not None,
        found.keys.access_key, found.keys.secret_key,
    )  # fmt: skip


def _access(found: node.Node, bucket: str, credentials: Credentials, worker_endpoint: str, ca: Path | None) -> Access:
    from gateway.replay.access import read_only

    access = dataclasses.replace(_own(found, ca), access_key="", secret_key="")
    if worker_endpoint:
        access = dataclasses.replace(access, endpoint=worker_endpoint.rstrip("/"))
    if credentials is Credentials.ENVIRONMENT:
        return access
    access_key, secret_key, token = read_only(found, bucket, REGION)
    return dataclasses.replace(access, access_key=access_key, secret_key=secret_key, token=token)


def _authority(ca: Path | None) -> str:
    return "" if ca is None else ca.read_text()


def _replayed(
    s3: S3,
    bucket: str,
    settings: Settings,
    objects: list[Listed],
    output: Output | None,
    scheduler: str,
    workers: int,
    access: Access,
    compare: bool,
    split_bytes: int,
    own: Access,
) -> _Done:
    from gateway.replay import cluster as clusters
    from gateway.replay import results
    from gateway.replay.drive import Drive
    from gateway.replay.plan import plain_geometry
    from gateway.replay.ranges import Endpoint

    began_s = time.monotonic()
    reader = Endpoint(own)
    try:
        with results.staging(output) as folder:
            staged = results.Results(s3, bucket, output, compare=compare, staging=folder)
            with clusters.cluster(scheduler, workers, access) as cluster, _progress(objects) as progress:
                began_s = time.monotonic()
                drive = Drive(
                    cluster, s3, bucket, settings, staged, split_bytes,
                    lambda listed: plain_geometry(reader, bucket, listed), progress,
                )  # fmt: skip
                drive.run(objects)
                seconds = time.monotonic() - began_s
                first_s = (drive.first_s or began_s) - began_s
            staged.publish()
    finally:
        reader.close()
    return _Done(drive, staged, cluster, len(objects), seconds, first_s, output is not None)


@contextmanager
def _progress(objects: list[Listed]) -> Iterator[Any]:
    """On a terminal: bytes and frames as they are folded."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar: Progress = Bar(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    frames = 0
    with bar:
        task = bar.add_task("replay", total=sum(one.size_bytes for one in objects))

        def told(bytes_more: int, frames_more: int) -> None:
            nonlocal frames
            frames += frames_more
            bar.update(task, advance=bytes_more, description=f"{frames} frames")

        yield told


def _report(done: _Done, bucket: str, settings: Settings, *, as_json: bool) -> None:
    drive, results = done.drive, done.results
    rate = drive.frames / done.seconds if done.seconds else 0.0
    document = {
        "kernel": settings.now.name,
        "sha256": settings.now.kernel.sha256,
        "params": dict(settings.now.params),
        "objects": done.objects,
        "frames": drive.frames,
        "bytes": drive.bytes,
        "products": results.products,
        "stored": done.stored,
        "failures": [{"key": shown(key), "reason": reason} for key, reason in drive.failures],
        "compared": results.compared,
        "differences": [dataclasses.asdict(one) for one in results.differences],
        "dask_workers": done.cluster.workers,
        "threads": done.cluster.threads,
        "seconds": round(done.seconds, 3),
        "first_answer_s": round(done.first_answer_s, 3),
        "first_frames": drive.first_frames,
        "frames_per_s": round(rate, 1),
        "notes": list(done.cluster.notes),
    }
    if as_json:
        print_json(document)
        return
    speed = f"{rate:.1f} frames/s, {human_rate(drive.bytes / max(done.seconds, 1e-9))}"
    print(f"kernel {settings.now.name}: {drive.frames} frames of {done.objects} objects in s3://{bucket}")
    print(f"{done.seconds:.1f} s on {done.cluster.workers} Dask workers: {speed}")
    print(f"{len(results.products)} products{' stored' if done.stored else ''}")
    for product in results.products[:NAMED_MAX] if done.stored else ():
        print(f"  {product}")
    for key, reason in drive.failures:
        print(f"  FAILED {shown(key)}: {reason}")
    for one in results.differences:
        print(f"  DIFFERS {one.product}: {one.what}: {one.how}")
    if results.compared and not results.differences:
        print(f"{results.compared} live products: the same, bit by bit")
    for note in done.cluster.notes:
        print(f"  note: {note}")
