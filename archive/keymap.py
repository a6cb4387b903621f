"""Which path of the archive holds which key: injective, reversible, and plain for plain keys.

In: a bucket and a key (bytes). Out: paths relative to the archive's root, valid UTF-8, at most PATH_BYTES_MAX bytes, no
component over NAME_BYTES_MAX bytes; and back from such a path to the bucket and key. Pure: no file system is asked.

A key is cut at ``/``. A component that can be a file name as it is stays so: ``scan/0001.npy`` in bucket ``mx`` is
``mx/scan/0001.npy``. Any other component is *escaped*: a marker that says what it is, then its text with ``%XX`` for
``%``, control characters and bytes that are not UTF-8. Plain components never start with ``%``, so the two cannot meet:

    ``%d-TEXT``   a folder                       ``a//b``  -> ``a/%d-/b``        ``../b`` -> ``%d-../b``
    ``%f-TEXT``   the object itself, the leaf    ``a/``    -> ``a/%f-``          ``%``    -> ``%f-%25``
    ``%c-TEXT``   more of this name follows in the next component (names over 255 bytes)
    ``%k-TEXT``   the whole key in base32, for keys whose readable path would be longer than PATH_BYTES_MAX

S3 has the key ``a`` beside the key ``a/b``; a file system cannot have the file ``a`` beside the folder ``a``. So every
key has two paths, and the drain may use either: the *natural* one above, and the *detached* one, in which every
component is escaped (``%f-a``; ``%d-a/%f-b``). An escaped leaf is never an escaped folder, so no key blocks a detached
path. The drain tries the natural path first, takes the detached one when the natural one is blocked, and the catalogue
records which. ``key_of`` is a function of the path alone and inverts both: that is what makes the mapping injective
over all choices, whatever else the archive holds and in whatever order it came.

Names are kept byte for byte, so they differ in case and in Unicode normalisation exactly as keys do. On a target that
folds case or normalises (``portable=True``; targets find out for themselves) only lower-case ASCII stays plain and
everything else is escaped bytewise, so two keys still never meet at one name.

Reserved for the archive itself, and therefore escaped in keys: RESERVED. Below a bucket's ``.versions`` lie versions other
than the current one: the folders of the key, then its name as an escaped leaf, which is a folder here, and in it a file for
each version, by its object id: ``mx/.versions/scan/%f-0001.npy/<32 hex digits>``. No plain or escaped folder is called like
an escaped leaf, so versions of ``a`` never meet those of ``a/b``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence

NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 3072
"""Leaves 1 KiB of PATH_MAX (4096) to the root folder, so ordinary tools can open every archived file by its path."""
VERSIONS = ".versions"
RESERVED = frozenset({".hiss", ".hiss-tmp", VERSIONS})

_FOLDER, _LEAF, _CONTINUED, _WHOLE = "%d-", "%f-", "%c-", "%k-"
_ROOM_BYTES = NAME_BYTES_MAX - 3
_PLAIN_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]*")
# C0, DEL and C1 controls and the Unicode line separators break terminals and scripts; a fixed list, not
# str.isprintable(), because the mapping must not change with the interpreter's Unicode tables.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\udc80-\udcff%]")
_NOT_PORTABLE = re.compile("[^\x20-\x7e]|[%A-Z]")
_OBJECT_ID = re.compile(r"[0-9a-f]{32}")
_ESCAPE = re.compile(r"%([0-9A-F]{2})")


class NotAKeyPath(ValueError):
    """The path is not one this module makes; ``str()`` says which and why."""


def natural(bucket: str, key: bytes, *, portable: bool = False) -> str:
    """The path a key gets when nothing is in its way."""
    parts = _text(key).split("/")
    names = [name for part in parts[:-1] for name in _component(part, _FOLDER, portable=portable)]
    return _fitting(bucket, key, [*names, *_component(parts[-1], _LEAF, portable=portable)])


def detached(bucket: str, key: bytes, *, portable: bool = False) -> str:
    """The path a key gets when a file or a folder is in the way of its natural one. No key ever blocks this path."""
    parts = _text(key).split("/")
    names = [name for part in parts[:-1] for name in _escaped(part, _FOLDER, portable=portable)]
    return _fitting(bucket, key, [*names, *_escaped(parts[-1], _LEAF, portable=portable)])


def version_path(bucket: str, key: bytes, object_id: bytes, *, portable: bool = False) -> str:
    """The path of a version that is not current. Nothing else is ever in its way."""
    parts = _text(key).split("/")
    names = [name for part in parts[:-1] for name in _component(part, _FOLDER, portable=portable)]
    above, *below = _fitting(bucket, key, [*names, *_escaped(parts[-1], _LEAF, portable=portable)]).split("/")
    if not _is_plain_bucket(bucket):
        count = len(list(_escaped(bucket, _FOLDER, portable=True)))
        above, below = "/".join((above, *below[: count - 1])), below[count - 1 :]
    return "/".join((above, VERSIONS, *below, object_id.hex()))


def version_of(path: str) -> tuple[str, bytes, bytes]:
    """The bucket, key and object id of a path of ``version_path``; NotAKeyPath for anything else."""
    groups = list(_groups(path))
    if len(groups) < 4 or groups[1] != [VERSIONS] or len(groups[-1]) != 1 or not _OBJECT_ID.fullmatch(groups[-1][0]):
        raise NotAKeyPath(f"{path!r} is not the path of a version")
    bucket = _bytes(groups[0], path).decode("utf-8", "surrogateescape")
    middle = groups[2:-1]
    if middle[-1][-1].startswith(_WHOLE):
        key = _unbase32("".join(name[3:] for name in middle[0]), path)
    else:
        key = b"/".join(_bytes(group, path) for group in middle)
    object_id = bytes.fromhex(groups[-1][0])
    if not any(path == version_path(bucket, key, object_id, portable=portable) for portable in (False, True)):
        raise NotAKeyPath(f"{path!r} is not how any version is spelt")
    return bucket, key, object_id


def paths(bucket: str, key: bytes, *, portable: bool = False) -> tuple[str, ...]:
    """Every path this key may have, in the order in which to try them; one where both forms are the same."""
    return tuple(dict.fromkeys((natural(bucket, key, portable=portable), detached(bucket, key, portable=portable))))


def key_of(path: str) -> tuple[str, bytes]:
    """The bucket and key of a path made here; NotAKeyPath for anything else (and for no near miss of a real path)."""
    groups = list(_groups(path))
    if len(groups) < 2:
        raise NotAKeyPath(f"{path!r} has no key below its bucket")
    bucket = _bytes(groups[0], path).decode("utf-8", "surrogateescape")
    if groups[-1][-1].startswith(_WHOLE):
        if len(groups) != 2:
            raise NotAKeyPath(f"{path!r} has folders before a whole key")
        key = _unbase32("".join(name[3:] for name in groups[1]), path)
    else:
        key = b"/".join(_bytes(group, path) for group in groups[1:])
    # Only the canonical spelling counts: whatever else decodes to the same key is not ours.
    if not any(path in paths(bucket, key, portable=portable) for portable in (False, True)):
        raise NotAKeyPath(f"{path!r} is not how any key is spelt")
    return bucket, key


def components(path: str) -> tuple[str, ...]:
    """The components of a recorded path, safe to open one below the other; NotAKeyPath when one could lead astray."""
    names = tuple(path.split("/"))
    for name in names:
        if name in ("", ".", "..") or "\0" in name or len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX:
            raise NotAKeyPath(f"{path!r} has the component {name!r}")
    return names


def _text(raw: bytes) -> str:
    """UTF-8 as text; bytes that are not UTF-8 become lone surrogates, which ``_UNSAFE`` then escapes one by one."""
    return raw.decode("utf-8", "surrogateescape")


def _fitting(bucket: str, key: bytes, names: Sequence[str]) -> str:
    above = [bucket] if _is_plain_bucket(bucket) else list(_escaped(bucket, _FOLDER, portable=True))
    path = "/".join((*above, *names))
    if len(path.encode()) <= PATH_BYTES_MAX:
        return path
    return "/".join((*above, *_chunks(base64.b32encode(key).decode().rstrip("=").lower(), _WHOLE)))


def _is_plain_bucket(bucket: str) -> bool:
    return len(bucket) <= NAME_BYTES_MAX and _PLAIN_BUCKET.fullmatch(bucket) is not None


def _component(part: str, marker: str, *, portable: bool) -> Iterable[str]:
    return (part,) if _is_plain(part, portable=portable) else _escaped(part, marker, portable=portable)


def _is_plain(part: str, *, portable: bool) -> bool:
    if part in ("", ".", "..") or part.startswith("%") or part.lower() in RESERVED:
        return False
    if _NOT_PORTABLE.search(part) if portable else _has_unsafe(part):
        return False
    return len(part.encode()) <= NAME_BYTES_MAX


def _has_unsafe(part: str) -> bool:
    # ``%`` is harmless inside a plain name: only a leading one would look like a marker.
    return any(match.group() != "%" for match in _UNSAFE.finditer(part))


def _escaped(part: str, marker: str, *, portable: bool) -> Iterator[str]:
    unsafe = _NOT_PORTABLE if portable else _UNSAFE
    units = [_percent(unit) if unsafe.match(unit) else unit for unit in part]
    return _chunks(units, marker)


def _percent(unit: str) -> str:
    return "".join(f"%{byte:02X}" for byte in unit.encode("utf-8", "surrogateescape"))


def _chunks(units: Iterable[str], marker: str) -> Iterator[str]:
    """Fill component after component; no escape and no character is cut in two."""
    name, used_bytes = "", 0
    for unit in units:
        size_bytes = len(unit.encode())
        if used_bytes + size_bytes > _ROOM_BYTES:
            yield _CONTINUED + name
            name, used_bytes = "", 0
        name += unit
        used_bytes += size_bytes
    yield marker + name


def _groups(path: str) -> Iterator[list[str]]:
    """Components joined where one continues the next."""
    group: list[str] = []
    for name in components(path):
        group.append(name)
        if not name.startswith(_CONTINUED):
            yield group
            group = []
    if group:
        raise NotAKeyPath(f"{path!r} ends in the middle of a name")


def _bytes(group: Sequence[str], path: str) -> bytes:
    """What the names of one key component stand for."""
    if len(group) == 1 and not group[0].startswith("%"):
        return group[0].encode("utf-8", "surrogateescape")
    text = "".join(name[3:] for name in group)
    if not group[-1].startswith((_FOLDER, _LEAF)) or "%" in _ESCAPE.sub("", text):
        raise NotAKeyPath(f"{path!r} has the component {'/'.join(group)!r}")
    pieces = _ESCAPE.split(text)
    return b"".join(
        bytes.fromhex(piece) if index % 2 else piece.encode("utf-8", "surrogateescape")
        for index, piece in enumerate(pieces)
    )


def _unbase32(text: str, path: str) -> bytes:
    try:
        return base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except binascii.Error:
        raise NotAKeyPath(f"{path!r} is not the base32 of a key") from None
