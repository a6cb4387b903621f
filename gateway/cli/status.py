"""``hiss status`` and ``hiss drain``: how the node is, and what waits for the archive; both from the control API."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from gateway.cli import node, options
from gateway.cli.output import CliError, ExitCode, human_age, human_rate, human_size, print_json, print_table
from gateway.cli.run import parse_place

_SECTIONS = ("cluster", "sandbox", "rates", "ingest", "buffer", "arena", "kernels", "drain", "notifications", "errors")


def status(
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """How the node and its processes are. Exit code 0: it serves; 1: it does not (fully)."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    document = _status(found)
    if as_json:
        print_json(document)
    else:
        for name in ("version", "state", "uptime_s", "catalogue"):
            print(f"{name.removesuffix('_s'):10} {shown(name, document.get(name))}")
        rows = [
            (row["role"], row["slot"], row["state"], row["pid"] or "–", row["restarts"], shown("_ns", row["since_ns"]))
            for row in document["processes"]
        ]
        print_table(("process", "slot", "state", "pid", "restarts", "since"), rows)
        facts = []
        for section in _SECTIONS:
            facts += [(section, words, value) for words, value in _flat(document.get(section))]
        print_table(("", "", ""), facts)
    healthy = document["state"] == "serving" and document["catalogue"] == "ok"
    healthy = healthy and (document.get("cluster") or {}).get("engine", "ok") == "ok"
    if not healthy or any(row["failing"] for row in document["processes"]):
        raise typer.Exit(ExitCode.NO)


def drain(
    place: Annotated[
        str, typer.Argument(metavar="[s3://BUCKET/PREFIX]", help="Name what is not archived yet under this prefix.")
    ] = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """What waits for the archive: queue and oldest; with a place, each object with its last error."""
    bucket, prefix = parse_place(place) if place else ("", "")
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    counts = _status(found)["drain"]
    if counts is None:
        raise CliError("the catalogue does not answer; `hiss status` says how its process is", ExitCode.NO_NODE)
    missing = found.ask("/v1/runs/status", bucket=bucket, prefix=prefix)["missing"] if place else []
    if as_json:
        print_json({**counts, "missing": missing} if place else counts)
        return
    print_table(("drain", ""), [(words, value) for words, value in _flat(counts)])
    if missing:
        columns = ("key", "state", "size_bytes", "drain_attempts", "error")
        rows = [[shown(column, row[column]) for column in columns] for row in missing]
        print_table([column.replace("_", " ") for column in columns], rows, title="not archived yet")


def _status(found: node.Node) -> dict[str, Any]:
    document = found.ask("/v1/status")
    if not isinstance(document, dict) or not {"state", "processes", "catalogue", "drain"} <= document.keys():
        raise CliError("/v1/status: the answer is not one that is known here; are node and hiss of one version?")
    return document


def _flat(section: Any) -> list[tuple[str, str]]:
    """(words, value) of a section; an inner table (by label) becomes one value of its non-zero parts."""
    rows = []
    for name, value in (section or {}).items():
        if isinstance(value, dict):
            parts = ", ".join(f"{label} {count}" for label, count in value.items() if count)
            rows.append((name.replace("_", " "), parts or "–"))
        else:
            rows.append((_words(name), shown(name, value)))
    return rows


def _words(name: str) -> str:
    for unit in ("_bytes_per_s", "_per_s", "_bytes", "_s", "_ns"):
        if name.endswith(unit):
            return name.removesuffix(unit).replace("_", " ") + (" per s" if unit == "_per_s" else "")
    return name.replace("_", " ")


def shown(name: str, value: Any) -> str:
    """A value as an operator reads it, by the unit its name ends with."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if not isinstance(value, int | float):
        return str(value)
    if name.endswith("_bytes_per_s"):
        return human_rate(value)
    if name.endswith("_bytes"):
        return human_size(value)
    if name.endswith("_ns"):
        return f"{human_age(max(0.0, time.time() - value / 1e9))} ago"
    if name.endswith("_s") and not name.endswith("_per_s"):
        return human_age(float(value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
