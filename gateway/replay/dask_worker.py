"""What runs in the processes of a Dask cluster: the plug-in that brings keys and a station, and the tasks of the graph.

In: bytes of tasks, through the graph; ``Access``, through the plug-in. Out: bytes of answers. The graph holds names of
functions of this module and those bytes, nothing else; so hiss-gateway must be installed where Dask workers run. What
always holds: when the plug-in is taken away, or its worker closes, no process and no key of the replay is left there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
from typing import Any

from distributed import WorkerPlugin, get_worker

from gateway.replay.access import Access
from gateway.replay.station import Station


class ReplayPlugin(WorkerPlugin):  # type: ignore[misc]
    """Travels pickled to every worker; the station is made there. ``ours``: the worker is a process of the command itself, on
    whose terminal Ctrl-C ends the command and not its workers."""

    def __init__(self, name: str, access: Access, *, ours: bool) -> None:
        self.name = name
        self._access = access
        self._ours = ours
        self._station: Station | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_access": self._access, "_ours": self._ours, "_station": None}

    def setup(self, worker: Any) -> None:
        if self._ours and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._station = Station(self._access, worker.state.nthreads)
        self._station.begin()

    async def teardown(self, worker: Any) -> None:
        station, self._station = self._station, None
        if station is not None:
            # It waits for processes to end; the worker's loop goes on meanwhile.
            await asyncio.to_thread(station.close)

    def run(self, task: bytes) -> bytes:
        assert self._station is not None
        return self._station.run(task)


def judge(task: bytes, plugin: str) -> bytes:
    """A task of the graph. Raises Again."""
    found: ReplayPlugin = get_worker().plugins[plugin]
    return found.run(task)


def introduce(with_keys: bool) -> dict[str, str]:
    """What this process would compute with (kernels.lineage.Environment). ``with_keys``: raise LookupError where its environment
    has no keys."""
    from kernels.lineage import environment

    if with_keys:
        Access("", "").keys()
    return dataclasses.asdict(environment())
