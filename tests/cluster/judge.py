"""The judge of a cluster: compares every node, from outside and on its disk, with everything the clients were told.

In: a whole, running ``Cluster`` and its ``Load``. Out: assertions, with the nodes' logs where one fails. Always holds: it changes
nothing but in ``gives_everything_back``.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from awscrt import checksums

from ingest.records import ObjectRecord
from tests.cluster.load import Load, content_of
from tests.cluster.node import Cluster, ClusterNode
from tests.crash.client import S3
from tests.crash.judge import held_segments
from tests.crash.load import Content
from tests.crash.node import until

_ASIDE = (".hiss", ".hiss-tmp")
"""Folders of the archive that are the gateway's own."""


class Judge:
    def __init__(self, cluster: Cluster, load: Load) -> None:
        self._cluster = cluster
        self._load = load

    def tails(self, lines: int = 10) -> str:
        return "\n".join(f"--- {node.name}\n{node.tail(lines)}" for node in self._cluster.nodes)

    def reads_back(self, timeout_s: float = 90.0) -> None:
        """On every node each key is the same thing, one of those it may be, and is listed exactly where it is there."""
        deadline = time.monotonic() + timeout_s
        nodes = self._cluster.nodes
        with ThreadPoolExecutor(len(nodes)) as pool:
            seen = list(pool.map(lambda node: self._everything(node, deadline), nodes))
            listings = list(pool.map(self._listed, nodes))
        complaints = []
        for ledger, bucket, key in self._load.keys():
            each = [of_node[bucket, key] for of_node in seen]
            allowed = ledger.of(bucket, key).may_be()
            if each[0] not in allowed or any(other != each[0] for other in each):
                names = ", ".join(f"{node.name}: {content}" for node, content in zip(nodes, each, strict=True))
                complaints.append(
                    f"{bucket}/{key} is {names}; it may be {allowed} (said by {ledger.of(bucket, key).by})"
                )
        expected = {name for name, content in seen[0].items() if content is not None}
        for node, listed in zip(nodes, listings, strict=True):
            if listed != expected:
                complaints.append(f"{node.name} lists {listed - expected} too much, {expected - listed} too little")
        assert not complaints, "\n".join([*complaints[:20], self.tails()])

    def _everything(self, node: ClusterNode, deadline: float) -> dict[tuple[str, str], Any]:
        with contextlib.closing(S3(node)) as client:
            return {(bucket, key): self._get(client, bucket, key, deadline) for _, bucket, key in self._load.keys()}

    @staticmethod
    def _get(client: S3, bucket: str, key: str, deadline: float) -> Content | str:
        """What is there, or why that cannot be told."""
        while True:
            try:
                answer = client.get(bucket, key)
                if answer.status == 404:
                    return None
                if answer.status == 200:
                    return content_of(answer)
                trouble = f"{answer.status} {answer.code}"
            except OSError as error:
                trouble = str(error)
            if time.monotonic() > deadline:
                return trouble
            time.sleep(0.1)

    def _listed(self, node: ClusterNode) -> set[tuple[str, str]]:
        with contextlib.closing(S3(node)) as client:
            return {(bucket, key) for bucket in self._load.buckets for key in client.listed(bucket)}

    def replicas_agree(self) -> list[ObjectRecord]:
        """Every node's index says the same; the records."""

        def same() -> bool:
            first, *others = [self.records(node) for node in self._cluster.nodes]
            return all(other == first for other in others)

        until(same, lambda: f"the nodes' indexes are equal\n{self.tails()}", 30)
        return self._cluster.nodes[0].records()

    @staticmethod
    def records(node: ClusterNode) -> list[ObjectRecord]:
        return sorted(node.records(), key=lambda record: (record.bucket, record.key, record.version_id))

    def drains(self, node: ClusterNode, bucket: str, timeout_s: float) -> None:
        """Every object (of a bucket, if one is named) is in the archive in time, as that node knows them."""

        def undrained() -> list[Any]:
            found = [record for record in node.records() if record.archive is None and bucket in ("", record.bucket)]
            return [
                (record.bucket, record.key, record.state.value, record.drain_error, record.extents) for record in found
            ]

        until(lambda: not undrained(), lambda: f"all is archived: {undrained()[:5]}\n{self.tails()}", timeout_s)

    def is_archived(self, timeout_s: float = 120.0) -> None:
        """Every object is one verified copy in the archive, byte for byte, and nothing else lies there."""
        expected: dict[Path, ObjectRecord] = {}
        for record in self._all_drained(timeout_s):
            assert record.archive is not None
            assert record.archive.crc64nvme == record.crc64nvme
            path = self._cluster.archive / record.archive.path
            assert path not in expected, f"two objects at {path}"
            expected[path] = record
        until(lambda: self._archive_files() <= expected.keys(), lambda: self._too_much(expected))
        for path, record in expected.items():
            content = path.read_bytes()
            assert (len(content), checksums.crc64nvme(content)) == (record.length, record.crc64nvme), path

    def _all_drained(self, timeout_s: float) -> list[ObjectRecord]:
        """The records, when every node knows that all of them are archived. What nobody was told of may still be committed
        after the load has ended: a PUT whose client had gone. It is drained like any other."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.drains(self._cluster.nodes[0], "", deadline - time.monotonic())
            records = self.replicas_agree()
            late = [record for record in records if record.archive is None]
            if not late:
                return records
            print("committed after the load had ended:", late)

    def _archive_files(self) -> set[Path]:
        root = self._cluster.archive
        found = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
        return {path for path in found if path.is_file() and path.relative_to(root).parts[0] not in _ASIDE}

    def _too_much(self, expected: Any) -> str:
        return f"files of nobody in the archive: {self._archive_files() - set(expected)}\n{self.tails()}"

    def gives_everything_back(self) -> None:
        """Delete everything, each time on another node: then no file lies in the archive, and every segment was recycled."""
        nodes = self._cluster.nodes
        for ledger in self._load.ledgers:
            ledger.uploads.clear()
            ledger.entries.clear()
        with contextlib.closing(S3(nodes[0])) as client:
            buckets = [name.decode() for name in re.findall(rb"<Name>([^<]*)</Name>", client.request("GET", "/").body)]
            for bucket in buckets:
                for upload in self._uploads(client, bucket):
                    answer = client.request("DELETE", *upload)
                    assert answer.status in (204, 404), answer
            doomed = [(bucket, key) for bucket in buckets for key in sorted(client.listed(bucket))]
        with ThreadPoolExecutor(len(nodes)) as pool:
            list(pool.map(self._delete, nodes, [doomed[number :: len(nodes)] for number in range(len(nodes))]))
        # One node removes them for all, a few questions to the engine each.
        until(lambda: not self._archive_files(), lambda: self._too_much(()), 300)
        until(lambda: not any(node.records() for node in nodes), lambda: f"no version is left\n{self.tails()}")
        for node in nodes:
            until(
                lambda node=node: not held_segments(node.paths),
                lambda node=node: f"segments that are not recycled: {held_segments(node.paths)}\n{node.tail(20)}",
                30,
            )

    @staticmethod
    def _delete(node: ClusterNode, doomed: list[tuple[str, str]]) -> None:
        with contextlib.closing(S3(node)) as client:
            for bucket, key in doomed:
                assert client.delete(bucket, key).ok

    @staticmethod
    def _uploads(client: S3, bucket: str) -> list[tuple[str, str]]:
        answer = client.request("GET", f"/{bucket}", "uploads=")
        assert answer.ok, answer
        pairs = re.findall(rb"<Key>([^<]*)</Key><UploadId>([^<]*)<", re.sub(rb">\s+<", b"><", answer.body))
        return [(f"/{bucket}/{key.decode()}", f"uploadId={upload.decode()}") for key, upload in pairs]
