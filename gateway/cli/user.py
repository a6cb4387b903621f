"""``hiss user``: the users of a running node, through its catalogue. Run as the node's user, on the node.

Users named in users.toml are better changed there: the file wins at the next start or SIGHUP.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from gateway import users
from gateway.cli import node, options
from gateway.cli.output import CliError, print_json, print_table
from gateway.node_key import NodeKey
from ingest.records import UserRecord

app = typer.Typer(help="Users of a node and their grants.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The user's id.")]


@app.command()
def add(
    name: Name,
    data: options.NodeData,
    grant: Annotated[
        list[str] | None,
        typer.Option("--grant", metavar="ACCESS:BUCKET[:PREFIX]", help="read, write or admin; may be repeated."),
    ] = None,
    display_name: Annotated[str, typer.Option("--name", help="Display name.")] = "",
    access_key: Annotated[str | None, typer.Option("--access-key", help="Default: a new random one.")] = None,
    as_json: options.Json = False,
) -> None:
    """Add a user and print the key pair, once: the secret cannot be shown again."""
    keys = users.new_keys(access_key)
    grants = [users.parse_grant(text) for text in grant or ()]
    record = users.make_record(_node_key(data), name, keys, display_name=display_name, grants=grants)

    async def put() -> None:
        async with node.catalogue(node.paths_of(data)) as catalog:
            for present in await catalog.users():
                if present.user_id == name:
                    raise CliError(f"user {name!r} is there already; `hiss user list` shows it")
                if present.access_key == keys.access_key:
                    raise CliError(f"access key {keys.access_key} belongs to user {present.user_id!r} already")
            await catalog.put_user(record)

    asyncio.run(put())
    if as_json:
        print_json({"id": name, "access_key": keys.access_key, "secret_key": keys.secret_key})
        return
    print(f"access key {keys.access_key}\nsecret key {keys.secret_key}\nThe secret is not shown again.")


@app.command("list")
def list_users(data: options.NodeData, as_json: options.Json = False) -> None:
    """Users with their access keys and grants; never secrets."""
    records = asyncio.run(_users(data))
    if as_json:
        print_json([_public(record) for record in records])
        return
    rows = [
        (
            record.user_id,
            record.display_name,
            record.access_key,
            "yes" if record.enabled else "no",
            "everything" if record.root else ", ".join(users.grant_text(grant) for grant in record.grants),
        )
        for record in records
    ]
    print_table(("id", "name", "access key", "enabled", "grants"), rows)


@app.command()
def disable(name: Name, data: options.NodeData, as_json: options.Json = False) -> None:
    """Refuse every further request of a user, at once."""
    _enable(name, data, False, as_json)


@app.command()
def enable(name: Name, data: options.NodeData, as_json: options.Json = False) -> None:
    """Let a disabled user in again."""
    _enable(name, data, True, as_json)


@app.command("show-root")
def show_root(data: options.NodeData, as_json: options.Json = False) -> None:
    """Print the root key pair of a data folder. The node need not run."""
    keys = node.root_keys(data)
    if as_json:
        print_json({"access_key": keys.access_key, "secret_key": keys.secret_key})
        return
    print(f"access key {keys.access_key}\nsecret key {keys.secret_key}")


def _enable(name: str, data: Path, enabled: bool, as_json: bool) -> None:
    async def put() -> UserRecord:
        async with node.catalogue(node.paths_of(data)) as catalog:
            found = next((record for record in await catalog.users() if record.user_id == name), None)
            if found is None:
                raise CliError(f"no user {name!r}; `hiss user list` shows who there is")
            if found.root:
                raise CliError("root cannot be disabled; restart the node with other HISS_ROOT_* keys to replace them")
            record = msgspec.structs.replace(found, enabled=enabled)
            await catalog.put_user(record)
            return record

    record = asyncio.run(put())
    if as_json:
        print_json(_public(record))
        return
    print(f"{name} is {'enabled' if enabled else 'disabled'}")


async def _users(data: Path) -> list[UserRecord]:
    async with node.catalogue(node.paths_of(data)) as catalog:
        return sorted(await catalog.users(), key=lambda record: record.user_id)


def _public(record: UserRecord) -> dict[str, object]:
    return {
        "id": record.user_id,
        "name": record.display_name,
        "access_key": record.access_key,
        "enabled": record.enabled,
        "root": record.root,
        "grants": [users.grant_text(grant) for grant in record.grants],
    }


def _node_key(data: Path) -> NodeKey:
    return NodeKey.load(node.paths_of(data).node_key)
