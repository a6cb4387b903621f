"""How any write gets its bytes in: open a stream, receive or copy, verify, commit; or abort and leave nothing.

Upstream: put, copy and multipart operations. Downstream: ``DataPlane.open_stream``.
Always holds: every stream that was opened ends in a commit or an abort; a body that does not verify is never committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from ingest.errors import PreconditionFailed
from ingest.landing import fill
from ingest.ports import BodySink
from ingest.records import CommitObject, LifetimeClass, ObjectRecord
from ingest.stream_types import BodyDigest, Stream, StreamDigest, StreamSpec
from s3api import checksums
from s3api.call import KERNELS_PREFIX, PRODUCTS_PREFIX, Call, Limits
from s3api.conditions import WriteCondition
from s3api.errors import S3Error
from s3api.integrity import BodyPlan, too_large

Result = TypeVar("Result")


def lifetime_of(key: bytes, length: int | None, limits: Limits) -> LifetimeClass:
    if key.startswith((KERNELS_PREFIX, PRODUCTS_PREFIX)):
        return LifetimeClass.PRODUCT
    if length is not None and length <= limits.small_object_bytes:
        return LifetimeClass.SMALL
    return LifetimeClass.STREAM


async def received(
    call: Call,
    spec: StreamSpec,
    plan: BodyPlan,
    commit: Callable[[Stream, StreamDigest, dict[str, str]], Awaitable[Result]],
    sink: Callable[[Stream], BodySink] = lambda stream: stream,
) -> Result:
    """Receive the request's body into a new stream and commit it. ``commit`` gets the stream, what it measured and the
    checksums to record. Raises whatever made it fail, after the stream was aborted.

    Where a kernel's STOP cut the body short, the client's checksums are compared with all that it sent, and those that are
    recorded are of what is stored; an answer before the body's end leaves nothing to compare."""
    stream = await _opened(call, spec)
    stream.sender = call.request.body
    try:
        whole = await _receive(call, stream, sink(stream))
        digest = await stream.finish()
        body = digest.whole or BodyDigest(digest.length, digest.crc64nvme, digest.digests)
        if body.length > call.limits.object_bytes:
            raise too_large(body.length, call.limits.object_bytes)
        verified = {"crc64nvme": checksums.crc64_base64(digest.crc64nvme)}
        if whole:
            verified = plan.verify(body.length, body.crc64nvme, body.digests, call.request.body.trailers)
        if digest.whole is not None:
            # A hash of what a cut changed (a header) is not known; CRC64NVME always is.
            known = [name for name in verified if name in digest.digests] or ["crc64nvme"]
            verified = {name: _value(digest, name) for name in known}
        return await commit(stream, digest, verified)
    except BaseException:
        await stream.abort()
        raise


async def _receive(call: Call, stream: Stream, sink: BodySink) -> bool:
    """Receive the body; False when the stream needs no more of it and the rest was left unread."""
    if stream.cut is None:
        await call.request.body.into(sink)
        return True
    receiving = asyncio.ensure_future(call.request.body.into(sink))
    cut = asyncio.ensure_future(stream.cut.wait())
    try:
        await asyncio.wait((receiving, cut), return_when=asyncio.FIRST_COMPLETED)
    finally:
        cut.cancel()
        whole = receiving.done()
        if not whole:
            receiving.cancel()
            await asyncio.wait((receiving,))
    if whole:
        await receiving
    return whole


def _value(digest: StreamDigest, name: str) -> str:
    return checksums.crc64_base64(digest.crc64nvme) if name == "crc64nvme" else checksums.encode(digest.digests[name])


async def stored(
    call: Call,
    spec: StreamSpec,
    chunks: AsyncIterator[memoryview],
    commit: Callable[[Stream, StreamDigest], Awaitable[Result]],
) -> Result:
    """As ``received``, for bytes that the node has already: a copy's source, a kernel that was checked."""
    stream = await _opened(call, spec)
    try:
        async for chunk in chunks:
            await fill(stream, chunk)
        return await commit(stream, await stream.finish())
    except BaseException:
        await stream.abort()
        raise


async def _opened(call: Call, spec: StreamSpec) -> Stream:
    if call.node.kernels is not None and not spec.part:
        await call.node.kernels.prepare(spec.bucket.name)
    stream = call.node.data.open_stream(spec)
    try:
        await stream.ready()
    except BaseException:
        await stream.abort()
        raise
    return stream


async def once(data: bytes) -> AsyncIterator[memoryview]:
    """Bytes in memory as the chunks ``stored`` takes."""
    if data:
        yield memoryview(data)


def etag_of(digest: StreamDigest) -> str:
    """MD5 where one was computed, else derived from CRC64NVME and length. A body that was cut short never gets an MD5:
    clients compare it with what they sent."""
    md5 = digest.digests.get("md5") if digest.whole is None else None
    return md5.hex() if md5 is not None else checksums.etag_from_crc64(digest.crc64nvme, digest.length)


async def committed(call: Call, stream: Stream, request: CommitObject, condition: WriteCondition) -> ObjectRecord:
    """Commit. A condition that held before the body and fails now lost a race: for If-Match that is
    ConditionalRequestConflict (try again with what is there now), for If-None-Match the object simply exists."""
    try:
        return await stream.commit(request)
    except PreconditionFailed as error:
        raise lost_race(condition, error) from None


def lost_race(condition: WriteCondition, error: PreconditionFailed) -> Exception:
    return S3Error("ConditionalRequestConflict") if condition.if_match else error
