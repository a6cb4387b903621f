"""``hiss migrate``: a node alone becomes the first of a cluster, with everything it has, also where it is killed on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.catalog import rows
from tests.cluster.loopback import LoopbackNode, Nodes, hiss, until
from tests.crash.node import ROOT
from tests.engine import Engine

POINTS = ("recovered", "published", "verified", "claimed", "made", "joined", "aside")
BODIES = {"/scan/one": os.urandom(70_000), "/scan/two": os.urandom(3 << 20), "/scan/%20%F0%9F%94%AC": b"named so"}
PIECE = os.urandom(5 << 20)
KERNEL = b"""
STATE = {"sum": ("int64", (1,), "sum")}


def frame(frame, params, state, index, out, feedback):
    state.sum[0] += frame[0, 0]
    return KEEP
"""
_TAGS = b"<Tagging><TagSet><Tag><Key>hiss.drain-after-s</Key><Value>%d</Value></Tag></TagSet></Tagging>"
_VERSIONS = b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"


class Before:
    """The folder of a stopped node, and what it answered."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "node" / "data"
        node = LoopbackNode(folder / "node", "lab", {}, kernels="on", archive_dir=str(folder / "archive"))
        self.archive = folder / "archive"
        node.start()
        try:
            node.ready()
            self._fill(node)
            node.stop()
            with contextlib.closing(rows.connect(node.paths.catalogue, read_only=True)) as database:
                (self.objects,) = database.execute("SELECT COUNT(*) FROM objects").fetchone()
        finally:
            node.end()

    def _fill(self, node: LoopbackNode) -> None:
        for bucket in ("scan", "kept"):
            assert node.ask("PUT", f"/{bucket}").ok
            assert node.ask("PUT", f"/{bucket}", "tagging=", _TAGS % (86400 if bucket == "scan" else 0)).ok
        assert node.ask("PUT", "/kept", "versioning=", _VERSIONS).ok
        assert node.ask("PUT", "/kept/_kernels/total.py", "", KERNEL).ok
        for path, body in BODIES.items():
            assert node.ask("PUT", path, "", body).ok
        self.versions = []
        for body in (b"first", b"second"):
            self.versions.append((node.ask("PUT", "/kept/versioned", "", body).headers["x-amz-version-id"], body))
        until(lambda: node.get("/v1/status")[1]["drain"]["queued_objects"] == len(BODIES), "the others are archived")
        started = re.search(rb"<UploadId>(.+)</UploadId>", node.ask("POST", "/scan/parts", "uploads=").body)
        assert started is not None
        self.upload = f"uploadId={started[1].decode()}"
        self.etag = node.ask("PUT", "/scan/parts", f"partNumber=1&{self.upload}", PIECE).headers["etag"]
        self.user = node.hiss("user", "add", "eve", "--grant", "read:scan")

    def copy(self, target: Path, *without: str) -> Path:
        shutil.copytree(self.root, target, ignore=shutil.ignore_patterns("run", *without))
        return target


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    return Before(tmp_path_factory.mktemp("before"))


