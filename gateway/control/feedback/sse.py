"""Feedback as server-sent events (WHATWG HTML section 9.2), ``GET /v1/feedback``.

Events have ids ``EPOCH-NUMBER``; a browser sends the last one as Last-Event-ID when it comes back. Kinds: ``ready`` first of all,
``feedback``, ``gap`` (how many this subscriber lost), ``expired`` and ``failed`` (named actions).
"""

from __future__ import annotations

from gateway.control.feedback.ring import Form


def _one(event_id: bytes, kind: bytes, data: bytes) -> bytes:
    if kind == b"heartbeat":
        # An id without data only moves the browser's Last-Event-ID on, past what the filter left out.
        return b": heartbeat\nid: %b\n\n" % event_id
    retry = b"retry: 1000\n" if kind == b"ready" else b""
    return b"%bid: %b\nevent: %b\ndata: %b\n\n" % (retry, event_id, kind, data)


SSE = Form("sse", _one, b"".join)
