"""What the ``hiss user`` commands share: find a user in the catalogue, change the record, show it without secrets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from gateway import users
from gateway.cli import node
from gateway.cli.output import CliError
from gateway.node_key import NodeKey
from ingest.records import UserRecord

Name = Annotated[str, typer.Argument(metavar="NAME", help="The user's id.")]


def one_of(present: Sequence[UserRecord], name: str) -> UserRecord:
    """Raises CliError."""
    found = next((record for record in present if record.user_id == name), None)
    if found is None:
        raise CliError(f"no user {name!r}; `hiss user list` shows who there is")
    return found


def edit_user(
    name: str, data: Path, change: Callable[[UserRecord], UserRecord], *, root: str = "changed here"
) -> UserRecord:
    """Change one user; root's record is the node's own. Raises CliError, UsersError."""

    async def put() -> UserRecord:
        async with node.catalogue(node.paths_of(data)) as catalog:
            present = await catalog.users()
            found = one_of(present, name)
            if found.root:
                raise CliError(f"root cannot be {root}; restart the node with other HISS_ROOT_* keys to replace them")
            record = change(found)
            users.refuse_twins(record, present)
            await catalog.put_user(record)
            return record

    return asyncio.run(put())


def public(record: UserRecord) -> dict[str, object]:
    return {
        "id": record.user_id,
        "name": record.display_name,
        "email": record.email,
        "canonical_id": record.canonical_id,
        "access_key": next((pair.access_key for pair in record.keys if pair.enabled), ""),
        "keys": [
            {"access_key": pair.access_key, "enabled": pair.enabled, "created_ns": pair.created_ns}
            for pair in record.keys
        ],
        "enabled": record.enabled,
        "root": record.root,
        "grants": [users.grant_text(grant) for grant in record.grants],
        "policies": dict(record.policies),
    }


def secret_from(file: Path | None, made: users.KeyPair) -> users.KeyPair:
    """The pair with the secret that the file holds, if there is one: command lines are visible to everybody."""
    if file is None:
        return made
    try:
        return users.KeyPair(made.access_key, file.read_text().strip())
    except (OSError, UnicodeDecodeError):
        raise CliError(f"{file}: cannot be read") from None


def node_key(data: Path) -> NodeKey:
    return NodeKey.load(node.paths_of(data).node_key)
