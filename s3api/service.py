"""The S3 API as one handler: request id, route, authenticate, authorise, run, render errors; then count and log.

Upstream: ``s3api.http.Server`` calls it with a Request and sends its Response; ``observe`` hears how the answer went,
``render_error`` words what never became a request. Downstream: the operations of s3api/routes.py.
Always holds: an operation runs only for a verified, authorised user; no exception but a vanished peer leaves the handler; no
secret, signature or traceback reaches an answer or a log line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ingest.counters import ERROR_CLASSES, S3_OPERATIONS, Counters
from ingest.errors import IngestError, NoSuchBucket, NoSuchKey
from ingest.origin import ORIGIN, Origin
from ingest.ports import FrameHost
from ingest.stream_types import DataPlane
from s3api import cors
from s3api.auth import sigv2
from s3api.auth.actions import OF_VERSIONS
from s3api.auth.authenticate import Authenticator
from s3api.auth.rules import Gate
from s3api.auth.signed import ANYBODY
from s3api.auth.users import UserDirectory
from s3api.call import READS, Buckets, Call, Node, ServiceSettings
from s3api.errors import S3Error, render, translated
from s3api.http.message import HttpError, Request, Response
from s3api.operations.ownership import prepare_write
from s3api.peers import PeerService
from s3api.routes import Level, Route, Target, route, target_of

_log = logging.getLogger(__name__)
_access_log = logging.getLogger("s3api.access")


class S3Service:
    """One worker's S3. ``clock`` gives seconds since the epoch; signatures are judged by it. ``peers`` takes what other nodes
    of the cluster send."""

    def __init__(
        self,
        data: DataPlane,
        users: UserDirectory,
        counters: Counters,
        settings: ServiceSettings | None = None,
        kernels: FrameHost | None = None,
        clock: Callable[[], float] = time.time,
        peers: PeerService | None = None,
    ) -> None:
        self._peers = peers
        self._settings = settings or ServiceSettings()
        self._clock = clock
        region = "" if self._settings.any_region else self._settings.region
        self.authenticator = Authenticator(users, region=region, allow_sigv2=self._settings.allow_sigv2)
        gate = Gate(data.catalog, self._settings.access)
        self._node = Node(data, Buckets(data.catalog), self._settings, users, gate, self.authenticator, clock, kernels)
        self._requests = {name: counters.cell("hiss_http_requests_total", name) for name in S3_OPERATIONS}
        self._seconds = {name: counters.histogram("hiss_http_request_seconds", name) for name in S3_OPERATIONS}
        self._errors = {name: counters.cell("hiss_http_errors_total", name) for name in ERROR_CLASSES}

    async def __call__(self, request: Request) -> Response:
        user_id = ""
        try:
            if self._peers is not None and self._peers.takes(request):
                return self._named(request, await self._peers(request))
            target = target_of(request, self._settings.domains, self._settings.limits.key_bytes)
            if request.method == "OPTIONS":
                return self._named(request, Response(200, await self._preflight(request, target)))
            row = route(request, target.level)
            request.scope["operation"] = row.name
            virtual = target.bucket if target.virtual else ""
            signed = ANYBODY if row.own_signature else await self.authenticator.verify(request, virtual, self._clock())
            if signed.sigv2 and signed.presigned:
                sigv2.refuse_unsigned(row.query)
            call = Call(request, self._node, signed, target.bucket, target.key)
            user_id = request.scope["user"] = call.user.user_id
            if not row.own_signature:
                await _authorise(call, row, target)
            if row.stores:
                self._node.data.admit()
            if row.action == "s3:PutObject" and not row.own_signature:
                await prepare_write(call, request.headers)
            await self._tell_origin(call, row)
            response = await _answered(call, row)
        except ConnectionResetError:
            raise
        except Exception as error:
            response = self._refused(request, error, user_id)
        if "origin" in request.headers and request.method != "OPTIONS":
            response.headers += await self._cors(request)
        return self._named(request, response)

    def _named(self, request: Request, response: Response) -> Response:
        response.headers += (("x-amz-request-id", request.request_id), ("x-amz-id-2", self._settings.host_id))
        return response

    async def _preflight(self, request: Request, target: Target) -> list[tuple[str, str]]:
        """What a browser asks before a request to another origin; nobody signs it."""
        request.scope["operation"] = "Preflight"
        try:
            bucket, _ = await self._node.buckets.get(target.bucket)
        except NoSuchBucket:
            raise S3Error("AccessForbidden", "CORSResponse: Bucket not found") from None
        return cors.preflight(cors.RULES.of(bucket), request.headers, target.level.name)

    async def _cors(self, request: Request) -> list[tuple[str, str]]:
        """Headers of the answer to a browser's request, refusals too: else its page could not even see the error."""
        try:
            target = target_of(request, self._settings.domains, self._settings.limits.key_bytes)
            bucket, _ = await self._node.buckets.get(target.bucket)
        except (S3Error, IngestError):
            return []
        return cors.actual(cors.RULES.of(bucket), request.method, request.headers)

    async def _tell_origin(self, call: Call, row: Route) -> None:
        """Where the bucket reports events: whose request this is."""
        if not call.bucket_name:
            return
        try:
            bucket, _ = await self._node.buckets.get(call.bucket_name)
        except IngestError:
            return  # the operation will say so
        if "notification" in bucket.documents or row.name.endswith("NotificationConfiguration"):
            method = {"CopyObject": "Copy", "PostObject": "Post"}.get(row.name, "Put")
            origin = Origin(
                call.user.user_id, call.request.peer_address, call.request.request_id, self._settings.host_id, method
            )
            ORIGIN.set(origin)

    def _refused(self, request: Request, error: Exception, user_id: str) -> Response:
        refusal = translated(error, user_id=user_id)
        if refusal.kind == "server":
            # The cause stays here, under the id that the client was given.
            _log.error("request %s: %s %s", request.request_id, request.method, request.path, exc_info=error)
        request.scope["error_class"] = refusal.kind
        request.scope["error_code"] = refusal.code
        return self._rendered(refusal, request.path, request.request_id)

    def _rendered(self, refusal: S3Error, resource: str, request_id: str) -> Response:
        headers, body = render(refusal, resource=resource, request_id=request_id, host_id=self._settings.host_id)
        return Response(refusal.status, headers, body, close=refusal.close)

    def render_error(self, request: Request | None, error: HttpError) -> Response:
        """The answer to what the connection refused by itself; for ``Server(render_error=…)``."""
        refusal = translated(error)
        if request is None:
            return self._rendered(refusal, "", "")
        request.scope["error_class"] = refusal.kind
        return self._rendered(refusal, request.path, request.request_id)

    def observe(self, request: Request, status: int, sent_bytes: int, elapsed_ns: int) -> None:
        """Count and log one answered request; for ``Server(observe=…)``. ``status`` 0: the peer left before."""
        name = str(request.scope.get("operation", "Other"))
        counted = name if name in self._requests else "Other"
        self._requests[counted].add()
        self._seconds[counted].observe(elapsed_ns / 1e9)
        error_class = request.scope.get("error_class")
        if error_class is not None:
            self._errors[str(error_class)].add()
        if _access_log.isEnabledFor(logging.INFO):
            _access_log.info(
                "%s %s %s %s %d %s received=%s sent=%d ms=%.1f id=%s",
                request.peer,
                request.scope.get("user", "-"),
                name,
                request.path,
                status,
                request.scope.get("error_code", "-"),
                request.headers.get("x-amz-decoded-content-length") or request.headers.get("content-length", "-"),
                sent_bytes,
                elapsed_ns / 1e6,
                request.request_id,
            )


async def _authorise(call: Call, row: Route, target: Target) -> None:
    """Raises AccessDenied, or NoSuchBucket for a bucket that is not there."""
    versioned = call.request.arg("versionId") is not None
    action = OF_VERSIONS.get(row.action, row.action) if versioned else row.action
    listed = (call.request.arg("prefix") or "").encode() if target.level is Level.BUCKET else target.key
    await call.authorise(action, target.bucket, listed, row.over)


async def _answered(call: Call, row: Route) -> Response:
    """Run the operation. Who may not list a bucket does not learn which keys are not in it."""
    try:
        return await row.run(call)
    except (NoSuchKey, S3Error) as error:
        missing = isinstance(error, NoSuchKey) or error.code in ("NoSuchKey", "NoSuchVersion")
        if missing and row.action in READS and not await call.may("s3:ListBucket", call.bucket_name, call.key):
            raise S3Error("AccessDenied") from None
        raise
