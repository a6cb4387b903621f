"""Whether a body comes fast enough. Pure: no socket, no clock.

A peer that sends a byte now and then is never silent for long, and would hold its connection, its memory and the space that
was reserved for its declared length as long as it likes. So each window of time has to bring a share of the body.
"""

from __future__ import annotations

from s3api.http.limits import HttpLimits


class Pace:
    """Judges one body of ``length`` bytes (None: nobody knows) from what has come at some moments."""

    __slots__ = ("_bytes", "_rate", "_since", "_window_s")

    def __init__(self, limits: HttpLimits, length: int | None) -> None:
        self._rate = max(limits.body_rate_bytes_per_s, (length or 0) / limits.body_duration_s)
        self._window_s = limits.body_timeout_s
        self._since: float | None = None
        self._bytes = 0

    def __str__(self) -> str:
        return f"{self._rate:.0f} bytes a second"

    def too_slow(self, now: float, received_bytes: int, *, excused: bool) -> bool:
        """``received_bytes`` so far at ``now`` (seconds of any clock). ``excused``: we did not read, the window begins anew."""
        if self._since is None or excused:
            self._since, self._bytes = now, received_bytes
            return False
        elapsed_s = now - self._since
        if elapsed_s < self._window_s:
            return False
        came = received_bytes - self._bytes
        self._since, self._bytes = now, received_bytes
        return came < self._rate * elapsed_s
