"""What S3 says a bucket is: keys, each a stack of versions. The model that the stateful test compares the node with.

Nothing here knows how anything is stored; versions are named by whoever acknowledged them.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/versioning-workflows.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

NULL = "null"


@dataclasses.dataclass(frozen=True)
class Version:
    """``body`` None: a delete marker."""

    version_id: str
    body: bytes | None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    content_type: str = "binary/octet-stream"
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    etag: str = ""

    @property
    def marker(self) -> bool:
        return self.body is None


@dataclasses.dataclass
class Upload:
    key: str
    metadata: Mapping[str, str]
    parts: dict[int, tuple[str, bytes]] = dataclasses.field(default_factory=dict)
    """Number -> (ETag, bytes)."""


class Bucket:
    def __init__(self) -> None:
        self.versioning = ""
        """As GetBucketVersioning says it; empty until it was ever set."""
        self.stacks: dict[str, list[Version]] = {}
        """Newest first; never empty."""
        self.uploads: dict[str, Upload] = {}

    # -- changes

    def put(self, key: str, version: Version) -> None:
        """``version`` as the node acknowledged it; a null version replaces the one before."""
        stack = self.stacks.setdefault(key, [])
        if version.version_id == NULL:
            stack[:] = [other for other in stack if other.version_id != NULL]
        stack.insert(0, version)

    def delete(self, key: str, marker_id: str) -> None:
        """Without a version. ``marker_id``: of the delete marker that was acknowledged; empty: there is none."""
        if self.versioning:
            self.put(key, Version(marker_id, None))
        else:
            self.stacks.pop(key, None)

    def delete_version(self, key: str, version_id: str) -> None:
        left = [version for version in self.stacks.get(key, []) if version.version_id != version_id]
        if left:
            self.stacks[key] = left
        else:
            self.stacks.pop(key, None)

    def replace(self, key: str, version: Version) -> None:
        """The same version, with something else about it."""
        stack = self.stacks[key]
        stack[[other.version_id for other in stack].index(version.version_id)] = version

    # -- questions

    def current(self, key: str) -> Version | None:
        """None where a GET says 404."""
        stack = self.stacks.get(key)
        return stack[0] if stack and not stack[0].marker else None

    def keys(self) -> list[str]:
        """In the order of a listing: of the UTF-8 bytes."""
        return sorted((key for key in self.stacks if self.current(key)), key=str.encode)

    def versions(self) -> Iterator[tuple[str, Version, bool]]:
        """(key, version, is it the latest), in the order of ListObjectVersions."""
        for key in sorted(self.stacks, key=str.encode):
            for number, version in enumerate(self.stacks[key]):
                yield key, version, number == 0

    def listing(self, prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
        """(keys, common prefixes)"""
        keys, prefixes = [], []
        for key in self.keys():
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                common = prefix + rest[: rest.index(delimiter) + len(delimiter)]
                if common not in prefixes:
                    prefixes.append(common)
            else:
                keys.append(key)
        return keys, prefixes
