"""``hiss run status|list|close``: may the detector be cleared (one answer, also as exit code)? Which runs are open? Close one."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from gateway.cli import node, options
from gateway.cli.output import CliError, ExitCode, print_json, print_table

app = typer.Typer(help="Runs: everything under one key prefix.", no_args_is_help=True)

_POLL_FIRST_S, _POLL_LAST_S = 0.2, 5.0
_PAGE_RUNS = 100
_SHOWN_MAX = 20
"""Rows of a list on a terminal; --json has them all."""


@app.command("status")
def run_status(
    place: Annotated[str, typer.Argument(metavar="s3://BUCKET/PREFIX", help="The run, usually ending with /.")],
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    expect_objects: Annotated[int | None, typer.Option(min=0, help="How many objects were sent.")] = None,
    expect_bytes: Annotated[int | None, typer.Option(min=0, help="How many bytes were sent.")] = None,
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="Wait up to this many seconds for a yes.")] = 0.0,
    as_json: options.Json = False,
) -> None:
    """Exit code 0: everything sent is acknowledged, archived and verified; 1: not yet; 2 and up: no answer."""
    bucket, prefix = parse_place(place)
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    expected = {"expect_objects": expect_objects, "expect_bytes": expect_bytes}
    known = {name: value for name, value in expected.items() if value is not None}
    status = wait_until_safe(found, bucket, prefix, wait_s, **known)
    if as_json:
        print_json(status)
    else:
        _print(place, status)
    if not status["safe_to_clear"]:
        raise typer.Exit(ExitCode.NO)


@app.command("list")
def run_list(
    place: Annotated[str, typer.Argument(metavar="s3://BUCKET[/PREFIX]", help="Where to look.")],
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """The runs below a prefix: open or closed, and what each kernel's product covers."""
    bucket, prefix = parse_place(place)
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    runs: list[dict[str, Any]] = []
    after = ""
    while True:
        answer = found.ask("/v1/runs", bucket=bucket, prefix=prefix, after=after, limit=_PAGE_RUNS)
        runs += answer["runs"]
        after = answer["next_after"]
        if not after:
            break
    if as_json:
        print_json({"runs": runs})
    else:
        _print_runs(runs)


@app.command("close")
def run_close(
    place: Annotated[str, typer.Argument(metavar="s3://BUCKET/RUN/", help="The run, with its closing slash.")],
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """No more members: products become final. A member that comes all the same opens the run again."""
    bucket, prefix = parse_place(place)
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    run = found.tell("/v1/runs/close", bucket=bucket, prefix=prefix)
    if as_json:
        print_json(run)
    else:
        _print_runs([run])


def _print_runs(runs: list[dict[str, Any]]) -> None:
    rows = []
    for run in runs:
        state = f"closed ({run['closed_by']})" if run["state"] == "closed" else "open"
        for product in run["products"] or [{}]:
            covered = (product.get("kernel", ""), product.get("members", ""), product.get("pending", ""))
            failed = ": ".join(filter(None, (product.get("error_key", ""), product.get("error", ""))))
            why = "; ".join(filter(None, (failed, product.get("waits", ""))))
            rows.append((run["prefix"], state, *covered, product.get("failed", ""), why))
    print_table(("run", "state", "kernel", "members", "pending", "failed", "why"), rows)


def parse_place(place: str) -> tuple[str, str]:
    """``s3://bucket/prefix``, or without the scheme, -> (bucket, prefix); raises CliError."""
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    if not bucket or "://" in place.removeprefix("s3://"):
        raise CliError(f"{place!r} is no place: write it as s3://BUCKET/PREFIX or BUCKET/PREFIX")
    return bucket, prefix


def _print(place: str, status: dict[str, Any]) -> None:
    print(f"{place}: {'SAFE TO CLEAR' if status['safe_to_clear'] else 'NOT SAFE TO CLEAR'} ({status['verdict']})")
    for reason in status["reasons"]:
        print(f"  {reason}")
    plain = [(name.replace("_", " "), value) for name, value in status.items() if type(value) is int]
    frames = [(f"frames {name.replace('_', ' ')}", value) for name, value in status["frames"].items() if value]
    print_table(("", ""), [*plain, *frames])
    if status["missing"]:
        rows = [(one["key"], one["state"], one["drain_attempts"], one["error"]) for one in status["missing"]]
        print_table(("not archived yet", "state", "attempts", "error"), rows[:_SHOWN_MAX])
    if status["gaps"]:
        gaps = [(one["key"], one["first_frame"], one["frames"]) for one in status["gaps"]]
        print_table(("frames missing in", "first", "count"), gaps[:_SHOWN_MAX])
    if status["unfiltered"]:
        whole = [(one["key"], one["reason"]) for one in status["unfiltered"]]
        print_table(("raw data not filtered", "why"), whole[:_SHOWN_MAX])
    if status["kernel_errors"]:
        errors = [(one["kernel"], one["key"], one["reason"]) for one in status["kernel_errors"]]
        print_table(("kernel trouble", "with", "why"), errors[:_SHOWN_MAX])
    if status["truncated"]:
        cuts = [(one["key"], one["stopped_at"], one["discarded_bytes"]) for one in status["truncated"]]
        print_table(("ended by a kernel's STOP", "at frame", "bytes not stored"), cuts[:_SHOWN_MAX])


def wait_until_safe(found: node.Node, bucket: str, prefix: str, timeout_s: float, **expected: int) -> dict[str, Any]:
    """Ask until the run is safe or the time is up; the last answer. ``expected``: expect_objects, expect_bytes.
    Raises CliError."""
    deadline = time.monotonic() + timeout_s
    pause_s = _POLL_FIRST_S
    while True:
        status = found.ask("/v1/runs/status", bucket=bucket, prefix=prefix, **expected)
        if not isinstance(status, dict) or not isinstance(status.get("safe_to_clear"), bool):
            raise CliError(
                "/v1/runs/status: the answer does not say whether it is safe; are node and hiss of one version?"
            )
        if status["safe_to_clear"] or time.monotonic() + pause_s > deadline:
            return status
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _POLL_LAST_S)
