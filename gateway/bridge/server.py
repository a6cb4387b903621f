"""The process around a driver: takes writes from the control process, carries each out in a thread, and answers.

In: ``Write`` messages on a unix socket, a ``Driver``. Out: ``Written`` for each, at the latest after its time. What always
holds: writes to one target happen one after the other, also across connections; targets do not wait for each other as long
as fewer than THREADS_MAX of them hang; the loop never calls a driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import msgspec

from gateway.bridge import wire
from ingest.paths import socket_address

logger = logging.getLogger(__name__)

THREADS_MAX = 64
TARGETS_MAX = 1024
TIMEOUT_MAX_S = 30.0


class WriteFailed(Exception):
    """``str()`` says what the control system answered."""


class Driver(Protocol):
    """Writes to one kind of target. Called from threads, one call a target at a time."""

    def write(self, target: str, value: float, timeout_s: float) -> None:
        """Returns once the target has taken the value. Raises WriteFailed."""
        ...


class Bridge:
    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._threads = ThreadPoolExecutor(THREADS_MAX, "write")
        self._busy: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                write = wire.WRITE.decode(await wire.read(reader))
                task = asyncio.create_task(self._carry_out(write, writer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            logger.debug("the control process closed its connection")
        except (ValueError, msgspec.MsgspecError) as error:
            logger.warning("closed a connection: %s", error)
        finally:
            writer.close()

    async def _carry_out(self, write: wire.Write, writer: asyncio.StreamWriter) -> None:
        if len(self._busy) >= TARGETS_MAX:
            self._busy = {target: lock for target, lock in self._busy.items() if lock.locked()}
        lock = self._busy.setdefault(write.target, asyncio.Lock())
        timeout_s = min(write.timeout_s, TIMEOUT_MAX_S)
        error = ""
        try:
            async with asyncio.timeout(timeout_s):
                await lock.acquire()
                if time.monotonic() > write.before_s:
                    lock.release()
                    raise TimeoutError
                # The thread cannot be interrupted: the target stays locked until it is back, though the answer goes out.
                work = asyncio.get_running_loop().run_in_executor(self._threads, self._write, write, timeout_s)
                work.add_done_callback(lambda _: lock.release())
                error = await asyncio.shield(work)
        except TimeoutError:
            error = f"no answer within {timeout_s:g} s"
        writer.write(wire.encode(wire.Written(write.number, error[: wire.ERROR_CHARS_MAX])))

    def _write(self, write: wire.Write, timeout_s: float) -> str:
        try:
            self._driver.write(write.target, write.value, timeout_s)
        except WriteFailed as failure:
            return str(failure) or "refused without a reason"
        except Exception as error:
            logger.exception("writing to %s failed", write.target)
            return f"{type(error).__name__}: {error}"
        return ""


async def serve(path: Path, driver: Driver, *, ready: Callable[[], None], stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    server = await asyncio.start_unix_server(Bridge(driver).connection, socket_address(path))
    ready()
    await stop.wait()
    server.close()


def run(path: Path, driver: Driver, ready: Callable[[], None]) -> None:
    """The process's main; does not return, for a thread that hangs in a client library would keep it alive."""

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(path, driver, ready=ready, stop=stop)

    try:
        asyncio.run(main())
    except Exception:
        logger.exception("the bridge ends with an error")
        os._exit(1)
    logging.shutdown()
    os._exit(0)
