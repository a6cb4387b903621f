"""EIO, ENOSPC and short writes on data, flush, journal, index and archive of a real node.

A preloaded library makes chosen system calls fail. Always: a client gets a 200 that holds or a clear 5xx, the node keeps
serving, nothing acknowledged is lost, and the trouble is counted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.harness import MIB, S3, Body, Judge, Load, Node, running, until
from tests.crash.powercut import build_shim

SHORT = 0


class Tokens:
    """What is to fail: one file for one failure, or for every one while it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._count = 0

    def arm(self, operation: str, code: int, part: str, *, stays: bool = False) -> Path:
        self._count += 1
        name = f"{'+' if stays else ''}{operation}@{code}@{part}@{self._count}"
        token = self.folder / name.replace("/", "|")
        token.touch()
        return token

    def clear(self) -> None:
        for token in self.folder.iterdir():
            token.unlink(missing_ok=True)


class Scene:
    def __init__(self, node: Node, tokens: Tokens) -> None:
        self.node = node
        self.tokens = tokens
        self.load = Load(node, 0, threads=1)
        self.judge = Judge(node, self.load)
        self.client = S3(node)
        self._count = 0

    def put(self, bucket: str, length: int, key: str = "") -> bool:
        """Whether it was acknowledged; anything else must be a 5xx."""
        self._count += 1
        body = Body(self._count * 4099 % MIB, length)
        ledger = self.load.ledgers[0]
        before = ledger.acknowledged
        with contextlib.suppress(OSError):  # a process that gave up and is started again
            self.load._told(
                ledger,
                bucket,
                key or f"k{self._count}",
                (body.length, body.crc),
                lambda: self.client.put(bucket, key or f"k{self._count}", body.view),
            )
        assert not self.load.complaints, self.load.complaints
        return ledger.acknowledged > before

    def puts(self) -> list[bool]:
        return [self.put(bucket, length) for bucket in ("disk", "memory") for length in (7000, 300_000, 9 * MIB)]

    def counted(self, name: str, **labels: str) -> float:
        port = json.loads(self.node.paths.ports.read_text())["control"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        wanted = "".join(f'{label}="{value}"' for label, value in labels.items())
        found = re.search(rf"^{name}\{{[^}}]*{wanted}[^}}]*\}} (\S+)$" if labels else rf"^{name} (\S+)$", text, re.M)
        return float(found[1]) if found else 0.0

    def serves(self) -> None:
        """PUTs of every kind succeed again."""
        self.tokens.clear()
        deadline = time.monotonic() + 90
        while not all(self.puts()):
            assert time.monotonic() < deadline, f"the node does not come back\n{self.node.tail()}"
            time.sleep(0.1)
        self.node.ready()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("faults")
    tokens = Tokens(folder / "tokens")
    environ = {
        "LD_PRELOAD": str(build_shim(folder)),
        "HISS_TEST_SHIM_ROOT": str(folder / "data"),
        "HISS_TEST_SHIM_FAULTS": str(tokens.folder),
    }
    with running(folder, environ, buffer_bytes="2GiB") as node:
        scene = Scene(node, tokens)
        yield scene
        scene.client.close()
    shutil.rmtree(node.paths.root)  # gigabytes


def test_every_failure_shows_what_it_cost(scene: Scene) -> None:
    assert all(scene.puts())


def _passed(scene: Scene, operation: str, code: int, part: str, metric: str, errors: float) -> bool:
    """One failure, counted; False where it met a file that is only being made, which holds no data yet."""
    empty = scene.counted("hiss_storage_errors_total", kind="segment")
    token = scene.tokens.arm(operation, code, part)
    deadline = time.monotonic() + 90
    while token.exists():
        assert time.monotonic() < deadline, f"nothing passed\n{scene.node.tail()}"
        scene.puts()
    if not metric:
        return True

    def counted() -> str:
        if scene.counted("hiss_storage_errors_total", kind=metric) > errors:
            return metric
        return "segment" if scene.counted("hiss_storage_errors_total", kind="segment") > empty else ""

    return until(counted, "the error is counted") == metric


@pytest.mark.parametrize(
    ("operation", "code", "part", "metric"),
    [
        ("write", errno.EIO, ".seg", "write"),
        ("write", errno.ENOSPC, ".seg", "write"),
        ("flush", errno.EIO, ".seg", "flush"),
        ("write", errno.EIO, ".jrnl", "journal"),
        ("write", errno.ENOSPC, ".jrnl", "journal"),
        ("flush", errno.EIO, ".jrnl", "journal"),
        ("write", SHORT, ".seg", ""),
        ("write", SHORT, ".jrnl", ""),
        ("write", errno.EIO, "catalogue.sqlite-wal", ""),
        ("write", errno.ENOSPC, "/archive/", ""),
        ("flush", errno.EIO, "/archive/", ""),
        ("rename", errno.EIO, "/archive/", ""),
    ],
)
def test_one_failure(scene: Scene, operation: str, code: int, part: str, metric: str) -> None:
    errors = scene.counted("hiss_storage_errors_total", kind=metric) if metric else 0.0
    retired = scene.counted("hiss_segment_retired_total")
    while not _passed(scene, operation, code, part, metric, errors):
        pass
    if part == ".seg" and code:
        until(lambda: scene.counted("hiss_segment_retired_total") > retired, "the segment is retired")
    scene.serves()
    scene.judge.reads_back()


@pytest.mark.parametrize(
    ("operation", "code", "part"),
    [
        ("write", errno.EIO, ".seg"),
        ("flush", errno.EIO, ".seg"),
        ("write", errno.ENOSPC, "/journal/"),
        ("flush", errno.EIO, "/journal/"),
        ("write", errno.ENOSPC, "/catalogue/"),
    ],
)
def test_failure_without_end_until_it_is_put_right(scene: Scene, operation: str, code: int, part: str) -> None:
    """Nothing succeeds that needs it; when the disk is back, everything does, and ``memory`` objects reach it."""
    scene.tokens.arm(operation, code, part, stays=True)
    scene.client.close()
    patient, scene.client = scene.client, S3(scene.node, timeout_s=2.0)
    try:
        for length in (7000, 3 * MIB):
            assert not scene.put("disk", length)
        scene.put("memory", 7000)
    finally:
        scene.client.close()
        scene.client = patient
    scene.serves()
    scene.judge.reads_back()


def test_in_the_end_everything_is_archived_and_sound(scene: Scene) -> None:
    scene.judge.is_archived()
    scene.judge.is_sound()
    scene.node.stop()
    scene.judge.is_sound()
