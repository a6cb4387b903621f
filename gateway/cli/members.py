"""``hiss node``: the nodes of a cluster, through the control API of any of them."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gateway.cli import node, options
from gateway.cli.output import CliError, ExitCode, human_age, human_rate, human_size, print_json, print_table

app = typer.Typer(help="The nodes of a cluster: who there is, taking one out of service.", no_args_is_help=True)

Which = Annotated[str, typer.Argument(metavar="NODE", help="Number or name of a node, as `hiss node list` shows it.")]
Wait = Annotated[bool, typer.Option("--wait", help="Return when the node holds nothing undrained any more.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0, help="Longest wait; 0: no limit.")]
_POLL_S = 0.5


@app.command("list")
def list_nodes(
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Every node of the cluster, with its load and what it has to drain. Exit code 1: some node is gone."""
    document = _ask(node.find(data, control=control, access_key=access_key, ca=ca))
    if as_json:
        print_json(document)
    else:
        columns = (
            "node",
            "name",
            "state",
            "seen",
            "domain",
            "S3",
            "free",
            "receiving",
            "bodies",
            "undrained",
            "behind",
        )
        print_table(columns, [_line(row) for row in document["nodes"]])
        if document["engine_away_s"]:
            print(
                f"the engine has not answered for {human_age(document['engine_away_s'])}: this is what was known before"
            )
    if not all(row["alive"] for row in document["nodes"]):
        raise typer.Exit(ExitCode.NO)


@app.command()
def show(
    which: Which,
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """One node: addresses, version, load, and what would be lost with it."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    document = _ask(found)
    row = next((row for row in document["nodes"] if which in (str(row["node"]), row["name"])), None)
    if row is None:
        raise CliError(f"there is no node {which}; `hiss node list` shows all")
    if document["cluster_id"]:
        row |= {
            name: value for name, value in found.ask(f"/v1/nodes/{row['node']}").items() if name.startswith("only_")
        }
    if as_json:
        print_json(row)
        return
    print_table(("node", row["name"]), [(name.replace("_", " "), _shown(name, value)) for name, value in row.items()])


@app.command()
def drain(
    which: Which,
    wait: Wait = False,
    timeout_s: Timeout = 0.0,
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Empty a node: it takes no new bodies and archives at once all it holds. Exit code 1: something is left undrained."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    changed = found.tell(f"/v1/nodes/{which}/drain")
    if wait:
        changed = _wait_empty(found, changed, timeout_s, quiet=as_json)
    _tell(changed, as_json=as_json)
    if _left(changed):
        raise typer.Exit(ExitCode.NO)


@app.command()
def undrain(
    which: Which,
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Let a node take bodies again."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    _tell(found.tell(f"/v1/nodes/{which}/undrain"), as_json=as_json)


@app.command()
def remove(
    which: Which,
    force: Annotated[
        bool,
        typer.Option("--force", help="Although it holds what exists nowhere else: that is lost, and named in the log."),
    ] = False,
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Let a node leave the cluster for good; drain it first. A node that is gone may be removed without it."""
    found = node.find(data, control=control, access_key=access_key, ca=ca)
    _tell(found.tell(f"/v1/nodes/{which}/remove", force="true" if force else "false"), as_json=as_json)


def _ask(found: node.Node) -> dict[str, Any]:
    document = found.ask("/v1/nodes")
    if not isinstance(document, dict) or "nodes" not in document:
        raise CliError("/v1/nodes: the answer is not one that is known here; are node and hiss of one version?")
    return document


def _wait_empty(found: node.Node, changed: dict[str, Any], timeout_s: float, *, quiet: bool) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    columns = (
        TextColumn("draining {task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=quiet, transient=True) as progress:
        most = max(1, _left(changed))
        task = progress.add_task(changed["name"], total=most, left="")
        while _left(changed) and (not timeout_s or time.monotonic() < deadline):
            time.sleep(_POLL_S)
            changed = found.ask(f"/v1/nodes/{changed['node']}")
            most = max(most, _left(changed))
            progress.update(task, total=most, completed=most - _left(changed), left=_words(changed))
    return changed


def _left(changed: dict[str, Any]) -> int:
    return int(max(changed["undrained_objects"], changed["only_objects"]) + changed["only_parts"])


def _words(changed: dict[str, Any]) -> str:
    words = f"{changed['undrained_objects']} objects ({human_size(changed['undrained_bytes'])}) undrained"
    return words + (f", {changed['only_parts']} parts of open uploads" if changed["only_parts"] else "")


def _tell(changed: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(changed)
        return
    name = f"node {changed['node']} ({changed['name']})"
    if changed["state"] == "removed":
        print(f"{name} has left the cluster; its data folder is not used any more")
        for lost in changed["lost"]:
            print(f"lost: {lost}")
        if changed["only_objects"] > len(changed["lost"]):
            print(f"lost: {changed['only_objects'] - len(changed['lost'])} more, see the node's log")
        return
    print(f"{name} is {changed['state']}: {_words(changed) if _left(changed) else 'nothing undrained is left'}")
    if changed["state"] == "draining" and not _left(changed):
        print(f"`hiss node remove {changed['name']}` lets it leave")


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    seen = "now" if row["alive"] and row["silent_s"] < 3 else f"{human_age(row['silent_s'])} ago"
    undrained = (
        f"{row['undrained_objects']} ({human_size(row['undrained_bytes'])})" if row["undrained_objects"] else "–"
    )
    return (
        row["node"],
        row["name"] + (" *" if row["me"] else ""),
        row["state"] if row["alive"] else f"{row['state']}, GONE",
        seen,
        row["domain"] or "–",
        row["s3"] or "–",
        human_size(row["free_bytes"]),
        human_rate(row["receiving_bytes_per_s"]),
        row["bodies"],
        undrained,
        row["behind_entries"],
    )


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes_per_s"):
        return human_rate(value)
    if name.endswith("_bytes"):
        return human_size(value)
    if name.endswith("_s"):
        return human_age(value)
    return str(value) if value != "" else "–"
