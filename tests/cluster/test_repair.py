"""Back-up, restore and fsck on a node of a cluster: its truth is in the engine."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.loopback import Nodes, hiss


@pytest.fixture
def nodes(tmp_path: Path, database: str) -> Iterator[Nodes]:
    made = Nodes(tmp_path, database)
    try:
        yield made
    finally:
        made.end()


def test_an_index_is_compared_with_the_engine_and_made_anew(nodes: Nodes, tmp_path: Path) -> None:
    (a,) = nodes.start("a")
    assert a.ask("PUT", "/scan").ok
    for number in range(5):
        assert a.ask("PUT", f"/scan/{number}", "", b"x" * 5000).ok
    file = tmp_path / "backup.sqlite"
    assert a.hiss("catalog", "backup", str(file))["applied_sequence"] > 0
    assert "restore the engine's database instead" in a.hiss("catalog", "restore", str(file), code=2)

    unasked = a.hiss("fsck")
    assert unasked["sound"]
    assert "HISS_CATALOG" in unasked["unchecked"][0]
    asked = a.hiss("fsck", "--catalog", nodes.dsn, "--payload")
    assert (asked["sound"], asked["unchecked"], asked["objects"]) == (True, [], 5)
    assert asked["payload_bytes_checked"] == 25_000

    a.stop()
    with contextlib.closing(sqlite3.connect(a.paths.catalogue)) as database:
        database.execute("DELETE FROM objects WHERE sequence = (SELECT MIN(sequence) FROM objects)")
        database.commit()
    data = str(a.paths.root)
    found = hiss("fsck", "--data", data, "--catalog", nodes.dsn, "--json")
    assert found.returncode == 1
    assert "index" in {problem["kind"] for problem in json.loads(found.stdout)["problems"]}
    repaired = hiss("fsck", "--data", data, "--repair", "--json", environ={"HISS_CATALOG": nodes.dsn})
    assert json.loads(repaired.stdout)["repaired"]
    assert not a.paths.catalogue.exists()
    a.start()
    a.ready()
    assert all(a.ask("GET", f"/scan/{number}").body == b"x" * 5000 for number in range(5))
    assert a.hiss("fsck", "--catalog", nodes.dsn)["sound"]
