"""The ``hiss`` command: one module a group of commands; every command has ``--json``.

In: arguments, HISS_* variables. Out: answers on stdout; on an error one line on stderr that says what is wrong and what
to do next, and an exit code:

==== ==============================================================================================================
code meaning
==== ==============================================================================================================
0    done; for ``run status``: safe to clear
1    the answer is no: not (yet) safe to clear, fsck found damage, not everything was sent
2    wrong usage, wrong setting, a refused request, or an unexpected answer
3    another gateway or program holds the data folder or a port
4    no node is there: it does not run, cannot be reached or does not answer
5    the node could not be started
130  interrupted
==== ==============================================================================================================

A new command is a function or a Typer app in a module of its own, named in ``build_app``.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.exceptions import TyperException

from gateway.cli.output import CliError, ExitCode, complain
from gateway.node_key import NodeKeyError
from gateway.settings import SettingsError
from gateway.supervisor.node import RoleFailed
from gateway.supervisor.resources import NodeRefused
from gateway.users import UsersError
from ingest.errors import CatalogUnavailable, IngestError

EXIT_CODES: tuple[tuple[type[Exception], ExitCode], ...] = (
    (SettingsError, ExitCode.USAGE),
    (UsersError, ExitCode.USAGE),
    (NodeKeyError, ExitCode.USAGE),
    (RoleFailed, ExitCode.NOT_STARTED),
    (CatalogUnavailable, ExitCode.NO_NODE),
    (IngestError, ExitCode.USAGE),
)
"""What an error of the rooms below means for the exit code; the first class that fits counts."""


def build_app() -> typer.Typer:
    """The command with all its groups. Each module loads what it needs when its command runs, so that all start fast."""
    from gateway.cli import (
        catalog,
        demo,
        kernel,
        members,
        migrate,
        replay,
        reserve,
        run,
        send,
        serve,
        settings,
        status,
        user,
    )

    app = typer.Typer(
        name="hiss",
        help="S3-compatible ingest gateway for beamline instruments.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command("serve")(serve.serve)
    app.command("demo")(demo.demo)
    app.command("status")(status.status)
    app.command("drain")(status.drain)
    app.command("send")(send.send)
    app.command("replay")(replay.replay)
    app.command("settings")(settings.settings)
    app.command("fsck")(catalog.check)
    app.command("migrate")(migrate.migrate)
    app.add_typer(members.app, name="node")
    app.add_typer(run.app, name="run")
    app.add_typer(reserve.app, name="reserve")
    app.add_typer(kernel.build(), name="kernel")
    app.add_typer(user.app, name="user")
    app.add_typer(catalog.app, name="catalog")
    return app


def _names(context: Any) -> list[str]:
    """Of the command that a usage error is about: ``["kernel", "check"]``; empty for ``hiss`` itself."""
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    return names


def main() -> None:
    """Entry point of the ``hiss`` script."""
    try:
        # Not standalone: usage errors, too, are to be one line here.
        sys.exit(build_app()(standalone_mode=False) or ExitCode.OK)
    except TyperException as error:
        message = error.format_message()
        if not message:  # a group without a command: its help is the answer
            getattr(error, "show", lambda: None)()
            sys.exit(ExitCode.USAGE)
        context = getattr(error, "ctx", None)
        group = "".join(f" {name}" for name in _names(context))
        complain(f"{message.rstrip('.')}; `hiss{group} --help` shows what there is")
        sys.exit(ExitCode.USAGE)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has had enough: that is no error of ours.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        complain(str(error) or type(error).__name__)
        sys.exit(code)


def exit_code(error: Exception) -> ExitCode | None:
    """The exit code for an error that has something to say to the user; None for one that is a fault of ours."""
    if isinstance(error, CliError):
        return error.code
    if isinstance(error, NodeRefused):
        return ExitCode.HELD if error.held else ExitCode.NOT_STARTED
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), None)
