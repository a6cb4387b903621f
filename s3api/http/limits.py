"""Every bound of the HTTP room in one place: sizes in bytes, times in seconds. Checked once, when it is built."""

from __future__ import annotations

import dataclasses

KIB = 1024
MIB = 1024 * KIB


@dataclasses.dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one peer may use of this process. ``ValueError`` names the limit that makes no sense."""

    head_bytes: int = 64 * KIB
    """Request line and header fields together; more is answered 431."""
    head_fields: int = 200
    query_parameters: int = 1000
    chunk_line_bytes: int = 16 * KIB
    """A chunk-size line with its extensions, HTTP or aws-chunked."""
    trailer_bytes: int = 16 * KIB
    trailer_fields: int = 20

    head_timeout_s: float = 20.0
    """First byte of a head to its last; also the wait for the first byte on a TLS port."""
    idle_timeout_s: float = 75.0
    """Between an answer and the next request."""
    body_timeout_s: float = 60.0
    """Longest pause within a body while there is memory to receive into."""
    body_rate_bytes_per_s: int = 500
    """Slowest pace of a body, on average over each ``body_timeout_s`` in which there is memory to receive into."""
    body_duration_s: float = 7 * 86400.0
    """A body of known length must come fast enough to end in this time: its space is reserved until then."""
    send_timeout_s: float = 60.0
    """Longest time a peer may take none of the answer."""
    tls_handshake_timeout_s: float = 20.0

    drain_bytes: int = 256 * KIB
    """An unread body up to this long is read and dropped to keep the connection; longer ones cost the connection."""
    linger_bytes: int = 64 * MIB
    """Read and dropped after a closing answer, so that the peer reads it rather than a reset."""
    linger_timeout_s: float = 5.0

    inbox_bytes: int = 16 * KIB
    """Receive buffer of a request's head; grows to ``head_bytes`` for a large head. An idle connection has none."""
    read_ahead_bytes: int = 256 * KIB
    """Receive buffer of a body in chunks, while it is being received."""
    direct_bytes: int = 32 * KIB
    """Runs of chunked payload at least this long are received in place, shorter ones through the read-ahead."""
    receive_bytes: int = 4 * MIB
    """Most bytes of one read."""
    send_window_bytes: int = 2 * MIB
    """Most bytes of one sendfile; the unit of the residency probe."""
    small_send_bytes: int = 64 * KIB
    """A stored body up to this long is read into memory and goes out in one write with its head."""
    tls_window_bytes: int = 256 * KIB
    """Bytes of a file read and encrypted at a time on a TLS connection."""

    connections: int = 8192
    """Open connections; the listener stops accepting at this many."""
    accept_share: int = 0
    """Bodies in progress from which on this worker lets others accept first; 0: never (a single worker)."""
    accept_yield_s: float = 0.02
    """How long it lets them. Afterwards it accepts all the same, so no state of a peer can starve a client."""

    accept_turn_s: float = 0.001
    """After each connection accepted, the other workers' turn: a client's connections spread over them."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "accept_share" and getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} must be more than 0, not {getattr(self, field.name)}")
        if self.accept_share < 0:
            raise ValueError(f"accept_share must not be negative, not {self.accept_share}")
        if self.inbox_bytes > self.head_bytes:
            raise ValueError("inbox_bytes must not be more than head_bytes")
        if self.direct_bytes > self.read_ahead_bytes:
            raise ValueError("direct_bytes must not be more than read_ahead_bytes")

    @property
    def tick_s(self) -> float:
        """How often timeouts are looked at: a timeout fires at most two of these late."""
        shortest = min(
            self.head_timeout_s,
            self.idle_timeout_s,
            self.body_timeout_s,
            self.send_timeout_s,
            self.linger_timeout_s,
        )
        return min(1.0, shortest / 4)
