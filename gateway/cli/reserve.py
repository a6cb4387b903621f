"""``hiss reserve BUCKET …|list|show|extend|release``: capacity and rate of the nodes for a bucket, for a slot of time."""

from __future__ import annotations

import datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer
from typer.core import TyperGroup

from gateway.cli import node, options
from gateway.cli.output import print_json, print_table
from gateway.cli.quantities import parse_duration, parse_rate, parse_size, parse_time
from ingest.reservations import rate_text, size_text


class _BucketFirst(TyperGroup):
    """``hiss reserve BUCKET …`` is ``hiss reserve make BUCKET …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BucketFirst,
    help="Reserve capacity and rate for a bucket: hiss reserve BUCKET --capacity 20TB --rate 20Gbps --until +8h.",
    no_args_is_help=True,
)

_Id = Annotated[str, typer.Argument(metavar="ID", help="Of the reservation, as `hiss reserve list` shows it.")]
_TIME_HELP = "2026-12-01T08:00 (this machine's zone, or say one), 08:00, +8h"


@app.command("make")
def make(
    bucket: Annotated[str, typer.Argument(metavar="BUCKET")],
    until: Annotated[str, typer.Option("--until", help=f"End: {_TIME_HELP} (after the start).")],
    capacity: Annotated[str, typer.Option("--capacity", help="Room in the buffers, e.g. 20TB.")] = "0",
    rate: Annotated[str, typer.Option("--rate", help="Rate of ingest, e.g. 20Gbps or 2.5GB/s.")] = "0Gbps",
    start: Annotated[str, typer.Option("--from", help=f"Start: {_TIME_HELP}, now.")] = "now",
    grace: Annotated[str, typer.Option("--grace", help="For bodies that are late, e.g. 5min.")] = "5min",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Make a reservation; a refusal says what would fit."""
    now = datetime.datetime.now().astimezone()
    begins = parse_time(start, now)
    wanted = {
        "bucket": options.bucket_of(bucket),
        "capacity_bytes": parse_size(capacity),
        "rate_bytes_per_s": parse_rate(rate),
        "until": parse_time(until, now, begins).isoformat(),
        "grace_s": parse_duration(grace),
    }
    if start != "now":  # the node's clock decides what now is
        wanted["from"] = begins.isoformat()
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    _show([found.send("POST", "/v1/reservations", wanted)], as_json)


@app.command("list")
def calendar(
    bucket: Annotated[str, typer.Option("--bucket", help="Only of this bucket.")] = "",
    ended: Annotated[bool, typer.Option("--ended", help="Those that have ended, too.")] = False,
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """The calendar: who has how much when, and what is free."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    answer = found.ask("/v1/reservations", bucket=bucket, ended=str(ended).lower())
    if as_json:
        print_json(answer)
        return
    _print(answer["reservations"], answer["free"])


@app.command("show")
def show(
    reservation: _Id,
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """One reservation: its nodes, its rates, and what is used of it."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    _show([found.ask(_path(reservation))], as_json)


@app.command("extend")
def extend(
    reservation: _Id,
    until: Annotated[str, typer.Option("--until", help=f"New end: {_TIME_HELP} (after the present end).")],
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """A later end, if its nodes are free until then."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    now = datetime.datetime.now().astimezone()
    ends = datetime.datetime.fromisoformat(found.ask(_path(reservation))["until"])
    body = {"until": parse_time(until, now, ends).isoformat()}
    _show([found.send("POST", _path(reservation, "/extend"), body)], as_json)


@app.command("release")
def release(
    reservation: _Id,
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Give back what is left of it, now."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    _show([found.send("DELETE", _path(reservation))], as_json)


def _path(reservation: str, what: str = "") -> str:
    return f"/v1/reservations/{quote(reservation, safe='')}{what}"


def _show(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(found[0])
        return
    _print(found, [])
    rows = [
        (
            one["node"],
            size_text(one["capacity_bytes"]),
            rate_text(one["rate_bytes_per_s"]),
            size_text(one["used_bytes"]),
        )
        for one in found[0]["nodes"]
    ]
    print_table(("on node", "capacity", "rate", "used"), rows)
    for kernel in found[0]["kernels"]:
        print(f"kernel {'' if kernel['fits'] else 'TOO SLOW '}{kernel['said']}")


def _print(reserved: list[dict[str, Any]], free: list[dict[str, Any]]) -> None:
    rows = [
        (
            _local(one["from"]),
            _local(one["until"]),
            one["state"],
            one["bucket"] or "(another's)",
            size_text(one["capacity_bytes"]),
            size_text(one["used_bytes"]),
            rate_text(one["rate_bytes_per_s"]),
            one["id"],
        )
        for one in reserved
    ]
    print_table(("from", "until", "state", "bucket", "capacity", "used", "rate", "id"), rows)
    left = [
        (_local(one["from"]), _local(one["until"]), size_text(one["capacity_bytes"]), _rate(one["rate_bytes_per_s"]))
        for one in free
    ]
    if left:
        print()
        print_table(("free from", "until", "capacity", "rate"), left)


def _rate(rate_bytes_per_s: int | None) -> str:
    return "any" if rate_bytes_per_s is None else rate_text(rate_bytes_per_s)


def _local(text: str) -> str:
    return datetime.datetime.fromisoformat(text).astimezone().strftime("%a %Y-%m-%d %H:%M:%S")
