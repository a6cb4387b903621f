"""Log lines: one a record, structured, with role, slot and pid; never a secret, never a line break from a client.

In: the standard logging module (``logging.getLogger(__name__)``; fields go in ``extra={"bucket": …}``). Out: stderr, as
``2026-01-31T12:00:00.123Z INFO worker/0[4711] ingest.stream: message bucket=scan42`` or the same as one JSON object.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import sys

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET = re.compile(
    r"(?i)((?:x-amz-)?signature=|x-amz-security-token[=:]\s*|secret[_-]?(?:access[_-]?)?key['\"]?\s*[=:]\s*['\"]?"
    r"|authorization:\s*basic\s+)[^\s&,'\"]+"
)


def redact(text: str) -> str:
    """Blank what looks like a signature, a token or a secret key."""
    return _SECRET.sub(r"\1…", text)


class _Line(logging.Formatter):
    def __init__(self, role: str, slot: int | None) -> None:
        super().__init__()
        self._role = role
        self._slot = slot

    def _parts(self, record: logging.LogRecord) -> tuple[str, str, dict[str, object]]:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        return when.isoformat(timespec="milliseconds").replace("+00:00", "Z"), redact(message), extra


class TextLine(_Line):
    def format(self, record: logging.LogRecord) -> str:
        when, message, extra = self._parts(record)
        process = self._role if self._slot is None else f"{self._role}/{self._slot}"
        fields = "".join(f" {name}={redact(str(value))}" for name, value in extra.items())
        line = f"{when} {record.levelname} {process}[{os.getpid()}] {record.name}: {message}{fields}"
        return line.replace("\r", "\\r").replace("\n", "\\n")


class JsonLine(_Line):
    def format(self, record: logging.LogRecord) -> str:
        when, message, extra = self._parts(record)
        fields = {name: redact(str(value)) if isinstance(value, str) else value for name, value in extra.items()}
        head = {"time": when, "level": record.levelname, "role": self._role, "slot": self._slot, "pid": os.getpid()}
        return json.dumps({**fields, **head, "logger": record.name, "message": message}, default=str)


def setup(level: str, shape: str, *, role: str, slot: int | None = None) -> None:
    """Send every record of this process to stderr; ``level`` and ``shape`` as the settings log_level and log_format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLine(role, slot) if shape == "json" else TextLine(role, slot))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for talkative in (
        "alembic",
        "asyncio",
        "botocore",
        "aiobotocore",
        "httpcore",
        "httpx",
        "numba",
        "uvicorn",
        "wsgidav",
    ):
        logging.getLogger(talkative).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
