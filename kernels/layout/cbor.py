"""DECTRIS SIMPLON Stream V2: CBOR messages one behind the other in one body (dectris/documentation, stream_v2).

In: the body. Out: an index with one frame for each image message, and which images of the series are missing. Only the
heads of CBOR items are looked at, and a few short texts and numbers; image data are stepped over. A frame is the image of
one channel (threshold): the one the metadata name, else the first of the message.

References: RFC 8949 (CBOR), RFC 8746 (tags 40 and 64 to 87), dectris-compression-tag.md (tag 56500).
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from kernels.decode.encoding import Encoding, Filter
from kernels.layout.index import CHUNK_STORED_BYTES_MAX, FrameIndex
from kernels.layout.scanner import FOUND_MAX, Broken, Scanner, Steps
from kernels.layout.series import Series

SELF_DESCRIBED = b"\xd9\xd9\xf7"
TYPE_KEY = b"\x64type"
DEPTH_MAX = 16
ITEMS_MAX = 1_000_000
"""Items of one message: a start message may carry tables as lists."""
TEXT_BYTES_MAX = 256
CHANNELS_MAX = 64
SKIP_BYTES_MAX = 1 << 40
SHAPE_MAX = 1 << 31

_UINT, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = 0, 2, 3, 4, 5, 6, 7
_BREAK = -1
_INDEFINITE = -2
_TAG_SELF, _TAG_ARRAY, _TAG_ARRAY_COLUMNS, _TAG_COMPRESSED = 55799, 40, 1040, 56500
_TYPED = {
    64: "|u1", 65: ">u2", 66: ">u4", 67: ">u8", 68: "|u1", 69: "<u2", 70: "<u4", 71: "<u8",
    72: "|i1", 73: ">i2", 74: ">i4", 75: ">i8", 77: "<i2", 78: "<i4", 79: "<i8",
    81: ">f4", 82: ">f8", 85: "<f4", 86: "<f8",
}  # fmt: skip
"""RFC 8746 section 2.1; 16- and 128-bit floats are left out: no kernel has them."""

Head = tuple[int, int]
Image = tuple[Encoding, tuple[int, ...], int, int]
"""Encoding, shape, body offset, stored length."""


def may_begin(head: memoryview) -> bool | None:
    """Whether these bytes begin a message; None when more are needed to say."""
    probe = bytes(head[: len(SELF_DESCRIBED) + 1 + len(TYPE_KEY)])
    if probe.startswith(SELF_DESCRIBED):
        probe = probe[len(SELF_DESCRIBED) :]
    elif SELF_DESCRIBED.startswith(probe):
        return None
    if probe and probe[0] >> 5 != _MAP:
        return False
    if len(probe) < 1 + len(TYPE_KEY):
        return None if TYPE_KEY.startswith(probe[1:]) else False
    return probe[1:].startswith(TYPE_KEY)


class CborStream(Scanner):
    """``channel``: the name of the channel whose images are the frames; empty: the first one of each message."""

    def __init__(self, on_index: Callable[[FrameIndex], None], channel: str = "") -> None:
        super().__init__(on_index)
        self._channel = channel
        self._series = Series()
        self._items = 0

    def gaps(self) -> tuple[tuple[int, int], ...]:
        return self._series.gaps()

    # -- messages

    def _parse(self) -> Steps:
        while True:
            yield from self._message()
            self.settled = self.position

    def _message(self) -> Steps:
        self._items = 0
        head = yield from self._untagged(_TAG_SELF)
        if head[0] != _MAP:
            raise Broken(f"byte {self.settled}: not a Stream V2 message (a CBOR map)")
        kind = ""
        image: Image | None = None
        numbers: dict[str, int] = {}
        left = head[1]
        while left:
            key = yield from self._key()
            if key is None:
                break
            if key == "type":
                kind = yield from self._text()
            elif key in ("image_id", "number_of_images"):
                numbers[key] = yield from self._number()
            elif key == "data":
                image = yield from self._channels()
            else:
                yield from self._item((yield from self._head()), 1)
            left -= 1 if left > 0 else 0
        self._message_over(kind, image, numbers)

    def _message_over(self, kind: str, image: Image | None, numbers: dict[str, int]) -> None:
        if kind == "start":
            self._series.start(numbers.get("number_of_images"))
        elif kind == "image":
            if image is None:
                wanted = f"channel {self._channel!r}" if self._channel else "data"
                raise Broken(f"the image message at byte {self.settled} has no {wanted}")
            self._found(image, numbers.get("image_id"))
            self._item_over()
        elif kind != "end":
            raise Broken(f"byte {self.settled}: a message of type {kind!r:.40}")

    def _found(self, image: Image, number: int | None) -> None:
        encoding, shape, offset, length = image
        index = self.index
        if index is None:
            names = "Dectris Stream V2 (CBOR)" + (f", channel {self._channel}" if self._channel else "")
            index = FrameIndex(encoding, shape, names)
            self._settle(index)
        elif (encoding, shape) != (index.encoding, index.shape):
            raise Broken(
                f"image {index.count} is {encoding.dtype} {shape} {encoding.name}, those before are "
                f"{index.encoding.dtype} {index.shape} {index.encoding.name}"
            )
        if index.count >= FOUND_MAX:
            raise Broken(f"more than {FOUND_MAX} frames in one object")
        index.append(offset, length)
        self._series.image(number)

    # -- images

    def _channels(self) -> Generator[None, None, Image | None]:
        """The map from channel names to arrays: the wanted one of them."""
        major, left = yield from self._head()
        if major != _MAP or left > CHANNELS_MAX:
            raise Broken(f"byte {self.position}: the data of an image are no map of channels")
        chosen: Image | None = None
        while left:
            name = yield from self._key()
            if name is None:
                break
            if chosen is None and (not self._channel or name == self._channel):
                chosen = yield from self._array()
            else:
                yield from self._item((yield from self._head()), 2)
            left -= 1 if left > 0 else 0
        return chosen

    def _array(self) -> Generator[None, None, Image]:
        major, tag = yield from self._head()
        if (major, tag) == (_TAG, _TAG_ARRAY_COLUMNS):
            raise Broken("images in column-major order (tag 1040) are not supported")
        pair = yield from self._head()
        if (major, tag) != (_TAG, _TAG_ARRAY) or pair != (_ARRAY, 2):
            raise Broken(f"byte {self.position}: the image is no multi-dimensional array (tag 40)")
        shape = yield from self._shape()
        major, tag = yield from self._head()
        if major != _TAG or tag not in _TYPED:
            raise Broken(f"byte {self.position}: the image is no typed array that kernels know (tag {tag})")
        dtype = _TYPED[tag]
        head = yield from self._head()
        filters: tuple[Filter, ...] = ()
        if head == (_TAG, _TAG_COMPRESSED):
            filters = yield from self._compression()
            head = yield from self._head()
        major, length = head
        if major != _BYTES or not 0 <= length <= CHUNK_STORED_BYTES_MAX:
            raise Broken(f"byte {self.position}: the image is no byte string of known length")
        encoding = Encoding(dtype, (1, *shape), filters)
        if not filters and length != encoding.chunk_bytes:
            raise Broken(f"byte {self.position}: {length} bytes for an image of {encoding.chunk_bytes}")
        offset = self.position
        yield from self._payload(length, 1)
        return encoding, shape, offset, length

    def _shape(self) -> Generator[None, None, tuple[int, ...]]:
        major, count = yield from self._head()
        if major != _ARRAY or not 1 <= count <= 4:
            raise Broken(f"byte {self.position}: an image of {count} dimensions")
        shape = []
        for _ in range(count):
            size = yield from self._number()
            if not 0 < size < SHAPE_MAX:
                raise Broken(f"byte {self.position}: an image {size} pixels wide")
            shape.append(size)
        return tuple(shape)

    def _compression(self) -> Generator[None, None, tuple[Filter, ...]]:
        """The first two of ``[algorithm, element size, bytes]``."""
        if (yield from self._head()) != (_ARRAY, 3):
            raise Broken(f"byte {self.position}: broken compression tag")
        algorithm = yield from self._text()
        element_bytes = yield from self._number()
        if algorithm == "lz4":
            return (Filter("lz4"),)
        if algorithm == "bslz4":
            return (Filter("bslz4", element_bytes),)
        raise Broken(f"compression {algorithm!r:.40} is not supported: bslz4 and lz4 are")

    # -- CBOR

    def _head(self) -> Generator[None, None, Head]:
        """(major type, argument). A break is (7, _BREAK); an indefinite length is _INDEFINITE."""
        self._items += 1
        if self._items > ITEMS_MAX:
            raise Broken(f"a message of more than {ITEMS_MAX} items")
        data, at = self._data, self._at
        if at + 9 <= len(data):
            first = data[at]
            short = first & 31
            if short < 24:
                self._at = at + 1
                self.position += 1
                return first >> 5, short
            if short < 28:
                size = 1 << (short - 24)
                self._at = at + 1 + size
                self.position += 1 + size
                return first >> 5, int.from_bytes(data[at + 1 : at + 1 + size], "big")
        return (yield from self._slow_head())

    def _slow_head(self) -> Generator[None, None, Head]:
        first = (yield from self._bytes(1))[0]
        major, short = first >> 5, first & 31
        if short < 24:
            return major, short
        if short < 28:
            return major, int.from_bytes((yield from self._bytes(1 << (short - 24))), "big")
        if short == 31 and major == _SIMPLE:
            return major, _BREAK
        if short == 31 and major in (_BYTES, _TEXT, _ARRAY, _MAP):
            return major, _INDEFINITE
        raise Broken(f"byte {self.position}: not CBOR")

    def _untagged(self, tag: int) -> Generator[None, None, Head]:
        head = yield from self._head()
        if head == (_TAG, tag):
            head = yield from self._head()
        return head

    def _key(self) -> Generator[None, None, str | None]:
        """A map's next key; None at the break of a map of indefinite length."""
        major, length = yield from self._head()
        if (major, length) == (_SIMPLE, _BREAK):
            return None
        return (yield from self._text_of(major, length))

    def _text(self) -> Generator[None, None, str]:
        major, length = yield from self._head()
        return (yield from self._text_of(major, length))

    def _text_of(self, major: int, length: int) -> Generator[None, None, str]:
        if major != _TEXT or not 0 <= length <= TEXT_BYTES_MAX:
            raise Broken(f"byte {self.position}: expected a text of at most {TEXT_BYTES_MAX} bytes")
        return (yield from self._bytes(length)).decode("utf-8", "replace")

    def _number(self) -> Generator[None, None, int]:
        major, value = yield from self._head()
        if major != _UINT:
            raise Broken(f"byte {self.position}: expected an unsigned number")
        return value

    def _item(self, head: Head, depth: int) -> Steps:
        """Step over one item whose head was read."""
        major, value = head
        if depth > DEPTH_MAX:
            raise Broken(f"byte {self.position}: more than {DEPTH_MAX} levels deep")
        if (major, value) == (_SIMPLE, _BREAK):
            raise Broken(f"byte {self.position}: a break where an item should be")
        if major in (_BYTES, _TEXT) and value != _INDEFINITE:
            if value > SKIP_BYTES_MAX:
                raise Broken(f"byte {self.position}: a string of {value} bytes")
            yield from self._skip(value)
        elif major == _TAG:
            yield from self._item((yield from self._head()), depth + 1)
        elif major in (_ARRAY, _MAP) or value == _INDEFINITE:
            left = value * (2 if major == _MAP and value > 0 else 1)
            while left:
                inner = yield from self._head()
                if value == _INDEFINITE and inner == (_SIMPLE, _BREAK):
                    break
                yield from self._item(inner, depth + 1)
                left -= 1 if left > 0 else 0
