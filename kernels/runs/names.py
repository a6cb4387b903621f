"""Keys and groups of runs. Pure.

``_products/<kernel>/<run>_run.nxs`` is the product of the newest group, ``_run.<8 hex>.nxs`` of an older one, and
``.partials/`` beside it holds what they are made of. ``<run>`` ends with ``/`` or is empty.
"""

from __future__ import annotations

import hashlib

import msgspec

from ingest.runs import PARTIALS
from kernels.attach import PRODUCT_PREFIX, Attachment
from kernels.contract import FLOAT_DTYPES, Kernel

KEY_BYTES_MAX = 1024
PARTIAL_SUFFIX = b".partial"
_LONGEST_NAME = 64
"""Room for the longest name below a run's folder."""


def folder(kernel: str, run: bytes) -> bytes:
    """Where a run's products lie; a prefix too long for that is named by its SHA-256 under ``.long/``."""
    base = PRODUCT_PREFIX + kernel.encode() + b"/"
    if len(base) + len(run) + _LONGEST_NAME <= KEY_BYTES_MAX:
        return base + run
    return base + b".long/" + hashlib.sha256(run).hexdigest().encode() + b"/"


def run_key(kernel: str, run: bytes, group: str | None = None) -> bytes:
    """``group``: of an older group's product."""
    name = b"_run.nxs" if group is None else b"_run." + group[:8].encode() + b".nxs"
    return folder(kernel, run) + name


def partial_key(kernel: str, run: bytes, object_id: bytes) -> bytes:
    return folder(kernel, run) + PARTIALS + object_id.hex().encode() + PARTIAL_SUFFIX


def clashes(key: bytes) -> bool:
    """Whether an object's own product would have the name of a run's product, or lie among partials."""
    name = key.rpartition(b"/")[2]
    return name == b"_run" or name.startswith(b"_run.") or PARTIALS in b"/" + key


def group_of(*epochs: Attachment) -> str:
    """What decides a state beside the frames: states with different groups are never merged. Several ``epochs``: of a
    version whose settings changed while it arrived."""
    said = [
        (use.kernel, use.sha256, sorted(use.params.items()), sorted(use.arrays.items()))
        for attachment in epochs
        for use in attachment.uses
    ]
    return hashlib.sha256(msgspec.json.encode(said)).hexdigest()[:32]


def exact(kernel: Kernel) -> bool:
    """Whether partial states may be merged in any order: all but floating-point sums."""
    return not any(spec.merge == "sum" and spec.dtype in FLOAT_DTYPES for spec in kernel.state)


def product_key(kernel: str, key: bytes) -> bytes:
    """``_products/<kernel>/<key>.nxs``; one too long, or like a run's product, is named by its SHA-256 under ``.long/``."""
    prefix = PRODUCT_PREFIX + kernel.encode() + b"/"
    plain = prefix + key + b".nxs"
    if len(plain) <= KEY_BYTES_MAX and not clashes(key):
        return plain
    return prefix + b".long/" + hashlib.sha256(key).hexdigest().encode() + b".nxs"
