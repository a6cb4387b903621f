"""Keys the gateway gives a meaning to: ``_kernels/NAME.py`` and its arrays ``_kernels/NAME/ARRAY.npy`` are checked before they
are stored, ``_products/`` is written by kernels alone.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html with one more answer: 400 InvalidKernel, whose message
is ``file:line: reason``.
"""

from __future__ import annotations

import re

from ingest.ports import BodySink
from s3api.call import KERNELS_PREFIX, PRODUCTS_PREFIX, Call
from s3api.errors import S3Error

_NAME = re.compile(rb"_kernels/([A-Za-z_][A-Za-z0-9_-]{0,63})\.py\Z")
_ARRAY = re.compile(rb"_kernels/([A-Za-z_][A-Za-z0-9_-]{0,63})/([A-Za-z][A-Za-z0-9_]{0,63})\.npy\Z")
ARRAY_HEAD_BYTES = 1 << 16
"""The first bytes of an array's file, which say what is in it."""


def array_name(key: bytes) -> tuple[str, str] | None:
    """(kernel, array) of ``_kernels/KERNEL/ARRAY.npy``; None for any other key."""
    found = _ARRAY.match(key)
    return (found[1].decode("ascii"), found[2].decode("ascii")) if found else None


def kernel_name(key: bytes) -> str | None:
    """``hits`` of ``_kernels/hits.py``. None for an ordinary key and for an array; InvalidKernel for any other name under
    ``_kernels/``, AccessDenied for products."""
    if key.startswith(PRODUCTS_PREFIX):
        raise S3Error(
            "AccessDenied", "Objects under _products/ are written by kernels; clients may read and delete them"
        )
    if not key.startswith(KERNELS_PREFIX) or array_name(key) is not None:
        return None
    found = _NAME.match(key)
    if found is None:
        raise S3Error(
            "InvalidKernel",
            "Under _kernels/ only NAME.py and its parameter arrays NAME/ARRAY.npy are stored; a name is a letter and up to 63"
            " more letters, digits or _ (a kernel's also -)",
        )
    return found[1].decode("ascii")


def refuse_reserved(key: bytes) -> None:
    """For writes that cannot be a kernel's submission, such as a multipart upload."""
    if kernel_name(key) is not None:
        raise S3Error("InvalidKernel", "Submit a kernel with one PutObject, so that it can be checked")


async def check(call: Call, name: str, source: bytes, metadata: dict[str, str]) -> None:
    """Gate and compile. Raises KernelRefused."""
    if call.node.kernels is None:
        raise S3Error("NotImplemented", "Kernels are switched off on this node")
    await call.node.kernels.check(call.bucket_name, name, source, metadata)


async def check_array(call: Call, array: tuple[str, str], head: bytes, length: int) -> None:
    """A .npy file that the kernel can take. Raises KernelRefused."""
    if call.node.kernels is None:
        raise S3Error("NotImplemented", "Kernels are switched off on this node")
    await call.node.kernels.check_array(call.bucket_name, *array, head, length)


class HeadKept:
    """A sink that passes everything on and remembers the first ``ARRAY_HEAD_BYTES``."""

    def __init__(self, sink: BodySink) -> None:
        self.head = bytearray()
        self._sink = sink
        self._view: memoryview | None = None

    def get_buffer(self) -> memoryview | None:
        self._view = self._sink.get_buffer()
        return self._view

    def received(self, count: int) -> None:
        assert self._view is not None
        self.head += self._view[: min(count, ARRAY_HEAD_BYTES - len(self.head))]
        self._view = None
        self._sink.received(count)

    async def writable(self) -> None:
        await self._sink.writable()
