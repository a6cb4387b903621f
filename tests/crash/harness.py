"""What the crash tests share: a real node that is killed, an S3 client that remembers what it was told, and the judge.

In: a seed. Out: ``Node`` (hiss serve and its processes, by pid), ``S3`` (signed requests over http.client), ``Ledger`` (what
was acknowledged and what has an unknown outcome) and ``Judge`` (compares a node with a ledger, from outside and on disk).
Always holds: a key belongs to one client thread, so its requests are in order and every observation can be judged; every
wait has a deadline; every process that is started here is ended here.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from awscrt import checksums

from ingest.catalog import fsck, rows
from ingest.catalog.reader import Reader
from ingest.errors import IngestError
from ingest.label import read_label
from ingest.paths import NodePaths
from ingest.records import BLOCK_BYTES, ObjectRecord
from ingest.segments import SegmentHeader

MIB = 1 << 20
ROOT = {
    "HISS_ROOT_ACCESS_KEY": "CRASHTESTROOTKEY0001",
    "HISS_ROOT_SECRET_KEY": "crash-test-root-secret-0000000000000001",
}
POOL = random.Random(20).randbytes(40 * MIB)
BUCKETS = {"disk": "disk", "memory": "memory"}
"""Bucket name -> durability."""
OPEN_SEGMENTS_MAX = 6
"""A slot keeps open what it writes to: two lifetime classes, and for each a packing slab of either durability."""
SETTINGS = {
    "workers": "2",
    "segment_bytes": "16MiB",
    "arena_region_bytes": "16MiB",
    "arena_bytes": "256MiB",
    "buffer_bytes": "1GiB",
    "kernels": "off",
    "shutdown_grace_s": "20",
}


def until(condition: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = 30.0) -> Any:
    """Poll until ``condition`` gives something true, and return it; fails with ``what`` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out: {what() if callable(what) else what}"
        time.sleep(0.02)
    return value


# -- the node


class Node:
    """``hiss serve`` on a folder of its own. ``environ`` and ``settings`` may be changed between starts."""

    def __init__(self, folder: Path, environ: dict[str, str] | None = None, **settings: str) -> None:
        self.paths = NodePaths(folder / "data")
        self.log = folder / "log"
        self.environ = environ or {}
        self.settings = {**SETTINGS, **settings}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.process is None
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HISS_")}
        command = [sys.executable, "-m", "gateway.cli", "serve", "--data", str(self.paths.root), "--host", "127.0.0.1"]
        command += ["--s3-port", "0", "--control-port", "0", "--dav-port", "0"]
        for name, value in self.settings.items():
            command += ["--set", f"{name}={value}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**environ, **ROOT, **self.environ}
            )

    def status(self) -> dict[str, Any]:
        try:
            document = dict(json.loads(self.paths.processes.read_text()))
        except (FileNotFoundError, ValueError):
            return {"pid": 0, "state": "absent", "processes": []}
        # After a SIGKILL the file of the last node is still there for a moment.
        return document if self.process and document["pid"] == self.process.pid else {"state": "old", "processes": []}

    def rows(self, role: str) -> list[dict[str, Any]]:
        return [row for row in self.status()["processes"] if row["role"] == role]

    def ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the node serves and every process of it is ready."""

        def serves() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the node ended: {self.tail()}"
            status = self.status()
            return status["state"] == "serving" and all(row["state"] == "ready" for row in status["processes"])

        until(serves, lambda: f"every process is ready: {self.status()}\n{self.tail()}", timeout_s)

    def port(self, name: str = "s3") -> int:
        return int(json.loads(self.paths.ports.read_text())[name])

    def kill(self, role: str, slot: int = 0) -> None:
        """SIGKILL the process of a role; nothing happens when it is between two lives."""
        found = [row["pid"] for row in self.rows(role) if row["pid"]]
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[slot % len(found)], signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL the supervisor; the kernel kills its children with it."""
        assert self.process is not None
        pids = [row["pid"] for row in self.status()["processes"] if row["pid"]]
        self.process.kill()
        self.process.wait(30)
        self.process = None
        until(lambda: not any(_alive(pid) for pid in pids), "the children died with the supervisor")

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process = None
        assert code == 0, f"the node stopped with {code}: {self.tail()}"

    def end(self) -> None:
        """Whatever state it is in: nothing of it runs afterwards."""
        if self.process is not None and self.process.poll() is None:
            self.kill_all()
        self.process = None

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def catalogue(self) -> contextlib.closing[Reader]:
        return contextlib.closing(Reader(rows.connect(self.paths.catalogue, read_only=True), 0))

    def records(self) -> list[ObjectRecord]:
        with self.catalogue() as reader:
            found: list[ObjectRecord] = []
            for bucket in reader.buckets():
                listed, _ = reader.list_objects(bucket.name, b"", b"", b"", 100_000)
                found += [row.record for row in listed if row.record is not None]
        return found

    def lost(self) -> set[tuple[str, str, str]]:
        """(bucket, key, crc64nvme) of every ``memory`` object the node said it lost."""
        file = self.paths.root / "lost-objects.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {(line["bucket"], line["key"], line["crc64nvme"]) for line in lines}


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


