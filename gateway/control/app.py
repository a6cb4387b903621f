"""The routes of the control port, and nothing else: each parses its parameters, asks one module and shapes the answer.

In: ``ControlContext``, put together by the composition root. Out: a FastAPI application. Errors are JSON with a
``detail``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Header, HTTPException, Query
from fastapi import Path as FastPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from archive.dav.auth import Authenticator
from gateway.control import reservations
from gateway.control.auth import User, require_operator, require_read, require_write, signed_in
from gateway.control.elsewhere import Elsewhere
from gateway.control.feedback import websocket
from gateway.control.feedback.director import ActionDirector
from gateway.control.feedback.hub import FeedbackHub, TooManySubscribers
from gateway.control.feedback.peers import PATH
from gateway.control.feedback.ring import ID_BYTES_MAX, Filter
from gateway.control.feedback.sse import SSE
from gateway.control.feedback.websocket import WEBSOCKET
from gateway.control.health import HealthCheck, health
from gateway.control.kernels import kernels, notices_in
from gateway.control.nodes import Changed, NodeList, NodeSource
from gateway.control.paces import KernelPaces
from gateway.control.run_list import RUNS_MAX, close_run, list_runs
from gateway.control.runs import run_status
from gateway.control.status import StatusSource
from gateway.metrics import Exposition
from ingest.cluster.signing import BadPeerSignature, PeerKey
from ingest.errors import (
    BadReservation,
    DoesNotFit,
    IngestError,
    NoSuchBucket,
    NoSuchKey,
    NoSuchReservation,
    ReservationEnded,
)
from ingest.ports import Catalog
from ingest.records import NodeState, Offer, UserRecord
from kernels.notices import Notice
from s3api.auth.sight import UserSight
from s3api.http.message import Request

_Bucket = Annotated[str, Query(min_length=3, max_length=63, description="Name of the bucket.")]
_Prefix = Annotated[str, Query(max_length=1024, description="Key prefix, e.g. a run with its closing slash.")]
_Kernel = Annotated[str, Query(max_length=256, description="Only this kernel's events.")]
_Sent = Annotated[int | None, Query(ge=0, description="What the sender knows it has sent.")]


_Node = Annotated[str, FastPath(max_length=64, description="A node's number or name.")]
_EventId = Annotated[str, Header(max_length=ID_BYTES_MAX)]
_TOO_MANY = "too many feedback streams are open"


@dataclasses.dataclass(frozen=True, slots=True)
class ControlContext:
    """What the application needs of the node."""

    version: str
    catalog: Catalog
    authenticate: Authenticator
    sight_of: Callable[[UserRecord, Request], UserSight]
    check: HealthCheck
    status: StatusSource
    nodes: NodeSource
    metrics: Exposition
    feedback: FeedbackHub
    run_folder: Path
    """Where the node's processes say how they are."""
    actions: ActionDirector
    offers: Callable[[], Sequence[Offer]]
    """What each node has to be reserved."""
    paces: KernelPaces
    elsewhere: Elsewhere = dataclasses.field(default_factory=Elsewhere)
    peers: PeerKey | None = None
    """On a node of a cluster: what its nodes sign their requests with."""