def migrate(data: Path, dsn: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return hiss("migrate", "--data", str(data), "--to", dsn, "--name", "lab", "--json", environ=environ)


@pytest.fixture
def nodes(tmp_path: Path, database: str) -> Iterator[Nodes]:
    made = Nodes(tmp_path, database)
    try:
        yield made
    finally:
        made.end()


def check_everything(node: LoopbackNode, before: Before) -> None:
    for path, body in BODIES.items():
        assert node.ask("GET", path).body == body
    for version, body in before.versions:
        assert node.ask("GET", "/kept/versioned", f"versionId={version}").body == body
    done = b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>%b</ETag></Part></CompleteMultipartUpload>"
    assert node.ask("POST", "/scan/parts", before.upload, done % before.etag.encode()).ok
    assert node.ask("GET", "/scan/parts").body == PIECE
    assert node.get("/v1/status", (before.user["access_key"], before.user["secret_key"]))[0] == 200
    assert [kernel["name"] for kernel in node.get("/v1/kernels?bucket=kept")[1]] == ["total"]
    # What waited for the drain still does, and is archived when it is due.
    assert node.get("/v1/status")[1]["drain"]["queued_objects"] == len(BODIES) + 1
    assert node.ask("PUT", "/scan", "tagging=", _TAGS % 0).ok
    until(lambda: node.get("/v1/status")[1]["drain"]["queued_objects"] == 0, "everything is archived")


def test_the_cluster_serves_everything_and_others_join(before: Before, nodes: Nodes) -> None:
    data = before.copy(nodes.folder / "lab" / "data")
    report = json.loads(migrate(data, nodes.dsn).stdout)
    assert (report["node"], report["name"], report["resumed"]) == (0, "lab", False)
    assert report["objects"] == before.objects
    assert [Path(path).name.split(".")[0] for path in report["set_aside"]] == ["journal"]
    assert not any((data / "journal").iterdir())

    shutil.copytree(before.archive, nodes.folder / "archive")
    lab = nodes.add("lab")
    (nodes.folder / "b" / "data").mkdir(parents=True, mode=0o700)
    shutil.copy2(data / "node.key", nodes.folder / "b" / "data" / "node.key")
    (lab,) = nodes.start("lab")
    busy = migrate(data, nodes.dsn)
    assert busy.returncode == 3
    (b,) = nodes.start("b")
    assert b.ask("GET", "/scan/two").body == BODIES["/scan/two"]
    check_everything(lab, before)
    assert b.ask("GET", "/scan/parts").body == PIECE


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_step_it_goes_on(point: str, before: Before, tmp_path: Path, postgres: Engine) -> None:
    data, dsn = before.copy(tmp_path / "data", "segments"), postgres.fresh()
    killed = migrate(data, dsn, {"HISS_CRASHPOINT": f"migrate-{point}"})
    assert killed.returncode == -9, killed.stderr
    done = migrate(data, dsn)
    assert done.returncode == (2 if point == "aside" else 0), done.stderr
    identity = json.loads((data / "cluster.json").read_text())
    name = dsn.rpartition("/")[2]
    ((cluster_id, next_sequence),) = postgres.sql("SELECT cluster_id, next_sequence FROM hiss_cluster", name)
    ((sequence, digest),) = postgres.sql("SELECT sequence, digest FROM hiss_checkpoints", name)
    assert (identity["node"], identity["cluster_id"]) == (0, cluster_id)
    assert int(next_sequence) == int(sequence) + 1
    assert [row[0] for row in postgres.sql("SELECT name FROM hiss_nodes", name)] == ["lab"]
    assert not list(data.glob("journal/*"))
    assert list(data.glob("journal.before-cluster-*"))
    if point != "aside":
        report = json.loads(done.stdout)
        assert (report["cluster_id"], report["digest"], report["objects"]) == (cluster_id, digest, before.objects)
        assert report["resumed"] == (point in ("made", "joined"))


def test_a_migration_that_was_begun_starts_neither_way(before: Before, nodes: Nodes) -> None:
    data = before.copy(nodes.folder / "lab" / "data")
    assert migrate(data, nodes.dsn, {"HISS_CRASHPOINT": "migrate-claimed"}).returncode == -9
    for node in (LoopbackNode(nodes.folder / "lab", "lab", {}), nodes.add("lab")):
        node.start()
        assert node.process is not None
        assert node.process.wait(60) != 0
        node.process = None
        assert "`hiss migrate`" in node.tail()


def test_what_cannot_be_migrated_is_told_why(before: Before, tmp_path: Path, postgres: Engine) -> None:
    used = postgres.fresh()
    one = before.copy(tmp_path / "one" / "data", "segments")
    assert migrate(one, used).returncode == 0
    again = migrate(one, used)
    assert again.returncode == 2
    assert "is node 0 of cluster" in again.stderr
    alone = LoopbackNode(tmp_path / "one", "lab", {})
    alone.start()
    assert alone.process is not None
    assert alone.process.wait(60) != 0
    alone.process = None
    assert "start it with the setting catalog" in alone.tail()
    other = before.copy(tmp_path / "two", "segments")
    refused = migrate(other, used)
    assert refused.returncode == 2
    assert "holds a cluster already" in refused.stderr
    # The refusal changed nothing: it is still a node alone.
    assert not (other / "cluster.json").exists()
    assert any((other / "journal").iterdir())
    (tmp_path / "empty").mkdir()
    assert migrate(tmp_path / "empty", used).returncode == 4
    away = migrate(other, "postgresql://hiss@127.0.0.1:1/none")
    assert away.returncode == 4
    assert "goes on when it is started again" in away.stderr
    wrong = migrate(other, "mysql://hiss@127.0.0.1/none")
    assert wrong.returncode == 2
    assert ROOT["HISS_ROOT_SECRET_KEY"] not in away.stderr
