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
from gateway.cli import node, options, user_keys, user_policies
from gateway.cli.output import CliError, print_json, print_table
from gateway.cli.user_edit import Name, edit_user, node_key, one_of, public, secret_from
from ingest.records import UserRecord

app = typer.Typer(help="Users of a node: key pairs, grants, policies.", no_args_is_help=True)
app.add_typer(user_keys.app, name="key")
app.add_typer(user_policies.app, name="policy")

Grants = Annotated[
    list[str] | None,
    typer.Option("--grant", metavar="ACCESS:BUCKET[:PREFIX]", help="read, write or admin; may be repeated."),
]
DisplayName = Annotated[str, typer.Option("--name", help="Display name.")]
Email = Annotated[str, typer.Option("--email", help="E-mail address, by which grants may name the user.")]
CanonicalId = Annotated[
    str, typer.Option("--canonical-id", help="64 hex digits, as S3 names owners; default: made from the id.")
]


@app.command()
def add(
    name: Name,
    data: options.NodeData,
    grant: Grants = None,
    display_name: DisplayName = "",
    email: Email = "",
    canonical_id: CanonicalId = "",
    access_key: Annotated[str | None, typer.Option("--access-key", help="Default: a new random one.")] = None,
    secret_file: Annotated[
        Path | None, typer.Option("--secret-file", help="File with the secret key; default: a new random one.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Add a user and print the key pair, once: the secret cannot be shown again."""
    keys = secret_from(secret_file, users.new_keys(access_key))
    record = users.make_record(
        node_key(data),
        name,
        keys,
        display_name=display_name,
        grants=[users.parse_grant(text) for text in grant or ()],
        email=email,
        canonical_id=canonical_id,
    )

    async def put() -> None:
        async with node.catalogue(node.paths_of(data)) as catalog:
            present = await catalog.users()
            if any(other.user_id == name for other in present):
                raise CliError(f"user {name!r} is there already; `hiss user list` shows it")
            users.refuse_twins(record, present)
            await catalog.put_user(record)

    asyncio.run(put())
    user_keys.print_pair(name, keys, as_json=as_json)


@app.command("set")
def set_user(
    name: Name,
    data: options.NodeData,
    grant: Grants = None,
    display_name: DisplayName = "",
    email: Email = "",
    canonical_id: CanonicalId = "",
    as_json: options.Json = False,
) -> None:
    """Change what is given of a user; grants that are given replace all the user had."""
    grants = None if grant is None else tuple(users.parse_grant(text) for text in grant)
    users.check_profile(name, email, canonical_id, {})

    def change(record: UserRecord) -> UserRecord:
        return msgspec.structs.replace(
            record,
            display_name=display_name or record.display_name,
            email=email or record.email,
            canonical_id=canonical_id.lower() or record.canonical_id,
            grants=record.grants if grants is None else grants,
        )

    record = edit_user(name, data, change)
    print_json(public(record)) if as_json else print(f"{name} is changed")


@app.command("list")
def list_users(data: options.NodeData, as_json: options.Json = False) -> None:
    """Users with their access keys and grants; never secrets."""
    records = asyncio.run(_users(data))
    if as_json:
        print_json([public(record) for record in records])
        return
    rows = [
        (
            record.user_id,
            record.display_name,
            record.email,
            ", ".join(pair.access_key + ("" if pair.enabled else " (off)") for pair in record.keys),
            "yes" if record.enabled else "no",
            "everything" if record.root else ", ".join(users.grant_text(grant) for grant in record.grants),
            ", ".join(record.policies),
        )
        for record in records
    ]
    print_table(("id", "name", "e-mail", "access keys", "enabled", "grants", "policies"), rows)


@app.command()
def show(name: Name, data: options.NodeData) -> None:
    """One user as JSON, with canonical id and policies; never secrets."""

    async def find() -> UserRecord:
        async with node.catalogue(node.paths_of(data)) as catalog:
            return one_of(await catalog.users(), name)

    print_json(public(asyncio.run(find())))


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
    record = edit_user(name, data, lambda record: msgspec.structs.replace(record, enabled=enabled), root="disabled")
    if as_json:
        print_json(public(record))
        return
    print(f"{name} is {'enabled' if enabled else 'disabled'}")


async def _users(data: Path) -> list[UserRecord]:
    async with node.catalogue(node.paths_of(data)) as catalog:
        return sorted(await catalog.users(), key=lambda record: record.user_id)
