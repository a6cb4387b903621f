"""What a run is, by its keys alone. Pure: keys in, names out.

A run is a key prefix up to its last ``/``; keys without one are the run ``""`` of their bucket. A run is closed by a marker:
an object ``<run>_SUCCESS``, or any object of the run with the user metadata ``hiss-run: close``.
"""

from __future__ import annotations

from collections.abc import Mapping

INTERNAL_PREFIXES = (b"_kernels/", b"_products/")
MARKER = b"_SUCCESS"
PARTIALS = b".partials/"
"""Folder beside a run's product: what it is made of. Nothing for people."""
MARKER_METADATA = ("hiss-run", "close")


def run_of(key: bytes) -> bytes:
    """``a/b/`` of ``a/b/c``."""
    return key[: key.rfind(b"/") + 1]


def is_marker(key: bytes) -> bool:
    """An object that closes its run by its name, and is no member of it."""
    return key.rpartition(b"/")[2] == MARKER


def is_partials(folder: bytes) -> bool:
    """Whether a folder (with its closing slash) holds partials."""
    return folder.startswith(INTERNAL_PREFIXES[1]) and folder.endswith(b"/" + PARTIALS)


def closes(key: bytes, metadata: Mapping[str, str]) -> bool:
    """Whether the object's arrival closes its run."""
    if key.startswith(INTERNAL_PREFIXES):
        return False
    name, value = MARKER_METADATA
    return is_marker(key) or metadata.get(name) == value
