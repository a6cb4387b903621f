"""What goes wrong on the WebDAV port and what the client is told: one table from exceptions to status and words.

In: exceptions of the buffer, of the catalogue, of WsgiDAV and of reading a request. Out: ``Response``s with a line of
text, or with the ``D:error`` body that RFC 4918 section 16 names for the condition.
"""

from __future__ import annotations

import logging
from http import HTTPStatus

from wsgidav.dav_error import DAVError

from archive.dav.paths import BadPath
from ingest import errors
from s3api.http.message import HttpError, Response

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 30
ALLOWED = "OPTIONS, GET, HEAD, PROPFIND"
READ_ONLY = "WebDAV is read-only on this gateway: write over S3 and the object appears here at once."

_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (BadPath, 404, "Nothing has this name: {error}."),
    (errors.NoSuchKey, 404, "There is no such object."),
    (errors.NoSuchBucket, 404, "There is no such bucket."),
    (errors.StaleVersion, 503, "The object is being replaced; try again."),
    (errors.ObjectOffline, 503, "Offline: {error}."),
    (errors.BufferFull, 503, "The buffer has no room to recall this object; try again later."),
    (errors.NodeAway, 503, "These bytes cannot be had at the moment: {error}."),
    (errors.CatalogUnavailable, 503, "The catalogue does not answer; try again."),
    (errors.StorageFailed, 503, "The node's disk fails; try again."),
    (TimeoutError, 503, "The catalogue did not answer in time; try again."),
    (errors.Unreadable, 503, "These bytes cannot be read at the moment; try again."),
    (errors.DataLost, 500, "The stored bytes cannot be read back; the node's log names them."),
)


def text_response(status: int, message: str, headers: list[tuple[str, str]] | None = None) -> Response:
    """A line of text; 405 names what is allowed (RFC 9110 section 15.5.6), 503 when to come back."""
    fields = [("Content-Type", "text/plain; charset=utf-8"), *(headers or [])]
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        fields.append(("Allow", ALLOWED))
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        fields.append(("Retry-After", str(RETRY_AFTER_S)))
    return Response(status, fields, f"{status} {HTTPStatus(status).phrase}: {message}\n".encode())


def render(error: Exception) -> Response:
    """The answer to a failed request. What is not in the table is our fault: logged with its trace, 500 without it."""
    if isinstance(error, DAVError):
        return _render_dav(error)
    if isinstance(error, HttpError):
        response = text_response(error.status, error.message)
        response.close = error.close
        return response
    for kind, status, message in _TABLE:
        if isinstance(error, kind):
            if status == HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.error("WebDAV: stored bytes are lost: %s", error)
            return text_response(status, message.format(error=error))
    logger.error("WebDAV request failed", exc_info=error)
    return text_response(500, "The gateway failed to answer; its log says why.")


def _render_dav(error: DAVError) -> Response:
    if error.err_condition is not None:
        condition = error.err_condition.as_string().encode()
        return Response(error.value, [("Content-Type", "application/xml; charset=utf-8")], condition)
    if error.value >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("WsgiDAV failed", exc_info=error.src_exception or error)
        return text_response(error.value, "The gateway failed to answer; its log says why.")
    return text_response(error.value, str(error.context_info or HTTPStatus(error.value).description))
