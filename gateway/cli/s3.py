"""A small S3 client for commands: get, head, list, delete, put, each signed, retried a few times, with errors in one line.

In: a ``Node``. Out: bytes and headers, or ``CliError`` (``Missing`` for what is not there). Bodies are read whole, so
callers give a limit; large transfers go by ``stream``. Writing is gateway/cli/s3put.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes, urlsplit

from gateway.cli.node import Node
from gateway.cli.output import CliError, ExitCode
from gateway.cli.s3put import Answer, Connection, Place, SendFailed, Sent, delay_s, put_body, sign

if TYPE_CHECKING:
    import httpx

REGION = "us-east-1"
TIMEOUT_S = 120.0
ATTEMPTS = 4
BODY_BYTES_MAX = 256 << 20
ERROR_BYTES_MAX = 1 << 16
META_PREFIX = "x-amz-meta-"


class Missing(CliError):
    """There is no such bucket or object."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    """``headers`` lower-case. ``body`` is empty for a HEAD."""

    body: bytes
    headers: Mapping[str, str]

    @property
    def etag(self) -> str:
        return self.headers.get("etag", "").strip('"')

    @property
    def metadata(self) -> dict[str, str]:
        return {name[len(META_PREFIX) :]: value for name, value in self.headers.items() if name.startswith(META_PREFIX)}


class Streamed:
    """The answer to a GET whose body is not read yet. ``body`` raises OSError for one that is cut short."""

    def __init__(self, answer: httpx.Response) -> None:
        self._answer = answer
        self.headers = dict(answer.headers)

    @property
    def metadata(self) -> dict[str, str]:
        return Fetched(b"", self.headers).metadata

    def body(self, chunk_bytes: int) -> Iterator[bytes]:
        import httpx

        try:
            yield from self._answer.iter_raw(chunk_bytes)
        except httpx.TransportError as error:
            raise OSError(f"the transfer broke off: {error}") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    key: bytes
    size_bytes: int
    etag: str
    modified: str
    """ISO 8601, UTC: sorts by time."""


class S3:
    """Close it, or use it as a context manager."""

    def __init__(self, found: Node, region: str = REGION) -> None:
        import httpx

        if not found.s3_url:
            raise CliError("which node? give --endpoint URL, or --data DIR of a running node")
        self._node = found
        self._region = region
        self._authority = urlsplit(found.s3_url).netloc
        timeout = httpx.Timeout(TIMEOUT_S, connect=5.0)
        self._client = httpx.Client(base_url=found.s3_url, verify=found.tls or True, timeout=timeout)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> S3:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, bucket: str, key: bytes | str, *, most_bytes: int = BODY_BYTES_MAX) -> Fetched:
        """The whole object. Raises CliError for one of more than ``most_bytes``."""
        with self.stream(bucket, key) as answer:
            if int(answer.headers.get("content-length", "0")) > most_bytes:
                raise CliError(f"s3://{bucket}/{shown(key)}: is larger than the {most_bytes} bytes expected here")
            try:
                return Fetched(b"".join(answer.body(1 << 20)), answer.headers)
            except OSError as error:
                raise CliError(f"s3://{bucket}/{shown(key)}: {error}", ExitCode.NO_NODE) from None

    def head(self, bucket: str, key: bytes | str) -> Fetched:
        headers = {"x-amz-checksum-mode": "ENABLED"}
        with self._answered("HEAD", bucket, key, headers=headers) as answer:
            return Fetched(b"", dict(answer.headers))

    def delete(self, bucket: str, key: bytes | str) -> None:
        with self._answered("DELETE", bucket, key):
            return

    @contextlib.contextmanager
    def stream(self, bucket: str, key: bytes | str) -> Iterator[Streamed]:
        """The whole object, as it arrives."""
        with self._answered("GET", bucket, key) as answer:
            yield Streamed(answer)

    def list(self, bucket: str, prefix: str, *, most: int) -> list[Listed]:
        """Keys under ``prefix`` in bytewise order, at most ``most``."""
        return list(itertools.islice(self.walk(bucket, prefix), most))

    def walk(self, bucket: str, prefix: bytes | str) -> Iterator[Listed]:
        """All keys under ``prefix`` in bytewise order, a page at a time."""
        token = ""
        while True:
            arguments: dict[str, bytes | str] = {
                "encoding-type": "url",
                "list-type": "2",
                "max-keys": "1000",
                "prefix": prefix,
            }
            if token:
                arguments["continuation-token"] = token
            query = "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(arguments.items()))
            with self._answered("GET", bucket, "", query=query) as answer:
                rows, token = _listing(answer.read())
            yield from rows
            if not token:
                return

    def put(
        self,
        bucket: str,
        key: str,
        body: memoryview,
        metadata: Mapping[str, str],
        *,
        if_match: str = "",
        progress: Callable[[int], None] = lambda _: None,
    ) -> Sent:
        """Store ``body`` with its checksum confirmed. Raises SendFailed, with the refusal in its ``answer``."""
        connection = Connection(self._node.s3_url, self._node.tls, TIMEOUT_S)
        conditions = {"if-match": f'"{if_match}"'} if if_match else {}
        try:
            return put_body(
                connection, body, Place(bucket, key, self._region), self._node.keys,
                metadata=metadata, attempts=ATTEMPTS, conditions=conditions, progress=progress,
            )  # fmt: skip
        finally:
            connection.close()

    @contextlib.contextmanager
    def _answered(
        self, method: str, bucket: str, key: bytes | str, *, query: str = "", headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """An answer of 2xx; raises CliError for any other, after a few tries where trying again may help."""
        import httpx

        name = key if isinstance(key, bytes) else key.encode()
        path = f"/{quote(bucket)}/{quote(name, safe='/-_.~')}" if name else f"/{quote(bucket)}"
        for attempt in range(1, ATTEMPTS + 1):
            signed = sign(
                method, path, {"host": self._authority, **(headers or {})}, self._node.keys, self._region, query=query
            )
            request = self._client.build_request(method, path + (f"?{query}" if query else ""), headers=signed)
            try:
                answer = self._client.send(request, stream=True)
            except httpx.TransportError as error:
                if attempt == ATTEMPTS:
                    reason = str(error) or type(error).__name__
                    raise CliError(f"{self._node.s3_url} does not answer: {reason}", ExitCode.NO_NODE) from None
                time.sleep(delay_s(attempt, None))
                continue
            try:
                if answer.is_success:
                    yield answer
                    return
                refusal = _refusal(answer)
            finally:
                answer.close()
            if not refusal.retriable or attempt == ATTEMPTS:
                raise refused(f"s3://{bucket}/{shown(name)}", refusal)
            time.sleep(delay_s(attempt, refusal))


def refused(place: str, answer: Answer) -> CliError:
    """The error that a refusal means to the user."""
    if answer.status == 404:
        return Missing(f"{place}: is not there")
    if answer.status == 403 and not answer.body:
        return CliError(f"{place}: the credentials were refused")
    return CliError(f"{place}: {answer.status} {answer.code}: {answer.message}")


def of_send(error: SendFailed) -> CliError:
    """What a PUT that failed means to the user."""
    return CliError(str(error), ExitCode.USAGE if error.answer is not None else ExitCode.NO_NODE)


def _refusal(answer: httpx.Response) -> Answer:
    body = b""
    for chunk in answer.iter_bytes(ERROR_BYTES_MAX):
        body += chunk
        if len(body) >= ERROR_BYTES_MAX:
            break
    return Answer(answer.status_code, dict(answer.headers), body)


def _listing(document: bytes) -> tuple[list[Listed], str]:
    """(rows, continuation token or nothing) of a ListBucketResult with URL-encoded keys."""
    from defusedxml import ElementTree

    root = ElementTree.fromstring(document)
    space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""

    def text(parent: object, name: str) -> str:
        return str(parent.findtext(space + name) or "")  # type: ignore[attr-defined]

    rows = [
        Listed(
            unquote_to_bytes(text(one, "Key").replace("+", " ")),
            int(text(one, "Size")),
            text(one, "ETag").strip('"'),
            text(one, "LastModified"),
        )
        for one in root.findall(space + "Contents")
    ]
    return rows, text(root, "NextContinuationToken") if text(root, "IsTruncated") == "true" else ""


def shown(key: bytes | str) -> str:
    return key if isinstance(key, str) else key.decode("utf-8", "backslashreplace")
