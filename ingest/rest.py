"""The rest of a body that nobody wants: received into bounded memory, hashed on, dropped.

In: the bytes that come behind a kernel's STOP, and the running checksums of what was stored before them. Out: the
checksums as they were at the cut (``stored_*``: what the object is), while the running ones go on over the whole body
(what the client's own checksums are about). What always holds: no arena memory is used; at most ``BUFFERS`` buffers of
``BUFFER_BYTES`` a stream, and none at all where only CRCs are wanted; the bytes are hashed in order, behind what was stored.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor

from ingest.digests import Hash, RunningCrcs

BUFFERS = 2
BUFFER_BYTES = 1 << 20
_SCRATCH = memoryview(bytearray(256 << 10))
"""Shared by every stream of the process: bytes are in it for the length of one call only."""


class Rest:
    """Belongs to one stream and one event loop. ``begin`` is called once what was stored is hashed."""

    def __init__(self, crcs: RunningCrcs, hashes: Mapping[str, Hash], executor: Executor) -> None:
        self.length = 0
        self.stored_crcs = dict(crcs.values)
        self.stored_hashes: dict[str, Hash] = {}
        self._crcs = crcs
        self._hashes = hashes
        self._executor = executor
        self._free = [memoryview(bytearray(BUFFER_BYTES)) for _ in range(BUFFERS if hashes else 0)]
        self._filling: memoryview | None = None
        self._fill = 0
        self._full: deque[memoryview] = deque()
        self._begun = False
        self._busy = False
        self._waiter: asyncio.Future[None] | None = None

    def get_buffer(self) -> memoryview | None:
        if not self._hashes:
            return _SCRATCH
        if self._filling is None:
            if not self._free:
                return None
            self._filling, self._fill = self._free.pop(), 0
        return self._filling[self._fill :]

    def received(self, count: int) -> None:
        view = self.get_buffer()
        assert view is not None
        self._crcs.update(view[:count])
        self.length += count
        if self._filling is not None:
            self._fill += count
            if self._fill == len(self._filling):
                self._hand_over()

    async def writable(self) -> None:
        while self._hashes and self._filling is None and not self._free:
            await self._change()

    def begin(self) -> None:
        """Everything before the cut is in the hashes: what they say now describes what is stored."""
        if not self._begun:
            self._begun = True
            self.stored_hashes = {name: state.copy() for name, state in self._hashes.items()}
            self._hash_next()

    async def finish(self) -> None:
        """The body has ended: returns once all of it is hashed."""
        if self._filling is not None:
            self._hand_over()
        while self._busy or self._full or not self._begun:
            await self._change()

    def _hand_over(self) -> None:
        assert self._filling is not None
        self._full.append(self._filling[: self._fill])
        self._filling = None
        self._hash_next()

    def _hash_next(self) -> None:
        if self._busy or not self._begun or not self._full:
            self._tell()
            return
        self._busy = True
        view = self._full.popleft()

        def work() -> None:
            for state in self._hashes.values():
                state.update(view)

        def done(_: asyncio.Future[None]) -> None:
            self._busy = False
            if isinstance(view.obj, bytearray):
                self._free.append(memoryview(view.obj))
            self._hash_next()
            self._tell()

        asyncio.get_running_loop().run_in_executor(self._executor, work).add_done_callback(done)

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _tell(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
