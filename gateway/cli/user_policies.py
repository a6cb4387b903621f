"""``hiss user policy``: identity policies of a user, in IAM's JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from gateway import users
from gateway.cli import options
from gateway.cli.output import CliError, print_json
from gateway.cli.user_edit import Name, edit_user, public
from ingest.records import UserRecord

app = typer.Typer(help="Identity policies of a user.", no_args_is_help=True)

PolicyName = Annotated[str, typer.Argument(metavar="POLICY", help="Name of the policy.")]


@app.command()
def put(
    name: Name,
    policy: PolicyName,
    file: Annotated[Path, typer.Argument(help="The JSON document.")],
    data: options.NodeData,
    as_json: options.Json = False,
) -> None:
    """Give a user a policy, or replace the one of that name."""
    try:
        document = file.read_text()
    except (OSError, UnicodeDecodeError):
        raise CliError(f"{file}: cannot be read") from None

    def change(record: UserRecord) -> UserRecord:
        policies = {**record.policies, policy: document}
        users.check_profile(name, "", "", policies)
        return msgspec.structs.replace(record, policies=policies)

    _done(edit_user(name, data, change), as_json)


@app.command()
def delete(name: Name, policy: PolicyName, data: options.NodeData, as_json: options.Json = False) -> None:
    """Take a policy from a user."""

    def change(record: UserRecord) -> UserRecord:
        if policy not in record.policies:
            raise CliError(f"user {name!r} has no policy {policy!r}")
        rest = {kept: document for kept, document in record.policies.items() if kept != policy}
        return msgspec.structs.replace(record, policies=rest)

    _done(edit_user(name, data, change), as_json)


def _done(record: UserRecord, as_json: bool) -> None:
    if as_json:
        print_json(public(record))
        return
    print("\n".join(record.policies) or "no policy left")
