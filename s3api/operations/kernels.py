"""Keys the gateway gives a meaning to: ``_kernels/NAME.py`` is checked before it is stored, ``_products/`` is written
by kernels alone.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html with one more answer: 400 InvalidKernel, whose message
is ``file:line: reason``.
"""

from __future__ import annotations

import re

from s3api.call import KERNELS_PREFIX, PRODUCTS_PREFIX, Call
from s3api.errors import S3Error

_NAME = re.compile(rb"_kernels/([A-Za-z_][A-Za-z0-9_-]{0,63})\.py\Z")


def kernel_name(key: bytes) -> str | None:
    """``hits`` of ``_kernels/hits.py``. None for an ordinary key; InvalidKernel for any other name under ``_kernels/``,
    AccessDenied for products."""
    if key.startswith(PRODUCTS_PREFIX):
        raise S3Error(
            "AccessDenied", "Objects under _products/ are written by kernels; clients may read and delete them"
        )
    if not key.startswith(KERNELS_PREFIX):
        return None
    found = _NAME.match(key)
    if found is None:
        raise S3Error(
            "InvalidKernel",
            "Under _kernels/ only NAME.py is stored, NAME being a letter and up to 63 more letters, digits, _ or -",
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
