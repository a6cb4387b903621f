"""``hiss kernel``: try a kernel on one's own frames, submit it, watch it, change it, and prove what it once computed.

In: kernel files, and a node's S3 port and control API. Out: tables, plots or JSON. A kernel that is refused is shown as
``file:line: reason`` with that line, exit code 2. ``source`` is what all commands share about kernel files, ``state`` what
they know of submitted ones, ``plots`` how results are drawn.
"""

from __future__ import annotations

import typer

app = typer.Typer(help="Kernels: what a scientist runs on frames as they arrive.", no_args_is_help=True)


def build() -> typer.Typer:
    """The group with its commands; each loads what it needs when it runs."""
    from gateway.cli.kernel import change, check, listing, reproduce, submit, vhdl, watch

    app.command("check")(check.check)
    app.command("submit")(submit.submit)
    app.command("list")(listing.list_kernels)
    app.command("show")(listing.show)
    app.command("watch")(watch.watch)
    app.command("params")(change.params)
    app.command("remove")(change.remove)
    app.command("reproduce")(reproduce.reproduce)
    app.command("vhdl")(vhdl.vhdl)
    return app
