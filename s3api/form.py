"""A browser's upload form (multipart/form-data, RFC 7578): its fields, then its file as a body that streams.

In: the body of a POST and its boundary. Out: the fields that come before the file, and a ``Body`` of the file's bytes, which goes
where any body goes. Everything before the file is bounded (AWS: 20 KB); the file passes through one scratch memory in which the
closing boundary is looked for, and from there into the sink; what comes behind the file is dropped.
https://docs.aws.amazon.com/AmazonS3/latest/API/RESTObjectPOST.html
"""

from __future__ import annotations

import asyncio
import re

from ingest.ports import BodySink
from s3api.errors import S3Error
from s3api.http.message import Body, ChunkVerifier, Headers

HEAD_BYTES_MAX = 20 * 1024
FIELDS_MAX = 200
_SCRATCH_BYTES = 256 * 1024
_PARAMETER = re.compile(r';\s*([A-Za-z0-9*_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;"\s]*))')


def boundary_of(content_type: str) -> bytes | None:
    """The boundary of a ``multipart/form-data`` content type (RFC 2046 section 5.1.1); None for any other."""
    kind = content_type.partition(";")[0].strip().lower()
    boundary = _parameters(content_type).get("boundary", "")
    if kind != "multipart/form-data" or not 1 <= len(boundary) <= 70:
        return None
    return boundary.encode("latin-1")


def _parameters(field: str) -> dict[str, str]:
    return {
        found[1].lower(): re.sub(r"\\(.)", r"\1", found[2]) if found[2] is not None else found[3]
        for found in _PARAMETER.finditer(field)
    }


