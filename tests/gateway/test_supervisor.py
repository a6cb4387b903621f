"""The supervisor over real child processes: order, restarts, what is handed down, shutdown, and no orphans."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest

from gateway.supervisor.backoff import Backoff

CATALOGUE = {"role": "catalogue", "how": "sleeper", "stage": 4, "barrier": True}
WORKERS = {"role": "worker", "how": "sleeper", "stage": 0, "slots": [0, 1], "arena": True, "listeners": ["s3", "dav"]}
DRAIN = {"role": "drain", "how": "sleeper", "stage": 1, "essential": False}
CONTROL = {"role": "control", "how": "sleeper", "stage": 2, "listeners": ["control"]}

Start = Callable[..., Any]


def test_backoff_doubles_to_its_cap_and_starts_over_after_a_healthy_run() -> None:
    backoff = Backoff(first_s=0.1, cap_s=1.0, healthy_s=30.0)
    now = 100.0
    delays = []
    for _ in range(6):
        backoff.started(now)
        now += 0.01
        delays.append(backoff.died(now))
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.failing(now)
    assert not backoff.failing(now + 61)
    backoff.started(now)
    assert backoff.died(now + 30.0) == 0.1


def test_roles_start_in_order_and_stop_by_stage(little_node: Start, poll: Start) -> None:
    node = little_node([CATALOGUE, WORKERS, DRAIN, CONTROL], workers=2, arena_bytes="128MiB")
    status = node.serving()
    rows = {(row["role"], row["slot"]): row["state"] for row in status["processes"]}
    assert list(rows) == [("catalogue", 0), ("worker", 0), ("worker", 1), ("drain", 0), ("control", 0)]
    assert {state for (role, _), state in rows.items() if role != "drain"} == {"ready"}
    poll(lambda: len(node.notes("started")) == 5, "the drain, which nobody waits for, is there, too")
    assert node.stop() == 0
    started = [note["role"] for note in node.notes("started")]
    assert started[0] == "catalogue"
    assert sorted(started[1:]) == ["control", "drain", "worker", "worker"]
    assert [note["role"] for note in node.notes("stopped")] == ["worker", "worker", "drain", "control", "catalogue"]
    assert not (node.data_dir / "run" / "ports.json").exists()


def test_a_dead_process_comes_back_with_its_descriptors_and_a_newer_epoch(little_node: Start, poll: Start) -> None:
    node = little_node([CATALOGUE, {**WORKERS, "slots": [0], "how": "counter"}])
    first = node.serving()["processes"][1]
    poll(lambda: node.notes("count"), "first count")
    os.kill(first["pid"], signal.SIGKILL)
    poll(lambda: len(node.notes("count")) == 2, "the worker is back")
    before, after = (note for note in node.notes("started") if note["role"] == "worker")
    assert after["epoch"] > before["epoch"]
    assert (before["restarts"], after["restarts"]) == (0, 1)
    assert after["regions"] == before["regions"] == 4
    assert after["fds"][:-1] == before["fds"][:-1], "all but the ready pipe keep their numbers"
    assert [note["before"] for note in node.notes("count")] == [0, 1], "the span table outlives the process"
    row = poll(lambda: [r for r in node.processes()["processes"] if r["restarts"] == 1], "status of the restart")[0]
    assert row["last_exit"] == "was killed by SIGKILL"
    assert node.stop() == 0


def test_a_process_that_keeps_dying_is_reported_and_costs_nobody_else(little_node: Start, poll: Start) -> None:
    node = little_node([CATALOGUE, {**DRAIN, "how": "crasher"}])
    pid = node.serving()["processes"][0]["pid"]
    rows = poll(lambda: [row for row in node.processes()["processes"] if row["restarts"] >= 2], "two restarts")
    assert [row["role"] for row in rows] == ["drain"]
    assert node.processes()["processes"][0]["pid"] == pid
    assert "drain/0 exited with code 3; next start in 0.2 s" in node.log.read_text()
    assert node.stop() == 0


@pytest.mark.parametrize("how", ["unready", "silent"])
def test_an_essential_role_that_never_gets_ready_fails_the_start(little_node: Start, how: str) -> None:
    # Only where it has to be waited for is the time short; then nobody else has to be in time.
    catalogue, limits = ([CATALOGUE], {}) if how == "unready" else ([], {"start_timeout_s": 1.5})
    node = little_node([*catalogue, {**CONTROL, "how": how}], **limits)
    assert node.process.wait(60) == 1
    log = node.log.read_text()
    assert "refused: the control process " in log
    assert "before it was ready" in log
    assert [note["role"] for note in node.notes("stopped")] == [role["role"] for role in catalogue], "who started stops"


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(little_node: Start) -> None:
    node = little_node([CATALOGUE, {**WORKERS, "slots": [0], "how": "stubborn"}], shutdown_grace_s=0.5)
    node.serving()
    assert node.stop() == 0
    assert "worker/0 did not stop in time: killed" in node.log.read_text()
    assert [note["role"] for note in node.notes("stopped")] == ["catalogue"]


def test_a_second_signal_ends_the_grace(little_node: Start, poll: Start) -> None:
    node = little_node([{**WORKERS, "slots": [0], "how": "stubborn"}], shutdown_grace_s=600)
    node.serving()
    node.process.send_signal(signal.SIGINT)
    poll(lambda: node.processes()["state"] == "stopping", "the node is stopping")
    assert node.stop(signal.SIGINT) == 0


def test_sigkill_of_the_supervisor_leaves_no_orphans_and_the_folder_free(
    little_node: Start, poll: Start, is_gone: Callable[[int], bool]
) -> None:
    roles = [CATALOGUE, {**WORKERS, "slots": [0], "how": "stubborn"}]
    node = little_node(roles)
    pids = [row["pid"] for row in node.serving()["processes"]]
    node.process.kill()
    node.process.wait()
    again = little_node(roles, shutdown_grace_s=0.5)
    again.serving()
    assert all(is_gone(pid) for pid in pids), "no new node while a process of the old one lives"
    epochs = [note["epoch"] for note in node.notes("started")]
    assert epochs == sorted(epochs)
    assert again.stop() == 0


def test_a_second_node_is_refused_the_folder_and_the_ports(little_node: Start) -> None:
    node = little_node([CATALOGUE])
    node.serving()
    second = little_node([CATALOGUE])
    assert second.process.wait(60) == 1
    assert f"is held by another gateway (pid {node.process.pid})" in second.log.read_text()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        third = little_node([CATALOGUE], data_dir=str(node.data_dir) + "-2", s3_port=port)
        assert third.process.wait(60) == 1
    assert f"port {port} (s3) is held by another gateway or program" in third.log.read_text()
    assert node.stop() == 0


def test_children_inherit_no_root_credentials(little_node: Start) -> None:
    node = little_node([CATALOGUE], environ={"HISS_ROOT_ACCESS_KEY": "root", "HISS_ROOT_SECRET_KEY": "hush-hush-hush"})
    node.serving()
    assert "HISS_ROOT_SECRET_KEY" not in node.notes("started")[0]["environment"]
    assert node.stop() == 0