def create_app(context: ControlContext) -> FastAPI:
    # The documentation pages load scripts from elsewhere: a beamline network has no way there.
    app = FastAPI(title="HISS control API", version=context.version, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.context = context
    app.add_exception_handler(IngestError, _ingest_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_open_routes(app, context)
    _add_node_routes(app, context)
    _add_member_routes(app, context)
    _add_bucket_routes(app, context)
    _add_feedback_routes(app, context)
    _add_reservation_routes(app, context)
    if context.peers is not None:
        _add_peer_routes(app, context.peers)
    return app


async def _invalid(_: HTTPConnection, error: Exception) -> Response:
    """What is wrong and where; not what was sent, which may be what JSON cannot say (NaN, half a surrogate pair)."""
    assert isinstance(error, RequestValidationError)

    def text(value: object) -> str:
        return str(value).encode(errors="replace").decode()

    found = [
        {"type": one["type"], "loc": [text(part) for part in one["loc"]], "msg": text(one["msg"])}
        for one in error.errors()
    ]
    return JSONResponse({"detail": found}, 422)


async def _ingest_error(_: HTTPConnection, error: Exception) -> Response:
    if isinstance(error, NoSuchBucket):
        return JSONResponse({"detail": "there is no such bucket"}, 404)
    if isinstance(error, NoSuchReservation):
        return JSONResponse({"detail": "there is no such reservation"}, 404)
    if isinstance(error, BadReservation):
        return JSONResponse({"detail": str(error)}, 422)
    if isinstance(error, DoesNotFit | ReservationEnded):
        return JSONResponse({"detail": str(error)}, 409)
    return JSONResponse({"detail": "the catalogue does not answer; try again"}, 503, {"Retry-After": "2"})


def _add_open_routes(app: FastAPI, context: ControlContext) -> None:
    @app.api_route("/v1/health", methods=["GET", "HEAD"], include_in_schema=False)
    async def get_health(
        wanted: Annotated[
            Literal["read", "write"],
            Query(alias="for", description="write: 503, too, while the node serves and takes no bodies."),
        ] = "read",
    ) -> JSONResponse:
        status, document = await health(context.check, for_write=wanted == "write")
        return JSONResponse(document, status, {"Cache-Control": "no-store"})

    @app.get("/metrics", response_class=Response, summary="Prometheus exposition")
    async def get_metrics(accept: Annotated[str, Header()] = "") -> Response:
        # In a thread: several milliseconds that no subscriber of feedback should wait for.
        body, content_type = await asyncio.to_thread(context.metrics.render, accept)
        return Response(body, headers={"Content-Type": content_type})

    app.add_api_route("/v1/health", get_health, methods=["GET"], summary="200 once the node serves")


def _add_node_routes(app: FastAPI, context: ControlContext) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(_: User) -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/v1/status", summary="The node in numbers")
    async def get_status(_: User) -> dict[str, Any]:
        return await context.status.document()


def _add_member_routes(app: FastAPI, context: ControlContext) -> None:
    @app.get("/v1/nodes", summary="The nodes of the cluster: state, load, room")
    async def get_nodes(_: User) -> NodeList:
        return await context.nodes.listing()

    @app.get("/v1/nodes/{node}", summary="What a node still has to drain, and what exists only there")
    async def get_node(_: User, node: _Node) -> Changed:
        return await context.nodes.held(node)

    @app.post("/v1/nodes/{node}/drain", summary="Empty a node: it takes no new bodies and archives all it holds")
    async def post_drain(user: User, node: _Node) -> Changed:
        return await context.nodes.set_state(user, node, NodeState.DRAINING)

    @app.post("/v1/nodes/{node}/undrain", summary="Let a node take bodies again")
    async def post_undrain(user: User, node: _Node) -> Changed:
        return await context.nodes.set_state(user, node, NodeState.UP)

    @app.post("/v1/nodes/{node}/remove", summary="Let a node leave the cluster for good")
    async def post_remove(
        user: User,
        node: _Node,
        force: Annotated[bool, Query(description="Although it holds what exists nowhere else: that is lost.")] = False,
    ) -> Changed:
        return await context.nodes.set_state(user, node, NodeState.REMOVED, force=force)


def _add_bucket_routes(app: FastAPI, context: ControlContext) -> None:
    @app.get("/v1/runs/status", response_class=Response, summary="May the detector be cleared?")
    async def get_run(
        user: User, bucket: _Bucket, prefix: _Prefix = "", expect_objects: _Sent = None, expect_bytes: _Sent = None
    ) -> Response:
        await require_read(user, bucket, prefix.encode())
        status = await run_status(
            context.catalog,
            bucket,
            prefix.encode(),
            expect_objects=expect_objects,
            expect_bytes=expect_bytes,
            notices=await _all_notices(context),
            waiting=await context.elsewhere.waiting(context.catalog, bucket, prefix.encode()),
        )
        return Response(msgspec.json.encode(status), media_type="application/json")

    @app.get("/v1/runs", response_class=Response, summary="The runs of a bucket and their products")
    async def get_runs(
        user: User,
        bucket: _Bucket,
        prefix: _Prefix = "",
        after: _Prefix = "",
        limit: Annotated[int, Query(ge=1, le=RUNS_MAX)] = 100,
    ) -> Response:
        await require_read(user, bucket, prefix.encode())
        runs = await list_runs(context.catalog, bucket, prefix.encode(), after.encode(), limit, context.elsewhere)
        return Response(msgspec.json.encode(runs), media_type="application/json")

    @app.post("/v1/runs/close", response_class=Response, summary="Close a run: its product becomes final")
    async def post_close(user: User, bucket: _Bucket, prefix: _Prefix) -> Response:
        await require_write(user, bucket, prefix.encode())
        if prefix and not prefix.endswith("/"):
            raise HTTPException(422, f"a run is a prefix up to its last slash: {prefix}/")
        try:
            run = await close_run(context.catalog, bucket, prefix.encode(), context.elsewhere)
        except NoSuchKey:
            raise HTTPException(404, f"no object with a kernel has arrived under {prefix!r}") from None
        return Response(msgspec.json.encode(run), media_type="application/json")

    @app.get("/v1/kernels", response_class=Response, summary="Kernels submitted to a bucket")
    async def get_kernels(user: User, bucket: _Bucket) -> Response:
        await require_read(user, bucket, b"_kernels/")
        return Response(
            msgspec.json.encode(
                await kernels(context.catalog, bucket, context.run_folder, context.elsewhere, context.paces)
            ),
            media_type="application/json",
        )


def _add_feedback_routes(app: FastAPI, context: ControlContext) -> None:
    @app.get("/v1/feedback", response_class=StreamingResponse, summary="Kernel feedback as server-sent events")
    async def get_feedback(
        user: User,
        bucket: _Bucket,
        kernel: _Kernel = "",
        key_prefix: _Prefix = "",
        last_event_id: _EventId = "",
    ) -> StreamingResponse:
        await require_read(user, bucket, key_prefix.encode())
        await context.catalog.bucket(bucket)
        wanted = Filter(kernel, key_prefix.encode())
        try:
            events = context.feedback.subscribe(bucket, wanted, SSE, last_event_id=last_event_id)
        except TooManySubscribers:
            raise HTTPException(503, _TOO_MANY, {"Retry-After": "5"}) from None
        # Proxies that would collect events into larger answers are asked not to.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    @app.websocket("/v1/feedback")
    async def follow_feedback(
        socket: WebSocket,
        bucket: _Bucket,
        kernel: _Kernel = "",
        key_prefix: _Prefix = "",
        last_event_id: Annotated[str, Query(max_length=ID_BYTES_MAX)] = "",
    ) -> None:
        try:
            user = await signed_in(socket, websocket.credentials(socket.headers, socket.scope["subprotocols"]))
            await require_read(user, bucket, key_prefix.encode())
            await context.catalog.bucket(bucket)
            wanted = Filter(kernel, key_prefix.encode())
            events = context.feedback.subscribe(bucket, wanted, WEBSOCKET, last_event_id=last_event_id)
        except HTTPException as refusal:
            await refuse(socket, JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers))
        except IngestError as error:
            await refuse(socket, await _ingest_error(socket, error))
        except TooManySubscribers:
            await refuse(socket, JSONResponse({"detail": _TOO_MANY}, 503, {"Retry-After": "5"}))
        else:
            await websocket.pump(socket, events)

    @app.get("/v1/feedback/actions", summary="Named actions of a bucket, and what became of their values")
    async def get_actions(user: User, bucket: _Bucket) -> dict[str, Any]:
        await require_read(user, bucket)
        await context.catalog.bucket(bucket)
        return {"actions": await context.actions.document(bucket), "bridges": context.actions.bridges()}


def _add_peer_routes(app: FastAPI, key: PeerKey) -> None:
    """For the other nodes of a cluster only."""

    @app.websocket(PATH)
    async def follow_node(socket: WebSocket, source: str = "", after: int = 0) -> None:
        context: ControlContext = app.state.context
        target = f"{socket.scope['path']}?{socket.scope['query_string'].decode('latin-1')}"
        try:
            key.verify(socket.headers.get("authorization", ""), "GET", target, [], time.time())
        except BadPeerSignature as error:
            await refuse(socket, JSONResponse({"detail": str(error)}, 403))
            return
        exchange = context.feedback.exchange
        assert exchange is not None
        await websocket.pump(socket, exchange.follow(source, after), binary=True)


async def _all_notices(context: ControlContext) -> list[Notice]:
    """Of the workers of all nodes."""
    here = await notices_in(context.run_folder)
    return here + [notice for said in context.elsewhere.kernels().values() for notice in said.notices]


async def refuse(socket: WebSocket, answer: Response) -> None:
    """Answer a handshake with an ordinary HTTP error (ASGI's websocket.http.response extension)."""
    await socket.send_denial_response(answer)


def _add_reservation_routes(app: FastAPI, context: ControlContext) -> None:
    catalog, offers = context.catalog, context.offers

    @app.post("/v1/reservations", status_code=201, summary="Reserve capacity and rate for a bucket and a time")
    async def post_reservation(user: User, wanted: reservations.Wanted) -> reservations.Described:
        """409 says what would fit."""
        require_operator(user)
        return await reservations.reserve(catalog, offers(), user, wanted, context.paces)

    @app.get("/v1/reservations", summary="The calendar: reservations, and what is free when")
    async def get_reservations(
        user: User,
        bucket: Annotated[str, Query(max_length=63, description="Only of this bucket.")] = "",
        ended: Annotated[bool, Query(description="Those that have ended, too.")] = False,
    ) -> reservations.Calendar:
        """Whose a slot is says the calendar only to those who may read the bucket."""
        return await reservations.calendar(catalog, offers(), user, bucket=bucket, ended=ended)

    @app.get("/v1/reservations/{reservation_id}", summary="One reservation and what is used of it")
    async def get_reservation(user: User, reservation_id: str) -> reservations.Described:
        return await reservations.one(catalog, user, reservation_id, context.paces)

    @app.post("/v1/reservations/{reservation_id}/extend", summary="A later end, if the nodes are free until then")
    async def post_extend(user: User, reservation_id: str, until: reservations.Until) -> reservations.Described:
        require_operator(user)
        return await reservations.extend(catalog, offers(), user, reservation_id, until, context.paces)

    @app.delete("/v1/reservations/{reservation_id}", summary="Release: what is left of it is free now")
    async def delete_reservation(user: User, reservation_id: str) -> reservations.Described:
        require_operator(user)
        return await reservations.release(catalog, user, reservation_id, context.paces)
