"""The judge: compares a whole, running node with everything the clients were told, from outside and on disk.

In: a ``Node`` and its ``Load``. Out: assertions, with the node's log where one fails.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from awscrt import checksums

from ingest.catalog import fsck
from ingest.label import read_label
from ingest.paths import NodePaths
from ingest.records import BLOCK_BYTES
from ingest.segments import SegmentHeader
from tests.crash.client import BUCKETS, S3
from tests.crash.load import Ledger, Load
from tests.crash.node import Node, until

OPEN_SEGMENTS_MAX = 6
"""A slot keeps open what it writes to: two lifetime classes, and for each a packing slab of either durability."""


class Judge:
    """Compares a whole, running node with everything the clients were told."""

    def __init__(self, node: Node, load: Load) -> None:
        self._node = node
        self._load = load

    def reads_back(self) -> None:
        """Every key reads back as one of the things it may be, and is listed exactly when it is there."""
        client = S3(self._node)
        complaints = []
        with contextlib.closing(client):
            for ledger in self._load.ledgers:
                for bucket, key in list(ledger.may_be):
                    complaint = self._look(client, ledger, bucket, key)
                    if complaint:
                        complaints.append(complaint)
            for bucket in BUCKETS:
                listed = client.listed(bucket)
                expected = {
                    key
                    for ledger in self._load.ledgers
                    for (of, key), contents in ledger.may_be.items()
                    if of == bucket and contents != [None]
                }
                if listed != expected:
                    complaints.append(f"{bucket}: listed {listed - expected} too much, {expected - listed} too little")
        assert not complaints, "\n".join([*complaints, self._node.tail(30)])

    def _look(self, client: S3, ledger: Ledger, bucket: str, key: str) -> str:
        deadline = time.monotonic() + 90
        while True:
            try:
                answer = client.get(bucket, key)
            except OSError as error:
                if time.monotonic() > deadline:
                    return f"GET {bucket}/{key}: {error}"
                continue
            if answer.status < 500:
                break
            if time.monotonic() > deadline:
                return f"GET {bucket}/{key}: {answer.status} {answer.code} {answer.body!r}"
            time.sleep(0.1)
        if answer.status == 404:
            return ledger.judge(bucket, key, None)
        return ledger.judge(bucket, key, (len(answer.body), int(checksums.crc64nvme(answer.body))))

    def is_archived(self, timeout_s: float = 120.0) -> None:
        """Every object is one verified copy in the archive, byte for byte, and nothing else lies there."""

        def all_archived() -> bool:
            return all(record.archive is not None for record in self._node.records())

        until(all_archived, lambda: f"all is archived: {self._undrained()}\n{self._node.tail(20)}", timeout_s)
        expected = {}
        for record in self._node.records():
            assert record.archive is not None
            assert record.archive.crc64nvme == record.crc64nvme
            expected[self._node.paths.archive / record.archive.path] = record
        until(lambda: self._archive_files() <= expected.keys(), lambda: self._too_much(expected.keys()))
        for path, record in expected.items():
            content = path.read_bytes()
            assert len(content) == record.length, path
            assert checksums.crc64nvme(content) == record.crc64nvme, path

    def _archive_files(self) -> set[Path]:
        # os.walk: folders may be removed while it looks.
        found = (Path(folder) / name for folder, _, names in os.walk(self._node.paths.archive) for name in names)
        kept = (".hiss", ".hiss-tmp")
        return {
            path for path in found if path.is_file() and path.relative_to(self._node.paths.archive).parts[0] not in kept
        }

    def _too_much(self, expected: Any) -> str:
        return f"files of nobody in the archive: {self._archive_files() - set(expected)}\n{self._node.tail(20)}"

    def _undrained(self) -> list[tuple[str, bytes, str, str]]:
        return [
            (record.bucket, record.key, record.state.value, record.drain_error)
            for record in self._node.records()
            if record.archive is None
        ][:5]

    def is_sound(self) -> fsck.FsckReport:
        """Journal, index and segments agree."""
        report = fsck.fsck(self._node.paths.root, payload=True)
        assert report.sound, report
        return report

    def gives_everything_back(self) -> None:
        """Delete everything: then no byte lives, no file lies in the archive, and every segment was recycled."""
        client = S3(self._node)
        with contextlib.closing(client):
            for ledger in self._load.ledgers:
                for bucket, key, upload in ledger.uploads:
                    answer = client.request("DELETE", f"/{bucket}/{quote(key)}", f"uploadId={quote(upload, safe='')}")
                    assert answer.status in (204, 404), answer
                ledger.uploads.clear()
            for bucket in BUCKETS:
                for key in client.listed(bucket):
                    assert client.delete(bucket, key).ok
        for ledger in self._load.ledgers:
            ledger.may_be.clear()
        until(lambda: not self._archive_files(), lambda: self._too_much(()))
        report = self.is_sound()
        assert (report.objects, report.parts, report.live_bytes, report.extents) == (0, 0, 0, 0), report
        until(
            lambda: not held_segments(self._node.paths),
            lambda: f"segments that are not recycled: {held_segments(self._node.paths)}\n{self._node.tail(20)}",
            20,
        )


def held_segments(paths: NodePaths) -> list[Path]:
    """Segment files beyond the open ones of each slot whose content is still of their current generation."""
    held = []
    for slot in sorted(paths.segments.iterdir()):
        written = [path for path in sorted(slot.glob("*.seg")) if _is_written(path)]
        held += written if len(written) > OPEN_SEGMENTS_MAX else []
    return held


def _is_written(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        header = SegmentHeader.read(file.fileno())
        label = read_label(file.fileno(), BLOCK_BYTES)
        return header is not None and label is not None and label.generation == header.generation
    return False
