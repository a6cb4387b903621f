"""Versions, conditions and appends on a whole node with several workers: who wins a race, what everybody sees afterwards, what
kernels and raw filters make of versions, and what is left when a process is killed in the middle."""

from __future__ import annotations

import contextlib
import io
import itertools
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import h5py
import numpy as np
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ingest.catalog.fsck import fsck
from tests.crash.harness import ROOT, Node, running, until

WORKERS = 3
HITS = """
STATE = {"hits": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    hit = frame[0, 0] >= 500
    state.hits[0] += hit
    return KEEP if hit else DROP
"""


def client_of(node: Node) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{node.port()}",
        aws_access_key_id=ROOT["HISS_ROOT_ACCESS_KEY"],
        aws_secret_access_key=ROOT["HISS_ROOT_SECRET_KEY"],
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, max_pool_connections=1),
    )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("versions")
    environ = {"HISS_CRASHPOINT_ONCE": str(folder / "once")}
    with running(folder, environ, kernels="on", workers=str(WORKERS)) as node:
        yield node


@pytest.fixture(scope="module")
def clients(node: Node) -> Iterator[list[Any]]:
    """More clients than workers, each with a connection of its own, so that every worker has some."""
    made = [client_of(node) for _ in range(4 * WORKERS)]
    yield made
    for client in made:
        client.close()


@pytest.fixture
def s3(clients: list[Any]) -> Any:
    return clients[0]


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"versions-{secrets.token_hex(4)}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def versioned(s3: Any, bucket: str) -> str:
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    return bucket


