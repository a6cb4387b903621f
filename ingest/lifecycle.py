"""Lifecycle rules of a bucket: what they say of one version, of one upload, at one time. Pure.

In: rules (document ``lifecycle``), facts about a version, the time. Out: what is to be done with it now, or when it will expire.
The scanner asks for every version (archive/lifecycle.py); answers to PUT, HEAD and GET tell the date. The catalogue decides again
when it deletes: locks, and whether it still is the same version.

Days count from the commit (of the successor, for noncurrent versions), rounded up to the next midnight UTC. Of several rules that
fit, expiring goes before moving, and the coldest class wins.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/intro-lifecycle-rules.html,
https://docs.aws.amazon.com/AmazonS3/latest/userguide/lifecycle-conflicts.html

Kernels (``_kernels/``) are how a bucket works and not its data: only a rule whose prefix names them reaches them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec

from ingest.bucket_documents import Form
from ingest.records import ObjectRecord, UploadRecord
from ingest.storage_class import ARCHIVE_ONLY, CLASSES, days_from

RULES_MAX = 1000
KERNELS_PREFIX = "_kernels/"
TRANSITION_BYTES_MIN = 128 * 1024
"""Smaller objects are not moved, unless the rule speaks of sizes, or ``minimum`` leaves the choice to the class."""


class When(msgspec.Struct, frozen=True, omit_defaults=True):
    """So many days after the commit, or on a day."""

    days: int | None = None
    date_ns: int | None = None

    def at_ns(self, since_ns: int, day_s: int) -> int:
        return self.date_ns if self.date_ns is not None else days_from(since_ns, self.days or 0, day_s)


class Transition(msgspec.Struct, frozen=True, omit_defaults=True):
    when: When
    storage_class: str
    keep: int = 0
    """Of noncurrent versions: so many of the newest stay where they are."""


class Rule(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    enabled: bool
    prefix: str = ""
    tags: dict[str, str] = {}
    larger_than: int | None = None
    smaller_than: int | None = None
    form: str = "Filter"
    """How the client wrote the filter: ``Prefix`` (the old form), ``Filter``, or ``And``; only for giving it back."""
    expire: When | None = None
    expire_markers: bool = False
    """Delete markers with no version behind them go."""
    noncurrent_days: int | None = None
    noncurrent_keep: int = 0
    transitions: tuple[Transition, ...] = ()
    noncurrent_transitions: tuple[Transition, ...] = ()
    abort_days: int | None = None

    def applies(self, key: bytes, tags: dict[str, str], length: int) -> bool:
        return (
            self.enabled
            and self.covers(key)
            and (self.larger_than is None or length > self.larger_than)
            and (self.smaller_than is None or length < self.smaller_than)
            and all(tags.get(name) == value for name, value in self.tags.items())
        )

    def covers(self, key: bytes) -> bool:
        if not key.startswith(self.prefix.encode("utf-8", "surrogatepass")):
            return False
        return not key.startswith(KERNELS_PREFIX.encode()) or self.prefix.startswith(KERNELS_PREFIX)


class Lifecycle(msgspec.Struct, frozen=True, omit_defaults=True):
    rules: tuple[Rule, ...]
    minimum: str = "all_storage_classes_128K"
    """``x-amz-transition-default-minimum-object-size``."""


LIFECYCLE: Form[Lifecycle] = Form("lifecycle", msgspec.json.Decoder(Lifecycle).decode)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a version stands among those of its key."""

    current: bool
    alone: bool = False
    """There is no other version."""
    since_ns: int = 0
    """Of a noncurrent version: when its successor came."""
    newer: int = 0
    """Of a noncurrent version: how many noncurrent ones are newer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Expire:
    """The version goes (in a bucket with versions, the current one gets a delete marker)."""

    rule: str


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    storage_class: str
    rule: str


def due(rules: Lifecycle, record: ObjectRecord, place: Place, now_ns: int, day_s: int) -> Expire | Move | None:
    """What is to be done with a version now."""
    fitting = [rule for rule in rules.rules if rule.applies(record.key, record.attributes.tags, record.length)]
    if not fitting:
        return None
    for rule in fitting:
        if _expires(rule, record, place, now_ns, day_s):
            return Expire(rule.id)
    if record.delete_marker:
        return None
    return _move(rules, fitting, record, place, now_ns, day_s)


def _expires(rule: Rule, record: ObjectRecord, place: Place, now_ns: int, day_s: int) -> bool:
    if not place.current:
        if rule.noncurrent_days is None or place.newer < rule.noncurrent_keep:
            return False
        return days_from(place.since_ns, rule.noncurrent_days, day_s) <= now_ns
    if record.delete_marker and not place.alone:
        return False
    if record.delete_marker and rule.expire_markers:
        return True
    return rule.expire is not None and rule.expire.at_ns(record.modified_ns, day_s) <= now_ns


def _move(
    rules: Lifecycle, fitting: list[Rule], record: ObjectRecord, place: Place, now_ns: int, day_s: int
) -> Move | None:
    coldest, best = CLASSES.index(record.attributes.storage_class), None
    since_ns = record.modified_ns if place.current else place.since_ns
    for rule in fitting:
        for step in rule.transitions if place.current else rule.noncurrent_transitions:
            rank = CLASSES.index(step.storage_class)
            if rank <= coldest or place.newer < step.keep or step.when.at_ns(since_ns, day_s) > now_ns:
                continue
            if record.length < _least_bytes(rules, rule, step.storage_class):
                continue
            coldest, best = rank, Move(step.storage_class, rule.id)
    return best


def _least_bytes(rules: Lifecycle, rule: Rule, storage_class: str) -> int:
    if rule.larger_than is not None or rule.smaller_than is not None:
        return 0
    if rules.minimum == "varies_by_storage_class" and storage_class in ARCHIVE_ONLY:
        return 0
    return TRANSITION_BYTES_MIN


def expiration(rules: Lifecycle, record: ObjectRecord, day_s: int) -> tuple[int, str] | None:
    """When a current version expires, and by which rule; for ``x-amz-expiration``."""
    found = [
        (rule.expire.at_ns(record.modified_ns, day_s), rule.id)
        for rule in rules.rules
        if rule.expire is not None and rule.applies(record.key, record.attributes.tags, record.length)
    ]
    return min(found, default=None)


def abortion(rules: Lifecycle, upload: UploadRecord, day_s: int) -> tuple[int, str] | None:
    """When an upload that nobody completes is aborted, and by which rule."""
    return min(_abortions(rules, upload, day_s), default=None)


def _abortions(rules: Lifecycle, upload: UploadRecord, day_s: int) -> Iterator[tuple[int, str]]:
    for rule in rules.rules:
        if rule.enabled and rule.abort_days is not None and rule.covers(upload.key):
            yield days_from(upload.started_ns, rule.abort_days, day_s), rule.id
