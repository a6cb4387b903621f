"""Which format a body is in: named by the metadata, else by its first bytes, else by its key or content type.

In: the body's head, key, content type and metadata. Out: a ``Kind``, or how many bytes are needed to say. Raises ValueError
with a reason fit for the scientist.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from kernels.formats import NPY_MAGIC, declared_geometry
from kernels.layout import cbor


class Kind(StrEnum):
    RAW = "raw"
    NPY = "npy"
    CBOR = "cbor"
    HDF5 = "hdf5"
    CBF = "cbf"
    TIFF = "tiff"


STORED_ONLY = (Kind.HDF5, Kind.CBF, Kind.TIFF)
"""Structure is read once the body is stored: it may lie anywhere, or is small."""
_MAGIC = {
    NPY_MAGIC: Kind.NPY,
    b"\x89HDF\r\n\x1a\n": Kind.HDF5,
    b"###CBF": Kind.CBF,
    b"II*\x00": Kind.TIFF,
    b"MM\x00*": Kind.TIFF,
    b"II+\x00": Kind.TIFF,
    b"MM\x00+": Kind.TIFF,
}
_SUFFIXES = {
    b".npy": Kind.NPY,
    b".cbor": Kind.CBOR,
    b".h5": Kind.HDF5,
    b".hdf5": Kind.HDF5,
    b".hdf": Kind.HDF5,
    b".nxs": Kind.HDF5,
    b".nx5": Kind.HDF5,
    b".cbf": Kind.CBF,
    b".tif": Kind.TIFF,
    b".tiff": Kind.TIFF,
}
_CONTENT_TYPES = {
    "application/cbor": Kind.CBOR,
    "application/x-hdf5": Kind.HDF5,
    "application/x-hdf": Kind.HDF5,
    "application/x-cbf": Kind.CBF,
    "image/tiff": Kind.TIFF,
}
PROBE_BYTES = 16
NOTHING_KNOWN = (
    "no frame geometry: not .npy, HDF5, CBOR, CBF or TIFF, and neither x-amz-meta-frame-format nor "
    "x-amz-meta-frame-dtype and x-amz-meta-frame-shape"
)


def kind_of(
    head: memoryview, key: bytes, content_type: str, metadata: Mapping[str, str], *, complete: bool
) -> Kind | int:
    named = metadata.get("frame-format")
    if named is not None:
        try:
            return Kind(named.strip().lower())
        except ValueError:
            raise ValueError(f"x-amz-meta-frame-format: {named!r:.40} is none of {', '.join(Kind)}") from None
    declared = declared_geometry(metadata) is not None
    suffix = next((kind for end, kind in _SUFFIXES.items() if key.lower().endswith(end)), None)
    if declared and suffix is None:
        # Known before the first byte: the very first span can be cut to whole frames.
        return Kind.RAW
    found = _by_magic(head)
    if found is not None:
        return found
    if len(head) < PROBE_BYTES and not complete:
        return PROBE_BYTES
    if declared:
        return Kind.RAW
    told = suffix or _CONTENT_TYPES.get(content_type.partition(";")[0].strip().lower())
    if told is None or told is Kind.NPY:
        raise ValueError(NOTHING_KNOWN)
    return told


def _by_magic(head: memoryview) -> Kind | None:
    probe = bytes(head[:PROBE_BYTES])
    for magic, kind in _MAGIC.items():
        if probe.startswith(magic):
            return kind
    return Kind.CBOR if cbor.may_begin(head) else None
