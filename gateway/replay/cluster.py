"""A Dask cluster to compute on: one that runs, or processes of this machine; and what is refused of it.

In: ``--scheduler`` or ``--workers``, ``Access``. Out: a ``Cluster``: a client, with the plug-in on every worker. What always
holds: everything that came with it (tasks, plug-in, processes, scratch folders) is gone behind the context, however it
ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gateway.cli.kernel.reproduce import DECIDES
from gateway.cli.output import CliError, ExitCode
from gateway.replay.access import Access

if TYPE_CHECKING:
    from distributed import Client

CONNECT_S = 10.0
WORKERS_S = 30.0
NO_DASK = "a replay needs Dask: pip install hiss-gateway[dask]"


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """``plugin``: its name on the workers. ``notes``: what is odd about the cluster."""

    client: Client
    plugin: str
    workers: int
    threads: int
    notes: tuple[str, ...]


def require() -> None:
    """Raises CliError where Dask is not installed."""
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise CliError(NO_DASK) from None


@contextlib.contextmanager
def cluster(scheduler: str, workers: int, access: Access) -> Iterator[Cluster]:
    """``scheduler`` empty: ``workers`` processes of this machine. Raises CliError."""
    with contextlib.ExitStack() as stack:
        stack.callback(_listening, True)
        client = stack.enter_context(_client(scheduler, workers))
        notes = _alike(client, access)
        from gateway.replay.dask_worker import ReplayPlugin

        name = f"hiss-replay-{secrets.token_hex(8)}"
        client.register_plugin(ReplayPlugin(name, access, ours=not scheduler), name=name)
        stack.callback(_quietly, client.unregister_worker_plugin, name)
        # A second Ctrl-C must not leave half of it behind.
        stack.callback(_listening, False)
        threads = sum(client.nthreads().values())
        yield Cluster(client, name, len(client.nthreads()), max(1, threads), notes)


@contextlib.contextmanager
def _client(scheduler: str, workers: int) -> Iterator[Client]:
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if not scheduler:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="hiss-dask-"))
            address = stack.enter_context(
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address=None,
                    local_directory=scratch,
                    silence_logs=logging.CRITICAL,
                )
            )
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        try:
            client = Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CliError(f"no Dask scheduler answers at {scheduler}: {reason}", ExitCode.NO_NODE) from None
        stack.callback(_quietly, client.close)
        try:
            client.wait_for_workers(1, timeout=WORKERS_S)
        except TimeoutError:
            raise CliError(f"the Dask scheduler {scheduler} has no workers", ExitCode.NO_NODE) from None
        yield client


def _alike(client: Client, access: Access) -> tuple[str, ...]:
    """Whether all workers compute alike; what differs and can change bits. Raises CliError."""
    from gateway.replay.dask_worker import introduce

    try:
        said: dict[str, dict[str, str]] = client.run(introduce, not access.access_key)
    except LookupError as error:
        raise CliError(str(error.args[0])) from None
    except Exception as error:
        raise CliError(
            f"hiss-gateway[dask] must be installed where the Dask workers run ({type(error).__name__}: {error})"
        ) from None
    from kernels.lineage import environment

    here = dataclasses.asdict(environment())
    notes = []
    for name in ("hiss", *DECIDES):
        found = {one[name] for one in said.values()}
        if name == "hiss" and found != {here[name]}:
            raise CliError(f"the Dask workers have hiss-gateway {', '.join(sorted(found))}, here it is {here[name]}")
        if len(found) > 1:
            notes.append(f"the Dask workers differ in {name}: {', '.join(sorted(found))}")
    return tuple(notes)


def _quietly(close: Any, *arguments: Any) -> None:
    """A scheduler that has gone closes nothing any more."""
    with contextlib.suppress(Exception):
        close(*arguments)


def _listening(to_ctrl_c: bool) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler if to_ctrl_c else signal.SIG_IGN)
