"""restic: a folder backed up into a repository in a bucket, restored, and checked down to the last byte."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.adapters import Service
from tests.clients.adapters.base import run_program


@pytest.mark.parametrize("node", ["http", "https"], indirect=True)
def test_backup_restore_check(service: Service, peer: Callable[[str], str], tmp_path: Path) -> None:
    folder, back = tmp_path / "run 7 ü", tmp_path / "back"
    (folder / "frames").mkdir(parents=True)
    names = [f"frames/{number:03d}.cbf" for number in range(40)] + ["notes.txt", "empty"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(os.urandom(number * 50_000) if name != "empty" else b"")
    trust = ("--cacert", str(service.ca)) if service.ca else ()
    environ = {
        "AWS_ACCESS_KEY_ID": service.access_key,
        "AWS_SECRET_ACCESS_KEY": service.secret_key,
        "RESTIC_PASSWORD": "for this test only",
        "RESTIC_REPOSITORY": f"s3:{service.url}/{service.bucket}/restic",
        "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
    }

    def restic(*words: str) -> str:
        return run_program(peer("restic"), *trust, "--quiet", *words, home=tmp_path, **environ)

    restic("init")
    restic("backup", str(folder))
    (folder / "notes.txt").write_text("changed")
    restic("backup", str(folder))
    restic("check", "--read-data")
    restic("restore", "latest", "--target", str(back))
    restored = back / folder.relative_to("/")
    assert filecmp.cmpfiles(folder, restored, names, shallow=False) == (names, [], [])
    restic("forget", "--prune", "--keep-last", "1")
    restic("check")
