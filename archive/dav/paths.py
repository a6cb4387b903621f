"""Names: S3 keys as WebDAV paths and back. Pure.

In: a percent-encoded request path, or the segments of a key. Out: ``Target``s and names. A key is cut at ``/`` into
segments, each of which is one name. Segments that cannot be a name are shown escaped, and nothing else is:

==============================================  ====================================
segment                                          shown as
==============================================  ====================================
plain UTF-8                                      itself
empty (``a//b``, or ``a/`` that holds bytes)     ``=~``
``.`` and ``..``                                 ``=~=2E`` and ``=~=2E=2E``
bytes that are not UTF-8, control characters     ``=~`` and the bytes as ``=XX``
begins with ``=~`` or ``=+``                     ``=~=3D~…``
the folder ``a/`` where an object ``a`` exists   ``=+a``
==============================================  ====================================

What always holds: ``unescape(escape(segment)) == segment``, and a name that ``escape`` would not have made leads
nowhere. (``=+a`` is one more way to ``a/``; the plain one stays open as well.) A zero-byte object ``a/`` (a folder
marker of S3 consoles) is shown as the folder only.
"""

from __future__ import annotations

import dataclasses
import re
import urllib.parse

ESCAPED = "=~"
FOLDER_BESIDE_OBJECT = "=+"
PATH_BYTES_MAX = 8192
"""Longest decoded path: a key of 1024 bytes with every byte escaped, and its bucket, fit several times."""

# Nautilus and others compare hrefs without decoding, so what RFC 3986 lets stand unencoded in a path is left alone,
# except "+", which some clients take for a space.
_SAFE = "/!$&'()*,;=:@-._~"
_UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\udc80-\udcff\u2028\u2029\ufffe\uffff]")
_QUOTED = re.compile("=([0-9A-F]{2})")


class BadPath(ValueError):
    """The path names nothing this view could ever show; ``str()`` says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a request path asks for: the root, a bucket, or a key and the folder of the same name."""

    bucket: str = ""
    """Empty for the root, which lists the buckets."""
    key: bytes | None = None
    """Without the trailing slash of the path; None for the root and for a bucket."""
    folder_only: bool = False
    """The path ends in a slash or names the folder beside an object: only ``key + b"/"`` is meant."""

    @property
    def prefix(self) -> bytes:
        """Key prefix of everything in the folder of this name."""
        return b"" if self.key is None else self.key + b"/"


def parse(path: str) -> Target:
    """The target of a raw (percent-encoded) request path. BadPath where no key can be meant."""
    if not path.startswith("/"):
        raise BadPath("the path must start with a slash")
    raw = urllib.parse.unquote_to_bytes(path)
    if len(raw) > PATH_BYTES_MAX:
        raise BadPath(f"the path is longer than {PATH_BYTES_MAX} bytes")
    try:
        names = raw.decode("utf-8").split("/")[1:]
    except UnicodeDecodeError:
        raise BadPath("the path is not UTF-8; such keys are listed under an escaped name") from None
    slash = names[-1] == ""
    if slash:
        names.pop()
    if not names:
        return Target()
    bucket, *names = names
    if not bucket:
        raise BadPath("empty names lead nowhere")
    if not names:
        return Target(bucket, folder_only=True)
    beside = names[-1].startswith(FOLDER_BESIDE_OBJECT)
    return Target(bucket, b"/".join(unescape(name) for name in names), slash or beside)


def escape(segment: bytes) -> str:
    """The name that shows one segment of a key."""
    text = segment.decode("utf-8", "surrogateescape")
    if text in (".", ".."):
        return ESCAPED + "=2E" * len(text)
    if text and not text.startswith((ESCAPED, FOLDER_BESIDE_OBJECT)) and not _UNSHOWABLE.search(text):
        return text
    return ESCAPED + _quoted(text)


def folder_beside(segment: bytes) -> str:
    """The name of the folder ``segment/`` where an object ``segment`` exists too."""
    return FOLDER_BESIDE_OBJECT + _quoted(segment.decode("utf-8", "surrogateescape"))


def unescape(name: str) -> bytes:
    """The segment a name stands for; BadPath for a name that no segment is shown as."""
    if not name.startswith((ESCAPED, FOLDER_BESIDE_OBJECT)):
        segment = name.encode("utf-8")
        canonical = escape(segment)
    else:
        text = name[len(ESCAPED) :]
        pieces = _QUOTED.split(text)
        literal = [piece.encode("utf-8") for piece in pieces[::2]]
        quoted = [bytes.fromhex(piece) for piece in pieces[1::2]] + [b""]
        segment = b"".join(a + b for a, b in zip(literal, quoted, strict=True))
        canonical = escape(segment) if name.startswith(ESCAPED) else folder_beside(segment)
    if canonical != name:
        raise BadPath(f"{name!r} is not how any key is shown")
    return segment


def href(path: str) -> str:
    """Percent-encode a path of shown names for an href or a Location."""
    return urllib.parse.quote(path, safe=_SAFE)


def shown(target: Target) -> str:
    """The target's canonical decoded path (without the trailing slash of a folder), for titles and parents."""
    if not target.bucket:
        return "/"
    names = [] if target.key is None else [escape(segment) for segment in target.key.split(b"/")]
    return "/".join(["", target.bucket, *names])


def _quoted(text: str) -> str:
    def quote(match: re.Match[str]) -> str:
        return "".join(f"={byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))

    return _UNSHOWABLE.sub(quote, text.replace("=", "=3D"))
