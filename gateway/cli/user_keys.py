"""``hiss user key``: the key pairs of a user. Rotate without a gap: create one, move the instrument to it, disable the old
one, and delete it once nothing has asked for it any more."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from gateway import users
from gateway.cli import options
from gateway.cli.output import CliError, print_json
from gateway.cli.user_edit import Name, edit_user, node_key, public, secret_from
from ingest.records import AccessKey, UserRecord

app = typer.Typer(help="Key pairs of a user.", no_args_is_help=True)

Key = Annotated[str, typer.Argument(metavar="ACCESS_KEY")]


@app.command()
def create(
    name: Name,
    data: options.NodeData,
    access_key: Annotated[str | None, typer.Option("--access-key", help="Default: a new random one.")] = None,
    secret_file: Annotated[
        Path | None, typer.Option("--secret-file", help="File with the secret key; default: a new random one.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Give a user one more key pair and print it, once: the secret cannot be shown again."""
    keys = secret_from(secret_file, users.new_keys(access_key))
    users.check_identity(name, keys)
    pair = users.sealed(node_key(data), name, keys, created_ns=time.time_ns())

    def change(record: UserRecord) -> UserRecord:
        if len(record.keys) >= users.KEYS_MAX:
            raise CliError(f"user {name!r} has {len(record.keys)} key pairs; delete one first")
        if any(present.access_key == pair.access_key for present in record.keys):
            raise CliError(f"user {name!r} has the access key {pair.access_key} already")
        return msgspec.structs.replace(record, keys=(*record.keys, pair))

    edit_user(name, data, change)
    print_pair(name, keys, as_json=as_json)


@app.command()
def disable(name: Name, access_key: Key, data: options.NodeData, as_json: options.Json = False) -> None:
    """Refuse a key pair, at once, and temporary keys that were made with it."""
    _changed(name, access_key, data, as_json, lambda pair: msgspec.structs.replace(pair, enabled=False))


@app.command()
def enable(name: Name, access_key: Key, data: options.NodeData, as_json: options.Json = False) -> None:
    """Take a key pair again."""
    _changed(name, access_key, data, as_json, lambda pair: msgspec.structs.replace(pair, enabled=True))


@app.command()
def delete(name: Name, access_key: Key, data: options.NodeData, as_json: options.Json = False) -> None:
    """Forget a key pair."""
    _changed(name, access_key, data, as_json, lambda pair: None)


def _changed(
    name: str, access_key: str, data: Path, as_json: bool, change: Callable[[AccessKey], AccessKey | None]
) -> None:
    def edit(record: UserRecord) -> UserRecord:
        if all(pair.access_key != access_key for pair in record.keys):
            raise CliError(f"user {name!r} has no access key {access_key}")
        edited: list[AccessKey | None] = [
            change(pair) if pair.access_key == access_key else pair for pair in record.keys
        ]
        return msgspec.structs.replace(record, keys=tuple(pair for pair in edited if pair is not None))

    record = edit_user(name, data, edit)
    if as_json:
        print_json(public(record))
        return
    print(
        "\n".join(f"{pair.access_key} {'on' if pair.enabled else 'off'}" for pair in record.keys) or "no key pair left"
    )


def print_pair(name: str, keys: users.KeyPair, *, as_json: bool) -> None:
    if as_json:
        print_json({"id": name, "access_key": keys.access_key, "secret_key": keys.secret_key})
        return
    print(f"access key {keys.access_key}\nsecret key {keys.secret_key}\nThe secret is not shown again.")