# -- S3


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status in (200, 204) and b"<Error>" not in self.body[:200]

    @property
    def code(self) -> str:
        found = re.search(rb"<Code>(\w+)</Code>", self.body)
        return found[1].decode() if found else ""


class S3:
    """One client with one connection. Raises OSError (HTTP trouble included) when there was no whole answer."""

    def __init__(self, node: Node, timeout_s: float = 40.0) -> None:
        self._node = node
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def request(
        self,
        method: str,
        path: str,
        query: str = "",
        body: bytes | memoryview = b"",
        pause_s: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """``path`` is encoded already; ``query`` is canonical (sorted, encoded, every name with its =). ``pause_s`` between
        two reads of the answer makes a slow reader. ``headers`` have lower-case names."""
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection("127.0.0.1", self._node.port(), timeout=self._timeout_s)
            url = f"{path}?{query}" if query else path
            signed = _sign(method, path, query, {"host": f"127.0.0.1:{self._connection.port}", **(headers or {})})
            self._connection.putrequest(method, url, skip_host=True, skip_accept_encoding=True)
            for name, value in {**signed, "content-length": str(len(body))}.items():
                self._connection.putheader(name, value)
            self._connection.endheaders()
            if len(body):
                self._connection.sock.sendall(body)
            answer = self._connection.getresponse()
            content = answer.read() if not pause_s else b"".join(_slowly(answer, pause_s))
            found = Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, content)
            if found.headers.get("connection") == "close":
                self.close()
            return found
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.close()
            raise OSError(f"{type(error).__name__}: {error}") from error

    def put(self, bucket: str, key: str, body: bytes | memoryview, **metadata: str) -> Answer:
        """``metadata``: user metadata, with _ for -."""
        headers = {f"x-amz-meta-{name.replace('_', '-')}": value for name, value in metadata.items()}
        return self.request("PUT", f"/{bucket}/{quote(key)}", body=body, headers=headers)

    def tag(self, bucket: str, **tags: str) -> Answer:
        """Settings of a bucket, without their ``hiss.`` and with _ for -."""
        rows = "".join(
            f"<Tag><Key>hiss.{name.replace('_', '-')}</Key><Value>{value}</Value></Tag>" for name, value in tags.items()
        )
        return self.request("PUT", f"/{bucket}", "tagging=", f"<Tagging><TagSet>{rows}</TagSet></Tagging>".encode())

    def get(self, bucket: str, key: str, *, pause_s: float = 0.0) -> Answer:
        return self.request("GET", f"/{bucket}/{quote(key)}", pause_s=pause_s)

    def delete(self, bucket: str, key: str) -> Answer:
        return self.request("DELETE", f"/{bucket}/{quote(key)}")

    def listed(self, bucket: str) -> set[str]:
        """Every key of the bucket."""
        keys: set[str] = set()
        token = ""
        while True:
            query = f"continuation-token={quote(token, safe='')}&list-type=2" if token else "list-type=2"
            answer = self.request("GET", f"/{bucket}", query)
            assert answer.ok, answer
            keys |= {key.decode() for key in re.findall(rb"<Key>([^<]*)</Key>", answer.body)}
            more = re.search(rb"<NextContinuationToken>([^<]*)<", answer.body)
            if more is None:
                return keys
            token = more[1].decode()

    def make_buckets(self) -> None:
        for bucket, durability in BUCKETS.items():
            assert self.request("PUT", f"/{bucket}").status in (200, 409)
            assert self.tag(bucket, durability=durability).ok


def _slowly(answer: http.client.HTTPResponse, pause_s: float) -> Iterator[bytes]:
    while piece := answer.read(256 << 10):
        yield piece
        time.sleep(pause_s)
    if answer.length:
        raise OSError(f"{answer.length} bytes are missing at the end")


