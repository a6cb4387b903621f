"""The engine that tests start: it keeps what it commits, and it can be stopped, frozen and killed."""

from __future__ import annotations

import socket
import threading

import pytest

from tests.engine import Engine


def test_databases_are_apart_and_bytewise(postgres: Engine, database: str) -> None:
    name = database.rpartition("/")[2]
    assert postgres.fresh() != database
    postgres.sql("CREATE TABLE t (k text)", name)
    postgres.sql("INSERT INTO t VALUES ('b'), ('B'), ('a')", name)
    assert postgres.sql("SELECT k FROM t ORDER BY k", name) == [["B"], ["a"], ["b"]]
    assert postgres.sql("SHOW fsync") == [["on"]]


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_what_is_committed_survives(own_postgres: Engine, how: str) -> None:
    own_postgres.sql(f"CREATE TABLE {how}ped (k int)")
    own_postgres.sql(f"INSERT INTO {how}ped VALUES (7)")
    getattr(own_postgres, how)()
    assert not own_postgres.running
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((own_postgres.host, own_postgres.port), timeout=5)
    own_postgres.start()
    assert own_postgres.sql(f"SELECT k FROM {how}ped") == [["7"]]


def test_a_frozen_engine_answers_when_it_is_thawed(own_postgres: Engine) -> None:
    own_postgres.freeze()
    answers: list[list[list[str]]] = []
    asking = threading.Thread(target=lambda: answers.append(own_postgres.sql("SELECT 1")))
    asking.start()
    asking.join(0.3)
    assert not answers
    own_postgres.thaw()
    asking.join(60)
    assert answers == [[["1"]]]
