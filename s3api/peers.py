"""Requests of other nodes on the S3 port: stored bytes that this node holds, second copies of what others receive.

In: requests below ``/-/`` (no bucket can have that name) that say they are signed by a node. Out: answers, S3's XML for
refusals. Always holds: nothing is done for a request whose signature is not of this cluster's key, and no key pair of a user
is good for one; a copy that did not arrive whole is dropped.

- ``GET /-/object/<object id>`` with Range: those bytes of the version, as far as they lie here.
- ``PUT /-/mirror/<object id>``: store the body, hold it, and say what was stored.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

import msgspec

from ingest.cluster import peer
from ingest.cluster.holdings import Holdings, NotHere
from ingest.cluster.peer import MirrorOf
from ingest.cluster.signing import BadPeerSignature, PeerKey, is_signed
from ingest.errors import StaleVersion
from ingest.records import LifetimeClass
from s3api.errors import S3Error
from s3api.http.message import FileBody, Request, Response

_PLACE = re.compile(rf"{re.escape(peer.PREFIX)}(object|mirror)/([0-9a-f]{{32}})")
_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{1,19})")
OPERATIONS = {("GET", "object"): "NodeRead", ("PUT", "mirror"): "NodeMirror"}


class PeerService:
    """One worker's side of the data plane between nodes. ``clock``: seconds since the epoch; signatures are judged by it."""

    def __init__(self, holdings: Holdings, key: PeerKey, clock: Callable[[], float] = time.time) -> None:
        self._holdings = holdings
        self._key = key
        self._clock = clock

    @staticmethod
    def takes(request: Request) -> bool:
        """Does the request claim to come from a node? All others are S3's, whatever their path."""
        return request.path.startswith(peer.PREFIX) and is_signed(request.headers.get("authorization"))

    async def __call__(self, request: Request) -> Response:
        """Raises S3Error, IngestError, HttpError."""
        fields = [(name, value) for name, value in request.headers.fields if name != "authorization"]
        try:
            self._key.verify(
                request.headers.get("authorization"), request.method, request.target, fields, self._clock()
            )
        except BadPeerSignature as error:
            raise S3Error("SignatureDoesNotMatch", str(error)) from None
        place = _PLACE.fullmatch(request.path)
        operation = OPERATIONS.get((request.method, place[1])) if place is not None else None
        if place is None or operation is None:
            raise S3Error("MethodNotAllowed")
        request.scope["operation"] = operation
        request.scope["user"] = "node"
        object_id = bytes.fromhex(place[2])
        return await (self._read(request, object_id) if operation == "NodeRead" else self._mirror(request, object_id))

    async def _read(self, request: Request, object_id: bytes) -> Response:
        headers = request.headers
        span = _RANGE.fullmatch(headers.get("range"))
        if span is None or int(span[2]) < int(span[1]):
            raise S3Error("InvalidRange")
        start, stop = int(span[1]), int(span[2]) + 1
        try:
            named = headers.get(peer.OBJECT_FIELD)
            base, extents = peer.decode_extents(named, self._holdings.node) if named else (0, ())
        except ValueError as error:
            raise S3Error("InvalidArgument", f"{peer.OBJECT_FIELD}: {error}") from None
        settle = headers.get(peer.SETTLE_FIELD) == "1"
        try:
            reader = await self._holdings.open(object_id, start, stop, base, extents, settle=settle)
        except NotHere as error:
            raise S3Error("NoSuchKey", str(error)) from None
        return Response(206, [], FileBody.of(reader, stop - start))

    async def _mirror(self, request: Request, object_id: bytes) -> Response:
        body = _described(request, object_id)
        stream = self._holdings.receive(body)
        request.body.patient = True
        stream.sender = request.body
        try:
            await request.body.into(stream)
            digest = await stream.finish()
            answer = await self._holdings.keep(stream, digest)
        except StaleVersion as error:
            await stream.abort()
            raise S3Error("NoSuchKey", str(error)) from None
        except BaseException:
            await stream.abort()
            raise
        return Response(200, [("content-type", "application/json")], msgspec.json.encode(answer))


def _described(request: Request, object_id: bytes) -> MirrorOf:
    headers = request.headers
    try:
        return MirrorOf(
            object_id,
            headers[peer.BUCKET_FIELD],
            unquote_to_bytes(headers[peer.KEY_FIELD]),
            request.body.length,
            LifetimeClass(headers[peer.LIFETIME_FIELD]),
        )
    except (KeyError, ValueError):
        raise S3Error("InvalidArgument", "a copy comes with its bucket, key and lifetime") from None
