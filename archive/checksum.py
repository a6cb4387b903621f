"""Running CRC64NVME over memory, the checksum every version carries from its PUT to its archive copy.

In: memoryviews in order. Out: the checksum as S3 defines it (unsigned 64 bit; ``x-amz-checksum-crc64nvme`` is its
big-endian base64). Nothing is copied. https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

from awscrt import checksums


class Crc64:
    """``value`` and ``length`` (bytes) of everything passed to ``update`` so far."""

    __slots__ = ("length", "value")

    def __init__(self) -> None:
        self.value = 0
        self.length = 0

    def update(self, view: memoryview) -> None:
        self.value = checksums.crc64nvme(view, self.value)
        self.length += len(view)
