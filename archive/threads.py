"""Threads for blocking file calls, below ingest in priority, and never left behind with memory they still read.

In: a function and its arguments. Out: its result on the event loop. Always true: when ``run`` returns or raises,
cancelled or not, the thread no longer touches the arguments; a buffer or descriptor may then be reused.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}.get(platform.machine())
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_BEST_EFFORT_LOWEST = (2 << 13) | 7


class IoThreads:
    """``count`` threads at nice 10 and the lowest best-effort I/O priority.

    Not SCHED_IDLE and not the idle I/O class: on a node that ingests without a pause those would stop the drain, and a
    drain that stops fills the buffer.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="drain-io", initializer=_lower_priority)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(function, *args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait((future,))
                except asyncio.CancelledError:
                    continue
            if not future.cancelled():
                future.exception()
            raise

    def close(self) -> None:
        """Waits for calls under way."""
        self._pool.shutdown(wait=True)


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    if _IOPRIO_SET is not None:
        # A kernel without I/O priorities refuses; the nice level alone then has to do.
        ctypes.CDLL(None).syscall(_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_BEST_EFFORT_LOWEST)
