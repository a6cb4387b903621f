"""TIFF and BigTIFF: where the strips or tiles of each page lie. One page is one frame.

In: ranges of the file, asked for one at a time. Out: an index. Only what detectors write: one sample a pixel, whole-byte
integers or floats; no compression, PackBits, LZW or Deflate; with or without horizontal differences.

Reference: TIFF Revision 6.0 (Adobe, 1992), TIFF Technical Note 2 and 3, BigTIFF (libtiff).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from typing import Literal

from kernels.decode.encoding import CHUNKS_OF_SLAB_MAX, Encoding, Filter
from kernels.layout.index import FrameIndex
from kernels.layout.scanner import Broken

PAGES_MAX = 10_000
ENTRIES_MAX = 512
AHEAD_BYTES = 16 << 10
"""Read around a directory: its values usually lie beside it."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL_ORDER = 256, 257, 258, 259, 266
_STRIP_OFFSETS, _SAMPLES, _ROWS, _STRIP_COUNTS, _PREDICTOR = 273, 277, 278, 279, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _FORMAT = 322, 323, 324, 325, 339
_PLACES = (_STRIP_OFFSETS, _STRIP_COUNTS, _TILE_OFFSETS, _TILE_COUNTS)
_SIZE_TAGS = (_WIDTH, _HEIGHT, _ROWS, _TILE_WIDTH, _TILE_HEIGHT)
_TAGS = frozenset((*_PLACES, *_SIZE_TAGS, _BITS, _COMPRESSION, _FILL_ORDER, _SAMPLES, _PREDICTOR, _FORMAT))
_SIZES = {1: 1, 3: 2, 4: 4, 16: 8}
"""Bytes of the integer types: BYTE, SHORT, LONG, LONG8."""
_KINDS = {1: "u", 2: "i", 3: "f"}
_CODECS = {1: "", 5: "lzw", 8: "deflate", 32946: "deflate", 32773: "packbits"}