def at_once(clients: list[Any], attempt: Callable[[Any, int], Any], count: int) -> list[str]:
    """Error codes of ``count`` attempts, started together on every connection; empty for those that succeeded."""
    gate = threading.Barrier(len(clients))
    numbers = itertools.count()

    def runs(client: Any) -> list[str]:
        gate.wait(30)
        codes = []
        for _ in range(count // len(clients)):
            try:
                attempt(client, next(numbers))
                codes.append("")
            except ClientError as error:
                codes.append(error.response["Error"]["Code"])
        return codes

    with ThreadPoolExecutor(len(clients)) as pool:
        return [code for codes in pool.map(runs, clients) for code in codes]


def body_of(client: Any, bucket: str, **rest: Any) -> bytes:
    return bytes(client.get_object(Bucket=bucket, Key="k", **rest)["Body"].read())


@pytest.mark.parametrize("status", ["", "Enabled", "Suspended"])
def test_of_a_hundred_writers_one_wins(clients: list[Any], s3: Any, bucket: str, status: str) -> None:
    if status:
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": status})

    def create(client: Any, number: int) -> None:
        client.put_object(Bucket=bucket, Key="k", Body=b"%d" % number, IfNoneMatch="*")

    codes = Counter(at_once(clients, create, 96))
    assert codes[""] == 1
    assert codes.keys() <= {"", "PreconditionFailed", "ConditionalRequestConflict"}
    assert len({body_of(client, bucket) for client in clients}) == 1
    etag = s3.head_object(Bucket=bucket, Key="k")["ETag"]

    def replace(client: Any, number: int) -> None:
        client.put_object(Bucket=bucket, Key="k", Body=b"next %d" % number, IfMatch=etag)

    codes = Counter(at_once(clients, replace, 48))
    assert codes[""] == 1
    assert codes.keys() <= {"", "PreconditionFailed", "ConditionalRequestConflict"}
    assert len({body_of(client, bucket) for client in clients}) == 1


def test_one_complete_wins(clients: list[Any], s3: Any, bucket: str) -> None:
    uploads = []
    for _ in clients:
        upload = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
        part = s3.upload_part(Bucket=bucket, Key="k", UploadId=upload, PartNumber=1, Body=upload.encode())
        uploads.append((upload, {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}))

    def complete(client: Any, number: int) -> None:
        upload, parts = uploads[number]
        client.complete_multipart_upload(
            Bucket=bucket, Key="k", UploadId=upload, MultipartUpload=parts, IfNoneMatch="*"
        )

    codes = Counter(at_once(clients, complete, len(clients)))
    assert codes[""] == 1
    assert codes.keys() <= {"", "PreconditionFailed", "ConditionalRequestConflict"}


def test_everybody_sees_what_was_answered(clients: list[Any], bucket: str) -> None:
    for number, writer in enumerate(clients * 3):
        body = b"%d" % number
        writer.put_object(Bucket=bucket, Key="k", Body=body)
        for reader in clients[number % WORKERS :: WORKERS]:
            assert body_of(reader, bucket) == body
            (row,) = reader.list_objects_v2(Bucket=bucket)["Contents"]
            assert row["Size"] == len(body)
        clients[-1 - number % len(clients)].delete_object(Bucket=bucket, Key="k")
        for reader in clients[number % WORKERS :: WORKERS]:
            assert reader.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
            with pytest.raises(ClientError):
                reader.head_object(Bucket=bucket, Key="k")


def test_versioning_holds_in_every_worker_once_it_is_answered(clients: list[Any], s3: Any, bucket: str) -> None:
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert all(client.put_object(Bucket=bucket, Key="k", Body=b"1")["VersionId"] != "null" for client in clients)
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    assert not any("VersionId" in client.put_object(Bucket=bucket, Key="k", Body=b"1") for client in clients)


def test_no_version_is_lost_in_a_crowd(clients: list[Any], s3: Any, versioned: str) -> None:
    made: dict[str, bytes] = {}
    gone: set[str] = set()

    def change(client: Any, number: int) -> None:
        if number % 4 == 3:
            made[client.delete_object(Bucket=versioned, Key="k")["VersionId"]] = b""
            return
        body = b"%d" % number
        version_id = client.put_object(Bucket=versioned, Key="k", Body=body)["VersionId"]
        made[version_id] = body
        if number % 8 == 1:
            client.delete_object(Bucket=versioned, Key="k", VersionId=version_id)
            gone.add(version_id)

    assert set(at_once(clients, change, 96)) == {""}
    listing = s3.list_object_versions(Bucket=versioned)
    rows = listing["Versions"] + listing["DeleteMarkers"]
    assert {row["VersionId"] for row in rows} == made.keys() - gone
    (latest,) = [row for row in rows if row["IsLatest"]]
    if latest in listing["Versions"]:
        assert body_of(s3, versioned) == made[latest["VersionId"]]
    for row in listing["Versions"]:
        assert body_of(s3, versioned, VersionId=row["VersionId"]) == made[row["VersionId"]]


# -- kernels


def npy(values: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, values)
    return target.getvalue()


def test_what_a_raw_filter_leaves_covers_what_was_received(node: Node, s3: Any, versioned: str) -> None:
    tags = [{"Key": "hiss.raw-filter", "Value": "allow"}, {"Key": "hiss.raw-filter-wait-s", "Value": "3600"}]
    s3.put_bucket_tagging(Bucket=versioned, Tagging={"TagSet": tags})
    s3.put_object(Bucket=versioned, Key="_kernels/hits.py", Body=HITS.encode(), Metadata={"raw": "kept"})
    values = np.random.default_rng(1).integers(0, 1000, (200, 16, 24), np.uint16)
    raw = s3.put_object(Bucket=versioned, Key="run/a.npy", Body=npy(values))["VersionId"]

    def versions() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = s3.list_object_versions(Bucket=versioned, Prefix="run/a.npy")["Versions"]
        return found

    until(lambda: len(versions()) == 2, lambda: f"it is filtered\n{node.tail(25)}", 60)
    newest, received = versions()
    assert (newest["IsLatest"], received["VersionId"], received["IsLatest"]) == (True, raw, False)
    kept = s3.get_object(Bucket=versioned, Key="run/a.npy")
    assert kept["Body"].read() == npy(values[values[:, 0, 0] >= 500])
    assert s3.get_object(Bucket=versioned, Key="run/a.npy", VersionId=raw)["Body"].read() == npy(values)
    until(
        lambda: s3.list_objects_v2(Bucket=versioned, Prefix="_products/hits/run/a.npy.nxs")["KeyCount"] == 1,
        lambda: f"its product\n{node.tail(25)}",
        60,
    )


# -- appends


def test_kernels_get_the_whole_of_what_was_appended(node: Node, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="_kernels/hits.py", Body=HITS.encode())
    values = np.random.default_rng(2).integers(0, 1000, (60, 16, 24), np.uint16)
    whole = values.tobytes()
    metadata = {"frame-dtype": "uint16", "frame-shape": "16,24"}
    piece = len(whole) // 4
    for start in range(0, len(whole), piece):
        s3.put_object(
            Bucket=bucket, Key="run/k", Body=whole[start : start + piece], WriteOffsetBytes=start, Metadata=metadata
        )
    wanted = int((values[:, 0, 0] >= 500).sum())

    def hits() -> int:
        with contextlib.suppress(ClientError):
            product = s3.get_object(Bucket=bucket, Key="_products/hits/run/k.nxs")["Body"].read()
            with h5py.File(io.BytesIO(product)) as file:
                return int(file["/entry/state/hits"][0])
        return -1

    until(lambda: hits() == wanted, lambda: f"{hits()} hits of {wanted}\n{node.tail(25)}", 60)


@pytest.fixture
def doom(node: Node) -> Iterator[Path]:
    """The file that names the step at which one process dies; afterwards the catalogue must be sound."""
    once = Path(node.environ["HISS_CRASHPOINT_ONCE"])
    yield once
    until(lambda: not once.exists(), "a process died")
    problems = [problem for problem in fsck(node.paths.root).problems if problem.kind != "segment"]
    assert problems == []


@pytest.mark.parametrize("point", ["data-flushed", "journal-before", "journal-flushed", "answer-before"])
def test_killed_while_appending(node: Node, s3: Any, bucket: str, doom: Path, point: str) -> None:
    whole, more = b"first", secrets.token_bytes(300_000)
    s3.put_object(Bucket=bucket, Key="k", Body=whole, WriteOffsetBytes=0)
    doom.write_text(point)

    def sent() -> bool:
        try:
            s3.put_object(Bucket=bucket, Key="k", Body=more, WriteOffsetBytes=len(whole))
        except ClientError as error:
            # Whether it was answered or not: sent again at the same place, it is there once.
            return str(error.response["Error"]["Code"]) == "InvalidWriteOffset"
        except (BotoCoreError, OSError):
            return False
        return True

    until(sent, lambda: f"the append after {point}\n{node.tail(25)}", 90)
    until(lambda: body_of(s3, bucket) == whole + more, "it reads back", 30)


@pytest.mark.parametrize("point", ["journal-before", "journal-flushed"])
def test_killed_while_a_version_is_covered_or_uncovered(s3: Any, versioned: str, doom: Path, point: str) -> None:
    one = s3.put_object(Bucket=versioned, Key="k", Body=b"one")["VersionId"]
    doom.write_text(point)
    # The worker asks the new catalogue process again: the same marker, once.
    marker = s3.delete_object(Bucket=versioned, Key="k")["VersionId"]
    until(lambda: not doom.exists(), "the process died")
    assert [row["VersionId"] for row in s3.list_object_versions(Bucket=versioned)["DeleteMarkers"]] == [marker]
    doom.write_text(point)
    s3.delete_object(Bucket=versioned, Key="k", VersionId=marker)
    until(lambda: not doom.exists(), "the process died")
    assert s3.head_object(Bucket=versioned, Key="k")["VersionId"] == one