class FormBody:
    """Implements ``message.Body`` for the file of a form. ``fields`` first, then ``into``; ``close`` in any case."""

    def __init__(self, body: Body, boundary: bytes) -> None:
        self._sink = _FormSink(boundary)
        self._body = body
        self._task: asyncio.Task[int] | None = None
        self.length: int | None = None
        self.patient = False
        self.least_bytes = 0
        self.most_bytes = 1 << 63

    async def fields(self) -> dict[str, str]:
        """Lower-case names; the file's own name is ``filename``, its type ``file-content-type``. Raises MalformedPOSTRequest,
        MaxPostPreDataLengthExceeded, and InvalidArgument where there is no file."""
        self._task = asyncio.ensure_future(self._body.into(self._sink))
        head = asyncio.ensure_future(self._sink.head.wait())
        await asyncio.wait((self._task, head), return_when=asyncio.FIRST_COMPLETED)
        head.cancel()
        if not self._sink.head.is_set():
            await self._task
            raise S3Error("InvalidArgument", "POST requires exactly one file upload per request.")
        return self._sink.fields

    def backlog(self) -> int:
        return self._body.backlog()

    def set_window(self, size_bytes: int) -> None:
        self._body.set_window(size_bytes)

    async def into(self, sink: BodySink) -> int:
        """Raises EntityTooSmall, EntityTooLarge by the form's policy, and whatever the body or the sink raises."""
        assert self._task is not None
        self._sink.attach(sink, self.most_bytes)
        await self._task
        await self._sink.writable()  # A small file has come as a whole before there was a sink.
        if not self._sink.closed:
            raise S3Error("MalformedPOSTRequest", "The body of your POST request ends before its closing boundary")
        if self._sink.file_bytes < self.least_bytes:
            fields = [("ProposedSize", str(self._sink.file_bytes)), ("MinSizeAllowed", str(self.least_bytes))]
            raise S3Error(
                "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size", fields=fields
            )
        return self._sink.file_bytes

    async def close(self) -> None:
        """Stop receiving what nobody will take; the connection then drops or closes by its own rules."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def read(self, limit_bytes: int) -> bytes:
        raise NotImplementedError("a form's file is never a control document")

    def unwrap_aws_chunked(
        self, decoded_length: int | None, signed: bool, trailer: bool, verifier: ChunkVerifier | None
    ) -> None:
        raise S3Error("InvalidRequest", "A form's file cannot be aws-chunked")

    @property
    def trailers(self) -> Headers:
        return Headers(())


class _FormSink:
    """Takes the whole body: fields into ``fields``, the file into the attached sink."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.head = asyncio.Event()
        self.closed = False
        """The closing boundary of the file has come."""
        self.file_bytes = 0
        self._opening = b"--" + boundary
        self._delimiter = b"\r\n--" + boundary
        self._data = bytearray(_SCRATCH_BYTES)
        self._start = 0  # of what is not parsed, or not yet in the sink
        self._safe = 0  # up to here: bytes of the file
        self._end = 0
        self._target: BodySink | None = None
        self._attached = asyncio.Event()
        self._most_bytes = 0

    def attach(self, sink: BodySink, most_bytes: int) -> None:
        self._target, self._most_bytes = sink, most_bytes
        self._scan()
        self._drain()
        self._attached.set()

    # -- BodySink

    def get_buffer(self) -> memoryview | None:
        if self.closed and self._start == self._safe:
            return memoryview(self._data)
        if not self.head.is_set():
            return memoryview(self._data)[self._end :]
        if self._target is None or self._start < self._safe:
            return None
        # What may still become a boundary moves to the front; it is shorter than one.
        held = self._end - self._start
        self._data[:held] = self._data[self._start : self._end]
        self._start, self._safe, self._end = 0, 0, held
        return memoryview(self._data)[held:]

    def received(self, count: int) -> None:
        if self.closed:
            return
        self._end += count
        if not self.head.is_set():
            self._parse_head()
            return
        self._scan()
        self._drain()

    async def writable(self) -> None:
        if self._target is None:
            await self._attached.wait()
        while self._start < self._safe:
            self._drain()
            if self._start < self._safe:
                assert self._target is not None
                await self._target.writable()

    # -- the file

    def _scan(self) -> None:
        """Find the boundary, or how far the bytes are certainly the file's."""
        if self.closed:
            return
        found = self._data.find(self._delimiter, self._start, self._end)
        if found >= 0:
            self._safe, self.closed = found, True
        else:
            # A boundary may begin in the last bytes; it begins with a carriage return.
            tail = max(self._start, self._end - len(self._delimiter) + 1)
            begins = self._data.find(b"\r", tail, self._end)
            self._safe = begins if begins >= 0 else self._end
        self.file_bytes += self._safe - self._start
        if self.file_bytes > self._most_bytes:
            fields = [("ProposedSize", str(self.file_bytes)), ("MaxSizeAllowed", str(self._most_bytes))]
            raise S3Error("EntityTooLarge", fields=fields)

    def _drain(self) -> None:
        assert self._target is not None
        while self._start < self._safe:
            room = self._target.get_buffer()
            if room is None:
                return
            count = min(len(room), self._safe - self._start)
            room[:count] = memoryview(self._data)[self._start : self._start + count]
            self._start += count
            self._target.received(count)

    # -- the fields

    def _parse_head(self) -> None:
        while self._field():
            if len(self.fields) > FIELDS_MAX:
                raise S3Error("MalformedPOSTRequest", f"A form has at most {FIELDS_MAX} fields")
        if not self.head.is_set() and self._end > HEAD_BYTES_MAX:
            raise S3Error("MaxPostPreDataLengthExceededError")

    def _field(self) -> bool:
        """Take one field off the front, if it is there as a whole; the file's head ends the fields."""
        data, start, end = self._data, self._start, self._end
        if end - start < len(self._opening) + 2:
            return False
        if data[start : start + len(self._opening)] != self._opening:
            raise S3Error("MalformedPOSTRequest", "The body does not begin with its boundary")
        line = start + len(self._opening)
        if data[line : line + 2] != b"\r\n":
            if data[line : line + 2] == b"--":
                raise S3Error("InvalidArgument", "POST requires exactly one file upload per request.")
            raise S3Error("MalformedPOSTRequest", "A boundary is not followed by a line break")
        stop = data.find(b"\r\n\r\n", line, end)
        if stop < 0:
            return False
        name, filename, kind = self._part_head(bytes(data[line + 2 : stop]))
        value = stop + 4
        if name == "file":
            self.fields["filename"] = filename
            self.fields["file-content-type"] = kind
            if value > HEAD_BYTES_MAX + len(self._opening):
                raise S3Error("MaxPostPreDataLengthExceededError")
            self._start = self._safe = value
            self.head.set()
            return False
        after = data.find(self._delimiter, value, end)
        if after < 0:
            return False
        try:
            self.fields[name] = bytes(data[value:after]).decode("utf-8") if after > value else ""
        except UnicodeDecodeError:
            raise S3Error("MalformedPOSTRequest", f"The field {name[:64]} is not UTF-8") from None
        self._start = after + 2
        return True

    @staticmethod
    def _part_head(head: bytes) -> tuple[str, str, str]:
        """(name in lower case, file name, content type)."""
        name = filename = kind = ""
        for line in head.decode("utf-8", "replace").split("\r\n"):
            field, _, value = line.partition(":")
            if field.strip().lower() == "content-disposition":
                parameters = _parameters(value)
                name, filename = parameters.get("name", ""), parameters.get("filename", "")
            elif field.strip().lower() == "content-type":
                kind = value.strip()
        if not name:
            raise S3Error("MalformedPOSTRequest", "A part of the form has no name")
        return name.lower(), filename.replace("\\", "/").rpartition("/")[2], kind
