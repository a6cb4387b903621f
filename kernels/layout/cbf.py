"""One CBF file (imgCIF, as Pilatus detectors write them): a text head, then one binary section with one image.

In: the first bytes of the file. Out: an index with one frame. Reference: International Tables for Crystallography G, 2.3.
"""

from __future__ import annotations

import re
from collections.abc import Generator

from kernels.decode.encoding import Encoding, Filter
from kernels.layout.index import FrameIndex
from kernels.layout.scanner import Broken

HEAD_BYTES_MAX = 256 << 10
"""Most text in front of the image."""
_SECTION = b"--CIF-BINARY-FORMAT-SECTION--"
_START = b"\x0c\x1a\x04\xd5"
_FIELD = re.compile(rb"^([A-Za-z0-9-]+):[ \t]*([^\r\n]*(?:\r?\n[ \t]+[^\r\n]*)*)", re.MULTILINE)
_TYPES = {
    "signed 8-bit integer": "|i1",
    "unsigned 8-bit integer": "|u1",
    "signed 16-bit integer": "<i2",
    "unsigned 16-bit integer": "<u2",
    "signed 32-bit integer": "<i4",
    "unsigned 32-bit integer": "<u4",
    "signed 32-bit real ieee": "<f4",
    "signed 64-bit real ieee": "<f8",
}
Steps = Generator[tuple[int, int], bytes, FrameIndex]


def read_cbf(body_bytes: int) -> Steps:
    """Yields (offset, length) wanted, gets the bytes, returns the index. Raises Broken."""
    head = yield 0, min(body_bytes, HEAD_BYTES_MAX)
    section = head.find(_SECTION)
    start = head.find(_START, max(section, 0))
    if section < 0 or start < 0:
        raise Broken(f"no binary section in the first {len(head)} bytes of the CBF")
    fields = {name.lower(): value for name, value in _FIELD.findall(head[section:start])}
    dtype = _TYPES.get(_text(fields, b"x-binary-element-type", "unsigned 32-bit integer").strip('" ').lower())
    if dtype is None:
        raise Broken(f"pixels of type {_text(fields, b'x-binary-element-type', '')} are not supported")
    if "BIG" in _text(fields, b"x-binary-element-byte-order", "LITTLE_ENDIAN").upper():
        raise Broken("big-endian CBF is not supported")
    shape = (_number(fields, b"x-binary-size-second-dimension"), _number(fields, b"x-binary-size-fastest-dimension"))
    if _number(fields, b"x-binary-size-third-dimension", 1) > 1 or min(shape) < 1:
        raise Broken(f"a CBF of {shape} is no single image")
    stored = _number(fields, b"x-binary-size")
    offset = start + len(_START)
    if offset + stored > body_bytes:
        raise Broken("the CBF is cut short")
    encoding = Encoding(dtype, (1, *shape), _compression(fields, dtype))
    if not encoding.filters and stored != encoding.chunk_bytes:
        raise Broken(f"{stored} bytes for an image of {encoding.chunk_bytes}")
    trouble = encoding.trouble(shape)
    if trouble:
        raise Broken(trouble)
    index = FrameIndex(encoding, shape, "CBF")
    index.append(offset, stored)
    return index


def _compression(fields: dict[bytes, bytes], dtype: str) -> tuple[Filter, ...]:
    content = _text(fields, b"content-type", "")
    found = re.search(r'conversions\s*=\s*"?([\w-]+)"?', content, re.IGNORECASE)
    name = found[1].upper() if found else "NONE"
    if name in ("NONE", "X-CBF_NONE"):
        return ()
    if name == "X-CBF_BYTE_OFFSET":
        if dtype not in ("<i4", "<u4"):
            raise Broken(f"byte-offset compression of {dtype} is not supported")
        return (Filter("byte-offset", 4),)
    raise Broken(f"CBF compression {name:.40} is not supported: x-CBF_BYTE_OFFSET is")


def _text(fields: dict[bytes, bytes], name: bytes, default: str) -> str:
    value = fields.get(name)
    return default if value is None else " ".join(value.decode("ascii", "replace").split())


def _number(fields: dict[bytes, bytes], name: bytes, default: int | None = None) -> int:
    text = _text(fields, name, "" if default is None else str(default))
    if not re.fullmatch(r"\d{1,12}", text):
        raise Broken(f"the CBF head says no {name.decode()}")
    return int(text)