def _sign(method: str, path: str, query: str, headers: dict[str, str]) -> dict[str, str]:
    when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    signed = {**headers, "x-amz-date": when, "x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    names = sorted(signed)
    lines = "".join(f"{name}:{signed[name]}\n" for name in names)
    canonical = "\n".join((method, path, query, lines, ";".join(names), "UNSIGNED-PAYLOAD"))
    scope = f"{when[:8]}/us-east-1/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", when, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = b"AWS4" + ROOT["HISS_ROOT_SECRET_KEY"].encode()
    for part in (when[:8], "us-east-1", "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={ROOT['HISS_ROOT_ACCESS_KEY']}/{scope}"
    value = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={';'.join(names)}, Signature={signature}"
    return {**signed, "authorization": value}


# -- what was said


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """Bytes of POOL: any two bodies differ in offset or length, so each content names its PUT."""

    offset: int
    length: int

    @property
    def view(self) -> memoryview:
        return memoryview(POOL)[self.offset : self.offset + self.length]

    @property
    def crc(self) -> int:
        return int(checksums.crc64nvme(self.view))


Content = tuple[int, int] | None
"""(length, CRC64NVME) of a version; None: the key is absent."""


class Ledger:
    """What each key may be now: one content after an acknowledged request, more while outcomes are unknown."""

    def __init__(self) -> None:
        self.may_be: dict[tuple[str, str], list[Content]] = collections.defaultdict(lambda: [None])
        self.uploads: list[tuple[str, str, str]] = []
        self.acknowledged = 0
        self.unknown = 0

    def done(self, bucket: str, key: str, content: Content) -> None:
        self.acknowledged += 1
        self.may_be[bucket, key] = [content]

    def perhaps(self, bucket: str, key: str, content: Content) -> None:
        self.unknown += 1
        self.may_be[bucket, key] = [*self.may_be[bucket, key], content]

    def lost(self, named: set[tuple[str, str, str]]) -> int:
        """The host's memory is gone: what the node named may be absent; how many keys that concerns."""
        count = 0
        for (bucket, key), contents in self.may_be.items():
            said = [content for content in contents if content and (bucket, key, f"{content[1]:016x}") in named]
            if said and None not in contents:
                contents.append(None)
                count += 1
        return count

    def judge(self, bucket: str, key: str, seen: Content) -> str:
        """A complaint, or nothing; what was seen is what the key is from now on."""
        may_be = self.may_be[bucket, key]
        if seen not in may_be:
            return f"{bucket}/{key} is {seen}, it may be {may_be}"
        self.may_be[bucket, key] = [seen]
        return ""


class Load:
    """Concurrent clients, each with keys of its own. ``run`` in the background; ``stop`` ends it and raises complaints."""

    def __init__(self, node: Node, seed: int, threads: int = 5, keys: int = 6) -> None:
        self.node = node
        self.ledgers = [Ledger() for _ in range(threads)]
        self._seed = seed
        self._keys = keys
        self._going = threading.Event()
        self._threads: list[threading.Thread] = []
        self._round = 0
        self.complaints: list[str] = []

    def start(self) -> None:
        self._going.set()
        self._round += 1
        self._threads = [
            threading.Thread(target=self._client, args=(number,), name=f"client-{number}", daemon=True)
            for number in range(len(self.ledgers))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._going.clear()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"
        assert not self.complaints, "\n".join(self.complaints)

    @property
    def acknowledged(self) -> int:
        return sum(ledger.acknowledged for ledger in self.ledgers)

    def _client(self, number: int) -> None:
        rng = random.Random(f"{self._seed}.{self._round}.{number}")
        client = S3(self.node)
        try:
            while self._going.is_set():
                bucket = rng.choice(list(BUCKETS))
                key = f"c{number}/{rng.randrange(self._keys)}"
                try:
                    self._step(client, self.ledgers[number], rng, bucket, key)
                except OSError:
                    time.sleep(0.02)  # the node is being killed: do not spin
        except Exception as error:  # a thread's trouble is the test's
            self.complaints.append(f"client {number}: {type(error).__name__}: {error}")
        finally:
            client.close()

    def _step(self, client: S3, ledger: Ledger, rng: random.Random, bucket: str, key: str) -> None:
        action = rng.choices(("put", "delete", "get", "multipart"), (60, 12, 22, 6))[0]
        if action == "get":
            complaint = self.look(client, ledger, bucket, key)
            if complaint:
                self.complaints.append(complaint)
        elif action == "delete":
            self._told(ledger, bucket, key, None, lambda: client.delete(bucket, key))
        elif action == "put":
            body = self._body(rng)
            self._told(ledger, bucket, key, (body.length, body.crc), lambda: client.put(bucket, key, body.view))
        else:
            self._multipart(client, ledger, rng, bucket, key)

    def _body(self, rng: random.Random) -> Body:
        low, high = rng.choices(((1, 5000), (5000, 300_000), (300_000, 3 * MIB), (3 * MIB, 30 * MIB)), (40, 30, 20, 4))[
            0
        ]
        length = rng.randrange(low, high)
        return Body(rng.randrange(len(POOL) - length), length)

    def _told(self, ledger: Ledger, bucket: str, key: str, content: Content, ask: Callable[[], Answer]) -> None:
        try:
            answer = ask()
        except OSError:
            ledger.perhaps(bucket, key, content)
            raise
        if answer.ok:
            ledger.done(bucket, key, content)
        elif answer.status >= 500:
            ledger.perhaps(bucket, key, content)
            time.sleep(0.05)
        else:
            self.complaints.append(f"{bucket}/{key}: {answer.status} {answer.code}")

    def _multipart(self, client: S3, ledger: Ledger, rng: random.Random, bucket: str, key: str) -> None:
        path = f"/{bucket}/{quote(key)}"
        answer = client.request("POST", path, "uploads=")
        found = re.search(rb"<UploadId>([^<]+)<", answer.body)
        if not answer.ok or found is None:
            return
        upload = found[1].decode()
        ledger.uploads.append((bucket, key, upload))
        start = rng.randrange(8 * MIB)
        lengths = [5 * MIB + rng.randrange(MIB), rng.randrange(1, 2 * MIB)]
        etags, position = [], start
        for number, length in enumerate(lengths, 1):
            part = Body(position, length)
            query = f"partNumber={number}&uploadId={quote(upload, safe='')}"
            answer = client.request("PUT", path, query, part.view)
            if not answer.ok:
                return
            etags.append(answer.headers["etag"])
            position += length
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>" for number, etag in enumerate(etags, 1)
        )
        document = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        whole = Body(start, sum(lengths))
        query = f"uploadId={quote(upload, safe='')}"

        def complete() -> Answer:
            return client.request("POST", path, query, document)

        self._told(ledger, bucket, key, (whole.length, whole.crc), complete)

    @staticmethod
    def look(client: S3, ledger: Ledger, bucket: str, key: str) -> str:
        """Read a key; a complaint if it is not what it may be. Trouble of a node under fire is no complaint."""
        answer = client.get(bucket, key)
        if answer.status == 404:
            return ledger.judge(bucket, key, None)
        if answer.status == 200:
            if len(answer.body) != int(answer.headers["content-length"]):
                raise OSError("cut off")
            return ledger.judge(bucket, key, (len(answer.body), int(checksums.crc64nvme(answer.body))))
        return "" if answer.status >= 500 else f"GET {bucket}/{key}: {answer.status} {answer.code}"


# -- the judge


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
        deadline = time.monotonic() + 20
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

    def is_archived(self, timeout_s: float = 45.0) -> None:
        """Every object is one verified copy in the archive, byte for byte, and nothing else lies there."""

        def all_archived() -> bool:
            return all(record.archive is not None for record in self._node.records())

        until(all_archived, lambda: f"all is archived: {self._undrained()}\n{self._node.tail(20)}", timeout_s)
        expected = {}
        for record in self._node.records():
            assert record.archive is not None
            assert record.archive.crc64nvme == record.crc64nvme
            expected[self._node.paths.archive / record.archive.path] = record
        until(lambda: self._archive_files() <= expected.keys(), lambda: self._too_much(expected.keys()), 10)
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
        until(lambda: not self._archive_files(), lambda: self._too_much(()), 20)
        report = self.is_sound()
        assert (report.objects, report.parts, report.live_bytes, report.extents) == (0, 0, 0, 0), report
        until(
            lambda: not self._held(),
            lambda: f"segments that are not recycled: {self._held()}\n{self._node.tail(20)}",
            20,
        )

    def _held(self) -> list[Path]:
        """Segment files beyond the open ones of each slot whose content is still of their current generation."""
        held = []
        for slot in sorted(self._node.paths.segments.iterdir()):
            written = [path for path in sorted(slot.glob("*.seg")) if _is_written(path)]
            held += written if len(written) > OPEN_SEGMENTS_MAX else []
        return held


def _is_written(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        header = SegmentHeader.read(file.fileno())
        label = read_label(file.fileno(), BLOCK_BYTES)
        return header is not None and label is not None and label.generation == header.generation
    return False


@contextlib.contextmanager
def running(folder: Path, environ: dict[str, str] | None = None, **settings: str) -> Iterator[Node]:
    """A started, ready node with its buckets."""
    node = Node(folder, environ, **settings)
    node.start()
    try:
        node.ready()
        with contextlib.closing(S3(node)) as client:
            client.make_buckets()
        yield node
    finally:
        node.end()


__all__ = ["BUCKETS", "MIB", "POOL", "S3", "Body", "IngestError", "Judge", "Ledger", "Load", "Node", "running", "until"]
