"""Who caused a mutation: travels beside it to the catalogue, where events for notifications are made. Never journalled by itself.

Set around the work of one request (a context variable, so that no call in between has to carry it); unset, an event names the
object's owner.
"""

from __future__ import annotations

from contextvars import ContextVar

import msgspec


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """One request, as an event tells of it."""

    user: str
    address: str = ""
    request_id: str = ""
    host_id: str = ""
    method: str = "Put"
    """How an object is created: Put, Post or Copy."""
    lifecycle: bool = False
    """A rule did it, and no request."""


ORIGIN: ContextVar[Origin | None] = ContextVar("origin", default=None)