Order = Literal["little", "big"]
Steps = Generator[tuple[int, int], bytes, FrameIndex]
Tags = dict[int, list[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """How numbers are written in this file."""

    order: Order
    big: bool
    """BigTIFF: 64-bit offsets."""
    body_bytes: int

    def number(self, data: bytes, at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], self.order)


def read_tiff(body_bytes: int) -> Steps:
    """Yields (offset, length) wanted, gets the bytes, returns the index. Raises Broken."""
    head = yield 0, min(16, body_bytes)
    if len(head) < 8 or head[:2] not in (b"II", b"MM"):
        raise Broken("not a TIFF")
    order: Order = "little" if head[:2] == b"II" else "big"
    form = _Form(order, int.from_bytes(head[2:4], order) == 43, body_bytes)
    following = form.number(head, 8, 8) if form.big else form.number(head, 4, 4)
    index: FrameIndex | None = None
    for _ in range(PAGES_MAX):
        if not following:
            break
        tags, following = yield from _directory(form, following)
        encoding, shape = _encoding(tags, form)
        if index is None:
            index = FrameIndex(encoding, shape, "TIFF")
        elif (encoding, shape) != (index.encoding, index.shape):
            raise Broken(
                f"page {index.count} is {encoding.dtype} {shape}, those before are {index.dtype} {index.shape}"
            )
        _page(index, tags, form)
    if index is None:
        raise Broken("a TIFF without a page")
    if following:
        raise Broken(f"more than {PAGES_MAX} pages, or directories in a circle")
    return index


def _directory(form: _Form, at: int) -> Generator[tuple[int, int], bytes, tuple[Tags, int]]:
    """The tags of one page and where the next page's directory is."""
    head_bytes, entry_bytes, offset_bytes = (8, 20, 8) if form.big else (2, 12, 4)
    window = yield _range(form, at, AHEAD_BYTES)
    count = form.number(window, 0, head_bytes)
    need = head_bytes + count * entry_bytes + offset_bytes
    if not 0 < count <= ENTRIES_MAX or need > len(window):
        raise Broken(f"a TIFF directory of {count} entries at byte {at}")
    tags: Tags = {}
    for n in range(count):
        entry = head_bytes + n * entry_bytes
        tag, kind = form.number(window, entry, 2), form.number(window, entry + 2, 2)
        values = form.number(window, entry + 4, offset_bytes)
        if tag not in _TAGS or kind not in _SIZES:
            continue
        if values > CHUNKS_OF_SLAB_MAX:
            raise Broken(f"a page in {values} parts, more than {CHUNKS_OF_SLAB_MAX}")
        size = _SIZES[kind]
        place, data = entry + 4 + offset_bytes, window
        if values * size > offset_bytes:
            target = form.number(window, place, offset_bytes)
            place, data = target - at, window
            if not 0 <= place <= len(window) - values * size:
                place, data = 0, (yield _range(form, target, values * size))
        if len(data) < place + values * size:
            raise Broken("the TIFF is cut short")
        tags[tag] = [form.number(data, place + i * size, size) for i in range(values)]
    return tags, form.number(window, need - offset_bytes, offset_bytes)


def _range(form: _Form, offset: int, length: int) -> tuple[int, int]:
    if not 0 < offset < form.body_bytes:
        raise Broken(f"the TIFF points to byte {offset} of {form.body_bytes}")
    return offset, min(length, form.body_bytes - offset)


def _one(tags: Mapping[int, list[int]], tag: int, default: int | None = None) -> int:
    values = tags.get(tag)
    if not values:
        if default is None:
            raise Broken(f"the TIFF has no tag {tag}")
        return default
    return values[0]


def _encoding(tags: Tags, form: _Form) -> tuple[Encoding, tuple[int, int]]:
    width, height = _one(tags, _WIDTH), _one(tags, _HEIGHT)
    bits, kind = _one(tags, _BITS, 1), _KINDS.get(_one(tags, _FORMAT, 1))
    if _one(tags, _SAMPLES, 1) != 1:
        raise Broken("a TIFF of several samples a pixel (colours) is no detector frame")
    if kind is None or bits not in ((32, 64) if kind == "f" else (8, 16, 32, 64)):
        raise Broken(f"TIFF pixels of {bits} bits, format {_one(tags, _FORMAT, 1)}, are not supported")
    if _one(tags, _FILL_ORDER, 1) != 1:
        raise Broken("TIFF bits in reversed order are not supported")
    element_bytes = bits // 8
    if _TILE_WIDTH in tags:
        chunk = (1, _one(tags, _TILE_HEIGHT), _one(tags, _TILE_WIDTH))
    else:
        chunk = (1, min(_one(tags, _ROWS, height), max(1, height)), width)
    dtype = ("|" if element_bytes == 1 else "<" if form.order == "little" else ">") + f"{kind}{element_bytes}"
    encoding = Encoding(dtype, chunk, _filters(tags, kind, element_bytes))
    shape = (height, width)
    if min(shape) < 1:
        raise Broken(f"a TIFF of {shape} pixels")
    trouble = encoding.trouble(shape)
    if trouble:
        raise Broken(trouble)
    return encoding, shape


def _filters(tags: Tags, kind: str, element_bytes: int) -> tuple[Filter, ...]:
    """As applied on writing: differences first, then compression."""
    compression, predictor = _one(tags, _COMPRESSION, 1), _one(tags, _PREDICTOR, 1)
    codec = _CODECS.get(compression)
    if codec is None:
        raise Broken(f"TIFF compression {compression} is not supported: none, PackBits, LZW and Deflate are")
    if predictor not in (1, 2) or (predictor == 2 and kind == "f"):
        raise Broken(f"TIFF predictor {predictor} is not supported")
    differences = (Filter("predictor", element_bytes),) if predictor == 2 else ()
    return (*differences, Filter(codec, element_bytes)) if codec else differences


def _page(index: FrameIndex, tags: Tags, form: _Form) -> None:
    tiled = _TILE_WIDTH in tags
    offsets = tags.get(_TILE_OFFSETS if tiled else _STRIP_OFFSETS, [])
    counts = tags.get(_TILE_COUNTS if tiled else _STRIP_COUNTS, [])
    wanted = index.encoding.chunks_of_slab(index.shape)
    if len(offsets) != wanted or len(counts) != wanted:
        raise Broken(f"a page of {wanted} parts names {len(offsets)} places and {len(counts)} lengths")
    if any(offset + count > form.body_bytes for offset, count in zip(offsets, counts, strict=True)):
        raise Broken("the TIFF is cut short")
    index.append_chunks(offsets, counts)
