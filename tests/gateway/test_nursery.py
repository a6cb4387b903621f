"""What forks the node's processes may die, too; and nothing that dies stays behind as a zombie."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def stat_of(pid: int) -> tuple[str, str, int]:
    """(name, state, parent); proc_pid_stat(5)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    name, fields = text[text.index("(") + 1 : text.rindex(")")], text.rpartition(")")[2].split()
    return name, fields[0], int(fields[1])


def children_of(parent: int) -> dict[int, tuple[str, str]]:
    """Pid -> (name, state)."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            name, state, above = stat_of(int(entry.name))
            if above == parent:
                found[int(entry.name)] = name, state
    return found


@pytest.fixture(scope="module")
def node(start_node: Callable[..., Any]) -> Any:
    return start_node("--set", "kernels=off")


def nursery_of(node: Any) -> list[int]:
    return [
        pid for pid, (name, state) in children_of(node.process.pid).items() if name == "hiss nursery" and state != "Z"
    ]


def worker_of(node: Any) -> dict[str, Any]:
    return next(row for row in node.processes() if row["role"] == "worker")


def test_every_process_is_the_supervisors_own_and_says_what_it_is(node: Any) -> None:
    names = {pid: name for pid, (name, _) in children_of(node.process.pid).items()}
    for row in node.processes():
        assert names[row["pid"]] == f"hiss {row['role']}"
        assert os.getpgid(row["pid"]) == row["pid"]
    assert len(nursery_of(node)) == 1
    assert len(names) == len(node.processes()) + 1


def test_a_process_has_only_the_descriptors_it_was_given(node: Any) -> None:
    held = {}
    for link in Path(f"/proc/{worker_of(node)['pid']}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held[link] = os.readlink(link)
    memories = [where for where in held.values() if where.startswith("/memfd:hiss-boot")]
    assert not memories, "the boot value is read and closed"
    lock = [where for where in held.values() if where.endswith("/lock")]
    assert len(lock) == 1


def test_the_nursery_may_die(node: Any, poll: Callable[..., Any]) -> None:
    before = worker_of(node)
    (first,) = nursery_of(node)
    os.kill(first, signal.SIGKILL)
    poll(lambda: first not in children_of(node.process.pid), "it is reaped")
    node.healthy()
    assert worker_of(node)["pid"] == before["pid"], "nobody dies with it"
    os.kill(before["pid"], signal.SIGKILL)
    poll(
        lambda: worker_of(node)["restarts"] == before["restarts"] + 1 and worker_of(node)["state"] == "ready",
        "a worker",
    )
    node.healthy()
    assert len(nursery_of(node)) == 1
    assert nursery_of(node) != [first]


def test_a_nursery_that_hangs_is_replaced(start_node: Callable[..., Any], poll: Callable[..., Any]) -> None:
    node = start_node("--set", "kernels=off")
    (first,) = nursery_of(node)
    os.kill(first, signal.SIGSTOP)
    before = worker_of(node)
    os.kill(before["pid"], signal.SIGKILL)
    poll(lambda: worker_of(node)["state"] == "ready" and worker_of(node)["pid"] != before["pid"], "a worker", 90)
    assert first not in children_of(node.process.pid)
    assert node.stop() == 0


def test_what_a_process_leaves_behind_is_reaped() -> None:
    """Its parent is gone, so it is the supervisor's; when it ends, too, no zombie stays."""
    program = "import os; pid = os.fork(); print(pid, flush=True) if pid else os.read(0, 1)"
    launcher = (
        "import asyncio, os, subprocess, sys\n"
        "from gateway.supervisor.reaper import Reaper\n"
        "async def main():\n"
        "    reaper = Reaper()\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {program!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "    reaper.add(child.pid)\n"
        "    stranger = int(await asyncio.to_thread(child.stdout.readline))\n"
        "    await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)\n"
        "    assert os.path.exists(f'/proc/{stranger}')\n"
        "    child.stdin.close()\n"
        "    assert reaper.reap(child.pid) == 0\n"
        "    child.returncode = 0\n"
        "    while os.path.exists(f'/proc/{stranger}'):\n"
        "        await asyncio.sleep(0.01)\n"
        "asyncio.run(asyncio.wait_for(main(), 60))\n"
    )
    done = subprocess.run([sys.executable, "-c", launcher], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
