"""Configuration documents of buckets: their names, their limits, and their parsed forms, kept.

A document is opaque bytes that the catalogue stores with the bucket (``BucketRecord.documents``), journals and hands to every
process under its generation. In: a name and bytes. Out: refusals of what the table does not have or is too large; and, by a
``Form``, the value a document stands for. A room that understands a language (policies: s3api) makes a form of its own; those
that decide what is committed are here, and what they refuse never gets into the journal.

Bucket tags are no documents: ``hiss.*`` settings are theirs (ingest/bucket_settings.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from ingest.errors import BadDocument
from ingest.records import BucketRecord

T = TypeVar("T")

KIB = 1024
LIMITS: dict[str, int] = {
    "acl": 64 * KIB,
    "cors": 64 * KIB,
    "lifecycle": 512 * KIB,
    "notification": 128 * KIB,
    "object-lock": 4 * KIB,
    "ownershipControls": 4 * KIB,
    "policy": 20 * KIB,
    "publicAccessBlock": 4 * KIB,
    "requestPayment": 4 * KIB,
    "versioning": 4 * KIB,
}
"""Name (the subresource that sets it) -> most bytes as stored."""
PARSED_KEPT = 256


class Form(Generic[T]):
    """How one kind of document is read. ``parse`` raises ValueError; what it returns is shared and must not be changed."""

    def __init__(self, name: str, parse: Callable[[bytes], T]) -> None:
        if name not in LIMITS:
            raise ValueError(f"{name!r} is no document of a bucket")
        self.name = name
        self._parse = functools.lru_cache(maxsize=PARSED_KEPT)(parse)

    def of(self, bucket: BucketRecord) -> T | None:
        """The bucket's document, parsed; None when it has none. ValueError for one that cannot be read."""
        document = bucket.documents.get(self.name)
        return None if document is None else self._parse(document)

    def check(self, document: bytes) -> None:
        """Raises BadDocument."""
        try:
            self._parse(document)
        except ValueError as error:
            raise BadDocument(f"{self.name}: {error}") from None


FORMS: dict[str, Form[Any]] = {}
"""What the catalogue itself reads of a document before it takes it, by name; other documents only have a limit."""


def check(documents: Mapping[str, bytes | None]) -> None:
    """Raises BadDocument unless each name is known and each document within its limit and readable."""
    for name, document in documents.items():
        if name not in LIMITS:
            raise BadDocument(f"{name!r} is no document of a bucket; known: {', '.join(LIMITS)}")
        if document is None:
            continue
        if len(document) > LIMITS[name]:
            raise BadDocument(f"{name}: {len(document)} bytes; at most {LIMITS[name]}")
        if name in FORMS:
            FORMS[name].check(document)


def changed(current: Mapping[str, bytes], edit: Mapping[str, bytes | None]) -> dict[str, bytes]:
    """Documents after an edit: None removes one, what is not named stays."""
    merged = {**current, **edit}
    return {name: document for name, document in merged.items() if document is not None}
