"""Connections that ask nothing make room for those that do.

uvicorn gives a connection all the time it likes until its first request, and once ``limit_concurrency`` connections are open,
refuses the requests of everybody: a thousand silent connections would take health checks, metrics and feedback away from
a whole beamline. Here a request's head has ``HEAD_TIMEOUT_S`` from the connection's, or its own, first byte on, and where
connections become many the one that has been idle for longest is closed for the newcomer. Answers that are under way
(feedback streams among them, which have a limit of their own) are never cut.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 10.0


class Patient(HttpToolsProtocol):
    """Use it through ``patient_protocol``: what is idle belongs to one server."""

    connections_max: ClassVar[int]
    idle: ClassVar[dict[HttpToolsProtocol, None]]
    """Without a request, longest first."""
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        while self.idle and len(self.connections) > self.connections_max:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            self.connections.discard(oldest)
            oldest.transport.abort()
        self.idle[self] = None
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._busy()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._busy()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self.idle[self] = None

    def _wait(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _busy(self) -> None:
        self.idle.pop(self, None)
        if self._late is not None:
            self._late.cancel()
            self._late = None


def patient_protocol(connections_max: int) -> type[Patient]:
    """The protocol of one server: more than ``connections_max`` connections are open only while none is idle."""
    return type("PatientProtocol", (Patient,), {"connections_max": connections_max, "idle": {}})
