"""Amounts and times as people write them: ``20TB``, ``20Gbps``, ``2.5 GB/s``, ``2026-12-01 08:00``, ``+8h``.

Pure. Raises CliError that says what the form is.
"""

from __future__ import annotations

import datetime
import re

from gateway.cli.output import CliError

_NUMBER = r"(\d+(?:\.\d+)?)\s*"
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40, "PI": 1 << 50}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """Bytes of ``20TB`` or ``20 TiB``."""
    match = re.fullmatch(_NUMBER + r"([KMGTP]?I?)B?", text.strip().upper())
    if match is None or (factor := (_DECIMAL | _BINARY).get(match[2])) is None:
        raise CliError(f"{text!r} is no size: write it as 20TB or 20TiB")
    return round(float(match[1]) * factor)


def parse_rate(text: str) -> int:
    """Bytes per second of ``20Gbps`` or ``2.5GB/s``; a small ``b`` is a bit."""
    match = re.fullmatch(_NUMBER + r"([kKMGTP]?)(i?)(?:(b(?:it)?ps|b(?:it)?/s)|(B/s|Bps))", text.strip())
    if match is None or (match[3] and not match[2]):
        raise CliError(f"{text!r} is no rate: write it as 20Gbps or 2.5GB/s")
    factor = _BINARY[match[2].upper() + "I"] if match[3] else _DECIMAL[match[2].upper()]
    return round(float(match[1]) * factor / (8 if match[4] else 1))


def parse_duration(text: str) -> int:
    """Seconds of ``90s``, ``5min``, ``8h``, ``2d``."""
    match = re.fullmatch(_NUMBER + r"(s|min|h|d)", text.strip())
    if match is None:
        raise CliError(f"{text!r} is no duration: write it as 90s, 5min, 8h or 2d")
    return round(float(match[1]) * _SECONDS[match[2]])


def parse_time(text: str, now: datetime.datetime, since: datetime.datetime | None = None) -> datetime.datetime:
    """``now``, ``+8h`` (after ``since``), ``08:00`` (the next time it is that late), or a date with a time. Without a zone it is
    this machine's. ``now`` has a zone."""
    word = text.strip()
    if word == "now":
        return now
    if word.startswith("+"):
        try:
            return (since or now) + datetime.timedelta(seconds=parse_duration(word[1:]))
        except OverflowError:
            raise CliError(f"{text!r} is too far away") from None
    if clock := re.fullmatch(r"(\d{1,2}):(\d{2})", word):
        hour, minute = int(clock[1]), int(clock[2])
        if hour > 23 or minute > 59:
            raise CliError(f"{text!r} is no time of a day")
        base = (since or now).astimezone()
        moment = base.replace(hour=hour, minute=minute, second=0, microsecond=0)
        return moment if moment > base else moment + datetime.timedelta(days=1)
    try:
        moment = datetime.datetime.fromisoformat(word)
    except ValueError:
        raise CliError(f"{text!r} is no time: write it as 2026-12-01T08:00, 08:00, +8h or now") from None
    return moment if moment.tzinfo is not None else moment.astimezone()
