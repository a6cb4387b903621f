"""Bucket settings: the ``hiss.*`` tags of a bucket, parsed. One table names every setting, its values and its limits.

In: tags as any S3 tool writes them. Out: ``BucketSettings``, or ``BadSetting`` that says which tag, which value and what is
allowed. An edit that leaves a setting out keeps it; the value ``default`` resets it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from ingest import action_settings
from ingest.action_settings import ActionSettings
from ingest.records import Durability

PREFIX = "hiss."
ACTION_PREFIX = "hiss.action."
"""``hiss.action.NAME``: what a feedback code means (ingest/action_settings.py)."""


class BadSetting(ValueError):
    """``str()`` names the tag, the value given and what is allowed."""


@dataclasses.dataclass(frozen=True, slots=True)
class BucketSettings:
    durability: Durability = Durability.DISK
    mirror_loss: str = "replace"
    """Where no other node takes the second copy that durability ``mirror`` asks for, or the one that took it is lost: ``replace``
    (by another node, else 503), ``refuse`` (503 at the first loss), ``degrade`` (by another node, else stored here only; the
    answer says so)."""
    etag: str = "checksum"
    """``checksum`` or ``md5``."""
    recall: str = "on-read"
    """``on-read`` or ``never`` (a cold GET is then InvalidObjectState)."""
    drain_after_s: int = 0
    evict_after_s: int = 0
    """Seconds an archived version stays buffered at least, watermarks permitting."""
    raw_filter: str = "refuse"
    """``refuse`` or ``allow``: whether kernels may filter raw data after the ACK."""
    run_timeout_s: int = 600
    """A run without new members for so long is closed; 0: never."""
    stop: str = "discard"
    """What becomes of the rest of a PUT once a kernel says STOP: ``discard`` (read and dropped), ``answer`` (409 at once,
    the connection is closed) or ``ignore`` (stored, not judged). What arrived before is stored in every case."""
    raw_filter_wait_s: int = 3600
    """How long the drain waits for a filter before it takes the raw data as they are."""
    outside_slot: str = "best-effort"
    """``best-effort`` or ``refuse``: what becomes of a PUT while the bucket has no reservation."""
    kernel_admission: str = "warn"
    """A kernel that is too slow for the rate the bucket has reserved: ``warn`` (it runs, and lags), ``refuse`` (it is not
    taken, nor is the reservation) or ``catch-up`` (in the slot it reduces what is stored, not what arrives)."""
    archive_mode: int = 0o640
    archive_group: int | None = None
    """Numeric group id of archived files; None keeps the archive process's own."""
    archive_owner: int | None = None
    actions: tuple[ActionSettings, ...] = ()
    """Named actions, in the order of their names."""


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(" or ".join(allowed))
        return value

    return parse


def _whole(low: int, high: int, base: int = 10) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            # int() alone takes signs, spaces, underscores and the digits of every script.
            number = int(value, base) if value.isascii() and value.isdigit() else low - 1
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ValueError(
                f"a whole number from {low} to {high}" if base == 10 else "an octal mode from 0400 to 0777"
            )
        return number

    return parse


_WEEK_S = 7 * 86400
_TABLE: dict[str, tuple[str, Callable[[str], object]]] = {
    "hiss.durability": ("durability", lambda value: Durability(_choice(*Durability)(value))),
    "hiss.mirror-loss": ("mirror_loss", _choice("replace", "refuse", "degrade")),
    "hiss.etag": ("etag", _choice("checksum", "md5")),
    "hiss.recall": ("recall", _choice("on-read", "never")),
    "hiss.drain-after-s": ("drain_after_s", _whole(0, 52 * _WEEK_S)),
    "hiss.evict-after-s": ("evict_after_s", _whole(0, 52 * _WEEK_S)),
    "hiss.raw-filter": ("raw_filter", _choice("refuse", "allow")),
    "hiss.run-timeout-s": ("run_timeout_s", _whole(0, 52 * _WEEK_S)),
    "hiss.stop": ("stop", _choice("discard", "answer", "ignore")),
    "hiss.raw-filter-wait-s": ("raw_filter_wait_s", _whole(0, 52 * _WEEK_S)),
    "hiss.outside-slot": ("outside_slot", _choice("best-effort", "refuse")),
    "hiss.kernel-admission": ("kernel_admission", _choice("warn", "refuse", "catch-up")),
    "hiss.archive-mode": ("archive_mode", _whole(0o400, 0o777, 8)),
    "hiss.archive-group": ("archive_group", _whole(0, 2**32 - 2)),
    "hiss.archive-owner": ("archive_owner", _whole(0, 2**32 - 2)),
}


def parse(tags: Mapping[str, str]) -> BucketSettings:
    """Settings from a bucket's tags; BadSetting for an unknown ``hiss.*`` name or a value out of its limits."""
    values: dict[str, object] = {"actions": _actions(tags)}
    for tag, value in tags.items():
        if not tag.startswith(PREFIX) or tag.startswith(ACTION_PREFIX):
            continue
        if tag not in _TABLE:
            raise _unknown(tag)
        field, parser = _TABLE[tag]
        try:
            values[field] = parser(value)
        except ValueError as error:
            raise BadSetting(f"{tag} = {value!r}: allowed is {error}, or default") from None
    return BucketSettings(**values)  # type: ignore[arg-type]


def _actions(tags: Mapping[str, str]) -> tuple[ActionSettings, ...]:
    found = []
    for tag in sorted(tag for tag in tags if tag.startswith(ACTION_PREFIX)):
        try:
            found.append(action_settings.parse(tag.removeprefix(ACTION_PREFIX), tags[tag]))
        except ValueError as error:
            raise BadSetting(
                f"{tag} = {tags[tag]!r}: {error}; the form is {action_settings.FORM}, or default"
            ) from None
    if len(found) > action_settings.ACTIONS_MAX:
        raise BadSetting(f"{len(found)} actions ({ACTION_PREFIX}*): a bucket has at most {action_settings.ACTIONS_MAX}")
    return tuple(found)


def _unknown(tag: str) -> BadSetting:
    return BadSetting(f"{tag!r} is not a setting; known: {', '.join(sorted(_TABLE))}, {ACTION_PREFIX}NAME")


def edited(current: Mapping[str, str], replacement: Mapping[str, str]) -> dict[str, str]:
    """Tags after a PutBucketTagging: user tags are replaced, settings left out stay, ``default`` removes one."""
    tags = {name: value for name, value in current.items() if name.startswith(PREFIX)}
    for name, value in replacement.items():
        if name.startswith(PREFIX) and value == "default":
            if name not in _TABLE and not name.startswith(ACTION_PREFIX):
                raise _unknown(name)
            tags.pop(name, None)
        else:
            tags[name] = value
    parse(tags)
    return tags
